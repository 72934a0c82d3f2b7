"""Report: one HTML page about the model in this checkout, without scripts or external resources.

Reads   metrics/, data/annotations/, params.yaml, dvc.lock, the same files of the baseline commit, and the training
        time from MLflow
Writes  the page; its bytes depend only on these, not on hosts or paths
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
from classifier.cli.intervals import Interval, intervals
from classifier.data.lockfile import locked_md5s, md5s_in, read_lock
from classifier.evaluation.metrics import METRICS
from classifier.pipeline import paths
from classifier.pipeline.annotations import class_names, read_annotations
from classifier.pipeline.errors import PipelineError
from classifier.pipeline.outputs import atomic, existing, hash_file, read_json
from classifier.pipeline.params import load_params
from classifier.pipeline.safe_yaml import read_yaml
from classifier.provenance.lineage import md5_here, stale
from classifier.provenance.storage import Storage
from classifier.tracking.git import changes, commit_of, experiments, git, read_at
from classifier.tracking.store import find_runs, history
from classifier.tracking.tracker import WEIGHTS_TAG

CONFUSION = paths.PLOTS / "confusion.csv"
CONFUSIONS_SHOWN = 10
MISTAKES_SHOWN = 15  # as in the picture of the mistakes
SPLITS = ("train", "val", "test")
MOST_IN_MATRIX = 100  # classes; the cells of more are too small to distinguish
PERCENT, DECIMAL = "{:.2%}", "{:.5f}"
ENDS = {PERCENT: "{:.1%}", DECIMAL: "{:.3f}"}  # of an interval
# Smaller differences do not show in these digits. Two processors differ by 3e-6 (provenance/verify.py).
NEGLIGIBLE = {PERCENT: 5e-5, DECIMAL: 5e-6}


class Figure(NamedTuple):
    """A row of the metrics table.

    key: name in the metrics files. split: the images that it describes, or "". better: the sign of an improvement, or
    0. number_format: PERCENT, DECIMAL, or a format for a figure without an interval.
    """

    label: str
    key: str
    split: str
    better: int
    number_format: str


FIGURES = (
    *(
        Figure(
            f"Test {metric.title.lower()}" if key in ("accuracy", "loss") else metric.title,  # validation has these too
            key,
            "test",
            +1 if metric.better == "higher" else -1,
            PERCENT if metric.percent else DECIMAL,
        )
        for key, metric in METRICS.items()
    ),
    Figure("Validation accuracy", "val_accuracy", "val", +1, PERCENT),
    Figure("Validation loss", "val_loss", "val", -1, DECIMAL),
    Figure("Training loss", "train_loss", "train", -1, DECIMAL),
    Figure("Epoch kept", "epoch", "", 0, "{}"),
)


class Revision(NamedTuple):
    """A commit or DVC experiment.

    metrics: content of its metrics files. params: its params.yaml. notes: sentences about its missing or unreadable
    files. outputs: md5s in its dvc.lock by path.
    """

    hash: str
    subject: str
    date: str
    metrics: dict[str, Any]
    params: dict[str, Any]
    notes: list[str]
    outputs: dict[str, str]

    @property
    def short(self) -> str:
        return self.hash[:7]


def write_report(target: Path, against: str | None, lineage: str) -> None:
    """Write the report about the outputs in the current folder to `target`, atomically.

    against: commit or DVC experiment to compare with. None selects HEAD if its metrics differ from those here,
    otherwise the commit before it. lineage: preformatted text.
    Raises PipelineError if an output is missing or unreadable, if outputs belong to different runs, or if `against`
    does not exist.
    """
    name = load_params().experiment
    params = _read(paths.PARAMS, lambda path: dict(read_yaml(path.read_bytes())))  # without conversions
    test = _read(paths.TEST_METRICS, lambda path: _numbers(path, "accuracy", "loss"))
    interval = _read(paths.TEST_METRICS, lambda path: [float(end) for end in read_json(path)["accuracy_ci95"]])
    train = _read(paths.TRAIN_METRICS, lambda path: _numbers(path, "epoch", "train_loss", "val_loss", "val_accuracy"))
    epochs = _table(paths.EPOCHS, epoch=int, train_loss=float, val_loss=float, val_accuracy=float)
    scores = _table(paths.CLASS_METRICS, **{"class": str}, precision=float, recall=float, f1=float, images=int)
    answers = _table(CONFUSION, actual=str, predicted=str)
    predictions = _predictions()
    counts = _class_counts()
    _check_same_run(test, train, epochs, scores, answers, predictions, counts)
    head = _state("HEAD")
    baseline = _baseline(against, head, test | train)
    same = _same_images(baseline.outputs if baseline else {}, locked_md5s(paths.LOCK))
    ranges = _intervals(predictions, list(scores["class"]))

    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"percent": PERCENT.format, "loss": DECIMAL.format, "count": "{:,}".format}
    page = environment.get_template("report.html.j2").render(
        name=name,
        commit=head,
        changed=changes()[0],
        stale=_stale(),
        baseline=baseline,
        rows=[
            _row(figure, test | train, baseline.metrics if baseline else {}, ranges.get(figure.key), same)
            for figure in FIGURES
            if figure.key in test | train
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
        scores=scores.assign(**counts).to_dict("records"),
        mistakes=_mistakes(predictions),
        training_time=_training_time(int(counts["train"].sum()), len(epochs)),
        picture=_picture,
        environments=_read(paths.ENVIRONMENT, lambda path: [dict(entry) for entry in read_json(path)]),
        lineage=lineage,
    )
    with atomic(target) as path:
        path.write_text(page, encoding="utf-8")


# ---- the outputs


def _read(path: Path, parse: Callable[[Path], Any]) -> Any:
    """Return `parse(path)`. Raises PipelineError if the file is missing or malformed."""
    try:
        return parse(existing(path))
    except (ValueError, KeyError, TypeError, yaml.YAMLError) as error:  # pandas and json raise ValueErrors
        reason = " ".join(str(error).split())
        raise PipelineError(f"{path}: malformed ({reason}); `dvc repro` writes it again") from None


def _numbers(path: Path, *keys: str) -> dict[str, Any]:
    """Return the content of a metrics file. Raises ValueError unless the values of `keys` are numbers."""
    content: dict[str, Any] = read_json(path)
    if wrong := [key for key in keys if not isinstance(content[key], int | float)]:
        raise ValueError(f"{wrong[0]} is not a number")
    return content


def _table(path: Path, **columns: type) -> pd.DataFrame:
    """Return columns of a CSV file, converted to the given types; text without the quotes that `csv_cell` adds."""
    # Only empty numbers are NaN: a class may be called NA
    empty = {name: "" for name, kind in columns.items() if kind is float}
    options: dict[str, Any] = {"usecols": list(columns), "dtype": columns, "na_values": empty, "keep_default_na": False}
    table: pd.DataFrame = _read(path, lambda path: pd.read_csv(path, **options))
    return _unquoted(table, [name for name, kind in columns.items() if kind is str])


def _unquoted(table: pd.DataFrame, texts: list[str]) -> pd.DataFrame:
    return table.assign(**{name: table[name].str.removeprefix("'") for name in texts})


def _stale() -> list[str]:
    """Return the code files and parameters that have changed since the outputs were written."""
    parameters = _read(paths.PARAMS, lambda path: dict(read_yaml(path.read_bytes()) or {}))
    return stale(read_lock(paths.LOCK), parameters, md5_here)


def _predictions() -> pd.DataFrame:
    """Return the table of predictions: file, split, label, predicted, probabilities (an array (C,) per row)."""
    known = {"file": str, "split": str, "label": str, "predicted": str}

    def parse(path: Path) -> pd.DataFrame:
        # A file or a class may be called NA
        table = pd.read_csv(path, dtype=known, na_values={name: [] for name in known}, keep_default_na=False)
        probabilities = table.iloc[:, len(known) :].to_numpy(np.float64)
        return _unquoted(table[list(known)], list(known)).assign(probabilities=list(probabilities))

    table: pd.DataFrame = _read(paths.PREDICTIONS, parse)
    return table


def _class_counts() -> dict[str, np.ndarray]:
    """Return the number of images of each class, by split."""
    classes = len(class_names(existing(paths.ANNOTATIONS)))
    labels = {split: read_annotations(paths.ANNOTATIONS / f"{split}.csv", classes=classes).labels for split in SPLITS}
    return {split: np.bincount(of_split, minlength=classes) for split, of_split in labels.items()}


def _training_time(images: int, epochs: int) -> str:
    """Return a sentence with the training time, which MLflow has in the run of these weights.

    images: number of images per epoch.
    """
    unknown = "The training time is unknown: no MLflow run of these weights records it."
    try:
        weights = hash_file(existing(paths.WEIGHTS))
        for run in find_runs(f"tags.`{WEIGHTS_TAG}` = '{weights}'"):
            speeds = history(run.run_id, "images_per_second")
            if len(speeds) == epochs and all(speeds):
                seconds = sum(images / speed for speed in speeds)
                return f"Trained for {_duration(seconds)}, without validation ({epochs} epochs)."
    except PipelineError:
        return unknown
    return unknown


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if seconds < 600:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _intervals(predictions: pd.DataFrame, classes: list[str]) -> dict[str, Interval]:
    """Return the 95 % intervals of the metrics by key.

    Without validation images, the validation accuracy and loss are those of the test images.
    """
    label_of = {name: label for label, name in enumerate(classes)}

    def of_split(split: str) -> dict[str, Interval]:
        rows = predictions[predictions["split"] == split]
        if rows.empty:
            return {}
        labels, predicted = (rows[column].map(label_of).to_numpy(np.int64) for column in ("label", "predicted"))
        return intervals(labels, predicted, np.stack(rows["probabilities"].to_list()))

    test = of_split("test")
    val = of_split("val") or test
    return test | {f"val_{key}": val[key] for key in ("accuracy", "loss")}


def _mistakes(predictions: pd.DataFrame) -> list[dict[Any, Any]]:
    """Return the misclassified test images, highest confidence first."""
    wrong = predictions[(predictions["split"] == "test") & (predictions["label"] != predictions["predicted"])]
    probability = wrong["probabilities"].map(max)
    worst_first = wrong.assign(probability=probability).sort_values("probability", ascending=False, kind="stable")
    return worst_first.head(MISTAKES_SHOWN).to_dict("records")


def _check_same_run(
    test: dict[str, Any],
    train: dict[str, Any],
    epochs: pd.DataFrame,
    scores: pd.DataFrame,
    answers: pd.DataFrame,
    predictions: pd.DataFrame,
    counts: dict[str, np.ndarray],
) -> None:
    """Raise PipelineError if outputs belong to different runs.

    Metrics are in Git and pictures in DVC's cache, so a checkout of only one of them mixes runs.
    """
    kept = [train[str(name)] for name in epochs]
    right = (answers["actual"] == answers["predicted"]).mean()
    tested = predictions.loc[predictions["split"] == "test", ["label", "predicted"]].to_numpy()
    for same, one, other in (
        (np.isclose(epochs, kept, rtol=1e-9, equal_nan=True).all(axis=1).any(), paths.EPOCHS, paths.TRAIN_METRICS),
        (set(answers.to_numpy().flat) <= set(scores["class"]), CONFUSION, paths.CLASS_METRICS),
        (math.isclose(right, test["accuracy"], abs_tol=1e-6), CONFUSION, paths.TEST_METRICS),
        (np.array_equal(tested, answers.to_numpy()), paths.PREDICTIONS, CONFUSION),
        (np.array_equal(scores["images"], counts["test"]), paths.CLASS_METRICS, paths.ANNOTATIONS),
    ):
        if not same:
            raise PipelineError(f"{one} and {other} belong to different runs; run `dvc checkout` or `dvc repro`")


def _matrix(answers: pd.DataFrame, classes: list[str]) -> dict[Any, dict[Any, int]] | None:
    """Return image counts by actual and predicted class, in the order of the labels; None for too many classes."""
    if len(classes) > MOST_IN_MATRIX:
        return None
    counts = pd.crosstab(answers["actual"], answers["predicted"])
    return counts.reindex(index=classes, columns=classes, fill_value=0).to_dict("index")


def _worst_confusions(answers: pd.DataFrame) -> list[dict[Any, Any]]:
    """Return the most frequent confusions: actual, predicted, images, and their share of the actual class."""
    pairs = answers.value_counts(sort=False).rename("images").reset_index()
    pairs["share"] = pairs["images"] / pairs.groupby("actual")["images"].transform("sum")
    wrong = pairs[pairs["actual"] != pairs["predicted"]]
    worst_first = wrong.sort_values(["images", "actual", "predicted"], ascending=[False, True, True])
    return worst_first.head(CONFUSIONS_SHOWN).to_dict("records")


def _picture(name: str) -> str:
    """Return a picture as a data: URL."""
    content = existing(paths.PLOTS / f"{name}.png").read_bytes()
    return f"data:image/png;base64,{base64.b64encode(content).decode('ascii')}"


# ---- the comparison


def _state(revision: str) -> Revision | None:
    """Return the content of a Git revision or DVC experiment, or None if it does not exist."""
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
        subject = f"experiment {revision}"  # DVC's commit message is only a hash
    metrics = found[paths.TEST_METRICS] | found[paths.TRAIN_METRICS]
    try:
        outputs = md5s_in(dict(read_yaml(read_at(commit, paths.LOCK) or b"") or {}))
    except (ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError):
        outputs = {}
    return Revision(commit, subject, date, metrics, found[paths.PARAMS], notes, outputs)


def _baseline(against: str | None, head: Revision | None, metrics: dict[str, Any]) -> Revision | None:
    """Return the state to compare with, or None if there is none. `write_report` describes `against`."""
    if against is None:
        return head if head and head.metrics != metrics else _state("HEAD~1")
    if state := _state(against):
        return state
    raise PipelineError(
        f"against: {against!r} is not a commit or experiment; `git log --oneline` and `dvc exp list` list them"
    )


def _same_images(there: dict[str, str], here: dict[str, str]) -> dict[str, bool]:
    """Return for each split whether two states are known to have the same images and labels in it.

    there, here: md5s in their dvc.lock by path. If the splits differ, as after a change of val_size, the tables of
    each split are compared through the cache or the remote.
    """
    images, annotations = (
        [md5s.get(str(path)) for md5s in (there, here)] for path in (paths.IMAGES, paths.ANNOTATIONS)
    )
    if None in (*images, *annotations) or images[0] != images[1]:
        return dict.fromkeys(SPLITS, False)
    if annotations[0] == annotations[1]:
        return dict.fromkeys(SPLITS, True)
    with Storage() as storage:
        tables = [storage.files(str(md5)) or {} for md5 in annotations]
    of_split = {split: [table.get(f"{split}.csv") for table in tables] for split in SPLITS}
    return {split: before is not None and before == now for split, (before, now) in of_split.items()}


def _row(
    figure: Figure, here: dict[str, Any], there: dict[str, Any], interval: Interval | None, same: dict[str, bool]
) -> dict[str, str]:
    """Return the cells of a row of the metrics table as text.

    verdict: "better", "worse", "unchanged", "other images" or "". same: whether both states have the same images, by
    split; otherwise there is no difference.
    """
    now, before = here[figure.key], there.get(figure.key)
    row = {
        "label": figure.label,
        "now": figure.number_format.format(now),
        "before": "–",
        "difference": "",
        "verdict": "",
        "interval": "",
    }
    if interval:
        row["interval"] = " to ".join(map(ENDS[figure.number_format].format, interval))
    if before is None:
        return row
    row["before"] = figure.number_format.format(before)
    if not same.get(figure.split, True):
        return row | {"verdict": "other images"}
    if (change := now - before) == 0 or abs(change) < NEGLIGIBLE.get(figure.number_format, 0):
        return row | {"verdict": "unchanged"}
    signed = {PERCENT: f"{100 * change:+.2f} points", DECIMAL: f"{change:+.5f}"}
    gain = change * figure.better
    verdict = "better" if gain > 0 else "worse" if gain < 0 else ""
    return row | {"difference": signed.get(figure.number_format, f"{change:+}").replace("-", "−"), "verdict": verdict}


def _differing(now: dict[str, Any], before: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return the parameters that differ: key, value before, value now."""
    rows = [
        (key, _as_text(before.get(key, "–")), _as_text(now.get(key, "–"))) for key in dict.fromkeys([*now, *before])
    ]
    return [row for row in rows if row[1] != row[2]]


def _as_text(value: Any) -> str:
    """Return a parameter as text. Equal numbers have equal text, whether written 1, 1.0 or 1e0."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"{value:.15g}"
    return value if isinstance(value, str) else json.dumps(value)
