"""Verify that the outputs can be rebuilt: run all stages in a clean clone and compare the outputs.

The clone has an empty cache and none of the user's settings, so DVC cannot restore outputs instead of rebuilding them.
"""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from classifier.data.arrays import ImageArrays, differing_rows
from classifier.data.lockfile import md5s_in, read_lock
from classifier.pipeline.annotations import read_annotations
from classifier.pipeline.errors import PipelineError
from classifier.pipeline.outputs import hash_path, is_there
from classifier.pipeline.paths import (
    ANNOTATIONS,
    ENVIRONMENT,
    EXPORT,
    IMAGES,
    LOCK,
    PARAMS,
    PLOTS,
    TEST_METRICS,
    TRAIN_METRICS,
)
from classifier.pipeline.safe_yaml import read_yaml
from classifier.provenance.lineage import md5_here, stale
from classifier.tracking.git import changes, commit_of, git

IDENTICAL, WITHIN, DRIFTED = "bit-identical", "within tolerance", "DRIFTED"

# Other processors and other numbers of threads sum, and so round, in another order. Measured with the default recipe:
# one thread instead of two, kernels without vector instructions (ATEN_CPU_CAPABILITY=default MKL_CBWR=COMPATIBLE), and
# both, changed losses by at most 2.7e-6 and no accuracy. An Intel Xeon (family 6, model 207) instead of an AMD EPYC
# (family 26, model 2) changed losses by 1.3e-6 and the prediction of one of 5,000 validation images. The tolerances
# leave room for other processors: forty times the change of the losses, and 20 of the 10,000 test images, which is a
# fifth of the half width of the 95 % interval. On small splits, PREDICTIONS predictions may differ.
LOSS_TOLERANCE, ACCURACY_TOLERANCE, PREDICTIONS = 1e-4, 0.002, 2

METRICS = (TRAIN_METRICS, TEST_METRICS)
UNRECORDED = (str(PLOTS), str(EXPORT))  # written by packages whose versions ENVIRONMENT does not record
LISTED = 3  # images in a message


@dataclass(frozen=True)
class Verdict:
    """The result of comparing one output with its rebuild: IDENTICAL, WITHIN or DRIFTED, and why."""

    path: str
    verdict: str
    reason: str = ""


@dataclass(frozen=True)
class Verification:
    """A verdict on each output, and the recorded and current values of the environment's differing keys."""

    verdicts: list[Verdict]
    environment: dict[str, tuple[Any, Any]]

    @property
    def drifted(self) -> list[str]:
        return [verdict.path for verdict in self.verdicts if verdict.verdict == DRIFTED]


@dataclass(frozen=True)
class State:
    """The outputs of a pipeline run: md5s by path, metrics by name, and the environment.

    fewest: one prediction changes an accuracy by at most 1 / fewest, and F1 by at most twice as much.
    """

    md5s: dict[str, str]
    metrics: dict[str, float]
    environment: dict[str, Any]
    fewest: float = field(default=math.inf, compare=False)

    @classmethod
    def of(cls, folder: Path) -> "State":
        """Read dvc.lock, metrics/ and, if they exist, the annotations of a checkout.

        Raises PipelineError if dvc.lock or a file of metrics/ is missing or damaged.
        """
        md5s = md5s_in(_lock(folder))
        metrics = {f"{path.stem} {key}": number for path in METRICS for key, number in _numbers(folder / path).items()}
        match _json(folder / ENVIRONMENT):
            case [{"threads": int()} as environment]:
                return cls(md5s, metrics, environment, _fewest_images(folder / ANNOTATIONS))
        raise PipelineError(f"{ENVIRONMENT}: not a list of one record; `dvc repro` writes it again")


