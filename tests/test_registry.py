"""The registered model answers for images, and the champion is chosen on the same test data."""

import base64
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from imports import ROOT
from mlflow import MlflowClient
from PIL import Image
from test_decoding import tiled_tiff
from torch import nn
from tracker import EVALUATION, stage_tracker, without_sender

from classifier.data.decoding import decode_image
from classifier.export.formats import write
from classifier.pipeline.errors import PipelineError
from classifier.pipeline.params import load_params
from classifier.tracking import registry
from classifier.tracking.registry import Version, find_champion, find_versions, promote, version_called
from classifier.tracking.sender import Sender
from classifier.tracking.store import find_runs

pytestmark = pytest.mark.slow

CLASSES = ["circle", "square", "<b>&</b>"]
IMAGES = 100
NAME = "shapes-"


class Brightness(nn.Module):
    """Says `square` for bright images and `circle` for dark ones, surer the further from the middle."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        brightness = pixels.mean(dim=(1, 2, 3))
        return torch.stack([0.5 - brightness, brightness - 0.5, torch.full_like(brightness, -9.0)], dim=1) * 8


@pytest.fixture(scope="module")
def onnx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with an exported network and its manifest."""
    folder = tmp_path_factory.mktemp("export")
    write(Brightness(), torch.rand(2, 1, 4, 6), folder / "model.onnx")
    manifest = {
        "classes": CLASSES,
        "input": {"shape": ["batch", 1, 4, 6]},
        "decoding": {"fit": "crop", "background": [255, 255, 255], "intensity": "full", "stored_size": None},
        "files": {"model.onnx": {"sha256": "12ab"}},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a store, which all tests share: making one takes seconds."""
    folder = tmp_path_factory.mktemp("repository")
    (folder / "models").mkdir()
    (folder / "metrics/plots").mkdir(parents=True)
    (folder / "metrics/classes.csv").touch()
    shutil.copy(ROOT / "params.yaml", folder)
    return folder


@pytest.fixture
def export(
    onnx: Path, repository: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Callable[..., Version]:
    """Train, evaluate and export under a name of the test's own, with the given test images classified rightly."""
    params = load_params().model_copy(update={"registered_model": NAME + str(abs(hash(request.node.name)))})
    monkeypatch.chdir(repository)
    for variable in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "DVC_ROOT", "DVC_EXP_NAME"):
        monkeypatch.delenv(variable, raising=False)
    without_sender(monkeypatch)

    def run(right: range, test_set: str = "one") -> Version:
        Path("models/model_weights.pth").write_text(f"{params.registered_model} {right}")
        answers = pd.DataFrame({"actual": "circle", "predicted": "square"}, index=range(IMAGES))
        answers.loc[list(right), "predicted"] = "circle"
        answers.to_csv("metrics/plots/confusion.csv", index=False)
        write_accuracy(0.6)
        train()
        tracker = stage_tracker()
        with tracker.weights({"device": "cpu"}):
            tracker.log_evaluation(*EVALUATION, test_set)
            tracker.register(params.registered_model, onnx / "model.onnx", onnx / "manifest.json")
        assert Sender().send_all() == {}
        return find_versions(f"name = '{params.registered_model}'")[0]

    return run


def write_accuracy(accuracy: float) -> None:
    Path("metrics/test.json").write_text(json.dumps({"accuracy": accuracy, "loss": 0.5, "accuracy_ci95": [0.5, 0.9]}))


def train() -> None:
    with stage_tracker().training({"device": "cpu"}, uuid4().hex, time.time()):
        pass


def test_a_version_is_found_by_the_hash_of_an_exported_file(export: Callable[..., Version]) -> None:
    version = export(range(50))
    assert version in find_versions("tags.`sha256.model.onnx` = '12ab'")
    assert find_versions("tags.`sha256.model.onnx` = '12ac'") == []


def test_the_first_version_becomes_champion(export: Callable[..., Version]) -> None:
    version = export(range(60))
    assert find_champion(version.name) is None
    assert promote(version) == f"{version.name} version 1 is the first champion: accuracy 0.6000 on 100 test images"
    champion = find_champion(version.name)
    assert champion is not None
    assert (champion.number, champion.aliases) == (1, ["champion"])
    assert promote(version) == f"{version.name} version 1 is the champion already: accuracy 0.6000"


def test_a_clearly_better_version_takes_over(export: Callable[..., Version]) -> None:
    promote(export(range(60)))
    candidate = export(range(10, 90))
    text = promote(candidate)
    # 30 images gained, 10 lost: the two-sided binomial test gives 0.0022
    assert "only the candidate is correct on 30 and only the champion on 10: significant" in text
    assert "p = 0.0022" in text
    assert text.endswith("Version 2 is the new champion.")
    assert [version.aliases for version in find_versions(f"name = '{candidate.name}'")] == [["champion"], []]


