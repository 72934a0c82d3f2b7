"""Whatever becomes of the tracker, a training is not delayed by it, and all it has to tell arrives, once."""

import itertools
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import pytest
from dvc_queue import processes_in
from filelock import FileLock
from imports import ROOT
from mlflow import MlflowClient
from project import Project, clean_environment, python, small_project
from test_tracking_faults import track, write_outputs
from tracker import (
    Server,
    contents,
    dripping_server,
    finish,
    impostor,
    paced,
    query,
    silent_server,
    stage_tracker,
    statuses,
    steps,
    steps_waiting,
    tell,
    wait_for,
    waiting,
    without_sender,
)

from classifier.pipeline.outputs import hash_file
from classifier.pipeline.params import load_params
from classifier.tracking import sender as sync
from classifier.tracking import store
from classifier.tracking.journal import Journal, home, journals
from classifier.tracking.sender import Sender, send_to_every_store

pytestmark = pytest.mark.slow

RESULTS = ("models/model_weights.pth", "metrics/train.json", "metrics/epochs.csv")
# Seconds that a tracker may hold up a stage: it takes six, on a machine that has nothing else to do. MLflow's own
# client would take minutes.
DELAY = 90


# ---------------------------------------------------------------------------------------------------------------------
# In this process: what is sent, and how often


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database without runs, to be copied: making one takes seconds."""
    folder = tmp_path_factory.mktemp("empty")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DVC_ROOT", str(folder))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        store.connect("fashion-mnist")
    return folder / "mlflow.db"


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty_store: Path) -> Path:
    """A folder that is the repository of this test, with a store of its own, in which nothing is sent by itself."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models/model_weights.pth").write_text("weights")
    shutil.copy(ROOT / "params.yaml", tmp_path)
    shutil.copy(empty_store, tmp_path)
    monkeypatch.chdir(tmp_path)
    for variable in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "DVC_EXP_NAME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    without_sender(monkeypatch)
    return tmp_path


def train(epochs: range = range(1, 4), name: str | None = None, experiment: str = "fashion-mnist") -> Journal:
    """A training that tells these epochs; its journal."""
    tracker = stage_tracker(experiment)
    with tracker.training({"device": "cpu"}, name or uuid4().hex, time.time()):
        for epoch in epochs:
            tracker.log_metrics({"loss": 1 / epoch}, epoch)
        tracker.log_files(Path("params.yaml"))
    return tracker.journal


def killed(journal: Journal, records: int) -> Journal:
    """As if the process had been killed when it had written so many records of this journal."""
    lines = (journal.folder / "records.jsonl").read_bytes().splitlines(keepends=True)
    (journal.folder / "records.jsonl").write_bytes(b"".join(lines[: 2 * records]))
    journal._lock.release()
    return journal


def test_a_record_that_has_arrived_but_was_not_noted_so_is_not_there_twice(repository: Path) -> None:
    journal = train()
    shutil.copytree(journal.folder, repository / "copy")
    assert Sender().send_all() == {}
    before = contents(repository / "mlflow.db", repository / "mlruns")
    for noted in range(len(Journal(repository / "copy").records()) + 1):
        shutil.copytree(repository / "copy", journal.folder)
        Journal(journal.folder).sent = noted
        assert Sender().send_all() == {}
        assert contents(repository / "mlflow.db", repository / "mlruns") == before
    assert before["metrics"]


