"""The MLflow store: its address, its creation, queries and errors.

A repository has one store: DVC's temporary experiments use that of the main checkout. MLFLOW_TRACKING_URI and
MLFLOW_EXPERIMENT_NAME take precedence.
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
from contextlib import chdir, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

# MLflow reads these variables when it is imported.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"  # the URL may contain a password
# With MLflow's defaults, one call to a dead server takes four minutes, and a repeated request may be applied twice.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")

import mlflow
from filelock import FileLock
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from classifier.pipeline.errors import PipelineError, masked
from classifier.pipeline.outputs import atomic, temporary_folder
from classifier.pipeline.paths import repository_root

logging.getLogger("mlflow.store").setLevel(logging.CRITICAL)  # omit tracebacks of errors that `store_errors` reports

TRANSIENT_ERRORS = {"INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED"}  # MLflow's error codes
ADDRESS_VARIABLE = "MLFLOW_TRACKING_URI"
OLD_SCHEMA = "out-of-date database schema"  # part of MLflow's message, which has no error code of its own
SQLITE_SECONDS = 2  # to wait for a database that another process has locked
# MLFLOW_HTTP_REQUEST_TIMEOUT limits each read, so it does not limit a server that sends a byte at a time.
EXCHANGE_SECONDS = 10  # for a few small requests
SEARCH_SECONDS = 60  # for all pages of a search


@dataclass(frozen=True)
class Run:
    """A run in the store."""

    run_id: str
    name: str
    experiment_id: str
    status: str
    parameters: dict[str, str]
    metrics: dict[str, float]
    tags: dict[str, str]


def find_runs(filter_string: str = "") -> list[Run]:
    """Return the runs of all experiments that match MLflow's filter, newest first; none if there is no store.

    Raises PipelineError if the store cannot be read.
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
    """Return the values of a run's metric, ordered by step. Raises PipelineError if the store cannot be read."""
    with store_errors(), time_limit(EXCHANGE_SECONDS):
        found = MlflowClient().get_metric_history(run_id, key)
    return [metric.value for metric in sorted(found, key=lambda metric: metric.step)]


@contextmanager
def artifact(run_id: str, path: str) -> Iterator[Path | None]:
    """Yield a temporary local copy of a run's artifact, or None if the run has no artifact at this path.

    Raises PipelineError if the store cannot be read.
    """
    with tempfile.TemporaryDirectory() as folder:
        with store_errors():
            client = MlflowClient()
            listed = client.list_artifacts(run_id, str(Path(path).parent) if "/" in path else None)
            found = client.download_artifacts(run_id, path, folder) if path in [file.path for file in listed] else None
        yield Path(found) if found else None


def open_store() -> bool:
    """Set MLflow's tracking URI. Return False, and create nothing, if the database does not exist yet.

    Raises PipelineError if the database cannot be read.
    """
    if (database := _database()) and not database.exists():
        return False
    _use(_address())
    if database:
        with store_errors():
            _check_readable(database)
            if not os.environ.get(ADDRESS_VARIABLE):
                with FileLock(_lock_file()):
                    _relocate_artifacts(database)
            MlflowClient()  # imports MLflow's database backend, which takes seconds, before time limits apply
    return True


def _use(uri: str) -> None:
    with address(os.environ.get(ADDRESS_VARIABLE, "")):  # `set_tracking_uri` sets the variable too
        mlflow.set_tracking_uri(uri)


@contextmanager
def address(named: str) -> Iterator[None]:
    """Set MLFLOW_TRACKING_URI within the block; an empty string selects the repository's own store."""
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
    """Return the store's SQLite file; None for a server or another database."""
    name = _address().partition("?")[0]
    return Path(name.removeprefix("sqlite:///")) if name.startswith("sqlite:///") else None


def _lock_file() -> Path:
    return repository_root() / ".mlflow.lock"


