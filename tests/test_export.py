"""The export stage as a user runs it: all formats, the model card, and errors."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from project import Project, small_project

from classifier.data.dataset import CustomImageDataset
from classifier.export.formats import TOLERANCE, TemperatureScaled, read_logits
from classifier.networks import Mirrored, build_network
from classifier.training.inference import load_weights

pytestmark = pytest.mark.slow

MODELS = ["model.pth", "model.pt2", "model.safetensors", "model.int8.onnx"]
TRIED = 5  # test images

# Runs the Python blocks of the model card for the images 0.png, 1.png, ...; prints the class that each way to load the
# model predicts, and saves the logits.
RUN_CARD = f"""
import re
from pathlib import Path
import numpy as np
blocks = re.findall("```python\\n(.*?)```", Path("README.md").read_text(), re.DOTALL)
for index in range({TRIED}):
    names = {{"__name__": "card"}}
    exec(blocks[0].replace("image.png", f"{{index}}.png"), names)
    for number, block in enumerate(blocks[1:]):
        exec(block, names)
        np.save(f"{{index}}-{{number}}.npy", names["logits"])
"""


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project with every file in models/export except model.onnx. Tests that share it must not change it."""
    project = small_project(
        tmp_path_factory.mktemp("export"),
        export_formats="[pth, pt2, safetensors, int8]", temperature_scaling="true", int8_max_drop="0.1",
        test_flip="true",
    )  # fmt: skip
    project.dvc("repro")
    return project


def export(project: Project, check: bool = True) -> str:
    """Run the stage; return its standard error without progress lines, which slow machines print."""
    said = project.run("python", "-m", "stages", "export", check=check).stderr
    return "".join(line for line in said.splitlines(keepends=True) if not line.endswith((" left\n", " elapsed\n")))


@pytest.fixture
def copied(exported: Project, tmp_path: Path) -> Project:
    project = exported.copy(tmp_path / "project")
    project.commit()
    return project


def scaled_logits(project: Project) -> np.ndarray:
    """Compute the logits (N, classes) of the test images with the manifest's temperature and with test_flip."""
    data, manifest = project.root / "data", read_json(project.root / "models/export/manifest.json")
    test_set = CustomImageDataset(data / "annotations/test.csv", data / "images")
    network = build_network("mlp", (1, 28, 28), 10)
    load_weights(network, project.root / "models/model_weights.pth", torch.device("cpu"))
    scaled = TemperatureScaled(Mirrored(network), manifest["calibration"]["temperature"]).eval()
    logits: np.ndarray = scaled(test_set.pixels(range(len(test_set)))).detach().numpy()
    return logits


def test_all_formats_give_the_scaled_logits(exported: Project) -> None:
    folder = exported.root / "models/export"
    assert sorted(path.name for path in folder.iterdir()) == sorted([*MODELS, "manifest.json", "README.md"])
    manifest = read_json(folder / "manifest.json")
    assert list(manifest["files"]) == MODELS
    assert [entry["trusted_source_only"] for entry in manifest["files"].values()] == [True, True, False, False]

    data, expected = exported.root / "data", scaled_logits(exported)
    pixels = CustomImageDataset(data / "annotations/test.csv", data / "images").pixels(range(80)).numpy()
    for name in MODELS:
        logits = read_logits(folder / name, pixels)
        assert (logits.argmax(1) == expected.argmax(1)).mean() > (0.9 if name == "model.int8.onnx" else 0.999)
        if name != "model.int8.onnx":
            np.testing.assert_allclose(logits, expected, rtol=0, atol=TOLERANCE)
    evaluated = pd.read_csv(exported.root / "metrics/plots/confusion.csv")
    assert [manifest["classes"][answer] for answer in expected.argmax(1)] == evaluated.predicted.tolist()


def test_the_manifest_says_what_scaling_and_int8_did(exported: Project) -> None:
    manifest = read_json(exported.root / "models/export/manifest.json")
    calibration = manifest["calibration"]
    assert calibration["validation_images"] == 40
    assert calibration["test_before"]["ece"] == pytest.approx(manifest["metrics"]["test"]["ece"], abs=1e-6)
    assert calibration["temperature"] != pytest.approx(1, abs=0.01)
    int8 = manifest["int8"]
    assert (int8["images"], int8["split"]) == (40, "validation")
    assert int8["float_accuracy"] == read_json(exported.root / "metrics/train.json")["val_accuracy"]
    assert int8["float_accuracy"] - int8["accuracy"] <= 0.1
    assert int8["bytes_saved"] > 2 * manifest["files"]["model.int8.onnx"]["bytes"]


def test_the_same_bytes_again(copied: Project) -> None:
    before = copied.outputs()
    shutil.rmtree(copied.root / "models/export")
    export(copied)
    assert copied.outputs() == before


