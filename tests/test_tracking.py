"""One MLflow store for the repository, made safely, found from anywhere."""

import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from project import Project, clean_environment

LOG_ONE_RUN = """
import sys, time
from pathlib import Path
from classifier import tracking
from classifier.errors import PipelineError, run_main
from classifier.params import load_params
def main():
    with tracking.training_run(load_params(), {"device": "cpu"}):
        tracking.log_metrics({"val_loss": 1.5}, step=1)
        tracking.log_files(Path("params.yaml"))
        print("logged", flush=True)
        if "wait" in sys.argv:
            time.sleep(60)
        if "fail" in sys.argv:
            raise PipelineError("as when the loss is not finite")
run_main(main)
"""


@pytest.fixture
def project(tmp_path: Path) -> Project:
    project = Project.create(tmp_path / "project")
    (project.root / "models").mkdir()
    (project.root / "models/model_weights.pth").write_bytes(b"weights")
    project.commit()
    return project


def runs_in(store: Path, experiment: str = "fashion-mnist") -> list[Run]:
    client = MlflowClient(f"sqlite:///{store}")
    (found,) = [e for e in client.search_experiments() if e.name == experiment]
    return list(client.search_runs([found.experiment_id]))


@pytest.mark.slow
def test_processes_that_start_at_once_without_a_store_all_log_to_it(project: Project) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", LOG_ONE_RUN],
            cwd=project.root,
            env=clean_environment(project.root.parent),
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    for process in processes:
        _, complaint = process.communicate()
        assert process.returncode == 0, complaint
    assert [run.info.status for run in runs_in(project.root / "mlflow.db")] == ["FINISHED"] * 4


@pytest.mark.slow
def test_a_copy_of_the_repository_that_dvc_made_logs_to_the_main_one(project: Project, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    subprocess.run(["git", "clone", "--quiet", project.root, copy], check=True)
    (copy / "models").mkdir()
    (copy / "models/model_weights.pth").write_bytes(b"other weights")
    Project(copy).run(
        *(sys.executable, "-c", LOG_ONE_RUN),
        DVC_ROOT=str(project.root),
        DVC_EXP_NAME="loud-cat",
        DVC_EXP_BASELINE_REV="1a2b",
    )
    assert not (copy / "mlflow.db").exists()
    (run,) = runs_in(project.root / "mlflow.db")
    assert run.info.run_name == "loud-cat"
    assert run.data.tags["dvc.exp_name"] == "loud-cat"
    assert run.data.tags["dvc.baseline_rev"] == "1a2b"
    assert run.info.artifact_uri.startswith(project.root.as_uri())


@pytest.mark.slow
def test_a_store_and_an_experiment_named_in_the_environment_win(project: Project, tmp_path: Path) -> None:
    store = tmp_path / "elsewhere.db"
    project.run(
        sys.executable, "-c", LOG_ONE_RUN, MLFLOW_TRACKING_URI=f"sqlite:///{store}", MLFLOW_EXPERIMENT_NAME="mine"
    )
    assert not (project.root / "mlflow.db").exists()
    assert len(runs_in(store, "mine")) == 1


@pytest.mark.slow
def test_a_run_whose_training_fails_is_marked_so(project: Project) -> None:
    done = project.run(sys.executable, "-c", LOG_ONE_RUN, "fail", check=False)
    assert (done.returncode, done.stderr) == (1, "as when the loss is not finite\n")
    (run,) = runs_in(project.root / "mlflow.db")
    assert run.info.status == "FAILED"
    assert run.data.metrics == {"val_loss": 1.5}


@pytest.mark.slow
def test_a_moved_repository_finds_its_artifacts_and_logs_beside_them(project: Project, tmp_path: Path) -> None:
    project.run(sys.executable, "-c", LOG_ONE_RUN)
    moved = Project(tmp_path / "elsewhere" / "moved")
    moved.root.parent.mkdir()
    project.root.rename(moved.root)
    moved.run(sys.executable, "-c", LOG_ONE_RUN)
    assert not project.root.exists()
    runs = runs_in(moved.root / "mlflow.db")
    assert len(runs) == 2
    for run in runs:
        assert run.info.artifact_uri.startswith(moved.root.as_uri())
        assert (moved.root / "mlruns" / run.info.run_id / "artifacts/params.yaml").is_file()


@pytest.mark.slow
def test_a_run_that_is_terminated_does_not_stay_running(project: Project) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", LOG_ONE_RUN, "wait"],
        cwd=project.root,
        env=clean_environment(project.root.parent),
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "logged\n"
        process.terminate()
    assert process.returncode == 143
    (run,) = runs_in(project.root / "mlflow.db")
    assert run.info.status == "FAILED"


@pytest.mark.slow
def test_a_server_that_is_not_there_is_told_within_seconds(project: Project) -> None:
    done = project.run(sys.executable, "-c", LOG_ONE_RUN, check=False, MLFLOW_TRACKING_URI="http://127.0.0.1:9")
    assert done.returncode == 1
    assert done.stderr.startswith("the MLflow store http://127.0.0.1:9 cannot be used: ")
    assert "Traceback" not in done.stderr