def connect(experiment: str) -> str:
    """Create the store and the experiment if missing; return the experiment's id.

    Raises PipelineError if the store is not writable or the experiment is deleted.
    """
    logging.getLogger("alembic").setLevel(logging.WARNING)
    with store_errors(), time_limit(EXCHANGE_SECONDS if _database() is None else SEARCH_SECONDS):  # creation is slow
        if database := _database():
            with FileLock(_lock_file()):  # two processes that create the database at once corrupt it
                if not database.exists():
                    _create(database)
        open_store()
        check_writable()
        if found := mlflow.get_experiment_by_name(experiment):
            if found.lifecycle_stage == "deleted":
                raise PipelineError(f"experiment: {experiment!r} is deleted in MLflow; restore it or name another")
            return str(found.experiment_id)
        artifacts = None if _has_server() else (repository_root() / "mlruns").as_uri()
        try:
            return mlflow.create_experiment(experiment, artifact_location=artifacts)
        except MlflowException:  # another process has created it meanwhile
            if found := mlflow.get_experiment_by_name(experiment):
                return str(found.experiment_id)
            raise


def _create(database: Path) -> None:
    """Create an empty database atomically: MLflow cannot use one whose creation was interrupted.

    MLflow creates the tables when a client first reads the database, and the experiment `Default`, whose artifacts go
    to `mlruns` in the working directory of that moment.
    """
    with temporary_folder(database) as folder, chdir(repository_root()):
        MlflowClient(f"sqlite:///{folder / database.name}").search_experiments()
        (folder / database.name).replace(database)


def _check_readable(database: Path) -> None:
    """Raise sqlite3.Error if the database cannot be read: MLflow makes ten attempts, which take 100 seconds."""
    with closing(sqlite3.connect(database, timeout=SQLITE_SECONDS)) as connection:
        connection.execute("PRAGMA schema_version").fetchone()


def check_writable() -> None:
    """Raise sqlite3.Error if the store is a file that is not writable: MLflow waits for 20 seconds in each call."""
    if (path := _database()) and path.exists():
        with closing(sqlite3.connect(path, timeout=SQLITE_SECONDS)) as database:
            database.execute("BEGIN IMMEDIATE")
            database.rollback()


