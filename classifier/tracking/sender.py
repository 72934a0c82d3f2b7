"""Send journals to MLflow. Sending a record again has no effect.

`python -m classifier.tracking.sender` runs beside a stage. It reads the path of a journal from standard input, sends
the journal's records, samples system metrics, and exits when the stage closes that input, which the system does for a
killed stage. `classifier sync` sends the remaining records.
"""

import math
import os
import select
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from classifier.pipeline.errors import PipelineError, exit_without_collecting, masked
from classifier.tracking import store
from classifier.tracking.journal import Journal, find_end, home, journals
from classifier.tracking.registry import register
from classifier.tracking.tracker import (
    EXPERIMENT_TAG,
    OPENER_TAG,
    SUPERSEDED_TAG,
    TEST_SET_TAG,
    UPLOAD_PATIENCE,
    WEIGHTS_TAG,
)

# isort: split
# After classifier.tracking.store, which sets the variables that MLflow reads when it is imported
from mlflow import MlflowClient
from mlflow.data.code_dataset_source import CodeDatasetSource
from mlflow.data.meta_dataset import MetaDataset
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, Run, RunTag, ViewType
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

SAMPLE_SECONDS = 10  # between samples of system metrics, and between attempts to reach an unreachable store
RETRY_SECONDS = 5  # minimum between attempts: one takes as long, and a stage may wait for it
TURN_SECONDS = 30  # to wait for another sender


@dataclass
class OpenRun:
    """The run of a journal, and what MLflow has of it.

    logged: metrics by name and step.
    sent: number of sent records; if the journal's own number is higher, another process has sent some.
    end_time: end of the run when it was opened, in milliseconds since 1970; 0 if it had not ended.
    """

    run_id: str
    logged: set[tuple[str, int]]
    sent: int
    end_time: int


class Sender:
    """Send journals to the store that MLFLOW_TRACKING_URI selects."""

    def __init__(self) -> None:
        self._open: dict[Path, OpenRun] = {}

    def send_all(self) -> dict[Path, PipelineError]:
        """Send all journals of this store in order; return the errors by journal.

        Completely sent journals are removed. The run of a stage that was killed becomes KILLED.
        """
        faults: dict[Path, PipelineError] = {}
        try:
            home().mkdir(exist_ok=True)
            turn = FileLock(home() / ".lock", timeout=TURN_SECONDS).acquire()
        except Timeout:
            busy = PipelineError(f"another process is still sending after {TURN_SECONDS:g} seconds; try again later")
            return {journal.folder: busy for journal in journals()}
        except OSError as error:
            closed = PipelineError(f"{home()}: {error.strerror}; make it writable, or free disk space")
            return {journal.folder: closed for journal in journals()}
        with turn:
            for journal in journals():
                try:
                    with store.store_errors():
                        self._send(journal)
                except PipelineError as fault:
                    faults[journal.folder] = fault
                except Exception as error:  # clients of artifact stores raise errors of any type
                    faults[journal.folder] = PipelineError(masked(f"{type(error).__name__}: {error}")[:300])
                if journal.folder in faults:
                    self._open.pop(
                        journal.folder, None
                    )  # query the run again: part of the last record may have arrived
                    if isinstance(faults[journal.folder], store.StoreAway):
                        break
        return faults

    def _send(self, journal: Journal) -> None:
        alive = (
            journal.is_being_written()
        )  # before reading, so that no record of a process that ends meanwhile is missed
        records = journal.records()
        first = records[0] if records else None
        if not first or first["kind"] != "run":  # the disk was full, or the removal was interrupted
            if not alive:
                journal.remove()
            return
        if first["store"] != masked(os.environ.get(store.ADDRESS_VARIABLE, "")):
            return
        known = self._open.get(journal.folder)
        if known and known.sent == journal.sent:
            store.check_writable()
            run = known
        else:
            experiment_id = store.connect(first["experiment"])
            with store.time_limit(store.EXCHANGE_SECONDS):
                run = self._open_run(journal, first, experiment_id)
        # A resumed training may have ended the run after this journal's last record.
        last_time = max(record["time"] for record in records if record)
        is_open = run.end_time <= 1000 * last_time
        if is_open and run is not known:
            with store.time_limit(store.EXCHANGE_SECONDS):
                MlflowClient().update_run(run.run_id, status="RUNNING")
        for number, record in enumerate(records[run.sent :], run.sent + 1):
            if record and record["kind"] != "end":
                # Uploads of pictures and models take longer.
                seconds = store.EXCHANGE_SECONDS if record["kind"] in ("metrics", "tags") else UPLOAD_PATIENCE
                with store.time_limit(seconds):
                    APPLY[record["kind"]](journal, run, record)
            journal.sent = run.sent = number
        end = find_end(records)  # not in the journal, which may have more records by now
        if end or not alive:
            if is_open:
                _end(run, end or {"status": "KILLED", "time": last_time})
            journal.remove()
            del self._open[journal.folder]

    def _open_run(self, journal: Journal, record: dict[str, Any], experiment_id: str) -> OpenRun:
        """Find or create the run of a journal, given the journal's first record."""
        client = MlflowClient()
        found = _find(journal, record, experiment_id)
        if found is None:
            journal.sent = 0  # the store may have been deleted after a part was sent
            started = int(1000 * (record["started"] or record["time"]))
            tags = {OPENER_TAG: record["opener"]}
            found = client.create_run(experiment_id, start_time=started, tags=tags, run_name=record["name"])
        logged = {
            (key, m.step) for key in found.data.metrics for m in client.get_metric_history(found.info.run_id, key)
        }
        self._open[journal.folder] = OpenRun(found.info.run_id, logged, journal.sent, found.info.end_time or 0)
        return self._open[journal.folder]