def verify(revision: str | None = None) -> Verification:
    """Rebuild every output of a revision in a clean clone with an empty cache, and compare.

    Without a revision, verify this checkout: its code and parameters with uncommitted changes, and the files of its
    outputs that exist. The rebuild uses the packages of this Python and the recorded number of threads.
    Raises PipelineError if there is nothing to compare with, or if the rebuild fails.
    """
    with tempfile.TemporaryDirectory(prefix="verify-") as folder:
        clone = _make_clone(Path(folder), revision)
        recorded = State.of(clone)
        changed = _changed_outputs(recorded.md5s, clone if revision else Path())
        outdated = stale(_lock(clone), _parameters(clone), lambda path: md5_here(clone / path))
        _rebuild(clone, Path(folder), recorded.environment["threads"])
        rebuilt = State.of(clone)
        verdicts = compare(recorded, rebuilt)
        for path in changed:
            reason = f"the file here differs from {LOCK}" + _changed_images(Path(path), clone / path)
            verdicts[path] = Verdict(path, DRIFTED, reason)
    if outdated:
        verdicts[str(LOCK)] = Verdict(str(LOCK), DRIFTED, f"changed since it was written: {', '.join(outdated)}")
    keys = recorded.environment | rebuilt.environment
    both = {key: (recorded.environment.get(key), rebuilt.environment.get(key)) for key in keys}
    return Verification(list(verdicts.values()), {key: pair for key, pair in both.items() if pair[0] != pair[1]})


def compare(recorded: State, rebuilt: State) -> dict[str, Verdict]:
    """Return a verdict on every output, by path.

    Data must be bit-identical. In the same environment, so must all other outputs except UNRECORDED. In another
    environment their bytes may differ if all metrics are within tolerance: losses within LOSS_TOLERANCE, accuracies
    within ACCURACY_TOLERANCE or PREDICTIONS predictions, whichever is more, and the same best epoch.
    """
    same = recorded.environment == rebuilt.environment
    moved = {
        key: abs(rebuilt.metrics.get(key, float("nan")) - value)
        for key, value in recorded.metrics.items()
        if rebuilt.metrics.get(key) != value
    }
    allowed = {key: 0.0 if same else _tolerance(key, rebuilt.fewest) for key in moved}
    beyond = {key for key in moved if not moved[key] <= allowed[key]}
    verdicts = {}
    for path in recorded.md5s | rebuilt.md5s:
        before, after = recorded.md5s.get(path), rebuilt.md5s.get(path)
        of_this = [key for key in moved if Path(path) in METRICS and key.startswith(Path(path).stem)]
        if before == after:
            verdict = Verdict(path, IDENTICAL)
        elif before is None or after is None:
            verdict = Verdict(path, DRIFTED, "not in dvc.lock" if before is None else "not rebuilt")
        elif Path(path) == ENVIRONMENT:
            verdict = Verdict(path, WITHIN, "another environment")
        elif path.startswith("data/"):
            verdict = Verdict(path, DRIFTED, "different data")
        elif of_this:
            worst = max(of_this, key=lambda key: moved[key] / (allowed[key] or 1e-9))
            reason = f"{worst} by {moved[worst]:.2g}, {allowed[worst]:.2g} allowed"
            verdict = Verdict(path, DRIFTED if beyond.intersection(of_this) else WITHIN, reason)
        elif same and path not in UNRECORDED:
            verdict = Verdict(path, DRIFTED, "different bytes in the same environment")
        else:
            verdict = Verdict(path, DRIFTED if beyond else WITHIN, "different bytes, judged by the metrics")
        verdicts[path] = verdict
    return verdicts


def _tolerance(key: str, fewest: float) -> float:
    if key.endswith("epoch"):
        return 0
    return LOSS_TOLERANCE if "loss" in key else max(ACCURACY_TOLERANCE, PREDICTIONS / fewest)


