"""Checkpoints of an unfinished training: a killed run resumes from the last one and gives the same bytes.

They are in .checkpoints/ of the main checkout. Each training has a folder named after the hash of its fingerprint: all
data, code, parameters and machine properties that decide its result. A training with another fingerprint never resumes
from it. The folder is deleted once the training has written its outputs.
"""

import hashlib
import io
import json
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from filelock import FileLock, Timeout

from classifier.compute.distributed import Group
from classifier.pipeline.errors import disk_fault
from classifier.pipeline.outputs import atomic, hash_bytes, hash_path, is_there
from classifier.pipeline.paths import repository_root
from classifier.pipeline.safe_yaml import read_yaml
from classifier.pipeline.signals import defer_signals
from classifier.training.state import TrainState

FOLDER = ".checkpoints"
RECORD = "training.json"
CHECKPOINT_SECONDS = 60  # a checkpoint is due after this time, even if fewer than `every` batches are done
SIGNAL_SECONDS = 3  # the longest that a signal waits for the end of an update
KEPT_CHECKPOINTS = 2  # for each training: the last one, and the one before in case the last is damaged
KEPT_TRAININGS = 8  # folders in .checkpoints/; the oldest unlocked ones beyond that are removed
DIGEST_BYTES = 32  # SHA-256, stored before the content
# An interrupted training takes up to five seconds to end, and its decoding processes as long to notice.
PATIENCE_SECONDS = 12


def stage_fingerprint(
    pipeline: Path, stage: str, md5s: Mapping[str, str], values: Mapping[str, Any], environment: Mapping[str, Any]
) -> dict[str, Any]:
    """Return everything that decides a stage's result, by name: its deps and params in dvc.yaml, the environment.

    pipeline: dvc.yaml. md5s: of the outputs of earlier stages, by path; other deps are hashed. values: all parameters.
    """
    row = read_yaml(pipeline.read_text(encoding="utf-8"))["stages"][stage]
    deps = [re.sub(r"\$\{(\w+)\}", lambda key: str(values[key[1]]), dep) for dep in row["deps"]]
    parameters = {key: values[key] for key in row["params"]}
    files = [Path(name) for name in (*deps, parameters.get("weights") or "") if name]
    hashes = {str(path): md5s.get(str(path)) or hash_path(path) for path in files if is_there(path)}
    return hashes | parameters | dict(environment)


@contextmanager
def checkpoints(fingerprint: Mapping[str, Any]) -> Iterator["Checkpoints"]:
    """Lock the checkpoints of the training with this fingerprint; delete them if the block succeeds.

    If another process holds the lock, wait up to PATIENCE_SECONDS for it to end, then use a second, empty folder.
    """
    home = repository_root() / FOLDER
    home.mkdir(exist_ok=True)
    is_announced, deadline = False, time.monotonic() + PATIENCE_SECONDS
    while not (claimed := _claim(home, fingerprint, may_add=time.monotonic() > deadline)):
        if not is_announced:
            print(
                f"Another process runs the same training: waiting up to {PATIENCE_SECONDS} seconds for it to end",
                flush=True,
            )
            is_announced = True
        time.sleep(0.2)
    folder, lock = claimed
    try:
        yield Checkpoints(folder)
        with suppress(OSError), FileLock(home / ".lock"):  # the user may have deleted the folder
            shutil.rmtree(folder, ignore_errors=True)
            Path(lock.lock_file).unlink(missing_ok=True)
    finally:
        lock.release()


@contextmanager
def resume(
    state: TrainState, group: Group, saved: "Checkpoints", *, every: int, last: int
) -> Iterator[Callable[[], None]]:
    """Load the last checkpoint into `state`, if there is one; yield a function to call after each update.

    The function saves a checkpoint after every `every` batches of an epoch, after batch number `last`, and when
    CHECKPOINT_SECONDS have passed since the last one. If a signal has arrived, it saves one and raises Interrupted.
    """
    content = group.from_first(saved.load)
    if content:
        state.load_state_dict(content | {"random": content["random"][group.rank]})
        print(f"Resuming epoch {state.epoch + 1} after batch {state.batch}", flush=True)
    elif difference := saved.difference_from_abandoned():
        print(f"Starting from scratch; the checkpoint of an abandoned training does not fit: {difference}", flush=True)

    with defer_signals(SIGNAL_SECONDS) as pending:

        def after_update() -> None:
            is_due = state.batch % every == 0 or state.batch == last
            is_late = time.monotonic() - saved.last > CHECKPOINT_SECONDS
            if group.any(is_due or is_late or pending.number is not None):
                content = state.state_dict()
                content["random"] = group.gather(content["random"])  # each process draws its own, as for dropout
                saved.save(state.epoch, state.batch, content)
                pending.release()

        yield after_update


def _claim(home: Path, fingerprint: Mapping[str, Any], may_add: bool) -> tuple[Path, FileLock] | None:
    """Lock one of a training's folders, adding one if `may_add`; return None if all are locked."""
    key = hash_bytes(json.dumps(fingerprint, sort_keys=True).encode())
    with FileLock(home / ".lock"):
        folders = sorted(home.glob(f"{key}-*/")) or [home / f"{key}-1"]
        if may_add:
            folders.append(next(path for n in range(1, 1000) if not (path := home / f"{key}-{n}").exists()))
        for folder in folders:
            if lock := _lock(folder):
                folder.mkdir(exist_ok=True)
                _ensure_record(folder, fingerprint)
                _remove_old(home)
                return folder, lock
    return None


