"""Everything that one phase needs, in one call; and what follows from all phases together."""

import logging
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from eval.ablation import ablate, parts_of
from eval.control import control_of
from eval.harness import add_deltas
from eval.layer_outputs import Reference, capture, layer_outputs
from eval.measurements import KEPT, MEASUREMENTS
from eval.metrics import PHASES, comparable, count_test_reads, last_student, most_final
from eval.niah import Cell, MakeEpisode, episodes_of, generated, recall_grid
from eval.objective import objective
from eval.other_text import Exchanged, OtherText, another, recall_with_other_state
from eval.perplexity import perplexity, tokenise
from eval.plan import (
    ABLATIONS,
    EXPLAINING,
    OTHER_TEXT,
    Grid,
    Plan,
    clear_tokens,
    only,
    plan_for,
    why_not,
)
from eval.probes import probe
from eval.speed import decode_speed, kept_bytes
from eval.stored import kept
from eval.verdict import CONTROL, recovery, verdict
from replace import ranks
from replace.config import Config
from replace.corpora import PERPLEXITY_BOOKS, Document, load_documents
from replace.episodes import Episode, HaystackSource, haystack, make_episode
from replace.precision import autocast, cast_once

logger = logging.getLogger(__name__)

PROBE_TOKENS = 256
"""Tokens of held-out text on which the layers' outputs are compared."""
SEED = 0
"""Of episodes and bootstraps: the same in every run, whatever its training seed, so that runs compare."""


@dataclass
class Yardstick:
    """The held-out texts and what makes episodes: made once a run, the same for every phase.

    Attributes:
        books: perplexity texts by name.
        make: makes the episode of a cell.
        haystacks: gives the held-out haystack of a name.
        reference: the teacher's attention outputs, once the teacher was measured.
        clear: least tokens between a needle and the answer.
        dev: the same of the dev split, None where there is none.
        kept: what measurements keep of the teacher for the students, by their names.
    """

    books: dict[str, str]
    make: MakeEpisode
    haystacks: Callable[[str], HaystackSource]
    reference: Reference | None = None
    clear: int = 0
    dev: "Yardstick | None" = None
    kept: dict[str, Any] = field(default_factory=dict)


def yardstick(
    tokenizer, config: Config, documents: Sequence[Document] | None = None, *, clear: int | None = None
) -> Yardstick:
    """Prepare the held-out texts of a run.

    Args:
        documents: what `load_documents(config.data)` gave, where the caller has it already.
        clear: least tokens between a needle and the answer; by default what the config's attention needs.

    Raises:
        UserError: the texts cannot be had.
    """
    documents = load_documents(config.data) if documents is None else documents
    clear = clear_tokens(config.attention) if clear is None else clear
    test = _held_out(tokenizer, documents, "test", clear)
    if any(document.split == "dev" for document in documents):
        test.dev = _held_out(tokenizer, documents, "dev", clear)
    return test


def _held_out(tokenizer, documents: Sequence[Document], split: str, clear: int) -> Yardstick:
    """The texts and episodes of one split."""
    sources: dict[str, HaystackSource] = {}

    def haystacks(name: str) -> HaystackSource:
        if name not in sources:
            sources[name] = haystack(name, documents, tokenizer)
        return sources[name]

    def make(cell: Cell, rng: random.Random) -> Episode:
        return make_episode(
            tokenizer,
            rng,
            cell.length,
            cell.depth,
            cell.kind,
            haystacks(cell.haystack),
            cell.phrasing,
            distractors=cell.distractors,
            clear=clear,
            haystack_split=split,
        )

    books = {document.name: document.text for document in held_out_books(documents, split)}
    return Yardstick(books, make, haystacks, clear=clear)


def held_out_books(documents: Sequence[Document], split: str = "test") -> list[Document]:
    """The two held-out books for perplexity; of other texts the longest documents of the split."""
    held_out = [document for document in documents if document.split == split]
    named = [document for document in held_out if document.name in PERPLEXITY_BOOKS]
    return named or sorted(held_out, key=lambda document: -len(document.text))[:2]


