"""The report's section on where the memory works, and its heatmaps."""

from collections.abc import Callable, Sequence

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure

from eval.plots import NotMeasured
from eval.sections import SECTIONS, Section
from eval.words import DASH

PANELS: dict[str, tuple[str, Callable[[dict], Sequence[float] | None]]] = {
    "read_gate": ("read gate g, mean", lambda row: row["read_gate"] and row["read_gate"]["mean"]),
    "share": ("|g A_mem| / |out|", lambda row: row["share"]),
    "effective_tokens": ("effective tokens of a read", lambda row: row["effective_tokens"]),
    "write_gate": ("write gate, mean", lambda row: row["write_gate"] and row["write_gate"]["mean"]),
}
IDLE = 0.05
"""A head whose memory has less than this share of its output is called idle."""


def table_of(layers: Sequence[dict], part: str) -> np.ndarray:
    """Layers by heads, NaN where there is nothing."""
    rows = [PANELS[part][1](row) for row in layers]
    width = max((len(row) for row in rows if row), default=0)
    empty = [None] * width
    return np.array([list(row) if row else empty for row in rows], dtype=float).reshape(len(rows), width)


def heatmaps(phase: dict) -> Figure | None:
    """One panel for each figure, layers down and heads across; None where nothing was measured."""
    layers = [row for row in (phase.get("inside") or {}).get("layers", []) if row["effective_tokens"]]
    if not layers:
        return None
    tables = {part: table_of(layers, part) for part in PANELS}
    tables = {part: table for part, table in tables.items() if np.isfinite(table).any()}
    height = 1.2 + 0.22 * len(layers)
    figure, axes = plt.subplots(
        1, len(tables), figsize=(3.4 * len(tables), max(2.6, height)), squeeze=False, layout="constrained"
    )
    for axis, (part, table) in zip(axes[0], tables.items(), strict=True):
        positive = table[np.isfinite(table) & (table > 0)]
        spread = part == "effective_tokens" and len(positive)
        norm = LogNorm(positive.min(), positive.max()) if spread else Normalize(0, max(1.0, np.nanmax(table)))
        image = axis.imshow(table, aspect="auto", cmap="viridis", norm=norm, interpolation="nearest")
        figure.colorbar(image, ax=axis, shrink=0.8)
        axis.set_title(PANELS[part][0])
        axis.set_xlabel("key-value head" if part == "write_gate" else "head")
        axis.set_yticks(range(len(layers)), [str(row["layer"]) for row in layers])
        axis.set_xticks(range(table.shape[1]))
        axis.grid(visible=False)
    axes[0][0].set_ylabel("layer")
    return figure


def inside(phase: dict) -> str:
    """Markdown: a line a layer, and how many heads are idle."""
    found = phase.get("inside")
    if not found:
        return "not measured: not part of this run's plan (`eval=inside`)"
    measured = [row for row in found["layers"] if row["effective_tokens"]]
    lines = []
    if measured:
        shares = table_of(measured, "share")
        idle, heads = int((shares < IDLE).sum()), int(np.isfinite(shares).sum())
        lines = [
            f"On the first {found['tokens']:,} tokens of {found['text']}. In {idle} of {heads} heads the "
            f"memory makes up less than {IDLE:.0%} of the output. A cell is the mean over heads, in brackets "
            "the range.",
            "",
            "| layer | read gate | \\|g A_mem\\| / \\|out\\| | effective tokens | stored | write gate |",
            "|---|---|---|---|---|---|",
        ]
        for row in measured:
            cells = [_cell(table_of([row], part)) for part in PANELS]
            stored = DASH if row["stored_tokens"] is None else f"{row['stored_tokens']:.0f}"
            lines.append(f"| {row['layer']} | {' | '.join([*cells[:3], stored, cells[3]])} |")
    whys: dict[str, list[str]] = {}
    for row in found["layers"]:
        if "why" in row:
            whys.setdefault(row["why"], []).append(str(row["layer"]))
    if "why" in found:
        whys[found["why"]] = []
    for why, which in whys.items():
        where = f" in layers {', '.join(which)}" if which else ""
        lines += ["", f"not measured{where}: {why}"]
    return "\n".join(lines).strip()


def _cell(values: np.ndarray) -> str:
    values = values[np.isfinite(values)]
    if not len(values):
        return DASH
    return f"{values.mean():.3g} [{values.min():.3g}, {values.max():.3g}]"


def picture(phases: dict, names: list[str]) -> Figure:
    """The last phase's gates, shares and reads of the memory."""
    figure = heatmaps(phases[names[-1]])
    if figure is None:
        raise NotMeasured("no layer has a memory to look into")
    return figure


SECTIONS.register("inside")(
    Section(
        "Inside the memory",
        "inside",
        lambda phases, names: inside(phases[names[-1]]),
        {"inside.png": ("Gates, shares and reads of the memory by layer and head", picture)},
    )
)
