"""The README's table of a CSV."""

from collections.abc import Sequence
from pathlib import Path

from kernels.bench.cells import BOTH, DECODE, DIRECTIONS, FORWARD
from kernels.bench.record import PROBES, Row

LEFT_OUT = ("linear_attention_unnormalized", "delta_rule")
"""Operators that are there to compare kernels with those of others; they are in the CSV."""
WORDS = {FORWARD: "forward", BOTH: "forward and backward", DECODE: "one token after T"}
BEGIN, END = "<!-- performance: {name} -->", "<!-- performance ends -->"


def table(rows: Sequence[Row]) -> list[str]:
    """Microseconds a token by length, for the narrowest heads: a line that says of what, and the table."""
    shown = [row for row in rows if row["op"] not in (*PROBES, *LEFT_OUT)]
    if not shown:
        return ["Nothing was measured."]
    width = min(int(row["head_dim"]) for row in shown)
    shown = [row for row in shown if int(row["head_dim"]) == width]
    lengths = sorted({int(row["T"]) for row in shown})
    first = next((row for row in shown if row["direction"] != DECODE), shown[0])
    tokens = int(first["batch"]) * int(first["T"])
    lines = [
        f"{first['device']}, {first['versions']}, commit {first['commit'] or 'unknown'}; {first['dtype']}, "
        f"{first['heads']} heads of {width}, {tokens:,} tokens a call, medians.",
        "",
        f"| µs a token | | {' | '.join(f'T = {length:,}' for length in lengths)} |",
        "|---|---|" + "---|" * len(lengths),
    ]
    kinds = dict.fromkeys((row["direction"], row["op"], row["provider"]) for row in shown)
    for kind in sorted(kinds, key=lambda kind: DIRECTIONS.index(kind[0])):
        found = {int(r["T"]): r for r in shown if (r["direction"], r["op"], r["provider"]) == kind}
        cells = " | ".join(_cell(found.get(length)) for length in lengths)
        lines.append(f"| {WORDS[kind[0]]} | `{kind[1]}`, {kind[2]} | {cells} |")
    return lines


def put_into(text: str, name: str, lines: Sequence[str]) -> str:
    """`text` with the lines between the marks of the CSV `name`, in place of what was there.

    Raises:
        ValueError: the marks are not there.
    """
    begin = BEGIN.format(name=name)
    before, found, rest = text.partition(begin + "\n")
    _, end, after = rest.partition(END)
    if not found or not end:
        raise ValueError(f"there is no line {begin} with {END} after it.")
    return before + found + "\n" + "\n".join(lines) + "\n\n" + end + after


def name_of(path: Path) -> str:
    """What marks a CSV's table."""
    return Path(path).name


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    if not row["ms"]:
        return "wrong" if row["note"].startswith("wrong") else "failed"
    tokens = 1 if row["direction"] == DECODE else int(row["batch"]) * int(row["T"])
    time = float(row["ms"]) * 1000 / tokens
    return f"{time:.3g}" if time < 1000 else f"{time:,.0f}"
