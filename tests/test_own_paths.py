"""What docs/own-images.md and docs/experiments.md say of paths after -S, and of `dvc exp apply`."""

from pathlib import Path

import pytest
from PIL import Image
from project import Project

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


def run_in_a_copy(project: Project, name: str, path: Path | str) -> str:
    """What the command of the page says, which a shell reads."""
    command = f"""python -m dvc exp run --temp --name {name} -S 'data_path="{path}"' download"""
    return project.run("sh", "-c", command, check=False).stdout


def test_images_outside_of_the_repository_in_a_copy_are_found_by_their_absolute_path(project: Project) -> None:
    assert "files: 4, " in run_in_a_copy(project, "absolute", project.root.parent / NAME)
    assert "files: " not in run_in_a_copy(project, "relative", f"../{NAME}")


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
