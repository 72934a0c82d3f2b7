"""From the images of a source to those of images.zip: one shape for all, as PNG files, each decoded once."""

import hashlib
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np

from classifier.compute.cores import usable_cores
from classifier.data.decoding import Header, decode_image, fit_pixels, read_header
from classifier.data.png import encode_png
from classifier.pipeline.annotations import LISTED_FAULTS, Names, write_csv
from classifier.pipeline.errors import PipelineError, printable
from classifier.pipeline.outputs import atomic
from classifier.pipeline.paths import repository_root
from classifier.progress import progress
from classifier.sources import LabelledImages

AUTO_SIZE = 128  # pixels a side, where images have several sizes or a larger one and none is asked for
UNUSABLE = Path("reports/unusable-images.txt")  # of the main checkout
CHUNK = 16  # images that a thread takes at a time
AHEAD = 4  # chunks for each thread that are read before they are needed


class Prepared(NamedTuple):
    """An image of images.zip: its name, its PNG file, and the SHA-256 of its pixels."""

    name: str
    png: bytes
    digest: bytes


def file_names(split: str, data: LabelledImages) -> Sequence[str]:
    """The names of a split's images in images.zip."""
    return data.names or Names(f"{split}/{index:05d}.png" for index in range(len(data.labels)))


def own_names(split: str, data: LabelledImages) -> Sequence[str]:
    """What people know a split's images by: their names in the user's data, or else those in images.zip."""
    return data.originals or file_names(split, data)


def write_originals(path: Path, splits: Mapping[str, LabelledImages]) -> None:
    """Write the table of images that are called otherwise in the user's data: name in images.zip, original name."""
    named = [(split, data) for split, data in splits.items() if data.originals]
    files, originals = (Names(chain.from_iterable(names(*each) for each in named)) for names in (file_names, own_names))
    write_csv(path, {"file": files, "original": originals})


def common_shape(
    splits: Mapping[str, LabelledImages], image_size: int | None, channels: int | None
) -> tuple[int, int, int]:
    """The shape (C, H, W) that all images are brought to.

    image_size: the side of a square, or None for the images' own size, if all share one of at most AUTO_SIZE each
    way, and AUTO_SIZE if not. channels: 1 or 3, or None for grey if all images are grey, and colour if not.
    Raises PipelineError that lists the images that cannot be used, if it has to look at them.
    """
    if image_size and channels:
        return channels, image_size, image_size
    headers: Counter[Header] = Counter()
    faults = []
    for split, data in splits.items():
        names = file_names(split, data)
        with progress(f"sizes of {split} images", "image", len(names)) as bar:
            for index in range(len(names)):
                try:
                    headers[_header(data.images[index])] += 1
                except (PipelineError, ValueError) as error:
                    faults.append(_fault(data, index, names[index], error))
                bar.update()
    if faults:  # told together with those that only decoding finds
        deque(prepare(splits, (3, image_size or AUTO_SIZE, image_size or AUTO_SIZE)), maxlen=0)
        _check(faults)
    sizes = {(header.height, header.width) for header in headers}
    size = next(iter(sizes)) if len(sizes) == 1 else (AUTO_SIZE, AUTO_SIZE)
    if image_size or max(size) > AUTO_SIZE:
        size = (image_size or AUTO_SIZE,) * 2
    return channels or max(header.channels for header in headers), *size


def prepare(splits: Mapping[str, LabelledImages], shape: tuple[int, int, int]) -> Iterator[Prepared]:
    """Bring all images to a shape (C, H, W), in order, with a progress bar; a few of them are in memory at a time.

    Raises PipelineError that lists the images that cannot be used, after all others.
    """
    faults: list[str] = []
    threads = usable_cores()
    with ThreadPoolExecutor(threads) as pool:  # decoding and scaling leave the interpreter to others
        for split, data in splits.items():
            names = file_names(split, data)
            waiting: deque[Future[list[Prepared | str]]] = deque()
            with progress(f"{split} images", "image", len(names)) as bar:
                for start in range(0, len(names) + CHUNK * AHEAD * threads, CHUNK):
                    if chunk := range(start, min(start + CHUNK, len(names))):
                        waiting.append(pool.submit(_prepare_some, data, chunk, names, shape))
                    if waiting and (len(waiting) > AHEAD * threads or not chunk):
                        for made in waiting.popleft().result():
                            bar.update()
                            if isinstance(made, str):
                                faults.append(made)
                            else:
                                yield made
    _check(faults)


def _prepare_some(
    data: LabelledImages, indices: range, names: Sequence[str], shape: tuple[int, int, int]
) -> list[Prepared | str]:
    """Some images, or what is wrong with one."""
    made: list[Prepared | str] = []
    for index in indices:
        try:
            pixels = _pixels(data.images[index], shape)
        except (PipelineError, ValueError) as error:
            made.append(_fault(data, index, names[index], error))
        else:
            png = encode_png(pixels[0] if shape[0] == 1 else pixels.transpose(1, 2, 0))
            made.append(Prepared(names[index], png, hashlib.sha256(pixels.tobytes()).digest()))
    return made


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


def _fault(data: LabelledImages, index: int, name: str, error: Exception) -> str:
    return f"{data.originals[index] if data.originals else name}: {error}"


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
