"""Journals: what stages have to tell MLflow, on disk until MLflow has it.

A stage writes records to a journal, a folder in .journal/ of the main checkout, and goes on at once. A process beside
it (classifier/tracking/sender.py) sends them, and removes the journal when it has ended and all is sent. What cannot be
sent, because there is no server or the store's disk is full, stays for the next stage or command, or for
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
    """A folder of records, one line of JSON each, and of the files that they speak of.

    The process that writes it holds its lock: so a journal without an end is known as that of a killed process.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lines = folder / "records.jsonl"
        self._sent = folder / "sent.json"
        self._lock = FileLock(folder / ".lock")

    @classmethod
    def create(cls) -> "Journal":
        """A new journal, which this process alone writes to."""
        # Journals are sent in the order of their names: what a training tells, before what its evaluation does.
        name = f"{time.time_ns()}-{os.getpid()}"
        hidden = home() / f".{name}"
        hidden.mkdir(parents=True)
        lock = FileLock(hidden / ".lock")
        lock.acquire()
        journal = cls(hidden.rename(home() / name))  # with its lock: without, it would be that of a killed process
        journal._lock = lock
        return journal

    def write(self, kind: str, **content: Any) -> None:
        """Add a record with the present time, durably. Raises OSError if there is no room for it."""
        # A line of its own also after one that is torn
        line = f"\n{json.dumps({'kind': kind, 'time': time.time(), **content})}\n".encode()
        with self._lines.open("ab", buffering=0) as file:  # at once: the stage and its sender both write
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
        """Put a file with this content into the journal; return its path there."""
        file = self._new_file(name)
        file.write_bytes(content)
        return file.relative_to(self.folder).as_posix()

    def _new_file(self, name: str) -> Path:
        files = self.folder / "files"
        files.mkdir(exist_ok=True)  # and not its parents: a journal that was removed is not made again
        folder = files / f"{time.time_ns()}"
        folder.mkdir()
        return folder / name

    def records(self) -> list[dict[str, Any] | None]:
        """Return all that was written to the end; None for a record that is torn, as by a disk without room.

        Raises PipelineError if the journal may not be read, as another user's.
        """
        try:
            content = self._lines.read_bytes() if self._lines.exists() else b""
        except OSError as error:
            raise PipelineError(f"{self.folder}: {error.strerror}; its owner can send it") from None
        return [_record(line) for line in content.split(b"\n")[:-1] if line]

    @property
    def sent(self) -> int:
        """How many of the records MLflow has."""
        return int(json.loads(self._sent.read_bytes())) if self._sent.exists() else 0

    @sent.setter
    def sent(self, count: int) -> None:
        write_json(self._sent, count)

    def is_being_written(self) -> bool:
        """Whether the process that writes it is alive."""
        try:
            with self._lock.acquire(timeout=0):
                return False
        except (Timeout, OSError):  # OSError: it is another user's, or being removed
            return True

    def wait_for_writer(self, seconds: float) -> None:
        """Wait for the process that writes it to end."""
        with suppress(Timeout), self._lock.acquire(timeout=seconds):
            pass

    def remove(self) -> None:
        """Delete it: MLflow has all."""
        self._lines.unlink(missing_ok=True)  # first: of a removal that is cut off, nothing is left to be sent
        shutil.rmtree(self.folder)


def home() -> Path:
    """The folder of all journals."""
    return repository_root() / FOLDER


def journals() -> list[Journal]:
    """All that are not sent, the oldest first."""
    return [Journal(folder) for folder in sorted(home().glob("[0-9]*-*/"))]


def find_end(records: Sequence[dict[str, Any] | None]) -> dict[str, Any] | None:
    """The end of the run among these records of a journal: after it, only a measurement of the machine may come."""
    return next((record for record in records if record and record["kind"] == "end"), None)


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and "kind" in record else None
