"""Losses, optimisers and their schedules, and which parameters they change."""

import math
from collections.abc import Callable
from fnmatch import fnmatchcase
from functools import partial

import torch
from torch import Tensor, nn

from classifier.data.transforms import one_hot
from classifier.pipeline.errors import PipelineError


def build_loss(label_smoothing: float, class_weights: Tensor | None) -> Callable[[Tensor, Tensor], Tensor]:
    """Mean cross entropy of a batch, optionally class-weighted."""
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
    """The optimiser called sgd, adam, adamw or rmsprop; momentum is for sgd and rmsprop.

    On a CUDA device it changes all parameters in one kernel, which for rmsprop torch does not have.
    """
    fused = True if parameters and parameters[0].device.type == "cuda" else None
    if name == "sgd":
        optimizer = torch.optim.SGD(parameters, lr, momentum=momentum, weight_decay=weight_decay, fused=fused)
        if fused and momentum:
            # torch makes these buffers in the first step, and leaves them unwritten if float16 skips that step
            for weights in parameters:
                optimizer.state[weights]["momentum_buffer"] = torch.zeros_like(weights)
        return optimizer
    if name == "adam":
        return torch.optim.Adam(parameters, lr, weight_decay=weight_decay, fused=fused)
    if name == "adamw":
        return torch.optim.AdamW(parameters, lr, weight_decay=weight_decay, fused=fused)
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
