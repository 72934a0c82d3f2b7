"""A small dataset in the IDX format under Fashion-MNIST's file names, for tests that need any data at all."""

import struct
from pathlib import Path

import numpy as np

CLASSES = 10


def write_idx_dataset(folder: Path, train: int = 200, test: int = 80, seed: int = 0) -> None:
    """Write the four unpacked IDX files to `folder`: ten balanced classes of 28 x 28 grey images.

    A class is a bright square at a place of its own under noise: learnable, and a function of the arguments.
    """
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    for prefix, count in (("train", train), ("t10k", test)):
        labels = generator.permutation(np.arange(count) % CLASSES).astype(np.uint8)
        images = generator.integers(0, 100, (count, 28, 28), dtype=np.uint8)
        for image, label in zip(images, labels, strict=True):
            row, column = divmod(int(label), 4)
            image[9 * row : 9 * row + 7, 7 * column : 7 * column + 7] += 120
        write_idx(folder / f"{prefix}-images-idx3-ubyte", images)
        write_idx(folder / f"{prefix}-labels-idx1-ubyte", labels)


def write_idx(path: Path, values: np.ndarray) -> None:
    """Write unsigned bytes of any shape as an IDX file."""
    path.write_bytes(struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape) + values.tobytes())
