"""Losses, optimisers, learning-rate schedules and frozen parameters."""

import math
from collections.abc import Callable
from fnmatch import fnmatchcase
from functools import partial

import torch
from torch import Tensor, nn

from classifier.data.transforms import one_hot
from classifier.pipeline.errors import PipelineError


def build_loss(label_smoothing: float, class_weights: Tensor | None) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the loss function of a batch: mean cross entropy, class-weighted if class_weights (C,) is given."""
    if class_weights is None:
        return nn.CrossEntropyLoss(label_smoothing=label_smoothing)
    return partial(weighted_cross_entropy, class_weights=class_weights, label_smoothing=label_smoothing)


def weighted_cross_entropy(logits: Tensor, targets: Tensor, class_weights: Tensor, label_smoothing: float) -> Tensor:
    """Return the mean over images of the cross entropy times the weight of the image's class, a scalar.

    logits: (N, C). targets: (N,) int64, or (N, C) float32 probabilities, each weighted by its class.
    class_weights: (C,) float32.

    This differs from nn.CrossEntropyLoss(class_weights, label_smoothing=...) in two ways:

    - The sum is divided by the number of images. torch divides it by the sum of their weights if targets are class
      numbers: in a batch of one class the weights would cancel out, and the gradients of accumulated batches would
      differ from those of one large batch. Over an epoch both are the same, because the mean weight of an image is 1.
    - The smoothed target of an image is weighted as a whole, by the image's class. torch weights each part by the class
      that receives it: for an image of a common class, most of the loss would then be about rare classes.
    """
    if targets.ndim == 1:
        targets = one_hot(targets, len(class_weights))
    weighted = targets * class_weights
    smoothing = weighted.sum(1, keepdim=True) * (label_smoothing / len(class_weights))
    return nn.functional.cross_entropy(logits, weighted * (1 - label_smoothing) + smoothing)


def build_optimizer(
    name: str, parameters: list[nn.Parameter], lr: float, momentum: float, weight_decay: float
) -> torch.optim.Optimizer:
    """Build the optimiser named sgd, adam, adamw or rmsprop; momentum applies to sgd and rmsprop.

    On a CUDA device use torch's fused kernels, which exist for all but rmsprop.
    Raises PipelineError for another name.
    """
    fused = True if parameters and parameters[0].device.type == "cuda" else None
    if name == "sgd":
        optimizer = torch.optim.SGD(parameters, lr, momentum=momentum, weight_decay=weight_decay, fused=fused)
        if fused and momentum:
            # torch allocates these buffers in the first step and leaves them uninitialised if GradScaler skips it
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
    """Build a scheduler that is stepped after each of `updates` updates."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: lr_factor(schedule, update / updates))


def lr_factor(schedule: str, progress: float) -> float:
    """Return the factor of `lr` after the share `progress`, in [0, 1], of all updates.

    onecycle rises from 1/25 to 1 during the first 30 % and then falls to 0 along a cosine (Smith and Topin 2017,
    arXiv:1708.07120, with the defaults of torch's OneCycleLR). Raises PipelineError for an unknown schedule.
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
    """Freeze the parameters whose names match a pattern; return the trainable ones.

    Patterns are shell patterns such as `linear_relu_stack.0.*`. `set_training_mode` also freezes the running statistics
    of batch normalisation. Raises PipelineError if a pattern matches no parameter, or if none is left to train.
    """
    named = dict(network.named_parameters())
    for pattern in patterns:
        matches = [name for name in named if fnmatchcase(name, pattern)]
        if not matches:
            raise PipelineError(f"freeze: {pattern!r} matches no parameter; the names are {', '.join(named)}")
        for name in matches:
            named[name].requires_grad_(False)
    trainable = [parameter for parameter in named.values() if parameter.requires_grad]
    if not trainable:
        raise PipelineError(f"freeze: {patterns} leaves no parameter to train")
    return trainable
