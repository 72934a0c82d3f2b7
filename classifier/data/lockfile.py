"""What dvc.lock says of outputs and dependencies."""

from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from classifier.pipeline.errors import PipelineError
from classifier.pipeline.outputs import existing, hash_path
from classifier.pipeline.paths import CHECKED, LOCK
from classifier.pipeline.safe_yaml import read_yaml


def verified(path: Path) -> Path:
    """Give an output of an earlier stage back if it is what dvc.lock says, or there is nothing of it there.

    Raises PipelineError if it is missing or was changed.
    """
    recorded = locked_md5s().get(str(path))
    if recorded and hash_path(existing(path)) != recorded:
        # Metrics are not in DVC's cache
        back = "" if path.suffix == ".json" else f"`dvc checkout --force {path}` brings back what was written, "
        raise PipelineError(f"{path}: changed since the stage that wrote it; {back}`dvc repro` makes it again")
    return existing(path)


def read_lock(lock: Path = LOCK) -> dict[str, Any]:
    """What dvc.lock holds, nothing where there is none. Raises PipelineError if it is not one that DVC wrote."""
    if not lock.exists():
        return {}
    try:
        return _parsed_lock(lock.read_bytes())
    except (yaml.YAMLError, ValueError, AttributeError, TypeError, KeyError):
        raise PipelineError(
            f"{lock.name}: not as DVC writes it, as with the marks of a merge in it; `git restore {lock.name}` brings "
            "back the one that was committed, and once it is gone, `dvc repro` makes another"
        ) from None


@lru_cache(maxsize=1)  # a stage asks for each of its inputs
def _parsed_lock(content: bytes) -> dict[str, Any]:
    lock = dict(read_yaml(content) or {})
    md5s_in(lock)
    return lock


def locked_md5s(lock: Path = LOCK) -> dict[str, str]:
    """Map the path of every output in dvc.lock to its md5 (a folder's ends in `.dir`).

    While a stage runs, the entries of the stages before it are current and its own is of its last run.
    Raises PipelineError if the file is not one of DVC's.
    """
    return md5s_in(read_lock(lock))


def md5s_in(lock: dict[str, Any], kind: str = "outs") -> dict[str, str]:
    """Map the path of every output (or of every dependency: "deps") in a parsed dvc.lock to its md5.

    Without CHECKED, which is no result.
    """
    entries = [entry for stage in lock.get("stages", {}).values() for entry in stage.get(kind, [])]
    return {entry["path"]: entry["md5"] for entry in entries if "md5" in entry and entry["path"] != str(CHECKED)}
