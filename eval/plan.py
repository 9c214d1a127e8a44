"""What is measured in a phase: a small table, so that the cost of a run can be read off it.

The budget's `episodes` counts those of one length and depth. They are spread evenly over pass keys and
needles in new phrasings, in novels and in repeated filler, so each `Cell` gets a quarter of them, rounded up,
and each mean over the three depths that the report prints rests on 3 * episodes / 4. At the end the parts of
the state are switched off, each alone and both together, for recall and for perplexity. Long texts cost most,
so beyond the shortest length a cell gets half of the episodes, and only both parts together are switched off,
in novels. What only explains a result (`EXPLAINING`) is measured at the end, at the shortest length, in
novels, on the first half of the episodes, and on the first half of the first text's windows.

Where there is a dev split, what lies between the phases is measured on that: swap and stages on dev alone,
the last phase and the teacher on test, and on dev besides, because a recovery needs the teacher, the swap and
the student on one text. It shows where a run is going, so half of the episodes and of the windows do, with
nothing switched off. Without a dev split test stands in, and both parts together are switched off too.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import nn

from eval.metrics import TEACHERS
from eval.niah import Cell
from replace.config import AttentionConfig, EvalBudget

DEPTHS = (0.1, 0.5, 0.9)
TRAINED, KINDS = "passkey", ("passkey", "sentence")
"""Kinds of needle: one in phrasings as in the training, the others in phrasings never trained on."""
HAYSTACKS = ("novel", "filler")
DISTRACTOR_EVERY = 128
"""Tokens between two distractor facts in the distractor row."""
MOST_DISTRACTORS = 32
COMBINED = "memory_and_pairs_off"
OTHER_TEXT = "other_text_state"
ABLATIONS: dict[str, dict[str, bool]] = {
    "memory_off": {"memory": True},
    "pairs_off": {"pairs": True},
    COMBINED: {"memory": True, "pairs": True},
    "window_off": {"window": True, "beside_memory": True},
    "sinks_off": {"sinks": True},
}
"""What `eval.ablation.ablate` is told; `OTHER_TEXT` is no switch, see `eval.other_text`."""
EXPLAINING = ("window_off", "sinks_off", OTHER_TEXT)


@dataclass(frozen=True)
class Grid:
    """Cells of one length, the episodes of each, and the ablations run on the very same episodes."""

    cells: tuple[Cell, ...]
    episodes: int
    ablations: tuple[str, ...] = ()

    def episodes_of(self, ablation: str) -> int:
        """Episodes a cell for an ablation (none: everything on): the first ones, so that they pair."""
        return math.ceil(self.episodes / 2) if ablation in EXPLAINING else self.episodes


@dataclass(frozen=True)
class Plan:
    """One phase's measurements; `dev` are those on the dev split, the others are on test.

    `halved`: perplexity is measured on the first half of each text's windows.
    """

    grids: tuple[Grid, ...] = ()
    perplexity: bool = True
    halved: bool = False
    probes: bool = True
    layer_outputs: bool = True
    perplexity_ablations: tuple[str, ...] = ()
    state_lengths: tuple[int, ...] = ()
    decode_lengths: tuple[int, ...] = ()
    generated: int = 0
    dev: "Plan | None" = None


def plan_for(
    budget: EvalBudget, parts: Mapping[str, Any], *, phase: str, final: bool, dev: bool = False
) -> Plan:
    """The measurements of a phase.

    Args:
        parts: layers by part, from `eval.ablation.parts_of`; only what is there can be switched off.
        final: the last phase of a run.
        dev: whether there is a dev split.
    """
    present = [part for part in ("memory", "pairs") if parts.get(part)]
    combined = (COMBINED,) if present else ()
    each = tuple(f"{part}_off" for part in present) if len(present) == 2 else ()
    explaining = explained_by(parts) if final else ()
    lengths = budget.final_lengths if final else budget.phase_lengths
    last_or_teacher = final or phase in TEACHERS
    spread = max(1, math.ceil(budget.episodes / (len(KINDS) * len(HAYSTACKS))))
    if dev and phase != "model":
        few = math.ceil(spread / 2)
        shared = Plan(
            tuple(Grid(cells_of(n, "dev"), few) for n in sorted(set(budget.phase_lengths))),
            halved=True,
            probes=False,
            layer_outputs=False,
        )
        if not last_or_teacher:
            return Plan(perplexity=False, dev=shared)
    else:
        shared = None
    grids = []
    for length in sorted(set(lengths)):
        cells = cells_of(length, "test")
        natural = tuple(cell for cell in cells if cell.haystack == HAYSTACKS[0])
        others = tuple(cell for cell in cells if cell not in natural)
        if length == min(lengths):
            off = combined + (each if final else ())
            grids += [Grid(natural, spread, off + explaining), Grid(others, spread, off)]
        else:
            few = math.ceil(spread / 2)
            grids += [Grid(natural, few, combined), Grid(others, few)]
    if last_or_teacher:
        length = min(budget.phase_lengths)
        distractors = min(MOST_DISTRACTORS, max(1, length // DISTRACTOR_EVERY))
        cells = tuple(Cell(length, depth, TRAINED, "train", "novel", distractors) for depth in DEPTHS)
        grids.append(Grid(cells, max(1, budget.episodes // 4)))
    return Plan(
        tuple(grids),
        perplexity_ablations=combined + each + explaining if final else (),
        state_lengths=tuple(budget.speed_lengths) if last_or_teacher else (),
        decode_lengths=tuple(sorted(set(budget.final_lengths))) if last_or_teacher else (),
        generated=min(2, budget.episodes) if final else 0,
        dev=shared,
    )


def cells_of(length: int, phrasing: str) -> tuple[Cell, ...]:
    """The cells of one length; needles in phrasings of the split that `phrasing` names."""
    return tuple(
        Cell(length, depth, kind, "train" if kind == TRAINED else phrasing, haystack)
        for kind in KINDS
        for haystack in HAYSTACKS
        for depth in DEPTHS
    )


def explained_by(parts: Mapping[str, Any]) -> tuple[str, ...]:
    """Those of `EXPLAINING` that a model with these parts allows."""
    return tuple(name for name in EXPLAINING if why_not(name, parts) is None)


def why_not(name: str, parts: Mapping[str, Any]) -> str | None:
    """Why an ablation says nothing about a model with these parts; None where it does."""
    needs = {
        "memory_off": ("memory",),
        "pairs_off": ("pairs",),
        "window_off": ("memory",),
        "sinks_off": ("sinks",),
    }
    wanted = needs.get(name, ("memory", "pairs"))
    words = {"memory": "a linear memory", "pairs": "retained pairs", "sinks": "sinks"}
    if any(parts.get(part) for part in wanted):
        return None
    return f"no layer has {' or '.join(words[part] for part in wanted)}"


def only(plan: Plan, name: str) -> Plan:
    """What of a plan belongs to a base (`eval.base`): quick is all of it, and a+b what a or b has."""
    first, plus, others = name.partition("+")
    if plus:
        one, other = only(plan, first), only(plan, others)
        return Plan(**{f.name: getattr(one, f.name) or getattr(other, f.name) for f in fields(Plan)})
    nothing = Plan(perplexity=False, probes=False, layer_outputs=False)
    dev = None if plan.dev is None else only(plan.dev, name)
    if name == "none":
        return nothing
    if name == "perplexity":
        off = plan.perplexity_ablations
        measured = replace(nothing, perplexity=plan.perplexity, halved=plan.halved, dev=dev)
        return replace(measured, perplexity_ablations=off)
    if name == "recall":
        return replace(nothing, grids=plan.grids, generated=plan.generated, dev=dev)
    if name == "probes":
        return replace(nothing, probes=plan.probes, layer_outputs=plan.layer_outputs)
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
