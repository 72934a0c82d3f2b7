"""Images as NumPy arrays on disk: images-00000.npy, images-00001.npy, …, each uint8 (N, C, H, W) of at most 1 GiB.

All files but the last hold the same number of images. Row r is image r % N of file r // N. The files are mapped into
memory, not parsed: opening them takes the same time whatever their size, and processes on one machine share the pages.
"""

import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from classifier.pipeline.errors import PipelineError

SHARD_BYTES = 2**30  # DVC hashes, sends and fetches a changed file whole
COMPARED_ROWS = 256  # at a time
SHARD = re.compile(r"images-\d{5,}\.npy")


class ImageArrays:
    """The images of a folder that `ArrayFiles` wrote, by row.

    Raises PipelineError, naming the file, if one is missing, damaged or of another shape than the first.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        paths = array_files(folder)
        if not paths:
            raise PipelineError(f"{folder}: no images-00000.npy in it; `dvc repro` makes it")
        self._arrays = [_mapped(path) for path in paths]
        self._images_in_file = len(self._arrays[0])
        for number, (path, array) in enumerate(zip(paths, self._arrays, strict=True)):
            if path.name != file_name(number):
                raise PipelineError(f"{folder}: {file_name(number)} is missing; `dvc checkout {folder}` restores it")
            is_last = number == len(paths) - 1
            expected = (len(array) if is_last else self._images_in_file, *self._arrays[0].shape[1:])
            if array.shape != expected or len(array) > self._images_in_file:
                raise PipelineError(f"{path}: shape {array.shape} does not continue {paths[0].name}")
        channels, height, width = self._arrays[0].shape[1:]
        self.image_shape = channels, height, width
        self.count = sum(map(len, self._arrays))

    def read(self, rows: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """Copy the images of `rows`, (n,) int64, to uint8 (n, C, H, W), `out` or a new array."""
        if out is None:
            out = np.empty((len(rows), *self.image_shape), np.uint8)
        if len(self._arrays) == 1:
            return np.take(self._arrays[0], rows, axis=0, out=out, mode="clip")  # other modes copy twice
        files = rows // self._images_in_file
        for number in np.unique(files):
            places = np.flatnonzero(files == number)
            out[places] = self._arrays[number][rows[places] - number * self._images_in_file]
        return out

    def __getstate__(self) -> dict[str, Path]:
        return {"folder": self.folder}  # a worker process maps the files itself

    def __setstate__(self, state: dict[str, Path]) -> None:
        self.__init__(state["folder"])  # type: ignore[misc]


class Span(NamedTuple):
    """Consecutive rows of one file: where their bytes start in it."""

    path: Path
    offset: int
    rows: range


class ArrayFiles:
    """Files for `count` images (C, H, W), created in `folder` with their headers; pixels are written by row.

    Processes may write different rows at the same time. The bytes depend on the images alone.
    """

    def __init__(self, folder: Path, count: int, shape: tuple[int, int, int], file_bytes: int = SHARD_BYTES) -> None:
        self.folder = folder.absolute()  # workers of a cluster have another working directory
        self.image_bytes = math.prod(shape)
        self.images_in_file = max(1, file_bytes // self.image_bytes)
        self.header_bytes = 0
        for number, first in enumerate(range(0, max(count, 1), self.images_in_file)):
            images = min(self.images_in_file, count - first)
            with (folder / file_name(number)).open("wb") as file:
                about = {"descr": "|u1", "fortran_order": False, "shape": (images, *shape)}
                np.lib.format.write_array_header_1_0(file, about)
                self.header_bytes = file.tell()  # padded by NumPy to a multiple of 64
                file.truncate(self.header_bytes + images * self.image_bytes)

    def write(self, first_row: int, pixels: np.ndarray) -> None:
        """Write (n, C, H, W) uint8 images to the rows from `first_row` on. Raises OSError if the disk is full."""
        for path, offset, rows in self._spans(first_row, len(pixels)):
            with path.open("r+b") as file:
                file.seek(offset)
                file.write(np.ascontiguousarray(pixels[rows.start - first_row : rows.stop - first_row]).data)

    def _spans(self, first_row: int, count: int) -> Iterator[Span]:
        row = first_row
        while row < first_row + count:
            number, place = divmod(row, self.images_in_file)
            end = min(first_row + count, (number + 1) * self.images_in_file)
            offset = self.header_bytes + place * self.image_bytes
            yield Span(self.folder / file_name(number), offset, range(row, end))
            row = end


def differing_rows(first: ImageArrays, second: ImageArrays) -> list[int]:
    """The rows whose images are not the same in both; all rows if the images have other shapes."""
    count = max(first.count, second.count)
    if first.image_shape != second.image_shape:
        return list(range(count))
    common = min(first.count, second.count)
    differing = []
    for start in range(0, common, COMPARED_ROWS):
        rows = np.arange(start, min(start + COMPARED_ROWS, common))
        unlike = (first.read(rows) != second.read(rows)).any(axis=(1, 2, 3))
        differing += rows[unlike].tolist()
    return [*differing, *range(common, count)]


def file_name(number: int) -> str:
    return f"images-{number:05}.npy"


def array_files(folder: Path) -> list[Path]:
    """The array files in a folder, in order; none if it is not a folder."""
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        return sorted(folder / entry.name for entry in entries if SHARD.fullmatch(entry.name))


def _mapped(path: Path) -> np.ndarray:
    """The images of a file, (N, C, H, W) uint8, mapped from disk."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise PipelineError(f"{path}: not readable as a NumPy array: {' '.join(str(error).split())}") from None
    if array.dtype != np.uint8 or array.ndim != 4 or not array.flags.c_contiguous or 0 in array.shape[1:]:
        raise PipelineError(
            f"{path}: {array.dtype} of shape {array.shape}, not uint8 (images, channels, height, width)"
        )
    return np.asarray(array)
