"""MLflow's runs: what training, evaluation and export leave in the store, and how to find it again.

There is one store for the repository, wherever a stage runs: DVC's temporary experiments log to it too.
MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME win when they are set. A trained model has one run: `train`
opens it and tags it with the md5 of its weights, by which `evaluate` and `export` find it again.
"""

import json
import logging
import os
import sqlite3
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

# Read when mlflow is imported
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
# The defaults make one call to a dead server take four minutes.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")

import mlflow
import yaml
from filelock import FileLock
from mlflow.data.code_dataset_source import CodeDatasetSource
from mlflow.data.meta_dataset import MetaDataset
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from classifier.errors import PipelineError, run_main
from classifier.files import (
    ANNOTATIONS,
    CLASS_METRICS,
    IMAGES,
    PARAMS,
    PLOTS,
    TEST_METRICS,
    WEIGHTS,
    hash_file,
    locked_md5s,
    read_json,
)
from classifier.params import Params, load_params
from classifier.repository import changes, git, repository_root

WEIGHTS_TAG = "md5.model_weights"
COMMIT_TAG = "mlflow.source.git.commit"
CHANGED_TAG = "git.changed_files"
EXPERIMENT_TAG = "dvc.exp_name"
TEST_SET_TAG = "md5.test_set"
MD5_TAGS = {IMAGES: "md5.images", ANNOTATIONS: "md5.annotations", WEIGHTS: WEIGHTS_TAG}
PATCH = "code.patch"
LARGEST_PATCH = 10_000_000  # bytes


@contextmanager
def training_run(params: Params, environment: Mapping[str, str | int]) -> Iterator[None]:
    """Open a run for a model about to be trained; it ends FINISHED, or FAILED if the block raises.

    Raises PipelineError if the store cannot be reached.
    """
    experiment_id = _connect(params.experiment)
    with (
        store_errors(),
        mlflow.start_run(
            experiment_id=experiment_id,
            run_name=_run_name(),
            tags=_tags(environment),
            log_system_metrics=True,
        ),
    ):
        _log_inputs(params)
        yield
        mlflow.set_tag(WEIGHTS_TAG, hash_file(WEIGHTS))


@contextmanager
def run_of_weights(params: Params, environment: Mapping[str, str | int]) -> Iterator[None]:
    """Reopen the run that trained models/model_weights.pth, or open one if the store does not know the weights.

    Runs whose parameters make no difference have the same weights: that of this experiment's name comes first.
    """
    experiment_id = _connect(params.experiment)
    weights_md5 = hash_file(WEIGHTS)
    known = find_runs(f"tags.`{WEIGHTS_TAG}` = '{weights_md5}'")
    name = os.environ.get("DVC_EXP_NAME")
    known.sort(key=lambda run: (run.tags.get(EXPERIMENT_TAG) != name, run.experiment_id != experiment_id))
    with store_errors():
        if known:
            with mlflow.start_run(run_id=known[0].run_id):
                yield
            return
        tags = _tags(environment) | {WEIGHTS_TAG: weights_md5}
        with mlflow.start_run(experiment_id=experiment_id, run_name=_run_name(), tags=tags):
            _log_inputs(params)
            yield


def log_metrics(metrics: Mapping[str, float], step: int | None = None) -> None:
    """Log numbers to the open run in one call."""
    mlflow.log_metrics(dict(metrics), step=step)


def is_evaluated(test_set: str) -> bool:
    """Whether the open run has the results of an evaluation on the images and labels with this md5."""
    run = mlflow.active_run()
    return run is not None and mlflow.get_run(run.info.run_id).data.tags.get(TEST_SET_TAG) == test_set


def log_evaluation(test_set: str) -> None:
    """Log what `evaluate` has written, and the md5 of the images and labels that it tested on, to the open run."""
    test = read_json(TEST_METRICS)
    low, high = test["accuracy_ci95"]
    log_metrics({"test_loss": test["loss"], "test_accuracy": test["accuracy"]})
    log_metrics({"test_accuracy_ci95_low": low, "test_accuracy_ci95_high": high})
    log_files(CLASS_METRICS)
    log_files(PLOTS, "plots")
    mlflow.set_tag(TEST_SET_TAG, test_set)


