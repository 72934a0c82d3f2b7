"""MLflow: the only module that imports it.

There is one store for the repository, wherever a stage runs: DVC's temporary experiments log to it too.
MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME win when they are set. A trained model has one run: `train`
opens it and tags it with the md5 of its weights, by which `evaluate` and `export` find it again.
"""

import json
import logging
import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Read when mlflow is imported
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
# The defaults make one call to a dead server take four minutes.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")

import mlflow
from filelock import FileLock
from mlflow.data.code_dataset_source import CodeDatasetSource
from mlflow.data.meta_dataset import MetaDataset
from mlflow.exceptions import MlflowException
from mlflow.models import infer_signature

from classifier.errors import PipelineError, run_main
from classifier.files import ANNOTATIONS, IMAGES, WEIGHTS, hash_file, locked_md5s
from classifier.params import Params, load_params

if TYPE_CHECKING:
    from torch import Tensor, nn

WEIGHTS_TAG = "md5.model_weights"
NOT_CODE = (".", ":!params.yaml", ":!dvc.lock", ":!metrics")


def repository_root() -> Path:
    """The main checkout, also when DVC runs an experiment in a temporary copy of it."""
    if root := os.environ.get("DVC_ROOT"):
        return Path(root)
    here = Path.cwd()
    return next((folder for folder in (here, *here.parents) if (folder / ".dvc").is_dir()), here)


@contextmanager
def training_run(params: Params, environment: Mapping[str, str | int]) -> Iterator[None]:
    """Open a run for a model about to be trained; it ends FINISHED, or FAILED if the block raises.

    Raises PipelineError if the store cannot be reached.
    """
    experiment_id = _connect(params.experiment)
    with (
        _store_errors(),
        mlflow.start_run(
            experiment_id=experiment_id,
            run_name=os.environ.get("DVC_EXP_NAME"),
            tags=_tags(environment),
            log_system_metrics=True,
        ),
    ):
        _log_inputs(params)
        yield
        mlflow.set_tag(WEIGHTS_TAG, hash_file(WEIGHTS))


@contextmanager
def run_of_weights(params: Params, environment: Mapping[str, str | int]) -> Iterator[None]:
    """Reopen the run that trained models/model_weights.pth, or open one if the store does not know the weights."""
    experiment_id = _connect(params.experiment)
    weights_md5 = hash_file(WEIGHTS)
    with _store_errors():
        run_id = _find_run(weights_md5, experiment_id)
        if run_id:
            with mlflow.start_run(run_id=run_id):
                yield
            return
        tags = _tags(environment) | {WEIGHTS_TAG: weights_md5}
        with mlflow.start_run(experiment_id=experiment_id, run_name=os.environ.get("DVC_EXP_NAME"), tags=tags):
            _log_inputs(params)
            yield


def log_metrics(metrics: Mapping[str, float], step: int | None = None) -> None:
    """Log numbers to the open run in one call."""
    mlflow.log_metrics(dict(metrics), step=step)


def log_files(path: Path, folder: str | None = None) -> None:
    """Log a file, or the files of a folder, to the open run, into a folder of its artifacts."""
    if path.is_dir():
        mlflow.log_artifacts(str(path), folder)
    else:
        mlflow.log_artifact(str(path), folder)


def log_model(network: "nn.Module", pixels: "Tensor", registered_model: str) -> None:
    """Log the trained network to the open run and register it as a new version of `registered_model`.

    pixels: (N, C, H, W) float32 with N >= 2, an example: with one image the batch size would be fixed to 1.
    """
    import torch  # here, because making the store and its pages need no torch

    network.eval()
    with torch.inference_mode():
        signature = infer_signature(pixels.numpy(), network(pixels).numpy())
    mlflow.pytorch.log_model(
        network,
        name="model",
        input_example=pixels.numpy(),
        signature=signature,
        # Finding them out by itself takes MLflow ten seconds.
        pip_requirements=[f"torch=={torch.__version__.split('+')[0]}", f"mlflow=={mlflow.__version__}"],
        registered_model_name=registered_model,
    )


