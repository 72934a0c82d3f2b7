"""Your own images through the whole pipeline: real dvc, and digits as image files in the layouts that users have."""

import io
import json
import shutil
import sqlite3
import sys
import zipfile
from contextlib import closing
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from digits import LAYOUTS, write_digits
from PIL import Image
from project import Project

from classifier.pipeline.outputs import hash_file

pytestmark = pytest.mark.slow

STAGES = ["check", "download", "annotate", "train", "evaluate", "export"]
# That of docs/own-images.md, which test_docs.py runs, but with a network that is trained in a second
RECIPE = {
    "network": "mlp", "epochs": "15", "batch_size": "32", "optimizer": "adamw", "lr": "0.003", "schedule": "onecycle",
}  # fmt: skip


def write_layout(project: Project, layout: str) -> str:
    """Write the digits below data/own; the data_path for them."""
    name = f"data/own/digits-{layout}{'.zip' if layout == 'zip' else ''}"
    write_digits(project.root / name, layout)
    return name


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project in which the digits in folders were classified, committed; tests leave it as it is."""
    project = Project.create(tmp_path_factory.mktemp("digits") / "project")
    project.set_params(source="folder", threads="1", export_formats="[onnx]", **RECIPE)
    for layout in LAYOUTS:
        project.set_params(data_path=write_layout(project, layout))
    project.set_params(data_path="data/own/digits-folder")
    project.commit()
    done = project.dvc("repro")
    assert project.stages_run(done.stdout) == STAGES
    project.commit()
    return project


@pytest.fixture
def project(digits: Project, tmp_path: Path) -> Project:
    return digits.copy(tmp_path / "project")


def made(project: Project) -> dict[str, str]:
    """The md5s of all that the stages made."""
    return {path: md5 for path, md5 in project.outputs().items() if not path.startswith("data/own/")}


def learnt(project: Project) -> dict[str, str]:
    """The md5s of what was made of the images, but for what has the names of files, or of data_path."""
    prefixes = ("data/images", "models/model_weights", "metrics/")
    named = ("metrics/predictions.csv", *(f"metrics/plots/{name}.png" for name in ("samples", "mistakes", "saliency")))
    return {path: md5 for path, md5 in project.outputs().items() if path.startswith(prefixes) and path not in named}


def predictions(project: Project) -> pd.DataFrame:
    return pd.read_csv(project.root / "metrics/predictions.csv")


def original_names(project: Project, data_path: str) -> set[Path]:
    """The names of the pictures in a folder or zip of digits."""
    path = project.root / data_path
    if path.is_file():
        return {*map(Path, zipfile.ZipFile(path).namelist())}
    return {file.relative_to(path) for file in path.rglob("*.png")}


def test_digits_are_told_apart(digits: Project) -> None:
    scores = json.loads((digits.root / "metrics/test.json").read_text())
    assert scores["accuracy"] >= 0.97
    assert (digits.root / "data/annotations/test.csv").read_text().count("\n") == 1 + 359
    assert digits.run("git", "status", "--porcelain").stdout == ""


def test_predictions_lead_to_the_users_files(digits: Project) -> None:
    table = predictions(digits)
    assert table.split.value_counts().to_dict() == {"test": 359, "val": 287}
    assert [Path(file).parts[0] for file in table.file] == [str(label) for label in table.label]
    assert {Path(file) for file in table.file} <= original_names(digits, "data/own/digits-folder")
    tested = table[table.split == "test"]
    assert (tested.label == tested.predicted).mean() == json.loads((digits.root / "metrics/test.json").read_text())[
        "accuracy"
    ]


def test_mlflow_has_the_name_of_the_data(digits: Project) -> None:
    with closing(sqlite3.connect(digits.root / "mlflow.db")) as store:
        names = {name for (name,) in store.execute("SELECT name FROM experiments")}
        models = {name for (name,) in store.execute("SELECT name FROM registered_models")}
    assert names - {"Default"} == models == {"digits-folder"}


def annotations(project: Project) -> list[list[list[int]]]:
    """Label and row of each image, by split."""
    tables = (pd.read_csv(project.root / f"data/annotations/{split}.csv") for split in ("train", "val", "test"))
    return [table[["label", "row"]].to_numpy().tolist() for table in tables]


def test_the_layouts_of_the_same_images_give_the_same_splits_and_weights(project: Project) -> None:
    expected, splits = learnt(project), annotations(project)
    assert "models/model_weights.pth" in expected
    for layout in ("table", "zip"):
        path = f"data/own/digits-{layout}{'.zip' if layout == 'zip' else ''}"
        project.set_params(data_path=path)
        # Nothing is taken from what was made before; and what was learnt from the same bytes is still right
        shutil.rmtree(project.root / ".dvc/cache/runs")
        done = project.dvc("repro", "--force", "annotate")
        assert project.stages_run(done.stdout) == ["check", "download", "annotate"]
        assert project.stages_run(project.dvc("repro", "evaluate").stdout) == ["train", "evaluate"]  # of other names
        assert learnt(project) == expected
        assert annotations(project) == splits
        assert {Path(file) for file in predictions(project).file} <= original_names(project, path)


def test_one_image_more_changes_what_it_must_and_without_it_all_comes_back_from_the_cache(project: Project) -> None:
    before = made(project)
    folder = project.root / "data/own/digits-folder"
    (folder / "README.txt").write_text("Not an image\n")
    assert project.stages_run(project.dvc("repro").stdout) == ["download"]
    assert made(project) == before
    (folder / "README.txt").unlink()

    shutil.copy(folder / "3/0003.png", folder / "3/another.png")
    done = project.dvc("repro", "evaluate")
    assert project.stages_run(done.stdout) == STAGES[1:-1]
    assert "same pixels: 0 pairs within a split, 1 across splits\n" in done.stdout
    assert "in several splits: 3/another.png (train) = 3/0003.png (val)\n" in done.stdout
    assert made(project) != before
    assert project.run("git", "status", "--porcelain", "data").stdout == ""

    (folder / "3/another.png").unlink()
    assert project.stages_run(project.dvc("repro").stdout) == []
    assert made(project) == before
    assert project.run("git", "status", "--porcelain").stdout == ""


def test_another_size_makes_the_images_anew_and_downloads_nothing(project: Project) -> None:
    project.set_params(image_size="12", epochs="1")
    done = project.dvc("repro", "train")
    assert project.stages_run(done.stdout) == ["check", "annotate", "train"]
    assert "each 1 x 12 x 12" in done.stdout


def write_photos(folder: Path) -> None:
    """Photos as people have them, of 12 patients: red ones in `hat`, blue ones in `bag`; and a broken one."""
    generator = np.random.default_rng(0)
    for number in range(120):
        patient, label = number % 12, number // 12 % 2
        height, width = [(30, 90), (80, 40), (50, 50)][number % 3]
        pixels = generator.integers(0, 120, (height, width, 3), dtype=np.uint8)
        pixels[..., (0, 2)[label]] += 120
        photo = Image.fromarray(pixels)
        path = folder / ("hat", "bag")[label] / f"p{patient:02}_{number:03}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        if number % 5 == 0:
            photo.putalpha(Image.fromarray(generator.integers(100, 256, (height, width), dtype=np.uint8)))
            photo.save(path.with_suffix(".png"))
        elif number % 5 == 1:
            exif = Image.Exif()
            exif[0x0112] = 6
            photo.save(path, quality=95, exif=exif)
        elif number % 5 == 2:
            photo.save(path.with_suffix(".avif"), quality=95)
        else:
            photo.save(path.with_suffix(".webp"), quality=95)
    (folder / "hat/p03_broken.jpg").write_bytes(b"\xff\xd8\xff not an image")


def test_photos_of_many_kinds_are_split_by_group_augmented_and_predicted_as_evaluated(tmp_path: Path) -> None:
    project = Project.create(tmp_path / "project")
    write_photos(project.root / "data/own/photos")
    project.set_params(
        source="folder", data_path="data/own/photos", threads="1", export_formats="[onnx]", network="cnn", epochs="3",
        batch_size="16", optimizer="adamw", lr="0.003", image_size="[24, 32]", stored_size="[36, 48]",
        augment="[resized_crop, flip, trivial, rotate]", on_bad_image="skip", val_size="0.2",
        background='"#102030"',
    )  # fmt: skip
    project.commit()
    done = project.dvc("exp", "run", "-S", r'group="p\d+"')
    assert "each 3 x 36 x 48 (channels x height x width)" in done.stdout
    assert "unusable images, left out and listed in metrics/rejected.csv: 1\n" in done.stdout
    rejected = pd.read_csv(project.root / "metrics/rejected.csv")
    assert rejected.file.tolist() == ["hat/p03_broken.jpg"]

    splits = {name: pd.read_csv(project.root / f"data/annotations/{name}.csv") for name in ("train", "val", "test")}
    patients = [set(table.file.str.extract(r"(p\d+)")[0]) for table in splits.values()]
    assert sum(map(len, splits.values())) == 120
    assert [len(group) for group in patients] == pytest.approx([8, 2, 2], abs=1)
    assert len(set.union(*patients)) == 12

    scores = json.loads((project.root / "metrics/test.json").read_text())
    assert scores["accuracy"] >= 0.9
    evaluated = predictions(project).set_index("file")
    test_files = splits["test"].file.tolist()
    command = (sys.executable, "-m", "classifier", "predict", *(f"data/own/photos/{name}" for name in test_files))
    answers = pd.read_csv(io.StringIO(project.run(*command).stdout))
    assert answers["class"].tolist() == evaluated.loc[test_files].predicted.tolist()
    for name in ("P(hat)", "P(bag)"):
        np.testing.assert_allclose(answers[name], evaluated.loc[test_files][name], rtol=0, atol=2e-6)

    before = made(project)
    project.set_params(workers="0", memory_limit_gib="0.00001")  # which change no result
    shutil.rmtree(project.root / ".dvc/cache/runs")
    project.dvc("repro", "--force", "train")
    assert made(project)["models/model_weights.pth"] == before["models/model_weights.pth"]


def test_originals_are_in_the_cache_once_also_if_dvc_has_them_already(project: Project) -> None:
    def copies(path: Path) -> int:
        md5 = hash_file(path)
        files = (project.root / ".dvc/cache").rglob("*")
        return sum(file.is_file() and hash_file(file) == md5 for file in files)

    original = project.root / "data/own/digits-folder/0/0000.png"
    assert copies(original) == 1
    project.dvc("add", "data/own/digits-folder")
    assert copies(original) == 1
    archive = project.root / "data/own/digits-zip.zip"
    project.set_params(data_path="data/own/digits-zip.zip")
    project.dvc("repro", "download")
    project.dvc("add", "data/own/digits-zip.zip")
    assert copies(archive) == 1


def test_images_that_dvc_has_are_there_in_temporary_experiments(project: Project) -> None:
    project.dvc("add", "data/own/digits-zip.zip")
    project.set_params(data_path="data/own/digits-zip.zip", epochs="1")
    project.commit()
    assert "data/own/digits-zip.zip.dvc" in project.run("git", "ls-files").stdout.split()
    done = project.dvc("exp", "run", "--temp", "-S", "lr=0.001", "train")
    assert project.stages_run(done.stdout) == STAGES[:4]
    assert project.run("git", "status", "--porcelain").stdout == ""


def test_images_that_git_does_not_have_are_rebuilt_from_by_verify(project: Project) -> None:
    done = project.run(sys.executable, "-m", "classifier", "verify")
    verdicts = dict(line.split(maxsplit=1) for line in done.stdout.splitlines() if "environment:" not in line)
    assert set(verdicts.values()) == {"bit-identical"}
    assert "data/raw" in verdicts


def test_images_in_the_work_tree_that_git_would_take_fail_with_one_message(project: Project) -> None:
    shutil.copytree(project.root / "data/own/digits-folder", project.root / "photos")
    project.set_params(data_path="photos")
    failed = project.dvc("repro", check=False)
    assert failed.returncode != 0
    assert "`dvc add photos`" in failed.stderr + failed.stdout
    assert "Traceback" not in failed.stderr
