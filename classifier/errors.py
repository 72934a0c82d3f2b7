"""What ends a command early, and how: an error that a user can mend, a disk without room, or a signal."""

import errno
import re
import sys
from collections.abc import Callable

from classifier.interrupts import Interrupted, listen

NO_ROOM = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up", errno.EFBIG: "file too large"}


class PipelineError(Exception):
    """Something a user can mend. The message names the file, row, key or value at fault and what to do next."""


def run_main(main: Callable[[], None]) -> None:
    """Run a command's `main` and leave the process with its exit code.

    0 done; 1 failed, with the PipelineError's message on standard error, or because there is no room to write; 130 or
    143 interrupted by SIGINT or SIGTERM. Any other exception is a defect of the pipeline and keeps its traceback.
    """
    listen()
    try:
        main()
    except PipelineError as error:
        sys.exit(masked(str(error)))  # prints to standard error and exits with 1
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        sys.exit(
            f"{error.filename or 'an output'} cannot be written: {NO_ROOM[error.errno]}; earlier files are as they "
            "were. Make room, then run the same command again."
        )
    except Interrupted as interrupt:
        print("\n".join(["interrupted", *getattr(interrupt, "__notes__", [])]), file=sys.stderr)
        sys.exit(128 + interrupt.number)


def masked(text: str) -> str:
    """The text with stars in place of the name and password of each address in it, as in http://me:secret@host."""
    return re.sub(r"(?<=://)[^/\s@]*:[^/\s]*@|(?<=://)[^/\s@:]+@", "***@", text)
