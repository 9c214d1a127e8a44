"""Pass keys far beyond the training's lengths in the report."""

from matplotlib.figure import Figure

from eval.plots import GREY, PHASE_COLOURS, PHASE_WORDS, NotMeasured, panels_of
from eval.sections import SECTIONS, Section, table
from eval.words import DASH, exact

OFF = "both off (window and sinks only)"


def text(phases: dict, names: list[str]) -> str:
    """A row for each length: by depth, with the state off, the teacher's, and the bytes of the state."""
    last = names[-1]
    entry = phases[last]["passkey_long"]
    teacher = phases["teacher"]["passkey_long"] if "teacher" in names[:-1] else {"means": []}
    depths = sorted({cell["depth"] for cell in entry["cells"]})
    words = dict(zip(depths, ("start", "middle", "end"), strict=False))
    rows = []
    for pooled in entry["means"]:
        cells = {cell["depth"]: cell for cell in entry["cells"] if cell["length"] == pooled["length"]}
        theirs: dict = next((mean for mean in teacher["means"] if mean["length"] == pooled["length"]), {})
        times = f" ({pooled['times']:g} times the training's)" if pooled["times"] else ""
        by_depth = [DASH if cells[d]["exact"] is None else f"{cells[d]['exact']:.2f}" for d in depths]
        if pooled["exact"] is None:
            mean = f"not measured: {pooled['why']}"
        else:
            mean = f"{exact(pooled)}, {pooled['episodes']} episodes"
        rows.append(
            [
                f"{pooled['length']:,}{times}",
                *by_depth,
                mean,
                exact(pooled["off"]) if "off" in pooled else DASH,
                exact(theirs) if theirs.get("exact") is not None else theirs.get("why", DASH),
                f"{pooled['bytes']:,}" if pooled.get("bytes") else DASH,
            ]
        )
    columns = ["tokens", *(words.get(depth, f"depth {depth:g}") for depth in depths)]
    columns += ["mean", "both off", "teacher", "bytes of state"]
    said = (
        f"{PHASE_WORDS[last]}. Generated answers after a repeated filler, read in pieces with the state "
        "carried; the key lies outside every exact part. Both off: without linear memory and retained pairs."
    )
    return f"{said}\n\n{table(columns, rows)}"


def picture(phases: dict, names: list[str]) -> Figure:
    """Exact match over length, teacher and student, and the student with its state off."""
    curves = [
        (PHASE_WORDS[name], PHASE_COLOURS[name], phases[name]["passkey_long"]["means"]) for name in names
    ]
    last = phases[names[-1]]["passkey_long"]["means"]
    off = [{"length": mean["length"], **mean["off"]} for mean in last if "off" in mean]
    curves += [(OFF, GREY, off)] if off else []
    curves = [
        (words, colour, [mean for mean in means if mean["exact"] is not None])
        for words, colour, means in curves
    ]
    if not any(means for _, _, means in curves):
        raise NotMeasured("every length is beyond the model's positions")
    figure, axes = panels_of(1, 1, width=6.0, height=3.2)
    axis = axes[0][0]
    for words, colour, means in curves:
        points = [mean["exact"] for mean in means]
        spread = [
            [mean["exact"] - mean["interval"][0] for mean in means],
            [mean["interval"][1] - mean["exact"] for mean in means],
        ]
        style = "--" if words == OFF else "-"
        axis.errorbar(
            [mean["length"] for mean in means], points, yerr=spread, marker="o", capsize=3, color=colour,
            label=words, linestyle=style,
        )  # fmt: skip
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axis.set_ylim(-0.05, 1.05)
    axis.set_xlabel("tokens")
    axis.set_ylabel("exact match")
    axis.legend(frameon=False)
    return figure


SECTIONS.register("passkey")(
    Section(
        "Pass keys beyond the training's length",
        "passkey_long",
        text,
        {"passkey.png": ("Pass keys found by length", picture)},
    )
)