def measure(
    model,
    tokenizer,
    config: Config,
    *,
    phase: str,
    final: bool,
    using: Yardstick,
    plan: Plan | None = None,
    into: dict | None = None,
) -> dict:
    """Measure one phase and return its dict in the schema of `eval.metrics`, in the precision of the config.

    The first call of a run measures the teacher: its layer outputs are kept in `using` for the later ones.
    How long each measurement took stands under "seconds", and in the log.

    Args:
        phase: one of `eval.metrics.PHASES`.
        final: whether it is the last phase, which gets the full grid, all ablations and generation.
        using: from `yardstick`.
        plan: what to measure; by default `eval.plan.plan_for` the budget, narrowed to `config.eval.base`.
        into: an empty dict to fill, so that a caller keeps what was measured before an interruption.
    """
    if phase not in PHASES:
        raise ValueError(f"{phase!r} is none of {', '.join(PHASES)}")
    training = model.training
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval().requires_grad_(False)
    seconds: dict[str, float] = {}
    result: dict = {} if into is None else into
    try:
        with autocast(config.precision, model.device), cast_once(model, config.precision):
            parts = parts_of(model)
            if plan is None:
                plan = plan_for(
                    config.budget.eval, parts, phase=phase, final=final, dev=using.dev is not None
                )
                plan = only(plan, config.eval.base)
            result |= _figures(model, tokenizer, config, plan, using, seconds, phase)
            if plan.dev is not None and using.dev is not None:
                figures = _figures(model, tokenizer, config, plan.dev, using.dev, seconds, phase, "dev ")
                result |= {"dev": figures} if figures else {}
            if result.get("ablation") and final:
                measured = result["ablation"]
                measured |= ranks.by_main(lambda: _unmeasured(config, measured, parts))
            # The rest is small, or a timing that others would disturb.
            result |= ranks.by_main(
                lambda: _more(model, tokenizer, config, plan, using, seconds, phase, final)
            )
    finally:
        model.train(training)
        for parameter in trained:
            parameter.requires_grad_(True)
    on_test = (
        plan.perplexity or bool(plan.grids) or (bool(config.eval.more) and (final or phase == "teacher"))
    )
    result["test_reads"] = int(on_test)
    result["seconds"] = seconds
    return result


def _more(
    model,
    tokenizer,
    config: Config,
    plan: Plan,
    using: Yardstick,
    seconds: dict[str, float],
    phase: str,
    final: bool,
) -> dict:
    """What is measured besides texts and episodes; keeps in `using` what later phases need of the teacher."""
    result: dict = {}
    if plan.probes:
        with _timed(seconds, phase, "probes"):
            result["probes"] = probe(model, tokenizer)
    if phase == "teacher":
        keep_teacher(model, tokenizer, config, using)
    if plan.layer_outputs and using.reference is not None:
        with _timed(seconds, phase, "layer_outputs"):
            result["layer_outputs"] = layer_outputs(model, using.reference)
    if plan.generated and plan.grids:
        with _timed(seconds, phase, "generation"):
            cell = plan.grids[0].cells[0]
            drawn = episodes_of(cell, using.make, plan.generated, SEED)
            result["generation"] = generated(model, tokenizer, drawn)
    if plan.state_lengths or plan.decode_lengths:
        with _timed(seconds, phase, "speed"):
            result["speed"] = {
                "state": kept_bytes(model, list(plan.state_lengths)),
                "decode": decode_speed(model, list(plan.decode_lengths)),
            }
    for name in config.eval.more if final or phase == "teacher" else ():
        with _timed(seconds, phase, name):
            result |= kept(MEASUREMENTS.get(name))(model, tokenizer, config, using)
    return result