def test_every_way_to_read_the_model_that_the_card_shows_answers_as_evaluate_did(
    exported: Project, tmp_path: Path
) -> None:
    folder = tmp_path / "elsewhere"
    shutil.copytree(exported.root / "models/export", folder)
    assert (folder / "README.md").read_text().count("```python") == 1 + len(MODELS)
    data = exported.root / "data"
    test_set = CustomImageDataset(data / "annotations/test.csv", data / "images")
    for index in range(TRIED):
        Image.fromarray(test_set.decode(index)[0].numpy()).save(folder / f"{index}.png")
    ran = Project(folder).run("python", "-W", "ignore", "-c", RUN_CARD, PYTHONPATH=str(exported.root))

    evaluated = pd.read_csv(exported.root / "metrics/plots/confusion.csv").predicted[:TRIED]
    assert ran.stdout.splitlines() == [name for name in evaluated for _ in MODELS]
    expected = scaled_logits(exported)
    for index in range(TRIED):
        for number, name in enumerate(MODELS):
            atol = 0.5 if name == "model.int8.onnx" else TOLERANCE
            logits = np.load(folder / f"{index}-{number}.npy")
            np.testing.assert_allclose(logits, expected[index : index + 1], rtol=0, atol=atol, err_msg=name)


def test_the_card_has_nothing_of_the_machine(exported: Project) -> None:
    text = (exported.root / "models/export/README.md").read_text()
    data_path = re.search("data_path: (.*)", (exported.root / "params.yaml").read_text())
    assert data_path
    assert str(exported.root) not in text.replace(data_path[1], "")
    assert "| train | 160 | the weights, and the ranges of int8 |" in text
    assert "## Calibration" in text


def test_an_int8_file_leads_back_to_what_made_it(exported: Project) -> None:
    done = exported.run("python", "-m", "classifier", "lineage", "models/export/model.int8.onnx")
    assert "fashion-mnist version 1" in done.stdout


def test_int8_that_costs_too_much_fails_and_leaves_the_earlier_export(copied: Project) -> None:
    """One unused hidden unit is so large that all others round to 0 in eight bits."""
    weights = copied.root / "models/model_weights.pth"
    state = torch.load(weights, weights_only=True)
    state["linear_relu_stack.2.bias"][0] = 1e6
    state["linear_relu_stack.4.weight"][:, 0] = 0
    torch.save(state, weights)
    (copied.root / "dvc.lock").unlink()  # the weights are the user's
    copied.set_params(export_formats="[int8]")
    before = copied.outputs()
    (complaint,) = [line for line in export(copied, check=False).splitlines() if line.startswith("int8")]
    found = re.fullmatch(
        r"int8: accuracy ([\d.]+)% on 40 validation images, ([\d.]+)% in float32; int8_max_drop allows a drop of "
        r"10\.00%\. Raise int8_max_drop, or remove int8 from export_formats\.",
        complaint,
    )
    assert found
    assert float(found[1]) < float(found[2]) - 10
    assert copied.outputs() == before

    copied.set_params(int8_max_drop="0.95")
    export(copied)
    assert read_json(copied.root / "models/export/manifest.json")["int8"]["accuracy"] == float(found[1]) / 100


def test_metrics_that_were_edited_are_refused_and_pictures_that_are_gone_are_not_missed(copied: Project) -> None:
    before = copied.outputs()
    metrics = copied.root / "metrics/test.json"
    written = metrics.read_text()
    metrics.write_text(written.replace('"accuracy": 0.', '"accuracy": 0.9'))
    assert export(copied, check=False).splitlines() == [
        "metrics/test.json: changed since the stage that wrote it; `dvc repro` makes it again"
    ]
    metrics.write_text(written)
    pictures = [name for name in before if name.startswith("metrics/plots/")]
    shutil.rmtree(copied.root / "metrics/plots")
    export(copied)
    assert copied.outputs() == {name: md5 for name, md5 in before.items() if name not in pictures}


def test_without_validation_images_no_temperature_is_fitted_and_int8_is_measured_on_the_test_images(
    copied: Project,
) -> None:
    (copied.root / "data/annotations/val.csv").write_text("file,label\n")
    (copied.root / "dvc.lock").unlink()
    before = copied.outputs()
    assert export(copied, check=False).splitlines() == [
        "temperature_scaling: there are no validation images to fit the temperature on; set val_size above 0, or "
        "temperature_scaling to false"
    ]
    assert copied.outputs() == before

    copied.set_params(temperature_scaling="false", export_formats="[int8]")
    export(copied)
    manifest = read_json(copied.root / "models/export/manifest.json")
    assert (manifest["int8"]["images"], manifest["int8"]["split"]) == (80, "test")
    assert manifest["int8"]["float_accuracy"] == manifest["metrics"]["test"]["accuracy"]
    assert "calibration" not in manifest
    assert list(manifest["files"]) == ["model.int8.onnx"]
    assert not (copied.root / "models/export/model.onnx").exists()
    assert "There were no validation images" in (copied.root / "models/export/README.md").read_text()
