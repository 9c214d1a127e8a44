"""Pass keys in a repeated filler, far beyond the lengths of the training; one row, read in pieces.

The form is that of landmark attention (Mohtashami and Jaggi 2023): short sentences over and over, one of them
the key, at the end the question. The state is carried from piece to piece and only the last token's logits
are made, so that the memory needed does not grow with the text.
"""

import math
import random
from dataclasses import asdict

from tqdm import tqdm

from eval.ablation import ablate, parts_of
from eval.answers import generates, read_prompt
from eval.measurements import MEASUREMENTS
from eval.niah import Cell, rate
from eval.plan import DEPTHS
from eval.stream import Reach, reach_of
from replace.config import Config
from replace.episodes import Episode

SEED = 0


@MEASUREMENTS.register("passkey")
def passkey(model, tokenizer, config: Config, using) -> dict:
    """{"passkey_long": {"cells", "means", "training_length"}}.

    A cell has the fields of `eval.niah.Cell`, "times" (its length over that of the training's rows), "hits"
    of generated answers, "exact", "interval", "episodes", "bytes" (of the state after the text) and "off",
    the first half of the episodes without linear memory and retained pairs; beyond the model's positions null
    and "why". Means pool the depths.
    """
    wanted, reach, parts = config.eval, reach_of(model), parts_of(model)
    twin = bool(parts["memory"] or parts["pairs"])
    trained = training_length(config) if parts["replaced"] else None
    cells = []
    total = len(wanted.passkey_lengths) * len(DEPTHS) * wanted.passkey_episodes
    with tqdm(total=total, desc="passkey", unit="episode", leave=False) as bar:
        for length in sorted(wanted.passkey_lengths):
            for depth in DEPTHS:
                bar.set_postfix_str(f"{length} tokens, depth {depth:g}", refresh=False)
                place = Cell(length, depth, "passkey", "train", "filler")
                cell = {**asdict(place), "times": length / trained if trained else None}
                if reach.limit is not None and length > reach.limit:
                    why = f"longer than the model's {reach.limit} positions"
                    cells.append(cell | {"exact": None, "why": why})
                    bar.update(wanted.passkey_episodes)
                    continue
                episodes = [
                    using.make(place, random.Random(f"{SEED}/{place}/{index}"))
                    for index in range(wanted.passkey_episodes)
                ]
                found = _scored(model, tokenizer, episodes, reach, bar)
                if twin:
                    with ablate(model, memory=True, pairs=True):
                        half = episodes[: math.ceil(len(episodes) / 2)]
                        found["off"] = _scored(model, tokenizer, half, reach)
                cells.append(cell | found)
    return {"passkey_long": {"cells": cells, "means": means(cells), "training_length": trained}}


def _scored(model, tokenizer, episodes: list[Episode], reach: Reach, bar: tqdm | None = None) -> dict:
    hits, held = [], 0
    for episode in episodes:
        stream, logits = read_prompt(model, episode, reach)
        held = stream.bytes()
        hits.append(int(generates(stream, logits, tokenizer, episode.answer_text)))
        if bar is not None:
            bar.update()
    return {**rate(hits), "hits": hits, "bytes": held}


def means(cells: list[dict]) -> list[dict]:
    """Each length over its depths."""
    pooled = []
    for length in dict.fromkeys(cell["length"] for cell in cells):
        alike = [cell for cell in cells if cell["length"] == length]
        entry = {"length": length, "times": alike[0]["times"]}
        if alike[0]["exact"] is None:
            pooled.append(entry | {"exact": None, "why": alike[0]["why"]})
            continue
        entry |= rate([hit for cell in alike for hit in cell["hits"]])
        entry["bytes"] = max(cell["bytes"] for cell in alike)
        if "off" in alike[0]:
            entry["off"] = rate([hit for cell in alike for hit in cell["off"]["hits"]])
        pooled.append(entry)
    return pooled


def training_length(config: Config) -> int | None:
    """Tokens of the longest row that a stage trains on, None if none does."""
    stages = (config.budget.stage1, config.budget.stage2, config.budget.stage3)
    return max((stage.length for stage in stages if stage.tokens), default=None)
