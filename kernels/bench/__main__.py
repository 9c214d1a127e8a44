"""`python -m kernels.bench`: measure on this machine, or turn a CSV into the README's table."""

import argparse
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

INTERRUPTED = 130
"""The exit code of a command that Ctrl-C ended, as shells have it."""


class Mistake(Exception):
    """What a person can mend, in one sentence."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise Mistake(f"{message}.")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit code is 0, or 2 after a mistake that one sentence on stderr explains."""
    try:
        options = _parser().parse_args(arguments)
        return _table(options) if options.table else _bench(options)
    except (Mistake, OSError) as error:
        sys.stderr.write(f"error: {_sentence(error)}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("error: interrupted; the rows that were measured are kept.\n")
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m kernels.bench", description=__doc__, allow_abbrev=False)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="by default a GPU where there is one")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="where CSV and plot go; by default outputs/bench/<now>",
    )
    parser.add_argument("--quick", action="store_true", help="few lengths and rounds: well under a minute")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print the README's table of this CSV")
    parser.add_argument(
        "--into", type=Path, metavar="README", help="with --table: put it between the marks in this file"
    )
    return parser


def _bench(options: argparse.Namespace) -> int:
    if options.into:
        raise Mistake("--into is for --table.")
    # Torch takes seconds to import, which a mistake in the arguments need not wait for.
    import torch

    from kernels.allocator import keep_freed_memory
    from kernels.bench.machine import file_name
    from kernels.bench.run import bench, ops_for
    from kernels.bench.size import size_for

    if options.device == "cuda" and not torch.cuda.is_available():
        raise Mistake("--device cuda is not possible: torch finds no GPU.")
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    folder = options.out or Path("outputs") / "bench" / time.strftime("%Y-%m-%d_%H-%M-%S")
    folder.mkdir(parents=True, exist_ok=True)  # before minutes of measuring
    path = folder / f"{file_name(device)}.csv"
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    logging.getLogger("kernels.bench").setLevel(logging.INFO)
    keep_freed_memory()  # as a run does; else what a form costs depends on what was freed before it
    rows = bench(size_for(device, options.quick), ops_for(device), device, path)
    wrong = [row for row in rows if row["correct"] == "False"]
    sys.stdout.write(f"{path}\n")
    if wrong:
        sys.stdout.write(f"{len(wrong)} of {len(rows)} forms were not timed; the column note says why.\n")
    return 0


def _table(options: argparse.Namespace) -> int:
    from kernels.bench.record import read
    from kernels.bench.table import name_of, put_into, table

    try:
        lines = table(read(options.table))
        if options.into is None:
            sys.stdout.write("\n".join(lines) + "\n")
            return 0
        text = put_into(options.into.read_text(encoding="utf-8"), name_of(options.table), lines)
    except ValueError as error:
        raise Mistake(str(error)) from error
    options.into.write_text(text, encoding="utf-8")
    return 0


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError):
        return f"{error.filename or 'The disk'} cannot be read or written: {error.strerror or error}."
    return " ".join(str(error).split())


if __name__ == "__main__":
    sys.exit(main())
