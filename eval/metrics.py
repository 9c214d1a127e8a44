"""metrics.json: every figure of a run, by phase. A stable schema that scripts, sweeps and the report read.

    {"schema": 2, "model", "attention", "experiment", "layers": [..], "seed", "device",
     "wall_seconds": {"<phase>" | "eval <phase>": seconds}, "test_reads",
     "parts": {"replaced", "memory", "pairs", "sinks", "full_attention": numbers of layers,
               "unreplaced": {"full_attention", "sliding_window", "recurrent": indices of layers}},
     "replaced": [{"layer", "path", "old_class", "new_class", "variant", "parameters", "new_parameters",
                   "state_bytes", "magnitude", "scale", "clamp",
                   "output": {"mean", "std", "min", "max", "beyond_fp16"}}],
     "phases": {"<phase>": a phase}, "recovery": {"<figure>": {"value", "interval"} or with "why"},
     "softmax_attention": see replace.softmax_backend.SoftmaxKernels.settle,
     "verdict": {"called", "memory", "pairs", "memory_and_pairs", "carried_by_full_attention", "carriers",
                 "details"},
     "objective": see eval.objective, "items": see eval.stored.items_of, "checklist": see eval.checklist,
     "notes": [sentences],
     "command": what gives the figures of an evaluation again,
     "checkpoint": {"stage", "step" or null} of a run that did not finish}

A phase is one of PHASES and has, as far as it was measured,

    {"perplexity": {"<text>": see eval.perplexity}, "probes": see eval.probes,
     "passkey", "niah": {"cells", "means"}: see eval.niah (a pass key in phrasings of the training; needles in
                                            phrasings never trained on),
     "ablation": {"memory_off" | "pairs_off" | "memory_and_pairs_off" | "window_off" | "sinks_off" |
                  "other_text_state": {"perplexity", "passkey", "niah"},
                  "sliding_window_control": {"run", "phase", "perplexity", "passkey", "niah"},
                  "<one that is not measured>": {"why"}},
     "dev": {"perplexity", "passkey", "niah", "ablation"}, "test_reads",
     "layer_outputs": see eval.layer_outputs, "lm_eval": {"<task>": see eval.harness},
     "writing": see eval.measurements.generation, "inside": see eval.measurements.inside,
     "speed": {"state": see eval.speed.kept_bytes, "decode": see eval.speed.decode_speed},
     "generation": {"episodes", "exact", "agrees"}, "seconds": {"<measurement>": seconds},
     "choice": of the teacher: the ranking of its layers, see replace.ranking, and "taken": layers,
     "training": {"tokens", "loss_first", "loss_last", "skipped_steps", "clamped", "nonfinite",
                  "patterns": {"<of distill.watch>": step at which it was first seen},
                  "why" of a stage that had nothing to learn, and only then,
                  "dev": {"rows", "losses": [[steps done, loss]], "best_step", "taken_step",
                          "stopped_early"}, see distill.dev},
     "tuning" (of lora): {"backend": peft or unsloth, "why", "targets", "rank", "data", "merge_difference",
                          "held_out": {"before", "after", "difference", "standard_error", "tokens", "rows"}}}

Splits. What stands in a phase itself was measured on the test text, what stands in its "dev" on the dev text.
The swap and the stages before the last have figures on dev alone; the teacher and the last phase have both:
test for the table, the ablations and the verdict; perplexity and recall on dev as well, because a recovery
takes teacher, swap and student on one text (`comparable`). Where the data have no dev split, all is measured
on test. A phase's "test_reads" counts how often its model was measured on test, the run's adds these up.

A phase that did not run is absent. A figure that could not be measured is null, with a "why" beside it.
"""

import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from replace.errors import UserError, bad_value
from replace.files import atomic_write

SCHEMA = 2
TEACHERS = ("teacher", "continued_teacher")
"""Phases of a model whose attention was not replaced."""
PHASES = (*TEACHERS, "swapped", "stage1", "stage2", "stage3", "lora", "model")
FILE = "metrics.json"


def new_metrics(
    *,
    model: str,
    attention: str | None,
    layers: list[int],
    seed: int,
    device: str,
    experiment: str | None = None,
) -> dict:
    """The metrics of a run in which nothing has been measured yet."""
    return {
        "schema": SCHEMA,
        "model": model,
        "attention": attention,
        "experiment": experiment,
        "layers": layers,
        "seed": seed,
        "device": device,
        "wall_seconds": {},
        "phases": {},
    }


