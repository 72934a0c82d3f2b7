"""A fresh clone makes its own environment, runs all stages, and gives the committed results."""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from imports import ROOT
from pictures import split_pngs
from project import Project

from classifier.provenance.verify import DRIFTED, State, compare


@pytest.mark.slow
@pytest.mark.timeout(1800)  # where all packages have to be downloaded
def test_a_fresh_clone_gives_the_committed_results(tmp_path: Path) -> None:
    clone = Project(tmp_path / "clone")
    subprocess.run(["git", "clone", "--quiet", ROOT, clone.root], check=True)
    committed = State.of(clone.root)
    # The outer environment is not to be found: the clone makes its own.
    done = clone.run("make", "repro", PATH=outer_path())
    assert clone.stages_run(done.stdout) == ["check", "download", "annotate", "train", "evaluate", "export"]

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
    check_predictions(clone, tmp_path / "pictures")
    shutil.rmtree(clone.root)  # an environment of some gigabytes


def check_predictions(clone: Project, pictures: Path, count: int = 1000) -> None:
    """`classifier predict` says of test images, as files, what evaluation says, with every exported format."""
    evaluated = pd.read_csv(clone.root / "metrics/plots/confusion.csv").predicted[:count]
    pictures.mkdir()
    for number, (_, content) in enumerate(split_pngs(clone.root / "data", "test", count)):
        (pictures / f"{number:05}.png").write_bytes(content)
    models = sorted((clone.root / "models/export").glob("model.*"))
    assert [model.suffix for model in models] == [".onnx", ".pt2", ".pth", ".safetensors"]
    for model in models:
        command = [".venv/bin/classifier", "predict", str(pictures), "--model", str(model)]
        answers = pd.read_csv(io.StringIO(clone.run(*command, PATH=outer_path()).stdout))
        assert answers.file.tolist() == [str(path) for path in sorted(pictures.iterdir())]
        assert len(answers) == count
        assert answers["class"].tolist() == evaluated.tolist()


def outer_path() -> str:
    """PATH without the environment that the tests run in."""
    own = str(Path(sys.executable).parent)
    return os.pathsep.join(part for part in os.environ["PATH"].split(os.pathsep) if part != own)
