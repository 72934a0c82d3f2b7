"""Read by every Python process that a test starts: note that it started, and at its end how long it took.

tests/durations.py names the file in PROCESS_RECORD and has this folder on PYTHONPATH.
"""

import os
import sys


def record(*, forked: bool = False) -> None:
    import atexit
    import json
    import time

    pid, started = os.getpid(), time.monotonic()
    test = os.environ.get("PYTEST_CURRENT_TEST", "").partition(" ")[0]
    command = [argument[:100] for argument in sys.orig_argv[1:4]]

    def note(**values: object) -> None:
        try:
            file = os.open(os.environ.get("PROCESS_RECORD", os.devnull), os.O_WRONLY | os.O_APPEND)
            os.write(file, f"{json.dumps({'pid': pid, **values})}\n".encode())  # at once: others write there too
            os.close(file)
        except OSError:  # the tests are over, or this process may not write there
            pass

    def ended() -> None:
        if os.getpid() == pid:
            note(seconds=time.monotonic() - started, processor_seconds=time.process_time())

    note(test=test, command=command, forked=forked)
    atexit.register(ended)


if "PROCESS_RECORD" in os.environ:
    record()
