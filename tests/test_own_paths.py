"""What docs/own-images.md and docs/experiments.md say of paths after -S, and of `dvc exp apply`."""

import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest
from PIL import Image
from project import Project

from classifier.data.lockfile import md5s_in
from classifier.pipeline.outputs import hash_path
from classifier.pipeline.safe_yaml import read_yaml

pytestmark = pytest.mark.slow

NAME = "my photos (1) ~"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    folder = tmp_path_factory.mktemp("paths")
    for number in range(4):
        path = folder / NAME / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4), number).save(path)
    project = Project.create(folder / "project")
    project.set_params(source="folder")
    project.commit()
    return project


def run_in_a_copy(project: Project, name: str, path: Path | str) -> subprocess.CompletedProcess[str]:
    """Run the command of the page, which a shell reads."""
    command = f"""python -m dvc exp run --temp --name {name} -S 'data_path="{path}"' download"""
    return project.run("sh", "-c", command, check=False)


def test_images_outside_of_the_repository_in_a_copy_are_found_by_their_absolute_path(project: Project) -> None:
    assert "files: 4, " in run_in_a_copy(project, "absolute", project.root.parent / NAME).stdout
    failed = run_in_a_copy(project, "relative", f"../{NAME}").stderr
    assert "is outside of the repository. This experiment runs in a copy elsewhere.\nGive the whole path" in failed
    assert f"-S data_path={project.root.parent / NAME}" in failed


@pytest.mark.parametrize("kind", ["zip", "folder", "part"])
def test_images_that_git_does_not_have_are_those_of_the_main_checkout(
    project: Project, kind: str, tmp_path: Path
) -> None:
    """kind: a folder of which Git has a part is data/own, with a page of its own."""
    images = project.root.parent / NAME
    project = project.copy(tmp_path / "project")
    if kind == "zip":
        path = Path("photos.zip")
        with zipfile.ZipFile(project.root / path, "w") as archive:
            for file in images.rglob("*.png"):
                archive.write(file, file.relative_to(images))
    else:
        path = Path("data/own") / ("" if kind == "part" else "photos")
        shutil.copytree(images, project.root / path, dirs_exist_ok=True)
    assert "files: " in run_in_a_copy(project, kind, path).stdout
    ref = project.run("git", "for-each-ref", "--format=%(refname)", f"refs/exps/**/{kind}").stdout.strip()
    lock = read_yaml(project.run("git", "show", f"{ref}:dvc.lock").stdout)
    assert md5s_in(lock, "deps")[str(path)] == hash_path(project.root / path)
    assert {"dvc.lock", "params.yaml"} >= set(project.run("git", "diff", "--name-only", "HEAD", ref).stdout.split())
    assert project.run("git", "status", "--porcelain").stdout == ""


def test_images_that_are_nowhere_are_looked_for_in_both_places_and_told(project: Project) -> None:
    failed = run_in_a_copy(project, "nowhere", "photos/nowhere").stderr
    assert (
        f"params.yaml: data_path: there is no photos/nowhere, neither in {project.root} nor in the copy of it that "
        f"this experiment runs in, {project.root}/.dvc/tmp/exps/standalone/tmp"
    ) in failed
    assert "give their whole path, from / on: -S data_path=" in failed


def test_apply_overwrites_edits(project: Project) -> None:
    """After the test above, which has made the experiment."""
    if not project.run("git", "for-each-ref", "refs/exps/**/absolute").stdout:
        run_in_a_copy(project, "absolute", project.root.parent / NAME)
    edited = project.root / "params.yaml"
    before = edited.read_text()
    edited.write_text(f"{before}# an edit\n")
    project.dvc("exp", "apply", "absolute", check=False)  # the later stages have not run
    assert "# an edit" not in edited.read_text()
    assert str(project.root.parent / NAME) in edited.read_text()
