"""Log a stage's results to MLflow through a journal, which a separate process sends.

A trained model has one run. `train` opens it and tags it with the md5 of the weights; `evaluate` and `export` find it
by that tag. A stage neither waits for MLflow while it works nor fails because of it: records that cannot be written
are dropped with a warning.
"""

import getpass
import json
import os
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from classifier.pipeline.errors import masked
from classifier.pipeline.outputs import hash_file, read_json
from classifier.pipeline.signals import Interrupted
from classifier.tracking.code_patch import CodePatch, code_patch
from classifier.tracking.git import commits_holding, git
from classifier.tracking.journal import Journal, home

WEIGHTS_TAG = "md5.model_weights"
COMMIT_TAG = "mlflow.source.git.commit"
SUPERSEDED_TAG = "superseded_by"  # on a run whose weights are in no dvc.lock: the run that trained them again
CHANGED_TAG = "git.changed_files"
LEFT_OUT_TAG = "git.left_out_files"  # changed files that are not in the patch
MOST_LEFT_OUT = 20  # files
EXPERIMENT_TAG = "dvc.exp_name"
TEST_SET_TAG = "md5.test_set"
OPENER_TAG = "opened_by"  # name of the training, the same when it is resumed; otherwise of the journal
PATCH = "code.patch"
LARGEST_PATCH = 10_000_000  # bytes

SENDER_NICENESS = 10  # lower priority than the stage: one torch thread that waits for a core delays all others
# Seconds that a stage waits at its end for unsent records
TRAINING_PATIENCE = 8  # few and small records
UPLOAD_PATIENCE = 120  # pictures and models; a store that does not answer is given up much earlier
SIGNAL_PATIENCE = 1.5  # an interrupted stage ends within five seconds


def md5_tag(path: Path) -> str:
    """Return the tag that holds the md5 of an output: `md5.images` for data/images."""
    return f"md5.{path.stem}"


