"""From the images of a source to image arrays: one shape for all, each image decoded once."""

import hashlib
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar

import numpy as np

from classifier.data.arrays import ArrayFiles
from classifier.data.decoding import Header, decode_image, fit_pixels, read_header
from classifier.pipeline.annotations import LISTED_FAULTS, Names
from classifier.pipeline.errors import PipelineError, printable
from classifier.pipeline.outputs import atomic
from classifier.pipeline.paths import repository_root
from classifier.preparation.workers import Pool
from classifier.progress import progress
from classifier.sources import LabelledImages

AUTO_SIZE = 128  # pixels a side, where images have several sizes or a larger one and none is asked for
UNUSABLE = Path("reports/unusable-images.txt")  # of the main checkout
CHUNK = 64  # images of a task, at most
TASKS_OF_WORKER = 4  # that are queued at a time
LARGEST_REJECTED = 0.05  # of the images, that on_bad_image: skip leaves out

T = TypeVar("T")


class Chunk(NamedTuple):
    """Consecutive images of a split, with their names, and the row of the first in the image arrays."""

    images: Sequence[np.ndarray | bytes] | np.ndarray
    names: Sequence[str]
    first_row: int


class Recipe(NamedTuple):
    """What all images are brought to: shape (C, H, W); the others as `decode_image` takes them."""

    shape: tuple[int, int, int]
    fit: str
    background: tuple[int, int, int]
    intensity: str


class Made(NamedTuple):
    """What a task returns of its images. sha256: of each one's pixels, (n,) V32.

    faults: why images are unusable, by their rows in the image arrays.
    """

    sha256: np.ndarray
    faults: dict[int, str]


def image_names(split: str, data: LabelledImages) -> Sequence[str]:
    """The names of a split's images: those in the user's data, or numbers where it has none."""
    return data.names or Names(f"{split}/{index:05d}.png" for index in range(len(data.labels)))


def count_files(splits: Mapping[str, LabelledImages]) -> int:
    """How many images are files, which have to be decoded."""
    return sum(len(data.labels) for data in splits.values() if not isinstance(data.images, np.ndarray))


def common_shape(
    pool: Pool,
    splits: Mapping[str, LabelledImages],
    image_size: tuple[int, int] | None,
    channels: int | None,
    intensity: str = "full",
) -> tuple[int, int, int]:
    """The shape (C, H, W) that all images are brought to.

    image_size: (H, W), or None for the images' own size, if all share one of at most AUTO_SIZE each way, and AUTO_SIZE
    if not. channels: 1 or 3, or None for grey if all images are grey, and colour if not. Unusable images, which have
    neither size nor channels, are left to `write_images`.
    """
    if image_size and channels:
        return channels, *image_size
    headers: Counter[Header] = Counter()
    for counted in _each_chunk(pool, partial(_headers, intensity=intensity), splits, "sizes of {} images"):
        headers.update(counted)
    sizes = {(header.height, header.width) for header in headers}
    size = image_size or (AUTO_SIZE, AUTO_SIZE)
    if not image_size and len(sizes) == 1 and max(next(iter(sizes))) <= AUTO_SIZE:
        (size,) = sizes
    return channels or max((header.channels for header in headers), default=3), *size


def write_images(
    pool: Pool, splits: Mapping[str, LabelledImages], recipe: Recipe, folder: Path, largest_share: float = 0.0
) -> Made:
    """Write all images to arrays in `folder`, split after split, with a progress bar.

    The rows of unusable images are black. Raises PipelineError that lists them, after all others, if they are more than
    `largest_share` of the images.
    """
    files = ArrayFiles(folder, _count(splits), recipe.shape)
    digests: list[np.ndarray] = []
    faults: dict[int, str] = {}
    for made in _each_chunk(pool, partial(_decode, recipe=recipe, files=files), splits, "{} images"):
        digests.append(made.sha256)
        faults |= made.faults
    if len(faults) > largest_share * _count(splits):
        _refuse(splits, faults, largest_share)
    return Made(np.concatenate(digests), faults)


def rows_of(splits: Mapping[str, LabelledImages]) -> dict[str, np.ndarray]:
    """The rows of the images of each split in the image arrays, (n,) int64: split after split."""
    ends = np.cumsum([0, *(len(data.labels) for data in splits.values())]).tolist()
    return {split: np.arange(start, end) for split, (start, end) in zip(splits, pairwise(ends), strict=True)}


