"""The bench that kills the pipeline at random moments finds no difference."""

import re
import subprocess
import sys

import pytest
from imports import ROOT


@pytest.mark.slow
@pytest.mark.timeout(1800)  # on a busy machine
def test_a_few_kills_at_random_moments_leave_no_difference() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.kill", "--times", "4"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(re.findall(r"^ +\d .* killed .*: identical$", done.stdout, re.MULTILINE)) == 4
