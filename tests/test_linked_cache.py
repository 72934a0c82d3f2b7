"""Your own images where DVC links the work tree to its cache, by each kind of link: real dvc, through all stages."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from project import Project

pytestmark = pytest.mark.slow

CLASSES = ("=a", "b")  # one that a spreadsheet would take for a formula
LINKS = ("symlink", "hardlink", "reflink")
# All stages that read what DVC has linked, in one process: one import of torch
STAGES_AFTER_DOWNLOAD = """
from stages import annotate, evaluate, export, train
for stage in (annotate, train, evaluate, export):
    stage.main()
"""


def use_links(project: Project, link: str) -> None:
    """Set `cache.type` in a cache outside of the project."""
    cache = project.root.parent / "cache"
    (project.root / ".dvc/config.local").write_text(f"[cache]\n    dir = {cache}\n    type = {link}\n")


@pytest.fixture(scope="module")
def linked(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project in which all stages ran on images that `dvc add` had turned into symbolic links."""
    project = Project.create(tmp_path_factory.mktemp("linked") / "project")
    photos = project.root / "data/own/photos"
    pixels = np.random.default_rng(0).integers(0, 256, (40, 8, 8), dtype=np.uint8)
    for number, image in enumerate(pixels):
        path = photos / CLASSES[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    project.set_params(
        source="folder", data_path="data/own/photos", threads="1", epochs="1", export_formats="[onnx]", network="mlp"
    )
    use_links(project, "symlink")
    project.commit()
    project.dvc("add", "data/own/photos")
    assert (photos / "=a/0.png").is_symlink()
    project.dvc("repro")
    project.commit()
    return project


def link_of(path: Path) -> str:
    """symlink or hardlink; else reflink, which nothing tells from a copy."""
    return "symlink" if path.is_symlink() else "hardlink" if path.stat().st_nlink > 1 else "reflink"


def remove_outputs(project: Project) -> None:
    for name in ("data/raw", "data/images", "data/annotations", "models", "metrics"):
        shutil.rmtree(project.root / name)


def results(project: Project) -> dict[str, str]:
    return {name: md5 for name, md5 in project.outputs().items() if not name.startswith("data/own/")}


@pytest.mark.parametrize("link", LINKS)
def test_stages_read_what_dvc_has_linked(linked: Project, link: str) -> None:
    if link == "reflink":
        probe = linked.run("cp", "--reflink=always", "params.yaml", "probe", check=False)
        (linked.root / "probe").unlink(missing_ok=True)
        if probe.returncode != 0:
            pytest.skip("this file system makes no reflinks")
    before = results(linked)
    assert "data/raw/=a/0.png" in before
    use_links(linked, link)
    if link != "symlink":  # with which all stages have just run
        remove_outputs(linked)
        linked.dvc("checkout")
        linked.run("git", "restore", "metrics")
        assert link_of(linked.root / "data/raw/=a/0.png") == link
        linked.run(sys.executable, "-c", STAGES_AFTER_DOWNLOAD)
        assert results(linked) == before

    # From the run cache
    remove_outputs(linked)
    (linked.root / "dvc.lock").unlink()
    assert linked.stages_run(linked.dvc("repro").stdout) == []
    assert link_of(linked.root / "data/raw/=a/0.png") == link
    assert results(linked) == before
    assert linked.run("git", "status", "--porcelain").stdout == ""


def test_linked_images_are_classified(linked: Project) -> None:
    done = linked.run(sys.executable, "-m", "classifier", "predict", "data/own/photos/=a", "data/raw/b/1.png")
    assert len(done.stdout.splitlines()) == 1 + 20 + 1


def test_a_class_that_looks_like_a_formula_is_quoted_for_spreadsheets_alone(linked: Project) -> None:
    for name in ("classes.csv", "plots/confusion.csv"):
        lines = (linked.root / "metrics" / name).read_text().splitlines()
        assert any(line.startswith("'=a,") for line in lines)
        assert not any(line.startswith("=a,") for line in lines)
    assert "| =a |" in (linked.root / "models/export/README.md").read_text()
    assert "0,=a\n" in (linked.root / "data/annotations/classes.csv").read_text()