def _has_server() -> bool:
    return mlflow.get_tracking_uri().startswith(("http://", "https://", "databricks"))


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError if the block takes longer, also during a request. Has an effect in the main thread only."""
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
    """The store is unreachable, locked or full. A later attempt may succeed."""


@contextmanager
def store_errors() -> Iterator[None]:
    """Replace MLflow's tracebacks by one-line errors that say what to do next.

    Raises StoreAway if a later attempt may succeed, PipelineError otherwise.
    """
    try:
        yield
    except (MlflowException, sqlite3.Error, OSError, ImportError) as error:  # OSError: requests' errors too
        if OLD_SCHEMA in str(error):
            raise PipelineError(_upgrade_instructions()) from None
        reason = masked(" ".join(str(error).split()))[:300]
        text = f"the MLflow store {masked(mlflow.get_tracking_uri())} cannot be used: {reason}"
        if (
            isinstance(error, FileNotFoundError)
            or getattr(error, "error_code", "INTERNAL_ERROR") not in TRANSIENT_ERRORS
        ):
            raise PipelineError(text) from None
        if os.environ.get(ADDRESS_VARIABLE):
            advice = f"Start it, or unset {ADDRESS_VARIABLE} to use the repository's own store."
        else:
            advice = "Another program may have locked it, or its disk may be full or read-only."
        raise StoreAway(f"{text}\n{advice}") from None
    except Exception as error:
        if not type(error).__module__.startswith("alembic"):  # MLflow's schema migrations
            raise
        raise PipelineError(
            f"{masked(_address())}: created by a newer version of MLflow than the installed one "
            f"({masked(str(error))}); `make env` installs the version in requirements.lock"
        ) from None


def _upgrade_instructions() -> str:
    if os.environ.get(ADDRESS_VARIABLE):
        return (
            f"the MLflow store {masked(_address())} has the schema of another version of MLflow; ask its "
            "administrator to run: mlflow db upgrade <database URI>"
        )
    return (
        f"{_database()}: created by another version of MLflow; `classifier upgrade-store` makes a backup and upgrades "
        "the schema"
    )


def upgrade_store() -> Path:
    """Upgrade the schema of mlflow.db; return the path of the backup.

    Raises PipelineError, and leaves the file unchanged, if it does not exist or MLflow cannot upgrade it.
    """
    database = _database()
    if database is None or not database.exists():
        raise PipelineError(
            f"{masked(_address())}: no SQLite file to upgrade; a server's store is upgraded by its administrator"
        )
    backup = database.with_name(f"{database.name}.before-{time.strftime('%Y%m%d-%H%M%S')}")
    with FileLock(_lock_file()), store_errors(), atomic(backup) as temporary:
        _copy(database, temporary)
    with FileLock(_lock_file()), atomic(database) as temporary:
        _copy(backup, temporary)
        command = [sys.executable, "-m", "mlflow", "db", "upgrade", f"sqlite:///{temporary}"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            reason = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
            raise PipelineError(f"{database}: the upgrade failed, and the file is unchanged: {reason}")
    return backup


def _copy(database: Path, target: Path) -> None:
    """Copy a database in a consistent state while other processes may write to it."""
    with closing(sqlite3.connect(database)) as source, closing(sqlite3.connect(target)) as copy:
        source.backup(copy)


def _relocate_artifacts(database: Path) -> None:
    """Update the absolute artifact paths in the database if the repository was moved or copied.

    This writes to MLflow's tables because MLflow has no API for it: an artifact location cannot be changed after an
    experiment, run, model or version was created (https://github.com/mlflow/mlflow/issues/3144), and relative
    locations are made absolute when they are stored.
    """
    artifacts = database.with_name("mlruns")
    with closing(sqlite3.connect(database, timeout=SQLITE_SECONDS)) as store, store:
        columns = [
            (table, column)
            for (table,) in store.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
            for _, column, *_ in store.execute(f"PRAGMA table_info({table})").fetchall()
            if column in ("artifact_location", "artifact_uri", "storage_location", "source")
        ]
        if ("experiments", "artifact_location") not in columns:
            return  # another process is creating the tables
        locations = [location for (location,) in store.execute("SELECT artifact_location FROM experiments")]
        uris = {location for location in locations if location.startswith("file://") and location.endswith("/mlruns")}
        # The location of `Default` is a path, see `_create`.
        paths = {location[:-2] for location in locations if location.startswith("/") and location.endswith("/mlruns/0")}
        for old, new in [(uri, artifacts.as_uri()) for uri in uris] + [(path, str(artifacts)) for path in paths]:
            for table, column in columns if old != new else []:
                store.execute(
                    f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE substr({column}, 1, ?) = ?",  # noqa: S608
                    (new, len(old) + 1, len(old), old),
                )


def serve_pages(port: int, experiment_id: str) -> None:
    """Replace this process by MLflow's web UI for the store. If the store is a server, only print its address.

    Print the URL of the experiment's training runs, because MLflow's start page is about generative AI.
    """
    runs = f"#/experiments/{experiment_id}/runs?workflowType=machine_learning"
    if _has_server():
        print(
            f"MLFLOW_TRACKING_URI is a server: the runs are at {masked(mlflow.get_tracking_uri()).rstrip('/')}/{runs}"
        )
        return
    print(f"Runs: http://127.0.0.1:{port}/{runs}\nReady in a few seconds; press Ctrl-C to stop.", flush=True)
    # Several workers, and the job runner that is not used here, make the start take three times as long.
    os.environ.setdefault("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")
    command = [sys.executable, "-m", "mlflow", "ui", "--workers", "1", "--port", str(port)]
    os.execv(sys.executable, [*command, "--backend-store-uri", mlflow.get_tracking_uri()])