def _find(journal: Journal, record: dict[str, Any], experiment_id: str) -> Run | None:
    """Return the run opened by this journal or by an interrupted part of the training; else one of the same weights.

    Raises PipelineError if the run is deleted in MLflow.
    """
    experiments = [experiment.experiment_id for experiment in MlflowClient().search_experiments()]
    opened: list[Run] = MlflowClient().search_runs(
        experiments, f"tags.`{OPENER_TAG}` = '{record['opener']}'", run_view_type=ViewType.ALL
    )
    if opened and opened[0].info.lifecycle_stage == "deleted":
        raise PipelineError(
            f"run {opened[0].info.run_id} is deleted in MLflow; "
            f"restore it, or delete {journal.folder} to drop its records"
        )
    if opened:
        return opened[0]
    if not record["weights"]:
        return None
    known = store.find_runs(f"tags.`{WEIGHTS_TAG}` = '{record['weights']}'")
    name = record["tags"].get(EXPERIMENT_TAG)
    known.sort(key=lambda run: (run.tags.get(EXPERIMENT_TAG) != name, run.experiment_id != experiment_id))
    return MlflowClient().get_run(known[0].run_id) if known else None


def _run(journal: Journal, run: OpenRun, record: dict[str, Any]) -> None:
    """Log name, parameters, tags, patch and datasets, unless another journal has opened the run.

    A training opens the run to which its evaluation and export are added.
    """
    client = MlflowClient()
    found = client.get_run(run.run_id)
    if found.data.tags.get(OPENER_TAG) != record["opener"]:
        return
    client.update_run(run.run_id, name=record["name"])
    parameters = record["parameters"].items() - found.data.params.items()
    new = [
        Param(key, value) for key, value in parameters if key not in found.data.params
    ]  # MLflow does not allow changes
    client.log_batch(run.run_id, params=new, tags=[RunTag(key, value) for key, value in record["tags"].items()])
    if record["patch"]:
        client.log_artifact(run.run_id, str(journal.folder / record["patch"]))
    datasets = []
    for data in record["datasets"]:
        source = CodeDatasetSource({"dvc.path": data["path"], "dvc.md5": data["md5"]})
        dataset = MetaDataset(source, name=data["name"], digest=data["md5"])  # type: ignore[abstract]
        entity = Dataset(**dataset.to_dict())
        datasets.append(DatasetInput(entity, [InputTag("mlflow.data.context", "training")]))
    client.log_inputs(run.run_id, datasets=datasets)