def log_files(path: Path, folder: str | None = None) -> None:
    """Log a file, or the files of a folder, to the open run, into a folder of its artifacts."""
    if path.is_dir():
        mlflow.log_artifacts(str(path), folder)
    else:
        mlflow.log_artifact(str(path), folder)


@dataclass(frozen=True)
class Run:
    """A run as the store knows it."""

    run_id: str
    name: str
    experiment_id: str
    status: str
    parameters: dict[str, str]
    metrics: dict[str, float]
    tags: dict[str, str]


def find_runs(filter_string: str = "") -> list[Run]:
    """The runs of all experiments that MLflow's filter lets through, the newest first; none where there is no store.

    Raises PipelineError if the store cannot be asked.
    """
    if not open_store():
        return []
    with store_errors():
        runs = mlflow.search_runs(
            experiment_ids=[experiment.experiment_id for experiment in mlflow.search_experiments()],
            filter_string=filter_string,
            order_by=["attributes.start_time DESC"],
            output_format="list",
        )
    return [
        Run(
            run_id=run.info.run_id,
            name=run.info.run_name,
            experiment_id=run.info.experiment_id,
            status=run.info.status,
            parameters=dict(run.data.params),
            metrics=dict(run.data.metrics),
            tags=dict(run.data.tags),
        )
        for run in runs
    ]


@contextmanager
def artifact(run_id: str, path: str) -> Iterator[Path | None]:
    """A local copy of an artifact of a run, for as long as the block lasts; None if the run has none of that name.

    Raises PipelineError if the store cannot be asked.
    """
    with tempfile.TemporaryDirectory() as folder:
        with store_errors():
            client = MlflowClient()
            listed = client.list_artifacts(run_id, str(Path(path).parent) if "/" in path else None)
            found = client.download_artifacts(run_id, path, folder) if path in [file.path for file in listed] else None
        yield Path(found) if found else None


def open_store() -> bool:
    """Point MLflow to the store. False, and nothing is made, where the repository's own is not there yet."""
    if (database := _own_database()) is None:
        return True
    if not database.exists():
        return False
    mlflow.set_tracking_uri(f"sqlite:///{database}")
    with FileLock(_lock_file()):
        _follow_move(database)
    return True


def _own_database() -> Path | None:
    """The database of the repository's own store; None if the environment names another store."""
    return None if os.environ.get("MLFLOW_TRACKING_URI") else repository_root() / "mlflow.db"


def _lock_file() -> Path:
    return repository_root() / ".mlflow.lock"


def _connect(experiment: str) -> str:
    """Choose the store, make it and the experiment if they are not there, and return the experiment's id."""
    logging.getLogger("alembic").setLevel(logging.WARNING)
    if database := _own_database():
        mlflow.set_tracking_uri(f"sqlite:///{database}")
    experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME") or experiment
    location = None if _has_server() else (repository_root() / "mlruns").as_uri()
    # Two processes that create the database at the same time break it.
    with store_errors(), FileLock(_lock_file()):
        if database and database.exists():
            _follow_move(database)
        if found := mlflow.get_experiment_by_name(experiment):
            if found.lifecycle_stage == "deleted":
                raise PipelineError(f"experiment: {experiment!r} is deleted in MLflow; restore it or name another")
            return str(found.experiment_id)
        return mlflow.create_experiment(experiment, artifact_location=location)


def _has_server() -> bool:
    return mlflow.get_tracking_uri().startswith(("http://", "https://", "databricks"))


@contextmanager
def store_errors() -> Iterator[None]:
    """Tell what the store refused, in one line and the way on, instead of MLflow's traceback."""
    try:
        yield
    except MlflowException as error:
        raise PipelineError(
            f"the MLflow store {mlflow.get_tracking_uri()} cannot be used: {' '.join(str(error).split())[:300]}\n"
            "Start it, or unset MLFLOW_TRACKING_URI to use the repository's own."
        ) from None


