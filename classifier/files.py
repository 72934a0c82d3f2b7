"""The pipeline's files: their names, how they are written and hashed. Paths are relative to dvc.yaml."""

import errno
import hashlib
import itertools
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import psutil
import yaml

from classifier.errors import NO_ROOM, PipelineError, disk_fault

PARAMS = Path("params.yaml")
PIPELINE = Path("dvc.yaml")
LOCK = Path("dvc.lock")
CHECKED = Path("data/checked")
RAW = Path("data/raw")
IMAGES = Path("data/images.zip")
ANNOTATIONS = Path("data/annotations")
ORIGINALS = Path("data/originals.csv")
WEIGHTS = Path("models/model_weights.pth")
EXPORT = Path("models/export")
METRICS = Path("metrics")
TRAIN_METRICS = Path("metrics/train.json")
EPOCHS = Path("metrics/epochs.csv")
ENVIRONMENT = Path("metrics/environment.json")
TEST_METRICS = Path("metrics/test.json")
CLASS_METRICS = Path("metrics/classes.csv")
PREDICTIONS = Path("metrics/predictions.csv")
PLOTS = Path("metrics/plots")

MANY_FILES = 100_000
MOST_MARKS = 2_000  # in YAML that is read in C
CLOCK_SECONDS = 60  # by which a process may seem to have started too late: clocks are set


def exported_name(export_format: str) -> str:
    """The name of the file in EXPORT that holds a format of `export_formats`; int8 is ONNX too."""
    return f"model.{'int8.onnx' if export_format == 'int8' else export_format}"


def repository_root() -> Path:
    """The main checkout, also when DVC runs an experiment in a temporary copy of it."""
    if root := os.environ.get("DVC_ROOT"):
        return Path(root)
    here = Path.cwd()
    return next((folder for folder in (here, *here.parents) if (folder / ".dvc").is_dir()), here)


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Give a path to write to that becomes `path` when the block ends without an error.

    The file (or folder) is written under its final name in a temporary folder beside the target,
    because torch.save and torch.export.save put the file's name into its bytes. Until the block has
    ended, `path` is what it was before.
    """
    with temporary_folder(path) as folder:
        temporary = folder / path.name
        yield temporary
        if temporary.is_dir() or path.is_dir():
            _replace_folder(path, temporary, aside=folder)
        else:
            temporary.replace(path)


def _replace_folder(path: Path, new: Path, aside: Path) -> None:
    """Put a new folder, or file, where there may be a folder, which goes aside: it cannot be replaced as a file can."""
    for number in itertools.count():
        with suppress(FileNotFoundError):
            path.replace(aside / f"old{number}")
        try:
            new.replace(path)
        except OSError as error:
            if error.errno not in (
                errno.ENOTEMPTY,
                errno.EEXIST,
                errno.EISDIR,
                errno.ENOTDIR,
            ):  # another process has just put one there
                raise
        else:
            return


@contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """Give a folder beside `path`, on the same file system, for as long as the block lasts.

    What a killed process has left of such folders for this path is removed. An error for lack of room or of access
    that the block meets in writing names `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{path.name}.*"):
        process = left.name.removeprefix(f".{path.name}.").split(".")[0]
        if process.isdecimal() and not _is_alive(int(process), left):
            shutil.rmtree(left, ignore_errors=True)
    prefix = f".{path.name}.{os.getpid()}."
    try:
        with tempfile.TemporaryDirectory(prefix=prefix, dir=path.parent) as folder:
            yield Path(folder)
    except Exception as error:
        if (fault := disk_fault(error)) and (fault.errno in NO_ROOM or prefix in str(fault.filename)):
            fault.filename = str(path)
        raise


def _is_alive(process: int, folder: Path) -> bool:
    """Whether the process that made a folder is there: in containers, others often have the same number later."""
    try:
        return bool(psutil.Process(process).create_time() < folder.stat().st_mtime + CLOCK_SECONDS)
    except (psutil.NoSuchProcess, FileNotFoundError):
        return False


def write_json(path: Path, content: Any) -> None:
    """Write `content` as indented JSON, atomically. Floats keep every digit they need to be read back exactly."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read a JSON file that an earlier stage wrote. Raises PipelineError if it is missing, or no JSON."""
    try:
        return json.loads(existing(path).read_bytes())
    except (ValueError, RecursionError) as error:
        raise PipelineError(f"{path}: not as the pipeline writes it ({error}); `dvc repro` makes it anew") from None


class _Rules(yaml.constructor.SafeConstructor):
    """YAML 1.1 as PyYAML reads it, but 1e-06, which DVC writes, and 1.5e3 are numbers as in YAML 1.2.

    And without its merge key `<<`: a few lines of it, one within the other, take all memory.
    """

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(None, None, "the key << is not taken", key.start_mark)
        super().flatten_mapping(node)


class _Loader(_Rules, yaml.SafeLoader):
    """In Python, which tells nesting that is too deep for it."""


class _FastLoader(_Rules, getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """In C where PyYAML has it, seven times as fast; very deep nesting crashes it."""


for _loader in (_Loader, _FastLoader):
    _loader.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$"),
        list("-+.0123456789"),
    )


def read_yaml(content: str | bytes) -> Any:
    """What params.yaml or dvc.lock holds, unchecked. Raises yaml.YAMLError, or ValueError, if it is not YAML."""
    text = content.decode("latin-1") if isinstance(content, bytes) else content
    # What a deeper level begins with; by indentation alone, deep levels take long lines
    is_flat = sum(text.count(mark) for mark in "[{-?") < MOST_MARKS
    try:
        return yaml.load(content, Loader=_FastLoader if is_flat else _Loader)  # noqa: S506, both are SafeLoaders
    except (yaml.YAMLError, ValueError):
        raise
    except Exception as error:  # PyYAML's own, of `!!bool x`, `!!int ''`, or lists in lists without end
        raise ValueError(f"{type(error).__name__}: {error}") from None


def is_there(path: Path) -> bool:
    """As `path.exists()`, which raises OSError for a name that is too long."""
    return os.path.exists(path)  # noqa: PTH110


def existing(path: Path) -> Path:
    """Give `path` back if it is there. Raises PipelineError, with the way to make it, if not."""
    if not path.exists():
        raise PipelineError(f"{path}: missing; `dvc repro` makes it, `classifier restore` or `dvc pull` bring it back")
    return path


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


def hash_file(path: Path, algorithm: str = "md5") -> str:
    """Hexadecimal digest of a file's bytes; md5 is what DVC names files by."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def hash_path(path: Path) -> str:
    """The md5 by which dvc.lock knows a file, or a folder: of the sorted list of its files, with `.dir` behind it."""
    if path.is_file():
        return hash_file(path)
    paths = [file for file in path.rglob("*") if file.is_file()]
    pool = ThreadPoolExecutor()  # hashing lets other threads run
    try:
        # Of small files there may be a million, each of which would wait for its turn in memory
        md5s = list((pool.map if len(paths) < MANY_FILES else map)(hash_file, paths))
    finally:
        pool.shutdown(cancel_futures=True)
    names = (file.relative_to(path).as_posix() for file in paths)
    listed = [{"md5": md5, "relpath": name} for md5, name in zip(md5s, names, strict=True)]
    listed.sort(key=lambda entry: tuple(entry["relpath"].split("/")))
    return f"{hash_bytes(json.dumps(listed, sort_keys=True).encode())}.dir"


def hash_bytes(content: bytes) -> str:
    """Hexadecimal md5 of bytes, which DVC names files by."""
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


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
