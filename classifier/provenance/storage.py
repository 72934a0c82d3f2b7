"""What DVC's cache and remote hold, sending from one to the other, and bringing outputs back from them.

This module and experiment_queue.py are the only ones that use DVC's Python interface.
"""

import json
import logging
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from dvc.exceptions import DvcException, NotDvcRepoError
from dvc.lock import LockError
from dvc.repo import Repo, lock_repo
from dvc.repo.reproduce import plan_repro
from dvc.scm import SCMError
from dvc_data.hashfile.hash_info import HashInfo

from classifier.pipeline.errors import PipelineError, masked

YES, NO, IN_PART = "yes", "no", "in part"


class Storage:
    """The cache of this checkout and its default remote, if it has one, asked by md5."""

    def __init__(self) -> None:
        self._repo = open_repository()
        self._remote_fault = "none"
        self._trees: dict[str, dict[str, str] | None] = {}

    def __enter__(self) -> "Storage":
        return self

    def __exit__(self, *_: object) -> None:
        self._repo.close()

    @cached_property
    def remote(self) -> Any | None:
        """DVC's object store of the default remote, or None where none is set up."""
        if not self._repo.config["core"].get("remote"):
            return None
        try:
            return self._repo.cloud.get_remote_odb(command="lineage")
        except Exception as error:  # as where the package for this kind of remote is missing
            self._remote_fault = f"cannot be asked: {_first_line(error)}"
            return None

    def in_cache(self, md5: str) -> str:
        """Whether the cache holds an output: "yes", "no", or "in part" where files of a folder are missing."""
        return self._held(self._repo.cache.local, md5)

    def in_remote(self, md5: str) -> str:
        """As `in_cache`, of the remote; "none" where there is no remote, else why it cannot be asked."""
        if self.remote is None:
            return self._remote_fault
        try:
            return self._held(self.remote, md5)
        except Exception as error:  # whatever the client of this kind of remote raises
            return f"cannot be asked: {_first_line(error)}"

    def files(self, md5: str) -> dict[str, str] | None:
        """The md5 of every file of a folder by its name in it, or None if neither cache nor remote has the list."""
        if md5 not in self._trees:
            content = self.read(md5)
            self._trees[md5] = (
                None if content is None else {entry["relpath"]: entry["md5"] for entry in json.loads(content)}
            )
        return self._trees[md5]

    def read(self, md5: str) -> bytes | None:
        """The content with this md5, from the cache or else the remote; None if neither has it."""
        for store in (self._repo.cache.local, self.remote):
            try:
                if store is not None:
                    return bytes(store.fs.cat_file(store.oid_to_path(md5)))
            except Exception:  # noqa: S112, a store that cannot be asked does not have it
                continue
        return None

    def _held(self, store: Any, md5: str) -> str:
        if not store.exists(md5):
            with suppress(FileNotFoundError):  # DVC's client of an HTTP server that is down says that it is not there
                store.fs.cat_file(store.oid_to_path(md5))
            return NO
        if md5.endswith(".dir"):
            wanted: Iterable[str] = set((self.files(md5) or {}).values())
            if set(store.oids_exist(list(wanted))) != wanted:
                return IN_PART
        return YES


def open_repository() -> Repo:
    """Open the repository that this folder is in. Raises PipelineError where there is none of Git and DVC."""
    try:
        return Repo()
    except (NotDvcRepoError, SCMError) as error:
        raise PipelineError(
            f"{Path.cwd()}: no repository of Git and DVC ({_first_line(error)}); `git init`, or use a clone"
        ) from None


class Returned(NamedTuple):
    """Outputs by what became of them.

    as_locked: are as dvc.lock had them, from the cache or the remote; from_runs: as a run of the same code, data and
    parameters made them, which dvc.lock has now; missing: nowhere to be had; aside: moved away, as no cache has them.
    remote_fault: why the remote did not give all that it was asked for, or nothing.
    """

    as_locked: list[str]
    from_runs: list[str]
    missing: list[str]
    aside: list[str]
    remote_fault: str


@contextmanager
def exclusive() -> Iterator[Storage]:
    """The storage, and no other DVC command in this repository for as long as the block lasts.

    What DVC, killed, has left of its list of uses is removed. Raises PipelineError if a DVC command is at work.
    """
    with Storage() as storage:
        for name in ("dvc", "dvc_data"):
            logging.getLogger(name).setLevel(logging.ERROR)  # what is done is told by the caller
        try:
            with lock_repo(storage._repo):
                if uses := _uses(Path(storage._repo.tmp_dir or "", "rwlock")):
                    raise PipelineError(f"DVC runs a stage (process {uses[0]}): wait until it has ended")
                yield storage
        except LockError:
            raise PipelineError("Another DVC command is at work here: wait until it has ended") from None
        except DvcException as error:
            raise PipelineError(f"DVC: {_first_line(error)}") from None


def _uses(file: Path) -> list[int]:
    """The processes that run a stage, by DVC's list, which is removed if it is not whole."""
    try:
        uses = json.loads(file.read_bytes() or b"{}")
    except FileNotFoundError:
        return []
    except ValueError:
        file.unlink()
        return []
    found = [use["pid"] for use in uses.get("write", {}).values()]
    found += [use["pid"] for several in uses.get("read", {}).values() for use in several]
    return sorted({process for process in found if psutil.pid_exists(process)})