def _count(splits: Mapping[str, LabelledImages]) -> int:
    return sum(len(data.labels) for data in splits.values())


def _each_chunk(pool: Pool, task: Callable[[Chunk], T], splits: Mapping[str, LabelledImages], desc: str) -> Iterator[T]:
    """What `task` returns of each chunk of the images, in order, with a progress bar for each split."""
    rows = rows_of(splits)
    for split, data in splits.items():
        count, names = len(data.labels), image_names(split, data)
        size = max(1, min(CHUNK, count // (TASKS_OF_WORKER * pool.workers)))
        waiting: deque[tuple[int, Future[T]]] = deque()
        with progress(desc.format(split), "image", count) as bar:
            for start in range(0, count, size):
                some = slice(start, min(start + size, count))
                chunk = Chunk(data.images[some], names[some], int(rows[split][start]))
                waiting.append((len(chunk.names), pool.executor.submit(task, chunk)))
                if len(waiting) > TASKS_OF_WORKER * pool.workers:
                    yield _finished(*waiting.popleft(), bar)
            while waiting:
                yield _finished(*waiting.popleft(), bar)


def _finished(count: int, future: Future[T], bar: Any) -> T:
    result = future.result()
    bar.update(count)
    return result


def _headers(chunk: Chunk, intensity: str) -> Counter[Header]:
    """What images a chunk has, but for the unusable ones."""
    headers: Counter[Header] = Counter()
    for index in range(len(chunk.names)):
        with suppress(PipelineError, ValueError):
            headers[_header(chunk.images[index], intensity)] += 1
    return headers


def _decode(chunk: Chunk, recipe: Recipe, files: ArrayFiles) -> Made:
    """Prepare the images of a chunk, and write them to their rows."""
    count = len(chunk.names)
    pixels = np.zeros((count, *recipe.shape), np.uint8)
    digests = np.zeros(count, "V32")
    faults = {}
    for index in range(count):
        try:
            pixels[index] = _pixels(chunk.images[index], recipe)
        except (PipelineError, ValueError) as error:
            faults[chunk.first_row + index] = str(error)
        digests[index] = hashlib.sha256(pixels[index]).digest()
    files.write(chunk.first_row, pixels)
    return Made(digests, faults)


def _pixels(image: np.ndarray | bytes, recipe: Recipe) -> np.ndarray:
    (channels, *size), fit, background, intensity = recipe
    if isinstance(image, bytes):
        return decode_image(image, size, channels, fit=fit, background=background, intensity=intensity)
    header = _header(image, intensity)
    if header == (*size, channels):
        return image[None] if image.ndim == 2 else image.transpose(2, 0, 1)
    return fit_pixels(image, size, channels, fit, background)


def _header(image: np.ndarray | bytes, intensity: str) -> Header:
    """Raises ValueError for an array that is no image."""
    if isinstance(image, bytes):
        return read_header(image, intensity)
    if image.ndim not in (2, 3) or image.shape[2:] not in ((), (3,)) or 0 in image.shape or image.dtype != np.uint8:
        raise ValueError(f"{image.dtype} of shape {image.shape}, not uint8 (height, width) or (height, width, 3)")
    return Header(image.shape[0], image.shape[1], 1 if image.ndim == 2 else 3)


def _refuse(splits: Mapping[str, LabelledImages], faults: Mapping[int, str], largest_share: float) -> NoReturn:
    """Raise PipelineError that lists the first unusable images; where there are many, a file lists them all."""
    names = Names(chain.from_iterable(image_names(split, data) for split, data in splits.items()))
    listed = [printable(f"{names[row]}: {reason}") for row, reason in sorted(faults.items())]
    which = ""
    if len(listed) > LISTED_FAULTS:
        which = f", the first {LISTED_FAULTS}"
        path = repository_root() / UNUSABLE
        with suppress(OSError), atomic(path) as temporary:
            temporary.write_text("\n".join([*listed, ""]), encoding="utf-8")
            which = f", all of which are listed in {path}; the first {LISTED_FAULTS}"
    shown = "".join(f"\n  {line}" for line in listed[:LISTED_FAULTS])
    way_on = "Fix or remove them, or set on_bad_image: skip"
    if largest_share:
        way_on = f"on_bad_image: skip leaves out {largest_share:.0%} of the images at most. Fix or remove them"
    raise PipelineError(f"{len(listed)} images cannot be used{which}:{shown}\n{way_on}.")
