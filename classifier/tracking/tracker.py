"""What the stages tell MLflow of a model: written to a journal, and sent by a process beside the stage.

A trained model has one run: `train` opens it and tags it with the md5 of its weights, by which `evaluate` and `export`
find it again. No stage waits for MLflow while it works, or fails because of it: what cannot be told is left out, with a
warning.
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
SUPERSEDED_TAG = "superseded_by"  # of a run whose weights no dvc.lock has: the run that made them again
CHANGED_TAG = "git.changed_files"
LEFT_OUT_TAG = "git.left_out_files"  # what differs from the commit and is not in the patch
MOST_LEFT_OUT = 20  # files
EXPERIMENT_TAG = "dvc.exp_name"
TEST_SET_TAG = "md5.test_set"
OPENER_TAG = "opened_by"  # a training, by a name that it keeps when it goes on after it was killed, or a journal
PATCH = "code.patch"
LARGEST_PATCH = 10_000_000  # bytes

SENDER_NICENESS = 10  # below the stage: a thread of torch that waits for a core holds up all others
# How long a stage waits at its end for what is not sent yet
TRAINING_PATIENCE = 8  # seconds; a training has few and small things to send
UPLOAD_PATIENCE = 120  # pictures and models; a store that does not answer is given up long before
SIGNAL_PATIENCE = 1.5  # a signal is answered within five


def md5_tag(path: Path) -> str:
    """Return the tag that holds the md5 of an output: `md5.images` for data/images."""
    return f"md5.{path.stem}"


class Tracker:
    """The journal of this stage and the process that sends it.

    Whatever goes wrong here is a warning: the stage goes on, and MLflow does not get what could not be written.
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
        self.journal = Journal(home() / "none")  # to which nothing can be written
        with self._tolerated():
            self.journal = Journal.create()
            self._tell(os.fsencode(self.journal.folder) + b"\0")
        self._unused = weakref.finalize(self, _abandon, self.journal, self._sender)
        # As the stage has read them: while it works, they may be edited
        with self._tolerated():
            self._parameters = _spelt_parameters(parameters)
            # Without DVC's files; settings are no code
            self._code = code_patch(".", ":!dvc.lock", ":!metrics", ":!.dvc")

    @contextmanager
    def training(self, environment: Mapping[str, str | int], name: str, started: float) -> Iterator[None]:
        """Open a run for a training. It ends FINISHED; KILLED if a signal ends the block, FAILED if an error does.

        name, started: of the training, the same (and so the same run) when it is resumed after it was killed.
        """
        with self._run(name, self._tags(environment), TRAINING_PATIENCE, started=started):
            yield
            with self._tolerated():
                weights = hash_file(self._weights)
                # A training of the same weights that was killed before DVC took note of it has left a finished run
                is_new = self._md5s.get(str(self._weights)) != weights and not commits_holding(weights)
                self._write("tags", lambda _: {"tags": {WEIGHTS_TAG: weights}, "supersedes": is_new})

    @contextmanager
    def weights(self, environment: Mapping[str, str | int]) -> Iterator[None]:
        """Reopen the run that trained models/model_weights.pth, or have one if the store does not know the weights.

        Runs whose parameters make no difference have the same weights: that of this experiment's name comes first.
        """
        weights = hash_file(self._weights)
        tags = self._tags(environment) | {WEIGHTS_TAG: weights}
        with self._run(self.journal.folder.name, tags, UPLOAD_PATIENCE, weights=weights):
            yield

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Log numbers to the open run; those that it has for this step, from before it was killed, stay.

        The accuracy comes first: MLflow's comparison of runs opens on the metric that was logged first.
        """
        values = dict(sorted(metrics.items(), key=lambda item: "accuracy" not in item[0]))
        self._write("metrics", lambda _: {"values": values, "step": step})

    def tag(self, tags: Mapping[str, str]) -> None:
        """Set tags of the open run."""
        self._write("tags", lambda _: {"tags": dict(tags)})

    def log_files(self, path: Path) -> None:
        """Log a file, or the files of a folder, to the open run."""
        self._write("files", lambda journal: {"files": [[journal.keep(path), None]]})

    def log_evaluation(self, metrics: Path, files: Sequence[Path], test_set: str, *, if_missing: bool = False) -> None:
        """Log what `evaluate` has written, and the md5 of the images and labels that it tested on.

        metrics: JSON. files: also folders, which keep their name.
        if_missing: only if the run has no evaluation on these images, as where DVC had it in its run cache.
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
                    if path.exists()  # no stage after evaluate needs the pictures
                ],
                "tags": {TEST_SET_TAG: test_set},
                "if_missing": if_missing,
            }

        self._write("evaluation", content)

    def register(self, registered_model: str, onnx: Path, manifest: Path) -> None:
        """Make the exported network a new version of `registered_model`, see classifier/tracking/registry.py."""
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
        """Add a record to the journal; none without the first, which opens the run."""
        with self._tolerated():
            if self._has_run or kind == "run":
                self.journal.write(kind, **content(self.journal))
                self._has_run = True
                self._unused.detach()
                self._tell(b"\n")
        self._pass_on()

    @contextmanager
    def _tolerated(self) -> Iterator[None]:
        """Warn, once, of what goes wrong in the block."""
        try:
            yield
        except Exception as error:
            if not self._is_warned:
                reason = masked(" ".join(str(error).split()) or type(error).__name__)[:300]
                print(
                    f"MLflow will not have all of this run, whose results are not affected: {reason}\n"
                    f"Records for it are kept in {home()}, which needs to be writable and have room.",
                    file=sys.stderr,
                )
            self._is_warned = True

    def _tell(self, content: bytes) -> None:
        """First which journal the sender has, then that there is more in it."""
        assert self._sender.stdin is not None  # noqa: S101, for mypy
        with suppress(OSError):  # it has ended; what there is stays in the journal
            os.write(self._sender.stdin.fileno(), content)

    def _pass_on(self) -> None:
        """Print what the sender says: it may outlive this stage, whose standard error must then be closed."""
        assert self._sender.stderr is not None  # noqa: S101
        while said := self._sender.stderr.read(1 << 16):
            print(said.decode(errors="replace"), end="", file=sys.stderr, flush=True)

    def _end(self, status: str, patience: float) -> None:
        if not self._has_run:
            self._unused()  # there is nothing to send
            return
        self._write("end", lambda _: {"status": status})  # without it, the run is taken as killed
        assert self._sender.stdin is not None  # noqa: S101
        self._sender.stdin.close()
        try:
            sent = self._sender.wait(patience) == 0
        except subprocess.TimeoutExpired:
            sent = False
            if status == "FINISHED":  # else it goes on by itself: there may be no next stage
                self._sender.kill()
                self._sender.wait()
        self._pass_on()
        if not sent:
            print(
                f"MLflow does not have everything of this run yet; the rest is in {self.journal.folder} and is sent by "
                "the next stage, or by `classifier sync`.",
                file=sys.stderr,
            )


