"""`classifier restore` from the states that experiments, kills and other machines leave behind."""

import contextlib
import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
from project import Project, reproduced_project

from classifier.data.lockfile import locked_md5s
from classifier.pipeline.errors import PipelineError
from classifier.pipeline.outputs import hash_bytes, hash_file
from classifier.provenance.restore import restore_committed

pytestmark = pytest.mark.slow

WEIGHTS = "models/model_weights.pth"
ASIDE = Path("reports/before-restore")


@pytest.fixture(scope="module")
def reproduced(tmp_path_factory: pytest.TempPathFactory) -> Project:
    project = reproduced_project(tmp_path_factory)
    project.commit()
    return project


@pytest.fixture
def project(reproduced: Project, tmp_path: Path) -> Project:
    """A project with committed results that the test may change."""
    return reproduced.copy(tmp_path / "project")


def restore(project: Project) -> str:
    """Return the output of the command, run in this process."""
    with contextlib.chdir(project.root), pytest.MonkeyPatch.context() as patch:
        patch.delenv("DVC_ROOT", raising=False)
        return "\n".join(restore_committed(ASIDE))


def status(project: Project) -> list[str]:
    return [line[3:] for line in project.run("git", "status", "--porcelain").stdout.splitlines()]


def commit_from_another_machine(project: Project) -> None:
    """Commit results like another processor's: different bytes in the outputs of train and later stages."""
    md5s = locked_md5s(project.root / "dvc.lock")
    lock = (project.root / "dvc.lock").read_text()
    for path, md5 in md5s.items():
        if path.startswith(("models/", "metrics/")) and path != "metrics/rejected.csv":
            other = hash_bytes(md5.encode()) + (".dir" if md5.endswith(".dir") else "")
            if path.endswith(".json"):
                file = project.root / path
                file.write_text(re.sub(r'"loss": \S+', '"loss": 0.123', file.read_text()).replace('"cpu"', '"other"'))
                file.write_text(file.read_text() + "\n")
                other = hash_file(file)
            lock = lock.replace(md5, other)
    (project.root / "dvc.lock").write_text(lock)
    project.commit()


def test_after_a_commit_from_another_machine_nothing_is_trained_again(project: Project) -> None:
    here = project.outputs()
    commit_from_another_machine(project)
    committed = (project.root / "metrics/test.json").read_bytes()
    project.set_params(lr="0.3")
    shutil.rmtree(project.root / "models")
    done = project.run(sys.executable, "-m", "classifier", "restore")
    assert project.outputs() == here
    assert (project.root / "metrics/test.json").read_bytes() != committed
    assert f"restored from an earlier run here: {WEIGHTS}, " in done.stdout
    assert "`git add dvc.lock metrics && git commit`" in done.stdout
    changed = ["dvc.lock", *(f"metrics/{name}.json" for name in ("environment", "test", "train"))]
    assert status(project) == changed
    assert project.stages_run(project.dvc("repro").stdout) == []
    assert project.outputs() == here

    project.commit()  # as it says
    shutil.rmtree(project.root / "models")
    restore(project)
    assert project.outputs() == here
    assert status(project) == []


@pytest.mark.parametrize(
    ("setting", "complaint"),
    [
        ("lr=abc", "params.yaml: lr: 'abc' is not a number above 0"),
        ("network=none", "params.yaml: network: 'none' is not one of cnn, mlp"),
        ("data_path=photos.zip", "params.yaml: data_path: there is no photos.zip in "),
        ("launcher=torchrun --run-path=x", "params.yaml: launcher: unrecognized arguments: --run-path=x"),
    ],
)
def test_a_wrong_parameter_is_found_before_dvc_removes_anything(
    reproduced: Project, setting: str, complaint: str
) -> None:
    before = reproduced.outputs()
    key, _, value = setting.partition("=")
    failed = reproduced.dvc("exp", "run", "-S", f'{key}="{value}"', check=False)
    assert failed.returncode != 0
    assert complaint in failed.stderr
    assert "no result was removed. `classifier restore` brings back the committed params.yaml." in failed.stderr
    assert {path: md5 for path, md5 in before.items() if path != "data/checked"} == reproduced.outputs()
    restore(reproduced)
    assert reproduced.outputs() == before
    assert status(reproduced) == []


def test_everything_comes_back_and_edits_are_kept(project: Project) -> None:
    before = project.outputs()
    project.set_params(lr="0.7")
    project.run("git", "add", "params.yaml")
    edited = (project.root / "params.yaml").read_text()
    (project.root / "dvc.lock").write_text((project.root / "dvc.lock").read_text()[:3000])  # DVC was killed
    (project.root / ".dvc/tmp/rwlock").write_text('{"wri')
    (project.root / "classifier/data/arrays.py").write_text("# an edit\n")
    for path in ("models/export", "data/images", "metrics/train.json"):
        shutil.rmtree(project.root / path) if (project.root / path).is_dir() else (project.root / path).unlink()
    (project.root / WEIGHTS).write_text("in no cache")

    told = restore(project)
    assert project.outputs() == before
    assert status(project) == ["classifier/data/arrays.py"]
    assert "restored from Git: dvc.lock, metrics/train.json, params.yaml\n" in told
    assert f"moved to {ASIDE}, because no cache has them: {WEIGHTS}\n" in told
    assert "restored from DVC: data/images, models/export, models/model_weights.pth\n" in told
    assert told.endswith("not touched, but different from the commit: classifier/data/arrays.py")
    assert (project.root / ASIDE / WEIGHTS).read_text() == "in no cache"
    project.run("git", "apply", str(ASIDE / "changes.patch"))
    assert (project.root / "params.yaml").read_text() == edited

    project.run("git", "restore", ".")
    assert restore(project).endswith("\nall parameters and results are as committed")


def test_what_is_nowhere_is_told_with_the_way_to_make_it(project: Project) -> None:
    md5 = locked_md5s(project.root / "dvc.lock")[WEIGHTS]
    (project.root / f".dvc/cache/files/md5/{md5[:2]}/{md5[2:]}").unlink()
    shutil.rmtree(project.root / "models")
    with pytest.raises(
        PipelineError, match=rf"(?s)models/export\n{WEIGHTS}: not restored: .*`dvc repro` rebuilds them"
    ):
        restore(project)
    assert (project.root / "models/export/model.onnx").exists()


def test_the_remote_is_asked_before_a_run(project: Project, tmp_path: Path) -> None:
    """The remote has the results of the commit and no others."""
    project.dvc("remote", "add", "--local", "--default", "store", str(tmp_path / "remote"))
    project.dvc("push")
    before = project.outputs()
    md5 = locked_md5s(project.root / "dvc.lock")[WEIGHTS]
    (project.root / f".dvc/cache/files/md5/{md5[:2]}/{md5[2:]}").unlink()
    (project.root / WEIGHTS).unlink()
    assert f"restored from DVC: {WEIGHTS}" in restore(project)
    assert project.outputs() == before


def test_a_stage_that_runs_is_not_disturbed(project: Project) -> None:
    use = {"pid": os.getpid(), "cmd": "dvc repro"}
    (project.root / ".dvc/tmp/rwlock").write_text(json.dumps({"write": {str(project.root / WEIGHTS): use}}))
    project.set_params(lr="0.7")
    with pytest.raises(PipelineError, match=rf"DVC runs a stage \(process {os.getpid()}\): wait until it has ended"):
        restore(project)
    assert status(project) == ["params.yaml"]
