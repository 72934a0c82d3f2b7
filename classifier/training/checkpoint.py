"""Checkpoints of a training that has not ended: what a killed one goes on from, to the same bytes.

They are in .checkpoints/ of the main checkout, a folder for each training, known by all that decides its result: other
data, code, parameters or machines never go on from them. They go when the training has written its outputs.
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
CHECKPOINT_SECONDS = 60  # between two at most, however long the updates between them take
LONGEST_STEP = 3  # seconds that a signal waits for the next place to stop at
KEPT = 2  # of a training: the last, and the one before in case the last is damaged
KEPT_TRAININGS = 8  # that were given up
DIGEST_BYTES = 32  # SHA-256, before the content
# A training that is being ended takes up to five seconds, and its decoding processes as long to notice.
PATIENCE_SECONDS = 12


def stage_fingerprint(
    pipeline: Path, stage: str, md5s: Mapping[str, str], values: Mapping[str, Any], environment: Mapping[str, Any]
) -> dict[str, Any]:
    """Return all that decides a stage's result, by name: its deps and params in dvc.yaml, and the environment.

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
    """The checkpoints of the training with this fingerprint, for this process alone; they go if the block succeeds.

    If a process has them already, it is waited for as long as one takes to end; then there is a second set.
    """
    home = repository_root() / FOLDER
    home.mkdir(exist_ok=True)
    told, give_up = False, time.monotonic() + PATIENCE_SECONDS
    while not (claimed := _claim(home, fingerprint, time.monotonic() > give_up)):
        if not told:
            print("The same training is under way in another process: waiting a moment for that to end", flush=True)
            told = True
        time.sleep(0.2)
    folder, lock = claimed
    try:
        yield Checkpoints(folder)
        with suppress(OSError), FileLock(home / ".lock"):  # it may be gone already
            shutil.rmtree(folder, ignore_errors=True)
            Path(lock.lock_file).unlink(missing_ok=True)
    finally:
        lock.release()


@contextmanager
def resume(
    state: TrainState, group: Group, saved: "Checkpoints", *, every: int, last: int
) -> Iterator[Callable[[], None]]:
    """Resume this training where it was killed, if it was; give a function to call after each update.

    It saves a checkpoint after batches `every`, twice `every` and so on of an epoch and after its `last`, and when
    CHECKPOINT_SECONDS have passed; and one when a signal has arrived, which then ends the block.
    """
    content = group.from_first(saved.load)
    if content:
        state.load_state_dict(content | {"random": content["random"][group.rank]})
        print(f"Going on in epoch {state.epoch + 1} after batch {state.batch}", flush=True)
    elif other := saved.given_up():
        print(f"Starting anew, not from the checkpoint of a training that was given up: {other}", flush=True)

    with defer_signals(LONGEST_STEP) as held:

        def after_update() -> None:
            is_due = state.batch % every == 0 or state.batch == last
            is_late = time.monotonic() - saved.last > CHECKPOINT_SECONDS
            if group.any(is_due or is_late or held.number is not None):
                content = state.state_dict()
                content["random"] = group.gather(content["random"])  # each draws its own numbers, as for dropout
                saved.save(state.epoch, state.batch, content)
                held.release()

        yield after_update


def _claim(home: Path, fingerprint: Mapping[str, Any], another: bool) -> tuple[Path, FileLock] | None:
    """Lock one of a training's folders; if all are taken, make another if that is asked for."""
    key = hash_bytes(json.dumps(fingerprint, sort_keys=True).encode())
    with FileLock(home / ".lock"):
        folders = sorted(home.glob(f"{key}-*/")) or [home / f"{key}-1"]
        if another:
            folders.append(next(path for n in range(1, 1000) if not (path := home / f"{key}-{n}").exists()))
        for folder in folders:
            if lock := _lock(folder):
                folder.mkdir(exist_ok=True)
                _ensure_record(folder, fingerprint)
                _give_up_old(home)
                return folder, lock
    return None


