"""A model that is in memory, on tasks of lm-eval: which tasks, what they give, how far from the teacher.

The figures are lm-eval's own, through its `HFLM` and `simple_evaluate`. What is added is what a comparison
needs: whether each item was answered rightly, so that teacher and student are paired item by item.
"""

import hashlib
import logging
import math
import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import islice
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import torch

from eval.intervals import LEVEL, clopper_pearson, paired_difference
from eval.items import source_of
from replace.errors import UserError, bad_value
from replace.files import expanded

TASKS = Path(__file__).parent / "tasks"
OFFLINE = "offline_"
"""What the names of the task files in `TASKS` begin with, followed by the set of items that each asks."""
ENDINGS = (".yaml", ".yml")
BOOTSTRAPS = 1000
BATCH = {"cpu": 8}
GPU_BATCH = 32


def check_tasks(names: Sequence[str], limit: int | None, *, load: bool = True) -> None:
    """Refuse tasks that cannot be measured, before any model is loaded.

    Args:
        load: also fetch the items of the tasks and look at their gold labels, of the offline ones as well.

    Raises:
        UserError: the first thing found wrong.
    """
    if limit is not None and limit < 1:
        raise bad_value("eval.limit", limit, "a whole number of at least 1, or null for all items")
    if not names or len(set(names)) < len(names):
        raise bad_value("eval.tasks", list(names), "one or more tasks, each once")
    unknown = [name for name in names if name not in offline_tasks()]
    wanted = list(names) if load else unknown
    if wanted:
        with _quiet():
            load_tasks(_manager(wanted), wanted, limit)


def offline_tasks() -> list[str]:
    """The names of the task files that come with the project."""
    return sorted(path.stem for path in TASKS.glob("*.yaml"))


def load_tasks(manager, names: Sequence[str], limit: int | None) -> list[Any]:
    """The tasks and groups of these names, with their items, from lm-eval's `TaskManager`.

    Raises:
        UserError: a task is unknown, its items cannot be had, it runs code that a model wrote, or an item has
            no gold label.
    """
    loaded = []
    leaves: dict[str, str] = {}
    for name in names:
        found = _load(manager, name)
        for leaf, task in found["tasks"].items():
            if leaf in leaves:
                twice = f"each task once ({leaf} is also in {leaves[leaf]})"
                raise bad_value("eval.tasks", list(names), twice)
            leaves[leaf] = name
            _check_task(name, task, limit)
        group = found.get("groups", {}).get(name)
        loaded += [group] if group is not None else list(found["tasks"].values())
    return loaded


def run_tasks(model, tokenizer, names: Sequence[str], limit: int | None) -> dict[str, dict]:
    """The figures of `model` on tasks, in the precision of the surrounding autocast.

    Args:
        limit: items of each task, the first ones; None for all.

    Returns:
        by task {"<metric>": .., "stderr": {..}, "interval": {..} (exact binomial), "n", "of", "limit",
        "chance", "fewshot", "version", "source", "items" (a hash), "hits": {"<metric>": [0 or 1 by item]}};
        "interval" and "hits" have those metrics that are 0 or 1 by item, and a group of tasks has neither. A
        length that a task was not run at is null.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    kind = model.device.type
    # HFLM switches autocast off in its forward unless it is told of it, and would take the softmax in bf16.
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    with _quiet(), _own_random_numbers(model.device):
        manager = _manager(names)
        loaded = load_tasks(manager, names, limit)
        lm = HFLM(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=BATCH.get(kind, GPU_BATCH),
            mixed_precision_dtype=dtype,
            softmax_dtype="float32",
        )
        found = simple_evaluate(
            lm, tasks=loaded, task_manager=manager, limit=limit, bootstrap_iters=BOOTSTRAPS
        )
    return {name: _figures(name, found, limit) for name in found["results"]}


def add_deltas(teacher: dict, student: dict) -> None:
    """Add to each task of `student`, in place, "delta": the student less the teacher, metric by metric.

    Where both answered the same items, the difference is paired: what `eval.intervals.paired_difference`
    gives, and "stderr". Of other metrics the standard errors are added as of independent samples, which
    overstates them. A task that the teacher lacks gets {"why"}.
    """
    for name, entry in student.items():
        other = teacher.get(name)
        if other is None or other["items"] != entry["items"]:
            entry["delta"] = {"why": "the teacher was not measured on these items"}
            continue
        entry["delta"] = {metric: _delta(metric, other, entry) for metric in entry["stderr"]}


def _delta(metric: str, teacher: dict, student: dict) -> dict:
    if metric in student["hits"]:
        mine, theirs = student["hits"][metric], teacher["hits"][metric]
        gaps = np.subtract(mine, theirs)
        stderr = float(gaps.std(ddof=1) / math.sqrt(len(gaps))) if len(gaps) > 1 else None
        return {**paired_difference(mine, theirs), "stderr": stderr} | {"paired": True}
    value, base = student.get(metric), teacher.get(metric)
    errors = student["stderr"][metric], teacher["stderr"].get(metric)
    if value is None or base is None:
        return {"difference": None, "why": "one of the two figures is missing"}
    difference = value - base
    if None in errors:
        return {"difference": difference, "stderr": None, "interval": None, "paired": False}
    stderr = math.hypot(*errors)
    reach = NormalDist().inv_cdf((1 + LEVEL) / 2) * stderr
    interval = [difference - reach, difference + reach]
    return {"difference": difference, "stderr": stderr, "interval": interval, "paired": False}


# Tasks


def _manager(names: Iterable[str]):
    """lm-eval's index of tasks; its own are only read, half a minute, where one of them is asked for."""
    return _index(all(name in offline_tasks() or name.endswith(ENDINGS) for name in names))


