"""The plot of a CSV: time of one sequence over its length, where linear and quadratic are two slopes."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from kernels.bench.cells import BOTH, DECODE, FORWARD
from kernels.bench.record import PROBES, Row

# Okabe and Ito's, safe for the colour-blind.
COLOURS = {
    "linear_attention": "#0072B2",
    "linear_attention_unnormalized": "#56B4E9",
    "gated_delta_rule": "#009E73",
    "delta_rule": "#F0E442",
    "infini_memory": "#CC79A7",
    "window_linear_attention": "#E69F00",
    "softmax_attention": "#D55E00",
}
LINES = {"triton": "-", "chunk": "--", "fla": ":", "fla_simple_gla": (0, (1, 4)), "sdpa": "-", "flex": "-."}
MARKS = {"triton": "o", "chunk": "s", "fla": "^", "fla_simple_gla": "v", "sdpa": "x", "flex": "+"}
TITLES = {
    FORWARD: "forward, ms a sequence",
    BOTH: "forward and backward, ms a sequence",
    DECODE: "one token after T others, ms",
}


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw a CSV's rows into `path`; without a figure in them there is an empty plot."""
    shown = [row for row in rows if row["ms"] and row["op"] not in PROBES]
    widths = sorted({int(row["head_dim"]) for row in shown}) or [0]
    figure = Figure(figsize=(13, 0.8 + 3.8 * len(widths)), layout="constrained")
    axes = figure.subplots(len(widths), len(TITLES), squeeze=False)
    for line, width in zip(axes, widths, strict=True):
        for axis, direction in zip(line, TITLES, strict=True):
            _panel(axis, [r for r in shown if r["direction"] == direction and int(r["head_dim"]) == width])
            axis.set_title(TITLES[direction] + (f", head dim {width}" if len(widths) > 1 else ""), fontsize=9)
    legend: dict = {}
    for axis in axes.flat:
        legend |= {line.get_label(): line for line in axis.get_lines()}
    figure.legend(
        legend.values(), legend.keys(), loc="outside lower center", ncols=4, fontsize=8, frameon=False
    )
    if shown:
        figure.suptitle(f"{shown[0]['device']}, {shown[0]['dtype']}, {shown[0]['versions']}", fontsize=9)
    figure.savefig(path, dpi=120)


def _panel(axis: Axes, rows: Sequence[Row]) -> None:
    lines: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for row in rows:
        point = int(row["T"]), float(row["ms"]) / int(row["batch"])
        lines.setdefault((row["op"], row["provider"]), []).append(point)
    for (op, provider), points in lines.items():
        lengths, times = zip(*sorted(points), strict=True)
        axis.plot(
            lengths, times, color=COLOURS.get(op, "#6b6b6b"), linestyle=LINES.get(provider, "-"),
            marker=MARKS.get(provider, "."), markersize=4, label=f"{op}, {provider}",
        )  # fmt: skip
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.xaxis.set_major_formatter(FuncFormatter(_thousands))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_xlabel("T")
    axis.grid(alpha=0.25)
    if lines and rows[0]["direction"] != DECODE:
        _guide(axis, lines)


def _guide(axis: Axes, lines: dict[tuple[str, str], list[tuple[int, float]]]) -> None:
    """A line of slope 1 below the others, for the eye."""
    first, last = min(min(points) for points in lines.values()), max(max(p)[0] for p in lines.values())
    length, low = first[0], min(time for points in lines.values() for n, time in points if n == first[0])
    times = [low * 0.7, low * 0.7 * last / length]
    axis.plot([length, last], times, color="black", linewidth=0.8, alpha=0.5, label="proportional to T")


def _thousands(value: float, _: object) -> str:
    return f"{value / 1024:g}K" if value >= 1024 else f"{value:g}"