def _connect(experiment: str) -> str:
    """Choose the store, make it and the experiment if they are not there, and return the experiment's id."""
    root = repository_root()
    logging.getLogger("alembic").setLevel(logging.WARNING)
    is_own = not os.environ.get("MLFLOW_TRACKING_URI")
    if is_own:
        mlflow.set_tracking_uri(f"sqlite:///{root / 'mlflow.db'}")
    experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME") or experiment
    location = None if _has_server() else (root / "mlruns").as_uri()
    # Two processes that create the database at the same time break it.
    with _store_errors(), FileLock(root / ".mlflow.lock"):
        if is_own:
            _follow_move(root / "mlflow.db", root / "mlruns")
        if found := mlflow.get_experiment_by_name(experiment):
            if found.lifecycle_stage == "deleted":
                raise PipelineError(f"experiment: {experiment!r} is deleted in MLflow; restore it or name another")
            return str(found.experiment_id)
        return mlflow.create_experiment(experiment, artifact_location=location)


def _has_server() -> bool:
    return mlflow.get_tracking_uri().startswith(("http://", "https://", "databricks"))


@contextmanager
def _store_errors() -> Iterator[None]:
    """Tell what the store refused, in one line and the way on, instead of MLflow's traceback."""
    try:
        yield
    except MlflowException as error:
        raise PipelineError(
            f"the MLflow store {mlflow.get_tracking_uri()} cannot be used: {' '.join(str(error).split())[:300]}\n"
            "Start it, or unset MLFLOW_TRACKING_URI to use the repository's own."
        ) from None


def _follow_move(database: Path, artifacts: Path) -> None:
    """Where the repository was moved or copied, make its store find its artifacts again: it holds absolute paths."""
    if not database.exists():
        return
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


def _find_run(weights_md5: str, experiment_id: str) -> str | None:
    """The id of the newest run with these weights, in this experiment first."""
    everywhere = [experiment.experiment_id for experiment in mlflow.search_experiments()]
    for experiment_ids in ([experiment_id], everywhere):
        runs = mlflow.search_runs(
            experiment_ids=experiment_ids,
            filter_string=f"tags.`{WEIGHTS_TAG}` = '{weights_md5}'",
            order_by=["attributes.start_time DESC"],
            max_results=1,
            output_format="list",
        )
        if runs:
            return str(runs[0].info.run_id)
    return None


def _tags(environment: Mapping[str, str | int]) -> dict[str, str]:
    md5s = locked_md5s()
    tags = {
        "mlflow.source.name": "dvc repro",
        "mlflow.source.git.commit": _git("rev-parse", "HEAD"),
        # What is not in that commit; params.yaml is in the run, and DVC writes dvc.lock and metrics
        "git.changed_files": " ".join(_git("diff", "--name-only", "HEAD", "--", *NOT_CODE).split()),
        "dvc.exp_name": os.environ.get("DVC_EXP_NAME", ""),
        "dvc.baseline_rev": os.environ.get("DVC_EXP_BASELINE_REV", ""),
        "md5.images": md5s.get(str(IMAGES), ""),
        "md5.annotations": md5s.get(str(ANNOTATIONS), ""),
    }
    return {key: value for key, value in tags.items() if value} | {
        key: str(value) for key, value in environment.items()
    }


def _git(*arguments: str) -> str:
    """What git answers, or nothing where there is no git, no repository or no commit."""
    try:
        return subprocess.run(["git", *arguments], capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def _log_inputs(params: Params) -> None:
    """Log every parameter, spelt as in params.yaml, and the data by the md5 that DVC knows it by."""
    mlflow.log_params({key: _spelt(value) for key, value in params.model_dump().items()})
    md5s = locked_md5s()
    for path in (IMAGES, ANNOTATIONS):
        if digest := md5s.get(str(path)):
            source = CodeDatasetSource({"dvc.path": str(path), "dvc.md5": digest})
            dataset = MetaDataset(source, name=f"{params.source}: {path}", digest=digest)  # type: ignore[abstract]
            mlflow.log_input(dataset, context="training")


def _spelt(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


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
