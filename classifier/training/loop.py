"""The training loop, and the state from which it goes on."""

import math
import random
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, fields
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from classifier.compute.device import Precision, naming_batch_size
from classifier.data.loader import Batches
from classifier.networks import Mirrored
from classifier.pipeline.errors import PipelineError
from classifier.training.cuda_graphs import GraphedStep
from classifier.training.inference import autocast, test_loop

if TYPE_CHECKING:  # benchmarks.accelerator runs where pydantic is not installed
    from classifier.pipeline.params import Params

REPORT_EVERY = 100  # batches, as in the tutorial


@dataclass
class TrainState:
    """All that training goes on from: with the same data and parameters, the same state leads to the same weights."""

    network: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    trained: nn.Module | None = None  # the network as it is trained: compiled, or by several processes; else itself
    # Of float16 gradients; in other precisions it is off, and does nothing
    scaler: torch.amp.GradScaler = field(default_factory=partial(torch.amp.GradScaler, "cpu", enabled=False))
    cuda_graphs: bool = False  # record the training step, if it can be: see GraphedStep
    graphed_step: GraphedStep | None = None
    pretrained: str | None = None  # the SHA-256 of the file of weights that it started from
    epoch: int = 0  # epochs that are done
    batch: int = 0  # batches of the epoch under way that are done
    seconds: float = 0.0  # that they took
    loss_sum: float = 0.0  # of theirs
    last_loss: float = math.nan  # of the batch before
    history: list[dict[str, float]] = field(default_factory=list)  # the figures of each epoch
    kept: dict[str, float] = field(default_factory=dict)  # those of the epoch whose weights are kept
    weights: dict[str, Tensor] = field(default_factory=dict)  # the weights kept, on the CPU
    pending: list[tuple[int, float, str, Tensor]] = field(default_factory=list)  # see flush

    def defer(self, batch: int, what: str, tensor: Tensor) -> None:
        """Queue a batch's loss, or the norm of its gradients; reading it now would wait for the device."""
        self.pending.append((batch, self.optimizer.param_groups[0]["lr"], what, tensor))

    def flush(self) -> None:
        """Read the queued figures, in one wait for the device, and add the losses to the sum.

        Raises PipelineError for the first number that is not finite.
        """
        if not self.pending:
            return
        numbers = torch.stack([tensor for *_, tensor in self.pending]).tolist()
        for (batch, lr, what, _), number in zip(self.pending, numbers, strict=True):
            if not math.isfinite(number):
                fault = f"loss is {number}" if what == "loss" else f"gradient of {self._broken()} is not finite"
                self._diverged(f"batch {batch + 1}: the {fault}", lr)
            if what == "loss":
                self.loss_sum += number
                self.last_loss = number
        self.pending.clear()

    def end_epoch(self, figures: dict[str, float], keep: bool) -> None:
        """Note an epoch's figures, keep the weights that it ended with if they are better, and turn to the next.

        Raises PipelineError if a figure is not finite: the last update can break what no training loss has met.
        """
        for name, figure in figures.items():
            if not math.isfinite(figure):
                self._diverged(f"after its last batch: {name} is {figure}", self.optimizer.param_groups[0]["lr"])
        self.history.append({"epoch": self.epoch + 1} | figures)
        if keep:
            self.kept = self.history[-1]
            self.weights = {name: tensor.cpu().clone() for name, tensor in self.network.state_dict().items()}
        self.epoch, self.batch, self.seconds, self.loss_sum = self.epoch + 1, 0, 0.0, 0.0

    def is_best(self, val_accuracy: float) -> bool:
        """Whether an epoch's validation accuracy is above that of the epoch whose weights are kept."""
        return not self.kept or val_accuracy > self.kept["val_accuracy"]

    def state_dict(self) -> dict[str, Any]:
        """Everything, the random number generators' states included, as tensors and plain Python values."""
        self.flush()
        parts = {name: getattr(self, name).state_dict() for name in STATEFUL}
        return parts | {name: getattr(self, name) for name in PLAIN} | {"random": _random_states()}

    def load_state_dict(self, content: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        for name in STATEFUL:
            getattr(self, name).load_state_dict(content[name])
        for name in PLAIN:
            setattr(self, name, content[name])
        _set_random_states(content["random"])

    def _broken(self) -> str:
        """The first parameter whose gradient is not finite; on an accelerator, of a batch that may be a later one."""
        gradients = ((name, parameter.grad) for name, parameter in self.network.named_parameters())
        return next((name for name, grad in gradients if grad is not None and not grad.isfinite().all()), "a parameter")

    def _diverged(self, what: str, lr: float) -> NoReturn:
        before = "the first" if math.isnan(self.last_loss) else f"the last finite loss was {self.last_loss:.6g}"
        best = f"; the best weights so far are of epoch {self.kept['epoch']:.0f}" if self.kept else ""
        raise PipelineError(
            f"epoch {self.epoch + 1}, {what} at lr {lr:g}, {before}{best}\n"
            "Lower lr, or look at the images of this batch."
        )


STATEFUL = ("network", "optimizer", "scheduler", "scaler")
NOT_SAVED = ("trained", "cuda_graphs", "graphed_step", "pretrained", "pending")
PLAIN = [spec.name for spec in fields(TrainState) if spec.name not in (*STATEFUL, *NOT_SAVED)]


def _random_states() -> dict[str, Any]:
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002, libraries use the global generator
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys, np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "mps": torch.mps.get_rng_state() if torch.backends.mps.is_available() else None,
    }


