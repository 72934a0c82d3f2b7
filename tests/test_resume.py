"""A killed training, started again, ends like an uninterrupted one: with real dvc, stages and store."""

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
from dvc_queue import processes_in
from project import TRAINED, Project, clean_environment, python, real_environment, small_project
from tracker import send_the_rest, wait_for

pytestmark = pytest.mark.slow

EPOCHS, BATCHES = 24, 20
# So that the order of the batches, augmentation, the optimiser's state, the schedule and the best epoch all matter
SETTINGS = {
    "epochs": str(EPOCHS), "batch_size": "8", "momentum": "0.9", "schedule": "cosine", "augment": "[crop, flip]",
    "checkpoint_steps": "7", "export_formats": "[pth]",
}  # fmt: skip
# Appended to the network: the training stops itself with SIGSTOP before batch number $HOLD. After SIGCONT each batch
# takes long, so that it is still running when the test ends it.
HOLDING = """

import os, signal, time
build_network = build
def build(image_shape, classes):
    network = build_network(image_shape, classes)
    if "HOLD" in os.environ:
        left = iter(range(int(os.environ["HOLD"]), -1, -1))
        def hold(module, inputs):
            batches_left = next(left, -1) if module.training else 1
            if batches_left == 0:
                os.kill(os.getpid(), signal.SIGSTOP)
            if batches_left <= 0:
                time.sleep(0.1)
        network.register_forward_pre_hook(hold)
    return network
"""
DVC = ["-m", "dvc"]
STAGE = ["-m", "stages", "train"]


class Reference(NamedTuple):
    written: dict[str, bytes]  # by an uninterrupted `dvc repro`: the weights and all metrics
    project: Path  # in which train and later are to run; tests copy it


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    folder = tmp_path_factory.mktemp("reference")
    project = small_project(folder, **SETTINGS)
    with (project.root / "classifier/networks/mlp.py").open("a") as network:
        network.write(HOLDING)
    project.dvc("repro")
    outputs = [project.root / TRAINED[0], *(path for path in project.root.glob("metrics/**/*") if path.is_file())]
    written = {path.relative_to(project.root).as_posix(): path.read_bytes() for path in outputs}

    project.forget_training()
    project.commit()
    return Reference(written, project.root)


@pytest.fixture
def project(reference: Reference, tmp_path: Path) -> Project:
    """A project with annotated data and no trained model."""
    return Project(reference.project).copy(tmp_path / "project")


# Killing


def start(
    project: Project, command: list[str], epoch: int, batch: int, *, real: bool = True
) -> "subprocess.Popen[str]":
    """Start Python in a process group of its own, as in a terminal; its training stops before this batch.

    epoch, batch: counted from 0, from where this training begins.
    """
    environment = real_environment if real else clean_environment
    with (project.root.parent / "errors").open("w") as errors:
        return subprocess.Popen(
            [sys.executable if real else python(), *command], cwd=project.root, stdin=subprocess.DEVNULL,
            env=environment(project.root.parent, HOLD=str(epoch * BATCHES + batch)),
            stdout=subprocess.DEVNULL, stderr=errors, text=True, start_new_session=True,
        )  # fmt: skip


def wait_until_held(project: Project) -> psutil.Process:
    """The process that trains, once it has stopped itself."""
    deadline = time.monotonic() + 120
    while True:
        for process in processes_in(project.root):
            with suppress(psutil.NoSuchProcess):
                if process.status() == psutil.STATUS_STOPPED:
                    return process
        assert time.monotonic() < deadline, (project.root.parent / "errors").read_text()
        time.sleep(0.05)


