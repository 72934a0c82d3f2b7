"""The Git repository: its root, what a revision holds, and DVC's experiments, which are commits under refs/exps."""

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

LARGEST_CODE = 10_000_000  # bytes of a new file; larger ones are data, which Git would copy and compress in each stage


def git(*arguments: str) -> str:
    """What git answers, or nothing where there is no git, no repository or no such thing."""
    return git_bytes(*arguments).decode(errors="replace").strip()


def git_bytes(*arguments: str, env: dict[str, str] | None = None) -> bytes:
    """As `git`, as the bytes that it printed."""
    try:
        # Of the user's settings, one that adds lines to what `git log` is asked for
        done = subprocess.run(["git", "-c", "log.showSignature=false", *arguments], capture_output=True, env=env)
    except OSError:
        return b""
    return done.stdout if done.returncode == 0 else b""


def commit_of(revision: str) -> str | None:
    """The full name of the commit that a branch, tag or abbreviation stands for, or None."""
    return git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}") or None


def read_at(commit: str, path: Path) -> bytes | None:
    """The content of a file in a commit, or None if the commit has no such file."""
    name = f"{commit}:./{path.as_posix()}"
    content = git_bytes("cat-file", "blob", name)
    return content if content or git("cat-file", "-t", name) == "blob" else None


def md5_at(commit: str, path: Path) -> str | None:
    """The md5 by which dvc.lock knows a file or a folder of a commit, or None if the commit has none there."""
    if (content := read_at(commit, path)) is not None:
        return hash_bytes(content)
    names = git("ls-tree", "-r", "--name-only", f"{commit}:./{path.as_posix()}").splitlines()
    contents = {name: read_at(commit, path / name) or b"" for name in names}
    return hash_listing({name: hash_bytes(content) for name, content in contents.items()}) if names else None


def changes(*paths: str, takes: Callable[[str], bool] = lambda name: True) -> tuple[list[str], bytes]:
    """What differs between the commit and the files here, new ones included: their names, and a patch for `git apply`.

    paths: Git's pathspecs, which limit it. takes: whether a new file is included, by its name. Names are relative to
    this folder, and files that Git ignores, new ones of more than LARGEST_CODE bytes, and repositories within this one
    are left out. Nothing differs where there is no commit. An index and an object store of its own are used: the user's
    stay as they are, and an index may take a file that changed within a second, as in DVC's copies, for unchanged.
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
            (["update-index", "--add", "--remove", "-z", "--stdin"], files),  # remove: one may be gone by now
        ):
            done = subprocess.run(["git", *arguments], env=environment, input=given, capture_output=True)
            if done.returncode != 0:
                said = done.stderr.decode(errors="replace").strip()
                raise PipelineError(
                    "what differs from the commit cannot be told: "
                    f"{said or subprocess.CalledProcessError(done.returncode, f'git {arguments[0]}')}\n"
                    f"Earlier files are as they were. Mend that, or make room in {tempfile.gettempdir()}, then run the "
                    "same command again."
                )
        # Unlike `diff`, it heeds no setting of the user, such as diff.noprefix, with which `git apply` would fail
        diff = ("diff-index", "--cached", "--relative", "--no-renames", "--no-ext-diff", "--binary", "HEAD")
        names = git_bytes(*diff, "--name-only", "-z", "--", *paths, env=environment)
        return names.decode(errors="replace").split("\0")[:-1], git_bytes(
            *diff, "--patch", "--", *paths, env=environment
        )


def restore(names: list[str]) -> None:
    """Make files, by their names in this folder, those of the commit, and in the index too.

    Raises PipelineError if git cannot.
    """
    command = ["git", "restore", "--source=HEAD", "--staged", "--worktree", "--", *names]
    done = subprocess.run(command, capture_output=True, env=os.environ | {"GIT_LITERAL_PATHSPECS": "1"})
    if done.returncode != 0:
        said = done.stderr.decode(errors="replace").strip()
        raise PipelineError(f"{', '.join(names)}: git cannot restore them: {said}")


def new_files() -> list[str]:
    """The files here that Git neither has nor ignores."""
    return [os.fsdecode(name) for name in _new_files()]


def _new_files() -> list[bytes]:
    found = git_bytes("ls-files", "--others", "--exclude-standard", "-z").split(b"\0")
    return [name for name in found if name and not name.endswith(b"/")]  # a repository within this one ends like this


def _may_be_code(name: bytes) -> bool:
    try:
        return os.stat(name, follow_symlinks=False).st_size <= LARGEST_CODE  # noqa: PTH116, Git's name, as bytes
    except FileNotFoundError:
        return False


def metrics_at(commit: str) -> dict[str, Any]:
    """The figures of the metrics files that a commit has, by key; those on test begin with `test `."""
    return figures_of(lambda path: read_at(commit, path))


def figures_of(read: Callable[[Path], bytes | None]) -> dict[str, Any]:
    """The same of what `read` gives for the metrics files."""
    figures: dict[str, Any] = {}
    for path, prefix in ((TRAIN_METRICS, ""), (TEST_METRICS, "test ")):
        with suppress(ValueError, AttributeError):  # not JSON, or no object
            figures |= {f"{prefix}{key}": value for key, value in json.loads(read(path) or b"").items()}
    return figures


@dataclass(frozen=True)
class Experiment:
    """A DVC experiment: a commit on top of its baseline."""

    name: str
    commit: str
    baseline: str


def experiments() -> list[Experiment]:
    """All experiments that are in Git, the newest first."""
    listed = git("for-each-ref", "--sort=-committerdate", "--format=%(refname) %(objectname)", "refs/exps")
    found = []
    for line in listed.splitlines():
        ref, commit = line.split()
        parts = ref.split("/")  # refs/exps/<2 digits>/<38 digits>/<name>; others are DVC's own, such as its queue
        if len(parts) == 5 and len(parts[2] + parts[3]) == 40:
            found.append(Experiment(parts[4], commit, parts[2] + parts[3]))
    return found


def commits_holding(text: str) -> list[str]:
    """The commits, experiments among them, that changed dvc.lock and hold an md5 or a path in it, the oldest first."""
    excluded = [f"--exclude=refs/{kind}" for kind in ("stash", "exps/stash", "exps/celery/*", "exps/exec/*")]
    listed = git("log", *excluded, "--all", "--full-history", "--reverse", "--format=%H", "--", LOCK.as_posix())
    return [commit for commit in listed.split() if text.encode() in (read_at(commit, LOCK) or b"")]


def is_ancestor(commit: str, other: str) -> bool:
    """Whether `other` is the commit or came after it."""
    return subprocess.run(["git", "merge-base", "--is-ancestor", commit, other], capture_output=True).returncode == 0
