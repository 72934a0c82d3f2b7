"""Lineage: the data, code and parameters of a model file, MLflow run, DVC experiment or Git commit.

The links are hashes. dvc.lock, which is in Git, holds the md5 of every output. A run has the md5 of its weights as a
tag, and a registered version the SHA-256 of its exported files. So a file is traced by its content, wherever it was
copied to.
"""

import json
import re
import textwrap
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import yaml

from classifier.data.lockfile import locked_md5s, md5s_in, read_lock
from classifier.pipeline.errors import PipelineError
from classifier.pipeline.outputs import existing, hash_file, hash_path
from classifier.pipeline.params import Params
from classifier.pipeline.paths import ANNOTATIONS, EXPORT, IMAGES, LOCK, METRICS, PARAMS, WEIGHTS, exported_name
from classifier.pipeline.safe_yaml import read_yaml
from classifier.provenance.storage import YES, Storage
from classifier.tracking.git import (
    commit_of,
    commits_holding,
    experiments,
    figures_of,
    git,
    is_ancestor,
    md5_at,
    metrics_at,
    read_at,
)
from classifier.tracking.registry import Version, find_versions
from classifier.tracking.store import Run, StoreAway, artifact, find_runs
from classifier.tracking.tracker import (
    CHANGED_TAG,
    COMMIT_TAG,
    EXPERIMENT_TAG,
    LEFT_OUT_TAG,
    PATCH,
    WEIGHTS_TAG,
    md5_tag,
)

MANIFEST = "manifest.json"
LISTED = 3  # runs and versions in the text; --json prints all
FORMATS = get_args(get_args(Params.model_fields["export_formats"].annotation)[0])


@dataclass(frozen=True)
class Output:
    """An output of the pipeline, and whether the cache and the remote have it: "yes", "no", "in part" or an error."""

    path: str
    md5: str
    cache: str
    remote: str


@dataclass(frozen=True)
class Holder:
    """A commit that holds a model's weights. title: its date and subject, or the name of the experiment."""

    commit: str
    title: str


@dataclass
class Lineage:
    """What a model was made from, as far as it is known.

    commit: None if no commit holds the model. is_uncommitted: the model is in this checkout and in no commit.
    also_in: other commits with the same weights, newest first. unknown: what is not known, and why.
    commands: shell commands that restore this state.
    """

    subject: str
    commit: str | None = None
    is_uncommitted: bool = False
    title: str = ""
    also_in: list[Holder] = field(default_factory=list)
    experiment: str | None = None
    parameters: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    outputs: list[Output] = field(default_factory=list)
    exported: dict[str, str] = field(default_factory=dict)  # SHA-256 by file name
    runs: list[Run] = field(default_factory=list)
    versions: list[Version] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)


def trace(target: str) -> Lineage:
    """Return the lineage of a model file, an MLflow run id, the name of a DVC experiment or a Git commit.

    Raises PipelineError if the target is none of these, or if no run, version or commit here knows the file.
    """
    with Storage() as storage:
        if Path(target).is_file():
            return _trace_file(Path(target), storage)
        if run := _find_run(target):
            return _trace_run(run, Lineage(f"MLflow run {target}"), storage)
        if found := [experiment.commit for experiment in experiments() if experiment.name == target]:
            lineage = Lineage(f"DVC experiment {target}")
            if len(found) > 1:
                lineage.unknown.append(f"the experiment: {len(found)} have this name; the newest is shown")
            return _trace_commit(found[0], lineage, storage)
        if commit := commit_of(target):
            return _trace_commit(commit, Lineage(f"Git commit {target}"), storage)
        if re.fullmatch(r"[\w.-]+", target) and (runs := find_runs(f"tags.`{EXPERIMENT_TAG}` = '{target}'")):
            return _trace_run(runs[0], Lineage(f"DVC experiment {target}"), storage)
    raise PipelineError(
        f"{target}: no model file, MLflow run, DVC experiment or Git commit here.\n"
        "`dvc exp list --all-commits` lists the experiments, `make ui` shows the runs."
    )


