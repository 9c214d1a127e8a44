"""Needles over length and depth in the report: a table by form, and a heatmap."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from eval.plots import PHASE_WORDS, RED, NotMeasured, panels_of
from eval.sections import SECTIONS, Section, table
from eval.words import DASH, bounds

MOST_BORDERS = 32
"""Borders between blocks that are drawn in one column; more would be one grey field."""


def text(phases: dict, names: list[str]) -> str:
    """The student's figures over the cells that prove something, the twin and the teacher beside them."""
    last = names[-1]
    grid = phases[last]["niah_grid"]
    teacher = phases["teacher"]["niah_grid"]["means"] if "teacher" in names[:-1] else []
    rows = []
    for entry in grid["means"]:
        alike = [mean for mean in teacher if all(mean[k] == entry[k] for k in ("form", "length"))]
        theirs = alike[0] if alike else {}
        off = entry.get("off")
        rows.append(
            [
                f"{entry['length']:,}",
                entry["form"],
                f"{entry['cells']} of {entry['of']}",
                _share(entry, "exact", "interval"),
                _share(off, "exact", "interval"),
                _share(entry, "first", "first_interval"),
                _share(off, "first", "first_interval"),
                _share(entry["all"], "exact", "interval"),
                _share(theirs.get("all"), "exact", "interval"),
                _share(theirs.get("all"), "first", "first_interval"),
            ]
        )
    columns = ["tokens", "form", "cells that prove something", "exact", "both off", "ranked first"]
    columns += ["ranked first, both off", "exact in all cells", "teacher, exact", "teacher, ranked first"]
    marked = [cell for cell in grid["cells"] if cell.get("proves_nothing")]
    why = ", ".join(dict.fromkeys(cell["why"] for cell in marked))
    said = (
        f"{PHASE_WORDS[last]}. Exact: the answer that is really generated begins with the value. Ranked "
        f"first: the value is the likeliest of {grid['candidates']} of the same form (chance "
        f"{1 / grid['candidates']:.2f}). Both off: without linear memory and retained pairs, on the same "
        "episodes."
    )
    if marked:
        said += f" {len(marked)} of {len(grid['cells'])} cells prove nothing about a memory: {why}."
    return f"{said}\n\n{table(columns, rows)}"


def _share(entry: dict | None, key: str, interval: str) -> str:
    """A rate with its interval."""
    if not entry or entry.get(key) is None:
        return DASH
    return f"{entry[key]:.2f} {bounds(entry[interval], '.2f')}"


def picture(phases: dict, names: list[str]) -> Figure:
    """A panel for each form; a row for each phase and figure."""
    wanted = [(names[-1], "exact", "exact"), (names[-1], "first", "ranked first")]
    wanted += [("teacher", "exact", "exact")] if "teacher" in names[:-1] else []
    cells = {name: phases[name]["niah_grid"]["cells"] for name in names}
    if not any(cell["exact"] is not None for cell in cells[names[-1]]):
        raise NotMeasured("every length is beyond the model's positions")
    forms = list(dict.fromkeys(cell["form"] for cell in cells[names[-1]]))
    figure, axes = panels_of(len(wanted), len(forms), width=2.7, height=2.6, bottom=0.5)
    for line, (name, key, words) in zip(axes, wanted, strict=True):
        for axis, form in zip(line, forms, strict=True):
            alike = [cell for cell in cells[name] if cell["form"] == form]
            heatmap(axis, alike, key, phases[name]["niah_grid"]["exact"])
            axis.set_title(form)
        line[0].set_ylabel(f"{PHASE_WORDS[name]}, {words}\ndepth (%)")
    for axis in axes[-1]:
        axis.set_xlabel("tokens")
    figure.supxlabel(
        "Hatched: proves nothing about a memory. Red: the exact window begins. Grey: borders of blocks.",
        fontsize=8,
    )
    return figure


def heatmap(axis: Axes, cells: list[dict], key: str, exact: dict) -> None:
    """Length across, depth down; each cell's figure is written into it."""
    lengths = sorted({cell["length"] for cell in cells})
    depths = sorted({cell["depth"] for cell in cells})
    values = np.full((len(depths), len(lengths)), np.nan)
    for cell in cells:
        row, column = depths.index(cell["depth"]), lengths.index(cell["length"])
        if cell["exact"] is None:
            axis.text(column, row, DASH, ha="center", va="center")
            continue
        values[row, column] = cell[key]
        shade = "white" if cell[key] > 0.5 else "black"
        axis.text(column, row, f"{cell[key]:.2f}", ha="center", va="center", color=shade, fontsize=8)
        if cell["proves_nothing"]:
            corner = (column - 0.5, row - 0.5)
            axis.add_patch(
                Rectangle(corner, 1, 1, fill=False, hatch="////", edgecolor="#8a8a8a", linewidth=0)
            )
    axis.imshow(values, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    axis.grid(visible=False)
    axis.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    axis.set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths])
    measured = {cell["length"] for cell in cells if cell["exact"] is not None}
    for column, length in enumerate(lengths):
        for place, colour, width in borders(length, exact) if length in measured else ():
            height = float(np.interp(place, depths, range(len(depths))))
            axis.plot([column - 0.5, column + 0.5], [height, height], color=colour, linewidth=width)
    axis.set_xlim(-0.5, len(lengths) - 0.5)
    axis.set_ylim(len(depths) - 0.5, -0.5)


def borders(length: int, exact: dict) -> list[tuple[float, str, float]]:
    """(depth in %, colour, width) of the lines in the column of a length: blocks, then the exact window."""
    if exact["block"] is None or exact["full"]:
        return []
    block, window = exact["block"], exact["window"]
    count = length // block
    lines = []
    if count <= MOST_BORDERS:
        lines = [(100 * block * index / length, "#b0b0b0", 0.5) for index in range(1, count + 1)]
    start = max(0, (length - 1) // block * block - window)
    return [*lines, (100 * start / length, RED, 1.4)]


SECTIONS.register("niah")(
    Section(
        "Needle in a haystack",
        "niah_grid",
        text,
        {"niah.png": ("Needles found by length, depth and form", picture)},
    )
)