@cache
def _index(own: bool):
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(TASKS), include_defaults=not own)


def _load(manager, name: str) -> dict:
    """One task, group or tag, with its items."""
    import jinja2
    import yaml
    from datasets.exceptions import DatasetsError

    is_file = name.endswith(ENDINGS)
    if is_file and not expanded(name).is_file():
        raise bad_value("eval.tasks", name, "a task file that exists")
    if not is_file and name not in manager.all_tasks:
        offline = ", ".join(offline_tasks())
        allowed = f"{offline}, a task file (.yaml), or a name that `lm-eval ls tasks` lists"
        raise bad_value("eval.tasks", name, allowed)
    try:
        return manager.load([str(expanded(name)) if is_file else name])
    except UserError:
        raise
    except (
        *(OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, ImportError, AssertionError),
        *(jinja2.TemplateError, yaml.YAMLError, DatasetsError),
    ) as error:
        reason = " ".join(str(error).split()).rstrip(".")[:200] or type(error).__name__
        allowed = "a task whose items and gold labels lm-eval can read, from a hub only with a network"
        raise bad_value("eval.tasks", name, f"{allowed} ({reason})") from error


def _check_task(name: str, task: Any, limit: int | None) -> None:
    """Refuse a task that runs code, or that has an item without a gold label among those to be measured."""
    if getattr(task, "UNSAFE_CODE", False):
        raise bad_value("eval.tasks", name, "a task that does not run what a model wrote")
    config = getattr(task, "config", None)
    if config is None or callable(config.process_results):
        return  # it scores by code of its own, and only that knows where its labels are
    for number, item in enumerate(islice(task.eval_docs, limit)):
        if not _labelled(task, item):
            raise bad_value("eval.tasks", name, f"a task with gold labels (item {number} has none)")


def _labelled(task: Any, item: dict) -> bool:
    """Whether the item has an answer that can be scored: one of the choices, or some text."""
    gold = task.doc_to_target(item)
    if task.OUTPUT_TYPE != "multiple_choice" or task.multiple_input:
        return gold is not None and gold != "" and gold != []
    choices = task.doc_to_choice(item)
    golds = gold if isinstance(gold, list) else [gold]
    return bool(golds) and all(one in choices or one in range(len(choices)) for one in golds)


# Figures


def _figures(name: str, found: dict, limit: int | None) -> dict:
    """What lm-eval found on one task or group, as `run_tasks` gives it."""
    samples = found.get("samples", {}).get(name, [])
    counts = found["n-samples"].get(name, {})
    metadata = found["configs"].get(name, {}).get("metadata") or {}
    entry: dict[str, Any] = {
        "stderr": {},
        "interval": {},
        "hits": {},
        "n": counts.get("effective"),
        "of": counts.get("original"),
        "limit": limit,
        "chance": _chance(found["configs"].get(name, {}), samples),
        "fewshot": found["n-shot"].get(name),
        "version": metadata.get("version"),
        "source": source_of(name.removeprefix(OFFLINE)) if name in offline_tasks() else None,
        "items": _digest(samples) if samples else None,
    }
    for key, value in found["results"][name].items():
        metric, comma, kept = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        error = found["results"][name].get(f"{metric}_stderr,{kept}")
        word = metric if kept == "none" else key
        entry[word] = None if value == -1 else value  # RULER's sign for a length that was not run
        entry["stderr"][word] = error if isinstance(error, float) else None
        hits = [sample[metric] for sample in samples if sample["filter"] == kept and metric in sample]
        if hits and all(hit in (0, 1) for hit in hits):
            entry["hits"][word] = [int(hit) for hit in hits]
            entry["interval"][word] = clopper_pearson(sum(entry["hits"][word]), len(hits))
    return entry


def _chance(config: dict, samples: Sequence[dict]) -> float | None:
    """The accuracy of a guess; None where an answer is not one of several."""
    if config.get("output_type") != "multiple_choice" or not samples:
        return None
    return sum(1 / len(sample["arguments"]) for sample in samples) / len(samples)


def _digest(samples: Sequence[dict]) -> str:
    """A hash of the items and of what was asked of them, in order: figures pair only where it is the same."""
    parts = [f"{sample['doc_hash']} {sample['prompt_hash']} {sample['target_hash']}" for sample in samples]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


@contextmanager
def _own_random_numbers(device: torch.device) -> Iterator[None]:
    """lm-eval seeds everything for itself; afterwards a run goes on with its own random numbers."""
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


@contextmanager
def _quiet() -> Iterator[None]:
    """Without lm-eval's warnings about what is done here on purpose."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
