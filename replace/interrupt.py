"""What a signal does to a command.

While modules are imported, which torch makes last for seconds, Ctrl-C ends with a sentence. In a `stoppable`
block SIGINT, SIGTERM and SIGHUP raise `Stopped`, and inside `held` a first one waits until a checkpoint is
written.
"""

import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType, TracebackType

CODE = 130
"""The exit code of a command that Ctrl-C ended, as shells have it."""

SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")
"""Ctrl-C, what a scheduler sends before it kills, and a terminal that is gone."""

logger = logging.getLogger(__name__)


class Stopped(KeyboardInterrupt):
    """A signal asked the command to end.

    Attributes:
        code: the exit code that shells have for this signal.
    """

    def __init__(self, said: str = "", code: int = CODE) -> None:
        super().__init__(*([said] if said else []))
        self.code = code


@dataclass
class Hold:
    """A block that a first signal does not interrupt.

    Attributes:
        code: the exit code of the signal that has come; None before.
    """

    code: int | None = None

    def end(self) -> None:
        """Raise what was held back, if there is anything.

        Raises:
            Stopped: a signal has come.
        """
        if self.code is not None:
            raise Stopped(code=self.code)


_holds: list[Hold] = []


def code_of(interrupt: BaseException | None) -> int:
    """The exit code for an interrupt, whoever raised it."""
    return interrupt.code if isinstance(interrupt, Stopped) else CODE


@contextmanager
def stoppable() -> Iterator[None]:
    """In this block SIGINT, SIGTERM and SIGHUP raise `Stopped`; what handled them before does so again after.

    A signal that is ignored, as `nohup` has it, stays so. Only the main thread may set handlers; elsewhere
    nothing changes.
    """
    before = {}
    if threading.current_thread() is threading.main_thread():
        for name in SIGNALS:
            number = getattr(signal, name, None)  # not every system knows SIGHUP
            if number is not None and signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, _handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def held() -> Iterator[Hold]:
    """Hold a first signal back until `Hold.end` or the end of the block; a second one is not held back."""
    hold = Hold()
    _holds.append(hold)
    try:
        yield hold
    finally:
        _holds.remove(hold)
    hold.end()


def _handle(number: int, frame: FrameType | None) -> None:
    code = 128 + number
    if _holds and _holds[-1].code is None:
        _holds[-1].code = code
        logger.info("asked to stop; a checkpoint is written after this step (once more: stops at once)")
        return
    raise Stopped(code=code)


def end_quietly() -> None:
    """From now on an interrupt that nothing catches ends the process with one sentence and exit code 130."""
    sys.excepthook = _hook


def _hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    sys.stderr.write("error: interrupted before anything was begun.\n")
    sys.stderr.flush()
    os._exit(CODE)  # an excepthook cannot choose the exit code; nothing is open yet
