"""Two at once: commands in one checkout, experiments with the same parameters, a stage killed while others read.

No file is ever there half, and the results are those of one at a time.
"""

import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
from mlflow import MlflowClient
from project import Project, clean_environment, python, reproduced_project
from small_data import write_idx_dataset
from tracker import wait_for

from classifier.data.arrays import ImageArrays
from classifier.pipeline.outputs import hash_bytes

pytestmark = pytest.mark.slow

WATCHED = ("data/images/images-00000.npy", "models/model_weights.pth", "metrics/train.json", "metrics/test.json")
BUSY = ("is busy, it is being blocked by", "Unable to acquire lock")  # as DVC says it


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A committed project in which one `dvc repro` ran. Tests leave it as it is."""
    project = reproduced_project(tmp_path_factory, export_formats="[pth]")
    project.commit()
    return project


@pytest.fixture(scope="module")
def experiments(reference: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A copy in which the experiments `one` and `two` ran at the same time, with the same parameters."""
    project = reference.copy(tmp_path_factory.mktemp("experiments") / "project")
    both = [start(project, "dvc", "exp", "run", "--temp", "--name", name, "-S", "lr=0.05") for name in ("one", "two")]
    printed = outputs_of(*both)
    assert [process.returncode for process in both] == [0, 0], "\n".join(printed)
    return project


@contextmanager
def watched(root: Path, whole: Mapping[str, set[str]]) -> Iterator[dict[str, set[str]]]:
    """Keep reading files while the block lasts; gives the md5s met, by path, and fails if one is not among `whole`."""
    met: dict[str, set[str]] = {path: set() for path in whole}
    over = threading.Event()

    def watch() -> None:
        while not over.is_set():
            for path in whole:
                try:
                    met[path].add(hash_bytes((root / path).read_bytes()))
                except OSError:  # it is not there, or its folder is not
                    met[path].add("missing")
            time.sleep(0.001)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield met
    finally:
        over.set()
        thread.join()
    assert {path: md5s - whole[path] - {"missing"} for path, md5s in met.items()} == {path: set() for path in whole}


def start(project: Project, *command: str, real: bool = False) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable if real else python(), "-m", *command],
        cwd=project.root, env=clean_environment(project.root.parent), stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def outputs_of(*processes: "subprocess.Popen[str]") -> list[str]:
    """Wait for all; return what each printed."""
    return ["".join(process.communicate()) for process in processes]


def test_two_repros_in_one_checkout_end_in_the_same_bytes(reference: Project, tmp_path: Path) -> None:
    project = reference.copy_without_results(tmp_path / "project")
    whole = {path: {md5} for path, md5 in reference.outputs().items() if path in WATCHED}
    assert set(whole) == set(WATCHED)
    with watched(project.root, whole) as met:
        both = [start(project, "dvc", "repro") for _ in range(2)]
        printed = outputs_of(*both)
        for process, text in zip(both, printed, strict=True):
            assert process.returncode == 0 or any(reason in text for reason in BUSY), text
            assert "Traceback" not in text
        project.dvc("repro")
    assert all(len(md5s) == 2 for md5s in met.values())  # missing, then whole
    assert project.outputs() == reference.outputs()
    assert (project.root / "dvc.lock").read_bytes() == (reference.root / "dvc.lock").read_bytes()
    assert project.stages_run(project.dvc("repro").stdout) == []
    assert not list((project.root / ".checkpoints").glob("*/"))


def test_a_second_repro_beside_one_that_trains_anew(reference: Project, experiments: Project, tmp_path: Path) -> None:
    """With outputs of before: DVC removes them, and no half of a new one is seen."""
    project = reference.copy(tmp_path / "project")
    before = reference.outputs()
    project.set_params(lr="0.05")
    expected = experiments.copy(tmp_path / "expected")
    expected.dvc("exp", "apply", "one")
    after = expected.outputs()
    assert [path for path in WATCHED if after[path] == before[path]] == ["data/images/images-00000.npy"]
    with watched(project.root, {path: {before[path], after[path]} for path in WATCHED}):
        first = start(project, "dvc", "repro")
        wait_for(lambda: not (project.root / "models/model_weights.pth").exists())
        second = start(project, "dvc", "repro")
        for process, text in zip((first, second), outputs_of(first, second), strict=True):
            assert process.returncode == 0 or any(reason in text for reason in BUSY), text
        project.dvc("repro")
    assert project.outputs() == after


