"""The report: one HTML page about the model in this checkout, which needs neither network nor script to be read.

Reads   metrics/, params.yaml, and through git the commit that they are compared with
Writes  the page, whose bytes depend on these alone: no time, no host, no path
"""

import base64
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from classifier.cli.charts import curves
from classifier.data.lockfile import read_lock
from classifier.pipeline import paths
from classifier.pipeline.errors import PipelineError
from classifier.pipeline.outputs import atomic, existing, hash_path, read_json
from classifier.pipeline.params import load_params
from classifier.pipeline.safe_yaml import read_yaml
from classifier.provenance.lineage import stale
from classifier.tracking.git import changes, commit_of, experiments, git, read_at

CONFUSION = paths.PLOTS / "confusion.csv"
CONFUSIONS_SHOWN = 10
MOST_IN_MATRIX = 100  # classes; with more, cells are too small to be told apart
PERCENT, LOSS = "{:.2%}", "{:.5f}"


class Metric(NamedTuple):
    """A number of the metrics files and how it is shown. better: the sign of a difference for the better, or 0."""

    label: str
    key: str
    better: int
    shown: str


METRICS = (
    Metric("Test accuracy", "accuracy", +1, PERCENT),
    Metric("Test loss", "loss", -1, LOSS),
    Metric("Balanced accuracy", "balanced_accuracy", +1, PERCENT),
    Metric("Macro F1", "macro_f1", +1, PERCENT),
    Metric("Top-3 accuracy", "top3_accuracy", +1, PERCENT),  # of more than three classes
    Metric("Calibration error", "ece", -1, PERCENT),
    Metric("Validation accuracy", "val_accuracy", +1, PERCENT),
    Metric("Validation loss", "val_loss", -1, LOSS),
    Metric("Training loss", "train_loss", -1, LOSS),
    Metric("Epoch kept", "epoch", 0, "{}"),
)


class Revision(NamedTuple):
    """A commit. metrics: the numbers of its metrics files; params: its params.yaml; notes: which of them it lacks."""

    hash: str
    subject: str
    date: str
    metrics: dict[str, Any]
    params: dict[str, Any]
    notes: list[str]

    @property
    def short(self) -> str:
        return self.hash[:7]


def write_report(target: Path, against: str | None, lineage: str) -> None:
    """Write the report on the outputs in the current folder to `target`, atomically.

    against: the commit or DVC experiment to compare with. None means HEAD if the metrics here are not HEAD's, else the
    commit before it. lineage: text to show as it is.
    Raises PipelineError if an output is missing or unreadable, if the outputs are not of one run, or if nothing is
    called `against`.
    """
    params = load_params().model_dump()
    test = _read(paths.TEST_METRICS, lambda path: _numbers(path, "accuracy", "loss"))
    interval = _read(paths.TEST_METRICS, lambda path: [float(end) for end in read_json(path)["accuracy_ci95"]])
    train = _read(paths.TRAIN_METRICS, lambda path: _numbers(path, "epoch", "train_loss", "val_loss", "val_accuracy"))
    epochs = _table(paths.EPOCHS, epoch=int, train_loss=float, val_loss=float, val_accuracy=float)
    scores = _table(paths.CLASS_METRICS, **{"class": str}, precision=float, recall=float, f1=float, images=int)
    answers = _table(CONFUSION, actual=str, predicted=str)
    _check_same_run(test, train, epochs, scores, answers)
    head = _state("HEAD")
    baseline = _baseline(against, head, test | train)

    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"percent": PERCENT.format, "loss": LOSS.format, "count": "{:,}".format}
    page = environment.get_template("report.html.j2").render(
        name=params["experiment"],
        commit=head,
        changed=changes()[0],
        stale=_stale(),
        baseline=baseline,
        rows=[
            _row(metric, test | train, baseline.metrics if baseline else {})
            for metric in METRICS
            if metric.key in test | train
        ],
        parameters=_differing(params, baseline.params) if baseline and baseline.params else None,
        test=test,
        interval=interval,
        images=len(answers),
        epochs=epochs.to_dict("records"),
        kept=train["epoch"],
        loss_chart=curves(epochs, {"training": "train_loss", "validation": "val_loss"}, train["epoch"], "Loss"),
        accuracy_chart=curves(epochs, {"validation": "val_accuracy"}, train["epoch"], "Accuracy", percent=True),
        matrix=_matrix(answers, list(scores["class"])),
        confusions=_worst_confusions(answers),
        scores=scores.to_dict("records"),
        picture=_picture,
        environments=_read(paths.ENVIRONMENT, lambda path: [dict(entry) for entry in read_json(path)]),
        lineage=lineage,
    )
    with atomic(target) as path:
        path.write_text(page, encoding="utf-8")


# ---- the outputs


def _read(path: Path, parse: Callable[[Path], Any]) -> Any:
    """What `parse` makes of an output. Raises PipelineError if it is missing or not as a stage writes it."""
    try:
        return parse(existing(path))
    except (ValueError, KeyError, TypeError, yaml.YAMLError) as error:  # those of pandas and json are ValueErrors
        reason = " ".join(str(error).split())
        raise PipelineError(f"{path}: not as the pipeline writes it ({reason}); `dvc repro` makes it anew") from None


def _numbers(path: Path, *keys: str) -> dict[str, Any]:
    """A metrics file, in which the values of all `keys` are numbers."""
    content: dict[str, Any] = read_json(path)
    if wrong := [key for key in keys if not isinstance(content[key], int | float)]:
        raise ValueError(f"{wrong[0]} is no number")
    return content


