"""What DVC's cache and remote hold, and sending from one to the other.

This module and experiment_queue.py are the only ones that use DVC's Python interface.
"""

import json
from collections.abc import Iterable
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

from dvc.exceptions import DvcException, NotDvcRepoError
from dvc.repo import Repo
from dvc.scm import SCMError

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
