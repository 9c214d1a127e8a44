"""Asking what may be broken: a process of its own for packages, one guard for everything else."""

import json
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

T = TypeVar("T")

_running: set[subprocess.Popen] = set()


@dataclass
class Answer:
    """What a process said before it ended, and why it ended badly, or None."""

    facts: dict[str, Any] = field(default_factory=dict)
    why: str | None = None


def guarded(what: str, function: Callable[[], T], default: T, failed: dict[str, str]) -> T:
    """The function's value; where it raises, `default`, and the reason in `failed` under `what`."""
    try:
        return function()
    # Whatever is broken, all else is still to be told: a damaged installation or system raises anything, and
    # no list of exceptions would be complete.
    except Exception as error:  # noqa: BLE001
        failed[what] = f"{type(error).__name__}: {' '.join(str(error).split())}"
        return default


def ask(module: str, function: str, *arguments: str, limit: float) -> Answer:
    """Call `module.function(tell, *arguments)` in a fresh process that has this one's path.

    The function reports by `tell(dict)`, as often as it likes; what it told before it failed counts.

    Args:
        limit: seconds after which the process and all it started are killed.
    """
    token = secrets.token_hex(16)  # tells our lines from what packages print
    code = (
        "import importlib, json, os, sys\n"
        f"tell = lambda facts: os.write(1, ('\\n{token}' + json.dumps(facts) + '\\n').encode())\n"
        f"getattr(importlib.import_module({module!r}), {function!r})(tell, *{arguments!r})\n"
        f"tell({{'{token}': True}})\n"
        "os._exit(0)\n"  # what a package does when Python ends is no matter here
    )
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path},
        start_new_session=True,
    )
    _running.add(process)
    late = False
    try:
        out, err = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        late = True
        _kill(process)
        try:
            out, err = process.communicate(timeout=5)
        except subprocess.TimeoutExpired:  # something that it started keeps the pipes open
            out, err = b"", b""
    finally:
        _running.discard(process)
    facts: dict[str, Any] = {}
    for line in out.decode(errors="replace").splitlines():
        if line.startswith(token):
            facts |= json.loads(line.removeprefix(token))
    if facts.pop(token, False):
        return Answer(facts)
    return Answer(facts, _why(process.returncode, err.decode(errors="replace"), limit if late else None))


def _why(code: int | None, errors: str, limit: float | None) -> str:
    """Why a process was not done, from how it ended and what it wrote last."""
    if limit is not None:
        return f"it did not end within {limit:.0f} s"
    if code is not None and code < 0:
        return f"the process was ended by signal {-code} ({signal.Signals(-code).name})"
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    if lines and code == 1:
        return lines[-1]
    return f"the process ended early, with exit code {code}"


def end_all() -> None:
    """Kill every process that `ask` still waits for."""
    for process in list(_running):
        _kill(process)


def _kill(process: subprocess.Popen) -> None:
    """The process and what it started: each has a session of its own."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):  # it is gone; macOS says so in the second way
        return
