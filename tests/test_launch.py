"""The train stage's launcher: torchrun with checked words, and never a command that a parameter spells."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from imports import ROOT
from project import Project

from classifier.compute.launch import launcher_command
from classifier.pipeline.errors import PipelineError


@pytest.mark.parametrize(
    ("launcher", "words"),
    [
        ("torchrun", []),
        ("torchrun --nproc-per-node=2 --max-restarts=3", ["--nproc-per-node=2", "--max-restarts=3"]),
        ("torchrun --standalone --nproc_per_node 2", ["--standalone", "--nproc_per_node", "2"]),
        ("torchrun --nnodes=1:4 --rdzv-backend=c10d --rdzv-endpoint=a.example:29400 --rdzv-conf=timeout=9,x=1", None),
    ],
)
def test_options_about_processes_are_handed_on(launcher: str, words: list[str] | None) -> None:
    words = launcher.split()[1:] if words is None else words
    start = [sys.executable, "-m", "torch.distributed.run"]
    assert launcher_command(launcher) == [*start, *words]


def test_python_needs_no_launcher() -> None:
    assert launcher_command("python") == []


@pytest.mark.parametrize(
    "words",
    [
        "evil.py", "-m evil", "--no-python touch", "--no_python touch", "--nproc-per-node=2 evil.py",
        "--nproc-per-node 2 -m evil", "--log-dir=/tmp/x", "--run-path evil.py", "--nproc=2", "-- evil.py", "--help",
        "--nproc-per-node",
    ],
)  # fmt: skip
def test_words_that_name_a_program_or_a_file_are_refused(words: str) -> None:
    with pytest.raises(PipelineError, match=r"^params\.yaml: launcher: .*; allowed options of torchrun: "):
        launcher_command(f"torchrun {words}")


@pytest.mark.parametrize(("words", "shown"), [(["trian"], "'trian'"), ([], "''"), (["train", "x"], "'train x'")])
def test_an_unknown_stage_is_one_line_that_lists_the_stages(words: list[str], shown: str) -> None:
    done = subprocess.run([sys.executable, "-m", "stages", *words], cwd=ROOT, capture_output=True, text=True)
    stages = "check, download, annotate, train, evaluate, export"
    assert done.stderr == f"python -m stages: {shown} is not a stage; the stages are {stages}\n"
    assert (done.returncode, done.stdout) == (1, "")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "complaint"),
    [
        ('"touch {}; python"', "params.yaml: launcher: 'touch {}; python' is not python, or a torchrun command line"),
        ("torchrun {}", "params.yaml: launcher: unrecognized arguments: {}; allowed options of torchrun: "),
    ],
)
def test_a_parameter_does_not_run_a_command(tmp_path: Path, launcher: str, complaint: str) -> None:
    ran = tmp_path / "ran.py"
    project = Project.create(tmp_path / "project")
    if "touch" not in launcher:
        ran.write_text(f"from pathlib import Path\nPath({str(ran)!r}).with_suffix('.txt').touch()\n")
    project.set_params(launcher=launcher.format(ran))
    for name in ("data/images", "data/annotations"):
        (project.root / name).mkdir(parents=True)
    project.commit()
    shutil.rmtree(project.root / ".dvc/tmp", ignore_errors=True)
    failed = project.dvc("repro", "--single-item", "train", check=False)
    assert failed.returncode != 0
    assert "Running stage 'train':\n> python -m stages train\n" in failed.stdout
    assert complaint.format(ran) in failed.stderr
    assert "Traceback" not in failed.stderr
    assert not ran.with_suffix(".txt").exists()
    assert ran.exists() == ("touch" not in launcher)