def _ensure_record(folder: Path, fingerprint: Mapping[str, Any]) -> None:
    """Write the folder's training.json if it is missing or damaged."""
    record = folder / RECORD
    if not _read(record):
        if any(folder.iterdir()):
            print(f"{record}: damaged; the training goes on all the same, in another run of MLflow", file=sys.stderr)
        _write_record(record, uuid4().hex, time.time(), fingerprint)


def _write_record(record: Path, name: str, started: float, fingerprint: Mapping[str, Any]) -> None:
    content = {"name": name, "started": started, "fingerprint": dict(fingerprint)}
    _write_durably(record, json.dumps(content, indent=2).encode())


def _write_durably(path: Path, *parts: bytes | memoryview) -> None:
    """Write a file, atomically, and wait until it is on the disk."""
    with atomic(path) as temporary, temporary.open("wb") as file:
        file.writelines(parts)
        file.flush()
        os.fsync(file.fileno())


def _lock(folder: Path) -> FileLock | None:
    lock = FileLock(folder.with_name(f".{folder.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return None
    return lock


def _give_up_old(home: Path) -> None:
    """Remove the oldest of the trainings that nobody works on, all but KEPT_TRAININGS."""
    for folder in sorted(home.glob("*/"), key=lambda folder: -folder.stat().st_mtime)[KEPT_TRAININGS:]:
        if lock := _lock(folder):
            print(f"removed the checkpoints of a training that was given up: {folder}")
            shutil.rmtree(folder)
            Path(lock.lock_file).unlink()
            lock.release()


def _read(record: Path) -> dict[str, Any]:
    """What a folder says of its training; nothing if that is missing or damaged."""
    try:
        content = json.loads(record.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) and {"name", "started", "fingerprint"} <= content.keys() else {}


def _unpacked(packed: bytes) -> dict[str, Any] | None:
    """What a checkpoint holds; None if that is not what was saved, or is code."""
    digest, content = packed[:DIGEST_BYTES], packed[DIGEST_BYTES:]
    if hashlib.sha256(content).digest() != digest:
        return None
    try:
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)  # type: ignore[no-any-return]
    except Exception:  # of many kinds; their text is the advice to load the file as code
        return None


class Checkpoints:
    """The checkpoints of one training, in a folder that this process has locked."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        record = _read(folder / RECORD)
        self.name: str = record["name"]  # of the training, which it keeps when it goes on
        self.started: float = record["started"]  # seconds since 1970
        self.fingerprint: dict[str, Any] = record["fingerprint"]
        self.last = time.monotonic()  # when the last one was saved, or none yet
        self._is_warned = False

    def save(self, epoch: int, batch: int, content: dict[str, Any]) -> None:
        """Write a checkpoint to disk, and then remove all but the last KEPT.

        If its folder was removed, it is made again. Raises OSError if there is no room or no access; where another
        error prevents it, as a file in place of the folder, the training goes on without, with a warning.
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
                print(f"{path}: not written, so a killed training would not go on from here: {error}", file=sys.stderr)
            self._is_warned = True
        for old in self._files()[:-KEPT]:
            old.unlink(missing_ok=True)

    def load(self) -> dict[str, Any] | None:
        """The last checkpoint that is whole, with its tensors on the CPU; None if there is none."""
        for path in reversed(self._files()):
            if content := _unpacked(path.read_bytes()):
                return content
            print(f"{path}: damaged, so it is passed over for the checkpoint before it, if any", file=sys.stderr)
            path.unlink()
        return None

    def given_up(self) -> str | None:
        """How the most recent abandoned training differs from this one; None if there is none."""
        home = self.folder.parent
        with FileLock(home / ".lock"):
            for folder in sorted(home.glob("*/"), key=lambda folder: -folder.stat().st_mtime):
                theirs = _read(folder / RECORD).get("fingerprint")
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
    """Saves nothing: of several processes, the first alone has checkpoints."""

    def __init__(self) -> None:
        self.name, self.started, self.last = "", 0.0, math.inf

    def save(self, epoch: int, batch: int, content: dict[str, Any]) -> None:
        pass

    def load(self) -> None:
        pass

    def given_up(self) -> None:
        pass
