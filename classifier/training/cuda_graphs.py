"""A training step as a CUDA graph: hundreds of small kernels launched with one call.

Python needs about ten microseconds to launch a kernel, and the kernels of a small network take less than that, so the
device would wait for Python. A graph is recorded once, then replayed with one call. Source: PyTorch's notes "CUDA
semantics", section "CUDA Graphs".
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from classifier.pipeline.errors import PipelineError

WARM_UP = 3  # steps before the recording, in which libraries choose kernels and allocate workspaces

# Takes pixels and targets of a batch, returns scalars such as the loss, and sets `grad` of the network's parameters
Step = Callable[[Tensor, Tensor], tuple[Tensor, ...]]


class GraphedStep:
    """A training step that is recorded after WARM_UP batches and then replayed.

    Only batches with the shape of the first one are replayed; others run without a graph. The results are bit-identical
    to those of the step if it launches the same kernels for every batch. A network whose `forward` branches in Python
    on random numbers or on the value of a tensor cannot be recorded.
    """

    def __init__(self, step: Step, network: nn.Module, device: torch.device) -> None:
        self.step = step
        self.parameters = [weights for weights in network.parameters() if weights.requires_grad]
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.warm_up_left = WARM_UP
        self.graph: Any = None
        self.inputs: tuple[Tensor, Tensor] | None = None
        self.figures: tuple[Tensor, ...] = ()
        self.gradients: list[Tensor | None] = []

    def __call__(self, pixels: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        """Run the step and return its scalars. Raises PipelineError if it cannot be recorded."""
        if self.inputs is None:
            self.inputs = torch.empty_like(pixels), torch.empty_like(targets)
        if (pixels.shape, targets.shape) != tuple(tensor.shape for tensor in self.inputs):
            return self.step(pixels, targets)
        with torch.cuda.device(self.device):
            for static, given in zip(self.inputs, (pixels, targets), strict=True):
                static.copy_(given)
            if self.warm_up_left:
                return self._warm_up(*self.inputs)
            if self.graph is None:
                self._record(*self.inputs)
            self.graph.replay()
            figures = tuple(figure.clone() for figure in self.figures)  # the next replay overwrites them
        for weights, gradient in zip(self.parameters, self.gradients, strict=True):
            weights.grad = gradient
        return figures

    def _warm_up(self, pixels: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        """Run the step without a graph, on the stream that is recorded later."""
        self.warm_up_left -= 1
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            figures = self.step(pixels, targets)
        current.wait_stream(self.stream)
        return figures

    def _record(self, pixels: Tensor, targets: Tensor) -> None:
        for weights in self.parameters:
            weights.grad = None  # so that the recorded backward writes gradients instead of accumulating them
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads may call CUDA meanwhile, such as the DataLoader thread that pins memory
            with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                self.figures = self.step(pixels, targets)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise PipelineError(
                f"cuda_graphs: this network's training step cannot be recorded ({reason}); set cuda_graphs: false"
            ) from None
        self.gradients = [weights.grad for weights in self.parameters]
        self.graph = graph
