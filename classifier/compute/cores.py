"""How many cores there are for this process."""

import os


def usable_cores() -> int:
    """The cores that the system lets this process have; all of the machine where it does not say."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
