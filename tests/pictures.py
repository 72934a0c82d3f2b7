"""Image files, zips of them, and image arrays, for tests and benchmarks."""

import io
import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from classifier.data.arrays import SHARD_BYTES, ArrayFiles
from classifier.data.dataset import CustomImageDataset


def encode_png(image: np.ndarray) -> bytes:
    """A PNG of (H, W) grey or (H, W, 3) RGB uint8 pixels."""
    content = io.BytesIO()
    Image.fromarray(image).save(content, "PNG", compress_level=1)
    return content.getvalue()


def write_zip(path: Path, files: Iterable[tuple[str, bytes]]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files:
            archive.writestr(name, content)


def write_arrays(folder: Path, pixels: np.ndarray, file_bytes: int = SHARD_BYTES) -> Path:
    """Image arrays of (N, C, H, W) uint8 pixels, as the annotate stage writes them."""
    folder.mkdir()
    ArrayFiles(folder, len(pixels), pixels.shape[1:], file_bytes).write(0, pixels)
    return folder


def write_annotations(path: Path, labels: Iterable[int], names: Iterable[str] | None = None) -> Path:
    """A table that gives row r of image arrays the r-th label; the images are called 0.png and so on by default."""
    labels = list(labels)
    names = names or (f"{row}.png" for row in range(len(labels)))
    rows = [f"{name},{label},{row}\n" for row, (name, label) in enumerate(zip(names, labels, strict=True))]
    path.write_text("file,label,row\n" + "".join(rows))
    return path


def split_pngs(data: Path, split: str, count: int | None = None) -> list[tuple[str, bytes]]:
    """The first `count` images of a split, or all, as PNG files by their names; `data` is the project's folder."""
    dataset = CustomImageDataset(data / f"annotations/{split}.csv", data / "images")
    images = dataset.read(range(len(dataset) if count is None else count)).numpy()
    images = images[:, 0] if images.shape[1] == 1 else images.transpose(0, 2, 3, 1)
    return [(name, encode_png(image)) for name, image in zip(dataset.files, images, strict=False)]
