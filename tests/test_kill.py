"""The bench that kills the pipeline at random moments finds no difference."""

import re
import subprocess
import sys

import pytest
from imports import ROOT


@pytest.mark.slow
@pytest.mark.timeout(1800)  # on a busy machine
def test_a_few_kills_at_random_moments_leave_no_difference() -> None:
    kill("--times=4", "--ways", "repro")


@pytest.mark.nightly
@pytest.mark.timeout(7200)
def test_thirty_kills_at_random_moments_leave_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of stages, trainings by several processes, experiments in folders of their own, and the queue."""
    monkeypatch.delenv("FORKING_PYTHON", raising=False)
    kill("--times=30")


def kill(*options: str) -> None:
    command = [sys.executable, "-m", "benchmarks.kill", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    times = int(options[0].removeprefix("--times="))
    assert len(re.findall(r"^ +\d+ .* killed .*: identical$", done.stdout, re.MULTILINE)) == times
