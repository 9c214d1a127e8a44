"""The report's table of what explains a result: parts off, the state of another text, the control."""

from collections.abc import Sequence

from eval.verdict import CONTROL, perplexity_gain, recall_gain
from eval.words import DASH, bounds

WORDS = {
    "window_off": "window off: the memory alone, in the layers that have one",
    "sinks_off": "sinks off",
    "other_text_state": "memory and pairs after another text of the same length",
    CONTROL: "sliding-window control, a run of equal budget",
}


def explaining(phase: dict) -> str:
    """A Markdown table of the ablations in `WORDS`, empty where none was measured.

    Every figure is paired: the same episodes and windows, of which these ablations have the first half.
    """
    rows = []
    for name, words in WORDS.items():
        off = phase.get("ablation", {}).get(name) or {}
        if "why" not in off and off:
            rows.append(f"| {words} | {_recall(phase, off)} | {_perplexity(phase, off)} |")
    if not rows:
        return ""
    head = "| instead | recall as it is → so, paired | perplexity so against as it is |"
    note = (
        "A needle that is found with another text's state was not kept in the memory: it was in the window's"
    )
    return "\n".join(
        [
            *(head, "|---|---|---|", *rows, ""),
            f"{note} states, or in a layer with full attention.",
        ]
    )


def who_carries(metrics: dict) -> str:
    """A sentence about unreplaced layers that could carry a fact; empty where there are none."""
    carriers = (metrics.get("verdict") or {}).get("carriers") or {}
    said = [f"{kind.replace('_', ' ')} in {_listed(layers)}" for kind, layers in carriers.items()]
    if not said:
        return ""
    return f"Layers that were not replaced and could carry a fact by themselves: {'; '.join(said)}."


def what_it_is(metrics: dict) -> str:
    """The words that the verdict gives to the whole model; empty where no layer was replaced."""
    words = (metrics.get("verdict") or {}).get("called") or []
    return f"The rule calls it **{', '.join(words)}**." if words else ""


def _recall(phase: dict, off: dict) -> str:
    gain = recall_gain(phase, off)
    if gain is None:
        return DASH
    change = -gain["difference"]
    low, high = (-bound for bound in reversed(gain["interval"]))
    return f"{change:+.2f} {bounds((low, high), '+.2f')}, {gain['episodes']} episodes"


def _perplexity(phase: dict, off: dict) -> str:
    gain = perplexity_gain(phase, off)
    if gain is None:
        return DASH
    return f"{gain['difference']:+.1%} {bounds(gain['interval'], '+.1%')}, {gain['windows']} windows"


def _listed(layers: Sequence[int]) -> str:
    """Layer numbers, with runs of neighbours joined: 0, 3-7."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
