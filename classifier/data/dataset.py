"""Annotated images: the dataset class that everything goes through."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from classifier.data.decoding import LARGEST_PIXELS, decode_image
from classifier.data.png import decode_stored_png, decode_stored_pngs
from classifier.data.transforms import accept_tensors, to_float
from classifier.pipeline.annotations import faulty_rows, read_annotations
from classifier.pipeline.archive import Images
from classifier.pipeline.errors import PipelineError
from classifier.progress import progress

TOGETHER = 256  # small images that are decoded at once


class CustomImageDataset(Dataset[tuple[Any, Any]]):
    """Images of a folder, or of a zip of one, with the labels that a CSV gives them.

    annotations_file: CSV of two columns, file name in `img_dir` and label, as `read_annotations` takes it.
    img_dir: the folder or zip, or what is already open of it.
    transform: called with each image, a uint8 tensor (C, H, W); torchvision's ToTensor works too.
    target_transform: called with each label, an int; `targets` calls it with all labels, (N,) int64.
    classes: the number of classes, if labels beyond them are to be refused; mixup and cutmix need it.
    What becomes of an image is said at `decode_image`, which files are read at `Images.read`.
    Raises PipelineError, naming file and rows, if the annotations cannot be used; and so do its methods for images.
    """

    def __init__(
        self,
        annotations_file: str | Path,
        img_dir: str | Path | Images,
        transform: Callable[[Tensor], Any] | None = None,
        target_transform: Callable[[Any], Any] | None = None,
        *,
        classes: int | None = None,
    ) -> None:
        self.annotations = Path(annotations_file)
        self.files, labels, self.rows = read_annotations(self.annotations, classes=classes)
        self.labels = torch.from_numpy(labels)
        self.classes = classes
        self.images = img_dir if isinstance(img_dir, Images) else Images(Path(img_dir))
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
        """Pixels of one image as uint8 (C, H, W). Raises PipelineError, naming file and row, if that is not usable."""
        with self._naming_row(index):
            return self.decode_as(None, index)

    def decode_as(self, shape: tuple[int, int, int] | None, index: int) -> Tensor:
        """Pixels of one image, which must have the shape. Raises PipelineError, naming the file alone, if not."""
        name = f"{self.files[index]} in {self.images.path}"
        content = self.images.read(self.files[index])
        # The quick way, for what `annotate` wrote; a stored picture of too many pixels has more bytes
        pixels = decode_stored_png(content) if len(content) <= LARGEST_PIXELS else None
        if pixels is None:
            try:
                pixels = decode_image(content)
            except ValueError as error:
                raise PipelineError(f"{name} is not a usable image: {error}") from None
        if shape and pixels.shape != shape:
            raise PipelineError(
                f"{name} is {pixels.shape} (channels, height, width), but the first usable image is {shape}; "
                "images must have one shape"
            )
        return torch.from_numpy(np.require(pixels, requirements=["C", "W"]))

    def pixels(self, indices: Iterable[int]) -> Tensor:
        """Pixels of some of the images, (n, C, H, W) float32 in [0, 1]; n may be 0."""
        chosen = [int(index) for index in indices]
        images = torch.empty((len(chosen), *self.image_shape()), dtype=torch.uint8)
        self._decode_into(images, chosen)
        return to_float(images)

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
        """Content digest: of the images' bytes and labels in order, independent of file names."""
        digest = hashlib.md5(usedforsecurity=False)
        for index, (file, label) in enumerate(zip(self.files, self.labels.tolist(), strict=True)):
            with self._naming_row(index):
                content = self.images.read(file)
            digest.update(f"{label} {len(content)} ".encode())
            digest.update(content)
        return digest.hexdigest()

    @contextmanager
    def _naming_row(self, index: int) -> Iterator[None]:
        """A PipelineError of the block, about one image, is raised anew with the row that names the image."""
        try:
            yield
        except PipelineError as error:
            raise faulty_rows(self.annotations, [(self.rows[index], str(error))]) from None

    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the first usable image, which all must share. Raises PipelineError if there is none."""
        faults = []
        for index, row in enumerate(self.rows):
            try:
                channels, height, width = self.decode_as(None, index).shape
            except PipelineError as error:
                faults.append((row, str(error)))
            else:
                return channels, height, width
        if faults:
            raise faulty_rows(self.annotations, faults)
        raise PipelineError(f"{self.annotations}: names no image")

    def decode_all(self, into: Tensor | None = None) -> Tensor:
        """Pixels of all images as one uint8 tensor (N, C, H, W), that given or a new one, with a progress bar."""
        images = torch.empty((len(self), *self.image_shape()), dtype=torch.uint8) if into is None else into
        self._decode_into(images, range(len(self)), hidden=False)
        return images

    def _decode_into(self, images: Tensor, indices: Sequence[int], hidden: bool = True) -> None:
        """Decode some of the images into uint8 (n, C, H, W). Raises PipelineError that lists all that are not usable.

        hidden: show no progress.
        """
        shape = self.image_shape()
        faults = []
        with progress("decoding", "image", len(indices), hidden=hidden) as bar:
            for start in range(0, len(indices), TOGETHER):
                some = indices[start : start + TOGETHER]
                pixels = self._decode_together(some)
                if pixels is not None and pixels.shape[1:] == shape:
                    images[start : start + len(some)].numpy()[:] = pixels
                    bar.update(len(some))
                    continue
                for place, index in enumerate(some, start):
                    try:
                        images[place] = self.decode_as(shape, index)
                    except PipelineError as error:
                        faults.append((self.rows[index], str(error)))
                    bar.update()
        if faults:
            raise faulty_rows(self.annotations, faults)

    def _decode_together(self, indices: Sequence[int]) -> np.ndarray | None:
        """Pixels (n, C, H, W) uint8 of small images that `annotate` wrote; None if one is another, or not usable."""
        with suppress(PipelineError):
            return decode_stored_pngs(self.images.read(self.files[index]) for index in indices)
        return None


def load_splits(splits: Sequence[str], annotations: Path, images: Path, classes: int) -> list[CustomImageDataset]:
    """Load some of train, val and test, as the annotate stage writes them; all share the open zips.

    annotations: the folder of <split>.csv. images: the zip, or the folder of zips.
    """
    opened = Images(images)
    return [CustomImageDataset(annotations / f"{split}.csv", opened, classes=classes) for split in splits]
