"""The one exception the pipeline raises for what a user can mend, and how a command ends on it."""

import sys
from collections.abc import Callable


class PipelineError(Exception):
    """Something a user can mend. The message names the file, row, key or value at fault and what to do next."""


def run_main(main: Callable[[], None]) -> None:
    """Run a command's `main` and leave the process with its exit code.

    0 done; 1 failed, with the PipelineError's message on standard error; 130 interrupted by Ctrl-C.
    Any other exception is a defect of the pipeline and keeps its traceback.
    """
    try:
        main()
    except PipelineError as error:
        sys.exit(f"{error}")  # prints to standard error and exits with 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