def _table(path: Path, **columns: type) -> pd.DataFrame:
    """A CSV file's columns, read as their types. A class may be called NA."""
    empty = {name: "" for name, kind in columns.items() if kind is float}  # how pandas writes a NaN
    options: dict[str, Any] = {"usecols": list(columns), "dtype": columns, "na_values": empty, "keep_default_na": False}
    table: pd.DataFrame = _read(path, lambda path: pd.read_csv(path, **options))
    return table


def _stale() -> list[str]:
    """Code and parameters here that are not what the outputs were made with."""
    parameters = _read(paths.PARAMS, lambda path: dict(read_yaml(path.read_bytes()) or {}))
    return stale(read_lock(), parameters, lambda path: hash_path(path) if path.exists() else None)


def _check_same_run(
    test: dict[str, Any], train: dict[str, Any], epochs: pd.DataFrame, scores: pd.DataFrame, answers: pd.DataFrame
) -> None:
    """Metrics are in Git and pictures in DVC's cache, so that a checkout of only one of them mixes runs."""
    kept = [train[str(name)] for name in epochs]
    right = (answers["actual"] == answers["predicted"]).mean()
    for same, one, other in (
        (np.isclose(epochs, kept, rtol=1e-9, equal_nan=True).all(axis=1).any(), paths.EPOCHS, paths.TRAIN_METRICS),
        (set(answers.to_numpy().flat) <= set(scores["class"]), CONFUSION, paths.CLASS_METRICS),
        (math.isclose(right, test["accuracy"], abs_tol=1e-6), CONFUSION, paths.TEST_METRICS),
    ):
        if not same:
            raise PipelineError(f"{one} and {other} are of different runs; `dvc checkout` or `dvc repro` mends that")


def _matrix(answers: pd.DataFrame, classes: list[str]) -> dict[Any, dict[Any, int]] | None:
    """Number of images by actual and predicted class, in the order of the labels; None for too many classes."""
    if len(classes) > MOST_IN_MATRIX:
        return None
    counts = pd.crosstab(answers["actual"], answers["predicted"])
    return counts.reindex(index=classes, columns=classes, fill_value=0).to_dict("index")


def _worst_confusions(answers: pd.DataFrame) -> list[dict[Any, Any]]:
    """The pairs of classes that are confused most often, with the share of the actual class's images."""
    pairs = answers.value_counts(sort=False).rename("images").reset_index()
    pairs["share"] = pairs["images"] / pairs.groupby("actual")["images"].transform("sum")
    wrong = pairs[pairs["actual"] != pairs["predicted"]]
    worst_first = wrong.sort_values(["images", "actual", "predicted"], ascending=[False, True, True])
    return worst_first.head(CONFUSIONS_SHOWN).to_dict("records")


def _picture(name: str) -> str:
    """A picture as a data: address."""
    content = existing(paths.PLOTS / f"{name}.png").read_bytes()
    return f"data:image/png;base64,{base64.b64encode(content).decode('ascii')}"


# ---- the comparison


def _state(revision: str) -> Revision | None:
    """What a revision or a DVC experiment holds, or None if nothing is called so."""
    commit = commit_of(revision)
    named = {} if commit else {experiment.name: experiment.commit for experiment in experiments()}
    if not (commit := commit or named.get(revision)):
        return None
    found: dict[Path, dict[str, Any]] = {}
    notes = []
    for path in (paths.TEST_METRICS, paths.TRAIN_METRICS, paths.PARAMS):
        try:
            content = read_at(commit, path) or b""
            found[path] = dict(json.loads(content) if path.suffix == ".json" else read_yaml(content))
        except (ValueError, TypeError, yaml.YAMLError):
            found[path] = {}
            notes.append(f"It has no readable {path}.")
    subject, date = git("show", "--no-patch", "--no-show-signature", "--format=%s%x00%cs", commit).split("\0")
    if named:
        subject = f"experiment {revision}"  # DVC's own says no more than a hash
    metrics = found[paths.TEST_METRICS] | found[paths.TRAIN_METRICS]
    return Revision(commit, subject, date, metrics, found[paths.PARAMS], notes)


def _baseline(against: str | None, head: Revision | None, metrics: dict[str, Any]) -> Revision | None:
    """The state to compare with, or None if there is none."""
    if against is None:
        return head if head and head.metrics != metrics else _state("HEAD~1")
    if state := _state(against):
        return state
    raise PipelineError(
        f"against: {against!r} is no commit or experiment here; `git log --oneline` and `dvc exp list` name some"
    )


def _row(metric: Metric, here: dict[str, Any], there: dict[str, Any]) -> dict[str, str]:
    """A line of the metrics table, as text. verdict: better, worse, unchanged, or nothing."""
    now, before = here[metric.key], there.get(metric.key)
    row = {"label": metric.label, "now": metric.shown.format(now), "before": "–", "difference": "", "verdict": ""}
    if before is None:
        return row
    row["before"] = metric.shown.format(before)
    if (change := now - before) == 0:
        return row | {"verdict": "unchanged"}
    signed = {
        PERCENT: f"{100 * change:+.2f} points",
        LOSS: f"{change:+.5f}" if abs(change) >= 5e-6 else f"{change:+.0e}",
    }
    gain = change * metric.better
    verdict = "better" if gain > 0 else "worse" if gain < 0 else ""
    return row | {"difference": signed.get(metric.shown, f"{change:+}").replace("-", "−"), "verdict": verdict}


def _differing(now: dict[str, Any], before: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Parameters that differ: key, value before, value now."""
    rows = [(key, _spelt(before.get(key, "–")), _spelt(now.get(key, "–"))) for key in dict.fromkeys([*now, *before])]
    return [row for row in rows if row[1] != row[2]]


def _spelt(value: Any) -> str:
    """A parameter as text, numbers alike whether they are spelt 1, 1.0 or 1e0."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"{value:.15g}"
    return value if isinstance(value, str) else json.dumps(value)