def trace_here() -> Lineage:
    """Return the lineage of the model in this checkout, committed or not.

    It is that of the commit or experiment with the same dvc.lock: HEAD if it has, otherwise the newest. The same
    weights are not enough: if code or data of later stages differ, so may the metrics.
    Raises PipelineError if there is no model here.
    """
    md5 = hash_file(existing(WEIGHTS))
    lineage = Lineage(f"The model here, {WEIGHTS} (md5 {md5})")
    lock = read_lock(LOCK)
    if md5s_in(lock).get(str(WEIGHTS)) != md5:
        lineage.unknown.append(
            f"{WEIGHTS} itself: its md5 differs from {LOCK}; `classifier restore` restores the committed file"
        )
    head = commit_of("HEAD")
    with Storage() as storage:
        for commit in [*([head] if head else []), *reversed(commits_holding(md5))]:
            if not lineage.unknown and _yaml_at(commit, LOCK) == lock:
                return _trace_commit(commit, lineage, storage)
        lineage.is_uncommitted = True
        if head:
            lineage.title = f"on top of {head[:12]} {_date_and_subject(head)}"
        lineage.parameters = _yaml(_read_here(PARAMS), str(PARAMS))
        lineage.metrics = figures_of(_read_here)
        _add_result(lineage, lock, md5, storage)
        if differing := stale(lock, lineage.parameters, md5_here):
            lineage.unknown.append(f"the code: changed since {LOCK} was written: {', '.join(differing)}")
    lineage.unknown.append(f"how to restore it: commit it first, `git add {PARAMS} {LOCK} {METRICS} && git commit`")
    return lineage


def is_exported_here(path: Path) -> bool:
    """Return whether dvc.lock, here or in a commit, or the registry lists the file's hash among exported files."""
    md5, sha256 = hash_file(path), hash_file(path, "sha256")
    with Storage() as storage:
        if md5 in (storage.files(locked_md5s(LOCK).get(str(EXPORT), "")) or {}).values():
            return True
        if any(md5 in _exported_md5s(commit, storage) for commit in commits_holding(str(EXPORT))):
            return True
    with suppress(StoreAway):
        return any(find_versions(f"tags.`sha256.{exported_name(name)}` = '{sha256}'") for name in FORMATS)
    return False


def _find_run(run_id: str) -> Run | None:
    known = find_runs(f"attributes.run_id = '{run_id}'") if re.fullmatch("[0-9a-f]{32}", run_id) else []
    return known[0] if known else None


def _trace_file(path: Path, storage: Storage) -> Lineage:
    """Trace a file by its SHA-256, which the registry has, or its md5, which runs and dvc.lock have."""
    md5, sha256 = hash_file(path), hash_file(path, "sha256")
    lineage = Lineage(f"{path} (md5 {md5}, SHA-256 {sha256})")
    names = [exported_name(export_format) for export_format in FORMATS]
    lineage.versions = [v for name in names for v in find_versions(f"tags.`sha256.{name}` = '{sha256}'")]
    runs = find_runs(f"tags.`{WEIGHTS_TAG}` = '{md5}'")
    if lineage.versions:
        run_id = lineage.versions[0].run_id
        runs = find_runs(f"attributes.run_id = '{run_id}'")
        if not runs:
            lineage.unknown.append(f"run {run_id} of {lineage.versions[0]}: deleted, or in another store")
    if runs:
        _trace_run(runs[0], lineage, storage, md5)
        known = {*lineage.exported.values(), *(output.md5 for output in lineage.outputs)}
        if lineage.commit and not known & {md5, sha256}:
            lineage.unknown.append("this file itself: the commit has its weights, but its exported files differ")
        return lineage
    holding = commits_holding(md5) or [
        commit for commit in commits_holding(str(EXPORT)) if md5 in _exported_md5s(commit, storage)
    ]
    if holding:
        return _trace_commit(holding[0], lineage, storage)
    if lineage.versions:
        return lineage
    raise PipelineError(
        f"{path}: no run or registered version of the MLflow store, and no dvc.lock in this clone, has its md5 {md5} "
        f"or SHA-256 {sha256}.\n"
        "Fetch the commits of others (git fetch --all; dvc exp pull), or set MLFLOW_TRACKING_URI to another store."
    )