def _metrics(journal: Journal, run: OpenRun, record: dict[str, Any]) -> None:
    step, timestamp = record["step"], int(1000 * record["time"])
    new = {key: value for key, value in record["values"].items() if (key, step) not in run.logged}
    MlflowClient().log_batch(run.run_id, metrics=[Metric(key, value, timestamp, step) for key, value in new.items()])
    run.logged |= {(key, step) for key in new}


def _tags(journal: Journal, run: OpenRun, record: dict[str, Any]) -> None:
    MlflowClient().log_batch(run.run_id, tags=[RunTag(key, value) for key, value in record["tags"].items()])
    if record.get("supersedes"):
        for other in store.find_runs(f"tags.`{WEIGHTS_TAG}` = '{record['tags'][WEIGHTS_TAG]}'"):
            if other.run_id != run.run_id and other.status == "FINISHED":
                MlflowClient().set_tag(other.run_id, SUPERSEDED_TAG, run.run_id)


def _files(journal: Journal, run: OpenRun, record: dict[str, Any]) -> None:
    for name, folder in record["files"]:
        path = journal.folder / name
        log = MlflowClient().log_artifacts if path.is_dir() else MlflowClient().log_artifact
        log(run.run_id, str(path), folder)


def _evaluation(journal: Journal, run: OpenRun, record: dict[str, Any]) -> None:
    logged = MlflowClient().get_run(run.run_id).data.tags.get(TEST_SET_TAG)
    if not record["if_missing"] or logged != record["tags"][TEST_SET_TAG]:
        timestamp = int(1000 * record["time"])  # always step 0, so that the latest evaluation counts
        latest = MlflowClient().get_run(run.run_id).data.metrics  # including those of an interrupted evaluation
        new = {key: value for key, value in record["values"].items() if latest.get(key) != value}
        MlflowClient().log_batch(run.run_id, metrics=[Metric(key, value, timestamp, 0) for key, value in new.items()])
        _files(journal, run, record)
        _tags(journal, run, record)


def _model(journal: Journal, run: OpenRun, record: dict[str, Any]) -> None:
    onnx, manifest = journal.folder / record["onnx"], journal.folder / record["manifest"]
    register(run.run_id, record["name"], onnx, manifest, export=journal.folder.name)


def _end(run: OpenRun, record: dict[str, Any]) -> None:
    with store.time_limit(store.EXCHANGE_SECONDS):
        MlflowClient().set_terminated(run.run_id, record["status"], int(1000 * record["time"]))


APPLY: dict[str, Callable[[Journal, OpenRun, dict[str, Any]], None]] = {
    "run": _run,
    "metrics": _metrics,
    "tags": _tags,
    "files": _files,
    "evaluation": _evaluation,
    "model": _model,
}


