"""A picture of the first training images as the network sees them, with balance and augmentation."""

from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from classifier.data.dataset import load_splits
from classifier.data.loader import Batches, training_batches
from classifier.data.lockfile import locked_md5s, verified
from classifier.evaluation.plots import save_grid
from classifier.pipeline import paths
from classifier.pipeline.annotations import class_names
from classifier.pipeline.outputs import atomic
from classifier.pipeline.params import Params, load_params

ROWS, COLUMNS = 5, 8  # one row per batch: mixup and cutmix draw one share per batch


def draw_samples(target: Path) -> None:
    """Write a PNG of the first images of the first epoch with the current parameters, atomically.

    Only the outputs of annotate are needed. Raises PipelineError if they are missing, changed or unusable.
    """
    names = class_names(verified(paths.ANNOTATIONS, locked_md5s(paths.LOCK)))
    pixels, targets = first_images(sample_batches(load_params(), names), ROWS, COLUMNS)
    with atomic(target) as path:
        save_grid(path, pixels.numpy(), titles(targets, names), ROWS, COLUMNS)


def sample_batches(params: Params, names: list[str]) -> Batches:
    """Return the batches of the train stage, with labels instead of one-hot targets."""
    md5s = locked_md5s(paths.LOCK)
    annotations, images = verified(paths.ANNOTATIONS, md5s), verified(paths.IMAGES, md5s)
    (train_set,) = load_splits(["train"], annotations, images, len(names), params.image_sides)
    params = params.model_copy(update={"target_transform": None})
    return training_batches(train_set, names, params, torch.device("cpu"))


def first_images(batches: Batches, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Return pixels (n, C, H, W) and targets of the first `columns` images of each of the first `rows` batches.

    If batches are smaller than `columns`, more batches are used. n is smaller if the epoch has too few images.
    """
    count = rows * columns
    parts = islice(batches.epoch(), -(-count // min(columns, batches.batch_size)))
    pixels, targets = (torch.cat([part[:columns] for part in of_batches]) for of_batches in zip(*parts, strict=True))
    return pixels[:count], targets[:count]


def titles(targets: Tensor, names: Sequence[str]) -> list[str]:
    """Return the class of each image. Mixed images, with targets (N, C) of shares, have all classes, largest first."""
    if targets.ndim == 1:
        return [names[label] for label in targets.tolist()]
    mixed = [sorted(zip(row, names, strict=True), reverse=True) for row in targets.tolist()]
    return ["\n".join(f"{name} {share:.0%}" for share, name in row if share > 0) for row in mixed]
