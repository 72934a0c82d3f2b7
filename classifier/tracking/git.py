"""Read the Git repository: revisions, changes, and DVC's experiments, which are commits under refs/exps."""

import json
import os
import subprocess
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from classifier.pipeline.errors import PipelineError
from classifier.pipeline.outputs import hash_bytes, hash_listing
from classifier.pipeline.paths import LOCK, TEST_METRICS, TRAIN_METRICS

LARGEST_CODE = 10_000_000  # bytes; a larger new file is data, which Git would copy and compress in each stage


def git(*arguments: str) -> str:
    """Return git's output as text; empty if git fails or is not installed."""
    return git_bytes(*arguments).decode(errors="replace").strip()


def git_bytes(*arguments: str, env: dict[str, str] | None = None) -> bytes:
    """Return git's output as bytes; empty if git fails or is not installed."""
    try:
        # log.showSignature, if set by the user, would add lines to the output of `git log`
        done = subprocess.run(["git", "-c", "log.showSignature=false", *arguments], capture_output=True, env=env)
    except OSError:
        return b""
    return done.stdout if done.returncode == 0 else b""


def commit_of(revision: str) -> str | None:
    """Return the full hash of a branch, tag or abbreviated hash, or None."""
    return git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}") or None


def read_at(commit: str, path: Path) -> bytes | None:
    """Return the content of a file in a commit, or None if the commit has no such file."""
    name = f"{commit}:./{path.as_posix()}"
    content = git_bytes("cat-file", "blob", name)
    return content if content or git("cat-file", "-t", name) == "blob" else None


def md5_at(commit: str, path: Path) -> str | None:
    """Return the md5, as in dvc.lock, of a file or folder in a commit, or None if the commit does not have it."""
    if (content := read_at(commit, path)) is not None:
        return hash_bytes(content)
    names = git("ls-tree", "-r", "--name-only", f"{commit}:./{path.as_posix()}").splitlines()
    contents = {name: read_at(commit, path / name) or b"" for name in names}
    return hash_listing({name: hash_bytes(content) for name, content in contents.items()}) if names else None


def changes(*paths: str, takes: Callable[[str], bool] = lambda name: True) -> tuple[list[str], bytes]:
    """Return the names of files that differ from the commit, including new files, and a patch for `git apply`.

    paths: Git pathspecs that limit the result.
    takes: given the name of a new file, whether to include it.
    Names are relative to the working directory. Ignored files, new files of more than LARGEST_CODE bytes and nested
    repositories are left out. The result is empty if there is no commit. A temporary index and object store are used:
    the user's stay unchanged, and an existing index may miss a file changed within the last second, as in DVC's copies.
    Raises PipelineError if git cannot read a file.
    """
    if not commit_of("HEAD"):
        return [], b""
    with tempfile.TemporaryDirectory() as folder:
        objects = Path(git("rev-parse", "--git-path", "objects")).absolute()
        environment = os.environ | {
            "GIT_INDEX_FILE": str(Path(folder) / "index"),
            "GIT_OBJECT_DIRECTORY": folder,
            "GIT_ALTERNATE_OBJECT_DIRECTORIES": str(objects),
        }
        files = b"\0".join(name for name in _new_files() if takes(os.fsdecode(name)) and _may_be_code(name))
        for arguments, given in (
            (["read-tree", "HEAD"], b""),
            (["add", "--update", "."], b""),
            (
                ["update-index", "--add", "--remove", "-z", "--stdin"],
                files,
            ),  # remove: a file may have been deleted meanwhile
        ):
            done = subprocess.run(["git", *arguments], env=environment, input=given, capture_output=True)
            if done.returncode != 0:
                reason = done.stderr.decode(errors="replace").strip()
                raise PipelineError(
                    "the differences from the commit cannot be determined: "
                    f"{reason or subprocess.CalledProcessError(done.returncode, f'git {arguments[0]}')}\n"
                    f"No file was changed. Fix the cause, or free disk space in {tempfile.gettempdir()}, then run the "
                    "command again."
                )
        # Unlike `diff`, this ignores the user's settings, such as diff.noprefix, with which `git apply` would fail
        diff = ("diff-index", "--cached", "--relative", "--no-renames", "--no-ext-diff", "--binary", "HEAD")
        names = git_bytes(*diff, "--name-only", "-z", "--", *paths, env=environment)
        return names.decode(errors="replace").split("\0")[:-1], git_bytes(
            *diff, "--patch", "--", *paths, env=environment
        )


