"""The CSV: one row a form, length and direction."""

import csv
import io
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from kernels.bench.cells import DECODE, Cell

COLUMNS = (
    "op", "provider", "direction", "T", "batch", "heads", "kv_heads", "head_dim", "dtype", "ms", "p20", "p80",
    "samples", "peak_mib", "GB/s", "TFLOP/s", "roofline", "relative_cost", "correct", "note", "device",
    "versions", "commit",
)  # fmt: skip
PROBES = ("copy", "matmul")
Row = dict[str, str]


class Place(NamedTuple):
    """Where, with what and of which commit the figures are."""

    device: str
    versions: str
    commit: str


class Figures(NamedTuple):
    """Of a cell's samples, in milliseconds."""

    ms: float
    p20: float
    p80: float


def rows(cells: Sequence[Cell], place: Place) -> list[Row]:
    """The rows of the cells that have samples, or a note why not.

    `roofline` is the share of the time that the copy and the product of the same run would need for the bytes
    and operations that cannot be avoided; `relative_cost` is the time a token over that at the shortest T.
    """
    measured = [cell for cell in cells if cell.seconds]
    per_token: dict[tuple, float] = {}
    for cell in sorted(measured, key=lambda cell: cell.shape.length):
        per_token.setdefault(_kind(cell), _per_token(cell))
    rates = {
        cell.op: (cell.flops if cell.op == "matmul" else cell.bytes) / _figures(cell).ms
        for cell in measured
        if cell.op in PROBES
    }
    ideal = {
        id(cell): max(cell.bytes / rates["copy"], cell.flops / rates["matmul"]) if len(rates) == 2 else None
        for cell in measured
    }
    found: list[Row] = []
    figures: list[object]
    for cell in cells:
        if cell.seconds:
            figures = _measured(cell, ideal[id(cell)], per_token[_kind(cell)])
        elif cell.note:
            figures = [*[None] * 9, False]
        else:
            continue
        dtype = str(cell.dtype).removeprefix("torch.")
        values = [cell.op, cell.provider, cell.direction, *_sizes(cell), dtype, *figures, cell.note, *place]
        found.append(dict(zip(COLUMNS, map(_text, values), strict=True)))
    return found


def _sizes(cell: Cell) -> list[object]:
    batch, length, heads, groups, width = cell.shape
    return [length, batch, heads, groups, width]


def _measured(cell: Cell, ideal: float | None, cheapest: float) -> list[object]:
    """From `ms` to `correct`.

    Args:
        ideal: milliseconds that the bytes and operations need at the least, where that is known.
        cheapest: milliseconds a token at the shortest T.
    """
    figures = _figures(cell)
    rates = [cell.bytes / figures.ms / 1e6, cell.flops / figures.ms / 1e9]
    peak = None if cell.peak is None else cell.peak / 2**20
    share = None if ideal is None else ideal / figures.ms
    return [*figures, len(cell.seconds), peak, *rates, share, _per_token(cell) / cheapest, True]


def write(path: Path, content: Iterable[Row]) -> None:
    """Write the rows under a temporary name and rename it, so that a reader finds a whole file.

    Raises:
        OSError: the folder cannot be written.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(content)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text.getvalue())
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def read(path: Path) -> list[Row]:
    """The rows of a CSV of this benchmark.

    Raises:
        OSError: there is none.
        ValueError: it is something else.
    """
    with Path(path).open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(
                f"{path} is not a CSV of this benchmark; expected the columns {', '.join(COLUMNS)}."
            )
        return list(reader)


def _kind(cell: Cell) -> tuple:
    return cell.op, cell.provider, cell.direction, cell.shape.width


def _per_token(cell: Cell) -> float:
    tokens = 1 if cell.direction == DECODE or cell.op in PROBES else cell.shape.batch * cell.shape.length
    return _figures(cell).ms / tokens


def _figures(cell: Cell) -> Figures:
    at = torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64)
    samples = torch.tensor(cell.seconds, dtype=torch.float64) * 1000
    return Figures(*samples.quantile(at).tolist())


def _text(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.5g}" if isinstance(value, float) else str(value)