class Tracker:
    """The journal of a stage and the process that sends it.

    An error is reported as a warning, and the record is dropped; the stage continues.
    """

    def __init__(
        self, experiment: str, md5s: Mapping[str, str], parameters: Path, data: Sequence[Path], weights: Path
    ) -> None:
        """Start recording.

        md5s: of all outputs by path, from dvc.lock. parameters: params.yaml. data: the outputs that are the data set.
        """
        self._experiment = experiment
        self._md5s = dict(md5s)
        self._parameters_file, self._weights = parameters, weights
        self._data = {path: md5s[str(path)] for path in data if str(path) in md5s}
        self._is_warned = self._has_run = False
        self._sender = _waiting.pop() if _waiting else _start_sender()
        self._parameters: dict[str, str] = {}
        self._code = CodePatch([], b"", {})
        self.journal = Journal(home() / "none")  # a placeholder: it does not exist, so nothing can be written to it
        with self._warn_once():
            self.journal = Journal.create()
            self._notify_sender(os.fsencode(self.journal.folder) + b"\0")
        self._unused = weakref.finalize(self, _abandon, self.journal, self._sender)
        # Read now: files may be edited while the stage runs
        with self._warn_once():
            self._parameters = _spelt_parameters(parameters)
            # Exclude DVC's files, results and settings
            self._code = code_patch(".", ":!dvc.lock", ":!metrics", ":!.dvc")

    @contextmanager
    def training(self, environment: Mapping[str, str | int], name: str, started: float) -> Iterator[None]:
        """Open a run for a training. It ends as FINISHED, as KILLED after a signal, as FAILED after an error.

        name: identifies the training. A resumed training has the same name and continues the same run.
        started: start of the training in seconds since 1970, the same when it is resumed.
        """
        with self._run(name, self._tags(environment), TRAINING_PATIENCE, started=started):
            yield
            with self._warn_once():
                weights = hash_file(self._weights)
                # A training killed after its run had finished, but before DVC wrote dvc.lock, is repeated.
                is_new = self._md5s.get(str(self._weights)) != weights and not commits_holding(weights)
                self._write("tags", lambda _: {"tags": {WEIGHTS_TAG: weights}, "supersedes": is_new})

    @contextmanager
    def weights(self, environment: Mapping[str, str | int]) -> Iterator[None]:
        """Reopen the run that trained models/model_weights.pth, or open one if the store has none.

        If several runs have these weights, because a parameter made no difference, the one with the name of this DVC
        experiment is preferred.
        """
        weights = hash_file(self._weights)
        tags = self._tags(environment) | {WEIGHTS_TAG: weights}
        with self._run(self.journal.folder.name, tags, UPLOAD_PATIENCE, weights=weights):
            yield

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Log metrics to the open run. Values that the run already has for this step are kept.

        Accuracies are logged first: MLflow's comparison of runs shows the metric that was logged first.
        """
        values = dict(sorted(metrics.items(), key=lambda item: "accuracy" not in item[0]))
        self._write("metrics", lambda _: {"values": values, "step": step})

    def tag(self, tags: Mapping[str, str]) -> None:
        """Set tags of the open run."""
        self._write("tags", lambda _: {"tags": dict(tags)})

    def log_files(self, path: Path) -> None:
        """Log a file or the files of a folder to the open run."""
        self._write("files", lambda journal: {"files": [[journal.keep(path), None]]})

    def log_evaluation(self, metrics: Path, files: Sequence[Path], test_set: str, *, if_missing: bool = False) -> None:
        """Log the outputs of `evaluate`.

        metrics: JSON. files: also folders, which keep their name. test_set: md5 of the test images and labels.
        if_missing: log only if the run has no evaluation on these images, which happens when DVC restores the outputs
            of `evaluate` from its run cache.
        """
        test = read_json(metrics)
        low, high = test["accuracy_ci95"]

        def content(journal: Journal) -> dict[str, Any]:
            return {
                "values": {f"test_{name}": value for name, value in test.items() if name != "accuracy_ci95"}
                | {"test_accuracy_ci95_low": low, "test_accuracy_ci95_high": high},
                "files": [
                    [journal.keep(path), path.name if path.is_dir() else None]
                    for path in files
                    if path.exists()  # `export` runs without the pictures
                ],
                "tags": {TEST_SET_TAG: test_set},
                "if_missing": if_missing,
            }

        self._write("evaluation", content)

    def register(self, registered_model: str, onnx: Path, manifest: Path) -> None:
        """Register the exported network as a new version of `registered_model`, see classifier/tracking/registry.py."""
        self._write(
            "model",
            lambda journal: {
                "name": registered_model,
                "onnx": journal.keep(onnx),
                "manifest": journal.keep(manifest),
            },
        )

    @contextmanager
    def _run(
        self,
        opener: str,
        tags: dict[str, str],
        patience: float,
        *,
        weights: str | None = None,
        started: float | None = None,
    ) -> Iterator[None]:
        if code := [name for name in self._code.names if name != str(self._parameters_file)]:
            tags = tags | {CHANGED_TAG: " ".join(code)}
        if left_out := [f"{name}: {reason}" for name, reason in self._code.left_out.items()]:
            more = [f"and {len(left_out) - MOST_LEFT_OUT} more"] * (len(left_out) > MOST_LEFT_OUT)
            tags = tags | {LEFT_OUT_TAG: "\n".join(left_out[:MOST_LEFT_OUT] + more)}

        def content(journal: Journal) -> dict[str, Any]:
            patch = self._code.patch
            return {
                "store": masked(os.environ.get("MLFLOW_TRACKING_URI", "")),
                "experiment": os.environ.get("MLFLOW_EXPERIMENT_NAME") or self._experiment,
                "name": _run_name(),
                "opener": opener,
                "weights": weights,
                "tags": tags | {OPENER_TAG: opener},
                "parameters": self._parameters,
                "datasets": [
                    {"name": f"{self._parameters.get('source')}: {path}", "path": str(path), "md5": md5}
                    for path, md5 in self._data.items()
                ],
                "patch": journal.keep_bytes(PATCH, patch) if 0 < len(patch) <= LARGEST_PATCH else None,
                "started": started,
            }

        self._write("run", content)
        try:
            yield
        except Interrupted:
            self._end("KILLED", SIGNAL_PATIENCE)
            raise
        except BaseException:
            self._end("FAILED", patience)
            raise
        self._end("FINISHED", patience)

    def _tags(self, environment: Mapping[str, str | int]) -> dict[str, str]:
        tags = {
            "mlflow.user": _user(),
            "mlflow.source.name": "dvc repro",
            "mlflow.source.type": "LOCAL",
            COMMIT_TAG: git("rev-parse", "HEAD"),
            EXPERIMENT_TAG: os.environ.get("DVC_EXP_NAME", ""),
            "dvc.baseline_rev": os.environ.get("DVC_EXP_BASELINE_REV", ""),
        } | {md5_tag(path): md5 for path, md5 in self._data.items()}
        return {key: value for key, value in tags.items() if value} | {
            key: str(value) for key, value in environment.items()
        }

    def _write(self, kind: str, content: Callable[[Journal], dict[str, Any]]) -> None:
        """Add a record to the journal, unless the first record, which opens the run, could not be written."""
        with self._warn_once():
            if self._has_run or kind == "run":
                self.journal.write(kind, **content(self.journal))
                self._has_run = True
                self._unused.detach()
                self._notify_sender(b"\n")
        self._forward_messages()

    @contextmanager
    def _warn_once(self) -> Iterator[None]:
        """Turn the first error into a warning and suppress later ones."""
        try:
            yield
        except Exception as error:
            if not self._is_warned:
                reason = masked(" ".join(str(error).split()) or type(error).__name__)[:300]
                print(
                    f"MLflow will not have all records of this run; its results are not affected: {reason}\n"
                    f"Records are kept in {home()}: make the folder writable and free disk space.",
                    file=sys.stderr,
                )
            self._is_warned = True

    def _notify_sender(self, content: bytes) -> None:
        """Write to the sender: first the path of the journal and a zero byte, then a byte for each new record."""
        assert self._sender.stdin is not None  # noqa: S101, for mypy
        with suppress(OSError):  # the sender has ended; the records stay in the journal
            os.write(self._sender.stdin.fileno(), content)

    def _forward_messages(self) -> None:
        """Print the sender's messages. It cannot share standard error, which it would keep open after the stage."""
        assert self._sender.stderr is not None  # noqa: S101
        while messages := self._sender.stderr.read(1 << 16):
            print(messages.decode(errors="replace"), end="", file=sys.stderr, flush=True)

    def _end(self, status: str, patience: float) -> None:
        if not self._has_run:
            self._unused()
            return
        self._write("end", lambda _: {"status": status})  # a journal without this record counts as killed
        assert self._sender.stdin is not None  # noqa: S101
        self._sender.stdin.close()
        try:
            sent = self._sender.wait(patience) == 0
        except subprocess.TimeoutExpired:
            sent = False
            if status == "FINISHED":  # otherwise it continues alone: there may be no next stage
                self._sender.kill()
                self._sender.wait()
        self._forward_messages()
        if not sent:
            print(
                "MLflow does not have all records of this run yet; "
                f"the rest is in {self.journal.folder} and is sent by the next stage, or by `classifier sync`.",
                file=sys.stderr,
            )


