"""`classifier predict`: every format and the champion answer as evaluation does, and what cannot be used is told."""

import csv
import hashlib
import io
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hostile import RunsCodeWhenUnpickled
from imports import ROOT
from pictures import encode_png, split_pngs, write_zip
from PIL import Image
from project import Project, clean_environment, python, reproduced_project
from scipy.special import softmax

from classifier.cli.prediction import Answer, find_images, opened, predict, write_csv, write_json, write_table
from classifier.data.dataset import CustomImageDataset
from classifier.data.decoding import FORMATS
from classifier.data.loader import Batches
from classifier.export.formats import write
from classifier.networks import build_network
from classifier.pipeline.errors import PipelineError, printable
from classifier.provenance.model_file import BATCH, Model
from classifier.training.inference import load_weights, predict_logits

CLASSES = ["dark", "bright, or\nnot"]
EXPORTED = ["pth", "pt2", "onnx", "safetensors"]
PNG = encode_png(np.full((4, 6), 200, np.uint8))


def brightness(pixels: np.ndarray) -> np.ndarray:
    """Logits that say `bright` for images above the middle."""
    mean = pixels.mean(axis=(1, 2, 3))
    return np.stack([0.5 - mean, mean - 0.5], axis=1).astype(np.float32)


MODEL = Model(brightness, CLASSES, (1, 4, 6))


