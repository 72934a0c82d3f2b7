"""The patch that a run keeps of its code: all that is needed to make it again, and no secret."""

import re
import subprocess
from pathlib import Path

import pytest
from project import Project

from classifier.tracking.code_patch import code_patch

# Pieces, so that this file holds no secret
KEY, TOKEN = "AKIA" + "Z7Q4ABCDEFGH2345", "ghp_" + "16C7e42F292c6912E7710c838347Ae178B4a"
SECRET_FILES = [
    ".netrc", ".pgpass", "id_rsa", "service-account.json", "token.txt", "secrets.yaml", "store.p12", "password",
    "classifier/secrets.yaml", "classifier/id_rsa", "stages/.netrc", "key.py", "docs/token.md", "ünï\nx.txt",
]  # fmt: skip


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    project = Project(tmp_path / "project")
    for name in ("classifier/a.py", "classifier/b.py", "stages/train.py", "params.yaml", "docs/page.md"):
        (project.root / name).parent.mkdir(parents=True, exist_ok=True)
        (project.root / name).write_text("first\n")
    project.commit()
    monkeypatch.chdir(project.root)
    return project


def applied(project: Project, patch: bytes, tmp_path: Path) -> dict[str, str]:
    """The files of a clone to which a patch was applied, that differ from the commit, by name."""
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", project.root, clone], check=True)
    subprocess.run(["git", "apply", "-"], input=patch, cwd=clone, check=True)
    listed = Project(clone).run("git", "ls-files", "--modified", "--others").stdout.splitlines()
    return {name: (clone / name).read_text() for name in listed}


def test_code_is_part_of_the_patch(project: Project, tmp_path: Path) -> None:
    written = {
        "classifier/a.py": "second\nMD5 = 'd8e8fca2dc0f896fd7cb4cb0031ba249'\n",
        "classifier/new.py": "--- a\n+++ b\ndiff --git a/x b/x\n",
        "classifier/card.md.j2": "{{ x }}\n",
        "params.yaml": "lr: 0.1\n",
        "docs/page.md": "second\n",
    }
    for name, content in written.items():
        Path(name).write_text(content)
    found = code_patch(".")
    assert sorted(found.names) == sorted(written)
    assert found.left_out == {}
    assert applied(project, found.patch, tmp_path) == written


def test_new_files_that_are_no_code_are_left_out(project: Project) -> None:
    for name in SECRET_FILES:
        Path(name).write_text("tr4cker-s3cret\n")
    found = code_patch(".")
    assert found.left_out == dict.fromkeys(SECRET_FILES, "no code of the pipeline")
    assert (found.names, found.patch) == ([], b"")


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        (f"aws = '{KEY}'", "AWS Access Key"),
        (f"headers = {{'Authorization': 'token {TOKEN}'}}", "GitHub Token"),
        ("-----BEGIN RSA PRIVATE" + " KEY-----", "Private Key"),
        ("url = 'https://me:" + "tr4cker-s3cret@host/x'", "Basic Auth Credentials"),
        ("password = " + "'tr4cker-s3cret'", "Secret Keyword"),
    ],
)
@pytest.mark.parametrize("name", ["classifier/b.py", "classifier/new.py", "params.yaml"])
def test_a_file_with_a_secret_is_left_out(project: Project, tmp_path: Path, name: str, line: str, kind: str) -> None:
    Path("classifier/a.py").write_text("second\n")
    Path(name).write_text(f"harmless\n{line}\n")
    found = code_patch(".")
    assert found.left_out == {name: f"it may contain a secret ({kind})"}
    assert applied(project, found.patch, tmp_path) == {"classifier/a.py": "second\n"}
    assert line.encode() not in found.patch


def test_a_secret_that_is_removed_does_not_matter_and_a_file_may_become_a_link(project: Project) -> None:
    Path("classifier/a.py").write_text("password = " + "'tr4cker-s3cret'\n")
    project.commit()
    Path("classifier/a.py").write_text("second\n")
    Path("classifier/b.py").unlink()
    Path("classifier/b.py").symlink_to("a.py")
    Path("stages/train.py").write_text("third\n")
    found = code_patch(".")
    assert found.names == ["classifier/a.py", "classifier/b.py", "stages/train.py"]
    assert found.left_out == {}


def test_changes_that_are_too_long_to_be_scanned_are_left_out(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("classifier.tracking.code_patch.MOST_LINES", 100)
    Path("classifier/a.py").write_text("x = 1\n" * 90)
    Path("classifier/b.py").write_text("x = 1\n" * 90)
    found = code_patch(".")
    assert found.names == ["classifier/a.py"]
    assert found.left_out == {"classifier/b.py": "more than 100 changed lines"}
    assert re.search(rb"^\+x = 1$", found.patch, re.MULTILINE)