def _trace_run(run: Run, lineage: Lineage, storage: Storage, md5: str = "") -> Lineage:
    """Trace a run to the commit or experiment that holds its weights; if there is none, use the tags of the run.

    md5: of the file that is traced, if it is one.
    """
    weights = run.tags.get(WEIGHTS_TAG)
    if weights and (commit := _commit_of_run(run, weights, md5, storage)):
        name = run.tags.get(EXPERIMENT_TAG)
        if name and all(found.commit != commit for found in experiments()):
            lineage.unknown.append(f"experiment {name} itself: no longer in Git; this commit holds the same weights")
        return _trace_commit(commit, lineage, storage, run)
    lineage.experiment = run.tags.get(EXPERIMENT_TAG)
    lineage.parameters = dict(run.parameters)
    lineage.metrics = dict(run.metrics)
    outputs = (IMAGES, ANNOTATIONS, WEIGHTS)
    tracked = {str(path): run.tags[md5_tag(path)] for path in outputs if md5_tag(path) in run.tags}
    lineage.outputs = _outputs(tracked, storage)
    _add_tracked(lineage, [run], storage)
    lineage.unknown.append(
        "the commit: none in this clone holds these weights; the results were not committed, or were pruned"
        if weights
        else f"the weights: the run is {run.status}, its training did not finish"
    )
    _add_commands_of_run(lineage, run)
    return lineage


def _commit_of_run(run: Run, weights: str, md5: str, storage: Storage) -> str | None:
    """Return the commit that holds a run's weights, preferably with an exported file that has this md5.

    The next criteria are: the experiment with the run's name; the commit that the run started from, if its code was
    unchanged; a descendant of that commit.
    """
    holding = commits_holding(weights)
    base, changed = run.tags.get(COMMIT_TAG, ""), CHANGED_TAG in run.tags
    if base and not changed and md5s_in(_yaml_at(base, LOCK)).get(str(WEIGHTS)) == weights:
        holding.append(base)  # commits_holding lists only commits that changed dvc.lock
    named = {found.commit for found in experiments() if found.name == run.tags.get(EXPERIMENT_TAG)}

    def rank(commit: str) -> tuple[bool, bool, bool, bool]:
        came_after = bool(base) and commit != base and is_ancestor(base, commit)
        return (
            bool(md5) and md5 not in _exported_md5s(commit, storage),
            commit not in named,
            commit != base or changed,
            not came_after,
        )

    return min(holding, key=rank, default=None)


def _trace_commit(commit: str, lineage: Lineage, storage: Storage, run: Run | None = None) -> Lineage:
    """Trace a commit by its dvc.lock and params.yaml. Raises PipelineError if it has no dvc.lock."""
    lock = _yaml_at(commit, LOCK)
    if not lock:
        raise PipelineError(
            f"commit {commit[:12]} has no dvc.lock, because the pipeline had not run yet; choose a later commit"
        )
    lineage.commit = commit
    lineage.title = _date_and_subject(commit)
    found = {experiment.commit: experiment for experiment in experiments()}.get(commit)
    if found:
        lineage.experiment = f"{found.name}, on {found.baseline[:12]}"
    lineage.parameters = _yaml_at(commit, PARAMS)
    lineage.metrics = metrics_at(commit)
    _add_result(lineage, lock, md5s_in(lock).get(str(WEIGHTS), ""), storage, run)
    if differing := stale(lock, _yaml_at(commit, PARAMS), lambda path: md5_at(commit, path)):
        lineage.unknown.append(f"the code: not that which wrote {LOCK} of this commit: {', '.join(differing)}")
    _add_commands_of_commit(lineage)
    return lineage


def _add_result(lineage: Lineage, lock: dict[str, Any], weights: str, storage: Storage, run: Run | None = None) -> None:
    """Add the outputs in a dvc.lock, and the runs and other commits with the same weights; `run` comes first."""
    md5s = md5s_in(lock)
    lineage.outputs = _outputs(md5s, storage)
    runs = find_runs(f"tags.`{WEIGHTS_TAG}` = '{weights}'") if weights else []
    runs.sort(key=lambda found: run is None or found.run_id != run.run_id)
    if not runs:
        lineage.unknown.append("the MLflow run: none in this store has these weights; deleted, or in another store")
    manifest = storage.read((storage.files(md5s.get(str(EXPORT), "")) or {}).get(MANIFEST, ""))
    _add_tracked(lineage, runs, storage, manifest)
    names = {experiment.commit: f"experiment {experiment.name}" for experiment in experiments()}
    lineage.also_in = [
        Holder(commit, names.get(commit) or _date_and_subject(commit))
        for commit in reversed(commits_holding(weights) if weights else [])
        if commit != lineage.commit
    ]


