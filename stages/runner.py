"""What `python -m stages train` runs.

It sets what must be set before torch is loaded, and starts what must work during a stage's imports. It affects the
speed, never a result, so no stage depends on it. Modules are imported where they are used: a wrong environment must be
reported first, and the stage's imports take seconds.
"""

import os
import signal
import sys
import threading
import time
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from itertools import takewhile

STAGES = ("check", "download", "annotate", "train", "evaluate", "export")
TRACKED = ("train", "evaluate", "export")


def main() -> None:
    name = " ".join(sys.argv[1:])
    if name not in STAGES:
        sys.exit(f"python -m stages: {name!r} is not a stage; the stages are {', '.join(STAGES)}")
    run_stage(name)


def run_stage(name: str) -> None:
    """Import a stage and run its `main()`. Exit as `classifier.pipeline.errors.run_main` does."""
    check_packages()
    # How long torch's threads spin while they wait for one another (GNU OpenMP; about 0.1 ms). The default is
    # milliseconds: two trainings on the same cores, as with `dvc queue start -j 2`, then block each other, and both
    # take many times as long as one after the other. A single training is as fast with this value as by default.
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")

    from classifier.pipeline.signals import exit_on_signals

    exit_on_signals()  # there is nothing to save yet; run_main replaces this
    if name == "train":
        from classifier.compute.launch import launch
        from classifier.pipeline.paths import PARAMS

        launch(PARAMS, ["-m", "stages", name])
    if "DVC_STAGE" in os.environ:
        threading.Thread(target=end_with_dvc, daemon=True).start()
    if os.environ.get("RANK", "0") == "0":  # of several processes, only the first one reports
        from classifier.progress import report

        report(name)
        if name in TRACKED:
            from classifier.tracking.tracker import start_sender_early

            start_sender_early()
    from classifier.pipeline.errors import run_main

    run_main(import_module(f"stages.{name}").main)


def check_packages() -> None:
    """Exit with one message if packages are missing, as with the system's Python."""
    if not (find_spec("torch") and find_spec("psutil")):
        sys.exit(
            f"{sys.executable} has no torch or no psutil: DVC runs the stages with the first `python` on the PATH.\n"
            "Activate the environment, `. .venv/bin/activate`, then run the same command again; or run `make repro`."
        )


def end_with_dvc() -> None:
    """Send SIGTERM to this process when DVC dies: the outputs would be lost, and another run may start.

    Between DVC and a stage there may be a shell and a launcher. They have the environment that DVC gives a stage, and
    they outlive DVC. A process whose parent has died gets another parent, so a change of a parent's number shows it.
    """
    import psutil

    def is_of_stage(process: psutil.Process) -> bool:
        with suppress(psutil.Error):  # such as a process of another user, who started DVC
            return "DVC_STAGE" in process.environ()
        return False

    stage = psutil.Process()
    chain = [stage, *takewhile(is_of_stage, stage.parents())]
    parents = [process.ppid() for process in chain]
    with suppress(psutil.NoSuchProcess):
        while [process.ppid() for process in chain] == parents:
            time.sleep(0.3)
    os.kill(os.getpid(), signal.SIGTERM)
