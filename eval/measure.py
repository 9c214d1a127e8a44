"""Everything that one phase needs, in one call; and what follows from all phases together."""

import logging
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from eval.ablation import ablate, parts_of
from eval.layer_outputs import Reference, capture, layer_outputs
from eval.measurements import MEASUREMENTS
from eval.metrics import PHASES
from eval.niah import Cell, MakeEpisode, episodes_of, generated, recall_grid
from eval.perplexity import perplexity, tokenise
from eval.plan import ABLATIONS, NOT_MEASURED, Grid, Plan, clear_tokens, only, plan_for
from eval.probes import probe
from eval.speed import decode_speed, kept_bytes
from eval.stored import kept
from eval.verdict import recovery, verdict
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
        reference: the teacher's attention outputs, once the teacher was measured.
    """

    books: dict[str, str]
    make: MakeEpisode
    reference: Reference | None = None


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
    sources: dict[str, HaystackSource] = {}

    def make(cell: Cell, rng: random.Random) -> Episode:
        if cell.haystack not in sources:
            sources[cell.haystack] = haystack(cell.haystack, documents, tokenizer)
        return make_episode(
            tokenizer,
            rng,
            cell.length,
            cell.depth,
            cell.kind,
            sources[cell.haystack],
            cell.phrasing,
            distractors=cell.distractors,
            clear=clear,
            haystack_split="test",
        )

    return Yardstick({document.name: document.text for document in held_out_books(documents)}, make)


def held_out_books(documents: Sequence[Document]) -> list[Document]:
    """The two held-out books for perplexity; of a user's own data its longest test documents."""
    test = [document for document in documents if document.split == "test"]
    named = [document for document in test if document.name in PERPLEXITY_BOOKS]
    return named or sorted(test, key=lambda document: -len(document.text))[:2]


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
            if plan is None:
                plan = plan_for(config.budget.eval, parts_of(model), phase=phase, final=final)
                plan = only(plan, config.eval.base)
            if plan.perplexity:
                with _timed(seconds, phase, "perplexity"):
                    result["perplexity"] = _perplexities(model, tokenizer, config, using)
            if plan.probes:
                with _timed(seconds, phase, "probes"):
                    result["probes"] = probe(model, tokenizer)
            if phase == "teacher":
                using.reference = capture(model, probe_rows(tokenizer, using))
            if plan.layer_outputs and using.reference is not None:
                with _timed(seconds, phase, "layer_outputs"):
                    result["layer_outputs"] = layer_outputs(model, using.reference)
            if plan.grids:
                with _timed(seconds, phase, "recall"):
                    result |= _recalls(model, plan.grids, using)
            ablation = _ablations(model, tokenizer, config, plan, using, seconds, phase)
            if ablation:
                others = {name: {"why": why} for name, why in NOT_MEASURED.items()} if final else {}
                result["ablation"] = ablation | others
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
    finally:
        model.train(training)
        for parameter in trained:
            parameter.requires_grad_(True)
    result["seconds"] = seconds
    return result


def _perplexities(model, tokenizer, config: Config, using: Yardstick) -> dict[str, dict]:
    budget = config.budget.eval
    return {
        name: perplexity(
            model,
            tokenizer,
            text,
            length=budget.perplexity_length,
            tokens=budget.perplexity_tokens,
            batch=_batch(model, budget.perplexity_length),
            seed=SEED,
            label=f"perplexity, {name}",
        )
        for name, text in using.books.items()
    }


def _recalls(model, grids: Sequence[Grid], using: Yardstick, ablation: str = "") -> dict[str, dict]:
    """{"passkey": ..., "niah": ...}: pass keys in phrasings as in the training, and everything else."""
    results: dict[str, dict] = {}
    for grid in grids:
        trained = [cell for cell in grid.cells if cell.kind == "passkey" and cell.phrasing == "train"]
        others = [cell for cell in grid.cells if cell not in trained]
        for task, cells in (("passkey", trained), ("niah", others)):
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


def _ablations(
    model, tokenizer, config: Config, plan: Plan, using: Yardstick, seconds: dict[str, float], phase: str
) -> dict[str, dict]:
    """The twins of this phase with parts of the state switched off, on the same episodes and windows."""
    twins = {}
    for name, parts in ABLATIONS.items():
        grids = [grid for grid in plan.grids if name in grid.ablations]
        with_perplexity = name in plan.perplexity_ablations
        if not grids and not with_perplexity:
            continue
        with _timed(seconds, phase, name), ablate(model, **parts):
            twin = _recalls(model, grids, using, ablation=name)
            if with_perplexity:
                twin["perplexity"] = _perplexities(model, tokenizer, config, using)
        twins[name] = twin
    return twins


def probe_rows(tokenizer, using: Yardstick) -> torch.Tensor:
    """The beginning of the first held-out text, [1, T]."""
    ids, _ = tokenise(tokenizer, next(iter(using.books.values())), PROBE_TOKENS)
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


def conclude(metrics: dict, parts: dict[str, int]) -> None:
    """Add to `metrics`, in place, the parts and the last phase's recovery and verdict."""
    student = last_student(metrics)
    metrics["parts"] = parts
    if student is None:
        return
    metrics["recovery"] = recovery(metrics["phases"], student, seed=SEED)
    metrics["verdict"] = verdict(metrics["phases"][student], parts, seed=SEED)


def last_student(metrics: dict) -> str | None:
    """The last measured phase of a student, None if only a teacher was measured."""
    return next((name for name in reversed(PHASES) if name != "teacher" and name in metrics["phases"]), None)
