"""Fashion-MNIST: 70,000 grey images of 28 x 28 pixels in ten classes (Xiao et al. 2017, arXiv:1708.07747).

It comes from the first place that answers with the right content: the folder that the environment
variable FASHION_MNIST_DIR names, the mirrors that torchvision uses, Debian's package dataset-fashion-mnist.
The content is told by the MD5 of the four unpacked files: the headers of the packed ones differ by place.
"""

import gzip
import math
import os
import shutil
import struct
import subprocess
import threading
import time
import urllib.request
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np

from classifier.pipeline.errors import PipelineError
from classifier.pipeline.outputs import atomic, existing, hash_file, temporary_folder
from classifier.progress import Bar, progress
from classifier.sources import LabelledImages

CLASS_NAMES = [
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
]

# MD5 of the unpacked files
FILES = {
    "train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
    "train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
    "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
    "t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
}
SPLITS = {"train": "train", "test": "t10k"}

# torchvision.datasets.FashionMNIST.mirrors, which would cost the import of torch
MIRRORS = ("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",)
DEBIAN_PACKAGE = "dataset-fashion-mnist"
DEBIAN_FOLDER = "usr/share/datasets/fashion-mnist"

# A place that gives less than SLOWEST_BYTES in STALL_SECONDS is left for the next one. apt is given longer:
# it also reads its lists, for seconds on a busy machine, and writes nothing meanwhile.
STALL_SECONDS = 5
APT_STALL_SECONDS = 12
SLOWEST_BYTES = 50_000
LARGEST_BYTES = 47_040_016  # the unpacked training images: no packed file is larger
POLL_SECONDS = 0.05


class PlaceFailed(Exception):
    """One place did not give the data. The message says why; the next place is tried."""


def fetch(raw: Path, data_path: Path) -> None:
    """Write the four unpacked IDX files to `raw` (data_path is not used: this source knows its places).

    Raises PipelineError, with every place tried and why it failed, when none has the right content, and OSError when a
    place failed and there is no room: the next one would fail too.
    `raw` is written only once all four files are verified.
    """
    places: list[tuple[str, Callable[[Path], None]]] = []
    if local := os.environ.get("FASHION_MNIST_DIR"):
        places.append((f"FASHION_MNIST_DIR={local}", lambda into: _from_folder(Path(local), into)))
    places += [(mirror, lambda into, mirror=mirror: _from_mirror(mirror, into)) for mirror in MIRRORS]  # type: ignore[misc]
    places.append((f"Debian's package {DEBIAN_PACKAGE}", _from_debian))

    failures = []
    for place, bring in places:
        print(f"Fashion-MNIST from {place}", flush=True)
        with temporary_folder(raw) as folder:
            try:
                bring(folder)
                _verify(folder)
            except (PlaceFailed, OSError) as error:
                _check_room(folder)
                failures.append(f"  {place}: {error}")
                print(f"  not used: {error}", flush=True)
                continue
            with atomic(raw) as complete:
                complete.mkdir()
                for name in FILES:
                    (folder / name).replace(complete / name)
            return
    raise PipelineError(
        "Fashion-MNIST could not be had:\n" + "\n".join(failures) + "\n"
        "Put its four files (packed or not) into a folder and set FASHION_MNIST_DIR to it."
    )


def class_names(raw: Path) -> list[str]:
    """The ten names, by label (the same for every copy of the data)."""
    return CLASS_NAMES


