"""A killed training, repeated by the same command, ends where an uninterrupted one does: real dvc, stages and store."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
import tracker
import yaml
from dvc_queue import processes_in
from project import Project, clean_environment, small_project
from tracker import wait_for

pytestmark = pytest.mark.slow

EPOCHS = 24  # of 20 batches each
# So that the order of the batches, augmentation, the optimiser's state, the schedule and the best epoch all matter
SETTINGS = {
    "epochs": str(EPOCHS), "batch_size": "8", "momentum": "0.9", "schedule": "cosine", "augment": "[crop, flip]",
    "checkpoint_steps": "7", "export_formats": "[pth]",
}  # fmt: skip
TRAINED = ["models/model_weights.pth", "metrics/epochs.csv", "metrics/train.json", "metrics/environment.json"]
DVC = [sys.executable, "-m", "dvc"]
STAGE = [sys.executable, "-m", "stages.train"]


class Reference(NamedTuple):
    written: dict[str, bytes]  # by an uninterrupted `dvc repro`: the weights and all metrics
    project: Path  # in which train and later are to run; tests copy it


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    folder = tmp_path_factory.mktemp("reference")
    project = small_project(folder, **SETTINGS)
    project.dvc("repro")
    outputs = [project.root / TRAINED[0], *(path for path in project.root.glob("metrics/**/*") if path.is_file())]
    written = {path.relative_to(project.root).as_posix(): path.read_bytes() for path in outputs}

    lock = yaml.safe_load((project.root / "dvc.lock").read_text())
    lock["stages"] = {name: entry for name, entry in lock["stages"].items() if name in ("download", "annotate")}
    (project.root / "dvc.lock").write_text(yaml.safe_dump(lock, sort_keys=False))
    (project.root / "mlflow.db").unlink()
    for name in ("metrics", "models", "mlruns", ".dvc/cache/runs"):
        shutil.rmtree(project.root / name)
    project.commit()
    return Reference(written, project.root)


@pytest.fixture
def project(reference: Reference, tmp_path: Path) -> Project:
    """A project with data that is annotated and nothing trained."""
    shutil.copytree(reference.project, tmp_path / "project", symlinks=True)
    return Project(tmp_path / "project")


# Killing


def start(project: Project, command: list[str]) -> "subprocess.Popen[str]":
    """Start a command in a process group of its own, as in a terminal."""
    with (project.root.parent / "errors").open("w") as errors:
        return subprocess.Popen(
            command, cwd=project.root, env=clean_environment(project.root.parent), stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=errors, text=True,
            start_new_session=True,
        )  # fmt: skip


def wait_for_checkpoint(project: Project, pattern: str) -> psutil.Process:
    """Wait for a file in a training's checkpoints; the process that trains."""
    deadline = time.monotonic() + 60
    while not list(project.root.glob(f".checkpoints/*/{pattern}")):
        assert time.monotonic() < deadline, (project.root.parent / "errors").read_text()
        time.sleep(0.005)
    (stage,) = [process for process in processes_in(project.root) if trains(process)]
    return stage


def trains(process: psutil.Process) -> bool:
    """Whether it is the process that trains, and not one of its copies that decode."""
    try:
        parent = process.parent()
        is_worker = parent is not None and parent.cmdline() == process.cmdline()
        return process.cmdline()[1:] == STAGE[1:] and not is_worker
    except psutil.NoSuchProcess:  # has ended since
        return False


