"""A fork of the test server behaves like a Python that was started."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from project import clean_environment, python
from tracker import wait_for

pytestmark = pytest.mark.skipif("FORKING_PYTHON" not in os.environ, reason="there are no copies")


def run(folder: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [python(), *arguments], cwd=folder, env=clean_environment(folder, **env), input="typed", text=True,
        capture_output=True,
    )  # fmt: skip


def start(folder: Path, code: str) -> "subprocess.Popen[str]":
    """A copy that has printed `ready`."""
    process = subprocess.Popen(
        [python(), "-c", f"import os, subprocess, sys, time\n{code}\ntime.sleep(60)"], cwd=folder, text=True,
        env=clean_environment(folder), stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_it_has_arguments_folder_environment_and_files_of_its_own(tmp_path: Path) -> None:
    code = "import os, sys, tempfile; print(sys.argv, os.getcwd(), tempfile.gettempdir(), sys.stdin.read())"
    done = run(tmp_path, "-c", f"{code}; sys.exit('message')", "--option", "ä", TMPDIR=str(tmp_path))
    assert done.stdout == f"['-c', '--option', 'ä'] {tmp_path} {tmp_path} typed\n"
    assert (done.returncode, done.stderr) == (1, "message\n")


def test_a_module_is_the_one_in_its_folder_and_none_of_this_project_is_there_before(tmp_path: Path) -> None:
    (tmp_path / "stages").mkdir()
    loaded = "[name in sys.modules for name in ('torch', 'classifier')]"
    code = f"import sys; print(__name__, sys.argv[1:], sys.orig_argv[1:], {loaded})"
    (tmp_path / "stages/__main__.py").write_text(code)
    (tmp_path / "stages/__init__.py").write_text("import sys; print(sys.argv[0])")
    done = run(tmp_path, "-m", "stages", "train")
    assert done.stdout == "-m\n__main__ ['train'] ['-m', 'stages', 'train'] [True, False]\n", done.stderr


def test_dvc_is_forked_too(tmp_path: Path) -> None:
    (tmp_path / "dvc.py").write_text("raise SystemExit('that of the folder')")
    done = subprocess.run(
        ["sh", "-c", "dvc --version"], cwd=tmp_path, env=clean_environment(tmp_path), text=True, capture_output=True
    )
    assert (done.returncode, done.stdout.split(".")[0]) == (0, "3"), done.stderr


def test_torch_has_no_thread_yet_that_a_copy_would_lack(tmp_path: Path) -> None:
    code = "import torch; torch.set_num_threads(2); print(float((torch.ones(600, 600) @ torch.ones(600, 600)).sum()))"
    assert run(tmp_path, "-c", code).stdout == f"{600.0**3}\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_pass_through_and_end_it_alike(tmp_path: Path, number: signal.Signals) -> None:
    code = f"""
import signal
def end(number, frame): sys.exit(number + 100)
signal.signal({number:d}, end)
print("ready", flush=True)"""
    with start(tmp_path, code) as process:
        process.send_signal(number)
    assert process.returncode == number + 100
    with start(tmp_path, "print('ready', flush=True)") as process:
        process.send_signal(signal.SIGTERM)
    assert process.returncode == -signal.SIGTERM


def test_when_it_is_killed_so_is_what_it_has_started(tmp_path: Path) -> None:
    code = """
child = subprocess.Popen(["sleep", "60"])
with open("pids", "w") as file: print(os.getpid(), child.pid, file=file)
print("ready", flush=True)"""
    with start(tmp_path, code) as process:
        pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
        process.kill()
    wait_for(lambda: not any(is_running(pid) for pid in pids))


def is_running(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def test_other_options_and_what_libraries_read_early_have_a_real_one(tmp_path: Path) -> None:
    code = "import sys; print(sys.executable, 'torch' in sys.modules)"
    real = f"{sys.executable} False\n"
    assert run(tmp_path, "-c", code).stdout == f"{python()} True\n"
    assert run(tmp_path, "-I", "-c", code).stdout == real
    assert run(tmp_path, "-c", code, MKL_CBWR="COMPATIBLE").stdout == real
