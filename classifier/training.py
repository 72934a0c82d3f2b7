"""The training loop, the test loop, prediction, optimisers and schedules."""

import math
import os
import random
import warnings
import zipfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, Literal, NoReturn

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from classifier.dataset import Batches
from classifier.errors import PipelineError
from classifier.transforms import one_hot

Precision = Literal["float32", "bfloat16"]
REPORT_EVERY = 100  # batches, as in the tutorial


@dataclass
class TrainState:
    """All that training goes on from: with the same data and parameters, the same state leads to the same weights."""

    network: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    epoch: int = 0  # epochs that are done
    batch: int = 0  # batches of the epoch under way that are done
    seconds: float = 0.0  # that they took
    loss_sum: float = 0.0  # of theirs
    last_loss: float = math.nan  # of the batch before
    history: list[dict[str, float]] = field(default_factory=list)  # the figures of each epoch
    kept: dict[str, float] = field(default_factory=dict)  # those of the epoch whose weights are kept
    weights: dict[str, Tensor] = field(default_factory=dict)  # the weights kept, on the CPU
    unread: list[tuple[int, float, str, Tensor]] = field(default_factory=list)  # see read
    together: nn.Module | None = None  # the network as several processes train it, see Group.train_together

    def note(self, batch: int, what: str, tensor: Tensor) -> None:
        """Have a batch's loss, or the sum of its gradients, read later: reading it waits for the device."""
        self.unread.append((batch, self.optimizer.param_groups[0]["lr"], what, tensor))

    def read(self) -> None:
        """Read what is still on the device, and take the losses into the sum.

        Raises PipelineError for the first number that is not finite.
        """
        for batch, lr, what, tensor in self.unread:
            number = tensor.item()
            if not math.isfinite(number):
                fault = f"loss is {number}" if what == "loss" else f"gradient of {self._broken()} is not finite"
                self._diverged(f"batch {batch + 1}: the {fault}", lr)
            if what == "loss":
                self.loss_sum += number
                self.last_loss = number
        self.unread.clear()

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

    def content(self) -> dict[str, Any]:
        """Everything, the random number generators' states included, as tensors and plain Python values."""
        self.read()
        parts = {name: getattr(self, name).state_dict() for name in STATEFUL}
        return parts | {name: getattr(self, name) for name in PLAIN} | {"random": _random_states()}

    def restore(self, content: dict[str, Any]) -> None:
        """Take over what `content` gave."""
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


STATEFUL = ("network", "optimizer", "scheduler")
PLAIN = [spec.name for spec in fields(TrainState) if spec.name not in (*STATEFUL, "unread", "together")]


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


