"""What Git says of a checkout, told without touching it."""

from pathlib import Path

import pytest
from project import Project

from classifier.tracking import git as repository
from classifier.tracking.git import LARGEST_CODE, changes, commit_of, commits_holding, experiments, metrics_at, read_at


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A small repository, which is the current folder."""
    project = Project(tmp_path / "repository")
    (project.root / "sub").mkdir(parents=True)
    (project.root / "code.py").write_text("one\n")
    (project.root / "sub/gone.py").write_text("two\n")
    (project.root / ".gitignore").write_text("ignored\n")
    project.commit()
    monkeypatch.chdir(project.root)
    return project


def change(project: Project) -> None:
    (project.root / "code.py").write_text("owt\n")  # as long as before, and within the same second
    (project.root / "sub/gone.py").unlink()
    (project.root / "sub/new file.bin").write_bytes(bytes(range(256)))
    (project.root / "dangling").symlink_to("nowhere")
    (project.root / "ignored").write_text("secret")


def test_changes_are_those_that_git_apply_makes_in_a_clone(project: Project, tmp_path: Path) -> None:
    change(project)
    names, patch = changes()
    assert names == ["code.py", "dangling", "sub/gone.py", "sub/new file.bin"]
    project.run("git", "clone", "--quiet", ".", str(tmp_path / "clone"))
    (tmp_path / "patch").write_bytes(patch)
    clone = Project(tmp_path / "clone")
    clone.run("git", "apply", str(tmp_path / "patch"))
    assert (clone.root / "code.py").read_text() == "owt\n"
    assert not (clone.root / "sub/gone.py").exists()
    assert (clone.root / "sub/new file.bin").read_bytes() == bytes(range(256))
    assert (clone.root / "dangling").is_symlink()
    assert not (clone.root / "ignored").exists()


def test_changes_leave_the_repository_as_it_is(project: Project) -> None:
    change(project)
    project.run("git", "add", "code.py")
    before = project.run("git", "status", "--porcelain").stdout
    objects = sorted((project.root / ".git/objects").rglob("*"))
    changes()
    assert project.run("git", "status", "--porcelain").stdout == before
    assert sorted((project.root / ".git/objects").rglob("*")) == objects


def test_changes_pass_over_repositories_within(project: Project) -> None:
    project.run("git", "init", "--quiet", "nested")
    (project.root / "nested/file").write_text("other")
    (project.root / "code.py").write_text("changed\n")
    assert changes()[0] == ["code.py"]


def test_changes_pass_over_new_files_that_are_too_large_for_code(project: Project) -> None:
    with (project.root / "images.tar").open("wb") as file:
        file.truncate(LARGEST_CODE + 1)
    (project.root / "code.py").write_text("changed\n")
    assert changes()[0] == ["code.py"]


def test_changes_in_a_folder_of_a_larger_repository_are_named_from_there(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    change(project)
    monkeypatch.chdir(project.root / "sub")
    assert changes()[0] == ["gone.py", "new file.bin"]


def test_a_new_file_that_goes_while_it_is_looked_at_is_passed_over(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an editor's: git is given its name, and does not find it any more."""
    (project.root / "a.py").write_text("new\n")
    (project.root / ".a.py.swp").touch()

    def looked_at(name: bytes) -> bool:
        (project.root / ".a.py.swp").unlink(missing_ok=True)
        return True

    monkeypatch.setattr(repository, "_may_be_code", looked_at)
    assert changes()[0] == ["a.py"]


def test_changes_can_be_limited(project: Project) -> None:
    change(project)
    assert changes(".", ":!sub", ":!dangling")[0] == ["code.py"]


def test_without_a_commit_nothing_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert changes() == ([], b"")
    assert commit_of("HEAD") is None
    assert experiments() == []


def test_commits_are_found_by_what_their_lock_holds_also_behind_a_merge_that_dropped_it(project: Project) -> None:
    def commit_lock(content: str) -> str:
        (project.root / "dvc.lock").write_text(content)
        project.commit()
        return project.run("git", "rev-parse", "HEAD").stdout.strip()

    commit_lock("md5: 1111\n")
    project.run("git", "switch", "--quiet", "--create", "side")
    side = commit_lock("md5: 2222\n")
    project.run("git", "switch", "--quiet", "main")
    main = commit_lock("md5: 3333\n")
    identity = ("-c", "user.name=Test", "-c", "user.email=test@example.org")
    project.run("git", *identity, "merge", "--quiet", "--strategy=ours", "-m", "Merge", "side")
    project.run("git", "branch", "--quiet", "-D", "side")
    assert commits_holding("2222") == [side]
    assert main in commits_holding("3333")
    assert commits_holding("4444") == []
    assert read_at(side, Path("dvc.lock")) == b"md5: 2222\n"
    assert read_at(side, Path("sub")) is None


def test_metrics_of_a_commit_are_those_it_has(project: Project) -> None:
    (project.root / "metrics").mkdir()
    (project.root / "metrics/train.json").write_text('{"epoch": 3}')
    (project.root / "metrics/test.json").write_text("<<<<<<<")
    project.commit()
    assert metrics_at("HEAD") == {"epoch": 3}
    (project.root / "metrics/test.json").write_text('{"accuracy": 0.5}')
    project.commit()
    assert metrics_at("HEAD") == {"epoch": 3, "test accuracy": 0.5}
    assert metrics_at("HEAD~2") == {}