def refuse(fault: str) -> None:
    pytest.fail(fault)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder with images in folders, and what lies beside them."""
    folder = tmp_path / "photos"
    for name in ("b.png", "a/2.JPG", "a/10.png", "a/.hidden.png", "__MACOSX/a.png", ".git/a.png", "Thumbs.db", "a.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(PNG)
    return folder


def test_images_are_found_in_files_folders_and_zips_in_the_order_of_the_arguments(photos: Path) -> None:
    folder = photos.parent
    write_zip(folder / "x.ZIP", [("b/1.webp", PNG), ("a.png", PNG), ("__MACOSX/a.png", PNG), ("read.me", b"")])
    (folder / "no suffix").write_bytes(PNG)
    found = find_images(["no suffix", "photos/", "x.ZIP", str(photos / "b.png")], folder, refuse)
    assert [image.name for image in found] == [
        "no suffix", "photos/a/10.png", "photos/a/2.JPG", "photos/b.png", "x.ZIP/a.png", "x.ZIP/b/1.webp",
        str(photos / "b.png"),
    ]  # fmt: skip
    assert [answer.file for answer in predict(MODEL, found, refuse, True)] == [image.name for image in found]


def test_what_is_wrong_with_an_argument_is_told_and_the_others_are_searched(photos: Path) -> None:
    folder = photos.parent
    (folder / "empty").mkdir()
    (folder / "bad.zip").write_text("no zip")
    faults: list[str] = []
    found = find_images(["missing", "empty", "bad.zip", "photos/b.png"], folder, faults.append)
    assert [image.name for image in found] == ["photos/b.png"]
    assert faults[0] == "missing: no such file or folder"
    assert faults[1].startswith("empty: no image in it; images end in .avif, ")
    assert faults[2].endswith("bad.zip: not readable as a zip: File is not a zip file")


def test_a_link_that_is_named_is_followed_and_one_out_of_a_folder_is_not(photos: Path) -> None:
    (photos / "a/link.png").symlink_to("../b.png")
    (photos / "out.png").symlink_to("/etc/passwd")
    (photos.parent / "link").symlink_to("photos/b.png")
    faults: list[str] = []
    found = find_images(["link", "photos"], photos.parent, refuse)
    answers = [answer.file for answer in predict(MODEL, found, faults.append, True)]
    assert "link" in answers
    assert "photos/a/link.png" in answers
    assert [fault for fault in faults if "it leads out of the image folder" not in fault] == []
    assert len(faults) == 1


def test_images_that_cannot_be_used_are_told_and_the_others_answered(photos: Path) -> None:
    (photos / "b.png").write_bytes(PNG[:50])
    (photos / "a/10.png").write_text("no image")
    os.mkfifo(photos / "pipe.png")  # reading it would wait for ever
    faults: list[str] = []
    answers = list(predict(MODEL, find_images(["photos"], photos.parent, refuse), faults.append, True))
    assert [answer.file for answer in answers] == ["photos/a/2.JPG"]
    assert faults[0].startswith("photos/a/10.png is not a usable image: it is none of AVIF")
    assert faults[1].startswith("photos/b.png is not a usable image: ")
    assert faults[2].endswith("is not readable: it is not a regular file")
    assert len(faults) == 3


def test_images_are_brought_to_the_size_and_the_channels_of_the_model(tmp_path: Path) -> None:
    Image.new("RGB", (60, 40), "white").save(tmp_path / "white.jpg")
    Image.new("CMYK", (3, 9), (0, 0, 0, 255)).save(tmp_path / "black.tif")
    found = find_images(["white.jpg", "black.tif"], tmp_path, refuse)
    for shape in ((1, 4, 6), (3, 2, 2)):

        def logits(pixels: np.ndarray, shape: tuple[int, int, int] = shape) -> np.ndarray:
            assert (pixels.shape, pixels.dtype.name) == ((2, *shape), "float32")
            return brightness(pixels)

        white, black = predict(Model(logits, CLASSES, shape, {"fit": "crop"}), found, refuse, True)
        assert white.probabilities == pytest.approx(softmax([-0.5, 0.5]))
        assert black.probabilities == pytest.approx(softmax([0.5, -0.5]))


def test_no_more_images_are_read_than_go_through_the_network_at_once(tmp_path: Path) -> None:
    names = [f"{number:03}.png" for number in range(BATCH + 1)]
    for name in names:
        (tmp_path / name).write_bytes(PNG)
    faults: list[str] = []
    answers = predict(MODEL, find_images(names, tmp_path, refuse), faults.append, True)
    assert next(answers).file == names[0]
    (tmp_path / names[-1]).unlink()
    assert len(list(answers)) == BATCH - 1
    assert faults == [f"{names[-1]} is missing in {tmp_path}"]


ANSWERS = [Answer("a, b.png", np.array([0.25, 0.75])), Answer("c.png", np.array([0.5, 0.5]))]


STRANGE = ["=cmd|' /C calc'!A0", "\x1b]0;title\x07\x1b[2Jcat", "-1", "@SUM(A1)", "\x9b31mC1", "'quoted"]


@pytest.mark.parametrize("form", ["table", "csv", "json"])
def test_names_do_not_reach_terminals_and_spreadsheets_raw(form: str) -> None:
    answers = [
        Answer(printable(f"{name}.png"), np.eye(len(STRANGE))[label] * 0.9) for label, name in enumerate(STRANGE)
    ]
    file = io.StringIO()
    if form == "table":
        write_table(answers, STRANGE, 40, file)
    else:
        (write_csv if form == "csv" else write_json)(answers, STRANGE, file)
    text = file.getvalue()
    assert all(line.isprintable() for line in text.split("\n"))
    if form == "csv":
        cells = [row[:2] for row in csv.reader(text.splitlines())][1:]
        assert cells == [
            ["'=cmd|' /C calc'!A0.png", "'=cmd|' /C calc'!A0"],
            [r"\x1b]0;title\x07\x1b[2Jcat.png", r"\x1b]0;title\x07\x1b[2Jcat"],
            ["'-1.png", "-1"],
            ["'@SUM(A1).png", "'@SUM(A1)"],
            [r"\x9b31mC1.png", r"\x9b31mC1"],
            ["''quoted.png", "''quoted"],
        ]
    if form == "json":
        assert [answer["class"] for answer in json.loads(text)] == STRANGE


def test_csv_is_read_back_as_what_was_answered() -> None:
    file = io.StringIO()
    write_csv(ANSWERS, CLASSES, file)
    rows = list(csv.reader(io.StringIO(file.getvalue())))
    assert rows == [
        ["file", "class", "probability", "P(dark)", r"P(bright, or\nnot)"],
        ["a, b.png", r"bright, or\nnot", "0.75", "0.25", "0.75"],
        ["c.png", "dark", "0.5", "0.5", "0.5"],
    ]


def test_json_is_read_back_as_what_was_answered() -> None:
    file = io.StringIO()
    write_json(ANSWERS, CLASSES, file)
    assert json.loads(file.getvalue()) == [
        {
            "file": "a, b.png",
            "class": CLASSES[1],
            "probability": 0.75,
            "probabilities": {"dark": 0.25, CLASSES[1]: 0.75},
        },
        {"file": "c.png", "class": "dark", "probability": 0.5, "probabilities": {"dark": 0.5, CLASSES[1]: 0.5}},
    ]
    file = io.StringIO()
    write_json([], CLASSES, file)
    assert json.loads(file.getvalue()) == []


def test_the_table_has_a_line_an_image() -> None:
    file = io.StringIO()
    write_table(ANSWERS, ["dark", "bright"], 8, file)
    assert file.getvalue() == (
        "file      class   probability  runner-up\n"
        "a, b.png  bright       0.7500  dark 0.2500\n"
        "c.png     dark         0.5000  bright 0.5000\n"
    )


def test_names_do_not_reach_the_terminal_as_commands(tmp_path: Path) -> None:
    (tmp_path / "a\x1b[2J\n.png").write_bytes(PNG)
    (tmp_path / "b\x1b[2J\n.png").write_text("no image")
    faults: list[str] = []
    found = find_images([str(tmp_path)], tmp_path, refuse)
    names = [answer.file for answer in predict(MODEL, found, faults.append, True)]
    assert names == [rf"{tmp_path}/a\x1b[2J\n.png"]
    assert faults[0].startswith(rf"{tmp_path}/b\x1b[2J\n.png is not a usable image")


@pytest.mark.skipif(sys.platform != "linux", reason="names on macOS are UTF-8")
def test_a_name_that_is_not_utf8_is_told_with_escapes(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"\xff.png")).write_bytes(PNG)
    (answer,) = predict(MODEL, find_images([str(tmp_path)], tmp_path, refuse), refuse, True)
    assert answer.file == rf"{tmp_path}/\udcff.png"


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate"])
def test_what_libtiff_prints_does_not_mix_with_the_list(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], compression: str
) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 200), dtype=np.uint8))
    picture.save(tmp_path / "a.tif", compression=compression)
    content = bytearray((tmp_path / "a.tif").read_bytes())
    content[len(content) // 4 : len(content) // 2] = bytes(len(content) // 2 - len(content) // 4)
    (tmp_path / "a.tif").write_bytes(content)
    with suppress(Exception), Image.open(tmp_path / "a.tif") as image:
        image.load()
    assert capfd.readouterr().err != ""  # libtiff's
    told: list[str] = []
    list(predict(MODEL, find_images([str(tmp_path)], tmp_path, told.append), told.append, True))
    assert capfd.readouterr().err == ""


def open_and_close(model: str | None, folder: Path) -> None:
    with opened(model, folder, "fashion-mnist"):
        pass


@pytest.fixture
def exported(tmp_path: Path) -> Callable[[str, bytes], Path]:
    """Writes a model file that may hold anything, and a manifest that is right for it."""

    def export(name: str, content: bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(content)
        sha256 = hashlib.sha256(content).hexdigest()
        manifest = {"classes": CLASSES, "input": {"shape": ["batch", 1, 4, 6]}, "files": {name: {"sha256": sha256}}}
        path.with_name("manifest.json").write_text(json.dumps(manifest))
        return path

    return export


def test_a_file_that_is_not_what_the_manifest_says_is_not_opened(
    exported: Callable[[str, bytes], Path], tmp_path: Path
) -> None:
    path = exported("model.pth", b"as it was exported")
    path.write_bytes(pickle.dumps(RunsCodeWhenUnpickled(tmp_path / "ran")))
    with pytest.raises(PipelineError, match=r"model\.pth: not opened: its SHA-256 differs from .*manifest\.json"):
        open_and_close("model.pth", tmp_path)
    assert not (tmp_path / "ran").exists()


def test_a_file_of_which_the_manifest_does_not_speak_is_not_opened(
    exported: Callable[[str, bytes], Path], tmp_path: Path
) -> None:
    path = exported("model.pth", b"as it was exported")
    path.rename(tmp_path / "renamed.pth")
    with pytest.raises(PipelineError, match=r"renamed\.pth: .* does not list it; it lists model\.pth"):
        open_and_close("renamed.pth", tmp_path)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, r"manifest\.json: missing; it holds the names of the classes"),
        ("{", "not valid JSON"),
        ("[]", "not a manifest that export wrote"),
        ("{}", "not a manifest that export wrote"),
        ('{"classes": ["a"], "files": {"model.pth": {}}, "input": {"shape": [0, 1, 4, 6]}}', "not a manifest that"),
        ('{"classes": ["a"], "files": {"model.pth": {"sha256": ""}}, "input": {"shape": [1]}}', "not a manifest that"),
    ],
)
def test_a_model_without_its_manifest_is_not_opened(tmp_path: Path, content: str | None, complaint: str) -> None:
    (tmp_path / "model.pth").write_bytes(b"")
    if content is not None:
        (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(PipelineError, match=complaint):
        open_and_close("model.pth", tmp_path)


@pytest.mark.slow
def test_a_champion_that_is_not_there_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(PipelineError, match="fashion-mnist: no version is the champion; run `classifier promote`"):
        open_and_close("champion", tmp_path)


def test_a_model_that_is_not_there_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for model, complaint in (
        ("x.onnx", r"x\.onnx: no such model file"),
        (None, r"models/export/manifest\.json: missing; `dvc repro` makes it"),
    ):
        with pytest.raises(PipelineError, match=complaint):
            open_and_close(model, tmp_path)
    Path("models/export").mkdir(parents=True)
    for manifest in ('{"files": {"model.pth": {}}}', "{}", "[]"):
        Path("models/export/manifest.json").write_text(manifest)
        with pytest.raises(PipelineError, match="models/export: no exported model; `dvc repro` makes it"):
            open_and_close(None, tmp_path)


def command(*arguments: str, folder: Path, code: Path = ROOT, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the command `classifier` of a checkout in another folder, as its script does."""
    run = "import sys; sys.path.insert(0, sys.argv.pop(1)); from classifier.cli.app import main; main()"
    return subprocess.run(
        [python(), "-P", "-c", run, code, *arguments], cwd=folder, env=clean_environment(folder.parent),
        stdin=subprocess.DEVNULL, capture_output=True, text=True, **options,
    )  # fmt: skip


