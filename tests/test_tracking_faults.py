"""A journal that cannot be written: the stage that tracks goes on, and says once what MLflow will not have."""

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from imports import ROOT
from project import clean_environment
from tracker import EVALUATION, stage_tracker, without_sender

from classifier.tracking.journal import Journal, home, journals

LARGEST = 20_000  # bytes of a file, where the disk is full: more than the first record has, less than the pictures


@pytest.fixture
def evaluated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what `evaluate` has written, where trackers send nothing."""
    without_sender(monkeypatch)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    write_outputs(tmp_path)
    return tmp_path


def write_outputs(folder: Path) -> None:
    shutil.copy(ROOT / "params.yaml", folder)
    (folder / "metrics/plots").mkdir(parents=True)
    (folder / "models").mkdir(exist_ok=True)
    (folder / "metrics/test.json").write_text(json.dumps({"accuracy": 0.5, "accuracy_ci95": [0.4, 0.6]}))
    (folder / "metrics/classes.csv").write_text("class\n")
    (folder / "metrics/plots/mistakes.png").write_bytes(bytes(10 * LARGEST))
    (folder / "models/model_weights.pth").write_bytes(b"weights")


def evaluate() -> list[str]:
    """Do what the stages do with a tracker; return the kinds of the records that were written."""
    journal = track()
    return [record["kind"] if record else "torn" for record in journal.records()]


def track() -> Journal:
    tracker = stage_tracker()
    with tracker.weights({"device": "cpu"}):
        tracker.log_evaluation(*EVALUATION, "md5")
        tracker.log_files(Path("metrics/plots"))
        tracker.tag({"a": "b"})
    return Journal(tracker.journal.folder)


def check_warning(capsys: pytest.CaptureFixture[str], reason: str) -> None:
    warning = capsys.readouterr().err
    assert warning.count("MLflow will not have all records of this run; its results are not affected: ") == 1
    assert reason in warning
    assert str(home()) in warning


def test_a_folder_of_which_half_can_be_copied(evaluated: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """shutil.copytree raises an error of its own, which says of no system error what it was."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST, before[1]))
    try:
        assert evaluate() == ["run", "tags", "end"]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    check_warning(capsys, "File too large")


def test_no_room_for_the_first_record(evaluated: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50, before[1]))
    try:
        assert evaluate() == []
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    check_warning(capsys, "No space left on device")
    assert journals() == []


def remove_journals() -> None:
    shutil.rmtree(home())


def replace_journals_by_a_file() -> None:
    remove_journals()
    home().write_text("")


@pytest.mark.parametrize("take_away", [remove_journals, replace_journals_by_a_file])
def test_a_journal_that_is_removed(
    evaluated: Path, capsys: pytest.CaptureFixture[str], take_away: Callable[[], None]
) -> None:
    tracker = stage_tracker()
    with tracker.training({"device": "cpu"}, "name", 0.0):
        tracker.log_metrics({"loss": 1.0}, step=1)
        take_away()
        tracker.log_metrics({"loss": 0.5}, step=2)
        tracker.log_files(Path("metrics/plots"))
    check_warning(capsys, "records.jsonl" if take_away is remove_journals else "Not a directory")
    assert home().is_file() == (take_away is replace_journals_by_a_file)
    home().unlink(missing_ok=True)


def test_a_file_in_place_of_the_folder(evaluated: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home().write_text("")
    assert evaluate() == []
    check_warning(capsys, str(home()))
    home().unlink()


def test_a_repository_that_git_cannot_read(evaluated: Path, capsys: pytest.CaptureFixture[str]) -> None:
    author = ["-c", "user.name=Test", "-c", "user.email=test@example.org"]
    subprocess.run(["git", "init", "--quiet"], check=True)
    subprocess.run(["git", "add", "params.yaml"], check=True)
    subprocess.run(["git", *author, "commit", "--quiet", "-m", "First"], check=True)
    with Path("params.yaml").open("a") as file:
        file.write("# changed\n")
    tree = subprocess.run(
        ["git", "rev-parse", "HEAD^{tree}"], check=True, capture_output=True, text=True
    ).stdout.strip()
    (evaluated / ".git/objects" / tree[:2] / tree[2:]).unlink()
    assert evaluate() == ["run", "evaluation", "files", "tags", "end"]
    check_warning(capsys, "the differences from the commit cannot be determined")


# As the stages do, in a process without root's power over others' files

STAGE = """
import test_tracking_faults
test_tracking_faults.track()
print("done")
"""


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("setpriv"), reason="only root may give files away")
@pytest.mark.parametrize(("owner", "mode"), [(0, 0o555), (12345, 0o700)], ids=["read-only", "foreign"])
def test_a_journal_folder_that_is_closed(tmp_path: Path, owner: int, mode: int) -> None:
    write_outputs(tmp_path)
    waiting = tmp_path / ".journal/1-1"
    waiting.mkdir(parents=True)
    for folder in (waiting, tmp_path / ".journal"):
        os.chown(folder, owner, owner)
        folder.chmod(mode)
    powers = "-dac_override,-dac_read_search,-fowner"
    env = clean_environment(tmp_path, DVC_ROOT=str(tmp_path), PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}")
    powerless = ["setpriv", f"--bounding-set={powers}", f"--inh-caps={powers}"]
    done = subprocess.run(
        [*powerless, sys.executable, "-c", STAGE], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
    assert done.stderr.count("MLflow will not have all records of this run") == 1
    assert "Permission denied" in done.stderr
    assert "Traceback" not in done.stderr

    (tmp_path / ".journal").chmod(0o777)  # so that others may write there, but not read what waits
    send = "from classifier.tracking.sender import send_to_every_store; print(*send_to_every_store().values())"
    done = subprocess.run(
        [*powerless, sys.executable, "-c", send], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert f"{waiting}: Permission denied; run `classifier sync` as its owner" in done.stdout or mode == 0o555