@pytest.mark.parametrize(
    ("right", "reason"),
    [(range(62), "Better, but not significantly"), (range(60), "Not better"), (range(59), "Not better")],
    ids=["not significant", "as good", "worse"],
)
def test_a_version_that_is_not_shown_to_be_better_leaves_the_champion(
    export: Callable[..., Version], right: range, reason: str
) -> None:
    promote(export(range(60)))
    candidate = export(right)
    with pytest.raises(PipelineError, match=f"{reason}: version 1 stays champion"):
        promote(candidate)
    champion = find_champion(candidate.name)
    assert champion is not None
    assert champion.number == 1
    assert promote(candidate, force=True).endswith(f"{reason}; champion by force.")


def test_a_champion_whose_run_is_gone_is_replaced_by_force_only(export: Callable[..., Version]) -> None:
    champion = export(range(60))
    promote(champion)
    MlflowClient().delete_run(champion.run_id)
    candidate = export(range(70))
    with pytest.raises(PipelineError, match=f"{champion}: its run {champion.run_id} has no evaluation"):
        promote(candidate)
    assert "champion by force" in promote(candidate, force=True)


def test_a_store_that_cannot_be_asked_is_not_one_without_a_champion(
    export: Callable[..., Version], monkeypatch: pytest.MonkeyPatch
) -> None:
    version = export(range(60))
    before = mlflow.get_tracking_uri()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    mlflow.set_tracking_uri("http://127.0.0.1:9")
    try:
        with pytest.raises(PipelineError, match=r"the MLflow store http://127.0.0.1:9 cannot be used"):
            find_champion(version.name)
    finally:
        mlflow.set_tracking_uri(before)


def test_versions_tested_on_other_images_are_not_compared(export: Callable[..., Version]) -> None:
    promote(export(range(60)))
    candidate = export(range(90), test_set="another")
    with pytest.raises(PipelineError, match="tested on different images than the champion, version 1: not promoted"):
        promote(candidate)
    assert "champion by force" in promote(candidate, force=True)


def test_a_version_whose_run_was_not_evaluated_is_told(export: Callable[..., Version]) -> None:
    version = export(range(60))
    MlflowClient().delete_run(version.run_id)
    with pytest.raises(PipelineError, match=f"{version}: its run {version.run_id} has no evaluation"):
        promote(version)