def return_outputs(storage: Storage, aside: Path) -> Returned:
    """Make the outputs of all stages those of dvc.lock, where they can be had; else those of a run that DVC remembers.

    For a stage whose entry in dvc.lock is up to date, `dvc repro` looks for the outputs of that entry alone: those of
    another machine are in no cache here, so it trains again although the run cache has what this machine had made of
    the same (DVC 3.67). storage: from `exclusive`. aside: a folder for outputs that would be lost.
    """
    repo = storage._repo
    stages = [stage for stage in plan_repro(repo.index.graph) if stage.cmd]
    cached = [out for stage in stages for out in stage.outs if out.use_cache]
    moved = []
    for out in cached:
        if out.exists and storage.in_cache(str(out.get_hash().value)) != YES:
            _move(Path(out.def_path), aside)
            moved.append(str(out))
    # Data of the user's own that DVC has is brought back where it is gone, and else left as it is
    wanted = [out for out in repo.index.outs if out.use_cache and out.hash_info and (out in cached or not out.exists)]
    remote_fault, changed = "", []
    if absent := [out.fs_path for out in wanted if storage.in_cache(out.hash_info.value) != YES]:
        remote_fault = _fetch(repo, storage, absent)
    if wanted:  # without targets, DVC would remove what is not in dvc.lock
        done = repo.checkout([out.fs_path for out in wanted], force=True, allow_missing=True)
        changed = [name.rstrip("/") for kind in ("added", "modified") for name in done[kind]]

    from_runs: list[str] = []
    missing: list[str] = []
    for stage in stages:
        follows = any(dep.def_path in from_runs and dep.changed() for dep in stage.deps)
        outs = [out.def_path for out in stage.outs if follows or out.workspace_status()]
        if outs and _return_run(repo, stage):
            from_runs += [out.def_path for out in stage.outs]
        else:
            missing += outs
    as_locked = sorted(name for name in changed if name not in (*from_runs, *missing))
    return Returned(as_locked, from_runs, missing, moved, remote_fault)


def _move(path: Path, folder: Path) -> None:
    target = folder / path
    if target.is_dir():
        shutil.rmtree(target)
    target.unlink(missing_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(path, target)


def _fetch(repo: Repo, storage: Storage, targets: list[str]) -> str:
    """Fetch outputs from the remote, if there is one, as far as it has them; why not all are there, if they are not."""
    if storage.remote is None:
        return storage._remote_fault
    try:
        repo.fetch(targets)
    except Exception as error:  # DVC's own, or whatever the client of this kind of remote raises
        return _first_line(error)
    return ""


def _return_run(repo: Repo, stage: Any) -> bool:
    """Check out what DVC's run cache has for a stage, as `dvc repro` does before it runs one; False if it has nothing.

    What dvc.lock says that the stage made comes first, if its dependencies are those that are here.
    """
    runs = repo.stage_cache
    for is_forgotten in (False, True):
        try:
            if is_forgotten:
                for out in stage.outs:
                    out.hash_info = HashInfo()
                stage.save_deps()
            elif not stage.deps_cached():
                continue
            runs.restore(stage, dry=True)
        except DvcException:  # the run cache has none, or a dependency is missing
            continue
        stage.remove_outs()
        runs.restore(stage)
        stage.save(run_cache=False)
        stage.commit()
        stage.dump(update_pipeline=False)
        return True
    return False


def push_results() -> int:
    """Send the run cache to the default remote, and all that it speaks of and the cache has; return how many files.

    `dvc push --run-cache` sends the outputs of the workspace alone, and of these not those that Git keeps, as metrics
    are: without them no stage of another clone is restored (DVC 3.67). It also passes over records that it could not
    send. Outputs that neither the cache nor the remote has, as after `dvc gc`, are told by DVC in a warning.
    Raises PipelineError if something cannot be sent; what has been sent by then is not sent again.
    """
    with open_repository() as repo:
        try:
            sent = int(repo.push(run_cache=True))
            records = Path(repo.stage_cache.cache_dir)
            entries = {path.relative_to(records).as_posix() for path in records.glob("*/*/*")}
            used = [tuple(entry.split("/")[1:]) for entry in entries]
            for objects in repo.stage_cache.get_used_objs(used).values():
                result = repo.cloud.push(objects)
                sent += len(result.transferred)
                if result.failed:
                    raise DvcException(f"{len(result.failed)} files failed to upload")
            if missing := entries - _records_of_runs(repo):
                raise DvcException(f"{len(missing)} records of the run cache failed to upload")
        except Exception as error:  # DVC's own, or whatever the client of this kind of remote raises
            raise PipelineError(
                f"The remote does not have everything: {_first_line(error)}\nRun it again; `dvc push -v` says more."
            ) from None
    return sent


def _records_of_runs(repo: Repo) -> set[str]:
    """The run cache of the default remote: the path of each record in it."""
    store = repo.cloud.get_remote_odb(hash_name="md5-dos2unix")
    runs = store.fs.join(store.path, "runs")
    found = store.fs.find(runs) if store.fs.exists(runs) else []
    return {store.fs.as_posix(store.fs.relpath(path, runs)) for path in found}


def _first_line(error: Exception) -> str:
    return masked(f"{str(error) or type(error).__name__}".splitlines()[0])[:100]
