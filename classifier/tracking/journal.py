"""Journals: records for MLflow, kept on disk until they are sent.

A stage writes records to a journal, a folder in .journal/ of the main checkout, and continues at once. Another process
(classifier/tracking/sender.py) sends them, and removes the journal when it is complete and sent. Records that cannot be
sent, because the server is unreachable or the store's disk is full, are sent by the next stage or command, or by
`classifier sync`.
"""

import errno
import json
import os
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from classifier.pipeline.errors import PipelineError
from classifier.pipeline.outputs import write_json
from classifier.pipeline.paths import repository_root

FOLDER = ".journal"


class Journal:
    """A folder with records, one line of JSON each, and copies of the files to upload.

    The writing process holds a lock. An unlocked journal without an end record belongs to a killed process.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lines = folder / "records.jsonl"
        self._sent = folder / "sent.json"
        self._lock = FileLock(folder / ".lock")

    @classmethod
    def create(cls) -> "Journal":
        """Create a journal locked by this process."""
        # Journals are sent in the order of their names: a training before its evaluation.
        name = f"{time.time_ns()}-{os.getpid()}"
        hidden = home() / f".{name}"
        hidden.mkdir(parents=True)
        lock = FileLock(hidden / ".lock")
        lock.acquire()
        journal = cls(hidden.rename(home() / name))  # already locked, so that no sender takes it for a killed process's
        journal._lock = lock
        return journal

    def write(self, kind: str, **content: Any) -> None:
        """Append a record with the current time and sync it to disk. Raises OSError if the disk is full."""
        # The leading newline separates it from an incomplete line.
        line = f"\n{json.dumps({'kind': kind, 'time': time.time(), **content})}\n".encode()
        with self._lines.open("ab", buffering=0) as file:  # one write call: the stage and its sender both append
            if file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._lines))
            os.fsync(file.fileno())

    def keep(self, path: Path) -> str:
        """Copy a file or a folder into the journal; return its path there."""
        copy = self._new_file(path.name)
        if path.is_dir():
            shutil.copytree(path, copy)
        else:
            shutil.copyfile(path, copy)
        return copy.relative_to(self.folder).as_posix()

    def keep_bytes(self, name: str, content: bytes) -> str:
        """Write a file into the journal; return its path there."""
        file = self._new_file(name)
        file.write_bytes(content)
        return file.relative_to(self.folder).as_posix()

    def _new_file(self, name: str) -> Path:
        files = self.folder / "files"
        files.mkdir(exist_ok=True)  # without parents: do not recreate a removed journal
        folder = files / f"{time.time_ns()}"
        folder.mkdir()
        return folder / name

    def records(self) -> list[dict[str, Any] | None]:
        """Return all complete lines as records; None for a line that is no record, as after a full disk.

        Raises PipelineError if the journal cannot be read, for example another user's.
        """
        try:
            content = self._lines.read_bytes() if self._lines.exists() else b""
        except OSError as error:
            raise PipelineError(f"{self.folder}: {error.strerror}; run `classifier sync` as its owner") from None
        return [_record(line) for line in content.split(b"\n")[:-1] if line]

    @property
    def sent(self) -> int:
        """Number of records that MLflow has."""
        return int(json.loads(self._sent.read_bytes())) if self._sent.exists() else 0

    @sent.setter
    def sent(self, count: int) -> None:
        write_json(self._sent, count)

    def is_being_written(self) -> bool:
        """Return whether the writing process is alive."""
        try:
            with self._lock.acquire(timeout=0):
                return False
        except (Timeout, OSError):  # OSError: another user's journal, or one that is being removed
            return True

    def wait_for_writer(self, seconds: float) -> None:
        """Wait for the writing process to end."""
        with suppress(Timeout), self._lock.acquire(timeout=seconds):
            pass

    def remove(self) -> None:
        """Delete the journal."""
        self._lines.unlink(missing_ok=True)  # first, so that nothing is sent after an interrupted removal
        shutil.rmtree(self.folder)


def home() -> Path:
    """Return the folder of all journals."""
    return repository_root() / FOLDER


def journals() -> list[Journal]:
    """Return all unsent journals, oldest first."""
    return [Journal(folder) for folder in sorted(home().glob("[0-9]*-*/"))]


def find_end(records: Sequence[dict[str, Any] | None]) -> dict[str, Any] | None:
    """Return the record that ends the run, if any. Only samples of system metrics may follow it."""
    return next((record for record in records if record and record["kind"] == "end"), None)


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and "kind" in record else None
