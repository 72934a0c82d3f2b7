"""Read dvc.lock, and compare files with the md5s in it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from classifier.pipeline.errors import PipelineError
from classifier.pipeline.outputs import existing, hash_path
from classifier.pipeline.paths import CHECKED
from classifier.pipeline.safe_yaml import read_yaml


def verified(path: Path, md5s: Mapping[str, str]) -> Path:
    """Return `path` if its content has the md5 that dvc.lock records, or dvc.lock does not list it.

    path: an output of an earlier stage. md5s: what `locked_md5s` returns.
    Raises PipelineError if it is missing or was changed.
    """
    recorded = md5s.get(str(path))
    if recorded and hash_path(existing(path)) != recorded:
        # Metrics are not in DVC's cache
        back = "" if path.suffix == ".json" else f"`dvc checkout --force {path}` brings back what was written, "
        raise PipelineError(f"{path}: changed since the stage that wrote it; {back}`dvc repro` makes it again")
    return existing(path)


def read_lock(lock: Path) -> dict[str, Any]:
    """Return the content of dvc.lock, {} if there is none. Raises PipelineError if DVC did not write it."""
    if not lock.exists():
        return {}
    try:
        content = dict(read_yaml(lock.read_bytes()) or {})
        md5s_in(content)
    except (yaml.YAMLError, ValueError, AttributeError, TypeError, KeyError):
        raise PipelineError(
            f"{lock.name}: not as DVC writes it, as with the marks of a merge in it; `git restore {lock.name}` brings "
            "back the one that was committed, and once it is gone, `dvc repro` makes another"
        ) from None
    return content


def locked_md5s(lock: Path) -> dict[str, str]:
    """Map the path of every output in dvc.lock to its md5 (that of a folder ends in `.dir`).

    While a stage runs, the entries of earlier stages are current; its own entry is from its last run.
    Raises PipelineError if DVC did not write the file.
    """
    return md5s_in(read_lock(lock))


def md5s_in(lock: dict[str, Any], kind: str = "outs") -> dict[str, str]:
    """Map the path of every output (kind "outs") or dependency ("deps") in a parsed dvc.lock to its md5.

    CHECKED is left out: it is not a result.
    """
    entries = [entry for stage in lock.get("stages", {}).values() for entry in stage.get(kind, [])]
    return {entry["path"]: entry["md5"] for entry in entries if "md5" in entry and entry["path"] != str(CHECKED)}
