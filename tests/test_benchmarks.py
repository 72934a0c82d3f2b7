"""The benchmarks: their command lines, the page of results, and the fit of exponents."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from imports import ROOT
from project import python

from benchmarks import accelerator
from benchmarks.measuring import exponent, median_ratio, summary, write_section
from classifier.compute.device import usable_devices

PROGRAMS = sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py") if "def main()" in path.read_text())


@pytest.mark.parametrize("program", PROGRAMS)
def test_each_tells_its_options(program: str) -> None:
    done = subprocess.run([python(), "-m", f"benchmarks.{program}", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"python -m benchmarks.{program}" in done.stdout


@pytest.mark.skipif(usable_devices() != ["cpu"], reason="there is an accelerator here")
def test_without_an_accelerator_nothing_is_claimed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.delenv("ACCELERATOR", raising=False)
    monkeypatch.setattr(sys, "argv", ["accelerator", "--json", str(tmp_path / "figures.json")])
    accelerator.main()
    assert capsys.readouterr().out.startswith("There is no accelerator here: nothing was run.")
    assert not (tmp_path / "figures.json").exists()


@pytest.mark.nightly
def test_the_script_of_accelerators_runs_on_a_cpu(fashion_mnist_dir: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.accelerator", "--quick", "--data", str(fashion_mnist_dir)]
    command += ["--json", str(tmp_path / "figures.json"), "--only", "tests", "tutorial", "recipe"]
    env = os.environ | {"ACCELERATOR": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "figures.json").read_text())
    assert found["environment"]["device"] == "cpu"
    assert " passed" in found["tests"]["pytest"]
    assert "pipeline / plain torch" in found["tutorial"]
    assert "| recipe | mlp, test accuracy |" in done.stdout


def test_a_section_takes_the_place_of_the_one_before_and_of_no_other(tmp_path: Path) -> None:
    page = tmp_path / "results.md"
    write_section(page, "One", ["old"])
    head = page.read_text().split("## ")[0]
    write_section(page, "Two", ["```text", "# no heading", "```"])
    write_section(page, "One", ["new", "", "lines"])
    write_section(page, "Three", ["3"])
    expected = "## One\n\nnew\n\nlines\n\n## Two\n\n```text\n# no heading\n```\n\n## Three\n\n3\n"
    assert page.read_text() == head + expected
    assert head.startswith("# Results")


def test_exponent_of_a_power_is_found() -> None:
    assert exponent([10, 100, 1000], [3 * size**1.5 for size in (10, 100, 1000)]) == pytest.approx(1.5)
    assert exponent([10_000, 1_000_000], [7, 7]) == pytest.approx(0)


def test_medians_and_ranges() -> None:
    assert summary([3, 1, 2], "s", 1) == "median 2.0 s (1.0 to 3.0), n=3"
    assert median_ratio([2, 6, 20], [1, 2, 5]) == 3