def _fewest_images(annotations: Path) -> float:
    """Return the number n such that one prediction changes an accuracy by at most 1 / n; infinity without annotations.

    That is the smallest of the number of validation images, the number of test images, and the number of classes times
    the test images of the smallest class: the last applies to accuracies that are means over classes.
    """
    if not annotations.exists():
        return math.inf
    val, test = (read_annotations(annotations / f"{split}.csv").labels for split in ("val", "test"))
    _, of_class = np.unique(test, return_counts=True)
    numbers = (len(val), len(of_class) * int(of_class.min(initial=len(test))))
    return min((number for number in numbers if number), default=math.inf)


def _make_clone(folder: Path, revision: str | None) -> Path:
    """Clone the revision, or HEAD with the uncommitted changes, into a folder.

    Return the folder in the clone that corresponds to the current one.
    """
    commit = commit_of(revision or "HEAD")
    if commit is None:
        raise PipelineError(f"{revision}: no such commit" if revision else "there is no commit here to verify")
    clone = folder.joinpath(*"12345678", "clone")  # nested, so that `..` in params.yaml does not lead out of `folder`
    project = clone / git("rev-parse", "--show-prefix")
    env = _clean_environment(folder)
    # The clone shares the objects of this repository, and so has commits that are on no branch, such as those of DVC's
    # experiments. `git clone` of a shallow clone would omit them, and it installs hooks from the user's templates.
    _git("init", "--quiet", "--template=", str(clone), env=env)
    (clone / ".git/info").mkdir(exist_ok=True)
    (clone / ".git/objects/info/alternates").write_text(
        f"{Path(git('rev-parse', '--git-path', 'objects')).resolve()}\n"
    )
    if (shallow := Path(git("rev-parse", "--git-path", "shallow"))).is_file():
        shutil.copyfile(shallow, clone / ".git/shallow")
    _git("-C", str(clone), "checkout", "--quiet", "--detach", commit, env=env)
    if revision is None and (patch := changes(".")[1]):
        _git("-C", str(project), "apply", "--whitespace=nowarn", "-", given=patch, env=env)
    _link_own_files(project, folder)
    return project


def _clean_environment(folder: Path) -> dict[str, str]:
    """Return the environment without variables such as GIT_DIR, which hooks set, and without the user's Git settings.

    Settings such as `core.autocrlf`, filters and hooks would change the bytes of files. The replacement settings are
    written to `folder`. They allow a repository of another user: Git has already accepted the repository by now.
    """
    settings = folder / "gitconfig"
    settings.write_text(
        f"[safe]\n\tdirectory = *\n[core]\n\tattributesFile = {os.devnull}\n\texcludesFile = {os.devnull}\n"
    )
    own = {"GIT_CONFIG_GLOBAL": str(settings), "GIT_CONFIG_NOSYSTEM": "1", "GIT_ATTR_NOSYSTEM": "1"}
    return _without("GIT_") | own


def _link_own_files(project: Path, folder: Path) -> None:
    """Link files that params.yaml names and Git does not have, the user's own images and weights, into the clone.

    Nothing outside `folder` is changed. Raises PipelineError if a link would be outside.
    """
    params = _parameters(project)
    for key in ("data_path", "weights"):
        path = Path(str(params.get(key) or ""))
        if path.is_absolute() or not params.get(key) or not is_there(path):
            continue
        link = Path(os.path.normpath(project / path))
        if folder not in link.parents:
            raise PipelineError(f"{PARAMS}: {key}: {path} leads too far out of the repository; use an absolute path")
        if link.exists() and hash_path(link) == hash_path(path):
            continue
        if link.is_dir():  # data/own, which has a README in Git
            shutil.rmtree(link)
        link.unlink(missing_ok=True)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path.absolute(), target_is_directory=path.is_dir())


def _parameters(project: Path) -> dict[str, Any]:
    """Read params.yaml of a checkout without checking it. Raises PipelineError if it is not a mapping in YAML."""
    try:
        return dict(read_yaml(_content(project / PARAMS) or b"") or {})
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise PipelineError(f"{PARAMS}: not parameters in YAML: {' '.join(str(error).split())}; correct it") from None