@pytest.mark.slow
def test_the_command_says_what_it_could_not_answer_and_exits_with_1(photos: Path, tmp_path: Path) -> None:
    export_brightness(tmp_path)
    (photos / "bad.png").write_text("no image")
    done = command("predict", "photos", "x.png", "--model", "model.onnx", folder=tmp_path)
    assert done.returncode == 1
    assert [row[:2] for row in csv.reader(io.StringIO(done.stdout))] == [
        ["file", "class"], *([f"photos/{name}", "bright"] for name in ("a/10.png", "a/2.JPG", "b.png")),
    ]  # fmt: skip
    assert done.stderr.splitlines() == [
        "x.png: no such file or folder",
        f"photos/bad.png is not a usable image: it is none of {', '.join(FORMATS)}, or cut off",
        "2 not classified, for the reasons above; all other images were",
    ]
    done = command("predict", "x.png", folder=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines()[-1].startswith("No images: ")


@pytest.mark.slow
def test_the_command_writes_a_file_whole_or_not_at_all(photos: Path, tmp_path: Path) -> None:
    export_brightness(tmp_path)
    given = ("predict", "photos", "--model", "model.onnx", "--output", "out.json")
    done = command(*given, "--format", "json", folder=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    before = (tmp_path / "out.json").read_bytes()
    assert len(json.loads(before)) == 3
    (tmp_path / "model.onnx").write_bytes(b"another")
    done = command(*given, folder=tmp_path)
    assert done.returncode == 1
    assert (tmp_path / "out.json").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".out")) == []


