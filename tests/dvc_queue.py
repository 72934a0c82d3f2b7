"""DVC's queue of experiments, run to its end, and the processes that it leaves, ended."""

import re
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path

import psutil
from project import Project, clean_environment, python

# A line of `dvc queue status`: task, name, time of creation, state
TASK = re.compile(r"^([0-9a-f]{7})\s.*\s(Queued|Running|Success|Failed)\s*$", re.MULTILINE)

NO_WORKER = "Worker status: 0 active, 0 idle"
DESERTED_SECONDS = 15
QUEUE_SECONDS = 1000  # less than a test may take: what the experiments printed is told when time is up


def run_queue(project: Project, workers: int = 2) -> None:
    """Run all queued experiments, `workers` at a time; raises with DVC's logs if one fails or time is up.

    A worker on a busy machine may take the queue for empty and end: when none is left, they are started again. DVC
    does not list a task at the moment when a worker takes it, so all that were there at first are waited for.
    """
    tasks = states_in(queue_status(project)).keys()
    try:
        start(project, workers)
        states = wait_for_queue(project, tasks, workers)
        assert set(states.values()) == {"Success"}, queue_logs(project, states)
    finally:
        stop_queue(project)


def wait_for_queue(project: Project, tasks: Iterable[str] = (), workers: int = 1) -> dict[str, str]:
    """Wait until these tasks have ended, and all that are listed; return state by task."""
    deadline = time.monotonic() + QUEUE_SECONDS
    seen = time.monotonic()  # when a worker was last there
    while True:
        status = queue_status(project)
        states = states_in(status)
        if {*tasks, *states} <= {task for task, state in states.items() if state in ("Success", "Failed")}:
            return states
        assert time.monotonic() < deadline, queue_logs(project, states)
        if NO_WORKER not in status:
            seen = time.monotonic()
        elif time.monotonic() - seen > DESERTED_SECONDS:
            start(project, workers)
            seen = time.monotonic()
        time.sleep(1)


def start(project: Project, workers: int) -> None:
    """Start the workers. They keep the output they are given open: read through a pipe, it would end when they do."""
    log = project.root.parent / "queue.log"
    with log.open("w") as output:
        done = subprocess.run(
            [python(), "-m", "dvc", "queue", "start", "-j", str(workers)],
            cwd=project.root, env=clean_environment(project.root.parent, **project.env),
            stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip
    assert done.returncode == 0, log.read_text()


def queue_status(project: Project) -> str:
    """What DVC says of its queue; it is asked again if it fails, as it does when a worker has half written a file."""
    asked = project.dvc("queue", "status", check=False)
    for _ in range(3):
        if asked.returncode != 0:
            asked = project.dvc("queue", "status", check=False)
    assert asked.returncode == 0, asked.stderr
    return asked.stdout


def states_in(status: str) -> dict[str, str]:
    """State by task: Queued, Running, Success or Failed."""
    return dict(TASK.findall(status))


def queue_logs(project: Project, states: dict[str, str]) -> str:
    """What the experiments that did not succeed have printed."""
    texts = []
    for task, state in states.items():
        if state != "Success":
            logs = project.dvc("queue", "logs", task, check=False)
            texts.append(f"{task} {state}\n{logs.stdout}{logs.stderr}")
    return "\n".join(texts)


def stop_queue(project: Project) -> None:
    """End the workers, who else wait ten seconds for more to do, and what a failed test has left running."""
    project.dvc("queue", "stop", "--kill", check=False)
    _, alive = psutil.wait_procs(processes_in(project.root), timeout=15)
    for process in alive:
        process.kill()
    psutil.wait_procs(alive, timeout=5)


def processes_in(folder: Path) -> list[psutil.Process]:
    """The processes that run in a folder or below it."""
    found = []
    for process in psutil.process_iter():
        try:
            if Path(process.cwd()).is_relative_to(folder):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found