def read(raw: Path) -> dict[str, LabelledImages]:
    """The splits train and test. Raises PipelineError if a file is not in the IDX format, or of another shape."""
    return {
        split: LabelledImages(
            read_idx(raw / f"{prefix}-images-idx3-ubyte", dimensions=3),
            read_idx(raw / f"{prefix}-labels-idx1-ubyte", dimensions=1).astype(np.int64),
        )
        for split, prefix in SPLITS.items()
    }


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """Read a file of unsigned bytes in the IDX format, described at the end of the MNIST page by LeCun et al.

    Raises PipelineError if it is another file, has another number of dimensions, or not the bytes of its shape.
    """
    content = existing(path).read_bytes()
    if content[:3] != b"\0\0\x08" or len(content) < 4:
        raise PipelineError(f"{path}: not an IDX file of unsigned bytes; run the download stage again")
    if content[3] != dimensions:
        raise PipelineError(f"{path}: {content[3]} dimensions, not {dimensions}; run the download stage again")
    start = 4 + 4 * dimensions
    if len(content) < start:
        raise PipelineError(f"{path}: cut off after {len(content)} bytes; run the download stage again")
    shape = struct.unpack(f">{dimensions}I", content[4:start])
    if 0 in shape:
        raise PipelineError(f"{path}: shape {shape} holds nothing; run the download stage again")
    if len(content) - start != math.prod(shape):
        raise PipelineError(f"{path}: {len(content)} bytes do not hold shape {shape}; run the download stage again")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _verify(folder: Path) -> None:
    """Raise PlaceFailed for the first file whose content is not Fashion-MNIST's; `fetch` deletes the folder."""
    for name, md5 in FILES.items():
        if (found := hash_file(folder / name)) != md5:
            size = (folder / name).stat().st_size
            raise PlaceFailed(f"{name} has the wrong content, {size} bytes with md5 {found}, not {md5}")


def _check_room(folder: Path) -> None:
    """Raise OSError if there is no room for the largest file, whatever a place said of its failure."""
    with (folder / "room").open("wb") as file:
        file.write(bytes(LARGEST_BYTES))


def _unpack(packed: Path, target: Path) -> None:
    """Unpack one file. Raises PlaceFailed if it is no gzip file, or unpacks to more than LARGEST_BYTES."""
    try:
        with gzip.open(packed) as source, target.open("wb") as file:
            while chunk := source.read(1 << 20):
                file.write(chunk)
                if file.tell() > LARGEST_BYTES:
                    raise PlaceFailed(f"{packed.name} unpacks to more than {LARGEST_BYTES} bytes")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise PlaceFailed(f"{packed.name} is truncated or not gzip: {error}") from None


def _from_folder(source: Path, into: Path) -> None:
    """Copy the files, packed or not, from a folder, which stays as it is."""
    for name in FILES:
        if (source / name).is_file():
            if (size := (source / name).stat().st_size) > LARGEST_BYTES:
                raise PlaceFailed(f"{name} has {size} bytes, more than {LARGEST_BYTES}")
            shutil.copyfile(source / name, into / name)
        elif (source / f"{name}.gz").is_file():
            _unpack(source / f"{name}.gz", into / name)
        else:
            raise PlaceFailed(f"there is no {name} or {name}.gz in {source}")


def _from_mirror(mirror: str, into: Path) -> None:
    for name in FILES:
        packed = into / f"{name}.gz"
        faults: list[Exception] = []
        with progress(packed.name, "B") as bar:
            # A thread can be left behind when it stalls. A timeout alone bounds the wait for each byte, not for all
            # of them, and not at all the search for the address.
            arguments = (f"{mirror}{packed.name}", packed, bar, faults)
            thread = threading.Thread(target=_receive, args=arguments, daemon=True)
            thread.start()
            try:
                _watch(thread.is_alive, into, bar, STALL_SECONDS)
            except PlaceFailed as stalled:
                raise PlaceFailed(f"{packed.name}: {stalled}") from None
        if faults:
            raise PlaceFailed(f"{packed.name}: {' '.join(str(faults[0]).split())}")
        _unpack(packed, into / name)


def _receive(url: str, target: Path, bar: Bar, faults: list[Exception]) -> None:
    """Fetch one file, in a thread of its own. An exception is put into `faults`."""
    try:
        with (
            target.open("wb") as file,
            urllib.request.urlopen(url, timeout=2 * STALL_SECONDS) as response,
        ):  # _watch is first
            length = bar.total = response.length  # None if the server does not say
            while chunk := response.read1(1 << 16):
                file.write(chunk)
                if file.tell() > LARGEST_BYTES:
                    raise PlaceFailed(f"more than {LARGEST_BYTES} bytes")
            if length is not None and file.tell() != length:
                raise PlaceFailed(f"cut off after {file.tell()} of {length} bytes")
    except Exception as error:  # told by the thread that waits
        faults.append(error)


