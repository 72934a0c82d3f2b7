"""Images that are an array in memory already, as a dataset that `Batches` takes."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from classifier.data.dataset import CustomImageDataset
from classifier.sources.fashion_mnist import read


class Arrays(CustomImageDataset):
    """pixels: (N, C, H, W) uint8; labels: (N,) int64 below `classes`."""

    def __init__(self, pixels: Tensor, labels: Tensor, classes: int) -> None:
        self.annotations = Path("images in memory")
        self.table_rows = list(range(len(labels)))
        self.files = [str(row) for row in self.table_rows]
        self.all_pixels, self.labels, self.classes = pixels, labels, classes
        self.target_transform = None

    def image_shape(self) -> tuple[int, int, int]:
        channels, height, width = self.all_pixels.shape[1:]
        return channels, height, width

    def read(self, indices: Sequence[int] | np.ndarray, out: Tensor | None = None) -> Tensor:
        return torch.index_select(self.all_pixels, 0, torch.as_tensor(np.asarray(indices)), out=out)


def fashion_mnist(raw: Path) -> tuple[Arrays, Arrays]:
    """The 60,000 training images and the 10,000 test images, in file order, from the folder of unpacked files."""
    data = read(raw)
    train, test = (
        Arrays(
            torch.from_numpy(np.array(data[split].images))[:, None],
            torch.from_numpy(data[split].labels.astype(np.int64)),
            classes=10,
        )
        for split in ("train", "test")
    )
    return train, test


def random_images(count: int, shape: tuple[int, int, int], classes: int) -> Arrays:
    """Noise with random labels, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (count, *shape), dtype=torch.uint8, generator=generator)
    return Arrays(pixels, torch.randint(classes, (count,), generator=generator), classes)
