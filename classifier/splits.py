"""Labelled images of a source before they are written: the checks, duplicates, and the validation split."""

import hashlib
from collections import defaultdict
from typing import NamedTuple

import numpy as np

from classifier.annotations import LISTED_FAULTS
from classifier.errors import PipelineError
from classifier.sources import LabelledImages


class Duplicates(NamedTuple):
    """Pairs of images with the same pixels: within the training data, within the test data, across the two."""

    train: int
    test: int
    across: int


def check_split(split: str, data: LabelledImages, classes: int, train: LabelledImages) -> None:
    """Raise PipelineError unless every image has a label in 0..classes-1 and the shape of the first training image.

    That is (H, W) or (H, W, 3), without a zero; pixels are uint8, labels whole numbers. The first twenty images at
    fault are listed, with their count.
    """
    if len(data.images) != len(data.labels):
        raise PipelineError(f"{split}: {len(data.images)} images, but {len(data.labels)} labels")
    if len(data.images) == 0:
        raise PipelineError(f"{split}: no images")
    if not np.issubdtype(data.labels.dtype, np.integer):
        raise PipelineError(f"{split}: labels are {data.labels.dtype}, not whole numbers")
    wrong = np.flatnonzero((data.labels < 0) | (data.labels >= classes))
    if wrong.size:
        rows = ", ".join(f"{row} (label {data.labels[row]})" for row in wrong[:LISTED_FAULTS])
        raise PipelineError(f"{split}: {wrong.size} labels are not in 0..{classes - 1}: images {rows}")
    shape = train.images[0].shape
    if len(shape) not in (2, 3) or shape[2:] not in ((), (3,)) or 0 in shape:
        raise PipelineError(f"train: image 0 has shape {shape}, not (height, width) or (height, width, 3)")
    others = [
        f"{index} {image.shape} {image.dtype}"
        for index, image in enumerate(data.images)
        if (image.shape, image.dtype) != (shape, np.uint8)
    ]
    if others:
        raise PipelineError(
            f"{split}: {len(others)} images have another shape than the first, {shape}, or pixels that are not uint8: "
            f"images {', '.join(others[:LISTED_FAULTS])}"
        )


def check_classes(labels: np.ndarray, names: list[str]) -> None:
    """Raise PipelineError if a class has no training image: it could not be learnt."""
    absent = sorted(set(range(len(names))) - set(labels.tolist()))
    if absent:
        raise PipelineError(f"train: no image of class {', '.join(f'{label} ({names[label]})' for label in absent)}")


def count_duplicates(train: LabelledImages, test: LabelledImages) -> Duplicates:
    """Count the pairs of images whose shape and pixels are the same."""
    seen: dict[bytes, list[int]] = defaultdict(lambda: [0, 0])
    for split, data in enumerate((train, test)):
        for image in data.images:
            seen[hashlib.sha256(repr(image.shape).encode() + image.tobytes()).digest()][split] += 1
    return Duplicates(
        train=sum(n * (n - 1) // 2 for n, _ in seen.values()),
        test=sum(n * (n - 1) // 2 for _, n in seen.values()),
        across=sum(n * m for n, m in seen.values()),
    )


def hold_out(labels: np.ndarray, val_size: int | float, seed: int) -> np.ndarray:
    """Choose the validation images: a mask over the training images, stratified by class.

    labels: (N,) int64. val_size: a count of images, or a fraction of N.
    Returns (N,) bool, True for validation. Raises PipelineError if that cannot be stratified, or would leave
    no training image of a class; a rare class may be missing from the validation images.
    """
    count = round(val_size * len(labels)) if isinstance(val_size, float) else val_size
    held_out = np.zeros(len(labels), bool)
    if val_size and count == 0:
        raise PipelineError(f"val_size: {val_size} of {len(labels)} images is none; 0 holds out none")
    if count == 0:
        return held_out

    from sklearn.model_selection import train_test_split  # a second of import, not needed for val_size 0

    try:
        _, chosen = train_test_split(np.arange(len(labels)), test_size=count, random_state=seed, stratify=labels)
    except ValueError as error:  # fewer images than classes, or a class with a single image
        raise PipelineError(f"val_size: {val_size} images cannot be held out of {len(labels)}: {error}") from None
    held_out[chosen] = True
    if lost := sorted(set(labels.tolist()) - set(labels[~held_out].tolist())):
        raise PipelineError(f"val_size: {val_size} images of {len(labels)} leave no training image of class {lost}")
    return held_out