def write_metrics(folder: Path, metrics: dict) -> Path:
    """Write `metrics` into `folder` as metrics.json, whole or not at all.

    Raises:
        ValueError: it does not follow the schema; the sentence says where.
    """
    wrong = problems(metrics)
    if wrong:
        raise ValueError("; ".join(wrong))
    path = Path(folder) / FILE
    atomic_write(path, json.dumps(clean(metrics), indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    return path


def read_metrics(folder: Path) -> dict:
    """The metrics of a run's folder.

    Those of an earlier schema are brought to this one; the file stays as it is.

    Raises:
        UserError: there are none, or they are of a later schema.
    """
    path = Path(folder) / FILE
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise bad_value("run", str(folder), f"a folder with a readable {FILE}") from error
    metrics = migrated(metrics)
    wrong = problems(metrics)
    if wrong:
        raise UserError(f"{path} does not follow schema {SCHEMA}: {wrong[0]}.")
    return metrics


def migrated(metrics: Any) -> Any:
    """Metrics of an earlier schema as this one has them; everything else as it is."""
    while isinstance(metrics, dict) and metrics.get("schema") in MIGRATIONS:
        metrics = MIGRATIONS[metrics["schema"]](metrics)
    return metrics


def _from_1(metrics: dict) -> dict:
    """Schema 2 gives the experiment a place of its own; before, it stood in that of the attention variant."""
    metrics = {**metrics, "schema": 2}
    if "experiment" not in metrics:
        name = metrics["experiment"] = metrics.get("attention")
        variants = Counter(row["variant"] for row in metrics.get("replaced", ()))
        # `infini_paper` is an experiment with `infini`; where several are mixed, it is named after the one.
        called = [variant for variant in variants if name is not None and name.startswith(variant)]
        if variants:
            metrics["attention"] = max(called, key=len) if called else variants.most_common(1)[0][0]
    return metrics


MIGRATIONS: dict[int, Callable[[dict], dict]] = {1: _from_1}
"""From each earlier schema to the next."""


def problems(metrics: Any) -> list[str]:
    """What is wrong with `metrics`; empty if it follows the schema."""
    if not isinstance(metrics, dict):
        return ["it is not an object"]
    wrong = []
    if metrics.get("schema") != SCHEMA:
        wrong.append(f"schema is {metrics.get('schema')!r} and should be {SCHEMA}")
    wrong += [
        f"{key} is missing" for key in ("model", "layers", "seed", "device", "phases") if key not in metrics
    ]
    phases = metrics.get("phases", {})
    wrong += [f"phases.{name} is none of {', '.join(PHASES)}" for name in phases if name not in PHASES]
    for name, phase in phases.items():
        places = {name: phase, f"{name}.dev": phase.get("dev", {})}
        for place, figures in list(places.items()):
            places |= {f"{place}.ablation.{part}": twin for part, twin in figures.get("ablation", {}).items()}
        for place, figures in places.items():
            for corpus, entry in (figures.get("perplexity") or {}).items():
                if entry.get("ppl") is None and "why" not in entry:
                    wrong.append(f"phases.{place}.perplexity.{corpus} has neither a figure nor a why")
            for task in ("passkey", "niah"):
                for cell in (figures.get(task) or {}).get("cells", []):
                    if len(cell["hits"]) != cell["episodes"]:
                        wrong.append(
                            f"phases.{place}.{task} has {len(cell['hits'])} hits of {cell['episodes']}"
                        )
    return wrong


def clean(value: Any) -> Any:
    """`value` as JSON can hold it: numbers that are not finite become null, tuples lists."""
    if isinstance(value, dict):
        return {str(name): clean(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [clean(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value


TIMES = ("seconds", "wall_seconds", "decode")
"""What differs between two runs of the same figures."""


def without_times(value: Any) -> Any:
    """Metrics, or a part of them, without what was timed."""
    if isinstance(value, dict):
        return {name: without_times(item) for name, item in value.items() if name not in TIMES}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def last_student(metrics: dict) -> str | None:
    """The last measured phase of a student, None if only a teacher was measured."""
    phases = [name for name in PHASES if name not in TEACHERS and name in metrics["phases"]]
    return phases[-1] if phases else None


def comparable(phase: dict) -> dict:
    """The figures of a phase on the text on which all phases of its run were measured."""
    return phase.get("dev", phase)


def perplexities(phase: dict) -> dict:
    """Every text's perplexity, dev before test."""
    return phase.get("dev", {}).get("perplexity", {}) | phase.get("perplexity", {})


def most_final(phase: dict) -> dict:
    """The figures of a phase on test, or on dev where it was measured on that alone."""
    figures = ("perplexity", "passkey", "niah")
    return phase if any(name in phase for name in figures) else comparable(phase)


def count_test_reads(metrics: dict) -> int:
    """How often a model of this run was measured on the test text."""
    return sum(phase.get("test_reads", 0) for phase in metrics["phases"].values())