class SilentTracker(Tracker):
    """Log nothing: in distributed training, only the first process logs."""

    def __init__(self) -> None:
        pass

    @contextmanager
    def training(self, *_: object) -> Iterator[None]:
        yield

    def _write(self, kind: str, content: Callable[[Journal], dict[str, Any]]) -> None:
        pass


_waiting: "list[subprocess.Popen[bytes]]" = []  # senders that no tracker uses yet


def start_sender_early() -> None:
    """Start the sender before the stage imports its libraries: both import for seconds, on different cores.

    Later, the sender's imports would compete with the threads of the training.
    """
    _waiting.append(_start_sender())


def _start_sender() -> "subprocess.Popen[bytes]":
    sender = subprocess.Popen(
        [sys.executable, "-m", "classifier.tracking.sender"],
        bufsize=0,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C does not reach it; it exits after this process
    )
    with suppress(AttributeError, OSError):  # no setpriority on Windows; the sender may have ended
        os.setpriority(os.PRIO_PROCESS, sender.pid, SENDER_NICENESS)
    assert sender.stderr is not None  # noqa: S101
    os.set_blocking(sender.stderr.fileno(), False)
    return sender


def _abandon(journal: Journal, sender: "subprocess.Popen[bytes]") -> None:
    """End the sender of a stage that failed before it wrote a record."""
    sender.kill()
    sender.wait()
    with suppress(OSError):  # the next sender removes an empty journal
        journal.remove()


def _run_name() -> str:
    """Return DVC's experiment name or the commit: MLflow's random names repeat where the generators are seeded."""
    return os.environ.get("DVC_EXP_NAME") or f"repro {git('rev-parse', '--short', 'HEAD')}".strip()


def _user() -> str:
    """Return the user name; empty if the system has none, as in a container with an arbitrary user id."""
    with suppress(KeyError, OSError):
        return getpass.getuser()
    return ""


def _spelt_parameters(parameters: Path) -> dict[str, str]:
    """Return all parameters as written in params.yaml, with masked passwords: 8 is not converted to 8.0."""
    spelt = yaml.safe_load(parameters.read_text(encoding="utf-8"))
    return {key: masked(value if isinstance(value, str) else json.dumps(value)) for key, value in spelt.items()}
