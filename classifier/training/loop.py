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

REPORT_EVERY = 100  # batches, as in the tutorial


class TrainStep:
    """One batch's forward and backward, and after `accumulate_steps` batches an update.

    loss_fn: of logits and targets of a batch, the mean over its images. accumulate_steps: this many batches make one
    update, the same as that of one batch with all their images. With several processes, each call works on this
    process's part of a batch; the losses are those of all of them.
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
        self.trained = state.network if state.trained is None else state.trained  # a compiled one has no truth value
        self.reads_at_once = batches.device.type == "cpu"  # elsewhere, reading a figure waits for the device
        self.started = 0.0
        if state.scaler.is_enabled():
            # The scheduler warns if the first update is skipped
            state.optimizer._opt_called = True  # type: ignore[attr-defined]
        if state.cuda_graphs and batches.device.type == "cuda" and accumulate_steps == batches.group.size == 1:
            forward_backward = partial(training_step, self.trained, loss_fn, state.scaler, precision)
            state.graphed_step = state.graphed_step or GraphedStep(forward_backward, state.network, batches.device)

    def rest_of_epoch(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Number, pixels and targets of each batch of the state's epoch that is left, with progress."""
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
        """Train on a batch; return whether it ended with an update, after which the state is one to resume from.

        Raises PipelineError if the loss or a gradient is not finite, before the update; on an accelerator, where that
        would wait for the device, at the next report or checkpoint. Raises PipelineError if the device has too little
        memory. The state's kept weights stay.
        """
        with self._memory_named():
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
            weight = len(pixels) / images * group.size  # of what the update takes the processes' mean
            with nullcontext() if is_last else group.no_exchange(self.trained):
                loss, gradient_norm = training_step(
                    self.trained, self.loss_fn, state.scaler, self.precision, pixels, targets, weight, is_last
                )
        share = len(pixels) / batches.count(number)
        state.defer(number, "loss", group.sum(loss * share if share != 1 else loss))
        if is_last and not state.scaler.is_enabled():  # which skips updates whose gradients are not finite
            state.defer(number, "gradient", gradient_norm)
        if self.reads_at_once:
            state.flush()
        if is_last:
            state.scaler.step(state.optimizer)
            state.scaler.update()
            state.scheduler.step()
            state.optimizer.zero_grad()
            state.batch, state.seconds = number + 1, perf_counter() - self.started
        return is_last

    def mean_loss(self) -> float:
        """Mean of the losses of the epoch's batches, when all are done."""
        self.state.flush()
        return self.state.loss_sum / len(self.batches)

    def _next(self, batches: Iterator[tuple[int, tuple[Tensor, Tensor]]]) -> tuple[int, tuple[Tensor, Tensor]] | None:
        with self._memory_named():
            return next(batches, None)

    def _memory_named(self) -> AbstractContextManager[None]:
        return naming_batch_size(self.batches.device, self.batches.batch_size, self.accumulate_steps)


def epoch_summary(epoch: int, figures: Mapping[str, float], images_per_second: float) -> str:
    """A line about an epoch, as the tutorial prints it."""
    return (
        f"Epoch {epoch}: Accuracy: {figures['val_accuracy']:.1%}, Avg loss: {figures['val_loss']:.6f}, "
        f"train loss: {figures['train_loss']:.6f}, {images_per_second:,.0f} images/s"
    )


def training_step(
    trained: nn.Module,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    scaler: torch.amp.GradScaler,
    precision: Precision,
    pixels: Tensor,
    targets: Tensor,
    weight: float = 1.0,
    is_last: bool = True,
) -> tuple[Tensor, Tensor]:
    """Forward and backward of a batch: its loss and a figure that is finite only if all gradients are, both scalars.

    weight: of the loss in the update's gradients. is_last: of the update; before it, the second figure is 0.
    """
    with autocast(pixels.device, precision):
        logits = trained(pixels)
        # A process without images takes part all the same
        loss = loss_fn(logits, targets) if len(pixels) else logits.sum()
    scaler.scale(loss * weight if weight != 1 else loss).backward()
    loss = loss.detach()
    return loss, _sum_of_gradients(trained) if is_last and not scaler.is_enabled() else torch.zeros_like(loss)


def _sum_of_gradients(network: nn.Module) -> Tensor:
    """A number that is finite only if all gradients are: the quickest such on the device.

    On a CPU the sums, a few hundredths of a step on two cores; elsewhere a norm that takes few kernels for all of them.
    """
    gradients = [weights.grad for weights in network.parameters() if weights.grad is not None]
    if gradients[0].device.type == "cpu":
        return torch.stack([gradient.sum() for gradient in gradients]).sum()
    return nn.utils.get_total_norm(gradients)


def set_training_mode(network: nn.Module) -> None:
    """Training mode, but for batch normalisation whose parameters are all frozen: its statistics stay as well."""
    network.train()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
            parameters = list(module.parameters())
            if parameters and not any(parameter.requires_grad for parameter in parameters):
                module.eval()
