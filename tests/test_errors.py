"""What commands print."""

import subprocess
import sys
from pathlib import Path

import pytest
from imports import ROOT
from project import clean_environment


@pytest.mark.parametrize("name", ["a\x1b[2Jb", "\x9b31mred", "x\x07\x08y", "\u202egpj.exe", "\udcff"])
def test_names_in_messages_do_not_reach_the_terminal_raw(name: str) -> None:
    code = (
        "from classifier.pipeline.errors import *\n"
        f"def main(): raise PipelineError({name!r} + '\\nnext')\nrun_main(main)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    first, second, end = done.stderr.split("\n")
    assert (first, second, end) == (ascii(name)[1:-1], "next", "")


@pytest.mark.parametrize("name", ["100% mine", "c#", "what?"])
def test_a_place_that_mlflow_reads_otherwise_is_told_at_the_start(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    code = "from classifier.pipeline.errors import run_main; run_main(lambda: print('started'))"
    env = clean_environment(tmp_path, PYTHONPATH=str(ROOT))
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path / name, env=env, capture_output=True, text=True)
    (character,) = set(name) & set("%#?")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"{tmp_path / name}: MLflow does not support {character} in this path")
