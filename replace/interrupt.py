"""Ctrl-C while a command is still importing, which torch makes last for seconds: a sentence, no traceback."""

import os
import sys
from types import TracebackType

CODE = 130
"""The exit code of a command that Ctrl-C ended, as shells have it."""


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
