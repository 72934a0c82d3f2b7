"""The five stages of dvc.yaml, one script each. They meet only through files.

This file is read before a stage's own imports, so what must be set before torch is loaded is set here, and what must
work while the imports go on. It may decide the speed, never a result: no stage depends on it.
"""

import os
import shutil
import signal
import sys
import threading
import time
from contextlib import suppress
from importlib.util import find_spec
from itertools import takewhile

TRACKED = ("train", "evaluate", "export")

if not (find_spec("torch") and find_spec("psutil")):
    sys.exit(
        f"{sys.executable} has no torch or no psutil: DVC runs the stages with the first `python` on the PATH.\n"
        "Activate the environment, `. .venv/bin/activate`, then run the same command again; or run `make repro`."
    )

# How long torch's threads wait actively for one another (GNU OpenMP; about 0.1 ms). By default they do so for
# milliseconds: two trainings at once on the same cores, as with `dvc queue start -j 2`, then hold each other up so much
# that both take many times as long as one after the other. One alone is as fast with this as by default.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")

# On a full disk, Python 3.11 keeps the half of a compiled module that it could write, and no later start gets past it,
# however much room there is then.
if shutil.disk_usage(os.path.dirname(__file__)).free < 2**26:  # noqa: PTH120
    sys.dont_write_bytecode = True
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"  # for processes that the stage starts


def _end_with_dvc() -> None:
    """Terminate this stage if the parent DVC process dies: its outputs would be lost, and another run may start.

    Between DVC and a stage there may be a shell and a launcher, which have the environment that DVC gives a stage. They
    outlive DVC; but a process whose parent has ended has another one from then on.
    """
    import psutil

    def is_of_stage(process: psutil.Process) -> bool:
        with suppress(psutil.Error):  # as of another user, from whom DVC may be started
            return "DVC_STAGE" in process.environ()
        return False

    stage = psutil.Process()
    chain = [stage, *takewhile(is_of_stage, stage.parents())]
    parents = [process.ppid() for process in chain]
    with suppress(psutil.NoSuchProcess):
        while [process.ppid() for process in chain] == parents:
            time.sleep(0.3)
    os.kill(os.getpid(), signal.SIGTERM)


def _leave(number: int, frame: object) -> None:
    """End at once: there is nothing to save yet, and an exception would be a traceback out of somebody's imports."""
    os.write(2, b"interrupted\n")
    os._exit(128 + number)


if sys.argv[0] == "-m":  # as it is while `python -m stages.train` reads this file; run_main then takes over
    for _number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(_number) != signal.SIG_IGN:
            signal.signal(_number, _leave)

    stage = sys.orig_argv[-1].removeprefix("stages.")
    if stage == "train":
        from classifier.compute.launch import launch

        launch("stages.train")
    if os.environ.get("RANK", "0") == "0":  # of several processes, the first alone tells the user and MLflow
        from classifier.progress import report

        report(stage)
        if stage in TRACKED:
            from classifier.tracking.tracker import start_sender_early

            start_sender_early()

if "DVC_STAGE" in os.environ:
    threading.Thread(target=_end_with_dvc, daemon=True).start()
