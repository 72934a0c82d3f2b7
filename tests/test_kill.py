"""The bench that kills the pipeline at random moments finds no difference."""

import os
import re
import subprocess
import sys

import pytest
from imports import ROOT


@pytest.mark.slow
@pytest.mark.timeout(1800)  # on a busy machine
def test_a_few_kills_at_random_moments_leave_no_difference() -> None:
    kill(times=4)


@pytest.mark.nightly
@pytest.mark.timeout(7200)
def test_thirty_kills_at_random_moments_leave_no_difference() -> None:
    kill(times=30)


def kill(times: int) -> None:
    env = {key: value for key, value in os.environ.items() if key != "FORKING_PYTHON"}
    command = [sys.executable, "-m", "benchmarks.kill", "--times", str(times)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(re.findall(r"^ +\d+ .* killed .*: identical$", done.stdout, re.MULTILINE)) == times
