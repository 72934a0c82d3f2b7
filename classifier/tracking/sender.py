"""From journals to MLflow: each record is sent once, or again without effect.

`python -m classifier.tracking.sender` runs beside a stage, which gives it the path of a journal on its standard input,
sends what is written there, measures the machine meanwhile, and ends when the stage has closed that input, as the
system does for one that is killed. `classifier sync` sends what is left.
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
# After classifier.tracking.store, which sets what is read when mlflow is imported
from mlflow import MlflowClient
from mlflow.data.code_dataset_source import CodeDatasetSource
from mlflow.data.meta_dataset import MetaDataset
from mlflow.entities import DatasetInput, InputTag, Metric, Param, Run, RunTag, ViewType
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

SAMPLE_SECONDS = 10  # between measurements of the machine, and between attempts to reach a store that is away
RETRY_SECONDS = 5  # for which a store that was away is not tried again: an attempt takes as long, and a stage may wait
TURN_SECONDS = 30  # to wait for another process that sends


@dataclass
class OpenRun:
    """The run that a journal speaks of, and what it has already: metrics by name and step.

    sent: how many of the journal's records; if it has more by now, another process has sent them.
    end_time: milliseconds since 1970 at which the run had ended when it was opened, 0 if it had not.
    """

    run_id: str
    logged: set[tuple[str, int]]
    sent: int
    end_time: int


class Sender:
    """Sends journals to the store that the environment names."""

    def __init__(self) -> None:
        self._open: dict[Path, OpenRun] = {}

    def send_all(self) -> dict[Path, PipelineError]:
        """Send what all journals for this store hold, in their order; return what went wrong, by journal.

        Journals that have ended are then removed, and those whose process has: such a run becomes KILLED.
        """
        faults: dict[Path, PipelineError] = {}
        try:
            home().mkdir(exist_ok=True)
            turn = FileLock(home() / ".lock", timeout=TURN_SECONDS).acquire()
        except Timeout:
            busy = PipelineError("another process is sending, and has not come to an end yet")
            return {journal.folder: busy for journal in journals()}
        except OSError as error:
            closed = PipelineError(f"{home()}: {error.strerror}; make it writable, or make room")
            return {journal.folder: closed for journal in journals()}
        with turn:
            for journal in journals():
                try:
                    with store.store_errors():
                        self._send(journal)
                except PipelineError as fault:
                    faults[journal.folder] = fault
                except Exception as error:  # whatever the client of an artifact store raises
                    faults[journal.folder] = PipelineError(masked(f"{type(error).__name__}: {error}")[:300])
                if journal.folder in faults:
                    self._open.pop(journal.folder, None)  # next time it is asked what of the last record has arrived
                    if isinstance(faults[journal.folder], store.StoreAway):
                        break
        return faults

    def _send(self, journal: Journal) -> None:
        alive = journal.is_being_written()  # asked first: what a process has written before it ended is sent
        records = journal.records()
        first = records[0] if records else None
        if not first or first["kind"] != "run":  # the disk was full, or a removal was cut off
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
            with store.time_limit(store.EXCHANGE_SECONDS):
                run = self._open_run(journal, first)
        # A training that was killed and has gone on can have ended the run after all that this journal tells
        last_time = max(record["time"] for record in records if record)
        is_open = run.end_time <= 1000 * last_time
        if is_open and run is not known:
            with store.time_limit(store.EXCHANGE_SECONDS):
                MlflowClient().update_run(run.run_id, status="RUNNING")
        for number, record in enumerate(records[run.sent :], run.sent + 1):
            if record and record["kind"] != "end":
                # Pictures and models may take long to send
                seconds = store.EXCHANGE_SECONDS if record["kind"] in ("metrics", "tags") else UPLOAD_PATIENCE
                with store.time_limit(seconds):
                    APPLY[record["kind"]](journal, run, record)
            journal.sent = run.sent = number
        end = find_end(records)  # in these: more may be there by now
        if end or not alive:
            if is_open:
                _end(run, end or {"status": "KILLED", "time": last_time})
            journal.remove()
            del self._open[journal.folder]

    def _open_run(self, journal: Journal, record: dict[str, Any]) -> OpenRun:
        """Find the run that the first record of a journal speaks of, or make it."""
        experiment_id = store.connect(record["experiment"])
        client = MlflowClient()  # of this store
        found = _find(journal, record, experiment_id)
        if found is None:
            journal.sent = 0  # also if there has been a run, in a store that was then made anew
            started = int(1000 * (record["started"] or record["time"]))
            tags = {OPENER_TAG: record["opener"]}
            found = client.create_run(experiment_id, start_time=started, tags=tags, run_name=record["name"])
        logged = {
            (key, m.step) for key in found.data.metrics for m in client.get_metric_history(found.info.run_id, key)
        }
        self._open[journal.folder] = OpenRun(found.info.run_id, logged, journal.sent, found.info.end_time or 0)
        return self._open[journal.folder]


def _find(journal: Journal, record: dict[str, Any], experiment_id: str) -> Run | None:
    """The run that this journal, or this training before it was killed, has opened; else one of the same weights.

    Raises PipelineError if it was deleted.
    """
    experiments = [experiment.experiment_id for experiment in MlflowClient().search_experiments()]
    opened: list[Run] = MlflowClient().search_runs(
        experiments, f"tags.`{OPENER_TAG}` = '{record['opener']}'", run_view_type=ViewType.ALL
    )
    if opened and opened[0].info.lifecycle_stage == "deleted":
        raise PipelineError(
            f"run {opened[0].info.run_id} is deleted in MLflow; restore it, or remove {journal.folder} to do without it"
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
    """Say what the run is of, unless another has opened it, as the training has that of its evaluation."""
    client = MlflowClient()
    found = client.get_run(run.run_id)
    if found.data.tags.get(OPENER_TAG) != record["opener"]:
        return
    client.update_run(run.run_id, name=record["name"])
    parameters = record["parameters"].items() - found.data.params.items()
    new = [Param(key, value) for key, value in parameters if key not in found.data.params]  # they cannot be changed
    client.log_batch(run.run_id, params=new, tags=[RunTag(key, value) for key, value in record["tags"].items()])
    if record["patch"]:
        client.log_artifact(run.run_id, str(journal.folder / record["patch"]))
    datasets = []
    for data in record["datasets"]:
        source = CodeDatasetSource({"dvc.path": data["path"], "dvc.md5": data["md5"]})
        dataset = MetaDataset(source, name=data["name"], digest=data["md5"])  # type: ignore[abstract]
        datasets.append(DatasetInput(dataset._to_mlflow_entity(), [InputTag("mlflow.data.context", "training")]))
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
        timestamp = int(1000 * record["time"])  # without steps: the last evaluation counts
        latest = MlflowClient().get_run(run.run_id).data.metrics  # also of an evaluation that was killed
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
    """What the machine does while a training runs, under MLflow's names for it.

    MLflow's comparison of runs opens on the metric that was logged first. So measurements are kept back until the
    training has logged its first epoch.
    """

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._started: float | None = None  # the training, in seconds since 1970; 0 if none writes this journal
        self._kept_back: list[dict[str, Any]] = []
        self._has_epoch = False
        # It logs nothing here, but would make the database that its address names.
        self._monitor: Any = SystemMetricsMonitor(run_id="", tracking_uri="http://localhost")  # type: ignore[no-untyped-call]
        self._monitor.collect_metrics()  # type: ignore[no-untyped-call]  # the load since now
        self._clear()

    def sample(self) -> None:
        """Measure, and write a record by the seconds since the training's start, if a training writes this journal."""
        if self._started is None and (records := self._journal.records()):
            self._started = records[0]["started"] if records[0] else 0
        if self._started:
            self._monitor.collect_metrics()
            values = {f"system/{key}": value for key, value in self._monitor.aggregate_metrics().items()}
            self._clear()
            now = time.time()
            self._kept_back.append({"time": now, "values": values, "step": round(now - self._started)})
            self._has_epoch = self._has_epoch or any(r and r["kind"] == "metrics" for r in self._journal.records())
            if self._has_epoch:
                self.write()

    def write(self) -> None:
        """Write the records that were kept back."""
        with suppress(OSError):  # no room, or another process has sent and removed the journal
            for record in self._kept_back:
                self._journal.write("metrics", **record)
        self._kept_back.clear()

    def _clear(self) -> None:
        for monitor in self._monitor.monitors:
            monitor.clear_metrics()