def _ensure_record(folder: Path, fingerprint: Mapping[str, Any]) -> None:
    """Write the folder's training.json if it is missing or damaged."""
    record = folder / RECORD
    if not _read_record(record):
        if any(folder.iterdir()):
            print(f"{record}: damaged, written again; the training continues in a new MLflow run", file=sys.stderr)
        _write_record(record, uuid4().hex, time.time(), fingerprint)


def _write_record(record: Path, name: str, started: float, fingerprint: Mapping[str, Any]) -> None:
    content = {"name": name, "started": started, "fingerprint": dict(fingerprint)}
    _write_durably(record, json.dumps(content, indent=2).encode())


def _write_durably(path: Path, *parts: bytes | memoryview) -> None:
    """Write a file atomically, and return once it is on the disk."""
    with atomic(path) as temporary, temporary.open("wb") as file:
        file.writelines(parts)
        file.flush()
        os.fsync(file.fileno())


def _lock(folder: Path) -> FileLock | None:
    """Lock a training's folder; return None if another process holds it."""
    lock = FileLock(folder.with_name(f".{folder.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return None
    return lock


def _remove_old(home: Path) -> None:
    """Remove the unlocked folders among all but the KEPT_TRAININGS most recent ones."""
    for folder in sorted(home.glob("*/"), key=lambda folder: -folder.stat().st_mtime)[KEPT_TRAININGS:]:
        if lock := _lock(folder):
            print(f"Removed the checkpoints of an abandoned training: {folder}")
            shutil.rmtree(folder)
            Path(lock.lock_file).unlink()
            lock.release()


def _read_record(record: Path) -> dict[str, Any]:
    """Read a training.json; return an empty dict if it is missing or damaged."""
    try:
        content = json.loads(record.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) and {"name", "started", "fingerprint"} <= content.keys() else {}


def _unpack(packed: bytes) -> dict[str, Any] | None:
    """Return the content of a checkpoint file; None if the digest does not match or unpickling would run code."""
    digest, content = packed[:DIGEST_BYTES], packed[DIGEST_BYTES:]
    if hashlib.sha256(content).digest() != digest:
        return None
    try:
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)  # type: ignore[no-any-return]
    except Exception:  # torch raises several types, and advises to load the file as code
        return None


class Checkpoints:
    """The checkpoints of one training, in a folder that this process has locked."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        record = _read_record(folder / RECORD)
        self.name: str = record["name"]  # of the training; a resumed one keeps it
        self.started: float = record["started"]  # seconds since 1970
        self.fingerprint: dict[str, Any] = record["fingerprint"]
        self.last = time.monotonic()  # of the last save; at first, of the start
        self._is_warned = False

    def save(self, epoch: int, batch: int, content: dict[str, Any]) -> None:
        """Write a checkpoint to the disk, then remove all but the last KEPT_CHECKPOINTS.

        Create the folder again if it was deleted. Raises OSError if the disk is full or access is denied. Warn once on
        any other OSError, such as a file in place of the folder: the training continues without checkpoints.
        """
        buffer = io.BytesIO()
        torch.save(content, buffer)
        path = self.folder / f"epoch-{epoch:06}-batch-{batch:09}.pt"
        self.last = time.monotonic()
        try:
            if not (self.folder / RECORD).exists():
                _write_record(self.folder / RECORD, self.name, self.started, self.fingerprint)
            _write_durably(path, hashlib.sha256(buffer.getbuffer()).digest(), buffer.getbuffer())
        except OSError as error:
            if disk_fault(error):
                raise
            if not self._is_warned:
                print(f"{path}: not written, so a killed training cannot resume from here: {error}", file=sys.stderr)
            self._is_warned = True
        for old in self._files()[:-KEPT_CHECKPOINTS]:
            old.unlink(missing_ok=True)

    def load(self) -> dict[str, Any] | None:
        """Return the last undamaged checkpoint, its tensors on the CPU; None if there is none. Remove damaged ones."""
        for path in reversed(self._files()):
            if content := _unpack(path.read_bytes()):
                return content
            print(f"{path}: damaged checkpoint, removed; the one before it is used, if any", file=sys.stderr)
            path.unlink()
        return None

    def difference_from_abandoned(self) -> str | None:
        """Describe how the most recent abandoned training differs from this one; return None if there is none."""
        home = self.folder.parent
        with FileLock(home / ".lock"):
            for folder in sorted(home.glob("*/"), key=lambda folder: -folder.stat().st_mtime):
                theirs = _read_record(folder / RECORD).get("fingerprint")
                if folder != self.folder and theirs and (lock := _lock(folder)):
                    lock.release()
                    keys = [
                        key for key in {**theirs, **self.fingerprint} if theirs.get(key) != self.fingerprint.get(key)
                    ]
                    return ", ".join(f"{key} was {theirs.get(key)} and is {self.fingerprint.get(key)}" for key in keys)
        return None

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("epoch-*.pt"))


class NoCheckpoints(Checkpoints):
    """Save nothing. Of several processes, only the first has checkpoints."""

    def __init__(self) -> None:
        self.name, self.started, self.last = "", 0.0, math.inf

    def save(self, epoch: int, batch: int, content: dict[str, Any]) -> None:
        pass

    def load(self) -> None:
        pass

    def difference_from_abandoned(self) -> None:
        pass
