"""How a command fails: an error that the user can fix, no space or access, or a signal."""

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
    """An error that the user can fix. The message names the file, row, key or value, and what to do next."""


def run_main(main: Callable[[], None]) -> None:
    """Run a command's `main` and exit.

    Exit codes: 0 done; 1 failed, with one message on standard error for a PipelineError, a full disk or missing access;
    130 or 143 interrupted by SIGINT or SIGTERM. Any other exception is a bug of the pipeline and keeps its traceback.
    """
    exit_without_collecting()
    listen()
    try:
        _check_temporary_folder()
        _check_working_directory()
        main()
    except PipelineError as error:
        lines = [*masked(str(error)).split("\n"), *_restore_hint()]
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
            what = f"{name} cannot be written: {NO_ROOM[fault.errno]}; earlier files are unchanged. Free some space"
        else:
            what = f"{name}: {NO_ACCESS[fault.errno]}; earlier files are unchanged. Allow access"
        sys.exit(f"{what}, then run the same command again.")
    finally:
        sys.stdout.flush()
        exit_on_signals()


def exit_without_collecting() -> None:
    """Skip Python's garbage collection at exit: with torch or MLflow imported it takes a second."""
    atexit.register(gc.freeze)


def _restore_hint() -> list[str]:
    """Return what to add to an error of a stage that DVC runs in the main checkout: DVC removed its outputs."""
    if os.environ.get("DVC_STAGE", "check") == "check" or Path(os.environ.get("DVC_ROOT", "")).resolve() != Path.cwd():
        return []
    return ["DVC removed the earlier outputs of this stage. `classifier restore` restores the committed ones."]


def disk_fault(error: BaseException) -> OSError | None:
    """Return the OSError for lack of space or access that caused an exception, if any; libraries wrap it in others."""
    behind: BaseException | None = error
    while behind:
        if isinstance(behind, OSError) and behind.errno in (*NO_ROOM, *NO_ACCESS):
            return behind
        behind = behind.__cause__ or (None if behind.__suppress_context__ else behind.__context__)
    return None


def _check_temporary_folder() -> None:
    """Raise PipelineError if no folder for temporary files is writable; libraries would raise other errors."""
    try:
        tempfile.gettempdir()
    except FileNotFoundError as error:
        raise PipelineError(
            f"{error.strerror}: their disks are full or they are not writable; earlier files are unchanged. "
            "Free some space, or set TMPDIR to a folder with space, then run the same command again."
        ) from None


def _check_working_directory() -> None:
    """Raise PipelineError if the working directory has a character in its path that MLflow misreads in URIs."""
    here = str(Path.cwd())
    if found := sorted(set(here) & set("%#?")):
        raise PipelineError(
            f"{here}: MLflow does not support {' and '.join(found)} in this path; move the repository elsewhere"
        )


# In a URL: everything up to its last @, because passwords may hold any character; name:password@ without a scheme; the
# value of a key that names a secret, also percent-encoded. URLs of files have no passwords, but may have an @.
_KEY_NAME = (
    r"[\w.-]*(?:token|passw(?:or)?d|pwd|secret|credential|signature|(?<![a-z])sig|(?:access|account|api)[_-]?key)"
)
_SECRET = re.compile(
    r"(?<=://)(?<!sqlite://)(?<!file://)\S*(?=@)"
    r"|[^\s/:@'\"]+:(?!//)[^\s@'\"]+(?=@)"
    rf"|(?P<key>{_KEY_NAME}[\w.-]*(?:=|%3D))(?:(?!%3B|%26)[^&\s;'\"])+",
    re.IGNORECASE,
)


def masked(text: str) -> str:
    """Return the text with stars in place of the secrets in URLs.

    http://me:secret@host?token=secret becomes http://***@host?token=***.
    """
    return _SECRET.sub(lambda found: f"{found['key'] or ''}***", text)


def printable(text: str) -> str:
    """Return a line of text with escapes in place of control characters and of what is not Unicode."""
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)