def send_to_every_store() -> dict[Path, PipelineError]:
    """Send all journals, each to the store that it was written for; return what went wrong, by journal."""
    faults: dict[Path, PipelineError] = {}
    here = os.environ.get(store.ADDRESS_VARIABLE, "")
    wanted = {}
    for journal in journals():
        with suppress(PipelineError):  # one that cannot be read: whoever sends says so
            if (records := journal.records()) and records[0]:
                wanted[journal.folder] = str(records[0]["store"])
    for address in sorted({masked(here), *wanted.values()}):
        if "***" in address and address != masked(here):  # a journal holds no password
            fault = PipelineError(f"set {store.ADDRESS_VARIABLE} to {address}, with name and password for the stars")
            faults |= {folder: fault for folder in wanted if wanted[folder] == address}
        else:
            with store.address(here if address == masked(here) else address):
                faults |= Sender().send_all()
    return faults


def main() -> None:
    """Send as a stage writes, until its end; exit with 1 if something is left in its journal."""
    exit_without_collecting()
    path = b""
    while not path.endswith(b"\0"):
        if not (byte := os.read(0, 1)):
            return  # the stage has ended before it had anything to tell
        path += byte
    journal = Journal(Path(os.fsdecode(path[:-1])))
    sender, sampler = Sender(), Sampler(journal)
    told: set[Path] = set()
    away, ended, next_sample = False, False, time.monotonic() + SAMPLE_SECONDS
    failed = -math.inf  # when the store was found to be away
    while not ended and journal.folder.exists():  # processes of the stage may keep it open beyond its end
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
            journal.wait_for_writer(seconds=2)  # it was killed: the system closes its files one after the other
        faults = sender.send_all()
        for folder, fault in faults.items():
            if folder not in told:
                with suppress(OSError):  # the stage that listened has ended
                    print(f"{fault}\nNo stage waits for it; what it has to get is kept in {folder}.", file=sys.stderr)
                told.add(folder)
        away = bool(faults)
        if any(isinstance(fault, store.StoreAway) for fault in faults.values()):
            failed = time.monotonic()
    sys.exit(int(journal.folder.exists()))


if __name__ == "__main__":
    main()
