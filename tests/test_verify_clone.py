"""The clone of `classifier verify` has the committed bytes, independent of Git settings and the checkout."""

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from project import clean_environment

from classifier.pipeline.errors import PipelineError
from classifier.provenance.verify import _make_clone

FILES = {"params.yaml": b"seed: 1\n", "code.py": b"print()\n", "crlf.txt": b"a\r\nb\r\n", "run.sh": b"#!/bin/sh\n"}
# The last three with commands that would show in the files
SETTINGS = """
[core]
\tautocrlf = true
\teol = crlf
\tfileMode = false
\thooksPath = {hooks}
[init]
\ttemplateDir = {templates}
[filter "shout"]
\tsmudge = tr a-z A-Z
\tclean = tr A-Z a-z
[filter "lfs"]
\tprocess = false
\trequired = true
[diff]
\tnoprefix = true
\tmnemonicPrefix = true
[color]
\tui = always
[log]
\tshowSignature = true
"""
HOOK = "#!/bin/sh\ntouch hook-has-run\n"


def git(folder: Path, *arguments: str) -> str:
    author = ["-c", "user.name=Test", "-c", "user.email=test@example.org", "-c", "protocol.file.allow=always"]
    done = subprocess.run(
        ["git", *author, *arguments], cwd=folder, env=clean_environment(folder), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with two commits, as the current folder."""
    root = tmp_path / "repository"
    root.mkdir()
    for name, content in FILES.items():
        (root / name).write_bytes(content)
    (root / "run.sh").chmod(0o755)
    git(root, "init", "--quiet", "--initial-branch=main")
    git(root, "add", "--all")
    git(root, "commit", "--quiet", "-m", "First")
    git(root, "commit", "--quiet", "--allow-empty", "-m", "Second")
    for variable in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.chdir(root)
    return root


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name != ".git"}


def made_clone(tmp_path: Path, revision: str | None = None) -> Path:
    folder = tmp_path / "verify"
    folder.mkdir()
    return _make_clone(folder, revision)


@pytest.mark.parametrize("change", [False, True])
def test_the_users_settings_of_git_do_not_reach_the_clone(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: bool
) -> None:
    for folder in (tmp_path / "hooks", tmp_path / "templates/hooks"):
        folder.mkdir(parents=True)
        for name in ("post-checkout", "post-index-change"):
            (folder / name).write_text(HOOK)
            (folder / name).chmod(0o755)
    settings = tmp_path / "settings"
    settings.write_text(SETTINGS.format(hooks=tmp_path / "hooks", templates=tmp_path / "templates"))
    (tmp_path / "git").mkdir()
    (tmp_path / "git/attributes").write_text("* filter=shout\n")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(settings))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    if change:
        (repository / "code.py").write_bytes(b"print(2)\n")
    clone = made_clone(tmp_path)
    assert contents(clone) == FILES | ({"code.py": b"print(2)\n"} if change else {})
    assert os.access(clone / "run.sh", os.X_OK)
    assert list((clone / ".git").rglob("post-*")) == []


def test_a_filter_that_the_user_does_not_have_is_not_needed(repository: Path, tmp_path: Path) -> None:
    """With LFS, for example, the commit holds pointers."""
    (repository / ".gitattributes").write_text("*.bin filter=lfs\n")
    (repository / "weights.bin").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    git(repository, "add", "--all")
    git(repository, "commit", "--quiet", "-m", "Third")
    clone = made_clone(tmp_path)
    assert (clone / "weights.bin").read_bytes() == b"version https://git-lfs.github.com/spec/v1\n"


def worktree(repository: Path, folder: Path) -> None:
    git(repository, "worktree", "add", "--quiet", "--detach", str(folder))


def shallow(repository: Path, folder: Path) -> None:
    git(repository, "clone", "--quiet", "--depth=1", f"file://{repository}", str(folder))
    git(folder, "checkout", "--quiet", "--detach")  # as on GitHub's runners
    git(folder, "branch", "--quiet", "-D", "main")


def submodule(repository: Path, folder: Path) -> None:
    above = folder.with_name("above")
    git(repository, "init", "--quiet", str(above))
    git(above, "submodule", "--quiet", "add", str(repository), "inner")
    folder.symlink_to(above / "inner")


def symlink(repository: Path, folder: Path) -> None:
    folder.symlink_to(repository)


def with_strange_name(repository: Path, folder: Path) -> None:
    shutil.copytree(repository, folder / 'a "b" ü')
    folder.rename(folder.with_name("outer"))
    folder.symlink_to(folder.with_name("outer") / 'a "b" ü')


@pytest.mark.parametrize("kind", [worktree, shallow, submodule, symlink, with_strange_name])
def test_every_kind_of_checkout_is_cloned(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Callable[[Path, Path], None]
) -> None:
    folder = tmp_path / "checkout"
    kind(repository, folder)
    monkeypatch.chdir(folder)
    (folder / "code.py").write_bytes(b"print(2)\n")
    clone = made_clone(tmp_path)
    assert contents(clone) == FILES | {"code.py": b"print(2)\n"}
    assert git(clone, "log", "--format=%s").startswith("Second")


def test_a_commit_that_no_branch_holds_is_cloned(repository: Path, tmp_path: Path) -> None:
    git(repository, "switch", "--quiet", "--detach")
    (repository / "code.py").write_bytes(b"print(3)\n")
    git(repository, "commit", "--quiet", "--all", "-m", "Third")
    commit = git(repository, "rev-parse", "HEAD")
    git(repository, "switch", "--quiet", "main")
    assert contents(made_clone(tmp_path, commit)) == FILES | {"code.py": b"print(3)\n"}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")
def test_a_repository_of_another_user_is_cloned_once_git_is_allowed_to(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in (repository, *repository.rglob("*")):
        os.chown(path, 12345, 12345)
    with pytest.raises(PipelineError, match="there is no commit here to verify"):
        made_clone(tmp_path)
    (tmp_path / "settings").write_text(f"[safe]\n\tdirectory = {repository}\n")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "settings"))
    (tmp_path / "verify").rmdir()
    assert contents(made_clone(tmp_path)) == FILES