def _watch(working: Callable[[], bool], folder: Path, bar: Bar, stall_seconds: float) -> None:
    """Wait as long as `working()`. Raises PlaceFailed if `folder` gets too little within `stall_seconds`."""
    window_start, window_bytes, shown_bytes = time.monotonic(), _bytes_in(folder), 0
    while working():
        time.sleep(POLL_SECONDS)
        now_bytes = _bytes_in(folder)
        bar.update(now_bytes - window_bytes - shown_bytes)
        shown_bytes = now_bytes - window_bytes
        if time.monotonic() - window_start > stall_seconds:
            if abs(shown_bytes) < SLOWEST_BYTES:
                raise PlaceFailed(f"stalled, {shown_bytes} bytes in {stall_seconds} s")
            window_start, window_bytes, shown_bytes = time.monotonic(), now_bytes, 0


def _bytes_in(folder: Path) -> int:
    total = 0
    for file in folder.rglob("*"):
        with suppress(FileNotFoundError):  # renamed meanwhile
            total += file.stat().st_size if file.is_file() else 0
    return total


def _from_debian(into: Path) -> None:
    """Unpack Debian's package, without root and without touching the system.

    apt keeps its lists and downloads in a folder of ours, below `into`; it checks the archive's signature.
    """
    if (installed := Path("/") / DEBIAN_FOLDER).is_dir():
        _from_folder(installed, into)
        return
    if not shutil.which("apt-get") or not shutil.which("dpkg-deb"):
        raise PlaceFailed("this system has no apt-get and dpkg-deb")
    work = into.resolve() / "debian"  # inside the folder that `fetch` removes
    (work / "state/lists/partial").mkdir(parents=True)
    (work / "cache/archives/partial").mkdir(parents=True)
    options = ["-q", "-o", f"Dir::State={work}/state", "-o", "Dir::State::status=/dev/null"]
    options += ["-o", f"Dir::Cache={work}/cache", "-o", "Acquire::Retries=0", "-o", "APT::Sandbox::User="]
    options += ["-o", f"Acquire::http::Timeout={STALL_SECONDS}", "-o", f"Acquire::https::Timeout={STALL_SECONDS}"]
    update = _run(["apt-get", "update", *options], work)
    try:
        _run(["apt-get", "download", DEBIAN_PACKAGE, *options], work)
    except PlaceFailed as error:  # `update` succeeds although places failed, because others may do
        reason = next((f"; {line}" for line in update.splitlines() if "Failed to fetch" in line), "")
        raise PlaceFailed(f"{error}{reason}") from None
    packages = list(work.glob(f"{DEBIAN_PACKAGE}_*.deb"))
    if len(packages) != 1:
        raise PlaceFailed(f"apt-get download left {len(packages)} packages")
    _run(["dpkg-deb", "-x", str(packages[0]), "unpacked"], work)
    _from_folder(work / "unpacked" / DEBIAN_FOLDER, into)


def _run(command: list[str], folder: Path) -> str:
    """Run a program that writes to `folder`, and give back what it printed.

    Raises PlaceFailed with the last line it printed if it fails, or if it stalls, in which case it is ended.
    """
    log, name = folder / "log", " ".join(command[:2])
    with (
        log.open("wb") as output,
        progress(name, "B") as bar,
        subprocess.Popen(
            command,
            cwd=folder,
            env=os.environ | {"LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        ) as process,
    ):
        try:
            _watch(lambda: process.poll() is None, folder, bar, APT_STALL_SECONDS)
        except PlaceFailed as stalled:
            raise PlaceFailed(f"{name}: {stalled}") from None
        finally:
            process.kill()
    printed = log.read_text(encoding="utf-8", errors="replace").strip()
    if process.returncode != 0:
        complaint = printed.splitlines()[-1] if printed else f"exit code {process.returncode}"
        raise PlaceFailed(f"{name}: {complaint}")
    return printed
