"""Verify: are the outputs what this code makes of this data? Everything is made again in a clean clone and compared.

The clone has an empty cache and none of the user's settings, so nothing is restored that was not made there.
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

# On another processor or with another number of threads, sums are rounded in another order. With the default recipe,
# one thread instead of two, kernels without vector instructions (ATEN_CPU_CAPABILITY=default MKL_CBWR=COMPATIBLE) and
# both at once moved losses by 2.7e-6 at most and no accuracy at all; an Intel Xeon (family 6, model 207) after an AMD
# EPYC (family 26, model 2) losses by 1.3e-6 and one of 5,000 validation images. The bounds leave room for processors
# not tried: forty times that for losses, and 20 of the 10,000 test images, which is a fifth of the 95 % interval's half
# width. Of fewer images, ANSWERS may be others.
LOSS_TOLERANCE, ACCURACY_TOLERANCE, ANSWERS = 1e-4, 0.002, 2

METRICS = (TRAIN_METRICS, TEST_METRICS)
DRAWN = (str(PLOTS), str(EXPORT))  # by packages whose versions are not recorded
LISTED = 3


@dataclass(frozen=True)
class Verdict:
    """What became of one output when it was made again."""

    path: str
    verdict: str
    reason: str = ""


@dataclass(frozen=True)
class Verification:
    """A verdict on each output, and by key the recorded environment and the one here where they differ."""

    verdicts: list[Verdict]
    environment: dict[str, tuple[Any, Any]]

    @property
    def drifted(self) -> list[str]:
        return [verdict.path for verdict in self.verdicts if verdict.verdict == DRIFTED]


@dataclass(frozen=True)
class State:
    """The outputs of one run of the pipeline: md5s by path, and the content of those that are compared by number.

    fewest: one image's answer moves no accuracy by more than 1 / fewest, but F1, in which it counts twice.
    """

    md5s: dict[str, str]
    metrics: dict[str, float]
    environment: dict[str, Any]
    fewest: float = field(default=math.inf, compare=False)

    @classmethod
    def of(cls, folder: Path) -> "State":
        """Read dvc.lock and metrics/ of a checkout, and annotations where they are.

        Raises PipelineError if one of them is missing or broken.
        """
        md5s = md5s_in(_lock(folder))
        metrics = {f"{path.stem} {key}": number for path in METRICS for key, number in _numbers(folder / path).items()}
        match _json(folder / ENVIRONMENT):
            case [{"threads": int()} as environment]:
                return cls(md5s, metrics, environment, _fewest_images(folder / ANNOTATIONS))
        raise PipelineError(f"{ENVIRONMENT}: not a list of one record; `dvc repro` makes it anew")


def verify(revision: str | None = None) -> Verification:
    """Make every output of a revision again, in a clean clone with an empty cache, and compare.

    Without a revision it is this checkout that is verified: its code and parameters as they are, changes that are not
    committed included, and the files of its outputs as far as they are there. The rebuild uses the packages of this
    Python, and as many threads as the recorded environment. Raises PipelineError if there is nothing to compare with,
    or if the rebuild fails.
    """
    with tempfile.TemporaryDirectory(prefix="verify-") as folder:
        clone = _make_clone(Path(folder), revision)
        recorded = State.of(clone)
        broken = _not_as_locked(recorded.md5s, clone if revision else Path())
        made_by_other = stale(_lock(clone), _parameters(clone), lambda path: md5_here(clone / path))
        _rebuild(clone, Path(folder), recorded.environment["threads"])
        rebuilt = State.of(clone)
        verdicts = compare(recorded, rebuilt)
        for path in broken:
            reason = "the file is not the one that dvc.lock names" + _changed_images(Path(path), clone / path)
            verdicts[path] = Verdict(path, DRIFTED, reason)
    if made_by_other:
        verdicts[str(LOCK)] = Verdict(str(LOCK), DRIFTED, f"was made with other content of {', '.join(made_by_other)}")
    keys = recorded.environment | rebuilt.environment
    both = {key: (recorded.environment.get(key), rebuilt.environment.get(key)) for key in keys}
    return Verification(list(verdicts.values()), {key: pair for key, pair in both.items() if pair[0] != pair[1]})


def compare(recorded: State, rebuilt: State) -> dict[str, Verdict]:
    """A verdict on every output, by path.

    Data must be the same bytes. What is learnt may have other bytes in another environment; the metrics say whether it
    is as good: losses within LOSS_TOLERANCE, accuracies within ACCURACY_TOLERANCE, or what ANSWERS make of few images,
    the kept epoch the same. In the same environment it must be the same bytes.
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
            verdict = Verdict(path, DRIFTED, "not in dvc.lock" if before is None else "not made any more")
        elif Path(path) == ENVIRONMENT:
            verdict = Verdict(path, WITHIN, "another environment")
        elif path.startswith("data/"):
            verdict = Verdict(path, DRIFTED, "other data")
        elif of_this:
            worst = max(of_this, key=lambda key: moved[key] / (allowed[key] or 1e-9))
            reason = f"{worst} by {moved[worst]:.2g}, {allowed[worst]:.2g} allowed"
            verdict = Verdict(path, DRIFTED if beyond.intersection(of_this) else WITHIN, reason)
        elif same and path not in DRAWN:
            verdict = Verdict(path, DRIFTED, "other bytes in the same environment")
        else:
            verdict = Verdict(path, DRIFTED if beyond else WITHIN, "other bytes, judged by the metrics")
        verdicts[path] = verdict
    return verdicts