def _git(*arguments: str, env: dict[str, str], given: bytes = b"") -> None:
    """Run git. Raises PipelineError with its error output if it fails."""
    done = subprocess.run(["git", *arguments], input=given, env=env, capture_output=True)
    if done.returncode != 0:
        raise PipelineError(f"cannot create the clone: {done.stderr.decode(errors='replace').strip()}")


def _without(*prefixes: str) -> dict[str, str]:
    """Return the environment without variables with these prefixes."""
    return {key: value for key, value in os.environ.items() if not key.startswith(prefixes)}


def _rebuild(clone: Path, folder: Path, threads: int) -> None:
    """Run all stages in the clone, with their output on standard error. folder: for DVC's and Git's settings."""
    env = _clean_environment(folder)
    env = {k: value for k, value in env.items() if not k.startswith(("DVC_", "MLFLOW_", "PYTHONPATH", "CLASSIFIER_"))}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    env["CLASSIFIER_THREADS"] = str(threads)
    for kind in ("DVC_GLOBAL_CONFIG_DIR", "DVC_SYSTEM_CONFIG_DIR", "DVC_SITE_CACHE_DIR"):
        env[kind] = str(folder / kind.lower())
    # This overrides the cache folder of the committed configuration
    (clone / ".dvc/config.local").write_text(f"[cache]\n    dir = {folder / 'cache'}\n")
    command = [sys.executable, "-m", "dvc", "repro", "--force"]
    with subprocess.Popen(command, cwd=clone, env=env, stdout=sys.stderr, start_new_session=True) as process:
        try:
            failed = process.wait() != 0
        except BaseException:
            os.killpg(process.pid, signal.SIGTERM)  # DVC and the stage that it runs
            raise
    if failed:
        raise PipelineError("the rebuild failed: see the lines above for the stage and the reason")


def _changed_outputs(md5s: dict[str, str], folder: Path) -> list[str]:
    """Return the outputs in a folder whose content differs from dvc.lock."""
    return [path for path, md5 in md5s.items() if (folder / path).exists() and hash_path(folder / path) != md5]


def _changed_images(here: Path, rebuilt: Path) -> str:
    """Name the rows that differ from the rebuilt ones, as the end of a reason; empty if `here` is not IMAGES."""
    if here != IMAGES or not here.exists():
        return ""
    try:
        rows = differing_rows(ImageArrays(here), ImageArrays(rebuilt))
    except PipelineError as error:
        return f", and {error}"
    more = f" and {len(rows) - LISTED} more" if len(rows) > LISTED else ""
    return f"; differing rows: {', '.join(map(str, rows[:LISTED]))}{more}" if rows else "; the images are the same"


def _lock(folder: Path) -> dict[str, Any]:
    if lock := read_lock(folder / LOCK):
        return lock
    raise PipelineError(
        f"{LOCK}: missing or empty, so there is nothing to compare with; run `dvc repro`, then commit it"
    )


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _json(path: Path) -> Any:
    content = _content(path)
    name = "/".join(path.parts[-2:])
    if content is None:
        raise PipelineError(f"{name}: missing, so there is nothing to compare with; run `dvc repro`, then commit it")
    try:
        return json.loads(content)
    except ValueError as error:
        raise PipelineError(f"{name}: not JSON: {error}") from None


def _numbers(path: Path) -> dict[str, float]:
    """Return the numbers in a metrics file by key; numbers in a list by key and position."""
    try:
        return {
            f"{key}{f'[{place}]' if isinstance(value, list) else ''}": float(number)
            for key, value in _json(path).items()
            for place, number in enumerate(value if isinstance(value, list) else [value])
        }
    except (AttributeError, TypeError, ValueError):
        name = f"{path.parent.name}/{path.name}"
        raise PipelineError(f"{name}: not numbers by name; `dvc repro` writes it again") from None