def _set_random_states(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(states["torch"])
    torch.cuda.set_rng_state_all(states["cuda"])
    if states["mps"] is not None:
        torch.mps.set_rng_state(states["mps"])


def train_epochs(
    train_batches: Batches,
    val_batches: Batches,
    state: TrainState,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    params: "Params",
    *,
    keep_best: bool,
    after_update: Callable[[], None],
) -> Iterator[dict[str, float]]:
    """Train from where the state is to the last epoch; after each, print its figures and give them.

    val_batches: of the images that `val_loss` and `val_accuracy` are of.
    keep_best: keep the weights of the epoch with the best `val_accuracy`, instead of the last ones.
    Besides what `train_loop` raises, raises PipelineError if a figure is not finite.
    """
    evaluated = Mirrored(state.network) if params.test_flip else state.network
    while state.epoch < params.epochs:
        train_loss = train_loop(
            train_batches,
            state,
            loss_fn,
            accumulate_steps=params.accumulate_steps,
            precision=params.precision,
            after_update=after_update,
        )
        images_per_second = train_batches.image_count / state.seconds
        val_loss, val_accuracy = test_loop(val_batches, evaluated, params.precision)
        print(
            f"Epoch {state.epoch + 1}: Accuracy: {val_accuracy:.1%}, Avg loss: {val_loss:.6f}, "
            f"train loss: {train_loss:.6f}, {images_per_second:,.0f} images/s",
            flush=True,
        )
        figures = {"train_loss": train_loss, "val_loss": val_loss, "val_accuracy": val_accuracy}
        state.end_epoch(figures, keep=not keep_best or state.is_best(val_accuracy))
        yield figures | {"images_per_second": images_per_second}


def train_loop(
    batches: Batches,
    state: TrainState,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    *,
    accumulate_steps: int,
    precision: Precision,
    after_update: Callable[[], None] | None = None,
) -> float:
    """Train to the end of the state's epoch; return the mean of the batches' losses.

    loss_fn: of logits and targets of a batch, the mean over its images.
    accumulate_steps: so many batches make one update, the same as that of one batch with all their images.
    after_update: called after each update, when the state is one to go on from.
    The batches' group works on them together: what is returned and shown is of all its processes.
    Raises PipelineError at the step whose loss or gradient is not finite, before its update; on an accelerator, which
    would have to be waited for in every step, at the next report or checkpoint. Raises PipelineError if the device has
    too little memory. The state's kept weights stay.
    """
    network, optimizer, group = state.network, state.optimizer, batches.group
    set_training_mode(network)
    trained = network if state.trained is None else state.trained  # a compiled network has no truth value
    reads_at_once = batches.device.type == "cpu"  # where nothing has to be waited for
    if state.scaler.is_enabled():
        optimizer._opt_called = True  # type: ignore[attr-defined]  # the scheduler warns if the first update is skipped
    images_in_update = accumulate_steps * batches.batch_size
    if state.cuda_graphs and batches.device.type == "cuda" and accumulate_steps == group.size == 1:
        step = partial(training_step, trained, loss_fn, state.scaler, precision)
        if state.graphed_step is None:
            state.graphed_step = GraphedStep(step, network, batches.device)
    started = perf_counter() - state.seconds
    with (
        naming_batch_size(batches.device, batches.batch_size, accumulate_steps),
        tqdm(total=batches.image_count, desc=f"epoch {state.epoch + 1}", unit="image", disable=group.hides_bars) as bar,
    ):
        for number, (pixels, targets) in enumerate(batches.epoch(state.epoch, state.batch), state.batch):
            count, is_last = batches.count(number), (number + 1) % accumulate_steps == 0 or number + 1 == len(batches)
            images = min(images_in_update, batches.image_count - number // accumulate_steps * images_in_update)
            if state.graphed_step:
                loss, gradient_norm = state.graphed_step(pixels, targets)
            else:
                weight = len(pixels) / images * group.size  # of what the update takes the processes' mean
                with nullcontext() if is_last else group.no_exchange(trained):
                    loss, gradient_norm = training_step(
                        trained, loss_fn, state.scaler, precision, pixels, targets, weight, is_last
                    )
            share = len(pixels) / count
            state.defer(number, "loss", group.sum(loss * share if share != 1 else loss))
            if reads_at_once or number % REPORT_EVERY == 0:
                state.flush()
            if number % REPORT_EVERY == 0:
                seen = number * batches.batch_size + count
                bar.set_postfix(loss=f"{state.last_loss:.4f}", refresh=False)
                bar.update(seen - bar.n)
            if is_last:
                if not state.scaler.is_enabled():  # which skips updates whose gradients are not finite
                    state.defer(number, "gradient", gradient_norm)
                if reads_at_once:
                    state.flush()
                state.scaler.step(optimizer)
                state.scaler.update()
                state.scheduler.step()
                optimizer.zero_grad()
                state.batch, state.seconds = number + 1, perf_counter() - started
                if after_update:
                    after_update()
        bar.update(batches.image_count - bar.n)
    state.flush()
    return state.loss_sum / len(batches)


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