def train_loop(
    batches: Batches,
    state: TrainState,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    *,
    accumulate_steps: int,
    precision: Precision,
    after_update: Callable[[], None] | None = None,
    report: Callable[[int, float], None] | None = None,
) -> float:
    """Train to the end of the state's epoch; return the mean of the batches' losses.

    loss_fn: of logits and targets of a batch, the mean over its images.
    accumulate_steps: so many batches make one update, the same as that of one batch with all their images.
    after_update: called after each update, when the state is one to go on from.
    report: called every REPORT_EVERY batches with the images seen so far and the loss of the current batch,
        which the progress bar shows too.
    The batches' group works on them together: what is returned and reported is of all its processes.
    Raises PipelineError at the step whose loss or gradient is not finite, before its update; on an accelerator, which
    would have to be waited for in every step, at the next report or checkpoint. The state's kept weights stay.
    """
    network, optimizer, group = state.network, state.optimizer, batches.group
    set_training_mode(network)
    together = state.together or network
    images_in_update = accumulate_steps * batches.batch_size
    started = perf_counter() - state.seconds
    with tqdm(
        total=batches.image_count, desc=f"epoch {state.epoch + 1}", unit="image", disable=group.hides_bars
    ) as bar:
        for number, (pixels, targets) in enumerate(batches.epoch(state.epoch, state.batch), state.batch):
            count, is_last = batches.count(number), (number + 1) % accumulate_steps == 0 or number + 1 == len(batches)
            images = min(images_in_update, batches.image_count - number // accumulate_steps * images_in_update)
            with nullcontext() if is_last else group.no_exchange(together):
                with _autocast(batches.device, precision):
                    logits = together(pixels)
                    # A process without images takes part all the same
                    loss = loss_fn(logits, targets) if len(pixels) else logits.sum()
                state.note(number, "loss", group.sum(loss.detach() * (len(pixels) / count)))
                if batches.device.type == "cpu" or number % REPORT_EVERY == 0:
                    state.read()
                weight = len(pixels) / images * group.size  # of what the update takes the processes' mean
                (loss * weight if weight != 1 else loss).backward()
            if number % REPORT_EVERY == 0:
                seen = number * batches.batch_size + count
                bar.set_postfix(loss=f"{state.last_loss:.4f}", refresh=False)
                bar.update(seen - bar.n)
                if report:
                    report(seen, state.last_loss)
            if is_last:
                state.note(number, "gradient", _sum_of_gradients(network))
                if batches.device.type == "cpu":
                    state.read()
                optimizer.step()
                state.scheduler.step()
                optimizer.zero_grad()
                state.batch, state.seconds = number + 1, perf_counter() - started
                if after_update:
                    after_update()
        bar.update(batches.image_count - bar.n)
    state.read()
    return state.loss_sum / len(batches)


def _sum_of_gradients(network: nn.Module) -> Tensor:
    """A number that is finite only if all gradients are: the quickest such, a few hundredths of a step on two cores."""
    return torch.stack([weights.grad.sum() for weights in network.parameters() if weights.grad is not None]).sum()


def test_loop(batches: Batches, network: nn.Module, precision: Precision) -> tuple[float, float]:
    """Average loss and accuracy of a split, see `score`; by the labels, whatever the target transform makes of them."""
    return score(predict(batches, network, precision), batches.dataset.labels, batches.batch_size)


test_loop.__test__ = False  # type: ignore[attr-defined]  # the tutorial's name, not a test for pytest


@torch.inference_mode()
def predict(batches: Batches, network: nn.Module, precision: Precision) -> Tensor:
    """Logits of all images, (N, classes) float32 on the CPU, in the order of the dataset, in every process."""
    network.eval()
    with _autocast(batches.device, precision):
        logits = torch.cat([network(pixels).float() for pixels, _ in batches.epoch()]).cpu()
    return batches.group.in_order(logits, [batches.count(number) for number in range(len(batches))])


def score(logits: Tensor, labels: Tensor, batch_size: int) -> tuple[float, float]:
    """Average loss and accuracy (a fraction) of logits (N, C) float32 for labels (N,) int64.

    The loss is what the tutorial prints as `Avg loss`: the mean over the batches of each batch's mean cross
    entropy. Where the last batch is smaller, its images weigh more.
    """
    losses = nn.functional.cross_entropy(logits.double(), labels, reduction="none")
    loss = torch.stack([batch.mean() for batch in losses.split(batch_size)]).mean()
    return loss.item(), (logits.argmax(1) == labels).double().mean().item()


def saliency(network: nn.Module, pixels: Tensor) -> Tensor:
    """How much each pixel moves the winning logit, (N, H, W) on the CPU: the largest |gradient| over the channels.

    pixels: (N, C, H, W) float32 on the network's device. Source: Simonyan et al. 2013, arXiv:1312.6034.
    """
    network.eval()
    pixels = pixels.clone().requires_grad_()
    winning = network(pixels).max(dim=1).values
    (gradient,) = torch.autograd.grad(winning.sum(), pixels)
    return gradient.abs().amax(dim=1).cpu()


def build_loss(label_smoothing: float, class_weights: Tensor | None) -> Callable[[Tensor, Tensor], Tensor]:
    """Cross entropy, the mean over a batch's images, of which each weighs what its class does if there are weights."""
    if class_weights is None:
        return nn.CrossEntropyLoss(label_smoothing=label_smoothing)
    return partial(weighted_cross_entropy, class_weights=class_weights, label_smoothing=label_smoothing)


def weighted_cross_entropy(logits: Tensor, targets: Tensor, class_weights: Tensor, label_smoothing: float) -> Tensor:
    """The mean over a batch's images of each one's cross entropy times the weight of its class.

    logits: (N, C); targets: (N,) int64, or (N, C) float32 probabilities, each of which has the weight of its class;
    class_weights: (C,) float32. As nn.CrossEntropyLoss(class_weights, label_smoothing=...), but for two things:

    - The sum is divided by the number of images. torch divides it by the sum of their weights if targets are class
      numbers: in a batch of one class the weights would cancel out, and accumulated batches would not add up to a
      larger one. Over a whole epoch both are the same, as the mean weight of an image is 1.
    - A smoothed target has its image's weight as a whole. torch weighs the shares that smoothing gives away by the
      classes that get them: most of what an image of a common class says would speak for a rare one.
    """
    if targets.ndim == 1:
        targets = one_hot(targets, len(class_weights))
    weighted = targets * class_weights
    smoothing = weighted.sum(1, keepdim=True) * (label_smoothing / len(class_weights))
    return nn.functional.cross_entropy(logits, weighted * (1 - label_smoothing) + smoothing)


def build_optimizer(
    name: str, parameters: list[nn.Parameter], lr: float, momentum: float, weight_decay: float
) -> torch.optim.Optimizer:
    """The optimiser called sgd, adam, adamw or rmsprop; momentum is for sgd and rmsprop."""
    if name == "sgd":
        return torch.optim.SGD(parameters, lr, momentum=momentum, weight_decay=weight_decay)
    if name == "adam":
        return torch.optim.Adam(parameters, lr, weight_decay=weight_decay)
    if name == "adamw":
        return torch.optim.AdamW(parameters, lr, weight_decay=weight_decay)
    if name == "rmsprop":
        return torch.optim.RMSprop(parameters, lr, momentum=momentum, weight_decay=weight_decay)
    raise PipelineError(f"optimizer: {name!r} is not one of sgd, adam, adamw, rmsprop")


def build_scheduler(
    schedule: str, optimizer: torch.optim.Optimizer, updates: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """A scheduler to be stepped after each of so many updates."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: lr_factor(schedule, update / updates))


def lr_factor(schedule: str, progress: float) -> float:
    """The share of `lr` used when `progress`, in [0, 1], of all updates is done.

    onecycle rises from 1/25 for the first 30 % and falls to 0 along a cosine (Smith and Topin 2017,
    arXiv:1708.07120, with the proportions of torch's OneCycleLR).
    """
    if schedule == "constant":
        return 1.0
    if schedule == "linear":
        return 1.0 - progress
    if schedule == "cosine":
        return (1 + math.cos(math.pi * progress)) / 2
    if schedule == "onecycle":
        rise = 0.3
        if progress < rise:
            return 1 / 25 + (1 - 1 / 25) * progress / rise
        return (1 + math.cos(math.pi * (progress - rise) / (1 - rise))) / 2
    raise PipelineError(f"schedule: {schedule!r} is not one of constant, linear, cosine, onecycle")


def freeze(network: nn.Module, patterns: list[str]) -> list[nn.Parameter]:
    """Stop the parameters whose names match a pattern from changing; return those that are left to train.

    Patterns are as in a shell: `linear_relu_stack.0.*`. The running statistics of batch normalisation stay with its
    parameters, see `set_training_mode`. Raises PipelineError, with the names there are, for a pattern that matches
    none, and if nothing is left to train.
    """
    named = dict(network.named_parameters())
    for pattern in patterns:
        matches = [name for name in named if fnmatchcase(name, pattern)]
        if not matches:
            raise PipelineError(f"freeze: {pattern!r} matches no parameter; there are {', '.join(named)}")
        for name in matches:
            named[name].requires_grad_(False)
    trainable = [parameter for parameter in named.values() if parameter.requires_grad]
    if not trainable:
        raise PipelineError(f"freeze: {patterns} leaves no parameter to train")
    return trainable


def set_training_mode(network: nn.Module) -> None:
    """Training mode, but for batch normalisation whose parameters are all frozen: its statistics stay as well."""
    network.train()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
            parameters = list(module.parameters())
            if parameters and not any(parameter.requires_grad for parameter in parameters):
                module.eval()


def describe(network: nn.Module) -> str:
    """The network's structure and its number of parameters, for people."""
    total = sum(parameter.numel() for parameter in network.parameters())
    frozen = sum(parameter.numel() for parameter in network.parameters() if not parameter.requires_grad)
    return f"{network}\n{total:,} parameters" + (f", {frozen:,} of them frozen" if frozen else "")


def load_weights(network: nn.Module, path: Path, device: torch.device) -> None:
    """Load a state_dict that torch.save wrote; only tensors are read, no code.

    Raises PipelineError if the file is missing, is not such a file, or holds weights of another network.
    """
    state = read_weights(path, device)
    try:
        network.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:  # the latter two if it is not a dict by name
        reason = " ".join(str(error).split())[:300]
        raise PipelineError(f"weights: {path} does not hold weights of this network: {reason}") from None


def read_weights(path: Path, device: torch.device) -> Any:
    """What torch.save wrote to a file, if it is tensors and plain values: no code is run.

    Raises PipelineError if the file is missing or is not such a file.
    """
    if not os.path.isfile(path):  # noqa: PTH113, pathlib raises an error for a name that is too long
        raise PipelineError(f"weights: there is no file {path}")
    try:
        _refuse_compressed(path)
        with warnings.catch_warnings(action="ignore"):  # torch's, about files of other programs
            return torch.load(path, map_location=device, weights_only=True)
    except Exception:  # of many kinds; their text is the advice to load the file as code
        raise PipelineError(
            f"weights: {path} cannot be read; it must be a whole file of tensors alone, as "
            "torch.save(network.state_dict(), path) writes"
        ) from None


def _refuse_compressed(path: Path) -> None:
    """Raise ValueError for a file that torch would unpack: a few kilobytes can hold gigabytes, and torch packs none."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                raise ValueError


def _autocast(device: torch.device, precision: Precision) -> AbstractContextManager[object]:
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")
