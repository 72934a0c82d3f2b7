"""From the images of a source to image arrays: one shape for all, each image decoded once, on all cores."""

import hashlib
import multiprocessing
import os
import signal
import sys
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from classifier.compute.cores import usable_cores
from classifier.data.arrays import ArrayFiles
from classifier.data.decoding import Header, decode_image, fit_pixels, read_header
from classifier.pipeline.annotations import LISTED_FAULTS, Names
from classifier.pipeline.errors import PipelineError, printable
from classifier.pipeline.outputs import atomic
from classifier.pipeline.paths import repository_root
from classifier.progress import progress
from classifier.sources import LabelledImages

AUTO_SIZE = 128  # pixels a side, where images have several sizes or a larger one and none is asked for
UNUSABLE = Path("reports/unusable-images.txt")  # of the main checkout
CHUNK = 64  # images of a task, at most
TASKS_OF_WORKER = 4  # that are queued at a time
# Files from which on processes are worth their start, of about half a second: reading many small files takes more of
# Python's time, which threads cannot share, than of the decoders'
FILES_FOR_PROCESSES = 2000

T = TypeVar("T")


class Chunk(NamedTuple):
    """Consecutive images of a split, with their names, and the row of the first in the image arrays."""

    images: Sequence[np.ndarray | bytes] | np.ndarray
    names: Sequence[str]
    first_row: int


class Made(NamedTuple):
    """What a task returns of a chunk. sha256: of each image's pixels, (n,) V32; faults: the unusable images."""

    sha256: np.ndarray
    faults: list[str]


def image_names(split: str, data: LabelledImages) -> Sequence[str]:
    """The names of a split's images: those in the user's data, or numbers where it has none."""
    return data.names or Names(f"{split}/{index:05d}.png" for index in range(len(data.labels)))


@contextmanager
def workers(splits: Mapping[str, LabelledImages]) -> Iterator[Executor]:
    """The pool that decodes the images: one worker for each core, processes if there are many files."""
    count = usable_cores()
    files = sum(len(data.labels) for data in splits.values() if not isinstance(data.images, np.ndarray))
    if files < FILES_FOR_PROCESSES or count == 1:
        pool: Executor = ThreadPoolExecutor(count)  # decoders let other threads run
    else:
        # A fork of this process would have its threads' locks as they happen to be
        method = "forkserver" if sys.platform == "linux" else "spawn"
        pool = ProcessPoolExecutor(count, multiprocessing.get_context(method), _start_worker)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def common_shape(
    pool: Executor, splits: Mapping[str, LabelledImages], image_size: int | None, channels: int | None
) -> tuple[int, int, int]:
    """The shape (C, H, W) that all images are brought to.

    image_size: the side of a square, or None for the images' own size, if all share one of at most AUTO_SIZE each
    way, and AUTO_SIZE if not. channels: 1 or 3, or None for grey if all images are grey, and colour if not.
    Raises PipelineError that lists the unusable images, if it has to look at them.
    """
    if image_size and channels:
        return channels, image_size, image_size
    headers: Counter[Header] = Counter()
    faults = 0
    for counted, faults_of_chunk in _each_chunk(pool, _headers, splits, "sizes of {} images"):
        headers.update(counted)
        faults += faults_of_chunk
    size = (image_size or AUTO_SIZE,) * 2
    if faults:  # decoding finds more: all are listed at once
        _check(_decoded(pool, splits, (3, *size), None).faults)
    sizes = {(header.height, header.width) for header in headers}
    if not image_size and len(sizes) == 1 and max(next(iter(sizes))) <= AUTO_SIZE:
        ((height, width),) = sizes
        size = height, width
    return channels or max(header.channels for header in headers), *size


def write_images(
    pool: Executor, splits: Mapping[str, LabelledImages], shape: tuple[int, int, int], folder: Path
) -> np.ndarray:
    """Write all images in a shape (C, H, W) to arrays in `folder`, split after split, with a progress bar.

    Returns the SHA-256 of the pixels of each image, by row: (N,) V32. Raises PipelineError that lists the unusable
    images, after all others.
    """
    made = _decoded(pool, splits, shape, ArrayFiles(folder, _count(splits), shape))
    _check(made.faults)
    return made.sha256


def first_rows(splits: Mapping[str, LabelledImages]) -> dict[str, int]:
    """The row of the first image of each split in the image arrays."""
    starts = np.cumsum([0, *(len(data.labels) for data in splits.values())]).tolist()
    return dict(zip(splits, starts, strict=False))


