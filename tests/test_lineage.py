"""Trace files, runs, experiments and commits to their origin, and restore it with the printed commands."""

import contextlib
import json
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from mlflow import MlflowClient
from project import Project, clean_environment, python, reproduced_project

from classifier.data.lockfile import locked_md5s
from classifier.pipeline.errors import PipelineError
from classifier.pipeline.outputs import hash_file, hash_path
from classifier.provenance.lineage import Lineage, describe, trace, trace_here

pytestmark = pytest.mark.slow

WEIGHTS = "models/model_weights.pth"


@dataclass
class History:
    """A repository with a commit on main, one on the branch `other`, an experiment, and a run of uncommitted code.

    weights: md5 by the name of each of these.
    """

    project: Project
    weights: dict[str, str]


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> History:
    project = reproduced_project(tmp_path_factory)
    weights = {"main": hash_file(project.root / WEIGHTS)}

    def reproduce(name: str, *command: str) -> None:
        project.dvc(*command)
        weights[name] = hash_file(project.root / WEIGHTS)

    project.commit()
    project.run("git", "switch", "--quiet", "--create", "other")
    project.set_params(lr="0.2", export_formats="[onnx]")
    reproduce("other", "repro")
    project.commit()
    network = project.root / "classifier/networks/mlp.py"
    network.write_text(network.read_text().replace("512", "64"))
    (project.root / "classifier/new_file.py").write_text("# not added\n")
    (project.root / "new_file.txt").write_text("no code\n")
    reproduce("uncommitted", "repro")
    project.run("git", "restore", ".")
    (project.root / "classifier/new_file.py").unlink()
    (project.root / "new_file.txt").unlink()
    project.run("git", "switch", "--quiet", "main")
    project.dvc("checkout")
    reproduce("quick", "exp", "run", "--name", "quick", "-S", "lr=0.3", "-S", "export_formats=[onnx]")
    project.run("git", "restore", ".")
    project.dvc("checkout")
    assert len(set(weights.values())) == 4
    return History(project, weights)


@pytest.fixture
def copied(history: History, tmp_path: Path) -> Project:
    """A copy that the test may change."""
    return history.project.copy(tmp_path / "project")


def lineage(project: Project, target: str | None) -> Lineage:
    """Trace a target as the command does, in this process. None: the model in the checkout."""
    with contextlib.chdir(project.root), pytest.MonkeyPatch.context() as patch:
        for name in ("MLFLOW_TRACKING_URI", "DVC_ROOT"):
            patch.delenv(name, raising=False)
        return trace(target) if target else trace_here()


def run_id(project: Project, weights: str) -> str:
    """The id of the run that trained these weights."""
    client = MlflowClient(f"sqlite:///{project.root / 'mlflow.db'}")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    (run,) = client.search_runs(experiments, f"tags.`md5.model_weights` = '{weights}'")
    return str(run.info.run_id)


def follow(project: Project, commands: list[str]) -> None:
    """Run the printed commands with the project's own command line."""
    for command in commands:
        project.run("sh", "-ec", re.sub("^classifier ", f"{python()} -m classifier ", command))


def forget(project: Project, md5: str) -> None:
    (project.root / f".dvc/cache/files/md5/{md5[:2]}/{md5[2:]}").unlink()


def commit_of(project: Project, branch: str) -> str:
    return project.run("git", "rev-parse", branch).stdout.strip()


@pytest.mark.parametrize("name", ["models/export/model.onnx", "models/export/model.pt2", WEIGHTS])
def test_a_file_copied_out_of_the_repository_finds_its_run_and_data(
    history: History, tmp_path: Path, name: str
) -> None:
    project = history.project
    copy = tmp_path / f"renamed{Path(name).suffix}"
    shutil.copy(project.root / name, copy)
    found = lineage(project, str(copy))
    assert found.commit == commit_of(project, "main")
    assert found.runs[0].run_id == run_id(project, history.weights["main"])
    assert (found.versions[0].name, found.versions[0].number) == ("fashion-mnist", 1)
    md5s = {output.path: output.md5 for output in found.outputs}
    assert md5s == {path: md5 for path, md5 in locked_md5s(project.root / "dvc.lock").items() if ".json" not in path}
    assert {output.cache for output in found.outputs} == {"yes"}
    assert found.parameters["lr"] == 0.1
    assert found.metrics["test accuracy"] == json.loads((project.root / "metrics/test.json").read_text())["accuracy"]
    assert found.exported == {
        file.name: hash_file(file, "sha256") for file in project.root.glob("models/export/model.*")
    }
    assert found.unknown == []