IN_EPOCH = "epoch-{:06}-batch-*.pt"  # counted from 0
IN_THE_MIDDLE = IN_EPOCH.format(EPOCHS // 3)


def kill_everything(project: Project) -> None:
    for process in processes_in(project.root):
        with suppress(psutil.NoSuchProcess):
            process.kill()


def kill_in(project: Project, command: list[str], pattern: str) -> None:
    """Start a command and kill all its processes when there is such a file in the training's checkpoints."""
    with start(project, command):
        wait_for_checkpoint(project, pattern)
        kill_everything(project)


# What must be there in the end


def assert_as_uninterrupted(project: Project, reference: Reference, names: list[str]) -> None:
    """The outputs are the reference's, one run is FINISHED with each epoch once, and nothing else is left."""
    assert [name for name in names if (project.root / name).read_bytes() != reference.written[name]] == []
    assert list(project.root.glob(".checkpoints/*/")) == []
    assert list(project.root.glob(".journal/*/")) == []
    assert statuses(project) == ["FINISHED"]
    query = "SELECT key, step FROM metrics WHERE key NOT LIKE 'system/%' ORDER BY step"
    logged = tracker.query(project.root / "mlflow.db", query)
    assert len(logged) == len(set(logged))
    for name in ("train_loss", "val_loss", "val_accuracy", "images_per_second"):
        assert [step for key, step in logged if key == name] == list(range(1, EPOCHS + 1))


def statuses(project: Project) -> list[str]:
    """Those of all runs in the MLflow store."""
    return tracker.statuses(project.root / "mlflow.db")


def assert_ends(process: psutil.Process, seconds: float) -> None:
    _, alive = psutil.wait_procs([process], timeout=seconds)
    assert alive == []


# SIGKILL


def kill_stage(project: Project, dvc: int, stage: psutil.Process) -> None:
    stage.kill()


def kill_dvc(project: Project, dvc: int, stage: psutil.Process) -> None:
    stage.suspend()  # or so short a training may end before it looks whether dvc is there
    os.kill(dvc, signal.SIGKILL)
    wait_for(lambda: stage.ppid() != dvc)
    time.sleep(0.5)
    stage.resume()
    assert_ends(stage, seconds=10)


def kill_all(project: Project, dvc: int, stage: psutil.Process) -> None:
    kill_everything(project)


@pytest.mark.parametrize("kill", [kill_stage, kill_dvc, kill_all])
def test_a_killed_training_goes_on_to_the_same_bytes(
    project: Project, reference: Reference, kill: Callable[[Project, int, psutil.Process], None]
) -> None:
    with start(project, [*DVC, "repro", "train"]) as dvc:
        kill(project, dvc.pid, wait_for_checkpoint(project, IN_THE_MIDDLE))
    assert not (project.root / TRAINED[0]).exists()
    assert "Going on in epoch " in project.dvc("repro", "train").stdout
    assert_as_uninterrupted(project, reference, TRAINED)


def test_a_training_killed_twice_leads_to_the_same_metrics_and_model(project: Project, reference: Reference) -> None:
    for epoch in (3, 9):
        kill_in(project, [*DVC, "repro"], IN_EPOCH.format(epoch))
    repeated = project.dvc("repro")
    assert "Going on in epoch 10 after batch " in repeated.stdout
    assert_as_uninterrupted(project, reference, list(reference.written))
    assert project.stages_run(project.dvc("repro").stdout) == []


def test_a_training_killed_before_its_first_checkpoint_begins_anew_in_the_same_run(
    project: Project, reference: Reference
) -> None:
    project.set_params(checkpoint_steps="1000")
    with start(project, [*DVC, "repro", "train"]):
        wait_for_checkpoint(project, "training.json")
        wait_for(lambda: statuses(project))
        kill_everything(project)
    project.dvc("repro", "train")
    assert_as_uninterrupted(project, reference, TRAINED)


def test_after_a_changed_parameter_training_starts_anew_and_says_what_was_changed(project: Project) -> None:
    kill_in(project, [*DVC, "repro", "train"], IN_THE_MIDDLE)
    project.set_params(lr="0.05", workers="1")
    repeated = project.dvc("repro", "train")
    line = "Starting anew, not from the checkpoint of a training that was given up: lr was 0.1 and is 0.05"
    assert line in repeated.stdout.splitlines()
    assert "Going on" not in repeated.stdout
    assert sorted(statuses(project)) == ["FINISHED", "KILLED"]


# Experiments


def test_an_experiment_killed_in_its_temporary_folder_goes_on_in_another(
    project: Project, reference: Reference
) -> None:
    project.set_params(lr="0.7")  # which the experiment sets to the reference's
    project.commit()
    command = ["exp", "run", "--temp", "-S", "lr=0.1"]
    kill_in(project, [*DVC, *command], IN_THE_MIDDLE)
    assert project.run("git", "status", "--porcelain").stdout == ""
    repeated = project.dvc(*command)
    assert f"Going on in epoch {EPOCHS // 3 + 1} after batch " in repeated.stdout
    (name,) = re.findall(r"Ran experiment\(s\): (\S+)", repeated.stdout)
    project.dvc("exp", "apply", name)
    assert_as_uninterrupted(project, reference, list(reference.written))


def test_an_experiment_killed_in_the_workspace_goes_on_after_the_way_back(
    project: Project, reference: Reference
) -> None:
    project.set_params(lr="0.7")
    project.commit()
    command = ["exp", "run", "-S", "lr=0.1", "train"]
    kill_in(project, [*DVC, *command], IN_THE_MIDDLE)
    project.run("git", "checkout", "--force", "main")
    repeated = project.dvc(*command)
    assert f"Going on in epoch {EPOCHS // 3 + 1} after batch " in repeated.stdout
    assert_as_uninterrupted(project, reference, TRAINED)


# Signals


@pytest.mark.parametrize(
    ("number", "code", "settings"),
    [
        (signal.SIGINT, 130, {}),
        (signal.SIGTERM, 143, {}),
        (signal.SIGINT, 130, {"memory_limit_gib": "0.00001", "workers": "2"}),
        (signal.SIGTERM, 143, {"memory_limit_gib": "0.00001", "workers": "2"}),
    ],
    ids=["Ctrl-C", "SIGTERM", "Ctrl-C, streaming", "SIGTERM, streaming"],
)
def test_a_signal_ends_training_with_a_checkpoint_from_which_it_goes_on(
    project: Project, reference: Reference, number: signal.Signals, code: int, settings: dict[str, str]
) -> None:
    project.set_params(checkpoint_steps="1000", **settings)
    with start(project, STAGE) as stage:
        wait_for_checkpoint(project, IN_EPOCH.format(1))  # the end of epoch 2
        time.sleep(0.05)
        sent = time.monotonic()
        os.killpg(stage.pid, number)
        stage.wait()
    assert stage.returncode == code
    assert time.monotonic() - sent < 5
    errors = (project.root.parent / "errors").read_text()
    assert "Traceback" not in errors
    assert errors.splitlines()[-1] == "interrupted"
    assert len(list(project.root.glob(".checkpoints/*/*.pt"))) == 2
    wait_for(lambda: statuses(project) == ["KILLED"])
    assert not (project.root / TRAINED[0]).exists()
    repeated = project.dvc("repro", "train")
    assert "Going on in epoch " in repeated.stdout
    assert_as_uninterrupted(project, reference, TRAINED)


def test_ctrl_c_of_dvc_ends_training_with_a_checkpoint(project: Project, reference: Reference) -> None:
    with start(project, [*DVC, "repro", "train"]) as dvc:
        wait_for_checkpoint(project, IN_THE_MIDDLE)
        os.killpg(dvc.pid, signal.SIGINT)
    assert dvc.returncode != 0
    assert "Traceback" not in (project.root.parent / "errors").read_text()
    wait_for(lambda: statuses(project) == ["KILLED"])
    project.dvc("repro", "train")
    assert_as_uninterrupted(project, reference, TRAINED)


# A training that fails


def test_a_training_that_diverges_fails_with_one_message_and_writes_no_weights(project: Project) -> None:
    project.set_params(lr="1e20")
    failed = project.run(*STAGE, check=False)
    assert failed.returncode == 1
    message = failed.stderr.splitlines()
    assert message[-2].startswith("epoch 1, batch ")
    assert "the last finite loss was " in message[-2]
    assert message[-1] == "Lower lr, or look at the images of this batch."
    assert "Traceback" not in failed.stderr
    assert not (project.root / TRAINED[0]).exists()
    assert statuses(project) == ["FAILED"]