def test_two_experiments_with_the_same_parameters_have_the_same_results(
    reference: Project, experiments: Project
) -> None:
    project, names = experiments, ("one", "two")
    refs = project.run("git", "for-each-ref", "--format=%(refname)", "refs/exps").stdout.split()
    found = {name: next(ref for ref in refs if ref.endswith(f"/{name}")) for name in names}
    for path in ("dvc.lock", "metrics/train.json", "metrics/test.json"):
        one, two = (project.run("git", "show", f"{found[name]}:{path}").stdout for name in names)
        assert one == two != (reference.root / path).read_text()
    assert not list((project.root / ".checkpoints").glob("*/"))
    assert not list((project.root / ".journal").glob("[0-9]*"))

    client = MlflowClient(f"sqlite:///{project.root / 'mlflow.db'}")
    (experiment,) = [each for each in client.search_experiments() if each.name == "fashion-mnist"]
    runs = [run for run in client.search_runs([experiment.experiment_id]) if run.info.run_name in names]
    assert sorted(run.info.run_name for run in runs) == ["one", "two"]
    for run in runs:
        assert run.info.status == "FINISHED"
        assert run.data.params["lr"] == "0.05"
        for metric in ("train_loss", "val_loss", "val_accuracy"):
            assert [value.step for value in client.get_metric_history(run.info.run_id, metric)] == [1, 2, 3, 4]
        assert "test_accuracy" in run.data.metrics
    assert runs[0].data.metrics["val_loss"] == runs[1].data.metrics["val_loss"]


# The annotate stage, killed


@pytest.fixture(scope="module")
def annotating(reference: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project with enough images that writing them takes a while, annotated once."""
    project = reference.copy_without_results(tmp_path_factory.mktemp("killed") / "project")
    write_idx_dataset(project.root / "data/raw", train=8000, test=2000)
    run_annotate(project)
    return project


def run_annotate(project: Project) -> None:
    project.run(sys.executable, "-m", "stages", "annotate")


def being_written(project: Project) -> list[Path]:
    return list((project.root / "data").glob(".images.*/images/*"))


def wait_until_it_writes(project: Project, process: "subprocess.Popen[str]") -> None:
    while process.poll() is None and not any(f".{process.pid}." in str(path) for path in being_written(project)):
        time.sleep(0.005)
    assert process.poll() is None


def test_an_annotate_that_is_killed_again_and_again_leaves_whole_files(annotating: Project) -> None:
    chance = random.Random(0)  # noqa: S311
    root = annotating.root
    whole: dict[str, set[str]] = {}
    for seed in ("1", "2"):  # which give other splits
        annotating.set_params(split_seed=seed)
        begin = time.monotonic()
        run_annotate(annotating)
        seconds = time.monotonic() - begin
        for path, md5 in annotating.outputs().items():
            if path.startswith(("data/images/", "data/annotations/")):
                whole.setdefault(path, set()).add(md5)
    assert len(whole["data/annotations/train.csv"]) == 2

    half = 0
    with watched(root, whole) as met:
        for attempt in range(12):
            annotating.set_params(split_seed="12"[attempt % 2])
            process = start(annotating, "stages", "annotate", real=True)
            if attempt % 3:
                time.sleep(chance.uniform(0.1, seconds))
            else:
                wait_until_it_writes(annotating, process)
                time.sleep(chance.uniform(0, 0.2))
            process.send_signal(signal.SIGKILL)
            process.communicate()
            assert len(being_written(annotating)) <= 1  # what the one before left is gone
            half += len(being_written(annotating))
            assert ImageArrays(root / "data/images").count == 10_000
        assert half > 2  # some were killed while they wrote
        run_annotate(annotating)
    assert all(len(md5s - {"missing"}) >= 1 for md5s in met.values())
    assert not list((root / "data").glob(".*"))


def test_what_a_live_annotate_writes_is_left_to_it(annotating: Project) -> None:
    first = start(annotating, "stages", "annotate", real=True)
    wait_until_it_writes(annotating, first)
    first.send_signal(signal.SIGSTOP)
    (mine,) = being_written(annotating)
    run_annotate(annotating)
    assert being_written(annotating) == [mine]
    before = {path: md5 for path, md5 in annotating.outputs().items() if str(mine) != str(annotating.root / path)}
    first.send_signal(signal.SIGCONT)
    (printed,) = outputs_of(first)
    assert first.returncode == 0, printed
    assert annotating.outputs() == before
    assert not list((annotating.root / "data").glob(".*"))