def test_the_commands_for_a_commit_of_another_branch_give_the_same_bytes(history: History, copied: Project) -> None:
    found = lineage(copied, "other")
    assert found.commands == [f"git switch --detach {commit_of(copied, 'other')[:12]}", "dvc checkout"]
    follow(copied, found.commands)
    assert hash_file(copied.root / WEIGHTS) == history.weights["other"]
    assert copied.stages_run(copied.dvc("repro").stdout) == []


def test_what_the_cache_has_lost_comes_from_the_remote(history: History, copied: Project, tmp_path: Path) -> None:
    copied.dvc("remote", "add", "--local", "--default", "store", str(tmp_path / "remote"))
    copied.run("git", "switch", "--quiet", "other")
    copied.dvc("checkout")
    copied.dvc("push")
    copied.run("git", "switch", "--quiet", "main")
    copied.dvc("checkout")
    forget(copied, history.weights["other"])
    found = lineage(copied, "other")
    (output,) = [output for output in found.outputs if output.path == WEIGHTS]
    assert (output.cache, output.remote) == ("no", "yes")
    assert found.commands[-1] == "dvc pull"
    follow(copied, found.commands)
    assert hash_file(copied.root / WEIGHTS) == history.weights["other"]


def test_a_remote_that_cannot_be_asked_is_told(copied: Project) -> None:
    """The package for this type of remote is not installed."""
    copied.dvc("remote", "add", "--local", "--default", "store", "gs://no-such-bucket/store")
    found = lineage(copied, "other")
    assert all(output.remote.startswith("not reachable: ") for output in found.outputs)
    assert found.commands[-1] == "dvc checkout"


def test_what_neither_cache_nor_remote_has_is_told_and_made_again(history: History, copied: Project) -> None:
    forget(copied, history.weights["other"])
    shutil.rmtree(copied.root / ".dvc/cache/runs")
    found = lineage(copied, "other")
    assert found.unknown == [
        f"the bytes of {WEIGHTS}: neither cache nor remote has them; `dvc repro` rebuilds",
    ]
    follow(copied, found.commands)
    assert hash_file(copied.root / WEIGHTS) == history.weights["other"]


def test_an_experiment_is_found_by_its_name_and_by_its_run(history: History, copied: Project) -> None:
    found = lineage(copied, "quick")
    assert found.experiment == f"quick, on {commit_of(copied, 'main')[:12]}"
    assert found.parameters["lr"] == 0.3
    by_run = lineage(copied, run_id(copied, history.weights["quick"]))
    assert by_run.commit == found.commit
    follow(copied, found.commands)
    assert hash_file(copied.root / WEIGHTS) == history.weights["quick"]


def test_of_an_experiment_that_was_removed_the_run_is_left(history: History, copied: Project) -> None:
    copied.dvc("exp", "remove", "quick")
    found = lineage(copied, "quick")
    assert found.commit is None
    assert found.runs[0].run_id == run_id(copied, history.weights["quick"])
    assert any(note.startswith("the commit: none in this clone holds these weights") for note in found.unknown)
    assert found.parameters["lr"] == "0.3"
    follow(copied, found.commands)
    assert hash_file(copied.root / WEIGHTS) == history.weights["quick"]


def test_a_run_of_uncommitted_code_comes_back_by_its_patch(history: History, copied: Project) -> None:
    found = lineage(copied, run_id(copied, history.weights["uncommitted"]))
    assert found.commit is None
    assert found.runs[0].tags["git.changed_files"] == "classifier/networks/mlp.py classifier/new_file.py"
    assert "a difference from the commit that is not in the patch: new_file.txt: no code of the pipeline" in (
        found.unknown
    )
    follow(copied, found.commands)
    assert (copied.root / "classifier/new_file.py").read_text() == "# not added\n"
    assert hash_file(copied.root / WEIGHTS) == history.weights["uncommitted"]


def test_a_commit_whose_runs_were_deleted_says_so_and_still_comes_back(history: History, copied: Project) -> None:
    for store in copied.root.glob("mlflow.db*"):
        store.unlink()
    shutil.rmtree(copied.root / "mlruns")
    found = lineage(copied, str(copied.root / "models/export/model.onnx"))
    assert found.commit == commit_of(copied, "main")
    assert found.runs == []
    assert found.versions == []
    assert [note.split(":")[0] for note in found.unknown] == ["the MLflow run"]
    assert found.exported["model.onnx"] == hash_file(copied.root / "models/export/model.onnx", "sha256")
    assert not (copied.root / "mlflow.db").exists()


