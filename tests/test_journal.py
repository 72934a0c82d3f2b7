"""Journals keep what stages tell MLflow, through kills, torn lines and a disk without room."""

import errno
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from imports import ROOT
from limits import no_file_above
from project import clean_environment
from tracker import wait_for

from classifier.tracking.journal import Journal, find_end, home, journals

WRITE_UNTIL_KILLED = """
import sys
from classifier.tracking.journal import Journal
journal = Journal.create()
for number in range(10**9):
    journal.write("metrics", number=number, values={"loss": number / 7} | {str(n): "x" * 99 for n in range(40)})
    print(journal.folder, flush=True)
"""


@pytest.fixture(autouse=True)
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is the repository of this test."""
    (tmp_path / ".dvc").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    return tmp_path


@pytest.fixture
def killed(repository: Path) -> Journal:
    """The journal of a process that was killed while it wrote."""
    environment = clean_environment(repository, PYTHONPATH=str(ROOT))
    with subprocess.Popen(
        [sys.executable, "-c", WRITE_UNTIL_KILLED], env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        journal = Journal(Path(process.stdout.readline().strip()))
        for _ in range(20):
            process.stdout.readline()
        assert journal.is_being_written()
        process.kill()
    return journal


def numbers(journal: Journal) -> list[int | None]:
    return [record["number"] if record else None for record in journal.records()]


def test_records_come_back_as_they_were_written_and_in_their_order() -> None:
    journal = Journal.create()
    journal.write("run", parameters={"lr": "0.1", "name": 'ü "quoted"\nline'})
    journal.write("metrics", values={"loss": 0.1 + 0.2}, step=1)
    first, second = Journal(journal.folder).records()
    assert first is not None
    assert second is not None
    assert (first["kind"], first["parameters"]) == ("run", {"lr": "0.1", "name": 'ü "quoted"\nline'})
    assert (second["kind"], second["values"], second["step"]) == ("metrics", {"loss": 0.1 + 0.2}, 1)
    assert first["time"] <= second["time"]


def test_a_killed_process_leaves_every_record_that_it_has_written(killed: Journal) -> None:
    assert numbers(killed)[:20] == list(range(20))
    assert numbers(killed) == list(range(len(killed.records())))


def test_the_journal_of_a_killed_process_is_known_as_such(killed: Journal) -> None:
    assert not killed.is_being_written()
    killed.wait_for_writer(seconds=0)
    assert not find_end(killed.records())


def test_the_journal_of_a_process_that_is_alive_is_known_as_such() -> None:
    journal = Journal.create()
    assert Journal(journal.folder).is_being_written()


def test_a_torn_last_line_is_no_record_until_it_is_whole() -> None:
    journal = Journal.create()
    journal.write("metrics", number=0)
    whole = (journal.folder / "records.jsonl").read_bytes()
    for length in range(len(whole)):
        with (journal.folder / "records.jsonl").open("wb") as file:
            file.write(whole + whole[:length])
        assert numbers(journal) == [0]
    (journal.folder / "records.jsonl").write_bytes(whole + whole)
    assert numbers(journal) == [0, 0]


def test_a_torn_line_is_passed_over_and_spoils_no_other() -> None:
    journal = Journal.create()
    journal.write("metrics", number=0)
    with (journal.folder / "records.jsonl").open("ab") as file:
        file.write(b'\n{"kind": "metrics", "numb')
    before = numbers(journal)
    journal.write("metrics", number=2)
    assert numbers(journal) == [*before, None, 2]  # those that were counted before keep their places


def test_without_room_a_record_is_an_error_and_the_next_one_is_whole() -> None:
    journal = Journal.create()
    journal.write("metrics", number=0)
    limit = (journal.folder / "records.jsonl").stat().st_size + 20
    with no_file_above(limit), pytest.raises(OSError, match=r"records\.jsonl") as refused:
        journal.write("metrics", number=1)
    assert refused.value.errno == errno.ENOSPC
    journal.write("metrics", number=2)
    assert numbers(journal) == [0, None, 2]


def test_files_and_folders_are_copied_and_those_of_the_same_name_kept_apart(tmp_path: Path) -> None:
    journal = Journal.create()
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots/one.png").write_text("one")
    (tmp_path / "classes.csv").write_text("first")
    folder, first = journal.keep(tmp_path / "plots"), journal.keep(tmp_path / "classes.csv")
    (tmp_path / "classes.csv").write_text("second")
    second, third = journal.keep(tmp_path / "classes.csv"), journal.keep_bytes("classes.csv", b"third")
    shutil.rmtree(tmp_path / "plots")
    assert [Path(name).name for name in (folder, first, second, third)] == ["plots", *["classes.csv"] * 3]
    assert (journal.folder / folder / "one.png").read_text() == "one"
    assert [(journal.folder / name).read_text() for name in (first, second, third)] == ["first", "second", "third"]


def test_what_was_sent_is_remembered() -> None:
    journal = Journal.create()
    assert journal.sent == 0
    journal.sent = 7
    assert Journal(journal.folder).sent == 7


def test_journals_are_listed_in_the_order_of_their_creation() -> None:
    made = [Journal.create() for _ in range(12)]
    (home() / ".lock").touch()
    assert [journal.folder for journal in journals()] == [journal.folder for journal in made]
    made[3].remove()
    assert len(journals()) == 11


def test_a_journal_is_never_seen_without_its_writer() -> None:
    """A sender that looks while one is created would remove it as empty."""
    seen: list[bool] = []
    done = threading.Event()

    def look() -> None:
        while not done.is_set():
            seen.extend(journal.is_being_written() for journal in journals())

    looker = threading.Thread(target=look)
    looker.start()
    made = [Journal.create() for _ in range(100)]
    wait_for(lambda: len(seen) >= 100)  # it looks at those that are there once more
    done.set()
    looker.join()
    assert all(seen)
    assert len(journals()) == len(made)


def test_of_a_removal_that_is_cut_off_nothing_is_left_to_send(monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal.create()
    journal.write("end", status="FINISHED")
    monkeypatch.setattr(shutil, "rmtree", lambda folder: None)
    journal.remove()
    assert journal.records() == []


def test_the_end_of_a_journal_is_found_whatever_comes_after() -> None:
    journal = Journal.create()
    journal.write("metrics", number=0)
    assert not find_end(journal.records())
    journal.write("end", status="FINISHED")
    assert find_end(journal.records())
    journal.write("metrics", values={"system/cpu": 1}, step=10)
    assert find_end(journal.records())


def test_an_experiment_in_a_temporary_copy_writes_to_the_main_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "main"))
    assert Journal.create().folder.parent == tmp_path / "main/.journal"


def test_what_a_stage_imports_to_write_does_not_import_mlflow() -> None:
    code = (
        "import sys, classifier.tracking.tracker; sys.exit(not {'mlflow', 'pandas', 'torch'}.isdisjoint(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
