"""Needles over length and depth, in several forms, with really generated answers and ranks among wrong ones.

Depths run over the whole text, also where the needle lies inside an exact part; there an answer proves
nothing about a memory, and the cell says so. The forms, and the conventions of RULER's tasks, are those of
`replace/needles.py`.
"""

import random

from tqdm import tqdm

from eval.ablation import ablate, parts_of
from eval.answers import generates, rank, read_prompt
from eval.measurements import MEASUREMENTS
from eval.niah import rate
from eval.stream import Reach, reach_of
from replace.config import Config
from replace.needles import CANDIDATES, Needle, make_needle

SEED = 0


@MEASUREMENTS.register("niah")
def niah(model, tokenizer, config: Config, using) -> dict:
    """{"niah_grid": {"cells", "means", "candidates", "exact": {"window", "block", "sinks", "full"}}}.

    A cell has "form", "length", "depth" (in %), "episodes", "exact", "interval", "hits", "ranks" (of the true
    value, 1 is best), "first" (share of ranks that are 1), "proves_nothing" and then "why"; and in cells that
    prove something "off": "hits" and "ranks" of the same episodes without linear memory and retained pairs.
    Cells beyond the model's positions have null and "why". A mean is one form at one length, over the cells
    that prove something.
    """
    wanted = config.eval
    reach = reach_of(model)
    parts = parts_of(model)
    twin = bool(parts["memory"] or parts["pairs"])
    places = [
        (form, length, depth)
        for length in wanted.niah_lengths
        for form in wanted.niah_forms
        for depth in wanted.niah_depths
    ]
    cells = []
    with tqdm(total=len(places) * wanted.niah_episodes, desc="niah", unit="episode", leave=False) as bar:
        for form, length, depth in places:
            bar.set_postfix_str(f"{form}, {length} tokens, depth {depth:g} %", refresh=False)
            cell = {"form": form, "length": length, "depth": depth}
            if reach.limit is not None and length > reach.limit:
                why = f"longer than the model's {reach.limit} positions"
                cells.append(cell | {"exact": None, "why": why})
                bar.update(wanted.niah_episodes)
                continue
            needles = [
                make_needle(
                    form,
                    tokenizer,
                    random.Random(f"{SEED}/{form}/{length}/{depth:g}/{index}"),
                    length,
                    depth / 100,
                    using.haystacks,
                )
                for index in range(wanted.niah_episodes)
            ]
            cells.append(cell | _measured(model, tokenizer, needles, reach, twin, bar))
    shared = reach.replaced[:1]
    exact = {
        "window": max((options.window for options in reach.replaced), default=None),
        "block": max((options.block for options in reach.replaced), default=None),
        "segments": bool(shared) and all(options.local == "segment" for options in reach.replaced),
        "sinks": reach.sinks,
        "full": reach.full,
    }
    return {"niah_grid": {"cells": cells, "means": means(cells), "candidates": CANDIDATES, "exact": exact}}


def _measured(model, tokenizer, needles: list[Needle], reach: Reach, twin: bool, bar: tqdm) -> dict:
    """One cell's figures."""
    reasons = [
        why
        for needle in needles
        if (why := reach.proves_nothing(needle.episode.needle, needle.episode.answer.start))
    ]
    hits, ranks = _scores(model, tokenizer, needles, reach, bar)
    cell = {**rate(hits), "hits": hits, **_ranked(ranks), "proves_nothing": bool(reasons)}
    if reasons:
        return cell | {"why": reasons[0]}
    if twin:
        with ablate(model, memory=True, pairs=True):
            hits, ranks = _scores(model, tokenizer, needles, reach)
        cell["off"] = {**rate(hits), "hits": hits, **_ranked(ranks)}
    return cell


def _scores(
    model, tokenizer, needles: list[Needle], reach: Reach, bar: tqdm | None = None
) -> tuple[list[int], list[int]]:
    """Of each needle whether its answer is generated, and its rank."""
    hits, ranks = [], []
    for needle in needles:
        stream, logits = read_prompt(model, needle.episode, reach)
        ranks.append(rank(stream, logits, tokenizer, needle.values))
        hits.append(int(generates(stream, logits, tokenizer, needle.episode.answer_text)))
        if bar is not None:
            bar.update()
    return hits, ranks


def _ranked(ranks: list[int]) -> dict:
    first = rate([int(place == 1) for place in ranks])
    return {"ranks": ranks, "first": first["exact"], "first_interval": first["interval"]}


def means(cells: list[dict]) -> list[dict]:
    """Each form at each length over the depths that prove something, the twin beside it.

    "all" is over all depths.
    """
    pooled = []
    for form, length in dict.fromkeys((cell["form"], cell["length"]) for cell in cells):
        alike = [cell for cell in cells if (cell["form"], cell["length"]) == (form, length)]
        counted = [cell for cell in alike if cell["exact"] is not None and not cell["proves_nothing"]]
        entry: dict = {"form": form, "length": length, "cells": len(counted), "of": len(alike)}
        measured = [cell for cell in alike if cell["exact"] is not None]
        entry["all"] = joined(measured) if measured else None
        if not counted:
            why = next((cell["why"] for cell in alike if cell.get("why")), "no cell was measured")
            pooled.append(entry | {"exact": None, "why": why})
            continue
        entry |= joined(counted)
        twins = [cell["off"] for cell in counted if "off" in cell]
        pooled.append(entry | ({"off": joined(twins)} if twins else {}))
    return pooled


def joined(cells: list[dict]) -> dict:
    """The figures of several cells, all episodes together."""
    hits = [hit for cell in cells for hit in cell["hits"]]
    ranks = [place for cell in cells for place in cell["ranks"]]
    return {**rate(hits), "hits": hits, **_ranked(ranks)}
