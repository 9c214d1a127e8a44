"""Cost against the length of the context in the report: one table, one plot."""

from matplotlib.figure import Figure

from eval.plots import PHASE_COLOURS, PHASE_WORDS, panels_of
from eval.sections import SECTIONS, Section, table
from eval.words import DASH

FIGURES = {
    "prefill_tokens_per_second": ("tokens read a second", 1.0, ",.0f"),
    "first_token_seconds": ("seconds to the first token", 1.0, ",.2f"),
    "decode_tokens_per_second": ("tokens written a second", 1.0, ",.1f"),
    "bytes": ("cache (MB)", 1e-6, ",.2f"),
    "peak_bytes": ("peak memory without weights (MB)", 1e-6, ",.1f"),
}


def text(phases: dict, names: list[str]) -> str:
    """A row for each length and phase."""
    rows, reasons = [], []
    lengths = sorted({row["length"] for name in names for row in phases[name]["cost"]["rows"]})
    for length in lengths:
        for name in names:
            row = next((r for r in phases[name]["cost"]["rows"] if r["length"] == length), None)
            if row is None:
                continue
            cells = [
                DASH if row.get(key) is None else f"{row[key] * scale:{form}}"
                for key, (_, scale, form) in FIGURES.items()
            ]
            rows.append([f"{length:,}", PHASE_WORDS[name], *cells])
            if "why" in row:
                reasons.append(f"- {PHASE_WORDS[name]} at {length:,} tokens: not measured: {row['why']}")
    piece = phases[names[-1]]["cost"]["piece"]
    said = (
        f"One row of random tokens, read in pieces of {piece:,}, then written on greedily. Peak memory: the "
        "cache and all tensors at once while the last piece is read."
    )
    columns = ["tokens of context", "model", *(words for words, _, _ in FIGURES.values())]
    return "\n\n".join([said, table(columns, rows), *(["\n".join(reasons)] if reasons else [])])


def picture(phases: dict, names: list[str]) -> Figure:
    """Five panels, teacher beside student."""
    figure, axes = panels_of(2, 3, width=3.6, height=2.8)
    places = [axis for line in axes for axis in line]
    for axis, (key, (title, scale, form)) in zip(places, FIGURES.items(), strict=False):
        for name in names:
            rows = [row for row in phases[name]["cost"]["rows"] if row.get(key) is not None]
            lengths, values = [row["length"] for row in rows], [row[key] * scale for row in rows]
            axis.plot(lengths, values, marker="o", color=PHASE_COLOURS[name], label=PHASE_WORDS[name])
            for length, value in zip(lengths, values, strict=True):
                label = f"{value:{form}}"
                axis.annotate(label, (length, value), xytext=(4, 5), textcoords="offset points", fontsize=7)
        axis.set_title(title)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axis.set_xlabel("tokens of context")
        axis.margins(x=0.18, y=0.25)
    handles, words = places[0].get_legend_handles_labels()
    places[-1].axis("off")
    places[-1].legend(handles, words, loc="center", frameon=False)
    return figure


SECTIONS.register("speed")(
    Section(
        "Cost against the length of the context",
        "cost",
        text,
        {"context_cost.png": ("Speed, cache and memory by length of context", picture)},
    )
)
