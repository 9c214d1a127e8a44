"""The boxes of the layer-replacement guideline, ticked by figures and not by hand.

Every box has what was measured, its limit and a verdict; where nothing was measured the first and the last
are null, with a why.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from eval.metrics import PHASES
from eval.words import exact, recall_means

SCALES = (0.5, 2.0)
"""Between these an output's standard deviation is about the teacher's."""
LINES = 10
"""Logged steps below which nothing is said about a loss."""
DEBUG, BEFORE, BUILDING, TRAINING, EVALUATION = (
    "debugging",
    "before the swap",
    "implementation",
    "training",
    "evaluation",
)


@dataclass(frozen=True)
class Box:
    """One box.

    Attributes:
        value: what was measured, in words; None where it was not.
        limit: what it has to be.
        passed: None where it was not measured.
        why: why not.
    """

    section: str
    box: str
    value: str | None
    limit: str
    passed: bool | None
    why: str | None = None


def checklist(metrics: dict, log: Sequence[dict] = (), config: Mapping[str, Any] | None = None) -> list[dict]:
    """Every box of the guideline's sections 6 and 8.

    Args:
        log: the lines of train.jsonl.
        config: config.json of the run; None where there is none.
    """
    phases = metrics["phases"]
    last = next((name for name in reversed(PHASES) if name in phases and "teacher" not in name), None)
    student = phases.get(last, {}) if last else {}
    replaced = metrics.get("replaced") or []
    boxes = [
        _language(DEBUG, phases.get("teacher", {}), student),
        _scale(student),
        _finite(phases),
        _converged(DEBUG, "has every loss converged?", log, None),
        _distribution(replaced),
        _range(replaced),
        _magnitude(replaced),
        _scaling(replaced),
        _clamp(replaced, phases),
        _detection(phases),
        _logged(log, phases),
        _converged(TRAINING, "the distillation loss converges", log, 1),
        _probed(phases),
        _compared(student, replaced),
        _perplexity(phases.get("teacher", {}), student),
        _recall(student),
        _long(student, config),
    ]
    return [asdict(box) for box in boxes]


def patterns(metrics: dict) -> list[dict]:
    """The failure patterns that the stages were watched for: [{"phase", "seen": {name: step} or None}]."""
    return [
        {"phase": name, "seen": training.get("patterns")}
        for name, training in _trained(metrics["phases"]).items()
    ]


def _trained(phases: Mapping[str, dict]) -> dict[str, dict]:
    """The "training" of the phases that trained; a stage with nothing to learn did not."""
    found = {name: phase["training"] for name, phase in phases.items() if "training" in phase}
    return {name: training for name, training in found.items() if "why" not in training}


def _box(section: str, box: str, limit: str, value: str | None, passed: bool | None, why: str) -> Box:
    return Box(section, box, value, limit, passed, why if passed is None else None)


def _language(section: str, teacher: dict, student: dict) -> Box:
    mine, theirs = (
        {probe["prompt"]: probe["hit"] for probe in phase.get("probes") or []} for phase in (student, teacher)
    )
    asked = [prompt for prompt, hit in (theirs or mine).items() if hit is not None and (hit or not theirs)]
    kept = sum(bool(mine.get(prompt)) for prompt in asked)
    measured = bool(mine) and bool(asked)
    return _box(
        section,
        "is basic language ability kept?",
        "every prompt that the teacher completes" if theirs else "every prompt with a known answer",
        f"{kept} of {len(asked)} prompts" if measured else None,
        kept == len(asked) if measured else None,
        "no probe was run, or none that the teacher completes",
    )


def _scale(student: dict) -> Box:
    rows = student.get("layer_outputs") or []
    ratios = [
        row["std"] / row["teacher_std"] for row in rows if row["std"] is not None and row["teacher_std"]
    ]
    low, high = SCALES
    return _box(
        DEBUG,
        "is the scale of the outputs about the original's?",
        f"each layer's standard deviation {low:g} to {high:g} times the teacher's",
        f"{min(ratios):.2f} to {max(ratios):.2f} times" if ratios else None,
        min(ratios) >= low and max(ratios) <= high and len(ratios) == len(rows) if ratios else None,
        "the outputs were not compared with a teacher's",
    )


def _finite(phases: dict) -> Box:
    trained = list(_trained(phases).values())
    updates = sum(entry.get("nonfinite", 0) for entry in trained)
    skipped = sum(entry.get("skipped_steps", 0) for entry in trained)
    return _box(
        DEBUG,
        "is there no NaN or infinity?",
        "no memory update and no training step",
        f"{updates} updates, {skipped} steps" if trained else None,
        updates == skipped == 0 if trained else None,
        "no stage was trained",
    )


def _called(stage: int | str) -> str:
    """A stage in words; the tuning has no number."""
    return stage if isinstance(stage, str) else f"stage {stage}"


def _converged(section: str, words: str, log: Sequence[dict], only: int | None) -> Box:
    shares = []
    for stage in sorted({line["stage"] for line in log}, key=str):
        losses = [line["loss"] for line in log if line["stage"] == stage and line.get("loss") is not None]
        if (only is None or stage == only) and len(losses) >= LINES:
            tenth = max(1, len(losses) // 10)
            first, last = fmean(losses[:tenth]), fmean(losses[-tenth:])
            shares.append((stage, last / first if first else 1.0))
    which = "stage 1" if only else "a stage"
    return _box(
        section,
        words,
        "last tenth of the logged steps below the first",
        "; ".join(f"{_called(stage)}: {share:.2f} of the first" for stage, share in shares) or None,
        all(share < 1 for _, share in shares) if shares else None,
        f"{which} of at least {LINES} logged steps is needed",
    )


def _distribution(replaced: Sequence[dict]) -> Box:
    whole = [row for row in replaced if all((row.get("output") or {}).get(n) is not None for n in _MOMENTS)]
    return _box(
        BEFORE,
        "the original layers' outputs were analysed (mean, std, min, max)",
        "every replaced layer",
        f"{len(whole)} of {len(replaced)} layers" if replaced else None,
        len(whole) == len(replaced) if replaced else None,
        "no layer was replaced, or it was not recorded which",
    )


_MOMENTS = ("mean", "std", "min", "max")


def _range(replaced: Sequence[dict]) -> Box:
    shares = [(row.get("output") or {}).get("beyond_fp16") for row in replaced]
    known = [share for share in shares if share is not None]
    return _box(
        BEFORE,
        "the range of fp16 and bf16 was considered",
        "no output of an original layer beyond fp16's range",
        f"at most {100 * max(known):.3g} % of a layer's outputs" if known else None,
        max(known) == 0 if known else None,
        "the original layers' outputs were not measured",
    )


def _magnitude(replaced: Sequence[dict]) -> Box:
    changes = [row["magnitude"] for row in replaced if row.get("magnitude") is not None]
    return _box(
        BEFORE,
        "the strategy is scaling, never L2 normalisation",
        "what a layer answers changes when its keys are doubled (with unit-norm keys it would not)",
        f"by at least {100 * min(changes):.3g} %" if changes else None,
        min(changes) > 1e-6 if changes else None,
        "it was not recorded at the swap",
    )


def _scaling(replaced: Sequence[dict]) -> Box:
    scales = [row["scale"] for row in replaced if row.get("scale") is not None]
    return _box(
        BUILDING,
        "a scaling factor is applied",
        "a factor above 0 and below 1 in every layer that scales",
        f"{min(scales):.3g} to {max(scales):.3g} on queries and keys" if scales else None,
        all(0 < scale < 1 for scale in scales) if scales else None,
        "it was not recorded at the swap",
    )


def _clamp(replaced: Sequence[dict], phases: dict) -> Box:
    bounds = [row["clamp"] for row in replaced if row.get("clamp") is not None]
    hits = sum(training.get("clamped", 0) for training in _trained(phases).values())
    return _box(
        BUILDING,
        "updates are clamped",
        "a finite bound in every layer with a memory",
        f"at {min(bounds):g}; {hits} updates reached it in training" if bounds else None,
        True if bounds else None,
        "no layer has a memory, or it was not recorded at the swap",
    )


def _detection(phases: dict) -> Box:
    trained = list(_trained(phases).values())
    counted = [entry for entry in trained if "nonfinite" in entry and "skipped_steps" in entry]
    return _box(
        BUILDING,
        "NaN and infinity are detected",
        "counted in every stage",
        f"{len(counted)} of {len(trained)} stages" if trained else None,
        len(counted) == len(trained) if trained else None,
        "no stage was trained",
    )


def _logged(log: Sequence[dict], phases: dict) -> Box:
    trained = list(_trained(phases))
    stages = {_called(line["stage"]).replace(" ", "") for line in log}
    return _box(
        BUILDING,
        "training is logged",
        "lines of train.jsonl in every stage",
        f"{len(log)} lines of {len(stages)} stages" if trained else None,
        set(trained) <= stages if trained else None,
        "no stage was trained",
    )


def _probed(phases: dict) -> Box:
    with_probes = [name for name, phase in phases.items() if phase.get("probes")]
    return _box(
        TRAINING,
        "the basic language test was run",
        "in every measured phase",
        f"{len(with_probes)} of {len(phases)} phases" if with_probes else None,
        len(with_probes) == len(phases) if with_probes else None,
        "no phase was probed",
    )


def _compared(student: dict, replaced: Sequence[dict]) -> Box:
    rows = {row["layer"]: row for row in student.get("layer_outputs") or []}
    errors = [row["error"] for row in rows.values() if row["error"] is not None]
    wanted = {row["layer"] for row in replaced} or set(rows)
    return _box(
        TRAINING,
        "the layers' outputs were compared with the originals'",
        "every replaced layer",
        f"{len(wanted & set(rows))} of {len(wanted)} layers, largest error {max(errors):.3g} of the variance"
        if errors
        else None,
        wanted <= set(rows) if errors else None,
        "the outputs were not compared with a teacher's",
    )


def _perplexity(teacher: dict, student: dict) -> Box:
    theirs, said = teacher.get("perplexity") or {}, []
    for corpus, entry in (student.get("perplexity") or {}).items():
        if entry.get("ppl") is not None:
            beside = (theirs.get(corpus) or {}).get("ppl")
            gap = f" ({entry['ppl'] / beside - 1:+.1%} against the teacher)" if beside else ""
            said.append(f"{entry['ppl']:.2f} on {corpus}{gap}")
    return _box(
        EVALUATION,
        "perplexity was measured",
        "on at least one held-out text",
        "; ".join(said) or None,
        True if said else None,
        "not part of this phase's plan",
    )


def _recall(student: dict) -> Box:
    said = [
        f"{exact(pooled)} ({pooled['kind']}, {pooled['length']:,} tokens, {pooled['haystack']})"
        for pooled in recall_means(student)
        if not pooled["distractors"]
    ]
    return _box(
        EVALUATION,
        "downstream tasks were evaluated (needle in a haystack)",
        "at least one task",
        "; ".join(said) or None,
        True if said else None,
        "not part of this phase's plan",
    )


def _long(student: dict, config: Mapping[str, Any] | None) -> Box:
    lengths = [pooled["length"] for pooled in recall_means(student)]
    budget = (config or {}).get("budget", {})
    stages = [budget.get(f"stage{number}", {}) for number in (1, 2, 3)]
    trained = max((stage["length"] for stage in stages if stage.get("tokens")), default=None)
    known = bool(lengths) and trained is not None
    return _box(
        EVALUATION,
        "long texts were checked",
        "longer than the rows of the training"
        if trained is None
        else f"longer than the training's {trained:,} tokens",
        f"{max(lengths):,} tokens" if lengths else None,
        max(lengths) > trained if known and trained is not None else None,
        "no recall was measured, or nothing is known of a training",
    )
