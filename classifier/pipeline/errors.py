"""What ends a command early, and how: an error that a user can mend, a place that cannot be written to, or a signal."""

import atexit
import errno
import gc
import os
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from classifier.pipeline.signals import Interrupted, exit_on_signals, listen

NO_ROOM = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up", errno.EFBIG: "file too large"}
NO_ACCESS = {
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.EROFS: "the disk is read-only",
}


class PipelineError(Exception):
    """Something a user can mend. The message names the file, row, key or value at fault and what to do next."""


def run_main(main: Callable[[], None]) -> None:
    """Run a command's `main` and leave the process with its exit code.

    0 done; 1 failed, with the PipelineError's message on standard error, or because there is no room to write, or no
    access; 130 or 143 interrupted by SIGINT or SIGTERM. Any other exception is a defect of the pipeline and keeps its
    traceback.
    """
    exit_without_collecting()
    listen()
    try:
        _check_temporary_folder()
        _check_place()
        main()
    except PipelineError as error:
        lines = [*masked(str(error)).split("\n"), *_way_back()]
        sys.exit("\n".join(map(printable, lines)))  # prints to standard error and exits with 1
    except Interrupted as interrupt:
        print("\n".join(["interrupted", *getattr(interrupt, "__notes__", [])]), file=sys.stderr)
        sys.exit(128 + interrupt.number)
    except Exception as error:
        fault = disk_fault(error)
        if not fault or fault.errno is None:
            raise
        name = fault.filename or "an output"
        if fault.errno in NO_ROOM:
            what = f"{name} cannot be written: {NO_ROOM[fault.errno]}; earlier files are as they were. Make room"
        else:
            what = f"{name}: {NO_ACCESS[fault.errno]}; earlier files are as they were. Give yourself access"
        sys.exit(f"{what}, then run the same command again.")
    finally:
        sys.stdout.flush()
        exit_on_signals()


def exit_without_collecting() -> None:
    """Skip Python's garbage collection at exit: with torch or MLflow imported it takes a second."""
    atexit.register(gc.freeze)


def _way_back() -> list[str]:
    """What else there is to say in a stage that DVC runs in the main checkout, where its earlier outputs are gone."""
    if os.environ.get("DVC_STAGE", "check") == "check" or Path(os.environ.get("DVC_ROOT", "")).resolve() != Path.cwd():
        return []
    return ["DVC removed what this stage had made before. `classifier restore` brings back what is committed."]


def disk_fault(error: BaseException) -> OSError | None:
    """The lack of room or of access behind an exception: libraries that cannot write raise others on top of it."""
    behind: BaseException | None = error
    while behind:
        if isinstance(behind, OSError) and behind.errno in (*NO_ROOM, *NO_ACCESS):
            return behind
        behind = behind.__cause__ or (None if behind.__suppress_context__ else behind.__context__)
    return None


def _check_temporary_folder() -> None:
    """Raise PipelineError if there is no folder for temporary files, which libraries ask for at places of their own."""
    try:
        tempfile.gettempdir()
    except FileNotFoundError as error:
        raise PipelineError(
            f"{error.strerror}: their disks are full or they may not be written to; earlier files are as they were. "
            "Make room, or set TMPDIR to a folder with room, then run the same command again."
        ) from None


def _check_place() -> None:
    """Raise PipelineError if the path of this folder has a character with another meaning in MLflow's addresses."""
    here = str(Path.cwd())
    if found := sorted(set(here) & set("%#?")):
        raise PipelineError(
            f"{here}: MLflow takes {' and '.join(found)} in a path for a part of an address; move or clone the "
            "repository to a folder without"
        )


# In an address: all up to its last @, whatever a password is made of; name:password@ without a scheme; and the value
# of a key that says it is secret, percent-encoded too. Addresses of files have no passwords, but may have an @.
_TELLING_KEY = (
    r"[\w.-]*(?:token|passw(?:or)?d|pwd|secret|credential|signature|(?<![a-z])sig|(?:access|account|api)[_-]?key)"
)
_SECRET = re.compile(
    r"(?<=://)(?<!sqlite://)(?<!file://)\S*(?=@)"
    r"|[^\s/:@'\"]+:(?!//)[^\s@'\"]+(?=@)"
    rf"|(?P<key>{_TELLING_KEY}[\w.-]*(?:=|%3D))(?:(?!%3B|%26)[^&\s;'\"])+",
    re.IGNORECASE,
)


def masked(text: str) -> str:
    """The text with stars in place of what is secret in the addresses in it.

    http://me:secret@host?token=secret becomes http://***@host?token=***.
    """
    return _SECRET.sub(lambda found: f"{found['key'] or ''}***", text)


def printable(text: str) -> str:
    """Return a line of text with escapes in place of what would move a terminal's cursor, or is not Unicode."""
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)
