"""Stores that answer byte by byte: what is asked of them is given up in time."""

import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from test_tracking_faults import track, write_outputs
from tracker import dripping_server, without_sender

from classifier.tracking import registry, store
from classifier.tracking.registry import find_champion
from classifier.tracking.sender import send_to_every_store
from classifier.tracking.store import StoreAway, connect, find_runs, time_limit


@pytest.fixture(autouse=True)
def impatient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of its own, and limits of a second."""
    for module in (store, registry):
        monkeypatch.setattr(module, "EXCHANGE_SECONDS", 1)
        monkeypatch.setattr(module, "SEARCH_SECONDS", 1)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    without_sender(monkeypatch)


@pytest.mark.parametrize("part", ["header", "body"])
@pytest.mark.parametrize("ask", [find_runs, lambda: connect("any"), lambda: find_champion("any")])
def test_a_server_that_drips_is_given_up(monkeypatch: pytest.MonkeyPatch, part: str, ask: Callable[[], object]) -> None:
    with dripping_server(part) as address:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        started = time.monotonic()
        with pytest.raises(StoreAway, match=r"cannot be used: .*(timed out|no complete answer|ReadTimeoutError)"):
            ask()
        assert time.monotonic() - started < 4


@pytest.mark.parametrize("part", ["header", "body"])
def test_a_journal_stays_that_a_server_takes_byte_by_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    write_outputs(tmp_path)
    with dripping_server(part) as address:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        journal = track()
        started = time.monotonic()
        faults = send_to_every_store()
        assert time.monotonic() - started < 4
    assert isinstance(faults[journal.folder], StoreAway)
    assert len(journal.records()) == 5


def test_limits_can_be_nested_and_leave_the_timer_as_it_was() -> None:
    before, _ = signal.getitimer(signal.ITIMER_REAL)
    handler = signal.getsignal(signal.SIGALRM)
    with pytest.raises(TimeoutError, match=r"within 0\.05 seconds"), time_limit(0.05), time_limit(10):
        time.sleep(5)
    with pytest.raises(TimeoutError, match=r"within 0\.05 seconds"), time_limit(10), time_limit(0.05):
        time.sleep(5)
    with time_limit(0.05):
        pass
    time.sleep(0.1)
    assert signal.getsignal(signal.SIGALRM) == handler
    after, _ = signal.getitimer(signal.ITIMER_REAL)
    assert (after > 0) == (before > 0)
