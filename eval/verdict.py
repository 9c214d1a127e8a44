"""What the numbers say: the verdict on each part of the memory, and how much of the damage was won back.

Nothing here measures; everything is computed from the per-episode hits and per-window losses in metrics.json,
so that a reader can recompute it.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from eval.intervals import LEVEL, bootstrap, paired_difference
from eval.niah import key

PARTS = {"memory": "memory_off", "pairs": "pairs_off", "memory_and_pairs": "memory_and_pairs_off"}
"""A part of the state, and the ablation that switches it off."""
RECALL_GAIN = 0.10
"""Ten points of recall."""
PERPLEXITY_GAIN = 0.005
"""Half a percent of perplexity."""
TASKS = ("passkey", "niah")
WINDOW_ONLY, BY_FULL_ATTENTION = "window-only", "carried-by-full-attention"
CONTROL = "sliding_window_control"


def verdict(phase: dict, parts: Mapping[str, Any], *, seed: int = 0) -> dict:
    """The verdict on each part, from one measured phase with its ablations.

    `used`: with it on, recall gains at least 10 points or perplexity at least 0.5 %, and the paired interval
    excludes 0. `harmful`: the same the other way. `window-only`: neither. Where recall and perplexity
    contradict each other, recall decides, because only recall has to come from outside the window, and
    "conflict" says so.

    Args:
        phase: a phase of metrics.json.
        parts: how many layers have each part, from `eval.ablation.parts_of`.

    Returns:
        {"called": what the model is to be called, see `called`; "memory", "pairs", "memory_and_pairs": a
        verdict, or null where the model has no such part or it was not measured;
        "carried_by_full_attention": bool; "carriers": the unreplaced layers that could carry a fact by
        themselves, {kind: indices}; "details": {part: {"recall": {...}, "perplexity": {...}, "why"}}, and
        under "control" the gain over the sliding-window control, where one was given}.
    """
    carriers = {kind: layers for kind, layers in parts.get("unreplaced", {}).items() if layers}
    result: dict = {
        "called": [],
        "carried_by_full_attention": parts.get("full_attention", 0) > 0,
        "carriers": carriers,
    }
    details: dict[str, dict] = {}
    for part, ablation in PARTS.items():
        present = [name for name in part.split("_and_") if parts.get(name, 0)]
        if not present:
            result[part] = None
            details[part] = {"why": f"no layer has {' or '.join(part.split('_and_'))}"}
            continue
        twins = phase.get("ablation", {})
        # Where a model has only one of the two, switching both off is switching that one off.
        alone = present == [name for name in PARTS if parts.get(name, 0)]
        off = twins.get(ablation) or (twins.get(PARTS["memory_and_pairs"]) if alone else None)
        if off is None:
            result[part] = None
            details[part] = {"why": "not measured with it switched off"}
            continue
        recall = recall_gain(phase, off)
        perplexity = perplexity_gain(phase, off, seed=seed)
        details[part] = {"recall": recall, "perplexity": perplexity}
        votes = [gain["vote"] for gain in (recall, perplexity) if gain is not None]
        if not votes:
            result[part] = None
            details[part]["why"] = "neither recall nor perplexity was measured on and off"
            continue
        result[part] = next((vote for vote in votes if vote != WINDOW_ONLY), WINDOW_ONLY)
        if "used" in votes and "harmful" in votes:
            details[part]["conflict"] = f"recall says {votes[0]}, perplexity says {votes[1]}"
    control = phase.get("ablation", {}).get(CONTROL)
    if control and "why" not in control:
        details["control"] = {
            "recall": recall_gain(phase, control),
            "perplexity": perplexity_gain(phase, control, seed=seed),
        }
    result["called"] = called(result, parts)
    result["details"] = details
    return result


def called(judged: Mapping[str, Any], parts: Mapping[str, Any]) -> list[str]:
    """The words for the whole model: one for what is stored outside the window, and the caveat beside it.

    A model that stores nothing there is window-only without a measurement. One that does is what memory and
    pairs together are, or the only one of them that there is; "not-judged" where that was not measured.
    """
    words = []
    if parts.get("replaced"):
        stored = [part for part in ("memory", "pairs") if parts.get(part)]
        word = judged.get("memory_and_pairs") or (judged.get(stored[0]) if len(stored) == 1 else None)
        words.append(word or ("not-judged" if stored else WINDOW_ONLY))
        if judged["carried_by_full_attention"]:
            words.append(BY_FULL_ATTENTION)
    return words


def recall_gain(on: dict, off: dict) -> dict | None:
    """The paired gain of recall over all cells without distractors that both have; None if there are none.

    It counts only where McNemar's exact test rejects as well.
    """
    hits_on, hits_off = paired_hits(on, off)
    if not hits_on:
        return None
    gain = paired_difference(hits_on, hits_off)
    sure = gain["p"] < 1 - LEVEL
    return {**gain, "vote": _vote(gain["difference"], gain["interval"] if sure else None, RECALL_GAIN)}


def perplexity_gain(on: dict, off: dict, *, seed: int = 0) -> dict | None:
    """How much lower perplexity is with the part on, paired by window over all texts; None if unmeasured.

    The share is ppl(off) / ppl(on) - 1; the interval is a bootstrap over windows.
    """
    ratio, interval, count = _log_ratio(off, on, seed)
    if ratio is None:
        return None
    gain = math.expm1(ratio)
    bounds = None if interval is None else [math.expm1(bound) for bound in interval]
    vote = _vote(gain, bounds, PERPLEXITY_GAIN)
    return {"difference": gain, "interval": bounds, "windows": count, "vote": vote}


def _vote(gain: float, interval: Sequence[float] | None, threshold: float) -> str:
    if interval is not None and gain >= threshold and interval[0] > 0:
        return "used"
    if interval is not None and -gain >= threshold and interval[1] < 0:
        return "harmful"
    return WINDOW_ONLY


def paired_hits(one: dict, other: dict, *, distractors: bool = False) -> tuple[list[int], list[int]]:
    """The hits of the episodes that two phases (or ablations) share, in the same order.

    A cell's episodes are drawn in a fixed order, so where one has fewer, they are the other's first ones.
    """
    first, second = _cells(one), _cells(other)
    left: list[int] = []
    right: list[int] = []
    for place in first:
        if place in second and (distractors or not first[place]["distractors"]):
            count = min(first[place]["episodes"], second[place]["episodes"])
            left += first[place]["hits"][:count]
            right += second[place]["hits"][:count]
    return left, right


def _cells(phase: dict) -> dict[tuple, dict]:
    cells = [cell for task in TASKS for cell in (phase.get(task) or {}).get("cells", [])]
    return {key(cell): cell for cell in cells}


def paired_windows(phases: Sequence[dict], corpus: str) -> tuple[np.ndarray, np.ndarray]:
    """The windows of a text that all phases scored: losses [P, N] and tokens [N].

    Windows begin at the text's start.
    """
    entries = [(phase.get("perplexity") or {}).get(corpus) for phase in phases]
    if any(entry is None or entry.get("ppl") is None for entry in entries):
        return np.zeros((len(phases), 0)), np.zeros(0)
    rows = [entry["windows"] for entry in entries if entry]
    count = 0
    for group in zip(*rows, strict=False):
        if len({window["tokens"] for window in group}) != 1:
            break
        count += 1
    losses = np.array([[window["nll"] for window in row[:count]] for row in rows])
    return losses.reshape(len(phases), count), np.array([window["tokens"] for window in rows[0][:count]])


def _log_ratio(one: dict, other: dict, seed: int) -> tuple[float | None, list[float] | None, int]:
    """log ppl(one) - log ppl(other) on the windows that both have, over all texts."""
    found = [paired_windows([one, other], corpus) for corpus in (one.get("perplexity") or {})]
    found = [(losses, tokens) for losses, tokens in found if len(tokens)]
    if not found:
        return None, None, 0
    losses = np.concatenate([part for part, _ in found], axis=1)
    tokens = np.concatenate([part for _, part in found])
    difference = losses[0] - losses[1]

    def ratio(draw: np.ndarray) -> float:
        return float(difference[draw].sum() / tokens[draw].sum())

    everything = np.arange(len(tokens))
    return ratio(everything), bootstrap(len(tokens), ratio, seed=seed), len(tokens)


def recovery(phases: dict[str, dict], student: str, *, seed: int = 0) -> dict:
    """(student - swapped) / (teacher - swapped) for every figure that all three have.

    0 is the swap, 1 the teacher; it can be below 0 and above 1. Perplexities enter by their logarithm, on the
    windows that all three scored.

    Args:
        phases: metrics.json's phases.
        student: the phase that is judged.

    Returns:
        {"perplexity/<text>", "recall": {"value", "interval"}}; both are null, with a "why", where the swap's
        damage cannot be told from 0 or was not measured. {"all": {..., "why"}} alone where a phase is missing
        or nothing was trained.
    """
    missing = [name for name in ("teacher", "swapped", student) if name not in phases]
    if missing:
        return {"all": {"value": None, "interval": None, "why": f"not measured: {', '.join(missing)}"}}
    if student == "swapped":
        return {"all": {"value": None, "interval": None, "why": "nothing was trained"}}
    trio = [phases[name] for name in ("teacher", "swapped", student)]
    result = {}
    for corpus in trio[0].get("perplexity") or {}:
        losses, tokens = paired_windows(trio, corpus)
        result[f"perplexity/{corpus}"] = _recovered(losses, tokens, seed)
    hits = _shared_hits(trio)
    result["recall"] = _recovered(hits, np.ones(hits.shape[1]), seed)
    return result


def _shared_hits(phases: Sequence[dict]) -> np.ndarray:
    """Hits [P, N] of the episodes that all phases share, those with distractors left out."""
    cells = [_cells(phase) for phase in phases]
    rows: list[list[int]] = [[] for _ in phases]
    for place, cell in cells[0].items():
        if cell["distractors"] or any(place not in other for other in cells):
            continue
        count = min(other[place]["episodes"] for other in cells)
        for row, other in zip(rows, cells, strict=True):
            row += other[place]["hits"][:count]
    return np.array(rows, dtype=float)


def _recovered(figures: np.ndarray, weights: np.ndarray, seed: int) -> dict:
    """Recovery of a mean, from figures [3, N] (teacher, swapped, student) and the units' weights [N]."""
    nothing = {"value": None, "interval": None}
    if figures.shape[1] == 0:
        return {**nothing, "why": "not measured in the teacher, the swap and the student alike"}
    teacher, swapped, student = figures

    def damage(draw: np.ndarray) -> float:
        return float((teacher - swapped)[draw].sum() / weights[draw].sum())

    def share(draw: np.ndarray) -> float:
        whole = (teacher - swapped)[draw].sum()
        return float((student - swapped)[draw].sum() / whole) if whole else math.nan

    count = figures.shape[1]
    interval = bootstrap(count, damage, seed=seed)
    if interval is None:
        return {**nothing, "why": "one window or episode only, so the damage has no interval"}
    if interval[0] <= 0 <= interval[1]:
        return {**nothing, "why": "the swap's damage cannot be told from 0"}
    return {"value": share(np.arange(count)), "interval": bootstrap(count, share, seed=seed)}