def test_senders_that_take_turns_at_one_journal_send_all_once(repository: Path) -> None:
    tracker, senders = stage_tracker(), [Sender(), Sender()]
    with tracker.training({"device": "cpu"}, uuid4().hex, time.time()):
        for epoch in range(1, 13):
            tracker.log_metrics({"loss": 1 / epoch}, epoch)
            assert senders[epoch // 2 % 2].send_all() == {}
    assert senders[0].send_all() == {}
    assert senders[1].send_all() == {}
    assert steps(repository / "mlflow.db", "loss") == list(range(1, 13))
    assert statuses(repository / "mlflow.db") == ["FINISHED"]


def test_a_killed_training_that_goes_on_has_one_run_and_each_step_once(repository: Path) -> None:
    killed(train(range(1, 5), name="one"), records=5)
    train(range(3, 8), name="one")
    assert Sender().send_all() == {}
    assert steps(repository / "mlflow.db", "loss") == list(range(1, 8))
    assert statuses(repository / "mlflow.db") == ["FINISHED"]


def test_the_journal_of_a_killed_process_ends_its_run_and_goes(repository: Path) -> None:
    journal = killed(train(), records=3)
    assert Sender().send_all() == {}
    assert statuses(repository / "mlflow.db") == ["KILLED"]
    assert steps(repository / "mlflow.db", "loss") == [1, 2]
    assert not journal.folder.exists()


def test_a_journal_without_a_record_goes_with_its_process_and_not_before(repository: Path) -> None:
    journal = Journal.create()
    Sender().send_all()
    assert journals()
    journal._lock.release()
    Sender().send_all()
    assert not journals()


def test_a_measurement_that_comes_after_the_end_does_not_make_a_run_killed(repository: Path) -> None:
    journal = train()
    journal.write("metrics", values={"system/cpu_utilization_percentage": 1.0}, step=9)
    assert Sender().send_all() == {}
    assert statuses(repository / "mlflow.db") == ["FINISHED"]


def test_the_journal_of_a_killed_training_that_arrives_late_leaves_the_run_as_it_has_ended(repository: Path) -> None:
    first = killed(train(range(1, 3), name="one"), records=3)
    late = first.folder.rename(repository / "late")
    train(range(3, 5), name="one")
    assert Sender().send_all() == {}
    ended = query(repository / "mlflow.db", "SELECT status, end_time FROM runs")
    late.rename(first.folder)
    assert Sender().send_all() == {}
    assert query(repository / "mlflow.db", "SELECT status, end_time FROM runs") == ended
    assert ended[0][0] == "FINISHED"
    assert steps(repository / "mlflow.db", "loss") == [1, 2, 3, 4]
    assert not journals()


def test_a_deleted_experiment_is_told_and_other_journals_are_sent(repository: Path) -> None:
    client = MlflowClient(f"sqlite:///{repository / 'mlflow.db'}")
    deleted = client.create_experiment("deleted")
    client.delete_experiment(deleted)
    first = train(experiment="deleted")
    train()
    (folder, fault), *others = Sender().send_all().items()
    assert others == []
    assert folder == first.folder
    assert str(fault) == "experiment: 'deleted' is deleted in MLflow; restore it or name another"
    assert statuses(repository / "mlflow.db") == ["FINISHED"]
    client.restore_experiment(deleted)
    assert Sender().send_all() == {}
    assert steps(repository / "mlflow.db", "loss", "deleted") == [1, 2, 3]


def test_a_deleted_run_is_told_and_when_it_is_restored_the_rest_is_sent(repository: Path) -> None:
    sender, tracker = Sender(), stage_tracker()
    client = MlflowClient(f"sqlite:///{repository / 'mlflow.db'}")
    with tracker.training({"device": "cpu"}, uuid4().hex, time.time()):
        tracker.log_metrics({"loss": 1}, 1)
        assert sender.send_all() == {}
        ((run_id,),) = query(repository / "mlflow.db", "SELECT run_uuid FROM runs")
        client.delete_run(run_id)
        tracker.log_metrics({"loss": 0.5}, 2)
        assert list(sender.send_all()) == [tracker.journal.folder]
    train(range(7, 8))
    (fault,) = sender.send_all().values()
    assert str(fault) == (
        f"run {run_id} is deleted in MLflow; restore it, or delete {tracker.journal.folder} to drop its records"
    )
    assert steps(repository / "mlflow.db", "loss") == [1, 7]
    client.restore_run(run_id)
    assert sender.send_all() == {}
    assert steps(repository / "mlflow.db", "loss") == [1, 2, 7]
    assert statuses(repository / "mlflow.db") == ["FINISHED"] * 2


def test_a_store_that_was_made_anew_gets_a_half_sent_journal_from_its_start(repository: Path) -> None:
    tracker = stage_tracker()
    with tracker.training({"device": "cpu"}, uuid4().hex, time.time()):
        tracker.log_metrics({"loss": 1}, 1)
        assert Sender().send_all() == {}
        MlflowClient(f"sqlite:///{repository / 'mlflow.db'}")  # no other connection to it is of use
        with closing(sqlite3.connect(repository / "mlflow.db")) as database, database:
            for table in ("metrics", "latest_metrics", "params", "tags", "runs"):
                database.execute(f"DELETE FROM {table}")  # noqa: S608
        tracker.log_metrics({"loss": 0.5}, 2)
    assert Sender().send_all() == {}
    assert steps(repository / "mlflow.db", "loss") == [1, 2]
    assert query(repository / "mlflow.db", "SELECT value FROM params WHERE key = 'lr'") == [("0.001",)]


def test_what_an_artifact_store_raises_is_told_and_other_journals_are_sent(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train()
    train(range(7, 8))
    log = MlflowClient.log_artifact
    called = itertools.count()

    def refuse_once(*arguments: Any) -> None:
        if next(called) == 0:
            raise ValueError("http://me:secret@bucket: access denied")
        log(*arguments)

    monkeypatch.setattr(MlflowClient, "log_artifact", refuse_once)
    (fault,) = Sender().send_all().values()
    assert str(fault) == "ValueError: http://***@bucket: access denied"
    assert steps(repository / "mlflow.db", "loss") == [1, 2, 3, 7]
    assert sorted(statuses(repository / "mlflow.db")) == ["FINISHED", "RUNNING"]
    assert Sender().send_all() == {}
    assert statuses(repository / "mlflow.db") == ["FINISHED"] * 2


def test_a_process_that_sends_and_does_not_end_is_not_waited_for(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sync, "TURN_SECONDS", 0.2)
    journal = train()
    with FileLock(home() / ".lock"):
        faults = Sender().send_all()
    assert {folder: str(fault) for folder, fault in faults.items()} == {
        journal.folder: "another process is still sending after 0.2 seconds; try again later"
    }
    assert Sender().send_all() == {}


def test_each_journal_goes_to_the_store_that_it_was_written_for(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy("mlflow.db", "other.db")
    with monkeypatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{repository / 'other.db'}")
        other = train(range(1, 3))
    train(range(5, 8))
    assert Sender().send_all() == {}
    assert [journal.folder for journal in journals()] == [other.folder]  # a stage sends to its own store only
    assert send_to_every_store() == {}
    assert steps(repository / "mlflow.db", "loss") == [5, 6, 7]
    assert steps(repository / "other.db", "loss") == [1, 2]


def test_for_a_store_with_a_password_the_variable_to_set_is_named(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@127.0.0.1:9/mlflow")
        journal = train()
    train(range(7, 8))
    ((folder, fault),) = send_to_every_store().items()
    assert folder == journal.folder
    assert str(fault) == (
        "set MLFLOW_TRACKING_URI to http://***@127.0.0.1:9/mlflow, with name and password in place of ***"
    )
    assert steps(repository / "mlflow.db", "loss") == [7]


def test_figures_of_an_evaluation_are_logged_once_also_if_it_was_killed(repository: Path) -> None:
    write_outputs(repository)
    for accuracy, expected in ((0.5, [0.5]), (0.5, [0.5]), (0.75, [0.5, 0.75]), (0.5, [0.5, 0.75, 0.5])):
        (repository / "metrics/test.json").write_text(json.dumps({"accuracy": accuracy, "accuracy_ci95": [0.4, 0.8]}))
        killed(track(), records=2)
        assert send_to_every_store() == {}
        (run,) = store.find_runs()
        history = MlflowClient().get_metric_history(run.run_id, "test_accuracy")
        assert [metric.value for metric in sorted(history, key=lambda metric: metric.timestamp)] == expected
        assert len(MlflowClient().get_metric_history(run.run_id, "test_accuracy_ci95_low")) == 1


@pytest.mark.parametrize("known", [False, True])
def test_a_run_whose_weights_no_lock_has_is_marked_when_they_are_made_again(repository: Path, known: bool) -> None:
    for _ in range(2):
        train(name=uuid4().hex)
        if known:
            md5 = hash_file(Path("models/model_weights.pth"))
            out = {"path": "models/model_weights.pth", "md5": md5}
            Path("dvc.lock").write_text(json.dumps({"stages": {"train": {"outs": [out]}}}))
    assert send_to_every_store() == {}
    second, first = store.find_runs()
    assert "superseded_by" not in second.tags
    assert first.tags.get("superseded_by") == (None if known else second.run_id)


# ---------------------------------------------------------------------------------------------------------------------
# In processes of their own


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project with annotated images, in which nothing is trained yet. Tests work on copies."""
    project = small_project(tmp_path_factory.mktemp("prepared"), export_formats="[onnx]")
    project.dvc("repro", "annotate")
    return project


@pytest.fixture
def project(prepared: Project, tmp_path: Path, empty_store: Path) -> Project:
    copy = prepared.copy(tmp_path / "project")
    shutil.copy(empty_store, copy.root)
    return copy


class Stage(NamedTuple):
    seconds: float
    complaint: str
    results: dict[str, bytes]


def run_stage(project: Project, name: str, **env: str) -> Stage:
    start = time.monotonic()
    done = project.run(sys.executable, "-m", "stages", name, check=True, **env)
    seconds = time.monotonic() - start
    print(f"{name} {env}: {seconds:.1f} s\n{done.stderr}")
    results = {name: (project.root / name).read_bytes() for name in RESULTS}
    return Stage(seconds, done.stderr, results)


def classifier(project: Project, *arguments: str, check: bool = True, **env: str) -> "subprocess.CompletedProcess[str]":
    return project.run(sys.executable, "-m", "classifier", *arguments, check=check, **env)


@pytest.fixture(scope="module")
def healthy(prepared: Project, tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Stage:
    """The training with a store that takes everything."""
    project = prepared.copy(tmp_path_factory.mktemp("healthy") / "project")
    shutil.copy(empty_store, project.root)
    trained = run_stage(project, "train")
    assert trained.complaint == ""
    assert waiting(project) == []
    assert steps(project.root / "mlflow.db", "val_loss") == [1, 2, 3, 4]
    assert statuses(project.root / "mlflow.db") == ["FINISHED"]
    return trained


def check_undisturbed(project: Project, trained: Stage, healthy: Stage) -> None:
    """Check that a training came to the same results in time, and has said where all it had to tell is."""
    assert trained.results == healthy.results
    assert trained.seconds < healthy.seconds + DELAY
    (folder,) = waiting(project)
    assert f"the rest is in {folder} and is sent by the next stage, or by `classifier sync`" in trained.complaint
    assert "Traceback" not in trained.complaint
    assert steps_waiting(project, "val_loss") == [1, 2, 3, 4]


def test_a_server_that_never_answers_does_not_delay_a_training(project: Project, healthy: Stage) -> None:
    with silent_server() as address:
        check_undisturbed(project, run_stage(project, "train", MLFLOW_TRACKING_URI=address), healthy)


def test_who_reads_what_a_stage_says_waits_for_the_stage_alone(project: Project) -> None:
    """After a signal the process that sends outlives the stage, but not on its standard error."""
    with silent_server() as address, paced(project, MLFLOW_TRACKING_URI=address) as process:
        start = time.monotonic()
        process.terminate()
        _, complaint = process.communicate(timeout=120)
        assert time.monotonic() - start < 5 or processes_in(project.root)  # on a busy machine: the one that sends
    assert process.returncode == 143
    assert complaint.endswith("interrupted\n")
    assert "the rest is in" in complaint


def train_beside(project: Project, address: str) -> None:
    """Check that a training beside a store that takes nothing ends in time, and keeps all that it has to tell."""
    with paced(project, MLFLOW_TRACKING_URI=address) as process:
        start = time.monotonic()
        complaint = finish(process)
        assert time.monotonic() - start < DELAY
    assert process.returncode == 0
    assert steps_waiting(project, "val_loss") == [1, 2, 3, 4, 5]
    assert "Traceback" not in complaint
    assert "the rest is in" in complaint


@pytest.mark.parametrize(
    ("status", "body"),
    [(500, b"out of order"), (200, b"<html><body>Welcome to nginx!</body></html>"), (401, b"who are you?")],
    ids=["error", "another site", "no access"],
)
def test_a_server_that_is_no_tracker_does_not_delay_a_training(project: Project, status: int, body: bytes) -> None:
    with impostor(status, body) as address:
        train_beside(project, address)
        done = classifier(project, "sync", check=False, MLFLOW_TRACKING_URI=address)
        assert done.returncode == 1
        assert f"not sent: the MLflow store {address} cannot be used: " in done.stderr
        assert "Traceback" not in done.stderr
        assert len(waiting(project)) == 1


def test_a_locked_store_does_not_delay_a_training_and_gets_all_later(project: Project, healthy: Stage) -> None:
    with closing(sqlite3.connect(project.root / "mlflow.db", isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        check_undisturbed(project, run_stage(project, "train"), healthy)
    assert steps(project.root / "mlflow.db", "val_loss") == []
    assert classifier(project, "sync").stdout == "1 journals were waiting; nothing is left to send\n"
    assert steps(project.root / "mlflow.db", "val_loss") == [1, 2, 3, 4]
    assert statuses(project.root / "mlflow.db") == ["FINISHED"]


@pytest.mark.parametrize(
    ("address", "advice"), [("sqlite:///team.db", "or unset MLFLOW_TRACKING_URI to"), ("", "Another program may have")]
)
def test_the_way_on_from_a_locked_store_is_told_by_whose_it_is(
    monkeypatch: pytest.MonkeyPatch, address: str, advice: str
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    with pytest.raises(store.StoreAway, match=advice), store.store_errors():
        raise sqlite3.OperationalError("database is locked")


def test_a_store_that_is_locked_in_the_middle_gets_all_by_the_same_process_when_it_is_free(project: Project) -> None:
    database = project.root / "mlflow.db"
    with paced(project) as process:
        wait_for(lambda: steps(database, "val_loss") == [1, 2, 3, 4, 5])
        with closing(sqlite3.connect(database, isolation_level=None)) as other:
            other.execute("BEGIN EXCLUSIVE")
            tell(process, "more")
            time.sleep(3)
        wait_for(lambda: len(steps(database, "val_loss")) == 10)
        finish(process)
    assert process.returncode == 0
    wait_for(lambda: not waiting(project))
    assert steps(database, "val_loss") == list(range(1, 11))
    assert statuses(database) == ["FINISHED"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own with four megabytes."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk], capture_output=True, text=True
    )  # fmt: skip
    if mounted.returncode != 0:
        pytest.skip(f"mounting is not permitted: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


@pytest.mark.parametrize("obstacle", ["read-only", "full"])
def test_a_store_on_a_disk_that_takes_nothing_gets_all_later(
    project: Project, empty_store: Path, small_disk: Path, obstacle: str
) -> None:
    database = small_disk / "store.db"
    shutil.copy(empty_store, database)
    if obstacle == "full":
        fill = subprocess.run(["dd", "if=/dev/zero", f"of={small_disk / 'filler'}"], capture_output=True, text=True)
        assert "No space left" in fill.stderr
    else:
        subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    address = f"sqlite:///{database}"
    train_beside(project, address)
    if obstacle == "full":
        (small_disk / "filler").unlink()
    else:
        subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)
    classifier(project, "sync")  # without the variable: the journal says where it goes
    assert steps(database, "val_loss") == [1, 2, 3, 4, 5]
    assert statuses(database) == ["FINISHED"]
    assert waiting(project) == []


@pytest.mark.parametrize("sends", ["the next stage", "another command"])
def test_what_waits_is_sent_by(project: Project, sends: str) -> None:
    database = project.root / "mlflow.db"
    with closing(sqlite3.connect(database, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        with paced(project) as process:
            finish(process)
    assert len(waiting(project)) == 1
    if sends == "the next stage":
        run_stage(project, "train")
    else:
        classifier(project, "lineage", "no-such-thing", check=False)
    assert waiting(project) == []
    assert steps(database, "val_loss") == (
        [1, 1, 2, 2, 3, 3, 4, 4, 5] if sends == "the next stage" else [1, 2, 3, 4, 5]
    )
    assert set(statuses(database)) == {"FINISHED"}


def test_with_nothing_to_send_it_says_so_and_makes_no_store(prepared: Project, tmp_path: Path) -> None:
    project = prepared.copy(tmp_path / "project")
    assert classifier(project, "sync").stdout == "Nothing is waiting to be sent\n"
    assert not (project.root / "mlflow.db").exists()


KILL_WHILE_IT_IS_MADE = """
import os, random, signal, sys, time
from classifier.tracking.sender import Sender
seed = random.Random(7)
for attempt in range(10):
    child = os.fork()
    if child == 0:
        Sender().send_all()
        os._exit(0)
    time.sleep(seed.uniform(0, 2.5) if attempt else 0)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    print("there" if os.path.exists("mlflow.db") else "not there")
"""


def test_a_store_whose_making_is_cut_off_again_and_again_is_made_in_the_end(repository: Path) -> None:
    journal = train()
    Path("mlflow.db").unlink()
    done = subprocess.run(
        [sys.executable, "-c", KILL_WHILE_IT_IS_MADE], capture_output=True, text=True, check=True,
        env=clean_environment(repository, PYTHONPATH=str(ROOT), DVC_ROOT=str(repository)),
    )  # fmt: skip
    print(done.stdout)
    assert done.stdout.startswith("not there\n")
    assert Sender().send_all() == {}
    assert not journal.folder.exists()
    assert steps(repository / "mlflow.db", "loss") == [1, 2, 3]
    assert statuses(repository / "mlflow.db") == ["FINISHED"]
    assert list(repository.glob(".mlflow.db.*")) == []


def test_the_machine_is_measured_while_a_training_runs(repository: Path) -> None:
    code = "from classifier.tracking import sender as sync; sync.SAMPLE_SECONDS = 1; sync.main()"
    tracker = stage_tracker()
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, bufsize=0,
        env=clean_environment(repository, PYTHONPATH=str(ROOT), DVC_ROOT=str(repository)),
    ) as sender:  # fmt: skip
        assert sender.stdin is not None
        sender.stdin.write(os.fsencode(tracker.journal.folder) + b"\0")
        with tracker.training({"device": "cpu"}, uuid4().hex, time.time()):
            key = "system/cpu_utilization_percentage"
            time.sleep(3)
            tracker.log_metrics({"train_loss": 1.0, "val_accuracy": 0.5}, step=1)
            wait_for(lambda: len(steps(repository / "mlflow.db", key)) >= 4)
        sender.stdin.close()
        assert sender.wait(120) == 0
    measured = steps(repository / "mlflow.db", key)
    assert len(set(measured)) == len(measured)
    assert statuses(repository / "mlflow.db") == ["FINISHED"]
    # The comparison of runs opens on the first of them
    names = [name for (name,) in query(repository / "mlflow.db", "SELECT key FROM latest_metrics ORDER BY rowid")]
    assert names[:2] == ["val_accuracy", "train_loss"]
    assert key in names


# ---------------------------------------------------------------------------------------------------------------------
# A real server, which is not there at first


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Not started."""
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.kill()


class Away(NamedTuple):
    """What was run while the server was not there; journals: a copy of what that left."""

    project: Project
    stages: dict[str, Stage]
    journals: Path


@pytest.fixture(scope="module")
def away(prepared: Project, server: Server, healthy: Stage, tmp_path_factory: pytest.TempPathFactory) -> Away:
    project = prepared.copy(tmp_path_factory.mktemp("away") / "project")
    env = {"MLFLOW_TRACKING_URI": server.address}
    stages = {name: run_stage(project, name, **env) for name in ("train", "evaluate", "export")}
    check_journals = project.root.parent / "journals"
    shutil.copytree(project.root / ".journal", check_journals)
    done = classifier(project, "sync", check=False)
    assert done.returncode == 1
    assert "not sent: the MLflow store http://127.0.0.1" in done.stderr
    assert done.stderr.endswith("3 of 3 journals are not sent\n")
    return Away(project, stages, check_journals)


class Back(NamedTuple):
    """What the server held when it had been started and all was sent; other tests send to it too."""

    contents: dict[str, Any]
    database: Path


@pytest.fixture(scope="module")
def back(away: Away, server: Server, tmp_path_factory: pytest.TempPathFactory) -> Back:
    server.start()
    done = classifier(away.project, "sync")
    assert done.stdout == "3 journals were waiting; nothing is left to send\n"
    database = tmp_path_factory.mktemp("back") / "server.db"
    with closing(sqlite3.connect(server.database)) as store, closing(sqlite3.connect(database)) as copy:
        store.backup(copy)
    return Back(contents(server.database, server.artifacts), database)


def test_a_server_that_is_not_there_delays_no_stage_and_changes_no_result(away: Away, healthy: Stage) -> None:
    assert away.stages["train"].results == healthy.results
    assert away.stages["train"].seconds < healthy.seconds + DELAY
    for stage in away.stages.values():
        assert "the rest is in" in stage.complaint
        assert "Traceback" not in stage.complaint
    assert len(list(away.journals.glob("[0-9]*/"))) == 3


@pytest.mark.parametrize("name", ["evaluate", "export"])
def test_a_server_that_never_answers_does_not_delay_the_stages_after_training(
    away: Away, tmp_path: Path, name: str
) -> None:
    project = away.project.copy(tmp_path / "project")
    shutil.rmtree(project.root / ".journal")
    with silent_server() if name == "evaluate" else dripping_server("body") as address:
        disturbed = run_stage(project, name, MLFLOW_TRACKING_URI=address)
    assert disturbed.seconds < away.stages[name].seconds + DELAY
    assert "the rest is in" in disturbed.complaint
    assert "Traceback" not in disturbed.complaint
    assert len(waiting(project)) == 1


def test_what_three_stages_had_to_tell_is_all_there_when_the_server_is(back: Back) -> None:
    database = back.database
    assert statuses(database) == ["FINISHED"]
    for key in ("train_loss", "val_loss", "val_accuracy", "images_per_second"):
        assert steps(database, key) == [1, 2, 3, 4]
    assert steps(database, "test_accuracy") == [0]
    assert len(query(database, "SELECT key FROM params")) == len(load_params().model_dump())
    tags = dict(query(database, "SELECT key, value FROM tags"))
    assert {"md5.model_weights", "md5.images", "md5.test_set", "mlflow.source.git.commit"} <= tags.keys()
    assert len(query(database, "SELECT * FROM inputs WHERE source_type = 'DATASET'")) == 2
    files = {Path(name).name for name in back.contents if "/" in name}
    assert {"classes.csv", "confusion.csv", "samples.png", "manifest.json", "model.onnx"} <= files
    assert [number for (number,) in query(database, "SELECT version FROM model_versions")] == [1]


def test_sending_again_changes_nothing(back: Back, away: Away, server: Server) -> None:
    before = contents(server.database, server.artifacts)
    assert classifier(away.project, "sync").stdout == "Nothing is waiting to be sent\n"
    assert contents(server.database, server.artifacts) == before


def test_journals_that_are_sent_a_second_time_change_nothing(back: Back, away: Away, server: Server) -> None:
    before = contents(server.database, server.artifacts)
    shutil.copytree(away.journals, away.project.root / ".journal", dirs_exist_ok=True)
    for noted in away.project.root.glob(".journal/*/sent.json"):
        noted.unlink()
    assert classifier(away.project, "sync").stdout == "3 journals were waiting; nothing is left to send\n"
    after = contents(server.database, server.artifacts)
    assert {name for name in {*after, *before} if after.get(name) != before.get(name)} == set()


def test_a_server_killed_in_the_middle_of_a_training_misses_nothing(
    back: Back, prepared: Project, server: Server, tmp_path: Path
) -> None:
    project = prepared.copy(tmp_path / "project")
    project.set_params(epochs="400", experiment="cut-off")
    quiet = prepared.copy(tmp_path / "quiet" / "project")
    quiet.set_params(epochs="400", experiment="cut-off")
    beside = ThreadPoolExecutor().submit(run_stage, quiet, "train")  # at the same time: the machine is as busy for both
    start = time.monotonic()
    with subprocess.Popen(
        [python(), "-m", "stages", "train"], cwd=project.root, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=clean_environment(tmp_path, MLFLOW_TRACKING_URI=server.address),
    ) as process:  # fmt: skip
        wait_for(lambda: len(steps(server.database, "val_loss", "cut-off")) > 20)
        server.kill()
        assert process.poll() is None
        output, _ = process.communicate(timeout=300)
    seconds = time.monotonic() - start
    arrived = len(steps(server.database, "val_loss", "cut-off"))
    print(f"{arrived} of 400 epochs when the server was killed; {seconds:.1f} s")
    assert process.returncode == 0
    assert arrived < 400
    assert "the rest is in" in output
    assert "Traceback" not in output

    undisturbed = beside.result()
    assert {name: (project.root / name).read_bytes() for name in RESULTS} == undisturbed.results
    assert seconds < undisturbed.seconds + DELAY

    server.start()
    classifier(project, "sync")
    for key in ("train_loss", "val_loss", "val_accuracy", "images_per_second"):
        assert steps(server.database, key, "cut-off") == list(range(1, 401))
    assert statuses(server.database, "cut-off") == ["FINISHED"]


def test_a_server_that_comes_back_during_a_training_gets_what_it_missed_from_the_same_process(
    back: Back, project: Project, server: Server
) -> None:
    env = {"MLFLOW_TRACKING_URI": server.address, "MLFLOW_EXPERIMENT_NAME": "came-back"}
    with paced(project, **env) as process:
        wait_for(lambda: steps(server.database, "val_loss", "came-back") == [1, 2, 3, 4, 5])
        server.kill()
        tell(process, "more")
        server.start()
        wait_for(lambda: len(steps(server.database, "val_loss", "came-back")) == 10)
        tell(process, "more")
        finish(process)
    assert process.returncode == 0
    wait_for(lambda: not waiting(project))
    assert steps(server.database, "val_loss", "came-back") == list(range(1, 16))
    assert statuses(server.database, "came-back") == ["FINISHED"]
