"""Each of DVC's ways to run an experiment logs to the one store, with the experiment's own parameters and code."""

import json
import re
import subprocess
import time
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import pytest
import yaml
from dvc_queue import processes_in, run_queue
from mlflow import MlflowClient
from mlflow.entities import Run
from PIL import Image
from project import Project, clean_environment, python, small_project

pytestmark = pytest.mark.slow

NETWORK = "classifier/networks/mlp.py"
# By name: how wide the experiment's code makes the hidden layers, and its parameters. The name says where it runs.
EXPERIMENTS = {
    "workspace": (512, {"lr": "0.2"}),
    "temp": (384, {"lr": "0.000001", "optimizer": "adam"}),  # a rate that DVC writes as 1e-06
    "queued": (128, {"momentum": "0.5", "augment": "[flip]", "label_smoothing": "0.1"}),
}


class Experiment(NamedTuple):
    run: Run
    ref: str  # of Git, as in refs/exps/...


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project without a store, in which experiments then ran: in place, in a copy, and in the queue.

    While the last two run, the main checkout holds other code than theirs.
    """
    project = small_project(tmp_path_factory.mktemp("experiments"), epochs="2", export_formats="[pth]")
    project.dvc("repro", "annotate")  # once, and not in each of their copies
    project.commit()
    assert not (project.root / "mlflow.db").exists()
    committed = (project.root / NETWORK).read_text()

    def prepare(name: str) -> list[str]:
        """Write the experiment's code; returns the options of `dvc exp run` that name it and set its parameters."""
        width, params = EXPERIMENTS[name]
        (project.root / NETWORK).write_text(committed.replace("512", str(width)))
        return ["--name", name, *(option for key, value in params.items() for option in ("-S", f"{key}={value}"))]

    printed = project.dvc("exp", "run", *prepare("workspace")).stdout
    (project.root.parent / "workspace.txt").write_text(printed)
    project.run("git", "restore", "params.yaml")
    with subprocess.Popen(
        [python(), "-m", "dvc", "exp", "run", "--temp", *prepare("temp")],
        cwd=project.root, env=clean_environment(project.root.parent),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    ) as process:  # fmt: skip
        while process.poll() is None and not list(project.root.glob(f".dvc/tmp/exps/standalone/tmp*/{NETWORK}")):
            time.sleep(0.1)
        (project.root / NETWORK).write_text(committed)
        output, _ = process.communicate()
    assert process.returncode == 0, output
    (project.root.parent / "temp.txt").write_text(output)

    project.dvc("exp", "run", "--queue", *prepare("queued"))
    (project.root / NETWORK).write_text(committed)
    run_queue(project)
    return project


@pytest.fixture(scope="module")
def client(project: Project) -> MlflowClient:
    return MlflowClient(f"sqlite:///{project.root / 'mlflow.db'}")


@pytest.fixture(scope="module")
def runs(client: MlflowClient) -> list[Run]:
    (kept,) = [experiment for experiment in client.search_experiments() if experiment.name == "fashion-mnist"]
    return list(client.search_runs([kept.experiment_id]))


@pytest.fixture(params=EXPERIMENTS)
def experiment(request: pytest.FixtureRequest, project: Project, runs: list[Run]) -> Experiment:
    """What MLflow and DVC each hold of one experiment."""
    (run,) = [run for run in runs if run.info.run_name == request.param]
    (ref,) = project.run("git", "for-each-ref", "--format=%(refname)", f"refs/exps/**/{request.param}").stdout.split()
    return Experiment(run, ref)


def test_every_way_to_run_leaves_one_finished_run_that_bears_the_name_dvc_gave_it(runs: list[Run]) -> None:
    assert sorted(str(run.info.run_name) for run in runs) == sorted(EXPERIMENTS)
    assert all(run.data.tags["dvc.exp_name"] == run.info.run_name for run in runs)
    assert {run.info.status for run in runs} == {"FINISHED"}


def test_the_end_says_where_the_model_is_and_how_it_comes_out_of_a_copy(project: Project) -> None:
    folder = project.root.parent
    assert "The model is in models/export: model.pth; README.md there" in (folder / "workspace.txt").read_text()
    told = "The model belongs to the experiment temp: `dvc exp apply temp` brings it to models/export.\n"
    assert told in (folder / "temp.txt").read_text()


def test_a_run_has_the_parameters_in_its_experiments_params_yaml(project: Project, experiment: Experiment) -> None:
    run, ref = experiment
    params = yaml.safe_load(project.run("git", "show", f"{ref}:params.yaml").stdout)
    assert {key: yaml.safe_load(value) for key, value in run.data.params.items()} == params
    for key, value in EXPERIMENTS[str(run.info.run_name)][1].items():
        assert float(params[key]) == float(value) if key == "lr" else params[key] == yaml.safe_load(value)


def test_a_run_used_its_experiments_own_copy_of_the_code(
    project: Project, client: MlflowClient, experiment: Experiment
) -> None:
    run, ref = experiment
    width, _ = EXPERIMENTS[str(run.info.run_name)]
    code = project.run("git", "show", f"{ref}:{NETWORK}").stdout
    assert run.data.tags.get("git.changed_files", "") == ("" if width == 512 else NETWORK)
    assert set(re.findall(r"nn\.Linear\(.*?(\d+)", code)) == {str(width)}
    manifest = json.loads(Path(client.download_artifacts(run.info.run_id, "manifest.json")).read_text())
    weights = 784 * width + width + width * width + width + width * 10 + 10
    # Four bytes each, and what names them
    assert 4 * weights < manifest["files"]["model.pth"]["bytes"] < 4 * weights + 20_000


def test_the_artifacts_of_a_run_open(client: MlflowClient, experiment: Experiment) -> None:
    run_id = experiment.run.info.run_id
    folder = Path(client.download_artifacts(run_id, ""))
    assert {path.name for path in (folder / "plots").iterdir()} == {
        "confusion.csv", "mistakes.png", "reliability.png", "saliency.png", "samples.png",
    }  # fmt: skip
    for picture in (folder / "plots").glob("*.png"):
        with Image.open(picture) as image:
            image.load()
            assert min(image.size) > 100
    assert len(pd.read_csv(folder / "plots/confusion.csv")) == 80
    assert len(pd.read_csv(folder / "classes.csv")) == 10
    metrics = json.loads((folder / "manifest.json").read_text())["metrics"]
    assert metrics["test"]["accuracy"] == experiment.run.data.metrics["test_accuracy"]


def test_each_run_has_a_registered_model(client: MlflowClient, runs: list[Run]) -> None:
    versions = client.search_model_versions("name='fashion-mnist'")
    assert sorted(str(version.run_id) for version in versions) == sorted(run.info.run_id for run in runs)


def test_no_second_store_and_no_process_is_left(project: Project, runs: list[Run]) -> None:
    assert [path for name in ("mlflow.db", "mlruns") for path in project.root.rglob(name)] == [
        project.root / "mlflow.db", project.root / "mlruns",
    ]  # fmt: skip
    assert processes_in(project.root) == []
