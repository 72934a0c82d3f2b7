"""DVC's experiment queue, whose workers are killed: real dvc and workers."""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from dvc_queue import processes_in, queue_logs, queue_status, run_queue, start, states_in, stop_queue
from project import Project, clean_environment, reproduced_project
from tracker import wait_for

pytestmark = pytest.mark.slow

# Put behind the network: where $HOLD is set, a training stops itself before its seventh batch, in its third epoch
HOLDING = """

import os, signal
build_network = build
def build(image_shape, classes):
    network = build_network(image_shape, classes)
    left = iter(range(6, -1, -1))
    def hold(module, inputs):
        if module.training and "HOLD" in os.environ and next(left) == 0:
            os.kill(os.getpid(), signal.SIGSTOP)
    network.register_forward_pre_hook(hold)
    return network
"""


@pytest.fixture
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """A project with a network that can be held."""
    project = reproduced_project(tmp_path_factory, export_formats="[onnx]")
    with (project.root / "classifier/networks/mlp.py").open("a") as network:
        network.write(HOLDING)
    project.commit()
    yield project
    for process in processes_in(project.root):
        with suppress(psutil.NoSuchProcess):
            process.kill()
    stop_queue(project)


def held(project: Project) -> list[psutil.Process]:
    """The trainings that have stopped themselves."""
    found = []
    for process in processes_in(project.root):
        with suppress(psutil.NoSuchProcess):
            if process.status() == psutil.STATUS_STOPPED:
                found.append(process)
    return found


def copies(project: Project) -> list[Path]:
    return [*project.root.glob(".dvc/tmp/exps/tmp*"), *project.root.glob(".dvc/tmp/exps/standalone/tmp*")]


def resume(project: Project) -> list[str]:
    """The lines that `classifier queue resume` prints; the trainings that it starts are not held."""
    log = project.root.parent / "resume.log"
    with log.open("w") as output:  # the workers keep it open
        subprocess.run(
            [sys.executable, "-m", "classifier", "queue", "resume", "-j", "2"], cwd=project.root, check=True,
            env=clean_environment(project.root.parent), stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip
    return log.read_text().splitlines()


def test_experiments_whose_workers_are_killed_are_continued(project: Project) -> None:
    project.dvc("exp", "run", "--queue", "--name", "first", "-S", "lr=0.2", "train")
    project.dvc("exp", "run", "--queue", "--name", "second", "-S", "lr=0.3", "train")
    project.env["HOLD"] = "1"
    start(project, 2)
    wait_for(lambda: len(held(project)) == 2)
    del project.env["HOLD"]

    # One worker; what it had begun is still there
    worker = next(process for process in processes_in(project.root) if "queue-worker" in process.cmdline())
    worker.kill()
    queued, removed, *_ = resume(project)
    assert queued in ("Queued again: first", "Queued again: second")
    assert removed == "Abandoned copies removed: 0"  # for all one knows, the live worker has made it

    # All of them, and a copy that a killed `dvc exp run --temp` would leave
    for process in processes_in(project.root):
        with suppress(psutil.NoSuchProcess):
            process.kill()
    (project.root / ".dvc/tmp/exps/standalone/tmpkilled").mkdir(parents=True)
    time.sleep(1)
    assert "Running" in queue_status(project)
    queued, removed, *_ = resume(project)
    assert queued.startswith("Queued again: ")
    assert int(removed.split()[-1]) > 2

    run_queue(project)
    states = states_in(queue_status(project))
    assert len(states) == 2
    assert queue_logs(project, dict.fromkeys(states, "")).count("Resuming epoch ") == 2
    assert copies(project) == []
    for name in ("first", "second"):
        assert project.run("git", "for-each-ref", f"refs/exps/**/{name}").stdout.count("\n") == 1
