"""A fresh clone makes its own environment, runs all stages, and gives the committed results."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from imports import ROOT
from project import Project

from classifier.verify import DRIFTED, State, compare


@pytest.mark.slow
@pytest.mark.timeout(1800)  # where all packages have to be downloaded
def test_a_fresh_clone_gives_the_committed_results(tmp_path: Path) -> None:
    clone = Project(tmp_path / "clone")
    subprocess.run(["git", "clone", "--quiet", ROOT, clone.root], check=True)
    committed = State.of(clone.root)
    # The outer environment is not to be found: the clone makes its own.
    done = clone.run("make", "repro", PATH=outer_path())
    assert clone.stages_run(done.stdout) == ["download", "annotate", "train", "evaluate", "export"]

    made = State.of(clone.root)
    changed = clone.run("git", "status", "--porcelain").stdout
    if made.environment == committed.environment:
        assert made == committed
        assert changed == "", clone.run("git", "diff").stdout
    else:
        print(
            f"made in another environment:\n{json.dumps(committed.environment)}\nhere:\n{json.dumps(made.environment)}"
        )
        assert [verdict for verdict in compare(committed, made).values() if verdict.verdict == DRIFTED] == []
    assert clone.stages_run(clone.run("make", "repro", PATH=outer_path()).stdout) == []
    shutil.rmtree(clone.root)  # an environment of some gigabytes


def outer_path() -> str:
    """PATH without the environment that the tests run in."""
    own = str(Path(sys.executable).parent)
    return os.pathsep.join(part for part in os.environ["PATH"].split(os.pathsep) if part != own)
