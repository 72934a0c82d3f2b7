"""A rebuild in a clean clone finds which outputs are bit-identical, within tolerance, or drifted."""

import math
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from dvc_queue import processes_in
from project import Project, clean_environment, python, small_project
from tracker import wait_for

from classifier.pipeline.errors import PipelineError
from classifier.provenance.verify import (
    DRIFTED,
    IDENTICAL,
    WITHIN,
    State,
    _fewest_images,
    _link_own_files,
    _make_clone,
    compare,
)

RECORDED = State(
    md5s={
        "data/images": "1a",
        "models/model_weights.pth": "2b",
        "metrics/epochs.csv": "3c",
        "metrics/train.json": "4d",
        "metrics/test.json": "5e",
        "metrics/environment.json": "6f",
        "models/export": "7a",
    },
    metrics={
        "train epoch[0]": 3.0, "train val_loss[0]": 0.5, "test accuracy[0]": 0.7, "test accuracy_ci95[1]": 0.72,
        "test loss[0]": 0.8,
    },
    environment={"threads": 2},
)  # fmt: skip


def rebuilt(*changed: str, **metrics: float) -> State:
    """Return a state in another environment with some md5s and metrics changed."""
    numbers = {key.replace("__", " ") + "[0]": value for key, value in metrics.items()}
    return replace(
        RECORDED,
        md5s=RECORDED.md5s | dict.fromkeys(changed, "ff"),
        metrics=RECORDED.metrics | numbers,
        environment={"threads": 1},
    )


def verdicts(state: State) -> dict[str, str]:
    return {path: verdict.verdict for path, verdict in compare(RECORDED, state).items()}


def test_the_same_bytes_are_identical() -> None:
    assert set(verdicts(RECORDED).values()) == {IDENTICAL}


def test_in_the_same_environment_weights_and_metrics_must_be_the_same_bytes() -> None:
    changed = ("models/model_weights.pth", "metrics/epochs.csv", "metrics/train.json", "models/export")
    found = verdicts(replace(rebuilt(*changed), environment=RECORDED.environment))
    assert [found[path] for path in changed] == [DRIFTED, DRIFTED, DRIFTED, WITHIN]


def test_data_must_be_the_same_bytes() -> None:
    assert verdicts(rebuilt("data/images"))["data/images"] == DRIFTED


def test_other_weights_whose_metrics_are_as_good_are_within_tolerance() -> None:
    found = verdicts(
        rebuilt("models/model_weights.pth", "metrics/test.json", test__loss=0.80009, test__accuracy=0.7019)
    )
    assert found["models/model_weights.pth"] == WITHIN
    assert found["metrics/test.json"] == WITHIN
    assert found["metrics/train.json"] == IDENTICAL


@pytest.mark.parametrize(
    ("key", "value"),
    [("test__loss", 0.80011), ("test__accuracy", 0.6979), ("train__epoch", 2.0), ("test__loss", float("nan"))],
)
def test_metrics_beyond_the_tolerance_have_drifted_and_the_weights_with_them(key: str, value: float) -> None:
    file = f"metrics/{key.split('__')[0]}.json"
    found = compare(RECORDED, rebuilt("models/model_weights.pth", file, **{key: value}))
    assert found[file].verdict == found["models/model_weights.pth"].verdict == DRIFTED
    assert found[file].reason.startswith(key.replace("__", " "))


@pytest.mark.parametrize(("fewest", "verdict"), [(359, WITHIN), (1000, DRIFTED)])
def test_of_few_images_two_may_be_answered_otherwise(fewest: float, verdict: str) -> None:
    state = replace(rebuilt("metrics/test.json", test__accuracy=0.7 + 2 / 360), fewest=fewest)
    assert verdicts(state)["metrics/test.json"] == verdict


@pytest.mark.parametrize(
    ("val", "test", "fewest"),
    [([0] * 50, [0] * 10 + [1] * 40, 20), ([0] * 5, [0] * 10 + [1] * 40, 5), ([], [0, 0, 1, 1, 2, 2], 6)],
)
def test_the_fewest_images_are_those_that_weigh_most_in_a_mean(
    tmp_path: Path, val: list[int], test: list[int], fewest: float
) -> None:
    for split, labels in (("val", val), ("test", test)):
        rows = [f"{number}.png,{label}\n" for number, label in enumerate(labels)]
        (tmp_path / f"{split}.csv").write_text("file,label\n" + "".join(rows))
    assert _fewest_images(tmp_path) == fewest
    assert _fewest_images(tmp_path / "none") == math.inf