def keep_teacher(model, tokenizer, config: Config, using: Yardstick) -> None:
    """Keep in `using` what later phases are compared with: layer outputs, and what `eval.more` asks for."""
    if using.reference is None:
        using.reference = capture(model, probe_rows(tokenizer, using))
    for name in config.eval.more:
        if name in KEPT.names() and name not in using.kept:
            using.kept[name] = KEPT.get(name)(model, tokenizer, config, using)


def _figures(
    model,
    tokenizer,
    config: Config,
    plan: Plan,
    using: Yardstick,
    seconds: dict[str, float],
    phase: str,
    split: str = "",
) -> dict:
    """Perplexity, recall and their ablations on the texts of one split; `split` stands before the seconds."""
    jobs: dict[str, Callable[[], dict]] = {}
    if plan.perplexity:
        jobs["perplexity"] = lambda: _perplexities(model, tokenizer, config, using, halved=plan.halved)
    if plan.grids:
        jobs["recall"] = lambda: _recalls(model, plan.grids, using)
    for name in (*ABLATIONS, OTHER_TEXT):
        if name in plan.perplexity_ablations or any(name in grid.ablations for grid in plan.grids):
            jobs[name] = partial(_ablated, model, tokenizer, config, plan, using, name)

    def timed(name: str, job: Callable[[], dict]) -> dict:
        took: dict[str, float] = {}
        with _timed(took, phase, f"{split}{name}"):
            figures = job()
        return {"figures": figures, "seconds": took}

    done = ranks.spread({name: partial(timed, name, job) for name, job in jobs.items()})
    result: dict = {}
    for name, one in done.items():
        seconds |= one["seconds"]
        if name == "perplexity":
            result[name] = one["figures"]
        elif name == "recall":
            result |= one["figures"]
        else:
            result.setdefault("ablation", {})[name] = one["figures"]
    return result


def _unmeasured(config: Config, measured: dict, parts: dict[str, Any]) -> dict[str, dict]:
    """The ablations of the last phase that are no switch, and why the others are missing."""
    others = {
        name: {"why": why_not(name, parts) or "not part of this plan"}
        for name in EXPLAINING
        if name not in measured
    }
    return others | {CONTROL: control_of(config, parts)}


