"""The training loop, the test loop, prediction, optimisers and schedules."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from classifier.dataset import Batches
from classifier.errors import PipelineError

Precision = Literal["float32", "bfloat16"]
REPORT_EVERY = 100  # batches, as in the tutorial


def train_loop(
    batches: Batches,
    network: nn.Module,
    loss_fn: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    *,
    epoch: int,
    accumulate_steps: int,
    precision: Precision,
    report: Callable[[int, float], None] | None = None,
) -> float:
    """Train for one epoch; return the mean of the batches' losses.

    epoch: decides the order of the images, see Batches.
    accumulate_steps: so many batches make one update, the same as that of one batch with all their images.
    report: called every REPORT_EVERY batches with the images seen so far and the loss of the current batch,
        which the progress bar shows too.
    Raises PipelineError if the loss is not finite, at the next report or at the end of the epoch, or if the
    weights are not at the end of the epoch: a gradient can be infinite where the loss is not.
    """
    network.train()
    seen = 0
    loss_sum = torch.zeros((), device=batches.device)
    group_size = accumulate_steps * batches.batch_size
    with tqdm(total=batches.image_count, desc=f"epoch {epoch + 1}", unit="image", disable=None) as bar:
        for number, (pixels, targets) in enumerate(batches.epoch(epoch)):
            images_in_group = min(group_size, batches.image_count - number // accumulate_steps * group_size)
            with _autocast(batches.device, precision):
                loss = loss_fn(network(pixels), targets)
            (loss * (len(pixels) / images_in_group) if accumulate_steps > 1 else loss).backward()
            if (number + 1) % accumulate_steps == 0 or number + 1 == len(batches):
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            seen += len(pixels)
            loss_sum += loss.detach()
            if number % REPORT_EVERY == 0:  # .item() waits for an accelerator, so not in every step
                current = _finite(loss.item(), epoch, seen)
                bar.set_postfix(loss=f"{current:.4f}", refresh=False)
                bar.update(seen - bar.n)
                if report:
                    report(seen, current)
        bar.update(seen - bar.n)
    mean_loss = _finite(loss_sum.item() / len(batches), epoch, seen)
    for name, parameter in network.named_parameters():
        if not parameter.isfinite().all():
            raise PipelineError(f"epoch {epoch + 1}: weights of {name} are not finite any more; lower lr")
    return mean_loss


def test_loop(batches: Batches, network: nn.Module, precision: Precision) -> tuple[float, float]:
    """Average loss and accuracy of a split, see `score`; by the labels, whatever the target transform makes of them."""
    return score(predict(batches, network, precision), batches.dataset.labels, batches.batch_size)


test_loop.__test__ = False  # type: ignore[attr-defined]  # the tutorial's name, not a test for pytest


@torch.inference_mode()
def predict(batches: Batches, network: nn.Module, precision: Precision) -> Tensor:
    """Logits of all images, (N, classes) float32 on the CPU, in the order of the dataset."""
    network.eval()
    with _autocast(batches.device, precision):
        return torch.cat([network(pixels).float() for pixels, _ in batches.epoch()]).cpu()


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

    Patterns are as in a shell: `linear_relu_stack.0.*`. Raises PipelineError, with the names there are, for a
    pattern that matches none, and if nothing is left to train.
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


def describe(network: nn.Module) -> str:
    """The network's structure and its number of parameters, for people."""
    total = sum(parameter.numel() for parameter in network.parameters())
    frozen = sum(parameter.numel() for parameter in network.parameters() if not parameter.requires_grad)
    return f"{network}\n{total:,} parameters" + (f", {frozen:,} of them frozen" if frozen else "")


def load_weights(network: nn.Module, path: Path, device: torch.device) -> None:
    """Load a state_dict that torch.save wrote; only tensors are read, no code.

    Raises PipelineError if the file is missing, is not such a file, or holds weights of another network.
    """
    if not path.is_file():
        raise PipelineError(f"weights: there is no file {path}")
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except Exception:  # of many kinds; their text is the advice to load the file as code
        raise PipelineError(
            f"weights: {path} cannot be read; it must be a whole file of tensors alone, as "
            "torch.save(network.state_dict(), path) writes"
        ) from None
    try:
        network.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:  # the latter two if it is not a dict by name
        reason = " ".join(str(error).split())[:300]
        raise PipelineError(f"weights: {path} does not hold weights of this network: {reason}") from None


def _autocast(device: torch.device, precision: Precision) -> AbstractContextManager[object]:
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


def _finite(loss: float, epoch: int, seen: int) -> float:
    if not math.isfinite(loss):
        raise PipelineError(
            f"epoch {epoch + 1}: the loss is {loss} after {seen:,} images; lower lr, or look at the last good "
            "epoch's figures"
        )
    return loss
