"""The one exception the pipeline raises for what a user can mend, and how a command ends on it."""

import signal
import sys
from collections.abc import Callable


class PipelineError(Exception):
    """Something a user can mend. The message names the file, row, key or value at fault and what to do next."""


def run_main(main: Callable[[], None]) -> None:
    """Run a command's `main` and leave the process with its exit code.

    0 done; 1 failed, with the PipelineError's message on standard error; 130 or 143 interrupted by SIGINT (Ctrl-C) or
    SIGTERM. Any other exception is a defect of the pipeline and keeps its traceback.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so that what is open is closed
    try:
        main()
    except PipelineError as error:
        sys.exit(f"{error}")  # prints to standard error and exits with 1
    except KeyboardInterrupt as interrupt:
        print("\n".join(["interrupted", *map(str, interrupt.args)]), file=sys.stderr)
        sys.exit(130)
