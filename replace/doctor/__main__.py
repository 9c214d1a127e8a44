"""`python -m replace.doctor [json=true] [limit=<seconds>]`: one screen about this machine and its packages.

Exit code 0: nothing hinders a run; 1: something does; 2: the command line is at fault.
"""

import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from replace.interrupt import CODE, end_quietly

if __name__ == "__main__":
    end_quietly()

from replace.doctor import advice, machine, packages
from replace.doctor.probes import Answer, ask, end_all, guarded
from replace.doctor.screen import screen
from replace.errors import UserError, bad_value

USAGE = """\
python -m replace.doctor        this machine, its packages, what auto takes, and how to mend what is wrong
    json=true                   the same as JSON
    limit=<seconds>             how long a package may take to import; by default 120
"""
SCHEMA = 1
LIMIT = 120.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: that of the process) and return the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] in ("-h", "--help", "help=true"):
        sys.stdout.write(USAGE)
        return 0
    try:
        as_json, limit = _parse(arguments)
        facts = examine(limit)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except KeyboardInterrupt:
        end_all()
        sys.stderr.write("error: interrupted; nothing was changed.\n")
        return CODE
    text = json.dumps(facts, indent=1) + "\n"
    if not as_json:
        text = guarded("the screen", lambda: screen(facts), text, {})
    _write(text)
    return 0 if facts["ok"] else 1


def _write(text: str) -> None:
    """Write to standard output, which may be closed, full, or a pipe that nobody reads any more."""
    if sys.stdout is None:
        return
    encoding = sys.stdout.encoding or "utf-8"  # a terminal may have none for what a package's error says
    try:
        sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding))
        sys.stdout.flush()
    except OSError as error:
        # Python tries again when it ends, and would say in lines of its own that it cannot.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            sys.stderr.write(f"error: the screen cannot be written: {error.strerror}.\n")


def examine(limit: float = LIMIT) -> dict[str, Any]:
    """Everything that can be found out, without secrets; what could not be is under "failed", with why.

    Args:
        limit: seconds that a process may take.
    """
    failed: dict[str, str] = {}

    def known(what: str, function: Callable[[], Any], default: Any) -> Any:
        return guarded(what, function, default, failed)

    # Two at a time, each in a process of its own: the waiting is theirs.
    with ThreadPoolExecutor(max_workers=1) as pool:
        torch = pool.submit(lambda: _asked("torch_facts", limit))
        run = pool.submit(lambda: _asked("run_facts", limit))
        facts: dict[str, Any] = {
            "schema": SCHEMA,
            "project": known("the project's version", lambda: packages.version_of(packages.PROJECT), None),
            "python": known("Python", machine.python_facts, {}),
            "memory": known("memory", machine.memory_facts, {}),
            "nvidia_gpus": known("the driver's GPUs", machine.nvidia_gpus, []),
            "places": known(
                "free space",
                lambda: {
                    "cache": machine.place_facts(machine.cache_dir()),
                    "here": machine.place_facts(Path.cwd()),
                },
                {},
            ),
            "caches": known(
                "the caches",
                lambda: {name: machine.size_of(place) for name, place in machine.cache_places().items()},
                {},
            ),
            "wandb": known("W&B", machine.wandb_facts, {}),
            "unmet": known("what is required", packages.unmet, []),
            "kernels_package": known("the package kernels", packages.kernels_facts, {}),
            "libraries": known("libraries", lambda: packages.libraries(limit), {}),
            "torch": known("torch", torch.result, {}),
            "run": known("a run's code", run.result, {}),
        }
    facts["precision_advice"] = advice.precision_advice(facts)
    facts["support"] = {
        label: dict(zip(("cuda", "cpu", "macos"), cells, strict=True))
        for label, cells in advice.SUPPORT.items()
    }
    facts["failed"] = failed
    found = known("problems", lambda: [asdict(problem) for problem in advice.problems(facts)], [])
    facts["problems"] = found
    facts["ok"] = bool(facts["run"].get("imports")) and not any(problem["hinders"] for problem in found)
    return machine.without_secrets(facts)


def _asked(function: str, limit: float) -> dict[str, Any]:
    answer: Answer = ask(packages.INSIDE, function, limit=limit)
    return {**answer.facts, "why": answer.why}


def _parse(arguments: Sequence[str]) -> tuple[bool, float]:
    """Whether JSON is wanted, and the limit in seconds.

    Raises:
        UserError: a key or a value is not possible.
    """
    options: dict[str, str] = {}
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key not in ("json", "limit") or "=" not in argument:
            raise bad_value("argument", argument, "json=true or limit=<seconds>")
        options[key] = value
    wanted = options.get("json", "false").lower()
    if wanted not in ("true", "false"):
        raise bad_value("json", options["json"], ("true", "false"))
    limit = options.get("limit", str(LIMIT))
    try:
        seconds = float(limit)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise bad_value("limit", limit, "a number of seconds above 0")
    return wanted == "true", seconds


if __name__ == "__main__":
    sys.exit(main())
