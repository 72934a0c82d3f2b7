"""A few small images in a zip, and their annotations, for tests that train on them directly."""

from pathlib import Path

import numpy as np

from classifier.data.png import encode_png
from classifier.pipeline.zip_format import write_zip

CLASSES = 4


def make_images(folder: Path, count: int, size: int) -> tuple[Path, Path]:
    """A CSV and a zip of `count` grey images: noise by a formula, and one bright quarter for each class."""
    labels = np.arange(count) % CLASSES
    noise = (np.arange(count * size * size) * 7919 % 251).reshape(count, size, size)
    half = size // 2
    for image, label in zip(noise, labels, strict=True):
        row, column = divmod(int(label), 2)
        image[row * half : (row + 1) * half, column * half : (column + 1) * half] //= 4
    names = [f"{index}.png" for index in range(count)]
    pngs = [encode_png(image.astype(np.uint8)) for image in noise]
    write_zip(folder / "images.zip", zip(names, pngs, strict=True))
    rows = [f"{name},{label}\n" for name, label in zip(names, labels, strict=True)]
    (folder / "images.csv").write_text("file,label\n" + "".join(rows))
    return folder / "images.csv", folder / "images.zip"
