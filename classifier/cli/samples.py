"""A picture of the first training images: as they are stored, and as the network sees them."""

from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from classifier.data.dataset import load_splits
from classifier.data.loader import Batches, epoch_order, training_batches
from classifier.data.lockfile import locked_md5s, verified
from classifier.evaluation.plots import save_grid
from classifier.pipeline import paths
from classifier.pipeline.annotations import class_names
from classifier.pipeline.outputs import atomic
from classifier.pipeline.params import Params, load_params

ROWS, COLUMNS = 4, 8  # of augmented images; one row per batch: mixup and cutmix draw one share per batch


def draw_samples(target: Path) -> None:
    """Write a PNG of the first images of the first epoch with the current parameters, atomically.

    If images are augmented, each row of them has the originals above it. Only the outputs of annotate are needed.
    Raises PipelineError if they are missing, changed or unusable.
    """
    names = class_names(verified(paths.ANNOTATIONS, locked_md5s(paths.LOCK)))
    batches = sample_batches(load_params(), names)
    pixels, targets = first_images(batches, ROWS, COLUMNS)
    told = titles(targets, names)
    rows = ROWS
    if batches.augmentations:
        originals = first_originals(batches, ROWS, COLUMNS)
        parts = [
            part[start : start + COLUMNS] for start in range(0, len(pixels), COLUMNS) for part in (originals, pixels)
        ]
        pixels = torch.cat(parts)
        told = [
            text
            for start in range(0, len(told), COLUMNS)
            for text in ["original"] * len(told[start : start + COLUMNS]) + told[start : start + COLUMNS]
        ]
        rows = 2 * ROWS
    with atomic(target) as path:
        save_grid(path, pixels.numpy(), told, rows, COLUMNS)


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


def first_originals(batches: Batches, rows: int, columns: int) -> Tensor:
    """Return pixels (n, C, H, W) of the images that `first_images` returns, as they are without augmentation."""
    order = epoch_order(batches.image_count, batches.seed, 0, batches.shuffle, batches.weights)
    size = batches.batch_size
    parts = [order[start : start + min(columns, size)] for start in range(0, len(order), size)]
    return batches.dataset.pixels(torch.cat(parts)[: rows * columns].tolist())


def titles(targets: Tensor, names: Sequence[str]) -> list[str]:
    """Return the class of each image. Mixed images, with targets (N, C) of shares, have all classes, largest first."""
    if targets.ndim == 1:
        return [names[label] for label in targets.tolist()]
    mixed = [sorted(zip(row, names, strict=True), reverse=True) for row in targets.tolist()]
    return ["\n".join(f"{name} {share:.0%}" for share, name in row if share > 0) for row in mixed]
