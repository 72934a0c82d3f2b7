"""DVC's cache and remote: look up outputs, restore them, and push results.

Only this module and experiment_queue.py use DVC's Python interface.
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
    """Look up outputs by md5 in the cache of this checkout and in its default remote, if there is one."""

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
        """DVC's object store of the default remote; None if there is none, or if it cannot be opened."""
        if not self._repo.config["core"].get("remote"):
            return None
        try:
            return self._repo.cloud.get_remote_odb(command="lineage")
        except Exception as error:  # for example, the package for this type of remote is missing
            self._remote_fault = f"not reachable: {_first_line(error)}"
            return None

    def in_cache(self, md5: str) -> str:
        """Return whether the cache has an output: "yes", "no", or "in part" if files of a folder are missing."""
        return self._status(self._repo.cache.local, md5)

    def in_remote(self, md5: str) -> str:
        """Return the same for the remote; "none" if there is no remote, or why it is not reachable."""
        if self.remote is None:
            return self._remote_fault
        try:
            return self._status(self.remote, md5)
        except Exception as error:  # the type depends on the remote's client
            return f"not reachable: {_first_line(error)}"

    def files(self, md5: str) -> dict[str, str] | None:
        """Return the md5 of each file of a folder by relative path; None if neither cache nor remote has the list."""
        if md5 not in self._trees:
            content = self.read(md5)
            self._trees[md5] = (
                None if content is None else {entry["relpath"]: entry["md5"] for entry in json.loads(content)}
            )
        return self._trees[md5]

    def read(self, md5: str) -> bytes | None:
        """Return the content with this md5, from the cache or the remote; None if neither has it."""
        for store in (self._repo.cache.local, self.remote):
            try:
                if store is not None:
                    return bytes(store.fs.cat_file(store.oid_to_path(md5)))
            except Exception:  # noqa: S112, try the next store if this one fails
                continue
        return None

    def _status(self, store: Any, md5: str) -> str:
        if not store.exists(md5):
            # `exists` returns False if an HTTP server is down; reading then raises the actual error
            with suppress(FileNotFoundError):
                store.fs.cat_file(store.oid_to_path(md5))
            return NO
        if md5.endswith(".dir"):
            wanted: Iterable[str] = set((self.files(md5) or {}).values())
            if set(store.oids_exist(list(wanted))) != wanted:
                return IN_PART
        return YES


def open_repository() -> Repo:
    """Open the repository of the current folder. Raises PipelineError if it is not a repository of Git and DVC."""
    try:
        return Repo()
    except (NotDvcRepoError, SCMError) as error:
        raise PipelineError(
            f"{Path.cwd()}: not a repository of Git and DVC ({_first_line(error)}); run `git init`, or use a clone"
        ) from None


class Restored(NamedTuple):
    """The result of `restore_outputs`, by paths of outputs.

    as_locked: restored from the cache or the remote, as in dvc.lock. from_runs: restored from a run of the same code,
    data and parameters; dvc.lock was updated. missing: not available. aside: moved away, because no cache has them.
    remote_fault: why the remote did not provide all requested outputs, or an empty string.
    """

    as_locked: list[str]
    from_runs: list[str]
    missing: list[str]
    aside: list[str]
    remote_fault: str


@contextmanager
def lock_storage() -> Iterator[Storage]:
    """Yield the storage while DVC's lock keeps other DVC commands out of this repository.

    A corrupt rwlock file, which a killed DVC can leave, is removed.
    Raises PipelineError if a DVC command is running, or if DVC raises an error in the block.
    """
    with Storage() as storage:
        for name in ("dvc", "dvc_data"):
            logging.getLogger(name).setLevel(logging.ERROR)  # the caller reports what is done
        try:
            with lock_repo(storage._repo):
                if processes := _processes_of_stages(Path(storage._repo.tmp_dir or "", "rwlock")):
                    raise PipelineError(f"DVC runs a stage (process {processes[0]}): wait until it has ended")
                yield storage
        except LockError:
            raise PipelineError("Another DVC command is running here: wait until it has ended") from None
        except DvcException as error:
            raise PipelineError(f"DVC: {_first_line(error)}") from None


def _processes_of_stages(rwlock: Path) -> list[int]:
    """Return the running processes that hold DVC's rwlock; remove the file if it is corrupt."""
    try:
        holders = json.loads(rwlock.read_bytes() or b"{}")
    except FileNotFoundError:
        return []
    except ValueError:
        rwlock.unlink()
        return []
    found = [holder["pid"] for holder in holders.get("write", {}).values()]
    found += [holder["pid"] for several in holders.get("read", {}).values() for holder in several]
    return sorted({process for process in found if psutil.pid_exists(process)})


