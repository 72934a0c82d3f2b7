"""Signals end a command with their exit code: at once, or where it is safe to stop."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from imports import ROOT

from classifier.pipeline.errors import PipelineError
from classifier.pipeline.signals import SIGNALS, Interrupted, defer_signals, listen

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}


READY = "print('ready', flush=True)"
IMPORTS = (
    "import time; from classifier.pipeline.errors import run_main;from classifier.pipeline.signals import defer_signals"
)


def start(body: str, *, ignored: bool = False) -> "subprocess.Popen[str]":
    """A command with this `main`, which has printed `ready`; SIGINT is ignored, as in the background, or is not."""
    lines = "\n    ".join(body.splitlines())
    code = f"{IMPORTS}\ndef main():\n    {lines}\nrun_main(main)"
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=(lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)) if ignored else None,
    )  # fmt: skip
    assert process.stdout
    assert process.stdout.readline() == "ready\n"
    return process


def ending(process: "subprocess.Popen[str]", typed: str | None = None) -> tuple[int, str, str]:
    """Exit code, standard output and standard error, after what is typed."""
    output, errors = process.communicate(typed, timeout=120)
    return process.returncode, output, errors


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_a_command_with_its_exit_code_and_one_line(number: signal.Signals) -> None:
    process = start(f"{READY}\ntime.sleep(20)")
    process.send_signal(number)
    assert ending(process) == (EXIT_CODES[number], "", "interrupted\n")


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_that_is_held_back_ends_the_command_at_its_release(number: signal.Signals) -> None:
    body = f"""\
with defer_signals(10) as held:
    {READY}
    while not held.number:
        time.sleep(0.01)
    print('at a safe place', flush=True)
    held.release()
    print('too far')"""
    process = start(body)
    process.send_signal(number)
    assert ending(process) == (EXIT_CODES[number], "at a safe place\n", "interrupted\n")


def test_several_sigterm_are_held_back_as_one() -> None:
    """As those of SLURM, torchrun and the end of DVC are."""
    body = f"""\
with defer_signals(60) as held:
    {READY}
    while not held.number:
        time.sleep(0.01)
    print('held', flush=True)
    input()
    print('at a safe place', flush=True)"""
    process = start(body)
    process.send_signal(signal.SIGTERM)
    assert process.stdout
    assert process.stdout.readline() == "held\n"
    process.send_signal(signal.SIGTERM)
    assert ending(process, "\n") == (143, "at a safe place\n", "interrupted\n")


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    process = start(f"{READY}\ninput()\nprint('done')", ignored=True)
    process.send_signal(signal.SIGINT)
    assert ending(process, "\n") == (0, "done\n", "")


def test_a_signal_that_is_ignored_stays_ignored_while_others_are_held_back() -> None:
    process = start(f"with defer_signals(10):\n    {READY}\n    input()\n    print('done')", ignored=True)
    process.send_signal(signal.SIGINT)
    assert ending(process, "\n") == (0, "done\n", "")


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no /proc here tells how far the imports are")
@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_while_a_stage_imports_its_modules_ends_it_without_a_traceback(
    number: signal.Signals, tmp_path: Path
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "stages", "train"], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while "multiarray" not in Path(f"/proc/{process.pid}/maps").read_text():  # of numpy, the first of the large ones
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    process.send_signal(number)
    assert ending(process) == (EXIT_CODES[number], "", "interrupted\n")


def test_what_an_interrupted_block_has_to_say_is_told() -> None:
    body = f"""\
try:
    {READY}
    time.sleep(20)
except BaseException as interrupt:
    interrupt.add_note('go on with the same command')
    raise"""
    process = start(body)
    process.send_signal(signal.SIGTERM)
    assert ending(process) == (143, "", "interrupted\ngo on with the same command\n")


@pytest.fixture
def listening() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell has it ignored
    listen()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("listening")
def test_a_signal_is_held_until_the_end_of_the_block() -> None:
    passed, number = send_held_back(signal.SIGTERM)
    assert (passed, number) == ([signal.SIGTERM], signal.SIGTERM)


@pytest.mark.usefixtures("listening")
def test_a_second_ctrl_c_is_not_held_back() -> None:
    passed, number = send_held_back(signal.SIGTERM, signal.SIGINT)
    assert (passed, number) == ([signal.SIGTERM], signal.SIGINT)


@pytest.mark.usefixtures("listening")
def test_a_signal_is_held_back_for_so_many_seconds_at_most() -> None:
    started = time.monotonic()
    passed, number = send_held_back(signal.SIGTERM, seconds=0.2, wait=20)
    assert 0.2 <= time.monotonic() - started < 15
    assert (passed, number) == ([], signal.SIGTERM)


@pytest.mark.usefixtures("listening")
def test_after_the_block_time_does_not_run_out() -> None:
    send_held_back(signal.SIGTERM, seconds=0.1)
    time.sleep(0.3)


@pytest.mark.usefixtures("listening")
def test_without_a_signal_nothing_is_raised_and_the_next_one_is_not_held_back() -> None:
    with defer_signals(0.1) as held:
        held.release()
    with pytest.raises(Interrupted):
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.usefixtures("listening")
def test_an_error_of_the_block_is_told_rather_than_the_signal() -> None:
    def fail() -> None:
        with defer_signals(10):
            os.kill(os.getpid(), signal.SIGTERM)
            raise PipelineError("diverged")

    with pytest.raises(PipelineError, match="diverged"):
        fail()


def send_held_back(*numbers: int, seconds: float = 10, wait: float = 0) -> tuple[list[int], int]:
    """Send signals to this process in a block that holds them back; those that it went on after, and what ended it."""
    passed: list[int] = []
    try:
        with defer_signals(seconds):
            for number in numbers:
                os.kill(os.getpid(), number)
                time.sleep(wait)
                passed.append(number)
    except Interrupted as interrupt:
        return passed, interrupt.number
    raise AssertionError("the block was not interrupted")


def test_a_process_ends_without_a_look_for_garbage_among_all_that_it_has_loaded() -> None:
    code = (
        "import atexit, gc; atexit.register(lambda: print(gc.get_freeze_count()));"
        "from classifier.pipeline.errors import run_main; run_main(lambda: None)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) > 1000


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("how", ["print('done')", "raise PipelineError('failed')"])
def test_a_signal_while_a_command_exits_gives_no_traceback(number: signal.Signals, how: str) -> None:
    code = (
        "import atexit, os\nfrom classifier.pipeline.errors import *\n"
        f"atexit.register(os.kill, os.getpid(), {int(number)})\ndef main(): {how}\nrun_main(main)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 128 + number
    assert done.stdout == ("done\n" if "done" in how else "")
    assert done.stderr == ("" if "done" in how else "failed\n") + "interrupted\n"
