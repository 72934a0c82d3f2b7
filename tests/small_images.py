"""A few small images as arrays, and their annotations, for tests that train on them directly."""

from pathlib import Path

import numpy as np
from pictures import write_annotations, write_arrays

CLASSES = 4


def make_images(folder: Path, count: int, size: int) -> tuple[Path, Path]:
    """A CSV and arrays of `count` grey images: noise by a formula, and one bright quarter for each class."""
    labels = np.arange(count) % CLASSES
    noise = (np.arange(count * size * size) * 7919 % 251).reshape(count, size, size)
    half = size // 2
    for image, label in zip(noise, labels, strict=True):
        row, column = divmod(int(label), 2)
        image[row * half : (row + 1) * half, column * half : (column + 1) * half] //= 4
    images = write_arrays(folder / "images", noise.astype(np.uint8)[:, None])
    return write_annotations(folder / "images.csv", labels), images
