"""The MLflow store: where it is, how it is made, and what is asked of it.

There is one for the repository, wherever a command runs: DVC's temporary experiments have the main checkout's.
MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME win when they are set.
"""

import logging
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

# Read when mlflow is imported
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"  # with name and password
# The defaults make one call to a dead server take four minutes; and what is sent again in the dark may arrive twice.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")

import mlflow
from filelock import FileLock
from mlflow.exceptions import MlflowException
from mlflow.store.db import utils as database_utils
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
from mlflow.tracking import MlflowClient

from classifier.pipeline.errors import PipelineError, masked
from classifier.pipeline.outputs import atomic, temporary_folder
from classifier.pipeline.paths import repository_root

database_utils.MAX_RETRY_COUNT = 1  # ten attempts to reach a database take 100 seconds
logging.getLogger(database_utils.__name__).setLevel(logging.CRITICAL)  # tracebacks of what `store_errors` tells

AWAY = {"INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED"}  # MLflow's codes of what passes
ADDRESS_VARIABLE = "MLFLOW_TRACKING_URI"
OLD_SCHEMA = "out-of-date database schema"  # MLflow's message begins so
SQLITE_SECONDS = 2  # to wait for a store that another process has locked
# MLFLOW_HTTP_REQUEST_TIMEOUT is for each read, so a server that sends a byte now and then would be waited for for ever
EXCHANGE_SECONDS = 10  # for a few small requests
SEARCH_SECONDS = 60  # for all pages of a search


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
    with store_errors(), time_limit(SEARCH_SECONDS):
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


def history(run_id: str, key: str) -> list[float]:
    """The values of a metric of a run, by step. Raises PipelineError if the store cannot be asked."""
    with store_errors(), time_limit(EXCHANGE_SECONDS):
        found = MlflowClient().get_metric_history(run_id, key)
    return [metric.value for metric in sorted(found, key=lambda metric: metric.step)]


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
    """Point MLflow to the store. False, and nothing is made, where its database is not there yet."""
    if (database := _database()) and not database.exists():
        return False
    _use(_address())
    if database and not os.environ.get(ADDRESS_VARIABLE):
        with store_errors(), FileLock(_lock_file()):
            _follow_move(database)
    return True


def _use(uri: str) -> None:
    with address(os.environ.get(ADDRESS_VARIABLE, "")):  # which MLflow sets too
        mlflow.set_tracking_uri(uri)


@contextmanager
def address(named: str) -> Iterator[None]:
    """Have another store named in the environment, or none, as long as the block lasts."""
    before = os.environ.get(ADDRESS_VARIABLE)
    os.environ[ADDRESS_VARIABLE] = named
    try:
        yield
    finally:
        if before is None:
            del os.environ[ADDRESS_VARIABLE]
        else:
            os.environ[ADDRESS_VARIABLE] = before


def _address() -> str:
    return os.environ.get(ADDRESS_VARIABLE) or f"sqlite:///{repository_root() / 'mlflow.db'}"


def _database() -> Path | None:
    """The file that is the store; None if a server has it."""
    name = _address().partition("?")[0]
    return Path(name.removeprefix("sqlite:///")) if name.startswith("sqlite:///") else None


def _lock_file() -> Path:
    return repository_root() / ".mlflow.lock"


def connect(experiment: str) -> str:
    """Make the store and the experiment if they are not there; return the experiment's id.

    Raises PipelineError if the store cannot be written to, or the experiment is deleted.
    """
    logging.getLogger("alembic").setLevel(logging.WARNING)
    artifacts = (repository_root() / "mlruns").as_uri()
    with store_errors(), time_limit(EXCHANGE_SECONDS if _database() is None else SEARCH_SECONDS):  # making one is slow
        if database := _database():
            with FileLock(_lock_file()):  # two processes that create the database at the same time break it
                if not database.exists():
                    _create(database, artifacts)
        open_store()
        check_writable()
        if found := mlflow.get_experiment_by_name(experiment):
            if found.lifecycle_stage == "deleted":
                raise PipelineError(f"experiment: {experiment!r} is deleted in MLflow; restore it or name another")
            return str(found.experiment_id)
        try:
            return mlflow.create_experiment(experiment, artifact_location=None if _has_server() else artifacts)
        except MlflowException:  # another process was quicker
            if found := mlflow.get_experiment_by_name(experiment):
                return str(found.experiment_id)
            raise


def _create(database: Path, artifacts: str) -> None:
    """Make an empty database. It appears when it is complete: one that is cut off could not be used any more."""
    with temporary_folder(database) as folder:
        made = SqlAlchemyStore(f"sqlite:///{folder / database.name}", artifacts)  # type: ignore[no-untyped-call]
        made.engine.dispose()
        (folder / database.name).replace(database)


def check_writable() -> None:
    """Raise sqlite3.Error if the store is a file that cannot be written to: MLflow tries 20 seconds in each call."""
    if (path := _database()) and path.exists():
        with closing(sqlite3.connect(path, timeout=SQLITE_SECONDS)) as database:
            database.execute("BEGIN IMMEDIATE")
            database.rollback()


