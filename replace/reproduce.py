"""`python -m replace.reproduce run=<folder>`: run it again from its record, and compare the figures."""

import json
import logging
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from replace.interrupt import code_of, end_quietly, stoppable
from replace.launch import refuse_several

if __name__ == "__main__":
    end_quietly()  # the imports below take seconds

from eval.measurements import check
from eval.metrics import read_metrics, without_times
from replace.compose import differences, load_config
from replace.config import Config, LoggerConfig
from replace.console import Console, RunLog
from replace.errors import UserError, bad_value
from replace.files import atomic_write, expanded
from replace.pipeline import run
from replace.provenance import COMPARED, FILE, differing, environment
from replace.validation import validate

logger = logging.getLogger(__name__)

USAGE = """\
python -m replace.reproduce run=<run folder>    run it again from its recorded config, and compare
    out=<folder>        the new folder, by default <run folder>/reproduced/<date and time>; one in
                        which this was begun before is gone on with
Exit code 0: every figure, times aside, is the same to the bit; 1: some are not, and are listed.
"""
SHOWN = 40
"""Differences that are listed; reproduction.json has them all."""

Difference = tuple[str, Any, Any]
"""Where two metrics differ, and both values."""

ABSENT = "absent"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        (sys.stdout if given else sys.stderr).write(USAGE)
        return 0 if given else 2
    try:
        refuse_several("replace.reproduce")
        options = _parse(given)
        folder = expanded(options["run"]).resolve()
        named = options.get("out") or str(folder / "reproduced" / time.strftime("%Y-%m-%d_%H-%M-%S"))
        out = expanded(named).resolve()
        with stoppable():
            return _report(folder, out, *reproduce(folder, out))
    except UserError as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
    except OSError as error:
        told = f"{error.filename or 'The disk'} cannot be read or written: {error.strerror or error}."
        sys.stderr.write(f"error: {told}\n")
    except KeyboardInterrupt as interrupt:
        again = shlex.join(["python", "-m", "replace.reproduce", f"run={folder}", f"out={out}"])
        sys.stderr.write(f"error: interrupted; `{again}` continues.\n")
        return code_of(interrupt)
    return 2


def reproduce(folder: Path, out: Path) -> tuple[list[Difference], list[str]]:
    """Run a finished run again.

    Args:
        folder: the run.
        out: the folder of the new run.

    Returns:
        where its metrics differ from the recorded ones, times aside; and what else differs: versions, commit,
        machine, weights, text.

    Raises:
        UserError: there is no such run, it did not finish, or `out` is the folder of something else.
    """
    config, recorded = load_config(folder, "run"), read_metrics(folder)
    if "verdict" not in recorded:
        raise bad_value("run", str(folder), "a run that has finished")
    provenance = json.loads((folder / FILE).read_text(encoding="utf-8")) if (folder / FILE).is_file() else {}
    threads = config.threads or provenance.get("threads")
    config = replace(config, resume=None, dry_run=False, threads=threads, logger=LoggerConfig())
    validate(config)
    check(config)
    _check_out(config, out)
    out.mkdir(parents=True, exist_ok=True)
    _log(out)
    here = environment(provenance.get("device", "cpu")) | {"threads": threads}
    for line in differing(provenance, {name: here[name] for name in COMPARED if name != "device"}):
        logger.warning("not as it was: %s", line)
    run(config, out)
    now = json.loads((out / FILE).read_text(encoding="utf-8"))
    changed = differing(provenance, now)
    changed += [f"{name} {was}, now {has}" for name, was, has in _hashes(provenance, now)]
    return list(compare(without_times(recorded), without_times(read_metrics(out)))), changed


def compare(old: Any, new: Any, where: str = "") -> Iterator[Difference]:
    """Every leaf in which two metrics differ, by its dotted place; what one lacks is `absent` there."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys([*old, *new]):
            place = f"{where}.{key}" if where else str(key)
            yield from compare(old.get(key, ABSENT), new.get(key, ABSENT), place)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, (one, other) in enumerate(zip(old, new, strict=True)):
            yield from compare(one, other, f"{where}[{index}]")
    elif old != new or type(old) is not type(new):
        yield where, old, new


def _hashes(old: dict, new: dict) -> Iterator[Difference]:
    """What differs of the weights and of the text, where both records have it."""
    for part in ("model", "data"):
        for where, was, has in compare(old.get(part, {}), new.get(part, {}), part):
            if where.endswith("sha256") and ABSENT not in (was, has):
                yield where, was, has


def _report(folder: Path, out: Path, found: list[Difference], changed: list[str]) -> int:
    """Write reproduction.json and say how it went; returns the exit code."""
    record = {
        "run": str(folder),
        "equal": not found,
        "differences": [{"figure": where, "recorded": old, "now": new} for where, old, new in found],
        "environment": changed,
    }
    atomic_write(out / "reproduction.json", json.dumps(record, indent=1) + "\n")
    for line in changed:
        sys.stdout.write(f"not as it was: {line}\n")
    for where, old, new in found[:SHOWN]:
        sys.stdout.write(f"{where}: {_short(old)}, now {_short(new)}\n")
    if len(found) > SHOWN:
        sys.stdout.write(f"... and {len(found) - SHOWN} more in {out / 'reproduction.json'}\n")
    word = f"{len(found)} figures differ" if found else "equal: every figure is the same"
    sys.stdout.write(f"{word}, times aside ({out}).\n")
    return 1 if found else 0


def _short(value: Any) -> str:
    """A value on one short line."""
    text = value if value == ABSENT else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _parse(arguments: Sequence[str]) -> dict[str, str]:
    """run= and out=.

    Raises:
        UserError: something else was given, or no run.
    """
    options: dict[str, str] = {}
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key not in ("run", "out") or not value.strip() or key in options:
            raise bad_value("argument", argument, "run=<run folder> and out=<folder>, each once")
        options[key] = value
    if "run" not in options:
        raise bad_value("run", None, "run=<run folder>")
    return options


def _check_out(config: Config, out: Path) -> None:
    """A folder that is new, or in which the very same run was begun."""
    if (out / "config.json").exists():
        for key, _, other in differences(config, load_config(out, "out")):
            raise bad_value("out", str(out), f"a new folder; there is a run with {key}={other!r}")
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise bad_value("out", str(out), "a new folder")


def _log(out: Path) -> None:
    """The project's lines on the console and, with everybody's warnings, in run.log."""
    console, file = Console(), RunLog(out / "run.log", encoding="utf-8", delay=True)
    console.setFormatter(logging.Formatter("%(message)s"))
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger().handlers[:] = [file]
    for room in ("replace", "distill", "eval", "kernels"):
        log = logging.getLogger(room)
        log.setLevel(logging.INFO)
        log.handlers[:] = [console]


if __name__ == "__main__":
    sys.exit(main())
