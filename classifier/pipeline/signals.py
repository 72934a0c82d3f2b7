"""SIGINT (Ctrl-C) and SIGTERM: they end a command, at once or where it is safe to stop."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(BaseException):
    """One of SIGNALS has arrived. The exception's notes are told to the user."""

    def __init__(self, number: int) -> None:
        self.number = number


def listen() -> None:
    """Make a signal raise Interrupted in the main thread."""
    _handle(_raise)


def exit_on_signals() -> None:
    """Make a signal exit at once, as during imports and at exit, where an exception would print a traceback."""
    _handle(_exit)


class PendingSignal:
    """What has arrived while signals are held back."""

    def __init__(self, seconds: float) -> None:
        self.number: int | None = None
        self.is_over = False
        self.timer = threading.Timer(seconds, self._insist)
        self.timer.daemon = True

    def receive(self, number: int, frame: FrameType | None) -> None:
        """Remember a signal until time is up; a Ctrl-C after it is no longer held back.

        Several SIGTERM may be of one event: SLURM and torchrun each end a process, as does, in a stage, the end of DVC.
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
    """Hold signals back, so that what is going on comes to a place where it can stop: for `seconds` at most."""
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
