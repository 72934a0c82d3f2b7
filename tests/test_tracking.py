"""One MLflow store for the repository, made safely, found from anywhere, with a status for each way to end."""

import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
from dvc_queue import processes_in
from mlflow import MlflowClient
from mlflow.entities import Run
from project import Project, real_environment
from tracker import finish, paced, send_the_rest, statuses, wait_for

from classifier.tracking.tracker import _user

pytestmark = pytest.mark.slow


@pytest.fixture
def project(tmp_path: Path) -> Project:
    project = Project.create(tmp_path / "project")
    project.commit()
    return project


def log_one_run(project: Project, line: str = "end", **env: str) -> str:
    """A training of five epochs; returns what it says on standard error."""
    with paced(project, **env) as process:
        complaint = finish(process, line)
    assert process.returncode == (line != "end"), complaint
    send_the_rest(project)
    return complaint


def runs_in(store: Path, experiment: str = "fashion-mnist") -> list[Run]:
    client = MlflowClient(f"sqlite:///{store}")
    (found,) = [e for e in client.search_experiments() if e.name == experiment]
    return list(client.search_runs([found.experiment_id]))


def test_processes_that_start_at_once_without_a_store_all_log_to_it(project: Project) -> None:
    with ExitStack() as stack:
        for process in [stack.enter_context(paced(project)) for _ in range(4)]:
            finish(process)
            assert process.returncode == 0
    send_the_rest(project)
    runs = runs_in(project.root / "mlflow.db")
    assert [run.info.status for run in runs] == ["FINISHED"] * 4
    client = MlflowClient(f"sqlite:///{project.root / 'mlflow.db'}")
    for run in runs:
        assert [m.step for m in client.get_metric_history(run.info.run_id, "val_loss")] == [1, 2, 3, 4, 5]