def _count(splits: Mapping[str, LabelledImages]) -> int:
    return sum(len(data.labels) for data in splits.values())


def _decoded(
    pool: Executor, splits: Mapping[str, LabelledImages], shape: tuple[int, int, int], files: ArrayFiles | None
) -> Made:
    digests, faults = [], []
    for made in _each_chunk(pool, partial(_decode, shape=shape, files=files), splits, "{} images"):
        digests.append(made.sha256)
        faults += made.faults
    return Made(np.concatenate(digests), faults)


def _each_chunk(
    pool: Executor, task: Callable[[Chunk], T], splits: Mapping[str, LabelledImages], desc: str
) -> Iterator[T]:
    """What `task` returns of each chunk of the images, in order, with a progress bar for each split."""
    cores = usable_cores()
    starts = first_rows(splits)
    for split, data in splits.items():
        count, names = len(data.labels), image_names(split, data)
        size = max(1, min(CHUNK, count // (TASKS_OF_WORKER * cores)))
        waiting: deque[tuple[int, Future[T]]] = deque()
        with progress(desc.format(split), "image", count) as bar:
            for start in range(0, count, size):
                some = slice(start, min(start + size, count))
                chunk = Chunk(data.images[some], names[some], starts[split] + start)
                waiting.append((len(chunk.names), pool.submit(task, chunk)))
                if len(waiting) > TASKS_OF_WORKER * cores:
                    yield _finished(*waiting.popleft(), bar)
            while waiting:
                yield _finished(*waiting.popleft(), bar)


def _finished(count: int, future: Future[T], bar: Any) -> T:
    result = future.result()
    bar.update(count)
    return result


def _headers(chunk: Chunk) -> tuple[Counter[Header], int]:
    """What images a chunk has, and how many of them are unusable."""
    headers: Counter[Header] = Counter()
    faults = 0
    for index in range(len(chunk.names)):
        try:
            headers[_header(chunk.images[index])] += 1
        except (PipelineError, ValueError):
            faults += 1
    return headers, faults


def _decode(chunk: Chunk, shape: tuple[int, int, int], files: ArrayFiles | None) -> Made:
    """Bring the images of a chunk to a shape, and write them to their rows of `files`, if given."""
    count = len(chunk.names)
    pixels = np.zeros((count, *shape), np.uint8)
    digests = np.zeros(count, "V32")
    faults = []
    for index in range(count):
        try:
            pixels[index] = _pixels(chunk.images[index], shape)
        except (PipelineError, ValueError) as error:
            faults.append(f"{chunk.names[index]}: {error}")
        digests[index] = hashlib.sha256(pixels[index]).digest()
    if files:
        files.write(chunk.first_row, pixels)
    return Made(digests, faults)


def _pixels(image: np.ndarray | bytes, shape: tuple[int, int, int]) -> np.ndarray:
    channels, *size = shape
    if isinstance(image, bytes):
        return decode_image(image, (size[0], size[1]), channels)
    header = _header(image)
    if header == (*size, channels):
        return image[None] if image.ndim == 2 else image.transpose(2, 0, 1)
    return fit_pixels(image, (size[0], size[1]), channels)


def _header(image: np.ndarray | bytes) -> Header:
    """Raises ValueError for an array that is no image."""
    if isinstance(image, bytes):
        return read_header(image)
    if image.ndim not in (2, 3) or image.shape[2:] not in ((), (3,)) or 0 in image.shape or image.dtype != np.uint8:
        raise ValueError(f"{image.dtype} of shape {image.shape}, not uint8 (height, width) or (height, width, 3)")
    return Header(image.shape[0], image.shape[1], 1 if image.ndim == 2 else 3)


def _start_worker() -> None:
    """Leave signals to the parent process, and end with it."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)

    def end_with_parent() -> None:
        if parent := multiprocessing.parent_process():
            parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _check(faults: list[str]) -> None:
    """Raise PipelineError if there are faults; where they are many, all of them are in a file too."""
    if faults:
        which = ""
        if len(faults) > LISTED_FAULTS:
            which = f", the first {LISTED_FAULTS}"
            path = repository_root() / UNUSABLE
            with suppress(OSError), atomic(path) as temporary:
                temporary.write_text("".join(f"{printable(fault)}\n" for fault in faults), encoding="utf-8")
                which = f", all of which are listed in {path}; the first {LISTED_FAULTS}"
        listed = "".join(f"\n  {fault}" for fault in faults[:LISTED_FAULTS])
        raise PipelineError(f"{len(faults)} images cannot be used{which}:{listed}\nFix or remove them.")