def _tolerance(key: str, fewest: float) -> float:
    if key.endswith("epoch"):
        return 0
    return LOSS_TOLERANCE if "loss" in key else max(ACCURACY_TOLERANCE, ANSWERS / fewest)


def _fewest_images(annotations: Path) -> float:
    """The images of validation or of test, or the classes times the test images of the smallest, whichever is least.

    So many count the same in an accuracy that is a mean over classes. Infinite if no annotations are there.
    """
    if not annotations.exists():
        return math.inf
    val, test = (read_annotations(annotations / f"{split}.csv").labels for split in ("val", "test"))
    _, of_class = np.unique(test, return_counts=True)
    numbers = (len(val), len(of_class) * int(of_class.min(initial=len(test))))
    return min((number for number in numbers if number), default=math.inf)


def _make_clone(folder: Path, revision: str | None) -> Path:
    """Clone the revision, or HEAD with the changes that are not committed, to some place in a folder.

    Returns the folder in the clone that is this one.
    """
    commit = commit_of(revision or "HEAD")
    if commit is None:
        raise PipelineError(f"{revision}: no such commit" if revision else "there is no commit here to verify")
    clone = folder.joinpath(*"12345678", "clone")  # so deep that `..` in params.yaml does not lead out of the folder
    project = clone / git("rev-parse", "--show-prefix")
    env = _clean_environment(folder)
    # A repository of its own that borrows the objects of this one, and so has commits that no branch holds, as those of
    # DVC's experiments. `git clone` would not give them of a shallow clone, and takes hooks from the user's templates.
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
    """The environment without variables such as GIT_DIR, which a hook has, and without the user's settings of Git.

    As with `core.autocrlf`, files would have other bytes, or with a filter or a hook, anything. The settings used
    instead lie in `folder`; they allow a repository that belongs to another user, which Git was asked about by now.
    """
    settings = folder / "gitconfig"
    settings.write_text(
        f"[safe]\n\tdirectory = *\n[core]\n\tattributesFile = {os.devnull}\n\texcludesFile = {os.devnull}\n"
    )
    own = {"GIT_CONFIG_GLOBAL": str(settings), "GIT_CONFIG_NOSYSTEM": "1", "GIT_ATTR_NOSYSTEM": "1"}
    return _without("GIT_") | own


