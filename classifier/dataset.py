"""Annotated images: the dataset class that everything goes through, and its batches in a reproducible order.

Images are decoded once into one uint8 tensor (N, C, H, W), which is moved to the device once and batched by
index there. Above the memory limit they are decoded anew in every epoch by worker processes instead: the same
order, the same batches, the same numbers.
"""

import hashlib
import io
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from classifier.archive import Images
from classifier.errors import PipelineError
from classifier.files import existing
from classifier.png import decode_stored_png
from classifier.transforms import accept_tensors, augment, to_float

LISTED_FAULTS = 20


class CustomImageDataset(Dataset[tuple[Any, Any]]):
    """Images of a folder, or of a zip of one, with the labels that a CSV gives them.

    annotations_file: CSV of two columns, file name in `img_dir` and label (a whole number, 0 or more), with or
        without a header row.
    transform: called with each image, a uint8 tensor (C, H, W); torchvision's ToTensor works too.
    target_transform: called with each label, an int; `targets` calls it with all labels, (N,) int64.
    Raises PipelineError, naming file and rows, if the annotations cannot be used.
    """

    def __init__(
        self,
        annotations_file: str | Path,
        img_dir: str | Path,
        transform: Callable[[Tensor], Any] | None = None,
        target_transform: Callable[[Any], Any] | None = None,
    ) -> None:
        self.files, self.labels = read_annotations(Path(annotations_file))
        self.images = Images(Path(img_dir))
        self.transform: Any = accept_tensors(transform) if transform else None
        self.target_transform = target_transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        image, label = self.decode(index), int(self.labels[index])
        return (
            self.transform(image) if self.transform else image,
            self.target_transform(label) if self.target_transform else label,
        )

    def decode(self, index: int) -> Tensor:
        """Pixels of one image as uint8 (C, H, W). Raises PipelineError, naming the file, if it is not an image."""
        content = self.images.read(self.files[index])
        pixels = decode_stored_png(content)
        if pixels is None:
            try:
                with Image.open(io.BytesIO(content)) as image:
                    if image.mode.startswith(("I", "F")):  # Pillow would cut them off at 255
                        raise ValueError("its pixels have more than 8 bits; convert it to 8 bits")
                    pixels = np.asarray(image if image.mode in ("L", "RGB") else image.convert("RGB"))
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                raise PipelineError(f"{self.images.path}: {self.files[index]} is not a usable image: {error}") from None
            pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
        return torch.from_numpy(np.require(pixels, requirements=["C", "W"]))

    def pixels(self, indices: Iterable[int]) -> Tensor:
        """Pixels of some of the images, (n, C, H, W) float32 in [0, 1]; n may be 0."""
        images = [self.decode(int(index)) for index in indices]
        return to_float(torch.stack(images) if images else torch.empty((0, *self.image_shape())))

    def targets(self) -> Tensor:
        """All labels, (N,) int64, or what the target transform makes of them."""
        return self.target_transform(self.labels) if self.target_transform else self.labels

    def md5(self) -> str:
        """Digest of the images' bytes and labels, in order: of what the data set is, whatever its files are called."""
        digest = hashlib.md5(usedforsecurity=False)
        for file, label in zip(self.files, self.labels.tolist(), strict=True):
            content = self.images.read(file)
            digest.update(f"{label} {len(content)} ".encode())
            digest.update(content)
        return digest.hexdigest()

    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the first image, which all the others must share. Raises PipelineError if there is none."""
        if not self.files:
            raise PipelineError(f"{self.images.path}: the annotations name none of its images")
        channels, height, width = self.decode(0).shape
        return channels, height, width

    def decode_all(self) -> Tensor:
        """Pixels of all images as one uint8 tensor (N, C, H, W), with a progress bar."""
        shape = self.image_shape()
        pixels = torch.empty((len(self), *shape), dtype=torch.uint8)
        for index in tqdm(range(len(self)), desc="decoding", unit="image", disable=None):
            pixels[index] = self.decode_as(shape, index)
        return pixels

    def decode_as(self, shape: tuple[int, int, int], index: int) -> Tensor:
        """Pixels of one image, which must have the shape of the first. Raises PipelineError, naming both, if not."""
        image = self.decode(index)
        if image.shape != shape:
            raise PipelineError(
                f"{self.images.path}: {self.files[index]} is {tuple(image.shape)} (channels, height, width), "
                f"but {self.files[0]} is {shape}; images must have one shape"
            )
        return image


def read_annotations(path: Path) -> tuple[list[str], Tensor]:
    """File names and labels (N,) int64 of an annotations CSV.

    The first row is a header if its second value is not a number. Raises PipelineError with the rows at fault.
    """
    if not path.exists():
        raise PipelineError(f"{path}: missing; `dvc repro` makes it")
    try:
        table = pd.read_csv(path, header=None, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except pd.errors.EmptyDataError:
        return [], torch.empty(0, dtype=torch.int64)
    except (pd.errors.ParserError, UnicodeDecodeError) as error:
        raise PipelineError(f"{path}: not a CSV in UTF-8: {error}") from None
    if table.shape[1] != 2:
        raise PipelineError(f"{path}: {table.shape[1]} columns instead of two, the file name and the label")
    table[1] = table[1].str.strip()
    first = str(table.iloc[0, 1])
    has_header = first != "" and not first.lstrip("-").isdigit()
    rows = table.iloc[1:] if has_header else table
    wrong = rows[~rows[1].str.fullmatch(r"[0-9]{1,18}")]
    if len(wrong):
        named = "; ".join(
            f"row {row}: {label!r}" for row, label in zip(wrong.index + 1, wrong[1].head(LISTED_FAULTS), strict=False)
        )
        raise PipelineError(f"{path}: {len(wrong)} labels are not whole numbers, 0 or more: {named}")
    return rows[0].tolist(), torch.from_numpy(rows[1].to_numpy(dtype=np.int64))


def class_names(folder: Path) -> list[str]:
    """The names in <folder>/classes.csv, by label. Raises PipelineError unless it has label,name for 0, 1, ..."""
    path = existing(folder / "classes.csv")
    try:
        table = pd.read_csv(path, dtype={"name": str}, keep_default_na=False)
        names = dict(zip(table["label"].tolist(), table["name"].tolist(), strict=True))
    except (KeyError, ValueError) as error:  # pandas' own errors are ValueErrors
        raise PipelineError(f"{path}: not a CSV with the columns label and name: {error}") from None
    if sorted(names, key=str) != sorted(range(len(table)), key=str):
        raise PipelineError(f"{path}: the labels are not 0 to {len(table) - 1}, each once")
    return [names[label] for label in range(len(table))]


def epoch_order(count: int, seed: int, epoch: int, shuffle: bool) -> Tensor:
    """The order of the images in an epoch, (count,) int64: a function of (seed, epoch), drawn on the CPU."""
    if not shuffle:
        return torch.arange(count)
    return torch.randperm(count, generator=_generator(seed, epoch))


def _generator(*key: int) -> torch.Generator:
    """A CPU generator for a key such as (seed, epoch): other keys give unrelated numbers."""
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> 1))


class Batches:
    """A dataset in batches on a device: pixels (B, C, H, W) float32 in [0, 1], and targets.

    `dataset.transform` is not used here: pixels are scaled, and augmented if asked, a batch at a time.
    """

    def __init__(
        self,
        dataset: CustomImageDataset,
        batch_size: int,
        device: torch.device,
        *,
        seed: int = 0,
        shuffle: bool = False,
        augmentations: Sequence[str] = (),
        memory_limit_gib: float,
        workers: int,
    ) -> None:
        self.dataset = dataset
        self.batch_size = batch_size
        self.device = device
        self.seed = seed
        self.shuffle = shuffle
        self.augmentations = augmentations
        self.workers = workers
        self.image_count = len(dataset)
        self.targets = dataset.targets().to(device)
        self.image_shape = dataset.image_shape()
        fits = self.image_count * math.prod(self.image_shape) <= memory_limit_gib * 2**30
        self.pixels = dataset.decode_all().to(device) if fits else None

    def __len__(self) -> int:
        """The number of batches in an epoch; the last one may be smaller."""
        return -(-self.image_count // self.batch_size)

    def epoch(self, epoch: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of an epoch, in an order and with augmentations that are functions of (seed, epoch)."""
        order = epoch_order(self.image_count, self.seed, epoch, self.shuffle)
        generator = _generator(self.seed, epoch, 1)
        on_device = order.to(self.device)
        for index, pixels in zip(on_device.split(self.batch_size), self._pixels(order, on_device), strict=True):
            images = to_float(pixels)
            if self.augmentations:
                images = augment(images, self.augmentations, generator)
            yield images, self.targets[index]

    def _pixels(self, order: Tensor, on_device: Tensor) -> Iterator[Tensor]:
        """uint8 pixels of each batch, from memory or from the worker processes."""
        if self.pixels is not None:
            for index in on_device.split(self.batch_size):
                yield self.pixels[index]
            return
        loader = DataLoader(
            _Pixels(self.dataset, self.image_shape),
            batch_sampler=[part.tolist() for part in order.split(self.batch_size)],
            num_workers=self.workers,
            collate_fn=_stack,
            generator=torch.Generator(),  # or it would draw from the global one, which dropout draws from
        )
        for pixels in loader:
            if isinstance(pixels, PipelineError):
                raise pixels
            yield pixels.to(self.device)


class _Pixels(Dataset[Tensor | PipelineError]):
    """The decoded images of a dataset without labels, for worker processes.

    An error is handed over, not raised: a DataLoader would wrap the worker's traceback into its message.
    """

    def __init__(self, dataset: CustomImageDataset, shape: tuple[int, int, int]) -> None:
        self.dataset = dataset
        self.shape = shape

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Tensor | PipelineError:
        try:
            return self.dataset.decode_as(self.shape, index)
        except PipelineError as error:
            return error


def _stack(images: list[Tensor | PipelineError]) -> Tensor | PipelineError:
    """One tensor (B, C, H, W), or the first error."""
    for image in images:
        if isinstance(image, PipelineError):
            return image
    return torch.stack(images)  # type: ignore[arg-type]
