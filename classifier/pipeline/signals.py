"""SIGINT (Ctrl-C) and SIGTERM: exit at once, or at the next point where it is safe to stop."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(BaseException):
    """One of SIGNALS has arrived. `run_main` prints the exception's notes."""

    def __init__(self, number: int) -> None:
        self.number = number


def listen() -> None:
    """Make a signal raise Interrupted in the main thread."""
    _handle(_raise)


def exit_on_signals() -> None:
    """Make a signal exit at once, as during imports and at exit, where an exception would print a traceback."""
    _handle(_exit)


class PendingSignal:
    """The first signal that arrives while signals are deferred.

    seconds: how long it may be deferred; then it is sent again.
    """

    def __init__(self, seconds: float) -> None:
        self.number: int | None = None
        self.is_over = False
        self.timer = threading.Timer(seconds, self._insist)
        self.timer.daemon = True

    def receive(self, number: int, frame: FrameType | None) -> None:
        """Remember a signal until time is up. A Ctrl-C after it raises Interrupted at once.

        A second SIGTERM does not: one event can send several, from SLURM, from torchrun, and when DVC dies.
        """
        if self.is_over or (self.number is not None and number == signal.SIGINT):
            _raise(number, frame)
        if self.number is None:
            self.number = number
            self.timer.start()

    def release(self) -> None:
        """Raise Interrupted if a signal has arrived."""
        if self.number is not None:
            raise Interrupted(self.number)

    def _insist(self) -> None:
        self.is_over = True
        os.kill(os.getpid(), self.number or signal.SIGTERM)


@contextmanager
def defer_signals(seconds: float) -> Iterator[PendingSignal]:
    """Defer signals for at most `seconds`, until the block ends or calls `release` where it is safe to stop."""
    held = PendingSignal(seconds)
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number, handler in before.items():
        if handler == _raise:
            signal.signal(number, held.receive)
    try:
        yield held
    finally:
        held.timer.cancel()
        for number, handler in before.items():
            signal.signal(number, handler)
    held.release()


def _handle(handler: Callable[[int, FrameType | None], None]) -> None:
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:  # the shell ignores SIGINT in background jobs
            signal.signal(number, handler)


def _raise(number: int, frame: FrameType | None) -> None:
    raise Interrupted(number)


def _exit(number: int, frame: FrameType | None) -> None:
    os.write(2, b"interrupted\n")
    os._exit(128 + number)