def _link_own_files(project: Path, folder: Path) -> None:
    """Give the clone what params.yaml names and Git does not have, your own images and weights, by links to them.

    Nothing outside of `folder` is touched.
    """
    params = _parameters(project)
    for key in ("data_path", "weights"):
        path = Path(str(params.get(key) or ""))
        if path.is_absolute() or not params.get(key) or not is_there(path):
            continue
        link = Path(os.path.normpath(project / path))
        if folder not in link.parents:
            raise PipelineError(f"{PARAMS}: {key}: {path} leads too far out of the repository; give it from / on")
        if link.exists() and hash_path(link) == hash_path(path):
            continue
        if link.is_dir():  # data/own, of which Git has the page that explains it
            shutil.rmtree(link)
        link.unlink(missing_ok=True)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path.absolute(), target_is_directory=path.is_dir())


def _parameters(project: Path) -> dict[str, Any]:
    """What params.yaml of a checkout holds, unchecked. Raises PipelineError if it is not a mapping in YAML."""
    try:
        return dict(read_yaml(_content(project / PARAMS) or b"") or {})
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise PipelineError(f"{PARAMS}: not parameters in YAML: {' '.join(str(error).split())}; mend it") from None


def _git(*arguments: str, env: dict[str, str], given: bytes = b"") -> None:
    """Run git. Raises PipelineError with what it says if it fails."""
    done = subprocess.run(["git", *arguments], input=given, env=env, capture_output=True)
    if done.returncode != 0:
        raise PipelineError(f"the clone cannot be made: {done.stderr.decode(errors='replace').strip()}")


def _without(*prefixes: str) -> dict[str, str]:
    """The environment without variables that begin like this."""
    return {key: value for key, value in os.environ.items() if not key.startswith(prefixes)}


def _rebuild(clone: Path, folder: Path, threads: int) -> None:
    """Run all stages in the clone; what they print goes to standard error, as progress. Settings lie in `folder`."""
    env = _clean_environment(folder)
    env = {k: value for k, value in env.items() if not k.startswith(("DVC_", "MLFLOW_", "PYTHONPATH", "CLASSIFIER_"))}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    env["CLASSIFIER_THREADS"] = str(threads)
    for kind in ("DVC_GLOBAL_CONFIG_DIR", "DVC_SYSTEM_CONFIG_DIR", "DVC_SITE_CACHE_DIR"):
        env[kind] = str(folder / kind.lower())
    # Wherever the committed configuration says that the cache is
    (clone / ".dvc/config.local").write_text(f"[cache]\n    dir = {folder / 'cache'}\n")
    command = [sys.executable, "-m", "dvc", "repro", "--force"]
    with subprocess.Popen(command, cwd=clone, env=env, stdout=sys.stderr, start_new_session=True) as process:
        try:
            failed = process.wait() != 0
        except BaseException:
            os.killpg(process.pid, signal.SIGTERM)  # DVC, and the stage that it runs
            raise
    if failed:
        raise PipelineError("the rebuild failed: the lines above say in which stage, and why")


def _not_as_locked(md5s: dict[str, str], folder: Path) -> list[str]:
    """The outputs that are in a folder with another content than dvc.lock says."""
    return [path for path, md5 in md5s.items() if (folder / path).exists() and hash_path(folder / path) != md5]


def _changed_images(here: Path, rebuilt: Path) -> str:
    """Which rows of the image arrays differ from the rebuilt ones, for the reason of the verdict."""
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
    raise PipelineError(f"{LOCK}: missing or empty, so there is nothing to compare with; `dvc repro`, then commit it")


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _json(path: Path) -> Any:
    content = _content(path)
    name = "/".join(path.parts[-2:])
    if content is None:
        raise PipelineError(f"{name}: missing, so there is nothing to compare with; `dvc repro`, then commit it")
    try:
        return json.loads(content)
    except ValueError as error:
        raise PipelineError(f"{name}: not JSON: {error}") from None


def _numbers(path: Path) -> dict[str, float]:
    """The numbers of a metrics file by key, those of a list by key and place."""
    try:
        return {
            f"{key}{f'[{place}]' if isinstance(value, list) else ''}": float(number)
            for key, value in _json(path).items()
            for place, number in enumerate(value if isinstance(value, list) else [value])
        }
    except (AttributeError, TypeError, ValueError):
        raise PipelineError(f"{path.parent.name}/{path.name}: not numbers by name; `dvc repro` makes it anew") from None