def _date_and_subject(commit: str) -> str:
    return git("log", "-1", "--format=%cs %s", commit)


def md5_here(path: Path) -> str | None:
    """Return the md5 of a file or folder as in dvc.lock; None if it does not exist."""
    return hash_path(path) if path.exists() else None


def stale(lock: dict[str, Any], parameters: dict[str, Any], md5_of: Callable[[Path], str | None]) -> list[str]:
    """Return the code paths and keys of params.yaml that have changed since dvc.lock was written.

    lock: the content of dvc.lock. parameters: the content of params.yaml. md5_of: returns the current md5 of a file or
    folder of code, None if it does not exist.
    """
    outputs = set(md5s_in(lock))
    differing = []
    for path, md5 in md5s_in(lock, "deps").items():
        is_code = Path(path).parts[0] in ("classifier", "stages")  # hashing data may take minutes
        if is_code and path not in outputs and md5_of(Path(path)) not in (md5, None):
            differing.append(path)
    locked = {
        k: v
        for stage in lock.get("stages", {}).values()
        for k, v in stage.get("params", {}).get(str(PARAMS), {}).items()
    }
    return differing + [f"{key} in {PARAMS}" for key, value in locked.items() if parameters.get(key) != value]


def _yaml_at(commit: str, path: Path) -> dict[str, Any]:
    """Return the content of a YAML file in a commit, empty if there is none. Raises PipelineError if it is not YAML."""
    return _yaml(read_at(commit, path), f"{path} of commit {commit[:12]}")


def _yaml(content: bytes | None, name: str) -> dict[str, Any]:
    try:
        return dict(read_yaml(content or b"") or {})
    except (yaml.YAMLError, ValueError) as error:
        raise PipelineError(f"{name}: not readable as YAML: {str(error).split()[0]}") from None