def restore(names: list[str]) -> None:
    """Restore files from the commit, in the working directory and the index.

    names: relative to the working directory.
    Raises PipelineError if git fails.
    """
    command = ["git", "restore", "--source=HEAD", "--staged", "--worktree", "--", *names]
    done = subprocess.run(command, capture_output=True, env=os.environ | {"GIT_LITERAL_PATHSPECS": "1"})
    if done.returncode != 0:
        reason = done.stderr.decode(errors="replace").strip()
        raise PipelineError(f"{', '.join(names)}: git cannot restore them: {reason}")


def new_files() -> list[str]:
    """Return the untracked files that Git does not ignore."""
    return [os.fsdecode(name) for name in _new_files()]


def _new_files() -> list[bytes]:
    found = git_bytes("ls-files", "--others", "--exclude-standard", "-z").split(b"\0")
    return [name for name in found if name and not name.endswith(b"/")]  # "/" marks a nested repository


def _may_be_code(name: bytes) -> bool:
    try:
        return os.stat(name, follow_symlinks=False).st_size <= LARGEST_CODE  # noqa: PTH116, the name is bytes
    except FileNotFoundError:
        return False


def metrics_at(commit: str) -> dict[str, Any]:
    """Return the metrics committed in a revision by key; keys of test metrics begin with `test `."""
    return figures_of(lambda path: read_at(commit, path))


def figures_of(read: Callable[[Path], bytes | None]) -> dict[str, Any]:
    """Return the metrics, as `metrics_at`, from the contents that `read` returns for the metrics files."""
    figures: dict[str, Any] = {}
    for path, prefix in ((TRAIN_METRICS, ""), (TEST_METRICS, "test ")):
        with suppress(ValueError, AttributeError):  # not a JSON object
            figures |= {f"{prefix}{key}": value for key, value in json.loads(read(path) or b"").items()}
    return figures


@dataclass(frozen=True)
class Experiment:
    """A DVC experiment: a commit on top of its baseline."""

    name: str
    commit: str
    baseline: str


def experiments() -> list[Experiment]:
    """Return all DVC experiments in Git, newest first."""
    listed = git("for-each-ref", "--sort=-committerdate", "--format=%(refname) %(objectname)", "refs/exps")
    found = []
    for line in listed.splitlines():
        ref, commit = line.split()
        parts = ref.split("/")  # refs/exps/<2 digits>/<38 digits>/<name>; DVC uses other names internally
        if len(parts) == 5 and len(parts[2] + parts[3]) == 40:
            found.append(Experiment(parts[4], commit, parts[2] + parts[3]))
    return found


def commits_holding(text: str) -> list[str]:
    """Return the commits, including experiments, that changed dvc.lock to a content with `text`, oldest first."""
    excluded = [f"--exclude=refs/{kind}" for kind in ("stash", "exps/stash", "exps/celery/*", "exps/exec/*")]
    listed = git("log", *excluded, "--all", "--full-history", "--reverse", "--format=%H", "--", LOCK.as_posix())
    return [commit for commit in listed.split() if text.encode() in (read_at(commit, LOCK) or b"")]


def is_ancestor(commit: str, other: str) -> bool:
    """Return whether `commit` is `other` or one of its ancestors."""
    return subprocess.run(["git", "merge-base", "--is-ancestor", commit, other], capture_output=True).returncode == 0