def _has_server() -> bool:
    return mlflow.get_tracking_uri().startswith(("http://", "https://", "databricks"))


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the block after so many seconds, also out of a request; in the main thread alone."""
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"no complete answer within {seconds:g} seconds")

    started = time.monotonic()
    handler = signal.getsignal(signal.SIGALRM)
    before, _ = signal.getitimer(signal.ITIMER_REAL)
    if 0 < before < seconds:  # an outer limit is nearer
        yield
        return
    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if before:
            signal.setitimer(signal.ITIMER_REAL, max(before - (time.monotonic() - started), 0.001))


class StoreAway(PipelineError):
    """The store cannot be reached, or is locked or full: it may be there again later."""


@contextmanager
def store_errors() -> Iterator[None]:
    """Tell what the store refused, in one line and the way on, instead of MLflow's traceback."""
    try:
        yield
    except (MlflowException, sqlite3.Error, OSError, ImportError) as error:  # OSError: requests' errors too
        if OLD_SCHEMA in str(error):
            raise PipelineError(_way_to_upgrade()) from None
        reason = masked(" ".join(str(error).split()))[:300]
        text = f"the MLflow store {masked(mlflow.get_tracking_uri())} cannot be used: {reason}"
        if isinstance(error, FileNotFoundError) or getattr(error, "error_code", "INTERNAL_ERROR") not in AWAY:
            raise PipelineError(text) from None
        if os.environ.get(ADDRESS_VARIABLE):
            way_on = f"Start it, or unset {ADDRESS_VARIABLE} to use the repository's own."
        else:
            way_on = "Another program may have locked it, or its disk be full or read-only."
        raise StoreAway(f"{text}\n{way_on}") from None
    except Exception as error:
        if not type(error).__module__.startswith("alembic"):  # which upgrades databases
            raise
        raise PipelineError(
            f"{masked(_address())}: made by a newer version of MLflow than the one here ({masked(str(error))}); "
            "`make env` installs the one that requirements.lock names"
        ) from None


def _way_to_upgrade() -> str:
    if os.environ.get(ADDRESS_VARIABLE):
        return (
            f"the MLflow store {masked(_address())} has the schema of another version of MLflow; whoever runs it "
            "upgrades it: mlflow db upgrade <its database>"
        )
    return (
        f"{_database()}: made by another version of MLflow; `classifier upgrade-store` copies it, then runs "
        "`mlflow db upgrade sqlite:///mlflow.db`"
    )


def upgrade_store() -> Path:
    """Upgrade the schema of mlflow.db; return the copy that was made of it before.

    Raises PipelineError if there is no such file, or MLflow cannot upgrade it; then it is as it was.
    """
    database = _database()
    if database is None or not database.exists():
        raise PipelineError(
            f"{masked(_address())}: no file to upgrade; of a server, whoever runs it upgrades the store"
        )
    copy = database.with_name(f"{database.name}.before-{time.strftime('%Y%m%d-%H%M%S')}")
    with FileLock(_lock_file()), store_errors(), atomic(copy) as temporary:
        _copy(database, temporary)
    with FileLock(_lock_file()), atomic(database) as temporary:
        _copy(copy, temporary)
        command = [sys.executable, "-m", "mlflow", "db", "upgrade", f"sqlite:///{temporary}"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            said = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
            raise PipelineError(f"{database}: not upgraded, and as it was: {said}")
    return copy


def _copy(database: Path, target: Path) -> None:
    """Copy a database as it is between two transactions."""
    with closing(sqlite3.connect(database)) as source, closing(sqlite3.connect(target)) as copy:
        source.backup(copy)


def _follow_move(database: Path) -> None:
    """Where the repository was moved or copied, make its store find its artifacts again: it holds absolute paths."""
    artifacts = database.with_name("mlruns")
    with closing(sqlite3.connect(database, timeout=SQLITE_SECONDS)) as store, store:
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


def serve_pages(port: int, experiment_id: str) -> None:
    """Become MLflow's server of pages for the store, until Ctrl-C; a store that is a server has pages of its own.

    The address of the experiment's training runs is printed: MLflow's own first page is about generative AI.
    """
    runs = f"#/experiments/{experiment_id}/runs?workflowType=machine_learning"
    if _has_server():
        print(
            f"MLFLOW_TRACKING_URI is a server: the runs are at {masked(mlflow.get_tracking_uri()).rstrip('/')}/{runs}"
        )
        return
    print(f"Runs: http://127.0.0.1:{port}/{runs}\nReady in a few seconds; Ctrl-C ends it.", flush=True)
    # Without these two, starting takes three times as long: several workers, and jobs that are not used here.
    os.environ.setdefault("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")
    command = [sys.executable, "-m", "mlflow", "ui", "--workers", "1", "--port", str(port)]
    os.execv(sys.executable, [*command, "--backend-store-uri", mlflow.get_tracking_uri()])
