"""One figure of a run, for whoever has to choose among runs, such as a sweep.

0 is the teacher, lower is better. Only the dev text is looked at, since choosing by test figures would make
them worth nothing.
"""

import math
from collections.abc import Mapping
from statistics import fmean

from eval.metrics import PHASES, TEACHERS

TASKS = ("passkey", "niah")


def objective(phases: Mapping[str, dict]) -> float | None:
    """How far the last student is from its teacher on dev.

    The mean over the texts of log(perplexity / the teacher's), plus the share of recall that was lost: 0.05
    is 5 % of perplexity, or one needle in 20.

    Args:
        phases: those of metrics.json.

    Returns:
        None where one of the two was not measured on a dev text.
    """
    teacher = phases.get("teacher", {}).get("dev", {})
    names = [name for name in PHASES if name not in TEACHERS and "dev" in phases.get(name, {})]
    student = phases[names[-1]]["dev"] if names else {}
    if "perplexity" not in teacher or "perplexity" not in student:
        return None
    pairs = [
        (student["perplexity"][text]["ppl"], entry["ppl"])
        for text, entry in teacher["perplexity"].items()
        if text in student["perplexity"]
    ]
    if not pairs or any(value is None for pair in pairs for value in pair):
        return None
    lost = fmean(math.log(mine / theirs) for mine, theirs in pairs)
    mine, theirs = _recall(student), _recall(teacher)
    if mine is not None and theirs is not None:
        lost += max(0.0, theirs - mine)
    return lost


def _recall(figures: Mapping) -> float | None:
    """Exact match over all episodes."""
    hits = [hit for task in TASKS for cell in figures.get(task, {}).get("cells", []) for hit in cell["hits"]]
    return fmean(hits) if hits else None