def _follow_move(database: Path) -> None:
    """Where the repository was moved or copied, make its store find its artifacts again: it holds absolute paths."""
    artifacts = database.with_name("mlruns")
    with closing(sqlite3.connect(database)) as store, store:
        columns = [
            (table, column)
            for (table,) in store.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
            for _, column, *_ in store.execute(f"PRAGMA table_info({table})").fetchall()
            if column in ("artifact_location", "artifact_uri", "storage_location", "source")
        ]
        if ("experiments", "artifact_location") not in columns:
            return  # being made by another process
        found = store.execute(
            "SELECT artifact_location FROM experiments WHERE artifact_location LIKE 'file://%/mlruns'"
        )
        for (before,) in found.fetchall():
            if before != artifacts.as_uri():
                for table, column in columns:
                    store.execute(
                        f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE substr({column}, 1, ?) = ?",  # noqa: S608
                        (artifacts.as_uri(), len(before) + 1, len(before), before),
                    )


def _run_name() -> str:
    """DVC's name of the experiment, or the commit: names that MLflow draws are no names when everything is seeded."""
    return os.environ.get("DVC_EXP_NAME") or f"repro {git('rev-parse', '--short', 'HEAD')}".strip()


def _tags(environment: Mapping[str, str | int]) -> dict[str, str]:
    md5s = locked_md5s()
    tags = {
        "mlflow.source.name": "dvc repro",
        COMMIT_TAG: git("rev-parse", "HEAD"),
        EXPERIMENT_TAG: os.environ.get("DVC_EXP_NAME", ""),
        "dvc.baseline_rev": os.environ.get("DVC_EXP_BASELINE_REV", ""),
    } | {MD5_TAGS[path]: md5s.get(str(path), "") for path in (IMAGES, ANNOTATIONS)}
    return {key: value for key, value in tags.items() if value} | {
        key: str(value) for key, value in environment.items()
    }


def _log_inputs(params: Params) -> None:
    """Log every parameter, as params.yaml has it, the code, and the data by the md5 that DVC knows it by."""
    changed, patch = changes(".", ":!dvc.lock", ":!metrics")  # these two DVC writes
    if code := [name for name in changed if name != str(PARAMS)]:
        mlflow.set_tag(CHANGED_TAG, " ".join(code))
    if 0 < len(patch) <= LARGEST_PATCH:  # with the commit, the state that was trained
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / PATCH).write_bytes(patch)
            mlflow.log_artifact(str(Path(folder) / PATCH))
    spelt = yaml.safe_load(PARAMS.read_text(encoding="utf-8"))  # 8 stays 8 where the parameter is a float
    mlflow.log_params({key: value if isinstance(value, str) else json.dumps(value) for key, value in spelt.items()})
    md5s = locked_md5s()
    for path in (IMAGES, ANNOTATIONS):
        if digest := md5s.get(str(path)):
            source = CodeDatasetSource({"dvc.path": str(path), "dvc.md5": digest})
            dataset = MetaDataset(source, name=f"{params.source}: {path}", digest=digest)  # type: ignore[abstract]
            mlflow.log_input(dataset, context="training")


def main() -> None:
    """Serve MLflow's pages for the repository's store on the port given as argument, until Ctrl-C."""
    _connect(load_params().experiment)
    if _has_server():
        print(f"MLFLOW_TRACKING_URI is a server: its pages are at {mlflow.get_tracking_uri()}")
        return
    # Without these two, starting takes three times as long: several workers, and jobs that are not used here.
    os.environ.setdefault("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")
    command = [sys.executable, "-m", "mlflow", "ui", "--workers", "1", "--port", *sys.argv[1:2]]
    os.execv(sys.executable, [*command, "--backend-store-uri", mlflow.get_tracking_uri()])


if __name__ == "__main__":
    run_main(main)
