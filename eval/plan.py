"""What is measured in a phase: a small table, so that the cost of a run can be read off it.

The budget's `episodes` counts those of one length and depth. They are spread evenly over pass keys and
needles in new phrasings, in novels and in repeated filler, so each `Cell` gets a quarter of them, rounded up,
and each mean over the three depths that the report prints rests on 3 * episodes / 4. Between the stages the
two parts of the state are switched off together only; at the end each of them alone as well, and perplexity
is measured without them too.
"""

import math
from dataclasses import dataclass, fields

from torch import nn

from eval.niah import Cell
from replace.config import AttentionConfig, EvalBudget

DEPTHS = (0.1, 0.5, 0.9)
TASKS = (("passkey", "train"), ("sentence", "test"))
"""Kind of needle and phrasings: one as in the training, one never trained on."""
HAYSTACKS = ("novel", "filler")
DISTRACTOR_EVERY = 128
"""Tokens between two distractor facts in the distractor row."""
MOST_DISTRACTORS = 32
COMBINED = "memory_and_pairs_off"
ABLATIONS = {
    "memory_off": {"memory": True},
    "pairs_off": {"pairs": True},
    COMBINED: {"memory": True, "pairs": True},
}
NOT_MEASURED = {
    "window_off": "not part of this plan",
    "sinks_off": "not part of this plan",
    "other_text_state": "not part of this plan",
    "sliding_window_control": "a run of its own is needed: python -m replace +exp=window",
}
"""The other ablations of the schema, and why they are not measured."""


@dataclass(frozen=True)
class Grid:
    """Cells of one length, the episodes of each, and the ablations run on the very same episodes.

    `ablated` is how many of a cell's episodes the ablations get; by default all.
    """

    cells: tuple[Cell, ...]
    episodes: int
    ablations: tuple[str, ...] = ()
    ablated: int | None = None

    def episodes_of(self, ablation: str) -> int:
        """Episodes a cell for an ablation (none: everything on): the first ones, so that they pair."""
        return self.episodes if self.ablated is None or not ablation else self.ablated


@dataclass(frozen=True)
class Plan:
    """One phase's measurements."""

    grids: tuple[Grid, ...] = ()
    perplexity: bool = True
    probes: bool = True
    layer_outputs: bool = True
    perplexity_ablations: tuple[str, ...] = ()
    state_lengths: tuple[int, ...] = ()
    decode_lengths: tuple[int, ...] = ()
    generated: int = 0


def plan_for(budget: EvalBudget, parts: dict[str, int], *, phase: str, final: bool) -> Plan:
    """The measurements of a phase.

    Args:
        parts: layers by part, from `eval.ablation.parts_of`; only what is there can be switched off.
        final: the last phase of a run.
    """
    present = [part for part in ("memory", "pairs") if parts.get(part)]
    combined = (COMBINED,) if present else ()
    each = tuple(f"{part}_off" for part in present) if len(present) == 2 else ()
    lengths = budget.final_lengths if final else budget.phase_lengths
    last_or_teacher = final or phase == "teacher"
    grids = []
    for length in sorted(set(lengths)):
        cells = tuple(
            Cell(length, depth, kind, phrasing, haystack)
            for kind, phrasing in TASKS
            for haystack in HAYSTACKS
            for depth in DEPTHS
        )
        spread = max(1, math.ceil(budget.episodes / (len(TASKS) * len(HAYSTACKS))))
        # Long texts cost most, and there the ablations need not be as precise as at the first length.
        ablated = None if length == min(lengths) else math.ceil(spread / 2)
        grids.append(Grid(cells, spread, combined + (each if final else ()), ablated))
    if last_or_teacher:
        length = min(budget.phase_lengths)
        distractors = min(MOST_DISTRACTORS, max(1, length // DISTRACTOR_EVERY))
        cells = tuple(Cell(length, depth, "passkey", "train", "novel", distractors) for depth in DEPTHS)
        grids.append(Grid(cells, max(1, budget.episodes // 4)))
    return Plan(
        tuple(grids),
        perplexity_ablations=combined + each if final else (),
        state_lengths=tuple(budget.speed_lengths) if last_or_teacher else (),
        decode_lengths=tuple(sorted(set(budget.final_lengths))) if last_or_teacher else (),
        generated=min(2, budget.episodes) if final else 0,
    )


def only(plan: Plan, name: str) -> Plan:
    """What of a plan belongs to a base (`eval.base`): quick is all of it, and a+b what a or b has."""
    first, plus, others = name.partition("+")
    if plus:
        one, other = only(plan, first), only(plan, others)
        return Plan(**{f.name: getattr(one, f.name) or getattr(other, f.name) for f in fields(Plan)})
    if name == "none":
        return Plan(perplexity=False, probes=False, layer_outputs=False)
    if name == "perplexity":
        return Plan(probes=False, layer_outputs=False, perplexity_ablations=plan.perplexity_ablations)
    if name == "recall":
        return Plan(plan.grids, perplexity=False, probes=False, layer_outputs=False, generated=plan.generated)
    if name == "probes":
        return Plan(perplexity=False)
    return plan


def clear_tokens(attention: AttentionConfig) -> int:
    """Tokens between a needle and the answer so that no query of the answer sees the needle exactly.

    The exact part of a query reaches back at most `window` tokens and its own block (02).
    """
    return attention.block + (0 if attention.local == "segment" else attention.window)


def clear_tokens_of(model: nn.Module, default: AttentionConfig) -> int:
    """The most `clear_tokens` of the model's own replaced layers; those of `default` where it has none.

    The spec is read by its shape, since an export that runs its folder's code has its own copy of the class.
    """
    conversion = getattr(model, "layer_replace", None)
    options = [default] if conversion is None else list(conversion.spec.layers.values())
    return max(map(clear_tokens, options))
