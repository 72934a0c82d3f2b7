"""A training step as a CUDA graph: hundreds of small kernels that the device starts by itself.

Python starts a kernel in some ten microseconds, and the kernels of a small network take less: the device would wait for
Python. A graph is recorded once and replayed with one call. Source: PyTorch's notes "CUDA semantics", section "CUDA
Graphs".
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from classifier.pipeline.errors import PipelineError

WARM_UP = 3  # steps before the recording, in which libraries choose their kernels and take their workspaces

# Pixels and targets of a batch to figures of the step; it also leaves gradients at the network's parameters
Step = Callable[[Tensor, Tensor], tuple[Tensor, ...]]


class GraphedStep:
    """A step for batches of one shape, recorded after WARM_UP of them; batches of another shape run as they are.

    It computes what the step itself does, to the same bits, if that calls the same kernels for every batch: a network
    whose `forward` decides in Python, by chance or by a tensor's value, cannot be recorded.
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
        """Figures of the step. Raises PipelineError if it cannot be recorded."""
        if self.inputs is None:
            self.inputs = torch.empty_like(pixels), torch.empty_like(targets)
        if (pixels.shape, targets.shape) != tuple(tensor.shape for tensor in self.inputs):
            return self.step(pixels, targets)
        with torch.cuda.device(self.device):
            for ours, given in zip(self.inputs, (pixels, targets), strict=True):
                ours.copy_(given)
            if self.warm_up_left:
                return self._warm_up(*self.inputs)
            if self.graph is None:
                self._record(*self.inputs)
            self.graph.replay()
            figures = tuple(figure.clone() for figure in self.figures)  # the next replay writes to the same memory
        for weights, gradient in zip(self.parameters, self.gradients, strict=True):
            weights.grad = gradient
        return figures

    def _warm_up(self, pixels: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        """The step itself, on the stream that records it later."""
        self.warm_up_left -= 1
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            figures = self.step(pixels, targets)
        current.wait_stream(self.stream)
        return figures

    def _record(self, pixels: Tensor, targets: Tensor) -> None:
        for weights in self.parameters:
            weights.grad = None  # so that the recorded backward makes gradients instead of adding to them
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads go on meanwhile, such as a DataLoader's that locks the pages of the next batch
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