@pytest.mark.slow
def test_a_reader_that_goes_away_ends_the_command_quietly(photos: Path, tmp_path: Path) -> None:
    export_brightness(tmp_path)
    shell = f'{sys.executable} -P -c "$0" {ROOT} predict photos --model model.onnx | true'
    run = "import sys; sys.path.insert(0, sys.argv.pop(1)); from classifier.cli.app import main; main()"
    done = subprocess.run(["bash", "-c", shell, run], cwd=tmp_path, capture_output=True, text=True)
    assert done.stderr == ""


@pytest.mark.slow
def test_an_onnx_file_is_answered_without_torch_and_mlflow(photos: Path, tmp_path: Path) -> None:
    export_brightness(tmp_path)
    code = """
import sys
sys.modules["torch"] = sys.modules["mlflow"] = None
sys.path.insert(0, sys.argv.pop(1))
from classifier.cli.app import main
main()
"""
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, ROOT, "predict", "photos", "--model", "model.onnx"],
        cwd=tmp_path, env=clean_environment(tmp_path), capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 4


def export_brightness(folder: Path) -> None:
    """Write model.onnx and its manifest."""

    class Brightness(torch.nn.Module):
        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            mean = pixels.mean(dim=(1, 2, 3))
            return torch.stack([0.5 - mean, mean - 0.5], dim=1)

    write(Brightness(), torch.rand(2, 1, 4, 6), folder / "model.onnx")
    sha256 = hashlib.sha256((folder / "model.onnx").read_bytes()).hexdigest()
    manifest = {
        "classes": ["dark", "bright"],
        "input": {"shape": ["batch", 1, 4, 6]},
        "files": {"model.onnx": {"sha256": sha256}},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project with all formats and a champion. Tests leave it as it is."""
    project = reproduced_project(tmp_path_factory)
    project.run(sys.executable, "-m", "classifier", "promote")
    return project


@pytest.fixture(scope="module")
def evaluated(project: Project) -> tuple[list[str], np.ndarray]:
    """The files of the test images, and the logits (N, classes) that evaluation has for them."""
    data = project.root / "data"
    test_set = CustomImageDataset(data / "annotations/test.csv", data / "images")
    network = build_network("mlp", test_set.image_shape(), 10)
    load_weights(network, project.root / "models/model_weights.pth", torch.device("cpu"))
    batches = Batches(test_set, 64, torch.device("cpu"), memory_limit_gib=1, workers=0)
    return [*test_set.files], predict_logits(batches, network, "float32").numpy()


@pytest.mark.slow
@pytest.mark.parametrize("model", [*(f"model.{suffix}" for suffix in EXPORTED), "champion", None])
def test_every_format_and_the_champion_answer_as_evaluation_does(
    project: Project, evaluated: tuple[list[str], np.ndarray], tmp_path: Path, model: str | None
) -> None:
    files, logits = evaluated
    given = [] if model is None else ["--model", model]
    if model not in (None, "champion"):
        given[1] = str(project.root / "models/export" / given[1])
    write_zip(tmp_path / "all.zip", split_pngs(project.root / "data", "test"))
    done = command("predict", "all.zip", *given, folder=tmp_path, code=project.root)
    assert done.returncode == 0, done.stderr
    table = pd.read_csv(io.StringIO(done.stdout)).set_index("file").loc[[f"all.zip/{file}" for file in files]]
    names = [column[2:-1] for column in table.columns[2:]]
    assert len(table) == len(logits) == 80
    probabilities = softmax(logits.astype(np.float64), axis=1)
    assert table["class"].tolist() == [names[label] for label in logits.argmax(1)]
    np.testing.assert_allclose(table.iloc[:, 2:].to_numpy(), probabilities, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(table.probability, table.iloc[:, 2:].max(axis=1))
    assert [names[index] for index in table.iloc[:, 2:].to_numpy().argmax(1)] == table["class"].tolist()


@pytest.mark.slow
def test_the_champion_is_answered_also_where_onnx_is_not_exported(project: Project, tmp_path: Path) -> None:
    other = project.copy(tmp_path / "other")
    # Under another name than that of the champion, which is not registered yet
    other.set_params(export_formats="[pth]", registered_model="renamed")
    refused = other.run(sys.executable, "-m", "classifier", "promote", check=False)
    assert "registered as fashion-mnist, not as renamed (registered_model in params.yaml)" in refused.stderr
    other.dvc("repro")
    assert "renamed version 1" in other.run(sys.executable, "-m", "classifier", "promote").stdout
    images = str(tmp_path / "all.zip")
    write_zip(tmp_path / "all.zip", split_pngs(other.root / "data", "test"))
    answers = [
        command("predict", images, "--model", model, folder=tmp_path, code=other.root).stdout
        for model in ("champion", str(other.root / "models/export/model.pth"))
    ]
    one, another = (pd.read_csv(io.StringIO(answer)) for answer in answers)
    assert one["class"].tolist() == another["class"].tolist()
    assert len(one) == 80
