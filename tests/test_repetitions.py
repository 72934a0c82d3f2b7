"""Several seeds of one recipe, run through DVC's queue and summed up."""

import json
import sys
from collections.abc import Iterator

import pandas as pd
import pytest
import yaml
from dvc_queue import stop_queue
from PIL import Image
from project import Project, reproduced_project

from classifier.cli import repetitions
from classifier.cli.experiment_queue import Recovered
from classifier.cli.repetitions import _wait
from classifier.data.lockfile import md5s_in
from classifier.pipeline.errors import PipelineError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    project = reproduced_project(tmp_path_factory, export_formats="[onnx]")
    project.commit()
    yield project
    stop_queue(project)


def run_seeds(project: Project, *options: str, check: bool = True) -> tuple[int, str, str]:
    done = project.run(sys.executable, "-m", "classifier", "seeds", *options, check=check)
    return done.returncode, done.stdout, done.stderr


def test_two_seeds_are_run_kept_and_summed_up(project: Project) -> None:
    _, printed, _ = run_seeds(project, "-n", "2", "-S", "lr=0.2", "-j", "2")
    table = pd.read_csv(project.root / "reports/seeds.csv").set_index("seed")
    assert list(table.index) == [42, 43]
    splits = set()
    for seed, row in table.to_dict("index").items():
        name = f"refs/exps/**/{row['experiment']}"
        ref = project.run("git", "for-each-ref", "--format=%(refname)", name).stdout.strip()
        metrics = json.loads(project.run("git", "show", f"{ref}:metrics/test.json").stdout)
        assert metrics["loss"] == row["test loss"]
        params = yaml.safe_load(project.run("git", "show", f"{ref}:params.yaml").stdout)
        assert (params["seed"], params["lr"]) == (seed, 0.2)
        lock = yaml.safe_load(project.run("git", "show", f"{ref}:dvc.lock").stdout)
        splits.add(md5s_in(lock)["data/annotations"])
    assert len(splits) == 1
    losses = table["test loss"]
    assert losses.nunique() == 2
    assert f"{losses.mean():.4f} ± {losses.std():.4f} ({losses.min():.4f} to {losses.max():.4f})" in printed
    with Image.open(project.root / "reports/seeds.png") as picture:
        assert picture.width > 300
    assert project.run("git", "status", "--porcelain").stdout == ""


def test_folds_share_the_training_images_and_leave_the_test_out(project: Project) -> None:
    command = (sys.executable, "-m", "classifier", "folds", "-n", "2", "-S", "lr=0.3", "-j", "2")
    printed = project.run(*command).stdout
    table = pd.read_csv(project.root / "reports/folds.csv").set_index("fold")
    assert list(table.index) == [0, 1]
    assert not [column for column in map(str, table) if column.startswith("test")]
    rows: dict[str, list[set[int]]] = {"train": [], "val": [], "test": []}
    for fold, row in table.to_dict("index").items():
        project.run("dvc", "exp", "apply", row["experiment"])
        params = yaml.safe_load((project.root / "params.yaml").read_text())
        assert (params["folds"], params["fold"], params["lr"]) == (2, fold, 0.3)
        assert json.loads((project.root / "metrics/train.json").read_text())["val_loss"] == row["val_loss"]
        for split, found in rows.items():
            found.append(set(pd.read_csv(project.root / f"data/annotations/{split}.csv").row))
    assert rows["test"][0] == rows["test"][1]
    assert rows["train"][0] == rows["val"][1]
    assert rows["val"][0] == rows["train"][1]
    accuracies = table.val_accuracy
    assert f"{accuracies.mean():.4f} ± {accuracies.std():.4f}" in printed
    project.run("git", "checkout", "--force", "--quiet", "HEAD")
    project.run("dvc", "checkout", "--quiet")


def test_seeds_that_fail_are_named_and_the_way_to_their_logs(project: Project) -> None:
    (project.root / "reports").mkdir(exist_ok=True)
    (project.root / "reports/seeds.csv").write_text("before")
    code, _, complaint = run_seeds(project, "-n", "2", "-S", "lr=-1", check=False)
    assert code == 1
    assert "2 of 2 experiments failed: " in complaint
    assert "`dvc queue logs " in complaint
    assert (project.root / "reports/seeds.csv").read_text() == "before"


@pytest.mark.parametrize("setting", ["lr=0.1,0.2", "lr=choice(0.1,0.2)", "no such thing"])
def test_what_is_not_one_value_is_refused_before_anything_is_queued(project: Project, setting: str) -> None:
    code, printed, complaint = run_seeds(project, "-n", "2", "-S", setting, check=False)
    assert (code, printed) == (1, "")
    assert complaint == f"{setting}: expected key=value with a single value\n"


def test_a_seed_is_not_one_of_the_settings(project: Project) -> None:
    code, printed, complaint = run_seeds(project, "-n", "2", "-S", "seed=100", check=False)
    assert (code, printed) == (1, "")
    assert complaint == "seed=100: set the first seed in params.yaml\n"


LISTED = "1234567  one  10:00 AM  {}\n7654321  two  10:00 AM  Success\nWorker status: {} active, 0 idle\n"


def answers_of_dvc(monkeypatch: pytest.MonkeyPatch, *answers: str | None) -> None:
    """What DVC says of its queue, one time after the other; None: it fails."""
    left = iter(answers)

    def dvc(*_: str) -> str:
        if (answer := next(left)) is None:
            raise PipelineError("dvc queue status: unexpected error")
        return answer

    monkeypatch.setattr(repetitions, "dvc", dvc)
    monkeypatch.setattr(repetitions, "recover", lambda: Recovered([], []))
    monkeypatch.setattr(repetitions, "POLL_SECONDS", 0)


def test_a_queue_of_which_dvc_cannot_tell_for_a_moment_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    running, half = LISTED.format("Running", 1), "7654321  two  10:00 AM  Success\nWorker status: 1 active, 0 idle\n"
    answers_of_dvc(monkeypatch, running, None, None, running, half, None, LISTED.format("Failed", 0))
    assert _wait(["one", "two"], 1, "seed") == ["one"]


def test_workers_that_were_killed_are_started_again_a_few_times(monkeypatch: pytest.MonkeyPatch) -> None:
    killed = [LISTED.format("Running", 0)] * 3
    answers_of_dvc(monkeypatch, *killed, "Started", *killed, "Started", LISTED.format("Success", 0))
    monkeypatch.setattr(repetitions, "recover", lambda: Recovered(["one"], []))
    assert _wait(["one", "two"], 1, "seed") == []

    answers_of_dvc(monkeypatch, *[*killed, "Started"] * repetitions.RESTARTS, *killed)
    monkeypatch.setattr(repetitions, "recover", lambda: Recovered(["one"], []))
    with pytest.raises(PipelineError, match="`classifier queue resume` continues them"):
        _wait(["one", "two"], 1, "seed")


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        (None, "dvc queue status: unexpected error"),
        (LISTED.format("Queued", 0), "the queue was stopped or emptied"),
        ("Worker status: 1 active, 0 idle\n", "the queue was stopped or emptied"),
    ],
)
def test_a_queue_that_nobody_works_at_is_told(
    monkeypatch: pytest.MonkeyPatch, answer: str | None, complaint: str
) -> None:
    answers_of_dvc(monkeypatch, LISTED.format("Running", 1), answer, answer, answer)
    with pytest.raises(PipelineError, match=complaint):
        _wait(["one", "two"], 1, "seed")