def test_results_go_to_the_run_of_their_own_experiment_where_several_have_the_same_weights(
    export: Callable[..., Version], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a parameter makes no difference."""
    version = export(range(60))
    weights = Path("models/model_weights.pth").read_bytes()
    for name in ("first", "second"):
        monkeypatch.setenv("DVC_EXP_NAME", name)
        Path("models/model_weights.pth").write_bytes(weights)
        train()
    monkeypatch.setenv("DVC_EXP_NAME", "first")
    tracker = stage_tracker()
    with tracker.weights({"device": "cpu"}):
        tracker.log_evaluation(*EVALUATION, "one")
    assert Sender().send_all() == {}
    evaluated = {run.name: "test_accuracy" in run.metrics for run in find_runs("tags.`dvc.exp_name` != ''")}
    assert evaluated == {"first": True, "second": False}
    assert version.run_id not in evaluated


def test_an_evaluation_is_logged_once_for_the_same_images_if_only_a_missing_one_is_asked_for(
    export: Callable[..., Version],
) -> None:
    """As by `export`, where DVC had the evaluation in its run cache."""
    version = export(range(60))
    for test_set, accuracy in (("one", 0.7), ("another", 0.8)):
        write_accuracy(accuracy)
        tracker = stage_tracker()
        with tracker.weights({"device": "cpu"}):
            tracker.log_evaluation(*EVALUATION, test_set, if_missing=True)
        assert Sender().send_all() == {}
        (run,) = find_runs(f"attributes.run_id = '{version.run_id}'")
        assert run.metrics["test_accuracy"] == (0.6 if test_set == "one" else accuracy)


def test_a_registration_that_was_cut_off_is_made_again_and_leaves_one_model(
    export: Callable[..., Version], onnx: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = export(range(60))

    def cut_off(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    given = (before.run_id, before.name, onnx / "model.onnx", onnx / "manifest.json", "second export")
    with monkeypatch.context() as patch:
        patch.setattr(mlflow, "register_model", cut_off)
        with pytest.raises(KeyboardInterrupt):
            registry.register(*given)
    for _ in range(2):
        registry.register(*given)
    assert [version.number for version in find_versions(f"name = '{before.name}'")] == [2, 1]
    experiment = MlflowClient().get_run(before.run_id).info.experiment_id
    models = MlflowClient().search_logged_models([experiment], f"source_run_id = '{before.run_id}'")
    assert len(models) == 2


def test_without_a_store_there_are_no_versions_and_none_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert find_versions("name = 'fashion-mnist'") == []
    assert find_champion("fashion-mnist") is None
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def champion(export: Callable[..., Version]) -> Any:
    version = export(range(60))
    promote(version)
    return mlflow.pyfunc.load_model(f"models:/{version.name}@champion")


def test_the_champion_answers_class_names_and_probabilities(champion: Any) -> None:
    images = np.zeros((3, 1, 4, 6), np.uint8)
    images[1] = 255
    images[2, :, :2] = 255
    table = champion.predict(images)
    assert list(table.columns) == ["class", "probability", *(f"P({name})" for name in CLASSES)]
    assert table["class"].tolist()[:2] == ["circle", "square"]
    # softmax of (4, -4, -72)
    assert table.probability[0] == pytest.approx(1 / (1 + np.exp(-8)))
    assert table["P(circle)"][2] == pytest.approx(0.5)
    assert table[[f"P({name})" for name in CLASSES]].sum(axis=1).tolist() == pytest.approx([1, 1, 1])


def test_the_same_images_in_any_form_get_the_same_answer(champion: Any, tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (300, 4, 6), np.uint8)  # more than one batch
    expected = champion.predict(images[:, None])
    pictures = [Image.fromarray(image) for image in images]
    paths = [tmp_path / f"{index}.png" for index in range(3)]
    for picture, path in zip(pictures, paths, strict=False):
        picture.save(path)
    pd.testing.assert_frame_equal(champion.predict(images), expected)
    pd.testing.assert_frame_equal(champion.predict(images.astype(np.int64)), expected)
    pd.testing.assert_frame_equal(champion.predict(images / 255), expected)
    pd.testing.assert_frame_equal(champion.predict(pictures), expected)
    pd.testing.assert_frame_equal(champion.predict([str(path) for path in paths]), expected[:3])
    pd.testing.assert_frame_equal(champion.predict([picture.convert("RGBA") for picture in pictures]), expected)


@pytest.mark.parametrize(
    ("images", "complaint"),
    [
        (np.zeros((2, 5, 6), np.uint8), r"shape \(2, 1, 5, 6\); this model takes \(N, 1, 4, 6\)"),
        (np.full((2, 4, 6), 2.0), "float64 pixels from 2.0 to 2.0; give integers 0..255 or floats 0..1"),
        (np.full((2, 4, 6), -1), "int64 pixels from -1 to -1"),
        (np.full((1, 4, 6), np.nan), "float64 pixels from nan to nan"),
        ([Image.new("L", (6, 4)), Image.new("F", (6, 4))], "1 of 2 images cannot be used: image 2: .* no fixed range"),
        ([Image.new("RGBa", (6, 4))], "image 1: not a usable image: cannot write mode RGBa"),
        (["/missing.png"], r"1 of 1 images cannot be used: /missing\.png: not a usable image: .*No such file"),
        ([Path("a.png"), Image.new("L", (6, 4))], "1 of 2 images cannot be used: a.png: .*No such file"),
        ([], "0 images; send 1 to 1024"),
        ([5], r"images of shape \(1,\); this model takes"),
    ],
)
def test_images_it_cannot_take_are_told(champion: Any, images: object, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        champion.predict(images)


def pixels_of(path: Path) -> np.ndarray:
    return decode_image(path.read_bytes(), (4, 6), 1, fit="crop")[None]


@pytest.mark.parametrize("kind", ["turned", "another size", "colour", "CMYK", "alpha", "palette", "tiles", "GIF"])
def test_files_become_what_they_become_for_training(champion: Any, tmp_path: Path, kind: str) -> None:
    ramp = Image.fromarray(np.arange(24, dtype=np.uint8).reshape(4, 6) * 10)
    colour = Image.merge("RGB", [ramp, ramp.point(lambda value: value // 2), ramp.rotate(180)])
    path = tmp_path / "a.image"
    if kind == "turned":
        exif = Image.Exif()
        exif[0x0112] = 6
        ramp.transpose(Image.Transpose.ROTATE_90).save(path, "PNG", exif=exif)
    elif kind == "another size":
        ramp.resize((50, 40)).save(path, "PNG")
    elif kind == "colour":
        colour.save(path, "PNG")
    elif kind == "CMYK":
        colour.convert("CMYK").save(path, "TIFF", compression="tiff_lzw")
    elif kind == "alpha":
        colour.putalpha(ramp)
        colour.save(path, "WEBP", lossless=True)
    elif kind == "palette":
        colour.quantize(5).save(path, "PNG")
    elif kind == "tiles":
        path.write_bytes(tiled_tiff(tile=16))
    else:
        ramp.save(path, "GIF", save_all=True, append_images=[ramp.rotate(180)])
    expected = champion.predict(pixels_of(path))
    pd.testing.assert_frame_equal(champion.predict([str(path)]), expected)
    pd.testing.assert_frame_equal(champion.predict([path]), expected)
    with Image.open(path) as image:
        pd.testing.assert_frame_equal(champion.predict([image]), expected)


@pytest.mark.parametrize("kind", ["no range", "pages", "huge tile", "EPS", "text"])
def test_files_that_are_refused_for_training_are_refused(champion: Any, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.png"
    if kind == "no range":
        Image.fromarray(np.full((4, 6), 300, np.int32)).save(path, "TIFF")
    elif kind == "pages":
        Image.new("L", (6, 4)).save(path, "TIFF", save_all=True, append_images=[Image.new("L", (6, 4))])
    elif kind == "huge tile":
        path.write_bytes(tiled_tiff(tile=9600))
    elif kind == "EPS":
        Image.new("L", (6, 4)).save(path, "EPS")
    else:
        path.write_text("no image")
    with pytest.raises(ValueError, match=r"no fixed range|several pages|it is none of|more than .* pixels"):
        decode_image(path.read_bytes())
    with pytest.raises(ValueError, match=r"a\.png: not a usable image: "):
        champion.predict([str(path)])


def test_what_a_request_holds_is_named_by_its_number_and_not_taken_for_a_path(champion: Any, tmp_path: Path) -> None:
    Image.new("L", (6, 4)).save(tmp_path / "a.png")
    good = base64.b64encode((tmp_path / "a.png").read_bytes()).decode()
    expected = champion.predict([tmp_path / "a.png"] * 2)
    for request in (
        pd.DataFrame({"image": [good, good]}), {"image": np.array([good, good])}, np.array([good, good]),
        [{"image": good}, {"image": np.array(good)}],
    ):  # fmt: skip
        pd.testing.assert_frame_equal(champion.predict(request), expected)
    for name in (str(tmp_path / "a.png"), "a.png"):
        for form in (pd.DataFrame({"image": [good, name]}), np.array([good, name]), [{"image": good}, {"image": name}]):
            with pytest.raises(ValueError, match=r"^1 of 2 images .*: image 2: not a usable image: not base64"):
                champion.predict(form)
    with pytest.raises(ValueError, match='no column "image"'):
        champion.predict(pd.DataFrame({"picture": [good]}))


def test_the_champion_loads_in_a_process_without_the_project_and_without_torch(
    export: Callable[..., Version], repository: Path, tmp_path: Path
) -> None:
    version = export(range(60))
    promote(version)
    code = """
import sys
sys.modules["torch"] = sys.modules["classifier"] = None
import mlflow, numpy
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model(sys.argv[2])
table = model.predict(numpy.zeros((2, 4, 6), numpy.uint8))
assert table["class"].tolist() == ["circle", "circle"]
assert model.predict([sys.argv[3]])["class"].tolist() == ["square"]
"""
    Image.new("RGB", (60, 60), "white").save(tmp_path / "white.jpg")
    store, model = f"sqlite:///{repository / 'mlflow.db'}", f"models:/{version.name}@champion"
    command = [sys.executable, "-I", "-c", code, store, model, str(tmp_path / "white.jpg")]
    done = subprocess.run(command, cwd="/", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("name", "number"), [("new", 2), ("old", 7)])
def test_a_version_is_looked_up_by_name(name: str, number: int) -> None:
    versions = [Version("old", 7, "run", []), Version("new", 1, "run", []), Version("new", 2, "run", [])]
    assert version_called(name, versions, "HEAD").number == number


@pytest.mark.parametrize(
    ("versions", "complaint"),
    [
        ([], "HEAD: not registered as new; to register"),
        (
            [Version("old", 7, "run", [])],
            r"registered as old, not as new \(registered_model in params\.yaml\);",
        ),
    ],
)
def test_a_model_that_has_no_version_of_the_name_is_told(versions: list[Version], complaint: str) -> None:
    with pytest.raises(PipelineError, match=complaint):
        version_called("new", versions, "HEAD")
