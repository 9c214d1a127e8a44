"""The plots of the report, from metrics.json and train.jsonl.

Colours are those of Okabe and Ito, safe for the colour-blind.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")  # before pyplot: no window, also where there is a screen

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from eval.metrics import PHASES, perplexities
from eval.niah import rate

BLUE, ORANGE, GREEN, RED, PURPLE, SKY, GREY = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#6b6b6b",
)  # fmt: skip
STATES = {
    None: ("all on", BLUE),
    "memory_off": ("linear memory off", ORANGE),
    "pairs_off": ("retained pairs off", PURPLE),
    "memory_and_pairs_off": ("both off (window and sinks only)", GREY),
}
PHASE_COLOURS = {
    "teacher": GREY,
    "continued_teacher": SKY,
    "swapped": RED,
    "stage1": ORANGE,
    "stage2": GREEN,
    "stage3": BLUE,
    "lora": PURPLE,
    "model": BLUE,
}
PHASE_WORDS = {
    "teacher": "teacher",
    "continued_teacher": "continued teacher",
    "swapped": "swapped, untrained",
    "stage1": "stage 1",
    "stage2": "stage 2",
    "stage3": "stage 3",
    "lora": "LoRA",
    "model": "model",
}
TASK_WORDS = {
    "passkey": "pass key, phrasings as in the training",
    "niah": "needle, phrasings never trained on",
}


class NotMeasured(Exception):
    """There is nothing to plot; the message says why."""


def draw_all(
    metrics: dict,
    log: Sequence[dict],
    folder: Path,
    more: Mapping[str, Callable[[], Figure]] | None = None,
) -> dict[str, str | None]:
    """Draw every plot into `folder`.

    Args:
        log: the lines of train.jsonl.
        more: further plots, file name -> what draws it.

    Returns:
        file name -> None, or why it could not be drawn.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    drawn: dict[str, str | None] = {}
    plots: dict[str, Callable[[], Figure]] = {
        "loss.png": lambda: loss_by_stage(log),
        "transfer.png": lambda: transfer_by_layer(metrics["phases"]),
        "perplexity.png": lambda: perplexity_by_phase(metrics["phases"]),
        "recall.png": lambda: recall_by_depth(metrics["phases"]),
        "cost.png": lambda: cost_by_length(metrics["phases"]),
        **(more or {}),
    }
    style: dict = {
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.25,
    }
    with plt.rc_context(style):
        for name, plot in plots.items():
            try:
                figure = plot()
            except NotMeasured as why:
                drawn[name] = str(why)
                (folder / name).unlink(missing_ok=True)
                continue
            figure.savefig(folder / name, dpi=130)
            plt.close(figure)
            drawn[name] = None
    return drawn


def loss_by_stage(log: Sequence[dict]) -> Figure:
    """One panel a stage: the loss of each logged step, a running mean, and the dev loss, over tokens."""
    stages = sorted({str(line["stage"]) for line in log if line.get("loss") is not None})
    if not stages:
        raise NotMeasured("no stage was trained")
    figure, axes = panels_of(1, len(stages), width=3.4, height=3.0)
    for axis, stage in zip(axes[0], stages, strict=True):
        lines = [line for line in log if str(line["stage"]) == stage and line.get("loss") is not None]
        tokens = [line["tokens"] / 1000 for line in lines]
        losses = [line["loss"] for line in lines]
        axis.plot(tokens, losses, ".", color=SKY, markersize=4, label="logged step")
        axis.plot(tokens, _running_mean(losses), color=BLUE, label="running mean")
        dev = [line for line in lines if line.get("dev_loss") is not None]
        if dev:
            places, held_out = [line["tokens"] / 1000 for line in dev], [line["dev_loss"] for line in dev]
            axis.plot(places, held_out, "o-", color=ORANGE, markersize=4, label="dev text")
            losses = losses + held_out
        scale_of(axis, losses)
        axis.set_title(PHASE_WORDS.get(stage, f"stage {stage.removeprefix('stage')}"))
        axis.set_xlabel("thousand tokens")
    axes[0][0].set_ylabel("loss")
    panel = max(axes[0], key=lambda axis: len(axis.get_lines()))  # one that shows all there is
    panel.legend(frameon=False)
    return figure