def _read_here(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _exported_md5s(commit: str, storage: Storage) -> set[str]:
    """Return the md5 of every exported file of a commit, empty if neither cache nor remote lists them."""
    return set((storage.files(md5s_in(_yaml_at(commit, LOCK)).get(str(EXPORT), "")) or {}).values())


def _outputs(md5s: dict[str, str], storage: Storage) -> list[Output]:
    """Return all outputs except metrics, which are in Git."""
    return [
        Output(path, md5, storage.in_cache(md5), storage.in_remote(md5))
        for path, md5 in md5s.items()
        if not path.endswith(".json")
    ]


def _add_tracked(lineage: Lineage, runs: list[Run], storage: Storage, manifest: bytes | None = None) -> None:
    """Add runs, their registered versions, and the exported files by the manifest of the commit or of a run."""
    lineage.runs = runs
    known = {(version.name, version.number) for version in lineage.versions}
    for run in runs:
        versions = find_versions(f"run_id = '{run.run_id}'")
        lineage.versions += [version for version in versions if (version.name, version.number) not in known]
    for run in runs if manifest is None else []:
        with artifact(run.run_id, MANIFEST) as path:
            if path:
                manifest = path.read_bytes()
                break
    if manifest is None:
        lineage.unknown.append("the exported files: no cache, remote or run has their manifest")
    else:
        lineage.exported = {name: file["sha256"] for name, file in json.loads(manifest)["files"].items()}


def _add_commands_of_commit(lineage: Lineage) -> None:
    commit = lineage.commit or ""
    lineage.commands = [f"git switch --detach {commit[:12]}"]
    if git("diff", "--name-only", commit, "--", "requirements.lock"):
        lineage.commands.append("make env")
    if all(output.cache == YES for output in lineage.outputs):
        lineage.commands.append("dvc checkout")
    elif all(YES in (output.cache, output.remote) for output in lineage.outputs):
        lineage.commands.append("dvc pull")
    else:
        lost = [output.path for output in lineage.outputs if YES not in (output.cache, output.remote)]
        lineage.unknown.append(
            f"the bytes of {', '.join(lost)}: neither cache nor remote has them; `dvc repro` rebuilds"
        )
        pull = "dvc pull --allow-missing" if any(output.remote == YES for output in lineage.outputs) else ""
        lineage.commands += [pull or "dvc checkout --allow-missing", "dvc repro"]


def _add_commands_of_run(lineage: Lineage, run: Run) -> None:
    """Add commands for results that no commit holds: check out the run's base commit and apply the run's patch."""
    base, changed = run.tags.get(COMMIT_TAG, ""), run.tags.get(CHANGED_TAG)
    if not commit_of(base):
        lineage.unknown.append(
            f"the code: commit {base} is not in this clone" if base else "the code: no commit is known"
        )
        return
    lineage.title = f"trained on top of {base[:12]} {_date_and_subject(base)}"
    with artifact(run.run_id, PATCH) as patch:
        if patch:
            file = f"../{run.run_id[:8]}.patch"
            lineage.commands = [f"classifier lineage {run.run_id} --patch > {file}"]
            lineage.commands += [f"git switch --detach {base[:12]}", f"git apply {file}", "dvc repro"]
            lineage.unknown += [
                f"a difference from the commit that is not in the patch: {line}"
                for line in run.tags.get(LEFT_OUT_TAG, "").splitlines()
            ]
        elif changed:
            lineage.unknown.append(f"the code: {changed} differed from the commit, and the run has no patch")
        elif differing := _other_parameters(run, base):
            lineage.unknown.append(
                f"the commands: {', '.join(differing)} differed from the commit, and the run has no patch"
            )
        else:
            lineage.commands = [f"git switch --detach {base[:12]}", "dvc repro"]


def _other_parameters(run: Run, commit: str) -> list[str]:
    """Return the parameters whose values differ between a run and a commit."""
    committed = {key: _format(value) for key, value in _yaml_at(commit, PARAMS).items()}
    return [key for key, value in run.parameters.items() if committed.get(key) != _format(_parse_logged(value))]


def _parse_logged(logged: str) -> Any:
    """Parse a parameter value that MLflow stores as text."""
    try:
        return read_yaml(logged)
    except (yaml.YAMLError, ValueError):
        return logged


def patch_of(run_id: str) -> bytes:
    """Return the uncommitted code changes of a run. Raises PipelineError if there is no such run or no patch."""
    if _find_run(run_id) is None:
        raise PipelineError(f"{run_id}: not the id of an MLflow run in this store; --patch needs one")
    with artifact(run_id, PATCH) as path:
        if path is None:
            raise PipelineError(f"{run_id}: the run has no {PATCH}: its code was committed, or is unknown")
        return path.read_bytes()


def describe(lineage: Lineage) -> str:
    """Return the lineage as text."""
    lines = [lineage.subject]
    none = "uncommitted" if lineage.is_uncommitted else "none"
    _section(lines, "commit", [lineage.commit or none, lineage.title])
    _section(lines, "the same weights are in", [f"{holder.commit[:12]} {holder.title}" for holder in lineage.also_in])
    _section(lines, "experiment", [lineage.experiment])
    parameters = "  ".join(f"{key}={_format(value)}" for key, value in lineage.parameters.items())
    _section(lines, "parameters", textwrap.wrap(parameters, 96, break_on_hyphens=False))
    width = max((len(output.path) for output in lineage.outputs), default=0)
    _section(
        lines,
        "md5, and whether the cache / the remote has it",
        [f"{o.path:{width}}  {o.md5:36}  {o.cache} / {o.remote}" for o in lineage.outputs],
    )
    _section(lines, "metrics", [f"{key}: {_format(value)}" for key, value in lineage.metrics.items()])
    _section(lines, "MLflow runs", _abridged([f"{run.run_id}  {run.name}, {run.status}" for run in lineage.runs]))
    versions = [f"{v}{' (' + ', '.join(v.aliases) + ')' if v.aliases else ''}" for v in lineage.versions]
    _section(lines, "registered", _abridged(versions))
    width = max(map(len, lineage.exported), default=0)
    _section(lines, "exported, SHA-256", [f"{name:{width}}  {sha256}" for name, sha256 in lineage.exported.items()])
    _section(lines, "not known", lineage.unknown)
    _section(lines, "to restore this state", lineage.commands)
    return "\n".join(lines)


def _section(lines: list[str], title: str, content: Sequence[str | None]) -> None:
    if any(content):
        lines += ["", f"{title}:", *(f"  {line}" for line in content if line)]


def _abridged(lines: list[str]) -> list[str]:
    """Return the first LISTED lines and the number of others: rebuilding a model adds a run each time."""
    return lines if len(lines) <= LISTED else [*lines[:LISTED], f"and {len(lines) - LISTED} more with the same weights"]


def _format(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
