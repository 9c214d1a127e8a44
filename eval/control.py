"""The sliding-window control: a run of equal budget that has the same window and no memory, by its folder.

Its figures come from its own metrics.json, once it is shown that the two runs may be compared.
"""

from collections.abc import Mapping
from typing import Any

from eval.metrics import FILE, last_student, read_metrics
from replace.compose import differences, load_config
from replace.config import Config
from replace.errors import UserError
from replace.files import expanded

SAME = ("model", "data", "budget", "seed", "stages")
"""What the two runs must have in common."""
WINDOW = ("local", "block", "window", "sinks", "distance_cap")
FIGURES = ("perplexity", "passkey", "niah")


def control_of(config: Config, parts: Mapping[str, Any]) -> dict:
    """The figures of the run that `eval.control` names.

    Args:
        parts: this model's, from `eval.ablation.parts_of`.

    Returns:
        {"run", "phase", "perplexity", "passkey", "niah"} of its last phase, or {"why"}.
    """
    if config.eval.control is None:
        return {
            "why": "a run of its own is needed: python -m replace +exp=window, then eval.control=<folder>"
        }
    folder = expanded(config.eval.control)
    try:
        theirs = load_config(folder, "eval.control")
        metrics = read_metrics(folder)
    except UserError as error:
        return {"why": str(error).rstrip(".")}
    why = _why_not(config, theirs, parts, metrics)
    if why is not None:
        return {"why": f"{config.eval.control} is no control of this run: {why}"}
    phase = last_student(metrics)
    assert phase is not None
    figures = metrics["phases"][phase]
    return {"run": config.eval.control, "phase": phase} | {
        name: figures[name] for name in FIGURES if name in figures
    }


def _why_not(mine: Config, theirs: Config, parts: Mapping[str, Any], metrics: dict) -> str | None:
    """The first thing in which the runs differ and must not, or None."""
    for part in SAME:
        for key, here, there in differences(getattr(mine, part), getattr(theirs, part), part):
            if key != "budget.name":
                return f"there {key} is {there!r}, here {here!r}"
    for name in WINDOW:
        here, there = getattr(mine.attention, name), getattr(theirs.attention, name)
        if here != there:
            return f"there attention.{name} is {there!r}, here {here!r}"
    student = last_student(metrics)
    if "parts" not in metrics or student in (None, "swapped"):
        return f"it has not finished its stages, as its {FILE} shows"
    held = [name for name in ("memory", "pairs") if metrics["parts"].get(name)]
    if held:
        return f"its layers have {' and '.join(held)}"
    for name in ("replaced", "full_attention"):
        if metrics["parts"][name] != parts[name]:
            return f"there {metrics['parts'][name]} layers are {name.replace('_', ' ')}, here {parts[name]}"
    return None
