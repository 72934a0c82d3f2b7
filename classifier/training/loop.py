"""A training step: forward, backward, update."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from time import perf_counter

import torch
from torch import Tensor, nn

from classifier.compute.device import Precision, naming_batch_size
from classifier.data.loader import Batches
from classifier.progress import progress
from classifier.training.cuda_graphs import GraphedStep
from classifier.training.inference import autocast
from classifier.training.state import TrainState

REPORT_EVERY = 100  # batches


class TrainStep:
    """Forward and backward pass of a batch, and an update after every `accumulate_steps` batches.

    loss_fn: takes logits and targets of a batch, returns the mean loss over its images. accumulate_steps: an update
    over this many batches equals the update over one batch of all their images. With several processes, each call
    processes this process's part of a batch; the recorded losses are those of the whole batch.
    """

    def __init__(
        self,
        state: TrainState,
        batches: Batches,
        loss_fn: Callable[[Tensor, Tensor], Tensor],
        accumulate_steps: int,
        precision: Precision,
    ) -> None:
        self.state = state
        self.batches = batches
        self.loss_fn = loss_fn
        self.accumulate_steps = accumulate_steps
        self.precision = precision
        self.wrapped = state.network if state.wrapped is None else state.wrapped  # a compiled module has no truth value
        self.checks_each_batch = batches.device.type == "cpu"  # elsewhere, reading a number waits for the device
        self.started = 0.0
        if state.scaler.is_enabled():
            # Otherwise the scheduler warns if GradScaler skips the first update
            state.optimizer._opt_called = True  # type: ignore[attr-defined]
        if state.cuda_graphs and batches.device.type == "cuda" and accumulate_steps == batches.group.size == 1:
            forward_backward = partial(forward_backward_pass, self.wrapped, loss_fn, state.scaler, precision)
            state.graphed_step = state.graphed_step or GraphedStep(forward_backward, state.network, batches.device)

    def rest_of_epoch(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield number, pixels and targets of each remaining batch of the current epoch, with a progress bar."""
        state, batches = self.state, self.batches
        set_training_mode(state.network)
        self.started = perf_counter() - state.seconds
        done = state.batch * batches.batch_size
        title = f"epoch {state.epoch + 1}"
        with progress(title, "image", batches.image_count, initial=done, hidden=not batches.group.is_first) as bar:
            epoch = enumerate(batches.epoch(state.epoch, state.batch), state.batch)
            while batch := self._next(epoch):
                number, (pixels, targets) = batch
                yield number, pixels, targets
                if number % REPORT_EVERY == 0:
                    state.flush()
                    bar.set_postfix(loss=f"{state.last_loss:.4f}", refresh=False)
                    bar.update(number * batches.batch_size + batches.count(number) - bar.n)
            bar.update(batches.image_count - bar.n)
        state.flush()

    def __call__(self, number: int, pixels: Tensor, targets: Tensor) -> bool:
        """Train on a batch; return whether it ended with an update, after which a checkpoint can be saved.

        Raises PipelineError if the loss or a gradient is not finite: on a CPU before the update, on an accelerator at
        the next report or checkpoint, because checking would wait for the device. The weights kept so far stay.
        Raises PipelineError if the device runs out of memory.
        """
        with self._naming_batch_size():
            return self._train(number, pixels, targets)

    def _train(self, number: int, pixels: Tensor, targets: Tensor) -> bool:
        state, batches, group = self.state, self.batches, self.batches.group
        is_last = (number + 1) % self.accumulate_steps == 0 or number + 1 == len(batches)
        if state.graphed_step:
            loss, gradient_norm = state.graphed_step(pixels, targets)
        else:
            images_in_update = self.accumulate_steps * batches.batch_size
            before = number // self.accumulate_steps * images_in_update
            images = min(images_in_update, batches.image_count - before)
            weight = len(pixels) / images * group.size  # times size, because DDP averages gradients over processes
            with nullcontext() if is_last else group.no_exchange(self.wrapped):
                loss, gradient_norm = forward_backward_pass(
                    self.wrapped, self.loss_fn, state.scaler, self.precision, pixels, targets, weight, is_last
                )
        share = len(pixels) / batches.count(number)
        state.defer(number, "loss", group.sum(loss * share if share != 1 else loss))
        if is_last and not state.scaler.is_enabled():  # GradScaler skips updates whose gradients are not finite
            state.defer(number, "gradient", gradient_norm)
        if self.checks_each_batch:
            state.flush()
        if is_last:
            state.scaler.step(state.optimizer)
            state.scaler.update()
            state.scheduler.step()
            state.optimizer.zero_grad()
            state.batch, state.seconds = number + 1, perf_counter() - self.started
        return is_last

    def mean_loss(self) -> float:
        """Return the mean loss over the batches of a finished epoch."""
        self.state.flush()
        return self.state.loss_sum / len(self.batches)

    def _next(self, batches: Iterator[tuple[int, tuple[Tensor, Tensor]]]) -> tuple[int, tuple[Tensor, Tensor]] | None:
        with self._naming_batch_size():
            return next(batches, None)

    def _naming_batch_size(self) -> AbstractContextManager[None]:
        return naming_batch_size(self.batches.device, self.batches.batch_size, self.accumulate_steps)


def epoch_summary(epoch: int, figures: Mapping[str, float], images_per_second: float) -> str:
    """Return a line on an epoch, in the form of PyTorch's tutorial."""
    return (
        f"Epoch {epoch}: Accuracy: {figures['val_accuracy']:.1%}, Avg loss: {figures['val_loss']:.6f}, "
        f"train loss: {figures['train_loss']:.6f}, {images_per_second:,.0f} images/s"
    )


def forward_backward_pass(
    network: nn.Module,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    scaler: torch.amp.GradScaler,
    precision: Precision,
    pixels: Tensor,
    targets: Tensor,
    weight: float = 1.0,
    is_last: bool = True,
) -> tuple[Tensor, Tensor]:
    """Run forward and backward of a batch; return its loss and a number that is finite only if all gradients are.

    Both are scalar tensors. weight: factor of the loss in the gradients. is_last: whether this is the last batch of the
    update; before it, and with float16, the second number is 0.
    """
    with autocast(pixels.device, precision):
        logits = network(pixels)
        # A process without images must still run backward, because the others wait for its gradients
        loss = loss_fn(logits, targets) if len(pixels) else logits.sum()
    scaler.scale(loss * weight if weight != 1 else loss).backward()
    loss = loss.detach()
    return loss, _finite_check(network) if is_last and not scaler.is_enabled() else torch.zeros_like(loss)


def _finite_check(network: nn.Module) -> Tensor:
    """Return a scalar that is finite only if all gradients are, by the fastest way on the device.

    On a CPU that is the sum, which takes a few hundredths of a step on two cores; elsewhere the norm, which takes few
    kernels for all parameters together.
    """
    gradients = [weights.grad for weights in network.parameters() if weights.grad is not None]
    if gradients[0].device.type == "cpu":
        return torch.stack([gradient.sum() for gradient in gradients]).sum()
    return nn.utils.get_total_norm(gradients)


def set_training_mode(network: nn.Module) -> None:
    """Set training mode, except for batch normalisation whose parameters are all frozen: its statistics stay fixed."""
    network.train()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
            parameters = list(module.parameters())
            if parameters and not any(parameter.requires_grad for parameter in parameters):
                module.eval()