def _perplexities(
    model, tokenizer, config: Config, using: Yardstick, ablation: str = "", *, halved: bool = False
) -> dict[str, dict]:
    """Of each text; for what only explains, of the first half of the first one's windows.

    Args:
        halved: of the first half of each text's windows.
    """
    budget = config.budget.eval
    length, tokens = budget.perplexity_length, budget.perplexity_tokens
    books = list(using.books.items())
    if ablation in EXPLAINING:
        books = books[:1]
    if halved or ablation in EXPLAINING:
        tokens = max(length, tokens // length // 2 * length)
    results = {}
    for name, text in books:
        subject = model
        if ablation == OTHER_TEXT:
            other = OtherText(model, tokenizer, another(using.books, name), length // 2)
            subject = Exchanged(model, other)
        results[name] = perplexity(
            subject,
            tokenizer,
            text,
            length=length,
            tokens=tokens,
            batch=_batch(model, length),
            seed=SEED,
            label=f"{ablation.replace('_', ' ')} perplexity, {name}".strip(),
        )
    return results


def _recalls(model, grids: Sequence[Grid], using: Yardstick, ablation: str = "") -> dict[str, dict]:
    """{"passkey": ..., "niah": ...}: pass keys in phrasings as in the training, and everything else."""
    results: dict[str, dict] = {}
    for grid in grids:
        for task in ("passkey", "niah"):
            cells = [cell for cell in grid.cells if _task(cell.kind, cell.phrasing) == task]
            if cells:
                found = recall_grid(
                    model,
                    cells,
                    using.make,
                    episodes=grid.episodes_of(ablation),
                    seed=SEED,
                    batch=_batch(model, max(cell.length for cell in cells)),
                    label=ablation.replace("_", " ") or "recall",
                )
                joined = results.setdefault(task, {"cells": [], "means": []})
                joined["cells"] += found["cells"]
                joined["means"] += found["means"]
    return results


def _ablated(
    model,
    tokenizer,
    config: Config,
    plan: Plan,
    using: Yardstick,
    name: str,
) -> dict:
    """The twin of this phase under one ablation, on the same episodes and windows."""
    grids = [grid for grid in plan.grids if name in grid.ablations]
    with_perplexity = name in plan.perplexity_ablations
    twin: dict = {}
    switched = ablate(model, **ABLATIONS[name]) if name in ABLATIONS else nullcontext()
    with switched:
        if name == OTHER_TEXT:
            items = replace(using, reference=None, dev=None, kept={})
            return _with_other_state(model, tokenizer, config, grids, items, with_perplexity)
        twin |= _recalls(model, grids, using, ablation=name)
        if with_perplexity:
            twin["perplexity"] = _perplexities(model, tokenizer, config, using, name)
    return twin


@kept
def _with_other_state(
    model, tokenizer, config: Config, grids: Sequence[Grid], using: Yardstick, with_perplexity: bool
) -> dict[str, dict]:
    """Recall and perplexity with the state of another text; kept as one, since neither is the model alone."""
    twin = _recalls_with_other_state(model, tokenizer, grids, using)
    if with_perplexity:
        twin["perplexity"] = _perplexities(model, tokenizer, config, using, OTHER_TEXT)
    return twin


def _recalls_with_other_state(model, tokenizer, grids: Sequence[Grid], using: Yardstick) -> dict[str, dict]:
    """As `_recalls`, with the state of a held-out book in place of the haystack's."""
    results: dict[str, dict] = {}
    for grid in grids:
        length = max(cell.length for cell in grid.cells)
        other = OtherText(model, tokenizer, next(iter(using.books.values())), length)
        found = recall_with_other_state(
            model,
            grid.cells,
            using.make,
            other,
            episodes=grid.episodes_of(OTHER_TEXT),
            clear=using.clear,
            seed=SEED,
            batch=_batch(model, length),
        )
        for part in ("cells", "means"):
            for entry in found[part]:
                results.setdefault(_task(entry["kind"], entry["phrasing"]), {"cells": [], "means": []})[
                    part
                ].append(entry)
    return results


def _task(kind: str, phrasing: str) -> str:
    """Pass keys in phrasings as in the training are one task, everything else the other."""
    return "passkey" if kind == "passkey" and phrasing == "train" else "niah"


def probe_rows(tokenizer, using: Yardstick) -> torch.Tensor:
    """The beginning of the first dev text, or of the first test text where there is no dev, [1, T]."""
    books = (using.dev or using).books
    ids, _ = tokenise(tokenizer, next(iter(books.values())), PROBE_TOKENS)
    return torch.tensor([ids])


def _batch(model, length: int) -> int:
    """Rows of a forward of `length` tokens: a CPU gains nothing beyond about 4,096 tokens at once."""
    return max(1, 4096 // length) if model.device.type == "cpu" else 8


@contextmanager
def _timed(seconds: dict[str, float], phase: str, name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] = round(time.perf_counter() - start, 2)
    logger.info("%s: %s took %.1f s", phase, name, seconds[name])


def conclude(metrics: dict, parts: dict[str, Any]) -> None:
    """Add to `metrics`, in place, parts, reads of test, recovery, verdict and deltas to the teacher."""
    student = last_student(metrics)
    metrics["parts"] = parts
    metrics["test_reads"] = count_test_reads(metrics)
    metrics["objective"] = objective(metrics["phases"])
    if student is None:
        return
    phases = {name: comparable(phase) for name, phase in metrics["phases"].items()}
    metrics["recovery"] = recovery(phases, student, seed=SEED)
    metrics["verdict"] = verdict(most_final(metrics["phases"][student]), parts, seed=SEED)
    teacher = metrics["phases"].get("teacher", {})
    add_deltas(teacher.get("lm_eval", {}), metrics["phases"][student].get("lm_eval", {}))