class SilentTracker(Tracker):
    """Logs nothing: of several processes, the first alone has a run."""

    def __init__(self) -> None:
        pass

    @contextmanager
    def training(self, *_: object) -> Iterator[None]:
        yield

    def _write(self, kind: str, content: Callable[[Journal], dict[str, Any]]) -> None:
        pass


_waiting: "list[subprocess.Popen[bytes]]" = []  # senders that no tracker has yet


def start_sender_early() -> None:
    """Start the sender of a stage that has its imports before it: the sender's take as long, on another core.

    While a training is under way they would take turns with its threads.
    """
    _waiting.append(_start_sender())


def _start_sender() -> "subprocess.Popen[bytes]":
    sender = subprocess.Popen(
        [sys.executable, "-m", "classifier.tracking.sender"],
        bufsize=0,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,  # out of reach of Ctrl-C: it ends by itself when this process has ended
    )
    with suppress(AttributeError, OSError):  # Windows has none; or it has ended already
        os.setpriority(os.PRIO_PROCESS, sender.pid, SENDER_NICENESS)
    assert sender.stderr is not None  # noqa: S101
    os.set_blocking(sender.stderr.fileno(), False)
    return sender


def _abandon(journal: Journal, sender: "subprocess.Popen[bytes]") -> None:
    """End the sender of a stage that failed before it had anything to tell."""
    sender.kill()
    sender.wait()
    with suppress(OSError):  # what is left of it is removed when it would be sent
        journal.remove()


def _run_name() -> str:
    """DVC's name of the experiment, or the commit: names that MLflow draws are no names when everything is seeded."""
    return os.environ.get("DVC_EXP_NAME") or f"repro {git('rev-parse', '--short', 'HEAD')}".strip()


def _user() -> str:
    """Who runs this; nothing where the system has no name for that, as in a container for a number of its own."""
    with suppress(KeyError, OSError):
        return getpass.getuser()
    return ""


def _spelt_parameters(parameters: Path) -> dict[str, str]:
    """Every parameter as params.yaml has it, passwords in addresses masked: 8 stays 8 where it is a float."""
    spelt = yaml.safe_load(parameters.read_text(encoding="utf-8"))
    return {key: masked(value if isinstance(value, str) else json.dumps(value)) for key, value in spelt.items()}
