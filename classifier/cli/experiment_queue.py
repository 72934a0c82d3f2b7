"""Recovery of DVC's experiment queue after its workers were killed.

DVC 3.67 does not retry a task whose worker was killed: it stays `Running`, and its copy of the repository stays in
`.dvc/tmp/exps`. This module queues such tasks again and removes the copies that no process uses.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from filelock import FileLock

from classifier.pipeline.errors import PipelineError

ANSWER_SECONDS = 5  # time for a busy worker to list its tasks
END_SECONDS = 10  # time for a training to save a checkpoint


class Recovered(NamedTuple):
    """Names of the experiments queued again, and removed copies of the repository."""

    names: list[str]
    copies: list[Path]


def recover() -> Recovered:
    """Queue experiments whose worker was killed again, and remove copies of the repository that no process uses.

    The experiments keep their names and continue from their checkpoints. Processes that outlived their worker are
    ended first. Raises PipelineError outside a Git repository, or if a worker does not list its tasks.
    """
    from dvc.exceptions import DvcException

    from classifier.provenance.storage import open_repository

    try:
        with open_repository() as repo:
            if not repo.tmp_dir or not Path(repo.tmp_dir, "exps").is_dir():
                return Recovered([], [])
            with FileLock(Path(repo.tmp_dir, "exps", "recover.lock")):
                queue = repo.experiments.celery_queue
                names = [_queue_again(queue, message, entry) for message, entry in _dead_tasks(queue)]
                return Recovered(names, _remove_copies(Path(repo.tmp_dir, "exps")))
    except DvcException as error:
        raise PipelineError(f"DVC's queue cannot be read: {error}") from None


def dvc(*arguments: str) -> str:
    """Return what a dvc command prints. Raises PipelineError with its message if it fails."""
    with tempfile.TemporaryFile("w+") as output:  # not a pipe, which the queue's workers would keep open
        command = [sys.executable, "-m", "dvc", *arguments]
        failed = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT).returncode != 0
        output.seek(0)
        printed = output.read()
    if failed:
        raise PipelineError(f"dvc {' '.join(arguments)}:\n{printed.strip()}")
    return printed


def _dead_tasks(queue: Any) -> Iterator[tuple[Any, Any]]:
    """Yield message and entry of each task that was started, has no result, and that no live worker holds."""
    started = [
        (message, entry)
        for message, entry in queue._iter_processed()
        if not queue.celery.AsyncResult(message.headers["id"]).ready()
    ]
    held = _tasks_of_workers(queue) if started else set()
    yield from (
        (message, entry)
        for message, entry in started
        # Checked again, because the task may have finished since
        if message.headers["id"] not in held and not queue.celery.AsyncResult(message.headers["id"]).ready()
    )


def _tasks_of_workers(queue: Any) -> set[str]:
    """Return the ids of the tasks that live workers hold."""
    # DVC's name for the workers of this repository
    node = f"dvc-exp-{hashlib.sha256(queue.wdir.encode()).hexdigest()[:6]}-"
    workers = [words for _, words in _processes() if "queue-worker" in words and any(node in word for word in words)]
    if not workers:
        return set()
    inspect = queue.celery.control.inspect(timeout=ANSWER_SECONDS)
    answers = [inspect.active() or {}, inspect.reserved() or {}]
    if min(map(len, answers)) < len(workers):
        raise PipelineError(
            f"{len(workers)} queue workers are running, and not all of them listed their tasks; run the command again, "
            "or stop them with `dvc queue stop --kill` first"
        )
    return {task["id"] for answer in answers for tasks in answer.values() for task in tasks}


def _queue_again(queue: Any, message: Any, entry: Any) -> str:
    """Put a task back into the queue and return the name of its experiment."""
    from dvc.repo.experiments.queue.tasks import run_exp

    infofile = queue.get_infofile_path(entry.stash_rev)
    _end([process for process, words in _processes() if infofile in words])
    if entry.stash_rev not in queue.stash.stash_revs:  # the worker removed it
        text = queue.stash.format_message(entry.head_rev, entry.baseline_rev, entry.name, entry.branch)
        queue.scm.set_ref(queue.stash.ref, entry.stash_rev, message=f"commit: {text}")
    shutil.rmtree(Path(infofile).parent, ignore_errors=True)
    arguments, options, _ = message.decode()
    # The new message comes first: if this process is killed in between, the experiment runs twice rather than never
    queue.celery.signature(run_exp.s(*arguments, **options)).delay()
    queue.celery.purge(message.delivery_tag)
    return str(entry.name or entry.stash_rev[:7])


def _end(processes: list[psutil.Process]) -> None:
    """End `dvc exp exec-run` processes without a worker. Their stages save a checkpoint and exit."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            children = process.children(recursive=True)
            process.kill()
            _, alive = psutil.wait_procs([process, *children], timeout=END_SECONDS)
            for child in alive:
                child.kill()
            psutil.wait_procs(alive, timeout=END_SECONDS)


def _remove_copies(folder: Path) -> list[Path]:
    """Remove the copies of the repository in `folder` that no process uses or has just created; return them."""
    copies = [path for path in (*folder.glob("tmp*"), *folder.glob("standalone/tmp*")) if path.is_dir()]
    if not copies:
        return []
    project = folder.parent.parent.parent
    places, starts = [], []
    for process, words in _processes():
        with suppress(psutil.Error, OSError):
            place = Path(process.cwd())
            places.append(place)
            if "exp" in words and project in (place, *place.parents):
                starts.append(process.create_time())
    removed = []
    for copy in copies:
        is_used = any(copy in (place, *place.parents) for place in places)
        # A copy that a running `dvc exp run --temp` or worker prepares is newer than that process
        may_be_new = any(copy.stat().st_mtime > start for start in starts)
        if not is_used and not may_be_new and copy.stat().st_uid == os.getuid():
            shutil.rmtree(copy, ignore_errors=True)
            removed.append(copy)
    return removed


def _processes() -> Iterator[tuple[psutil.Process, list[str]]]:
    """Yield each accessible process of this machine with its command line."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            yield process, process.cmdline()