@pytest.mark.parametrize("content", ["a: [1", "- 1\n- 2\n", "text"])
def test_parameters_that_are_none_are_told(tmp_path: Path, content: str) -> None:
    (tmp_path / "params.yaml").write_text(content)
    with pytest.raises(PipelineError, match=r"params\.yaml: not parameters in YAML: "):
        _link_own_files(tmp_path, tmp_path.parent)


def test_a_metric_that_is_gone_has_drifted() -> None:
    state = rebuilt("metrics/test.json")
    del state.metrics["test loss[0]"]
    assert verdicts(state)["metrics/test.json"] == DRIFTED


def test_outputs_that_only_one_of_them_has_have_drifted() -> None:
    state = rebuilt()
    del state.md5s["metrics/epochs.csv"]
    state.md5s["models/new.bin"] = "aa"
    found = verdicts(state)
    assert found["metrics/epochs.csv"] == found["models/new.bin"] == DRIFTED


@pytest.fixture(scope="module")
def reproduced(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A repository with committed results. They were made with one thread, which is recorded but is no parameter."""
    project = small_project(tmp_path_factory.mktemp("verify"), epochs="1", export_formats="[onnx]", threads="auto")
    project.dvc("repro", CLASSIFIER_THREADS="1")
    project.commit()
    return project


@pytest.fixture
def clone(reproduced: Project, tmp_path: Path) -> Project:
    """A fresh clone with no outputs except the committed metrics."""
    subprocess.run(["git", "clone", "--quiet", reproduced.root, tmp_path / "clone"], check=True)
    return Project(tmp_path / "clone")


def run_verify(project: Project, *arguments: str) -> subprocess.CompletedProcess[str]:
    return project.run(sys.executable, "-m", "classifier", "verify", *arguments, check=False)


@pytest.mark.parametrize(("depth", "reached"), [(1, True), (9, False)])
def test_images_outside_of_the_repository_are_linked_and_no_others_are_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, depth: int, reached: bool
) -> None:
    """From the clone, `..` leads to another place, where a folder of the same name must not be touched."""
    photos, made, other = tmp_path / "photos", tmp_path / "made", tmp_path / "made/photos"
    project = Project(tmp_path.joinpath(*"abcdefghi"[:depth], "project"))
    for folder in (photos, made, other, project.root):
        folder.mkdir(parents=True, exist_ok=True)
    (other / "1.jpg").write_text("somebody else's")
    (photos / "1.jpg").write_text("mine")
    (project.root / "params.yaml").write_text(f"data_path: {'../' * (depth + 1)}photos\n")
    project.commit()
    monkeypatch.chdir(project.root)
    (made / "verify").mkdir()
    if reached:
        clone = _make_clone(made / "verify", None)
        assert (clone / "../../photos/1.jpg").resolve().read_text() == "mine"
    else:
        with pytest.raises(PipelineError, match=r"data_path: \.\./.* leads too far out of the repository"):
            _make_clone(made / "verify", None)
    assert (other / "1.jpg").read_text() == "somebody else's"


@pytest.mark.slow
def test_a_clean_clone_is_verified_and_stays_as_it_is(clone: Project, tmp_path: Path) -> None:
    """The user's Git settings, threads, locale, time zone and umask have no effect."""
    (tmp_path / "gitconfig").write_text("[core]\n\tautocrlf = true\n")
    settings = {
        "GIT_CONFIG_GLOBAL": str(tmp_path / "gitconfig"),
        "OMP_NUM_THREADS": "3",
        "LC_ALL": "C",
        "TZ": "Asia/Kathmandu",
    }
    command = ("sh", "-c", 'umask 077; exec "$@"', "sh", python(), "-m", "classifier", "verify")
    done = clone.run(*command, check=False, **settings)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split(maxsplit=1)[1] for line in lines[:-1]] == [IDENTICAL] * 13
    assert lines[-1] == "environment: the same as recorded"
    assert "Running stage 'train'" in done.stderr  # progress is visible
    assert clone.run("git", "status", "--porcelain").stdout == ""
    assert not (clone.root / "data/raw").exists()