class Sampler:
    """Sample system metrics during a training, under MLflow's names.

    MLflow's comparison of runs shows the metric that was logged first. So samples are held back until the training has
    logged its first epoch. MLflow's documented function, `mlflow.enable_system_metrics_logging`, logs from a thread and
    loses samples while the store is unreachable; so this calls the methods of its `SystemMetricsMonitor`.
    """

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._started: float | None = None  # start of the training, seconds since 1970; 0 if it is none
        self._held_back: list[dict[str, Any]] = []
        self._has_epoch = False
        # The monitor is not started, so it logs nothing; but a database URI would create the database.
        self._monitor: Any = SystemMetricsMonitor(run_id="", tracking_uri="http://localhost")  # type: ignore[no-untyped-call]
        self._monitor.collect_metrics()  # type: ignore[no-untyped-call]  # CPU load is measured since the last call
        self._clear()

    def sample(self) -> None:
        """Sample if a training writes this journal; the step is the number of seconds since its start."""
        if self._started is None and (records := self._journal.records()):
            self._started = records[0]["started"] if records[0] else 0
        if self._started:
            self._monitor.collect_metrics()
            values = {f"system/{key}": value for key, value in self._monitor.aggregate_metrics().items()}
            self._clear()
            now = time.time()
            self._held_back.append({"time": now, "values": values, "step": round(now - self._started)})
            self._has_epoch = self._has_epoch or any(r and r["kind"] == "metrics" for r in self._journal.records())
            if self._has_epoch:
                self.write()

    def write(self) -> None:
        """Write the held back samples to the journal."""
        with suppress(OSError):  # no disk space, or another process has sent and removed the journal
            for record in self._held_back:
                self._journal.write("metrics", **record)
        self._held_back.clear()

    def _clear(self) -> None:
        for monitor in self._monitor.monitors:
            monitor.clear_metrics()


def send_to_every_store() -> dict[Path, PipelineError]:
    """Send all journals, each to its own store; return the errors by journal."""
    faults: dict[Path, PipelineError] = {}
    here = os.environ.get(store.ADDRESS_VARIABLE, "")
    wanted = {}
    for journal in journals():
        with suppress(PipelineError):  # unreadable; `send_all` reports it
            if (records := journal.records()) and records[0]:
                wanted[journal.folder] = str(records[0]["store"])
    for address in sorted({masked(here), *wanted.values()}):
        if "***" in address and address != masked(here):  # journals hold no passwords
            fault = PipelineError(f"set {store.ADDRESS_VARIABLE} to {address}, with name and password in place of ***")
            faults |= {folder: fault for folder in wanted if wanted[folder] == address}
        else:
            with store.address(here if address == masked(here) else address):
                faults |= Sender().send_all()
    return faults


def main() -> None:
    """Send a journal while a stage writes it; exit with 1 if records are left when the stage has ended."""
    exit_without_collecting()
    with suppress(Exception):  # `send_all` reports it
        store.open_store()  # MLflow's imports take seconds: while those of the stage run, not during training
    path = b""
    while not path.endswith(b"\0"):
        if not (byte := os.read(0, 1)):
            return  # the stage has ended without a journal
        path += byte
    journal = Journal(Path(os.fsdecode(path[:-1])))
    sender, sampler = Sender(), Sampler(journal)
    reported: set[Path] = set()
    away, ended, next_sample = False, False, time.monotonic() + SAMPLE_SECONDS
    failed = -math.inf  # time of the last attempt to reach an unreachable store
    while not ended and journal.folder.exists():  # child processes of the stage may keep standard input open
        readable, _, _ = select.select([0], [], [], max(0, next_sample - time.monotonic()))
        ended = bool(readable) and os.read(0, 1 << 16) == b""
        if measured := time.monotonic() >= next_sample:
            sampler.sample()
            next_sample = time.monotonic() + SAMPLE_SECONDS
        if ended:
            sampler.write()
        just_failed = time.monotonic() - failed < RETRY_SECONDS
        if ended and just_failed:
            break
        if away and not ended and (just_failed or not measured):
            continue
        if ended and journal.records() and not find_end(journal.records()):
            journal.wait_for_writer(seconds=2)  # killed: the system closes its files one by one
        faults = sender.send_all()
        for folder, fault in faults.items():
            if folder not in reported:
                with suppress(OSError):  # the stage has ended and closed the pipe
                    print(f"{fault}\nThe stage continues; records for MLflow are kept in {folder}.", file=sys.stderr)
                reported.add(folder)
        away = bool(faults)
        if any(isinstance(fault, store.StoreAway) for fault in faults.values()):
            failed = time.monotonic()
    sys.exit(int(journal.folder.exists()))


if __name__ == "__main__":
    main()
