"""Progress of long operations: a bar on a terminal; otherwise, as in a log, one line every ten seconds.

A line states the operation, the progress and the time left. Operations that take less than ten seconds print none.
No result depends on this module, so it is no dependency of a stage.
"""

import os
import sys
import threading
import time
from contextlib import suppress
from typing import Any, TypeAlias

from tqdm import tqdm

Bar: TypeAlias = "tqdm[Any] | Lines"

EVERY_SECONDS = 10.0


def progress(
    desc: str, unit: str, total: float | None = None, *, initial: float = 0, hidden: bool = False, leave: bool = True
) -> Bar:
    """Return a context manager to count progress: tqdm's bar, or Lines if standard error is no terminal.

    desc: the operation. unit: in the singular, or B for bytes. initial: units that were done before.
    hidden: show nothing. leave: whether the bar stays on the terminal at the end.
    """
    if hidden or sys.stderr.isatty():
        return tqdm(
            desc=desc, unit=unit, unit_scale=unit == "B", total=total, initial=initial, disable=hidden, leave=leave
        )
    return Lines(desc, unit, total, initial)


def report(stage: str) -> None:
    """Print how long a stage has been running whenever no other progress is shown, as during its imports."""
    if not sys.stderr.isatty():
        Lines(f"{stage} stage").__enter__()


def say(text: str) -> None:
    """Print a line to standard output at once, and postpone the next progress line to ten seconds later."""
    print(text, flush=True)
    _postpone()


class Lines:
    """A progress counter with the part of tqdm's interface that is used; a thread prints it when a line is due."""

    def __init__(self, desc: str, unit: str = "", total: float | None = None, initial: float = 0) -> None:
        self.desc, self.unit, self.total = desc, unit, total
        self.n = self.initial = initial
        self.started = time.monotonic()
        self.figures: dict[str, object] = {}

    def update(self, n: float = 1) -> None:
        self.n += n

    def set_description(self, desc: str) -> None:
        self.desc = desc

    def set_postfix(self, *, refresh: bool = True, **figures: object) -> None:
        self.figures = figures

    def __enter__(self) -> "Lines":
        global _thread
        if not _open:
            _postpone()
        _open.append(self)
        if _thread is None:
            _thread = threading.Thread(target=_write_lines, daemon=True)
            _thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        _open.remove(self)

    def __str__(self) -> str:
        seconds, done = time.monotonic() - self.started, self.n - self.initial
        parts = []
        if self.total:
            share = self.n / self.total
            parts.append(f"{self._format(self.n)} of {self._format(self.total)}{self._units()} ({share:.0%})")
        elif self.n:
            parts.append(f"{self._format(self.n)}{self._units()}")
        if self.total and done:
            parts.append(f"{tqdm.format_interval((self.total - self.n) * seconds / done)} left")
        else:
            parts.append(f"{tqdm.format_interval(seconds)} elapsed")
        parts += [f"{name} {figure}" for name, figure in self.figures.items()]
        return f"{self.desc}: {', '.join(parts)}"

    def _format(self, number: float) -> str:
        return tqdm.format_sizeof(number, "B") if self.unit == "B" else f"{number:,.0f}"

    def _units(self) -> str:
        return "" if self.unit == "B" else f" {self.unit}s"


_open: list[Lines] = []  # the innermost last
_due = 0.0  # time of the next line, by the monotonic clock
_thread: threading.Thread | None = None


def _postpone() -> None:
    global _due
    _due = time.monotonic() + EVERY_SECONDS


def _write_lines() -> None:
    while True:
        time.sleep(max(_due - time.monotonic(), EVERY_SECONDS / 100))
        if _open and time.monotonic() >= _due:
            with suppress(IndexError, OSError):  # the operation has just ended, or standard error is closed
                # Not through sys.stderr, whose lock this thread could hold when the process forks or ends
                os.write(2, f"{_open[-1]}\n".encode())
            _postpone()
