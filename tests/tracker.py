"""MLflow as tests need it: real servers that come and go, impostors, and what a store holds."""

import http.server
import io
import os
import signal
import socket
import socketserver
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from project import Project, clean_environment, python

from classifier.data.lockfile import locked_md5s
from classifier.pipeline import paths
from classifier.pipeline.outputs import hash_file
from classifier.pipeline.params import load_params
from classifier.tracking.journal import Journal
from classifier.tracking.tracker import Tracker

EVALUATION = (paths.TEST_METRICS, [paths.CLASS_METRICS, paths.PLOTS])

# A training that tells five epochs, waits for a line from the test, and does so again until the line is "end".
PACED = """
import sys, time
from pathlib import Path
from uuid import uuid4
from classifier.pipeline.errors import PipelineError, run_main
from classifier.pipeline.params import load_params
from classifier.tracking.tracker import Tracker
def main():
    epoch, params, weights = 0, load_params(), Path("models/model_weights.pth")
    tracker = Tracker(params.experiment, {}, Path("params.yaml"), [], weights)
    Path("models").mkdir(exist_ok=True)
    Path("models/model_weights.pth").write_text(uuid4().hex)
    with tracker.training({"device": "cpu"}, uuid4().hex, time.time()):
        tracker.log_files(Path("params.yaml"))
        line = ""
        while line != "end":
            if line == "fail":
                raise PipelineError("as when the loss is not finite")
            for epoch in range(epoch + 1, epoch + 6):
                tracker.log_metrics({"train_loss": 1 / epoch, "val_loss": 2 / epoch}, step=epoch)
            print("told", flush=True)
            line = sys.stdin.readline().strip()
run_main(main)
"""


def stage_tracker(experiment: str | None = None) -> Tracker:
    """The tracker that a stage in this folder has."""
    params, data = load_params(), (paths.IMAGES, paths.ANNOTATIONS)
    md5s = locked_md5s(paths.LOCK)
    return Tracker(experiment or params.experiment, md5s, paths.PARAMS, data, paths.WEIGHTS)


@contextmanager
def paced(project: Project, program: str | None = None, /, **env: str) -> Iterator["subprocess.Popen[str]"]:
    """The training PACED, after its first five epochs."""
    with subprocess.Popen(
        [program or python(), "-c", PACED],
        cwd=project.root, env=clean_environment(project.root.parent, **env),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == "told\n"
        yield process
        process.kill()


def tell(process: "subprocess.Popen[str]", line: str) -> None:
    """Let a paced training go on for five epochs."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(f"{line}\n")
    process.stdin.flush()
    assert process.stdout.readline() == "told\n"


def finish(process: "subprocess.Popen[str]", line: str = "end") -> str:
    """Let a paced training end; return what it says on standard error."""
    _, complaint = process.communicate(f"{line}\n", timeout=120)
    return complaint


def wait_for(condition: Callable[[], object], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "in vain"
        time.sleep(0.1)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


class Server:
    """A real MLflow server with a database and artifacts of its own, on one port each time it is started."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.database = folder / "server.db"
        self.artifacts = folder / "artifacts"
        self.port = free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        # Without the second, starting takes three times as long.
        settings = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with (self.folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                self.command(), cwd=self.folder, env=clean_environment(self.folder, **settings, **self.environment()),
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        wait_for(self._answers, seconds=240)

    def command(self) -> list[str]:
        return [
            python(), "-m", "mlflow", "server", "--workers", "1", "--port", str(self.port),
            "--backend-store-uri", f"sqlite:///{self.database}", "--artifacts-destination", str(self.artifacts),
        ]  # fmt: skip

    def environment(self) -> dict[str, str]:
        return {}

    def kill(self) -> None:
        if self._process and self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, (self.folder / "server.log").read_text()
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0


@contextmanager
def silent_server() -> Iterator[str]:
    """The address of a server that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=1000) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@contextmanager
def dripping_server(part: str) -> Iterator[str]:
    """The address of a server that sends an answer's "header" or "body" byte by byte, without an end."""
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.recv(1 << 16)
            self.request.sendall(head + (b"X: " if part == "header" else b"Content-Length: 100000\r\n\r\n"))
            with suppress(OSError):  # whoever asked has gone
                while not is_over.wait(0.3):
                    self.request.sendall(b" ")

    is_over = threading.Event()
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            is_over.set()
            server.shutdown()
            thread.join()


@contextmanager
def impostor(status: int, body: bytes) -> Iterator[str]:
    """The address of a server that answers everything in the same way."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = do_PATCH = do_PUT = do_DELETE = answer  # noqa: N815

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


def query(database: Path, statement: str, *values: str) -> list[tuple[Any, ...]]:
    """What a store's database answers; nothing where it is not there, or not ready, yet."""
    if not database.exists():
        return []
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=30)) as store:
        if not store.execute("SELECT 1 FROM sqlite_master WHERE name = 'logged_models'").fetchall():
            return []
        return store.execute(statement, values).fetchall()


def statuses(database: Path, experiment: str = "fashion-mnist") -> list[str]:
    found = query(
        database, "SELECT status FROM runs JOIN experiments e USING (experiment_id) WHERE e.name = ?", experiment
    )
    return [status for (status,) in found]


def steps(database: Path, key: str, experiment: str = "fashion-mnist") -> list[int]:
    """The steps of a metric in all runs of an experiment, in order: one that is logged twice is there twice."""
    found = query(
        database,
        "SELECT step FROM metrics JOIN runs USING (run_uuid) JOIN experiments e USING (experiment_id) "
        "WHERE metrics.key = ? AND e.name = ? ORDER BY step",
        key,
        experiment,
    )
    return [step for (step,) in found]


def contents(database: Path, artifacts: Path) -> dict[str, Any]:
    """All that a store holds: the rows of each table, and the digest of each artifact."""
    tables = [name for (name,) in query(database, "SELECT name FROM sqlite_master WHERE type = 'table'")]
    found: dict[str, Any] = {
        name: sorted(map(repr, query(database, f"SELECT * FROM {name}")))  # noqa: S608
        for name in tables
    }
    for file in artifacts.rglob("*"):
        if file.is_file():
            found[file.relative_to(artifacts).as_posix()] = hash_file(file)
    return found


def waiting(project: Project) -> list[Path]:
    """The folders of the journals that are not sent."""
    return sorted((project.root / ".journal").glob("[0-9]*/"))


def steps_waiting(project: Project, key: str) -> list[int]:
    """The steps of a metric in the journals, in their order."""
    records = [record for folder in waiting(project) for record in Journal(folder).records() if record]
    return [record["step"] for record in records if key in record.get("values", {}) and record["kind"] == "metrics"]


def send_the_rest(project: Project) -> None:
    """Send what a busy machine had no time for."""
    if waiting(project):
        project.run(sys.executable, "-m", "classifier", "sync")


class _NoSender:
    """In place of the process that sends, where a test sends by itself."""

    def __init__(self) -> None:
        self.stdin, self.stderr = Path(os.devnull).open("wb"), io.BytesIO()  # noqa: SIM115

    def wait(self, seconds: float | None = None) -> int:
        self.stdin.close()
        return 0

    def kill(self) -> None:
        pass


def without_sender(patch: pytest.MonkeyPatch) -> None:
    """Have trackers of this process write their journals, and no process beside it send them."""
    patch.setattr("classifier.tracking.tracker._start_sender", _NoSender)
