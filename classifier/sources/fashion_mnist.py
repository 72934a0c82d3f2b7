"""Fashion-MNIST: 70,000 grey images of 28 x 28 pixels in ten classes (Xiao et al. 2017, arXiv:1708.07747).

It comes from the first place that answers with the right content: the folder that the environment
variable FASHION_MNIST_DIR names, the mirrors that torchvision uses, Debian's package dataset-fashion-mnist.
The content is told by the MD5 of the four unpacked files: the headers of the packed ones differ by place.
"""

import gzip
import os
import shutil
import struct
import subprocess
import tempfile
import time
import urllib.request
import zlib
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path

import numpy as np
from tqdm import tqdm

from classifier.errors import PipelineError
from classifier.files import hash_file
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

# A place that gives less than SLOWEST_BYTES in STALL_SECONDS is left for the next one.
STALL_SECONDS = 5
SLOWEST_BYTES = 50_000


class PlaceFailed(Exception):
    """One place did not give the data. The message says why; the next place is tried."""


def fetch(raw: Path, data_path: Path) -> None:
    """Write the four unpacked IDX files to `raw` (data_path is not used: this source knows its places).

    Raises PipelineError, with every place tried and why it failed, when none has the right content.
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
        with tempfile.TemporaryDirectory(prefix=".download.", dir=_made(raw.parent)) as folder:
            try:
                bring(Path(folder))
                _verify(Path(folder))
            except (PlaceFailed, OSError) as error:
                failures.append(f"  {place}: {error}")
                print(f"  not used: {error}", flush=True)
                continue
            raw.mkdir(exist_ok=True)
            for name in FILES:
                os.replace(Path(folder) / name, raw / name)
            return
    raise PipelineError(
        "Fashion-MNIST could not be had:\n" + "\n".join(failures) + "\n"
        "Put its four files (packed or not) into a folder and set FASHION_MNIST_DIR to it."
    )


def class_names(raw: Path) -> list[str]:
    """The ten names, by label (the same for every copy of the data)."""
    return CLASS_NAMES


def read(raw: Path) -> dict[str, LabelledImages]:
    """The splits train and test. Raises PipelineError if a file is not in the IDX format."""
    return {
        split: LabelledImages(
            read_idx(raw / f"{prefix}-images-idx3-ubyte"),
            read_idx(raw / f"{prefix}-labels-idx1-ubyte").astype(np.int64),
        )
        for split, prefix in SPLITS.items()
    }


def read_idx(path: Path) -> np.ndarray:
    """Read a file of unsigned bytes in the IDX format, described at the end of the MNIST page by LeCun et al."""
    content = path.read_bytes()
    zeros, kind, dimensions = struct.unpack(">HBB", content[:4]) if len(content) >= 4 else (1, 0, 0)
    if zeros != 0 or kind != 8:
        raise PipelineError(f"{path}: not an IDX file of unsigned bytes; run the download stage again")
    start = 4 + 4 * dimensions
    shape = struct.unpack(f">{dimensions}I", content[4:start]) if len(content) >= start else (-1,)
    if len(content) - start != np.prod(shape):
        raise PipelineError(f"{path}: {len(content)} bytes do not hold shape {shape}; run the download stage again")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _verify(folder: Path) -> None:
    """Delete the first file whose content is not Fashion-MNIST's, and raise PlaceFailed with its name."""
    for name, md5 in FILES.items():
        if (found := hash_file(folder / name)) != md5:
            size = (folder / name).stat().st_size
            (folder / name).unlink()
            raise PlaceFailed(f"{name} is wrong and was deleted: {size} bytes with md5 {found}, not {md5}")


def _unpack(packed: Path, target: Path) -> None:
    try:
        with gzip.open(packed) as source, target.open("wb") as file:
            shutil.copyfileobj(source, file)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise PlaceFailed(f"{packed.name} is truncated or not gzip: {error}") from None


def _from_folder(source: Path, into: Path) -> None:
    """Copy the files, packed or not, from a folder, which stays as it is."""
    for name in FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, into / name)
        elif (source / f"{name}.gz").is_file():
            _unpack(source / f"{name}.gz", into / name)
        else:
            raise PlaceFailed(f"there is no {name} or {name}.gz in {source}")


def _from_mirror(mirror: str, into: Path) -> None:
    for name in FILES:
        packed = into / f"{name}.gz"
        try:
            _download(f"{mirror}{packed.name}", packed)
        except (OSError, HTTPException) as error:
            raise PlaceFailed(f"{packed.name}: {error}") from None
        _unpack(packed, into / name)


def _download(url: str, target: Path) -> None:
    """Fetch one file with a progress bar. Raises OSError, or PlaceFailed if the server gives too little."""
    with urllib.request.urlopen(url, timeout=STALL_SECONDS) as response, target.open("wb") as file:
        length = int(response.headers.get("Content-Length") or 0)
        with tqdm(total=length or None, desc=target.name, unit="B", unit_scale=True, disable=None) as progress:
            window_start, window_bytes = time.monotonic(), 0
            while chunk := response.read1(1 << 16):
                file.write(chunk)
                progress.update(len(chunk))
                window_bytes += len(chunk)
                if (elapsed := time.monotonic() - window_start) > STALL_SECONDS:
                    if window_bytes < SLOWEST_BYTES:
                        raise PlaceFailed(f"{target.name}: stalled, {window_bytes} bytes in {elapsed:.0f} s")
                    window_start, window_bytes = time.monotonic(), 0
    if length and target.stat().st_size != length:
        raise PlaceFailed(f"{target.name}: cut off after {target.stat().st_size} of {length} bytes")


def _from_debian(into: Path) -> None:
    """Unpack Debian's package, without root and without touching the system.

    apt keeps its lists and downloads in a folder of ours; it checks the archive's signature.
    """
    if (installed := Path("/") / DEBIAN_FOLDER).is_dir():
        return _from_folder(installed, into)
    if not shutil.which("apt-get") or not shutil.which("dpkg-deb"):
        raise PlaceFailed("this system has no apt-get and dpkg-deb")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        (work / "state/lists/partial").mkdir(parents=True)
        (work / "cache/archives/partial").mkdir(parents=True)
        apt = ["apt-get", "-q", "-o", f"Dir::State={work}/state", "-o", "Dir::State::status=/dev/null"]
        apt += ["-o", f"Dir::Cache={work}/cache", "-o", "Acquire::Retries=0", "-o", "APT::Sandbox::User="]
        apt += ["-o", f"Acquire::http::Timeout={STALL_SECONDS}", "-o", f"Acquire::https::Timeout={STALL_SECONDS}"]
        with tqdm(total=3, desc=DEBIAN_PACKAGE, unit="step", disable=None) as progress:
            _run([*apt, "update"], work)
            progress.update()
            _run([*apt, "download", DEBIAN_PACKAGE], work)
            progress.update()
            package = next(work.glob(f"{DEBIAN_PACKAGE}_*.deb"))
            _run(["dpkg-deb", "-x", str(package), "unpacked"], work)
            progress.update()
        _from_folder(work / "unpacked" / DEBIAN_FOLDER, into)


def _run(command: list[str], folder: Path) -> None:
    """Run a program; PlaceFailed with the last line of what it complained of if it fails."""
    done = subprocess.run(command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode != 0:
        complaint = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise PlaceFailed(f"{command[0]} {command[-1]}: {complaint}")