def transfer_by_layer(phases: dict) -> Figure:
    """Each layer's error, given the teacher's input and in place: untrained, after stage 1, at the end."""
    chosen = [name for name in ("swapped", "stage1", _last(phases)) if name in phases]
    chosen = [name for name in dict.fromkeys(chosen) if phases[name].get("layer_outputs")]
    if not chosen:
        raise NotMeasured("no layer outputs of a student were compared")
    figure, axes = panels_of(1, 2, width=4.6, height=3.2)
    for axis, key, title in (
        (axes[0][0], "transfer_error", "given the teacher's input"),
        (axes[0][1], "error", "in place (errors of lower layers add up)"),
    ):
        for name, marker in zip(chosen, "os^", strict=False):
            rows = [row for row in phases[name]["layer_outputs"] if row.get(key)]
            if rows:
                axis.plot(
                    [row["layer"] for row in rows], [row[key] for row in rows], marker=marker, markersize=4,
                    color=PHASE_COLOURS[name], label=PHASE_WORDS[name],
                )  # fmt: skip
                axis.set_yscale("log")
        axis.set_title(title)
        axis.set_xlabel("decoder layer")
        _whole_numbers(axis)
    axes[0][0].set_ylabel("squared error / variance of\nthe teacher's attention output")
    handles, words = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, words, loc="outside lower center", ncols=len(chosen), frameon=False)
    return figure


def perplexity_by_phase(phases: dict) -> Figure:
    """Each text's perplexity by phase (the teacher's as a line), and by position in the window."""
    found = {name: perplexities(phases[name]) for name in PHASES if name in phases}
    measured = [name for name, figures in found.items() if figures]
    corpora = list(dict.fromkeys(corpus for name in measured for corpus in sorted(found[name])))
    if not corpora:
        raise NotMeasured("perplexity was not measured")
    figure, axes = panels_of(len(corpora), 2, width=4.6, height=2.8)
    for row, corpus in zip(axes, corpora, strict=True):
        figures = {name: found[name][corpus] for name in measured if corpus in found[name]}
        figures = {name: entry for name, entry in figures.items() if entry.get("ppl") is not None}
        _by_phase(row[0], figures)
        row[0].set_title(corpus)
        row[0].set_ylabel("perplexity")
        for name in ("teacher", "swapped", _last(phases)):
            buckets = figures.get(name, {}).get("by_position", [])
            buckets = [bucket for bucket in buckets if bucket["ppl"] is not None]
            if buckets:
                row[1].plot(
                    range(len(buckets)), [bucket["ppl"] for bucket in buckets], marker="o", markersize=4,
                    color=PHASE_COLOURS[name], label=PHASE_WORDS[name],
                )  # fmt: skip
                row[1].set_xticks(
                    range(len(buckets)), [f"{bucket['from']:,}–\n{bucket['to']:,}" for bucket in buckets]
                )
        row[1].set_title(f"{corpus}, by position in the window")
        scale_of(row[1], [value for line in row[1].get_lines() for value in np.asarray(line.get_ydata())])
    axes[0][1].legend(frameon=False)
    axes[-1][1].set_xlabel("tokens before the predicted one")
    return figure


def _by_phase(axis: Axes, figures: dict[str, dict]) -> None:
    """Points with intervals, one a phase, and the teacher's figure as a line."""
    for place, (name, entry) in enumerate(figures.items()):
        low, high = entry.get("interval") or (entry["ppl"], entry["ppl"])
        spread = [[max(0.0, entry["ppl"] - low)], [max(0.0, high - entry["ppl"])]]
        axis.errorbar(place, entry["ppl"], yerr=spread, fmt="o", capsize=3, color=PHASE_COLOURS[name])
        axis.annotate(f"{entry['ppl']:.1f}", (place, entry["ppl"]), xytext=(6, 2), textcoords="offset points")
    if "teacher" in figures:
        axis.axhline(figures["teacher"]["ppl"], color=GREY, linestyle="--", linewidth=1)
    axis.set_xticks(range(len(figures)), [PHASE_WORDS[name].replace(", ", ",\n") for name in figures])
    axis.set_xlim(-0.5, len(figures) - 0.3)
    scale_of(axis, [entry["ppl"] for entry in figures.values()])


def recall_by_depth(phases: dict) -> Figure:
    """The last phase's recall: a panel for each task and length, bars by depth for each ablation."""
    phase = phases.get(_last(phases), {})
    panels = [(task, length) for task in TASK_WORDS for length in _lengths(phase, task)]
    if not panels:
        raise NotMeasured("recall was not measured")
    lengths = sorted({length for _, length in panels})
    tasks = [task for task in TASK_WORDS if any(task == panel for panel, _ in panels)]
    figure, axes = panels_of(len(tasks), len(lengths), width=4.2, height=2.5, bottom=0.5)
    for line, task in zip(axes, tasks, strict=True):
        for axis, length in zip(line, lengths, strict=True):
            states = {
                state: phase if state is None else phase.get("ablation", {}).get(state, {})
                for state in STATES
            }
            pooled = {state: _by_depth(figures, task, length) for state, figures in states.items()}
            present = [state for state in STATES if pooled[state]]
            width = 0.8 / max(1, len(present))
            depths = sorted(pooled[None])
            for offset, state in enumerate(present):
                for place, depth in enumerate(depths):
                    if depth in pooled[state]:
                        _bar(
                            axis,
                            place + (offset - (len(present) - 1) / 2) * width,
                            width,
                            pooled[state][depth],
                            state,
                        )
            axis.set_xticks(range(len(depths)), [f"{depth:g}" for depth in depths])
            axis.set_ylim(0, 1.05)
            axis.set_title(f"{length:,} tokens")
            axis.set_xlabel("depth of the needle")
        words = TASK_WORDS[task].replace(", ", ",\n")
        line[0].set_ylabel(f"{words}\nexact match")
    seen = [state for state in STATES if state is None or state in phase.get("ablation", {})]
    handles = [plt.Rectangle((0, 0), 1, 1, color=STATES[state][1]) for state in seen]
    figure.legend(
        handles,
        [STATES[state][0] for state in seen],
        loc="outside lower center",
        ncols=len(seen),
        frameon=False,
    )
    return figure


