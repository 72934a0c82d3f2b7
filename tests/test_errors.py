"""What commands print."""

import subprocess
import sys

import pytest
from imports import ROOT


@pytest.mark.parametrize("name", ["a\x1b[2Jb", "\x9b31mred", "x\x07\x08y", "\u202egpj.exe", "\udcff"])
def test_names_in_messages_do_not_reach_the_terminal_raw(name: str) -> None:
    code = f"from classifier.errors import *\ndef main(): raise PipelineError({name!r} + '\\nnext')\nrun_main(main)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    first, second, end = done.stderr.split("\n")
    assert (first, second, end) == (ascii(name)[1:-1], "next", "")
