"""A copy of the project in a repository of its own, in which tests run DVC as a user does."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from filelock import FileLock
from imports import ROOT
from small_data import write_idx_dataset

from classifier.pipeline.outputs import hash_bytes, hash_file

if TYPE_CHECKING:  # the benchmarks have other environments too
    import pytest

# A data source as a user would add one: one file, here for small files in Fashion-MNIST's format.
SMALL_SOURCE = '''"""Small IDX files in the folder data_path."""
import shutil
from classifier.sources.fashion_mnist import FILES, class_names, read
def fetch(raw, data_path):
    raw.mkdir(parents=True)
    for name in FILES:
        shutil.copy(data_path / name, raw / name)
'''

# What the train stage writes
TRAINED = ["models/model_weights.pth", "metrics/epochs.csv", "metrics/train.json", "metrics/environment.json"]


def python() -> str:
    """The Python for the processes of a test: one that forks (tests/fork_server.py), or a real one where there is none.

    Tests about starts, signals and kills use sys.executable, and `real_environment` for its children.
    """
    return os.environ.get("FORKING_PYTHON") or sys.executable


def clean_environment(folder: Path, **extra: str) -> dict[str, str]:
    """The environment for a command in a repository of its own: no setting of the outer one reaches it.

    DVC hands inherited DVC_* variables on to its stages; its caches and configuration go below `folder`. Git knows no
    configuration of the user, and no repository that it is told of, as in a hook.
    """
    outer = ("DVC_", "MLFLOW_", "AWS_", "FASHION_MNIST", "GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")
    env = {key: value for key, value in os.environ.items() if not key.startswith(outer)}
    env["GIT_CONFIG_GLOBAL"] = os.devnull
    env.pop("PYTHONDONTWRITEBYTECODE", None)
    programs = (python(), os.environ.get("REAL_PYTHON", sys.executable))
    folders = dict.fromkeys(str(Path(program).parent) for program in programs)
    env["PATH"] = os.pathsep.join([*folders, env["PATH"]])
    for kind in ("DVC_GLOBAL_CONFIG_DIR", "DVC_SYSTEM_CONFIG_DIR", "DVC_SITE_CACHE_DIR"):
        env[kind] = str(folder / f".{kind.lower()}")
    return env | extra


def real_environment(folder: Path, **extra: str) -> dict[str, str]:
    """The same, with a `python` that does not fork."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return clean_environment(folder, PATH=path) | extra