@pytest.mark.slow
def test_one_changed_image_and_a_changed_training_loop_are_drift(reproduced: Project, tmp_path: Path) -> None:
    """Both uncommitted, and found by one rebuild."""
    project = reproduced.copy(tmp_path / "project")
    path = project.root / "data/images/images-00000.npy"
    path.chmod(0o644)
    images = np.load(path)
    images[7, 0, 3, 4] ^= 1
    np.save(path, images)
    training = project.root / "classifier/training/loop.py"
    changed = training.read_text().replace("else loss).backward()", "else loss * 0.5).backward()")
    assert changed != training.read_text()
    training.write_text(changed)

    done = run_verify(project)
    assert done.returncode == 1
    rows = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert rows["data/images"] == ("DRIFTED: the file here differs from dvc.lock; differing rows: 7")
    assert rows["dvc.lock"] == "DRIFTED: changed since it was written: classifier/training"
    assert rows["metrics/train.json"].startswith("DRIFTED: train ")
    assert rows["models/model_weights.pth"] == "DRIFTED: different bytes in the same environment"
    assert rows["data/annotations"] == IDENTICAL
    assert done.stderr.splitlines()[-1].startswith(tuple("123456789"))
    assert "outputs drifted: " in done.stderr.splitlines()[-1]


@pytest.mark.nightly
def test_in_another_environment_the_results_are_within_tolerance_and_what_differs_is_told(clone: Project) -> None:
    """torch's kernels without vector instructions sum in another order, as on another processor."""
    command = (sys.executable, "-m", "classifier", "verify")
    done = clone.run(*command, check=False, ATEN_CPU_CAPABILITY="default", MKL_CBWR="COMPATIBLE")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert rows["models/model_weights.pth"] == f"{WITHIN}: different bytes, judged by the metrics"
    assert rows["data/images"] == IDENTICAL
    assert rows["environment:"].startswith("cpu_capability: recorded ")
    assert rows["environment:"].endswith(", here DEFAULT")


@pytest.mark.slow
def test_a_rebuild_that_fails_says_in_which_stage(clone: Project) -> None:
    """Also in a Git hook, which sets GIT_DIR to the user's repository: that is not changed."""
    (clone.root / "classifier/sources/small.py").write_text("raise SystemExit('no data today')\n")
    command = (sys.executable, "-m", "classifier", "verify")
    done = clone.run(*command, check=False, GIT_DIR=str(clone.root / ".git"))
    assert clone.run("git", "branch", "--show-current").stdout == "main\n"
    assert done.returncode == 1
    assert "no data today" in done.stderr
    assert done.stderr.splitlines()[-1] == "the rebuild failed: see the lines above for the stage and the reason"


@pytest.mark.slow
def test_without_results_there_is_nothing_to_compare_with(tmp_path: Path) -> None:
    project = small_project(tmp_path)
    done = run_verify(project)
    assert (done.returncode, done.stdout) == (1, "")
    assert (
        done.stderr
        == "dvc.lock: missing or empty, so there is nothing to compare with; run `dvc repro`, then commit it\n"
    )


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        (
            "dvc.lock",
            "<<<<<<< HEAD\nstages: {}\n",
            "dvc.lock: not as DVC writes it, as with the marks of a merge",
        ),
        ("dvc.lock", "", "dvc.lock: missing or empty"),
        ("metrics/environment.json", "[]", "metrics/environment.json: not a list of one record"),
        ("metrics/test.json", "[1]", "metrics/test.json: not numbers by name"),
        ("metrics/test.json", "{", "metrics/test.json: not JSON: "),
    ],
)
def test_broken_records_are_named(tmp_path: Path, name: str, content: str, complaint: str) -> None:
    (tmp_path / "metrics").mkdir()
    (tmp_path / "dvc.lock").write_text("stages: {}\n")
    for metrics in ("train", "test"):
        (tmp_path / f"metrics/{metrics}.json").write_text("{}")
    (tmp_path / "metrics/environment.json").write_text('[{"threads": 2}]')
    State.of(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(PipelineError, match=re.escape(complaint)):
        State.of(tmp_path)


@pytest.mark.slow
def test_an_interrupted_verification_leaves_no_process_and_no_folder(clone: Project, tmp_path: Path) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    with subprocess.Popen(
        [sys.executable, "-m", "classifier", "verify"],
        cwd=clone.root,
        env=clean_environment(tmp_path, TMPDIR=str(temporary)),
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "Running stage 'annotate'" in line:
                break
        process.send_signal(signal.SIGINT)
        process.stderr.read()
    assert process.returncode == 130
    wait_for(lambda: processes_in(temporary) == [])
    assert list(temporary.iterdir()) == []
