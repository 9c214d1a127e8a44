"""Streaming perplexity in the report."""

from matplotlib.figure import Figure

from eval.plots import GREY, PHASE_COLOURS, PHASE_WORDS, SKY, NotMeasured, panels_of, scale_of
from eval.sections import SECTIONS, Section, table
from eval.words import DASH, bounds, with_interval

WINDOW = "teacher, window of the same bytes"
OFF = "memory and pairs off"


def lines(phases: dict, names: list[str]) -> list[tuple[str, dict]]:
    """What was measured in one pass, by name: each phase, and what stands beside it."""
    found = []
    for name in names:
        entry = phases[name]["streaming"]
        found.append((PHASE_WORDS[name], entry))
        found += [(OFF, entry["off"])] if "off" in entry else []
        found += [(WINDOW, entry["teacher_window"])] if "teacher_window" in entry else []
    return found


def text(phases: dict, names: list[str]) -> str:
    """A table, and what it says against the teacher's window."""
    rows = []
    for name, entry in lines(phases, names):
        bits = f"{entry['bits_per_byte']:.3f}" if entry.get("bits_per_byte") else DASH
        held = DASH
        if entry.get("bytes"):
            held = f"{entry['bytes']:,}, {'constant' if entry['constant'] else 'not constant'}"
        tokens = f"{entry['tokens']:,}" if entry.get("tokens") else DASH
        rows.append([name, tokens, with_interval(entry, "ppl"), bits, held])
    entry = phases[names[-1]]["streaming"]
    said = [f"One pass over {entry['book']}, the state carried from its first token to its last."]
    if "against_teacher" in entry:
        ratio = entry["against_teacher"]
        said.append(
            f"Perplexity over that of the teacher's window: {ratio['ratio']:.3f} "
            f"{bounds(ratio['interval'], '.3f')} (below 1: better than the window)."
        )
    if "off" in entry:
        ratio = entry["off"]["against_on"]
        said.append(
            f"Without linear memory and retained pairs perplexity on the first {entry['off']['tokens']:,} "
            f"tokens is {ratio['ratio']:.3f} times as high {bounds(ratio['interval'], '.3f')}."
        )
    protocols = [f"- {name}: {row['protocol']}" for name, row in lines(phases, names) if row.get("protocol")]
    columns = ["model", "tokens", "perplexity", "bits a byte", "bytes of state"]
    return "\n\n".join([" ".join(said), table(columns, rows), "\n".join(protocols)])


def picture(phases: dict, names: list[str]) -> Figure:
    """Perplexity by position; the protocol of the teacher's window under it."""
    found = [(name, entry) for name, entry in lines(phases, names) if entry.get("by_position")]
    if not found:
        raise NotMeasured("no model here has a state that does not grow")
    figure, axes = panels_of(1, 1, width=7.0, height=3.6, bottom=0.6)
    axis = axes[0][0]
    colours = {WINDOW: GREY, OFF: SKY, PHASE_WORDS[names[-1]]: PHASE_COLOURS[names[-1]]}
    values = []
    longest = max((entry["by_position"] for _, entry in found), key=len)
    for name, entry in found:
        buckets = [bucket for bucket in entry["by_position"] if bucket["ppl"] is not None]
        points = [bucket["ppl"] for bucket in buckets]
        around = [bucket["interval"] or (bucket["ppl"], bucket["ppl"]) for bucket in buckets]
        spread = [
            [max(0.0, point - low) for point, (low, _) in zip(points, around, strict=True)],
            [max(0.0, high - point) for point, (_, high) in zip(points, around, strict=True)],
        ]
        axis.errorbar(
            range(len(buckets)), points, yerr=spread, marker="o", markersize=4, capsize=2,
            color=colours[name], label=name,
        )  # fmt: skip
        values += points
    axis.set_xticks(range(len(longest)), [f"{bucket['from']:,}–\n{bucket['to']:,}" for bucket in longest])
    axis.set_xlabel("tokens read before the predicted one")
    axis.set_ylabel("perplexity")
    entry = phases[names[-1]]["streaming"]
    axis.set_title(f"{entry['book']}, one pass, the state carried")
    scale_of(axis, values)
    axis.legend(frameon=False)
    window = entry.get("teacher_window", {})
    if window.get("window"):
        figure.supxlabel(
            f"The teacher's window: {window['window']} tokens and {window['sinks']} sinks in every layer, "
            f"{window['bytes']:,} bytes;\nthe student's state {entry['bytes']:,} bytes.",
            fontsize=8,
        )
    return figure


SECTIONS.register("streaming")(
    Section(
        "Streaming perplexity",
        "streaming",
        text,
        {"streaming.png": ("Streaming perplexity by position in the book", picture)},
    )
)