# Epoch and batch, past the checkpoint after batch 7: what came since is lost
IN_THE_MIDDLE = (EPOCHS // 3, 9)


def kill_everything(project: Project) -> None:
    for process in processes_in(project.root):
        with suppress(psutil.NoSuchProcess):
            process.kill()


def kill_in(project: Project, command: list[str], epoch: int, batch: int) -> None:
    """Start a command and kill all its processes before this batch of its training."""
    with start(project, command, epoch, batch, real=False):
        wait_until_held(project)
        kill_everything(project)


# What must be there in the end


def assert_as_uninterrupted(project: Project, reference: Reference, names: list[str]) -> None:
    """The outputs are the reference's, one run is FINISHED with each epoch once, and nothing else is left."""
    send_the_rest(project)
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
    above = {process.pid: process.ppid() for process in (stage, *stage.parents())}
    os.kill(dvc, signal.SIGKILL)
    below = next(psutil.Process(pid) for pid, parent in above.items() if parent == dvc)
    wait_for(lambda: below.ppid() != dvc)
    stage.resume()
    assert_ends(stage, seconds=120)


# DVC starts a stage through $SHELL: bash becomes the stage, dash stays between the two.
@pytest.mark.parametrize(
    ("kill", "shell"),
    [(kill_stage, "bash"), (kill_dvc, "dash"), pytest.param(kill_dvc, "bash", marks=pytest.mark.nightly)],
)
def test_a_killed_training_goes_on_to_the_same_bytes(
    project: Project,
    reference: Reference,
    kill: Callable[[Project, int, psutil.Process], None],
    shell: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not (path := shutil.which(shell)):
        pytest.skip(f"there is no {shell}")
    monkeypatch.setenv("SHELL", path)
    with start(project, [*DVC, "repro", "train"], *IN_THE_MIDDLE) as dvc:
        kill(project, dvc.pid, wait_until_held(project))
    assert not (project.root / TRAINED[0]).exists()
    # From the previous checkpoint; a training whose dvc was killed saves one more at its next update
    place = "" if kill == kill_dvc else f"{EPOCHS // 3 + 1} after batch 7\n"
    assert f"Resuming epoch {place}" in project.dvc("repro", "train").stdout
    assert_as_uninterrupted(project, reference, TRAINED)


def test_a_training_killed_twice_leads_to_the_same_metrics_and_model(project: Project, reference: Reference) -> None:
    kill_in(project, [*DVC, "repro"], epoch=3, batch=9)
    kill_in(project, [*DVC, "repro"], epoch=6, batch=10)  # counted from where it resumes
    repeated = project.dvc("repro")
    assert "Resuming epoch 10 after batch " in repeated.stdout
    assert_as_uninterrupted(project, reference, list(reference.written))
    assert project.stages_run(project.dvc("repro").stdout) == []


def test_a_training_killed_before_its_first_checkpoint_begins_anew_in_the_same_run(
    project: Project, reference: Reference
) -> None:
    with start(project, [*DVC, "repro", "train"], epoch=0, batch=5, real=False):
        wait_until_held(project)
        wait_for(lambda: statuses(project) == ["RUNNING"])
        kill_everything(project)
    assert [path.name for path in project.root.glob(".checkpoints/*/*")] == ["training.json"]
    assert "Going on" not in project.dvc("repro", "train").stdout
    assert_as_uninterrupted(project, reference, TRAINED)


def test_after_a_changed_parameter_training_starts_anew_and_says_what_was_changed(project: Project) -> None:
    kill_in(project, [*DVC, "repro", "train"], *IN_THE_MIDDLE)
    project.set_params(lr="0.05", workers="1")
    repeated = project.dvc("repro", "train")
    line = "Starting from scratch; the checkpoint of an abandoned training does not fit: lr was 0.1 and is 0.05"
    assert line in repeated.stdout.splitlines()
    assert "Going on" not in repeated.stdout
    send_the_rest(project)
    assert sorted(statuses(project)) == ["FINISHED", "KILLED"]


# The train stage with something changed in it first
CHANGED_STAGE = """
from pathlib import Path
from stages import train
from classifier.pipeline.errors import run_main
{change}
run_main(train.main)
"""
SAVING_ALWAYS = "from classifier.training import checkpoint; checkpoint.CHECKPOINT_SECONDS = 0"
EDITING_WHILE_DECODING = """
training_batches = train.training_batches
def edit_and_load(*arguments, **options):
    with Path("classifier/training/loop.py").open("a") as code:
        code.write("# edited")
    return training_batches(*arguments, **options)
train.training_batches = edit_and_load
"""


def kill_changed(project: Project, change: str) -> list[str]:
    """Start a changed stage, kill it before its sixth batch; the names of its checkpoints."""
    project.set_params(checkpoint_steps="4" if change == EDITING_WHILE_DECODING else "1000")
    kill_in(project, ["-c", CHANGED_STAGE.format(change=change)], epoch=0, batch=5)
    return sorted(path.name for path in project.root.glob(".checkpoints/*/*.pt"))


def test_where_steps_take_long_there_are_checkpoints_by_the_clock(project: Project, reference: Reference) -> None:
    assert kill_changed(project, SAVING_ALWAYS)[-1] == "epoch-000000-batch-000000005.pt"
    assert "Resuming epoch 1 after batch 5\n" in project.dvc("repro", "train").stdout
    assert_as_uninterrupted(project, reference, TRAINED)


def test_code_that_is_edited_while_images_are_decoded_does_not_go_on_from_the_code_before(project: Project) -> None:
    assert kill_changed(project, EDITING_WHILE_DECODING) == ["epoch-000000-batch-000000004.pt"]
    repeated = project.dvc("repro", "train")
    assert "Going on" not in repeated.stdout
    assert "an abandoned training does not fit: classifier/training was " in repeated.stdout


# Experiments


def test_an_experiment_killed_in_its_temporary_folder_goes_on_in_another(
    project: Project, reference: Reference
) -> None:
    project.set_params(lr="0.7")  # which the experiment sets to the reference's
    project.commit()
    command = ["exp", "run", "--temp", "-S", "lr=0.1"]
    kill_in(project, [*DVC, *command], *IN_THE_MIDDLE)
    assert project.run("git", "status", "--porcelain").stdout == ""
    repeated = project.dvc(*command)
    assert f"Resuming epoch {EPOCHS // 3 + 1} after batch 7\n" in repeated.stdout
    (name,) = re.findall(r"Ran experiment\(s\): (\S+)", repeated.stdout)
    project.dvc("exp", "apply", name)
    assert_as_uninterrupted(project, reference, list(reference.written))


def test_an_experiment_killed_in_the_workspace_goes_on_after_the_way_back(
    project: Project, reference: Reference
) -> None:
    project.set_params(lr="0.7")
    project.commit()
    command = ["exp", "run", "-S", "lr=0.1", "train"]
    kill_in(project, [*DVC, *command], *IN_THE_MIDDLE)
    project.run("git", "checkout", "--force", "main")
    repeated = project.dvc(*command)
    assert f"Resuming epoch {EPOCHS // 3 + 1} after batch 7\n" in repeated.stdout
    assert_as_uninterrupted(project, reference, TRAINED)


# Signals


@pytest.mark.parametrize(
    ("number", "code", "settings"),
    [
        (signal.SIGTERM, 143, {}),
        (signal.SIGINT, 130, {"memory_limit_gib": "0.00001", "workers": "2"}),
        pytest.param(signal.SIGTERM, 143, {"memory_limit_gib": "0.00001", "workers": "2"}, marks=pytest.mark.nightly),
    ],
    ids=["SIGTERM", "Ctrl-C, streaming", "SIGTERM, streaming"],
)
def test_a_signal_ends_training_with_a_checkpoint_from_which_it_goes_on(
    project: Project, reference: Reference, number: signal.Signals, code: int, settings: dict[str, str]
) -> None:
    project.set_params(checkpoint_steps="1000", **settings)
    with start(project, STAGE, epoch=2, batch=9) as stage:
        held = wait_until_held(project)
        os.killpg(stage.pid, number)
        sent = time.monotonic()
        held.resume()
        stage.wait()
    assert stage.returncode == code
    assert time.monotonic() - sent < 30  # five, and room for a busy machine; the training would take longer
    errors = (project.root.parent / "errors").read_text()
    assert "Traceback" not in errors
    assert errors.splitlines()[-1] == "interrupted"
    assert len(list(project.root.glob(".checkpoints/*/*.pt"))) == 2
    wait_for(lambda: statuses(project) == ["KILLED"])
    assert not (project.root / TRAINED[0]).exists()
    repeated = project.dvc("repro", "train")
    assert "Resuming epoch 3 after batch 10\n" in repeated.stdout
    assert_as_uninterrupted(project, reference, TRAINED)


def test_ctrl_c_of_dvc_ends_training_with_a_checkpoint(project: Project, reference: Reference) -> None:
    with start(project, [*DVC, "repro", "train"], *IN_THE_MIDDLE) as dvc:
        held = wait_until_held(project)
        os.killpg(dvc.pid, signal.SIGINT)
        held.resume()
    assert dvc.returncode != 0
    assert "Traceback" not in (project.root.parent / "errors").read_text()
    wait_for(lambda: statuses(project) == ["KILLED"])
    assert re.search(r"Resuming epoch \d+ after batch 10\n", project.dvc("repro", "train").stdout)
    assert_as_uninterrupted(project, reference, TRAINED)


# A training that fails


def test_a_training_that_diverges_fails_with_one_message_and_writes_no_weights(project: Project) -> None:
    project.set_params(lr="1e20")
    failed = project.run(sys.executable, *STAGE, check=False)
    assert failed.returncode == 1
    message = failed.stderr.splitlines()
    assert message[-2].startswith("epoch 1, batch ")
    assert "the last finite loss was " in message[-2]
    assert message[-1] == "Lower lr, or look at the images of this batch."
    assert "Traceback" not in failed.stderr
    assert not (project.root / TRAINED[0]).exists()
    wait_for(lambda: statuses(project) == ["FAILED"])