def test_a_commit_whose_code_is_not_that_of_its_lock_says_so(copied: Project) -> None:
    training = copied.root / "classifier/training/loop.py"
    training.write_text(training.read_text() + "\n# changed\n")
    copied.set_params(lr="0.7")
    copied.commit()
    (note,) = lineage(copied, "HEAD").unknown
    assert note.startswith("the code: not that which wrote dvc.lock of this commit: ")
    assert note.endswith("classifier/training, lr in params.yaml")


def test_the_text_has_the_whole_chain(history: History) -> None:
    command = (sys.executable, "-m", "classifier", "lineage", "main")
    text = history.project.run(*command).stdout
    lock = locked_md5s(history.project.root / "dvc.lock")
    for part in (
        commit_of(history.project, "main"), "lr=0.1", lock["data/raw"], lock["data/images"],
        lock["data/annotations"], history.weights["main"], run_id(history.project, history.weights["main"]),
        "fashion-mnist version 1", hash_file(history.project.root / "models/export/model.onnx", "sha256"),
        "test accuracy: ", "dvc checkout",
    ):  # fmt: skip
        assert part in text
    as_json = json.loads(history.project.run(*command, "--json").stdout)
    assert as_json["outputs"][0] == {"path": "data/raw", "md5": lock["data/raw"], "cache": "yes", "remote": "none"}


def test_the_command_names_files_from_the_folder_it_is_called_in(history: History, tmp_path: Path) -> None:
    (history.project.root / ".venv").symlink_to(sys.prefix)  # as `make env` makes it
    shutil.copy(history.project.root / "models/export/model.onnx", tmp_path / "copy.onnx")
    (tmp_path / "json.py").write_text("raise SystemExit('a stranger was run')")
    done = subprocess.run(
        [history.project.root / ".venv/bin/classifier", "lineage", "copy.onnx"],
        cwd=tmp_path, env=clean_environment(tmp_path), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert commit_of(history.project, "main") in done.stdout


def test_the_model_here_is_that_of_the_commit_or_the_experiment_or_uncommitted(
    history: History, copied: Project
) -> None:
    assert lineage(copied, None).commit == commit_of(copied, "main")
    copied.dvc("exp", "apply", "quick")
    assert lineage(copied, None).experiment == f"quick, on {commit_of(copied, 'main')[:12]}"

    copied.set_params(export_formats="[pth]")  # the same weights, and another export
    copied.dvc("repro")
    found = lineage(copied, None)
    assert (found.commit, found.is_uncommitted) == (None, True)
    assert [holder.title for holder in found.also_in] == ["experiment quick"]
    assert found.title.startswith(f"on top of {commit_of(copied, 'main')[:12]} ")
    assert found.runs[0].run_id == run_id(copied, history.weights["quick"])
    assert found.parameters["export_formats"] == ["pth"]
    assert found.metrics["test accuracy"] == json.loads((copied.root / "metrics/test.json").read_text())["accuracy"]
    assert {output.path: output.md5 for output in found.outputs} == {
        path: md5 for path, md5 in locked_md5s(copied.root / "dvc.lock").items() if ".json" not in path
    }
    assert list(found.exported) == ["model.pth"]
    (note,) = found.unknown
    assert note.startswith("how to restore it: commit it first, `git add params.yaml dvc.lock metrics && ")
    assert describe(found).splitlines()[2:4] == ["commit:", "  uncommitted"]

    copied.commit()
    copied.set_params(export_formats="[pth, onnx]")
    copied.dvc("repro")
    assert [holder.commit for holder in lineage(copied, None).also_in] == [
        commit_of(copied, revision) for revision in ("main", found.also_in[0].commit)
    ]


@pytest.mark.parametrize("target", ["no-such-thing", "0" * 32, "--all", "a'b", "models"])
def test_what_is_nothing_here_is_one_clear_message(history: History, target: str) -> None:
    with pytest.raises(PipelineError, match="no model file, MLflow run, DVC experiment or Git commit here"):
        lineage(history.project, target)


def test_a_file_that_nothing_knows_is_told_with_its_hashes(history: History, tmp_path: Path) -> None:
    file = tmp_path / "stranger.onnx"
    file.write_bytes(b"stranger")
    with pytest.raises(PipelineError, match=f"no dvc.lock in this clone, has its md5 {hash_file(file)}"):
        lineage(history.project, str(file))


def test_the_hash_of_a_folder_is_the_one_in_dvc_lock(history: History) -> None:
    for path, md5 in locked_md5s(history.project.root / "dvc.lock").items():
        assert hash_path(history.project.root / path) == md5
