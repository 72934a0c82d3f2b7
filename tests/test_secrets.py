"""Passwords in the addresses of the tracker and of DVC's remotes are written nowhere and printed nowhere."""

import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
from imports import ROOT
from project import Project, small_project
from tracker import Server, contents, statuses, waiting, without_sender

from classifier.pipeline.errors import PipelineError, masked
from classifier.pipeline.params import load_params
from classifier.pipeline.paths import PARAMS, WEIGHTS
from classifier.provenance.storage import _first_line
from classifier.tracking.journal import Journal
from classifier.tracking.store import store_errors
from classifier.tracking.tracker import Tracker

TRACKER_SECRET, REMOTE_SECRET = "tr4cker-s3cret", "r3mote-s3cret"
REMOTE = f"https://me:{REMOTE_SECRET}@127.0.0.1:9/dvc"


def holding(root: Path, secret: str) -> list[str]:
    """The files below a folder that hold a secret, but for the configuration that it is in."""
    return [
        str(path.relative_to(root))
        for path in root.rglob("*")
        if path.is_file() and not path.is_symlink() and path != root / ".dvc/config"
        if secret.encode() in path.read_bytes()
    ]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://me:s3cret@host:80/a refused", "http://***@host:80/a refused"),
        ("http://t0ken-s3cret@host", "http://***@host"),
        ("postgresql://me:a/s3cret@host/db", "postgresql://***@host/db"),
        ("http://me@corp.com:s3cret@host", "http://***@host"),
        ("http://host/a?token=s3cret&b=1", "http://host/a?token=***&b=1"),
        ("azure://host?sv=1&sig=s3%2Fcret'", "azure://host?sv=1&sig=***'"),
        ("mssql://host/?odbc_connect=A%3D1%3BPWD%3Ds3cret%3BB%3D2", "mssql://host/?odbc_connect=A%3D1%3BPWD%3D***%3BB%3D2"),
        ("AccountName=a;AccountKey=s3cret==;B=1", "AccountName=a;AccountKey=***;B=1"),
        ("me:s3cret@host:path", "***@host:path"),
        ("//me:s3cret@host", "//***@host"),
        *((text, text) for text in (
            "sqlite:////home/me@corp/mlflow.db", "git@github.com:a/b.git", "https://host/a?design=1", "row 3: a@b",
        )),
    ],
)  # fmt: skip
def test_what_is_secret_in_an_address_is_masked(text: str, shown: str) -> None:
    assert masked(text) == shown
    assert masked(shown) == shown


def test_a_journal_holds_no_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    params = load_params(ROOT / "params.yaml")
    shutil.copy(ROOT / "params.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:{TRACKER_SECRET}@127.0.0.1:9")
    Path("params.yaml").write_text(f"{Path('params.yaml').read_text()}address: {REMOTE}\n")
    without_sender(monkeypatch)
    tracker = Tracker(params.experiment, {}, PARAMS, [], WEIGHTS)
    monkeypatch.setattr("classifier.tracking.tracker.hash_file", lambda path: "0" * 32)
    with tracker.training({"device": "cpu"}, "name", time.time()):
        pass
    (first, *_) = Journal(tracker.journal.folder).records()
    assert first is not None
    assert first["store"] == "http://***@127.0.0.1:9"
    assert first["parameters"]["address"] == "https://***@127.0.0.1:9/dvc"
    assert holding(tmp_path / ".journal", TRACKER_SECRET) == []
    assert holding(tmp_path / ".journal", REMOTE_SECRET) == []


def test_the_message_of_a_store_that_is_away_holds_no_password(monkeypatch: pytest.MonkeyPatch) -> None:
    address = f"http://me:{TRACKER_SECRET}@127.0.0.1:9"
    before = mlflow.get_tracking_uri()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)  # which the next line sets too: the test's end takes it back
    mlflow.set_tracking_uri(address)
    try:
        with pytest.raises(PipelineError) as told, store_errors():
            raise ConnectionError(f"{'x' * 280} {address}/api refused")  # also where the message is cut
    finally:
        mlflow.set_tracking_uri(before)
    assert "http://***@127.0.0.1:9" in str(told.value)
    assert TRACKER_SECRET[:4] not in str(told.value)


def test_the_message_of_a_remote_that_cannot_be_asked_holds_no_password() -> None:
    told = _first_line(ConnectionError(f"{'x' * 60} cannot connect to {REMOTE}\nsecond line"))
    assert REMOTE_SECRET[:4] not in told


# ---- the whole pipeline, with a server that is away at first


class Used:
    """A project that was used with a tracker and a remote whose addresses hold passwords, and all it has printed."""

    def __init__(self, project: Project, server: Server) -> None:
        self.project = project
        self.server = server
        self.printed = ""
        self.address = server.address.replace("http://", f"http://me:{TRACKER_SECRET}@")

    def run(self, *arguments: str, check: bool = True) -> str:
        done = self.project.run(sys.executable, "-m", *arguments, check=check, **{"MLFLOW_TRACKING_URI": self.address})
        self.printed += f"$ {' '.join(arguments)}\n{done.stdout}{done.stderr}"
        return done.stdout


@pytest.fixture(scope="module")
def used(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Used]:
    folder = tmp_path_factory.mktemp("secrets")
    project, server = small_project(folder, epochs="1", export_formats="[onnx]"), Server(folder / "server")
    project.dvc("remote", "add", "--default", "store", REMOTE)  # not committed
    network = project.root / "classifier/networks/mlp.py"
    network.write_text(network.read_text().replace("512", "64"))
    used = Used(project, server)
    used.run("dvc", "repro")
    used.run("classifier", "sync", check=False)
    used.run("classifier", "lineage", "models/model_weights.pth", check=False)
    assert len(waiting(project)) == 3
    assert holding(project.root, TRACKER_SECRET) == []
    server.start()
    try:
        used.run("classifier", "sync")
        assert statuses(server.database) == ["FINISHED"]
        used.run("dvc", "repro", "--force", "--single-item", "evaluate")
        used.run("classifier", "lineage", "models/model_weights.pth")
        used.run("classifier", "lineage", "models/model_weights.pth", "--json")
        used.run("classifier", "promote")
        used.run("classifier", "report")
        used.run("classifier", "ui", "--port", "1")
        yield used
    finally:
        server.kill()


@pytest.mark.slow
def test_no_command_prints_a_password(used: Used) -> None:
    lines = used.printed.splitlines()
    assert [line for line in lines if TRACKER_SECRET in line or REMOTE_SECRET in line] == []
    assert any("not sent: the MLflow store http://***@127.0.0.1" in line for line in lines)
    assert any("not reachable: " in line for line in lines)


@pytest.mark.slow
def test_no_file_of_the_repository_holds_a_password(used: Used) -> None:
    root = used.project.root
    assert (root / "reports/report.html").exists()
    assert (root / "models/export/manifest.json").exists()
    assert REMOTE_SECRET in (root / ".dvc/config").read_text()
    assert holding(root, TRACKER_SECRET) == []
    assert holding(root, REMOTE_SECRET) == []


@pytest.mark.slow
def test_the_tracker_is_told_no_password_and_none_is_in_the_patch_of_a_run(used: Used) -> None:
    held = contents(used.server.database, used.server.artifacts)
    assert [name for name in held if name.endswith("code.patch")] != []
    assert used.server.database.stat().st_size > 0
    for secret in (TRACKER_SECRET, REMOTE_SECRET):
        assert holding(used.server.folder, secret) == []