def test_a_copy_of_the_repository_that_dvc_made_logs_to_the_main_one(project: Project, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    subprocess.run(["git", "clone", "--quiet", project.root, copy], check=True)
    main = str(project.root)
    with paced(Project(copy), DVC_ROOT=main, DVC_EXP_NAME="loud-cat", DVC_EXP_BASELINE_REV="1a2b") as process:
        finish(process)
    send_the_rest(project)
    assert not (copy / "mlflow.db").exists()
    (run,) = runs_in(project.root / "mlflow.db")
    assert run.info.run_name == "loud-cat"
    assert run.data.tags["dvc.exp_name"] == "loud-cat"
    assert run.data.tags["dvc.baseline_rev"] == "1a2b"
    assert run.info.artifact_uri.startswith(project.root.as_uri())


def test_a_store_and_an_experiment_named_in_the_environment_win(project: Project, tmp_path: Path) -> None:
    store = tmp_path / "elsewhere.db"
    log_one_run(project, MLFLOW_TRACKING_URI=f"sqlite:///{store}", MLFLOW_EXPERIMENT_NAME="mine")
    assert not (project.root / "mlflow.db").exists()
    assert len(runs_in(store, "mine")) == 1


def test_a_run_has_what_made_it_and_its_files(project: Project) -> None:
    (project.root / "classifier/new.py").write_text("# not committed\n")
    log_one_run(project)
    (run,) = runs_in(project.root / "mlflow.db")
    assert run.data.params["lr"] == "0.001"
    assert run.data.tags["mlflow.source.git.commit"] == project.run("git", "rev-parse", "HEAD").stdout.strip()
    assert run.data.tags["git.changed_files"] == "classifier/new.py"
    assert run.data.metrics == {"train_loss": 1 / 5, "val_loss": 2 / 5}
    folder = project.root / "mlruns" / run.info.run_id / "artifacts"
    assert sorted(file.name for file in folder.iterdir()) == ["code.patch", "params.yaml"]


def test_a_run_whose_training_fails_is_marked_so(project: Project) -> None:
    assert log_one_run(project, "fail").endswith("as when the loss is not finite\n")
    (run,) = runs_in(project.root / "mlflow.db")
    assert run.info.status == "FAILED"
    assert run.data.metrics == {"train_loss": 1 / 5, "val_loss": 2 / 5}


def test_a_moved_repository_finds_its_artifacts_and_logs_beside_them(project: Project, tmp_path: Path) -> None:
    log_one_run(project)
    moved = Project(tmp_path / "elsewhere" / "moved")
    moved.root.parent.mkdir()
    project.root.rename(moved.root)
    log_one_run(moved)
    assert not project.root.exists()
    runs = runs_in(moved.root / "mlflow.db")
    assert len(runs) == 2
    default = MlflowClient(f"sqlite:///{moved.root / 'mlflow.db'}").get_experiment("0")
    assert default.artifact_location == str(moved.root / "mlruns/0")
    for run in runs:
        assert run.info.artifact_uri.startswith(moved.root.as_uri())
        assert (moved.root / "mlruns" / run.info.run_id / "artifacts/params.yaml").is_file()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_a_signal_ends_is_killed(project: Project, number: signal.Signals) -> None:
    with paced(project, sys.executable) as process:
        process.send_signal(number)
        process.wait(timeout=60)
    assert process.returncode == 128 + number
    send_the_rest(project)
    assert statuses(project.root / "mlflow.db") == ["KILLED"]


def test_a_run_whose_process_is_killed_does_not_stay_running(project: Project) -> None:
    """Its sender notices."""
    with paced(project, sys.executable) as process:
        process.kill()
    wait_for(lambda: not list((project.root / ".journal").glob("*/")))
    assert statuses(project.root / "mlflow.db") == ["KILLED"]


def test_a_stage_that_fails_before_it_trains_leaves_no_run_and_no_journal(project: Project) -> None:
    done = project.run(sys.executable, "-m", "stages", "train", check=False)
    assert done.returncode == 1
    assert not (project.root / "mlflow.db").exists()
    assert list((project.root / ".journal").glob("*/")) == []


def test_what_is_edited_after_a_stage_has_begun_is_not_in_its_run(project: Project) -> None:
    edited = """
import time
from pathlib import Path
from classifier.pipeline.params import load_params
from classifier.tracking.tracker import Tracker
params, weights = load_params(), Path("models/model_weights.pth")
tracker = Tracker(params.experiment, {}, Path("params.yaml"), [], weights)
Path("params.yaml").write_text(Path("params.yaml").read_text().replace("lr: 0.001", "lr: 0.5"))
Path("models").mkdir()
Path("models/model_weights.pth").write_text("weights")
with tracker.training({}, "a", time.time()):
    pass
"""
    project.run(sys.executable, "-c", edited)
    send_the_rest(project)
    (run,) = runs_in(project.root / "mlflow.db")
    assert "lr: 0.5" in (project.root / "params.yaml").read_text()
    assert run.data.params["lr"] == "0.001"
    assert not (project.root / "mlruns" / run.info.run_id / "artifacts/code.patch").exists()


def test_a_user_without_a_name_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a container runs for a number that it has no user for."""
    for variable in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr("os.getuid", lambda: 2**31 - 2)
    assert _user() == ""


# In place of torch: it tells which processes the stage has started, and ends it
SEEN_BY_TORCH = """\
import sys
import psutil
print([" ".join(process.cmdline()[1:]) for process in psutil.Process().children()])
sys.exit(3)
"""


@pytest.mark.parametrize(("rank", "started"), [("0", ["-m classifier.tracking.sender"]), ("1", [])])
@pytest.mark.parametrize("stage", ["train", "evaluate", "export"])
def test_the_process_that_sends_starts_before_torch_is_imported_and_ends_with_its_stage(
    tmp_path: Path, stage: str, rank: str, started: list[str]
) -> None:
    project = Project.create(tmp_path / "project")
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").write_text(SEEN_BY_TORCH)
    env = {"PYTHONPATH": str(tmp_path), "RANK": rank, "PATH": real_environment(tmp_path)["PATH"]}
    done = project.run("python", "-m", "stages", stage, check=False, **env)
    assert (done.returncode, done.stdout) == (3, f"{started}\n"), done.stderr
    wait_for(lambda: processes_in(project.root) == [])
    assert not (project.root / ".journal").exists()