class Project:
    """A repository that holds the project."""

    def __init__(self, root: Path, env: Mapping[str, str] | None = None) -> None:
        self.root = root
        self.env = dict(env or {})  # of all commands

    @classmethod
    def create(cls, root: Path) -> "Project":
        """Copy the project's files as they are in the work tree, without lock, metrics and tests."""
        listed = subprocess.run(
            ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT, capture_output=True, text=True, check=True,
        )  # fmt: skip
        for name in listed.stdout.splitlines():
            if not name.startswith(("tests/", "benchmarks/", "docs/", "metrics/")) and (ROOT / name).is_file():
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, root / name)
        (root / "dvc.lock").unlink(missing_ok=True)
        return cls(root)

    def copy(self, root: Path) -> "Project":
        """A copy of it all."""
        shutil.copytree(self.root, root, symlinks=True)
        return Project(root)

    def copy_without_results(self, root: Path) -> "Project":
        """A copy in which nothing has run yet: without outputs, lock, cache and MLflow store."""
        results = shutil.ignore_patterns(
            "raw", "images", "annotations", "models", "metrics", "dvc.lock", "mlruns",
            "mlflow.db*", "cache", "tmp",
        )  # fmt: skip
        shutil.copytree(self.root, root, symlinks=True, ignore=results)
        return Project(root)

    def forget_training(self) -> None:
        """As if `dvc repro` had come to annotate, and no further."""
        lock = yaml.safe_load((self.root / "dvc.lock").read_text())
        for name in ("train", "evaluate", "export"):
            del lock["stages"][name]
        (self.root / "dvc.lock").write_text(yaml.safe_dump(lock, sort_keys=False))
        (self.root / "mlflow.db").unlink()
        for name in ("metrics", "models", "mlruns", ".dvc/cache/runs"):
            shutil.rmtree(self.root / name)

    def commit(self) -> None:
        """Make a commit of all there is that Git does not ignore."""
        if not (self.root / ".git").exists():
            self.run("git", "init", "--quiet", "--initial-branch=main")
        self.run("git", "add", "--all")
        author = ["-c", "user.name=Test", "-c", "user.email=test@example.org"]
        self.run("git", *author, "commit", "--quiet", "--message=State under test")

    def outputs(self) -> dict[str, str]:
        """The md5 of each file in the folders of outputs, by its path."""
        folders = (self.root / folder for folder in ("data", "models", "metrics"))
        paths = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
        return {path.relative_to(self.root).as_posix(): hash_file(path) for path in paths}

    def set_params(self, **changes: str) -> None:
        """Replace values in params.yaml, given as they are spelt there."""
        path = self.root / "params.yaml"
        lines = path.read_text().splitlines()
        for key, value in changes.items():
            (index,) = [number for number, line in enumerate(lines) if line.startswith(f"{key}:")]
            end = index + 1
            while lines[end : end + 1] and lines[end].startswith("- "):  # the value's lines, if it is a list
                end += 1
            lines[index:end] = [f"{key}: {value}"]
        path.write_text("\n".join(lines) + "\n")

    def run(self, *command: str, check: bool = True, **env: str) -> subprocess.CompletedProcess[str]:
        """Run a command in the repository; its output is in the error if it fails and `check` is true."""
        if command[0] == sys.executable:
            command = (python(), *command[1:])
        done = subprocess.run(
            command, cwd=self.root, env=clean_environment(self.root.parent, **self.env | env), stdin=subprocess.DEVNULL,
            capture_output=True, text=True,
        )  # fmt: skip
        assert not check or done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
        return done

    def dvc(self, *arguments: str, check: bool = True, **env: str) -> subprocess.CompletedProcess[str]:
        return self.run(sys.executable, "-m", "dvc", *arguments, check=check, **env)

    def stages_run(self, output: str) -> list[str]:
        """The stages that DVC says it ran."""
        return [line.split("'")[1] for line in output.splitlines() if line.startswith("Running stage '")]


def small_project(folder: Path, **params: str) -> Project:
    """A committed project whose source gives 200 training and 80 test images, in a folder of its own.

    `params` are further values for params.yaml, as they are spelt there.
    """
    project = Project.create(folder / "project")
    (project.root / "classifier/sources/small.py").write_text(SMALL_SOURCE)
    write_idx_dataset(folder / "idx")
    small = {"source": "small", "data_path": str(folder / "idx"), "val_size": "40", "epochs": "4", "lr": "0.1"}
    names = {"experiment": "fashion-mnist", "registered_model": "fashion-mnist"}
    project.set_params(**(small | names | {"threads": "1"} | params))
    project.commit()
    return project


def session_folder(factory: "pytest.TempPathFactory") -> Path:
    """A folder of this run of pytest, the same for all of its processes."""
    own = factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


def reproduced_project(factory: "pytest.TempPathFactory", **params: str) -> Project:
    """A small project in which `dvc repro` ran, with nothing committed since; what that said is beside it, printed.txt.

    It is a copy of the test file's own: the stages run once for the same `params`, whichever file asks first. The IDX
    files and the artifacts of the MLflow run are those of the first one.
    """
    made = session_folder(factory) / f"reproduced-{hash_bytes(json.dumps(params, sort_keys=True).encode())}"
    with FileLock(f"{made}.lock"):
        if not (made / "printed.txt").exists():
            shutil.rmtree(made, ignore_errors=True)
            made.mkdir()
            printed = small_project(made, **params).dvc("repro").stdout
            (made / "printed.txt").write_text(printed)
    folder = factory.mktemp("reproduced")
    shutil.copy(made / "printed.txt", folder)
    return Project(made / "project").copy(folder / "project")
