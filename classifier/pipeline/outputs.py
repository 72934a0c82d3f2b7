"""Outputs that appear whole or not at all, and their hashes."""

import errno
import hashlib
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from classifier.pipeline.errors import NO_ROOM, PipelineError, disk_fault

MANY_FILES = 100_000
CLOCK_SECONDS = 60  # by which a process may seem to have started too late: clocks are set


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Give a path to write to that becomes `path` when the block ends without an error.

    The file (or folder) is written under its final name in a temporary folder beside the target,
    because torch.save and torch.export.save put the file's name into its bytes. Until the block has
    ended, `path` is what it was before.
    """
    with temporary_folder(path) as folder:
        temporary = folder / path.name
        yield temporary
        if temporary.is_dir() or path.is_dir():
            _replace_folder(path, temporary, aside=folder)
        else:
            temporary.replace(path)


def _replace_folder(path: Path, new: Path, aside: Path) -> None:
    """Put a new folder, or file, where there may be a folder, which goes aside: it cannot be replaced as a file can."""
    for number in itertools.count():
        with suppress(FileNotFoundError):
            path.replace(aside / f"old{number}")
        try:
            new.replace(path)
        except OSError as error:
            if error.errno not in (
                errno.ENOTEMPTY,
                errno.EEXIST,
                errno.EISDIR,
                errno.ENOTDIR,
            ):  # another process has just put one there
                raise
        else:
            return


@contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """Give a folder beside `path`, on the same file system, for as long as the block lasts.

    What a killed process has left of such folders for this path is removed. An error for lack of room or of access
    that the block meets in writing names `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{path.name}.*"):
        process = left.name.removeprefix(f".{path.name}.").split(".")[0]
        if process.isdecimal() and not _is_alive(int(process), left):
            shutil.rmtree(left, ignore_errors=True)
    prefix = f".{path.name}.{os.getpid()}."
    try:
        with tempfile.TemporaryDirectory(prefix=prefix, dir=path.parent) as folder:
            yield Path(folder)
    except Exception as error:
        if (fault := disk_fault(error)) and (fault.errno in NO_ROOM or prefix in str(fault.filename)):
            fault.filename = str(path)
        raise


def _is_alive(process: int, folder: Path) -> bool:
    """Whether the process that made a folder is there: in containers, others often have the same number later."""
    try:
        return bool(psutil.Process(process).create_time() < folder.stat().st_mtime + CLOCK_SECONDS)
    except (psutil.NoSuchProcess, FileNotFoundError):
        return False


def write_json(path: Path, content: Any) -> None:
    """Write `content` as indented JSON, atomically. Floats keep every digit they need to be read back exactly."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read a JSON file that an earlier stage wrote. Raises PipelineError if it is missing, or no JSON."""
    try:
        return json.loads(existing(path).read_bytes())
    except (ValueError, RecursionError) as error:
        raise PipelineError(f"{path}: not as the pipeline writes it ({error}); `dvc repro` makes it anew") from None


def is_there(path: Path) -> bool:
    """As `path.exists()`, which raises OSError for a name that is too long."""
    return os.path.exists(path)  # noqa: PTH110


def existing(path: Path) -> Path:
    """Give `path` back if it is there. Raises PipelineError, with the way to make it, if not."""
    if not path.exists():
        raise PipelineError(f"{path}: missing; `dvc repro` makes it, `classifier restore` or `dvc pull` bring it back")
    return path


def hash_file(path: Path, algorithm: str = "md5") -> str:
    """Hexadecimal digest of a file's bytes; md5 is what DVC names files by."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def hash_path(path: Path) -> str:
    """The md5 by which dvc.lock knows a file, or a folder: of the sorted list of its files, with `.dir` behind it."""
    if path.is_file():
        return hash_file(path)
    paths = [file for file in path.rglob("*") if file.is_file() and file.parent.name != "__pycache__"]
    pool = ThreadPoolExecutor()  # hashing lets other threads run
    try:
        # Of small files there may be a million, each of which would wait for its turn in memory
        md5s = list((pool.map if len(paths) < MANY_FILES else map)(hash_file, paths))
    finally:
        pool.shutdown(cancel_futures=True)
    return hash_listing({file.relative_to(path).as_posix(): md5 for file, md5 in zip(paths, md5s, strict=True)})


def hash_listing(md5s: Mapping[str, str]) -> str:
    """The md5 by which dvc.lock knows a folder, of the md5s of its files by their names relative to it."""
    listed = [{"md5": md5, "relpath": name} for name, md5 in md5s.items()]
    listed.sort(key=lambda entry: tuple(entry["relpath"].split("/")))
    return f"{hash_bytes(json.dumps(listed, sort_keys=True).encode())}.dir"


def hash_bytes(content: bytes) -> str:
    """Hexadecimal md5 of bytes, which DVC names files by."""
    return hashlib.md5(content, usedforsecurity=False).hexdigest()
