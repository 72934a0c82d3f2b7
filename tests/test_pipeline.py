"""The whole pipeline as a user runs it: real dvc, real stages, real MLflow store, on small data."""

import hashlib
import io
import json
import re
import sqlite3
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from project import Project, reproduced_project

from classifier.data.dataset import CustomImageDataset

pytestmark = pytest.mark.slow

STAGES = ["check", "download", "annotate", "train", "evaluate", "export"]


# Nothing listens at this port.
NO_NETWORK = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}


@pytest.fixture(scope="module")
def reproduced(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project in which `dvc repro` ran once. Tests that share it leave it as it is."""
    return reproduced_project(tmp_path_factory)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def test_it_says_what_it_runs_on_what_and_which_network_it_trains(reproduced: Project) -> None:
    printed = (reproduced.root.parent / "printed.txt").read_text()
    assert reproduced.stages_run(printed) == STAGES
    assert "Using cpu device" in printed or "Using cuda device" in printed or "Using mps device" in printed
    assert "NeuralNetwork(" in printed
    assert "669,706 parameters" in printed


def test_it_writes_the_files_of_the_contract(reproduced: Project) -> None:
    root = reproduced.root
    assert sorted(path.name for path in (root / "data/raw").iterdir()) == [
        "t10k-images-idx3-ubyte",
        "t10k-labels-idx1-ubyte",
        "train-images-idx3-ubyte",
        "train-labels-idx1-ubyte",
    ]
    rows = {split: pd.read_csv(root / f"data/annotations/{split}.csv") for split in ("train", "val", "test")}
    assert {split: len(table) for split, table in rows.items()} == {"train": 160, "val": 40, "test": 80}
    assert all(list(table.columns) == ["file", "label", "row"] for table in rows.values())
    assert list(pd.read_csv(root / "data/annotations/classes.csv").columns) == ["label", "name"]

    epochs = pd.read_csv(root / "metrics/epochs.csv")
    assert list(epochs.columns) == ["epoch", "train_loss", "val_loss", "val_accuracy"]
    kept = read_json(root / "metrics/train.json")
    assert kept == epochs.to_dict("records")[epochs.val_accuracy.argmax()]

    test = read_json(root / "metrics/test.json")
    assert list(test) == [
        "accuracy", "loss", "accuracy_ci95", "balanced_accuracy", "macro_f1", "top3_accuracy", "ece",
    ]  # fmt: skip
    low, high = test["accuracy_ci95"]
    assert 0.5 < test["accuracy"] <= 1
    assert 0 <= low < test["accuracy"] <= high <= 1
    assert sorted(path.name for path in (root / "metrics/plots").iterdir()) == [
        "confusion.csv",
        "mistakes.png",
        "reliability.png",
        "saliency.png",
        "samples.png",
    ]
    confusion = pd.read_csv(root / "metrics/plots/confusion.csv")
    assert len(confusion) == 80
    assert (confusion.actual == confusion.predicted).mean() == test["accuracy"]

    predictions = pd.read_csv(root / "metrics/predictions.csv")
    of_split = {split: predictions[predictions.split == split] for split in ("val", "test")}
    for split, table in of_split.items():
        assert list(table.file) == list(rows[split].file)
    assert list(of_split["test"].predicted) == list(confusion.predicted)
    assert (of_split["val"].label == of_split["val"].predicted).mean() == kept["val_accuracy"]


def test_the_manifest_says_what_was_exported_and_what_made_it(reproduced: Project) -> None:
    root = reproduced.root
    manifest = read_json(root / "models/export/manifest.json")
    assert list(manifest["files"]) == ["model.pth", "model.pt2", "model.onnx", "model.safetensors"]
    exported = {path.name for path in (root / "models/export").iterdir()}
    assert exported == {*manifest["files"], "manifest.json", "README.md"}
    for name, entry in manifest["files"].items():
        content = (root / "models/export" / name).read_bytes()
        assert entry["sha256"] == hashlib.sha256(content).hexdigest()
        assert entry["bytes"] == len(content)
        assert entry["trusted_source_only"] is (name in ("model.pth", "model.pt2"))
    lock = yaml.safe_load((root / "dvc.lock").read_text())["stages"]
    locked = {out["path"]: out["md5"] for stage in lock.values() for out in stage["outs"]}
    assert manifest["md5"] == {path: locked[path] for path in manifest["md5"]}
    assert manifest["md5"].keys() == {"data/raw", "data/images", "data/annotations", "models/model_weights.pth"}
    assert manifest["parameters"]["lr"] == 0.1
    assert manifest["metrics"]["test"] == read_json(root / "metrics/test.json")


def test_nothing_is_left_to_commit_but_lock_and_metrics_and_nothing_runs_twice(reproduced: Project) -> None:
    changed = reproduced.run("git", "status", "--porcelain", "--untracked-files=all").stdout.splitlines()
    assert sorted(line[3:] for line in changed) == [
        "dvc.lock",
        "metrics/environment.json",
        "metrics/test.json",
        "metrics/train.json",
    ]
    assert reproduced.stages_run(reproduced.dvc("repro").stdout) == []


def test_mlflow_has_one_finished_run_with_all_that_made_the_model(reproduced: Project) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{reproduced.root / 'mlflow.db'}")
    (experiment,) = [e for e in client.search_experiments() if e.name == "fashion-mnist"]
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.info.run_name == f"repro {reproduced.run('git', 'rev-parse', '--short', 'HEAD').stdout.strip()}"

    params = yaml.safe_load((reproduced.root / "params.yaml").read_text())
    assert run.data.params.keys() == params.keys()
    assert run.data.params["lr"] == "0.1"
    assert run.data.params["data_path"] == params["data_path"]
    assert json.loads(run.data.params["export_formats"]) == ["pth", "pt2", "onnx", "safetensors"]

    epochs = pd.read_csv(reproduced.root / "metrics/epochs.csv")
    for name in ("train_loss", "val_loss", "val_accuracy"):
        history = client.get_metric_history(run.info.run_id, name)
        assert [metric.step for metric in history] == [1, 2, 3, 4]
        assert [metric.value for metric in history] == pytest.approx(epochs[name].tolist(), rel=1e-12)
    assert run.data.metrics["images_per_second"] > 0
    test = read_json(reproduced.root / "metrics/test.json")
    for name in ("accuracy", "loss", "balanced_accuracy", "macro_f1", "top3_accuracy", "ece"):
        assert run.data.metrics[f"test_{name}"] == test[name]

    lock = yaml.safe_load((reproduced.root / "dvc.lock").read_text())["stages"]
    md5 = {out["path"]: out["md5"] for stage in lock.values() for out in stage["outs"]}
    assert run.data.tags["md5.images"] == md5["data/images"]
    assert run.data.tags["md5.annotations"] == md5["data/annotations"]
    assert run.data.tags["md5.model_weights"] == md5["models/model_weights.pth"]
    assert run.data.tags["mlflow.source.git.commit"] == reproduced.run("git", "rev-parse", "HEAD").stdout.strip()
    assert run.inputs is not None
    digests = {data.dataset.digest for data in run.inputs.dataset_inputs}
    assert digests == {md5["data/images"], md5["data/annotations"]}

    artifacts = {file.path for file in client.list_artifacts(run.info.run_id, "plots")}
    assert {"plots/samples.png", "plots/mistakes.png", "plots/saliency.png"} <= artifacts
    folder = Path(client.download_artifacts(run.info.run_id, "plots"))
    assert (folder / "samples.png").read_bytes() == (reproduced.root / "metrics/plots/samples.png").read_bytes()

    (version,) = client.search_model_versions("name='fashion-mnist'")
    assert version.run_id == run.info.run_id


def test_the_report_tells_how_long_the_training_took_by_its_run(reproduced: Project) -> None:
    reproduced.run(sys.executable, "-m", "classifier", "report")
    page = (reproduced.root / "reports/report.html").read_text(encoding="utf-8")
    assert re.search(r"Trained for \d+ s, without validation \(4 epochs\)\.", page)


def test_the_registered_model_answers_as_evaluate_did(reproduced: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")  # which the next line sets: the test's end takes it back
    mlflow.set_tracking_uri(f"sqlite:///{reproduced.root / 'mlflow.db'}")
    model = mlflow.pyfunc.load_model("models:/fashion-mnist/1")
    test_set = CustomImageDataset(reproduced.root / "data/annotations/test.csv", reproduced.root / "data/images")
    answers = model.predict(test_set.read(range(len(test_set))).numpy())
    evaluated = pd.read_csv(reproduced.root / "metrics/plots/confusion.csv")
    assert answers["class"].tolist() == evaluated.predicted.tolist()
    (version,) = mlflow.MlflowClient().search_model_versions("name='fashion-mnist'")
    run = mlflow.get_run(str(version.run_id))
    assert run.data.tags["md5.test_set"] == test_set.md5()
    onnx = (reproduced.root / "models/export/model.onnx").read_bytes()
    assert version.tags["sha256.model.onnx"] == hashlib.sha256(onnx).hexdigest()


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        ("lr", "fast", "params.yaml: lr: 'fast' is not a number above 0"),
        ("epochs", "-1", "params.yaml: epochs: -1 is not a whole number above 0"),
        (
            "network",
            "mpl",
            "params.yaml: network: 'mpl' is not one of cnn, mlp, resnet18, vgg16 (the modules in classifier/networks)",
        ),
        (
            "optimizer",
            None,
            "params.yaml: optimiser: 'sgd' is given, but there is no such key; did you mean optimizer?",
        ),
    ],
)
def test_a_wrong_parameter_is_one_line_from_make_repro_and_from_the_stage(
    tmp_path: Path, key: str, value: str | None, line: str
) -> None:
    project = Project.create(tmp_path / "project")
    if value is None:
        text = (project.root / "params.yaml").read_text()
        (project.root / "params.yaml").write_text(text.replace("optimizer: sgd", "optimiser: sgd"))
    else:
        project.set_params(**{key: value})
    (project.root / ".venv").symlink_to(sys.prefix)
    project.commit()

    made = project.run("make", "--assume-old", ".venv/.synced", "repro", check=False)
    assert made.returncode != 0
    assert [out for out in made.stderr.splitlines() if not out.startswith("make")] == [line]
    staged = project.run(sys.executable, "-m", "stages", "download", check=False)
    assert (staged.returncode, staged.stderr.splitlines(), staged.stdout) == (1, [line], "")
    assert not (project.root / "data/raw").exists()


def test_a_device_that_is_not_there_is_an_error_that_names_the_ones_that_are(reproduced: Project) -> None:
    params = reproduced.root / "params.yaml"
    before = params.read_text()
    try:
        reproduced.set_params(device="cuda:77")
        done = reproduced.run(sys.executable, "-m", "stages", "train", check=False)
    finally:
        params.write_text(before)
    assert done.returncode == 1
    assert done.stderr.startswith("device: cuda:77 is not usable here; usable: ")
    assert done.stderr.strip().endswith("cpu")


def test_a_python_without_the_packages_is_told_what_to_activate(reproduced: Project) -> None:
    done = reproduced.run(sys.executable, "-S", "-m", "stages", "train", check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(f"{sys.executable} has no torch or no psutil: ")
    assert done.stderr.endswith("Activate the environment, `. .venv/bin/activate`, then run the same command again; "
                                "or run `make repro`.\n")  # fmt: skip


@pytest.fixture
def copied(reproduced: Project, tmp_path: Path) -> Project:
    """A copy of the reproduced project, outputs and cache included, that a test may change."""
    project = reproduced.copy(tmp_path / "project")
    project.commit()
    return project


def test_after_a_failed_download_the_earlier_data_comes_back(copied: Project, tmp_path: Path) -> None:
    raw = copied.root / "data/raw/train-images-idx3-ubyte"
    before = raw.read_bytes()
    copied.set_params(source="fashion_mnist")
    failed = copied.dvc("repro", check=False, FASHION_MNIST_DIR=str(tmp_path), **NO_NETWORK)
    assert failed.returncode != 0
    assert "FASHION_MNIST_DIR" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert "DVC removed the earlier outputs of this stage. `classifier restore` restores" in failed.stderr
    assert not raw.exists()
    copied.run(sys.executable, "-m", "classifier", "restore")
    assert raw.read_bytes() == before


@pytest.mark.slow
def test_an_experiment_runs_only_what_its_parameter_reaches(tmp_path_factory: pytest.TempPathFactory) -> None:
    copied = reproduced_project(tmp_path_factory, export_formats="[onnx]")
    copied.commit()
    before = copied.outputs()
    done = copied.dvc("exp", "run", "--name", "slower", "-S", "lr=0.01")
    assert copied.stages_run(done.stdout) == ["check", "train", "evaluate", "export"]
    accuracy = read_json(copied.root / "metrics/test.json")["accuracy"]

    table = pd.read_csv(io.StringIO(copied.dvc("exp", "show", "--csv").stdout)).set_index("Experiment")
    assert table.loc["slower", "lr"] == 0.01
    assert table.loc["slower", "accuracy"] == pytest.approx(accuracy)

    copied.run(sys.executable, "-m", "classifier", "restore")
    assert copied.outputs() == before
    assert copied.run("git", "status", "--porcelain").stdout == ""
    assert copied.stages_run(copied.dvc("repro").stdout) == []


@pytest.mark.slow
def test_a_trial_ends_with_the_training_and_is_evaluated_and_exported_when_applied(copied: Project) -> None:
    committed = read_json(copied.root / "metrics/train.json")["val_accuracy"]
    assert copied.stages_run(copied.dvc("exp", "run", "train", "--name", "worse", "-S", "lr=1e-6").stdout) == [
        "check",
        "train",
    ]
    table = pd.read_csv(io.StringIO(copied.dvc("exp", "show", "--csv").stdout)).set_index("Experiment")
    assert table.loc["worse", "val_accuracy"] < committed
    copied.run("git", "restore", "params.yaml", "dvc.lock", "metrics")
    copied.dvc("checkout")

    copied.dvc("exp", "apply", "worse")
    assert copied.stages_run(copied.dvc("repro").stdout) == ["evaluate", "export"]
    assert read_json(copied.root / "models/export/manifest.json")["parameters"]["lr"] == 1e-6


@pytest.mark.slow
def test_parameters_that_change_no_result_rerun_nothing(copied: Project) -> None:
    copied.set_params(workers="0", memory_limit_gib="1", experiment="other", registered_model="other")
    assert copied.stages_run(copied.dvc("repro").stdout) == []


@pytest.mark.slow
def test_weights_without_a_run_in_the_store_get_one(copied: Project) -> None:
    """As where model and data were pulled onto a machine that has not trained."""
    for path in copied.root.glob("mlflow.db*"):
        path.unlink()
    copied.run(sys.executable, "-m", "stages", "evaluate")
    with sqlite3.connect(copied.root / "mlflow.db") as store:
        assert store.execute("SELECT status FROM runs").fetchall() == [("FINISHED",)]


def test_a_network_that_has_learnt_nothing_is_told(reproduced: Project, tmp_path: Path) -> None:
    project = reproduced.copy(tmp_path / "project")
    project.set_params(lr="1e-6", epochs="1")
    printed = project.dvc("repro", "evaluate").stdout
    warning = "The network is not clearly better than always predicting the largest class"
    assert re.findall(rf"^{warning} \((.*)\): train it longer", printed, re.MULTILINE) == ["10.0%", "10.0%"]
    assert re.search(rf"^Epoch 1: .*\n{warning}", printed, re.MULTILINE)  # by train, on the validation images
    assert re.search(rf"has an accuracy of 10.0%\n{warning}", printed)  # by evaluate, on the test images
    assert "not clearly better" not in (reproduced.root.parent / "printed.txt").read_text()
