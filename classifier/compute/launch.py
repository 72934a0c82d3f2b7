"""Have torchrun start the train stage in several processes, if params.yaml says so.

The command in dvc.yaml is fixed text: a parameter in it would be run by a shell, whatever it says.
"""

import argparse
import os
import sys
from typing import NoReturn

from classifier.pipeline.errors import PipelineError, masked
from classifier.pipeline.params import load_params
from classifier.pipeline.paths import PARAMS

# Options of torchrun that say how many processes there are and how they meet; others name programs to run, or files.
WITH_VALUE = (
    "nnodes", "nproc-per-node", "node-rank", "max-restarts", "monitor-interval", "rdzv-backend", "rdzv-endpoint",
    "rdzv-id", "rdzv-conf", "master-addr", "master-port", "local-addr",
)  # fmt: skip


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        names = ", ".join(f"--{name}" for name in ("standalone", *WITH_VALUE))
        raise PipelineError(f"{PARAMS}: launcher: {message}; of torchrun's options it may have {names}")


def launcher_command(launcher: str, module: str) -> list[str]:
    """Return the words of the command that starts a module as the parameter `launcher` says; none for `python`.

    Raises PipelineError if torchrun is given anything but options that say how many processes there are and how they
    meet.
    """
    name, *words = launcher.split()
    if name == "python":
        return []
    parser = _Parser(prog=name, add_help=False, allow_abbrev=False)
    parser.add_argument("--standalone", action="store_true")
    for option in WITH_VALUE:
        parser.add_argument(f"--{option}", f"--{option.replace('-', '_')}")
    parser.parse_args(words)
    return [sys.executable, "-m", "torch.distributed.run", *words, "-m", module]


def launch(module: str) -> None:
    """Become the launcher of a module if params.yaml names one, unless this process was started by it.

    A params.yaml at fault is left to the stage, which tells what is wrong.
    """
    if "RANK" in os.environ:  # as torchrun sets it
        return
    try:
        launcher = load_params().launcher
    except PipelineError:
        return
    try:
        command = launcher_command(launcher, module)
    except PipelineError as error:
        sys.exit(masked(str(error)))
    if command:
        os.execv(command[0], command)