def restore_outputs(storage: Storage, aside: Path) -> Restored:
    """Restore the outputs of all stages as in dvc.lock; for those not available, use DVC's run cache.

    `dvc repro` does not do this (DVC 3.67). If the entry of a stage in dvc.lock is up to date, it looks only for the
    outputs in that entry. If these come from another machine and no cache here has them, it runs the stage again, even
    if the run cache has the outputs of a run on this machine.
    storage: from `lock_storage`. aside: a folder for outputs that would otherwise be lost.
    """
    repo = storage._repo
    stages = [stage for stage in plan_repro(repo.index.graph) if stage.cmd]
    cached = [out for stage in stages for out in stage.outs if out.use_cache]
    moved = []
    for out in cached:
        if out.exists and storage.in_cache(str(out.get_hash().value)) != YES:
            _move(Path(out.def_path), aside)
            moved.append(str(out))
    # The user's own data tracked by DVC is restored if it is missing, and otherwise not touched
    wanted = [out for out in repo.index.outs if out.use_cache and out.hash_info and (out in cached or not out.exists)]
    remote_fault, changed = "", []
    if absent := [out.fs_path for out in wanted if storage.in_cache(out.hash_info.value) != YES]:
        remote_fault = _fetch(repo, storage, absent)
    if wanted:  # without targets, `checkout` would remove files that are not in dvc.lock
        done = repo.checkout([out.fs_path for out in wanted], force=True, allow_missing=True)
        changed = [name.rstrip("/") for kind in ("added", "modified") for name in done[kind]]

    from_runs: list[str] = []
    missing: list[str] = []
    for stage in stages:
        is_outdated = any(dep.def_path in from_runs and dep.changed() for dep in stage.deps)
        outs = [out.def_path for out in stage.outs if is_outdated or out.workspace_status()]
        if outs and _restore_from_run_cache(repo, stage):
            from_runs += [out.def_path for out in stage.outs]
        else:
            missing += outs
    as_locked = sorted(name for name in changed if name not in (*from_runs, *missing))
    return Restored(as_locked, from_runs, missing, moved, remote_fault)


def _move(path: Path, folder: Path) -> None:
    target = folder / path
    if target.is_dir():
        shutil.rmtree(target)
    target.unlink(missing_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(path, target)


def _fetch(repo: Repo, storage: Storage, targets: list[str]) -> str:
    """Fetch outputs from the remote, if there is one; return why some are missing, or an empty string."""
    if storage.remote is None:
        return storage._remote_fault
    try:
        repo.fetch(targets)
    except Exception as error:  # DvcException, or an error of the remote's client
        return _first_line(error)
    return ""


def _restore_from_run_cache(repo: Repo, stage: Any) -> bool:
    """Restore the outputs of a stage from DVC's run cache, as `dvc repro` does; return False if it has no such run.

    First look for the outputs that dvc.lock lists, if the dependencies are unchanged; then for any outputs of the
    current dependencies.
    """
    runs = repo.stage_cache
    for any_outputs in (False, True):
        try:
            if any_outputs:
                for out in stage.outs:
                    out.hash_info = HashInfo()
                stage.save_deps()
            elif not stage.deps_cached():
                continue
            runs.restore(stage, dry=True)
        except DvcException:  # no such run, or a dependency is missing
            continue
        stage.remove_outs()
        runs.restore(stage)
        stage.save(run_cache=False)
        stage.commit()
        stage.dump(update_pipeline=False)
        return True
    return False


def push_results() -> int:
    """Push the run cache and all cached outputs that it refers to to the default remote; return the number of files.

    `dvc push --run-cache` is not enough (DVC 3.67): it pushes only outputs in the workspace, without those in Git such
    as metrics, and another clone cannot restore a stage without them. It also ignores records that fail to upload.
    DVC warns of outputs that neither the cache nor the remote has, for example after `dvc gc`.
    Raises PipelineError if an upload fails; the next call continues from there.
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
        except Exception as error:  # DvcException, or an error of the remote's client
            raise PipelineError(
                f"The push is incomplete: {_first_line(error)}\nRun it again; `dvc push -v` prints details."
            ) from None
    return sent


def _records_of_runs(repo: Repo) -> set[str]:
    """Return the path of each record in the run cache of the default remote."""
    store = repo.cloud.get_remote_odb(hash_name="md5-dos2unix")
    runs = store.fs.join(store.path, "runs")
    found = store.fs.find(runs) if store.fs.exists(runs) else []
    return {store.fs.as_posix(store.fs.relpath(path, runs)) for path in found}


def _first_line(error: Exception) -> str:
    return masked(f"{str(error) or type(error).__name__}".splitlines()[0])[:100]
