"""Atomic outputs, which appear complete or not at all, and their hashes."""

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
CLOCK_SECONDS = 60  # error of a process's start time: clocks are adjusted


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a path to write to, which replaces `path` when the block ends without an error.

    The file or folder is written under its final name in a temporary folder beside the target: torch.save and
    torch.export.save write the file's name into its content. `path` does not change until the block ends.
    """
    with temporary_folder(path) as folder:
        temporary = folder / path.name
        yield temporary
        if temporary.is_dir() or path.is_dir():
            _replace_folder(path, temporary, aside=folder)
        else:
            temporary.replace(path)


def _replace_folder(path: Path, new: Path, aside: Path) -> None:
    """Replace a folder, or replace by one: move the old one to `aside` first, because rename only replaces files."""
    for number in itertools.count():
        with suppress(FileNotFoundError):
            path.replace(aside / f"old{number}")
        try:
            new.replace(path)
        except OSError as error:
            # These mean that another process has just created one
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.EISDIR, errno.ENOTDIR):
                raise
        else:
            return


@contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """Yield a folder beside `path`, on the same file system. It is deleted when the block ends.

    Such folders of killed processes are removed. An OSError for lack of space or access in the block names `path`.
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
    """Whether the process that made a folder is alive; in containers, process numbers are soon reused."""
    try:
        return bool(psutil.Process(process).create_time() < folder.stat().st_mtime + CLOCK_SECONDS)
    except (psutil.NoSuchProcess, FileNotFoundError):
        return False


def write_json(path: Path, content: Any) -> None:
    """Write `content` as indented JSON, atomically. Floats are read back exactly."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read a JSON file that an earlier stage wrote. Raises PipelineError if it is missing or not JSON."""
    try:
        return json.loads(existing(path).read_bytes())
    except (ValueError, RecursionError) as error:
        raise PipelineError(f"{path}: not valid JSON ({error}); `dvc repro` writes it again") from None


def is_there(path: Path) -> bool:
    """Whether a path exists. `path.exists()` raises OSError if the name is too long."""
    return os.path.exists(path)  # noqa: PTH110


def existing(path: Path) -> Path:
    """Return `path` if it exists. Raises PipelineError, with the command that creates it, if not."""
    if not path.exists():
        raise PipelineError(f"{path}: missing; `dvc repro` makes it, `classifier restore` or `dvc pull` bring it back")
    return path


def hash_file(path: Path, algorithm: str = "md5") -> str:
    """Return the hexadecimal digest of a file; DVC identifies files by their md5."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def hash_path(path: Path) -> str:
    """Return the md5 of a file or a folder as in dvc.lock.

    That of a folder is the md5 of the sorted list of its files, plus `.dir`.
    """
    if path.is_file():
        return hash_file(path)
    paths = [file for file in path.rglob("*") if file.is_file() and file.parent.name != "__pycache__"]
    pool = ThreadPoolExecutor()  # hashing releases the GIL
    try:
        # A pool holds every waiting file in memory, and there may be a million small ones
        md5s = list((pool.map if len(paths) < MANY_FILES else map)(hash_file, paths))
    finally:
        pool.shutdown(cancel_futures=True)
    return hash_listing({file.relative_to(path).as_posix(): md5 for file, md5 in zip(paths, md5s, strict=True)})


def hash_listing(md5s: Mapping[str, str]) -> str:
    """Return the md5 of a folder as in dvc.lock. md5s: of its files, by their paths relative to the folder."""
    listed = [{"md5": md5, "relpath": name} for name, md5 in md5s.items()]
    listed.sort(key=lambda entry: tuple(entry["relpath"].split("/")))
    return f"{hash_bytes(json.dumps(listed, sort_keys=True).encode())}.dir"


def hash_bytes(content: bytes) -> str:
    """Return the hexadecimal md5 of bytes."""
    return hashlib.md5(content, usedforsecurity=False).hexdigest()