def _bar(axis: Axes, place: float, width: float, entry: dict, state: str | None) -> None:
    exact, (low, high) = entry["exact"], entry["interval"]
    axis.bar(place, exact, width * 0.92, color=STATES[state][1])
    spread = [[exact - low], [high - exact]]
    axis.errorbar(place, exact, yerr=spread, fmt="none", ecolor="black", elinewidth=0.8, capsize=2)
    if exact == 0:  # a bar of no height would look like a figure that is missing
        axis.plot(
            place, 0, marker="_", color=STATES[state][1], markersize=9, markeredgewidth=3, clip_on=False
        )


def _by_depth(phase: dict, task: str, length: int) -> dict[float, dict]:
    """Exact match by depth, pooled over haystacks, without the cells that have distractors."""
    pooled: dict[float, list[int]] = {}
    for cell in (phase.get(task) or {}).get("cells", []):
        if cell["length"] == length and not cell["distractors"]:
            pooled.setdefault(cell["depth"], []).extend(cell["hits"])
    return {depth: rate(hits) for depth, hits in pooled.items()}


def _lengths(phase: dict, task: str) -> list[int]:
    cells = (phase.get(task) or {}).get("cells", [])
    return sorted({cell["length"] for cell in cells if not cell["distractors"]})


def cost_by_length(phases: dict) -> Figure:
    """Bytes kept between tokens, and decoding speed, teacher beside student."""
    shown = [
        name for name in dict.fromkeys(("teacher", _last(phases))) if (phases.get(name) or {}).get("speed")
    ]
    if not shown:
        raise NotMeasured("the cost of generation was not measured")
    figure, axes = panels_of(1, 2, width=4.2, height=3.0)
    for axis, part, key, scale, title in (
        (axes[0][0], "state", "bytes", 1e-6, "kept between tokens (MB)"),
        (axes[0][1], "decode", "tokens_per_second", 1.0, "decoded tokens a second"),
    ):
        for name in shown:
            rows = [row for row in phases[name]["speed"].get(part, []) if row.get(key) is not None]
            axis.plot(
                [row["length"] for row in rows], [row[key] * scale for row in rows], marker="o",
                color=PHASE_COLOURS[name], label=PHASE_WORDS[name],
            )  # fmt: skip
            for row in rows:
                label = f"{row[key] * scale:,.1f}"
                axis.annotate(
                    label, (row["length"], row[key] * scale), xytext=(4, 5), textcoords="offset points"
                )
        axis.set_title(title)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axis.set_xlabel("tokens of context")
        axis.margins(x=0.15, y=0.15)
    axes[0][0].set_yscale("log")
    axes[0][1].set_ylim(bottom=0)
    axes[0][0].legend(frameon=False)
    return figure


def panels_of(
    rows: int, columns: int, *, width: float, height: float, bottom: float = 0.0
) -> tuple[Figure, list[list[Axes]]]:
    figure, axes = plt.subplots(
        rows, columns, figsize=(width * columns, height * rows + bottom), squeeze=False, layout="constrained"
    )
    return figure, [list(row) for row in axes]


def _last(phases: dict) -> str:
    """The last student phase; the teacher where there is none."""
    return next(name for name in reversed(PHASES) if name in phases or name == "teacher")


def _running_mean(values: Sequence[float], share: float = 0.1) -> list[float]:
    """The mean of the last tenth of the values up to each one."""
    span = max(1, int(len(values) * share))
    return [
        sum(values[max(0, i - span + 1) : i + 1]) / len(values[max(0, i - span + 1) : i + 1])
        for i in range(len(values))
    ]


def scale_of(axis: Axes, values: Sequence[float]) -> None:
    """A logarithmic y axis in ordinary numbers where the values span more than a factor of four."""
    if len(values) and min(values) > 0 and max(values) > 4 * min(values):
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "235" else "")


def _whole_numbers(axis: Axes) -> None:
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
