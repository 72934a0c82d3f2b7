"""Annotated images: the dataset class that everything goes through."""

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from classifier.data.arrays import ImageArrays, array_files
from classifier.data.decoding import decode_image, resize_pixels
from classifier.data.transforms import accept_tensors, to_float
from classifier.pipeline.annotations import faulty_rows, read_annotations
from classifier.pipeline.errors import PipelineError
from classifier.pipeline.image_files import ImageFiles

READ_BYTES = 2**26  # of images that are in memory at a time where all are read


class CustomImageDataset(Dataset[tuple[Any, Any]]):
    """Images with the labels that a CSV gives them.

    annotations_file: CSV of file name and label, as `read_annotations` takes it; with image arrays also the row.
    img_dir: a folder of image files, or a zip of one; or a folder of image arrays, as the annotate stage writes.
    transform: called with each image, a uint8 tensor (C, H, W); torchvision's ToTensor works too.
    target_transform: called with each label, an int; `targets` calls it with all labels, (N,) int64.
    classes: the number of classes, if labels beyond them are to be refused; mixup and cutmix need it.
    size: (H, W) that image arrays are scaled to, if they are stored larger.
    `decode_image` says what becomes of an image file, `ImageFiles.read` which files are read.
    Raises PipelineError, naming file and rows, if the annotations cannot be used; and so do its methods for images.
    """

    def __init__(
        self,
        annotations_file: str | Path,
        img_dir: str | Path | ImageArrays,
        transform: Callable[[Tensor], Any] | None = None,
        target_transform: Callable[[Any], Any] | None = None,
        *,
        classes: int | None = None,
        size: Sequence[int] | None = None,
    ) -> None:
        self.size = tuple(size) if size else None
        self.annotations = Path(annotations_file)
        self.images = img_dir if isinstance(img_dir, ImageArrays) else _open_images(Path(img_dir))
        count = self.images.count if isinstance(self.images, ImageArrays) else None
        self.files, labels, self.table_rows, self.array_rows = read_annotations(
            self.annotations, classes=classes, images=count
        )
        if len(labels) and count is not None and self.array_rows is None:
            raise PipelineError(f"{self.annotations}: no column row, which {img_dir} needs; `dvc repro` writes both")
        self.labels = torch.from_numpy(labels)
        self.classes = classes
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
        """Return one image as uint8 (C, H, W). Raises PipelineError, naming file and row, if it cannot be used."""
        index = range(len(self))[index]  # which may be negative, or too large
        if isinstance(self.images, ImageArrays):
            return self.read([index])[0]
        try:
            return self._decode_file(index)
        except PipelineError as error:
            raise faulty_rows(self.annotations, [(self.table_rows[index], str(error))]) from None

    def read(self, indices: Sequence[int] | np.ndarray, out: Tensor | None = None) -> Tensor:
        """Return some images, which must have one shape, as uint8 (n, C, H, W), in `out` or a new tensor.

        Raises PipelineError that lists all rows whose image file cannot be used, or has another shape.
        """
        shape = self.image_shape()
        if isinstance(self.images, ImageArrays) and not self.is_scaled:
            return self.read_stored(indices, out)
        images = torch.empty((len(indices), *shape), dtype=torch.uint8) if out is None else out
        if isinstance(self.images, ImageArrays):
            for place, image in enumerate(self.read_stored(indices).numpy()):
                images[place] = torch.from_numpy(resize_pixels(image, shape[1:]))
            return images
        faults = []
        for place, index in enumerate(indices):
            try:
                image = self._decode_file(index)
                if image.shape != shape:
                    raise PipelineError(
                        f"{self.files[index]} in {self.images.path} is {tuple(image.shape)} (channels, height, width), "
                        f"but the first usable image is {shape}; images must have one shape"
                    )
                images[place] = image
            except PipelineError as error:
                faults.append((self.table_rows[index], str(error)))
        if faults:
            raise faulty_rows(self.annotations, faults)
        return images

    @property
    def stored_size(self) -> tuple[int, int] | None:
        """(H, W) that image arrays are stored in; None for image files."""
        return self.images.image_shape[1:] if isinstance(self.images, ImageArrays) else None

    @property
    def is_scaled(self) -> bool:
        """Whether images are stored in another size."""
        return None not in (self.size, self.stored_size) and self.size != self.stored_size

    def read_stored(self, indices: Sequence[int] | np.ndarray, out: Tensor | None = None) -> Tensor:
        """Return some images of image arrays in the size that they are stored in, as uint8 (n, C, H, W)."""
        assert isinstance(self.images, ImageArrays)  # noqa: S101
        if out is None:
            out = torch.empty((len(indices), *self.images.image_shape), dtype=torch.uint8)
        if self.array_rows is not None:  # it is None where there are no images
            self.images.read(self.array_rows[np.asarray(indices, np.int64)], out.numpy())
        return out

    def _decode_file(self, index: int) -> Tensor:
        """Return the image of one file. Raises PipelineError, naming the file alone, if it cannot be used."""
        assert isinstance(self.images, ImageFiles)  # noqa: S101
        try:
            pixels = decode_image(self.images.read(self.files[index]))
        except ValueError as error:
            raise PipelineError(f"{self.files[index]} in {self.images.path} is not a usable image: {error}") from None
        return torch.from_numpy(pixels)

    def pixels(self, indices: Iterable[int]) -> Tensor:
        """Return some images, (n, C, H, W) float32 in [0, 1]; n may be 0."""
        return to_float(self.read([int(index) for index in indices]))

    def targets(self) -> Tensor:
        """All labels, (N,) int64, or what the target transform makes of them."""
        return self.target_transform(self.labels) if self.target_transform else self.labels

    def class_weights(self, names: Sequence[str]) -> Tensor:
        """What an image of each class weighs if all classes are to weigh alike, (classes,) float64.

        N / (classes x images of the class), which scikit-learn calls balanced: over all N images the mean is 1.
        names: of all classes. Raises PipelineError that names those without an image.
        """
        counts = self.labels.bincount(minlength=len(names))
        if without := [name for name, count in zip(names, counts.tolist(), strict=True) if count == 0]:
            raise PipelineError(
                f"{self.annotations}: balance: no image of class {', '.join(without)}; add some, or set balance: none"
            )
        return len(self) / (len(names) * counts.double())

    def md5(self) -> str:
        """Content digest: of the images' pixels and labels in order, independent of file names."""
        digest = hashlib.md5(str(self.image_shape()).encode(), usedforsecurity=False)
        digest.update(self.labels.numpy().tobytes())
        images = max(1, READ_BYTES // math.prod(self.image_shape()))
        for start in range(0, len(self), images):
            digest.update(self.read(range(start, min(start + images, len(self)))).numpy().tobytes())
        return digest.hexdigest()

    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the first usable image, which all must share. Raises PipelineError if there is none."""
        if isinstance(self.images, ImageArrays):
            channels, height, width = self.images.image_shape
            height, width = self.size or (height, width)
            return channels, height, width
        faults = []
        for index, row in enumerate(self.table_rows):
            try:
                channels, height, width = self._decode_file(index).shape
            except PipelineError as error:
                faults.append((row, str(error)))
            else:
                return channels, height, width
        if faults:
            raise faulty_rows(self.annotations, faults)
        raise PipelineError(f"{self.annotations}: names no image")


def load_splits(
    splits: Sequence[str], annotations: Path, images: Path, classes: int, size: Sequence[int] | None
) -> list[CustomImageDataset]:
    """Load some of train, val and test, as the annotate stage writes them.

    annotations: the folder of <split>.csv. images: the folder of image arrays, which all splits share. size: (H, W)
    that the network takes, if the images are stored larger.
    """
    arrays = ImageArrays(images)
    return [CustomImageDataset(annotations / f"{split}.csv", arrays, classes=classes, size=size) for split in splits]


def _open_images(path: Path) -> ImageFiles | ImageArrays:
    return ImageArrays(path) if array_files(path) else ImageFiles(path)
