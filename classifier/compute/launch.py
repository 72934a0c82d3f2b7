"""Start the train stage in several processes with torchrun, if params.yaml asks for it.

The command in dvc.yaml is constant: DVC runs it in a shell, which would also run what a parameter in it says.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from classifier.pipeline.errors import PipelineError, masked
from classifier.pipeline.params import load_params

# torchrun's options for the number of processes and their rendezvous. Others name programs to run, or files.
OPTIONS = (
    "nnodes", "nproc-per-node", "node-rank", "max-restarts", "monitor-interval", "rdzv-backend", "rdzv-endpoint",
    "rdzv-id", "rdzv-conf", "master-addr", "master-port", "local-addr",
)  # fmt: skip


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        names = ", ".join(f"--{name}" for name in ("standalone", *OPTIONS))
        raise PipelineError(f"params.yaml: launcher: {message}; allowed options of torchrun: {names}")


def launcher_command(launcher: str) -> list[str]:
    """Return the command of the parameter `launcher`, without what it starts; empty for `python`.

    Raises PipelineError if torchrun is given anything but OPTIONS and --standalone.
    """
    name, *words = launcher.split()
    if name == "python":
        return []
    parser = _Parser(prog=name, add_help=False, allow_abbrev=False)
    parser.add_argument("--standalone", action="store_true")
    for option in OPTIONS:
        parser.add_argument(f"--{option}", f"--{option.replace('-', '_')}")
    parser.parse_args(words)
    return [sys.executable, "-m", "torch.distributed.run", *words]


def launch(params: Path, program: Sequence[str]) -> None:
    """Replace this process by torchrun if `launcher` in the file `params` says so, unless torchrun started this one.

    program: arguments of Python that torchrun starts in each process, such as `-m stages train`.
    Errors in `params` are left to the program, which reports them.
    """
    if "RANK" in os.environ:  # torchrun sets it
        return
    try:
        launcher = load_params(params).launcher
    except PipelineError:
        return
    try:
        command = launcher_command(launcher)
    except PipelineError as error:
        sys.exit(masked(str(error)))
    if command:
        os.execv(command[0], [*command, *program])
