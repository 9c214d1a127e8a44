"""Recall: is a fact that stands far back in the text still there? Pass keys and needles in a haystack.

Episodes are scored in one forward each, with the answer given (teacher forcing): a row is a hit if every
answer token is the most likely one given the true answer before it. That is the same as an exact match of
greedy decoding: greedy decoding follows the true answer exactly as long as each step's most likely token is
the true one, and up to the first miss both see the same prefix. Only the logits at the answer's positions are
computed.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch.nn import functional as F
from tqdm import tqdm

from eval.intervals import clopper_pearson
from eval.side_by_side import side_by_side
from eval.stored import kept
from replace.episodes import Episode


@dataclass(frozen=True)
class Cell:
    """One place of the grid: `phrasing` is train or test (never trained on), `depth` 0..1 from the start."""

    length: int
    depth: float
    kind: str
    phrasing: str
    haystack: str
    distractors: int = 0

    def group(self) -> tuple:
        """What cells have in common that differ by depth only."""
        return (self.length, self.kind, self.phrasing, self.haystack, self.distractors)


MakeEpisode = Callable[[Cell, random.Random], Episode]


def episodes_of(cell: Cell, make: MakeEpisode, count: int, seed: int) -> list[Episode]:
    """The first `count` episodes of a cell: the same ones in every phase, so that figures can be paired."""
    return [make(cell, random.Random(f"{seed}/{cell}/{index}")) for index in range(count)]


@kept
def recall(model, episodes: Sequence[Episode], *, batch: int = 1) -> dict:
    """Score episodes; rows of one forward have the same number of tokens, so nothing is ever padded.

    Args:
        batch: episodes a forward.

    Returns:
        {"exact", "interval" (Clopper-Pearson), "episodes", "digit_accuracy" (share of answer tokens that are
        the most likely one), "answer_loss" (mean -log p of an answer token), "hits": [0 or 1 for each
        episode, in order]}.
    """
    device = model.get_input_embeddings().weight.device
    hits = [0] * len(episodes)
    right, total, loss = 0, 0, 0.0
    with torch.inference_mode():
        for group in _equal_lengths(episodes, batch):
            rows = torch.stack([episodes[index].input_ids for index in group]).to(device)
            # The last token is only predicted, never read; position t holds the logits of token t + 1.
            keep = max(_answer_length(episodes[index]) for index in group)
            logits = (
                model(input_ids=rows[:, :-1], use_cache=False, logits_to_keep=keep).logits[:, -keep:].float()
            )
            for line, index in enumerate(group):
                count = _answer_length(episodes[index])
                answer = rows[line, -count:]
                match = logits[line, -count:].argmax(-1) == answer
                hits[index] = int(match.all())
                right += int(match.sum())
                total += count
                loss += float(F.cross_entropy(logits[line, -count:], answer, reduction="sum"))
    return {**rate(hits), "digit_accuracy": right / total, "answer_loss": loss / total, "hits": hits}


@kept
def generated(model, tokenizer, episodes: Sequence[Episode]) -> dict:
    """The same episodes with really generated answers: the model's own greedy `generate` through its cache.

    Returns:
        {"episodes", "exact", "agrees": the share of episodes where this and `recall` say the same}.
    """
    device = model.get_input_embeddings().weight.device
    hits = []
    for episode in tqdm(episodes, desc="generation", unit="episode", leave=False):
        prompt = episode.input_ids[: episode.answer.start].unsqueeze(0).to(device)
        with torch.inference_mode():
            output = model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=_answer_length(episode),
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id
                if tokenizer.pad_token_id is not None
                else tokenizer.eos_token_id,
            )
        hits.append(int(output[0].tolist() == episode.input_ids.tolist()))
    scored = recall(model, episodes)["hits"]
    agrees = sum(a == b for a, b in zip(hits, scored, strict=True)) / len(hits)
    return {"episodes": len(hits), "exact": sum(hits) / len(hits), "agrees": agrees}


def rate(hits: Sequence[int]) -> dict:
    """{"exact", "interval", "episodes"} of 0s and 1s."""
    return {
        "exact": sum(hits) / len(hits),
        "interval": clopper_pearson(sum(hits), len(hits)),
        "episodes": len(hits),
    }


def recall_grid(
    model,
    cells: Sequence[Cell],
    make: MakeEpisode,
    *,
    episodes: int,
    seed: int = 0,
    batch: int = 1,
    label: str = "recall",
) -> dict:
    """Every cell of a grid, and the mean over the depths of each group of cells.

    Returns:
        {"cells": [{the fields of the cell, and those of `recall`}], "means": [{the fields of the cell without
        depth, "exact", "interval", "episodes", "digit_accuracy"}]}; a mean pools all its episodes.
    """
    drawn = [episodes_of(cell, make, episodes, seed) for cell in cells]
    done = []
    with tqdm(total=len(cells) * episodes, desc=label, unit="episode", leave=False) as bar:
        found = side_by_side(partial(recall, model, batch=batch), drawn, model)
        for cell, figures in zip(cells, found, strict=True):
            bar.set_postfix_str(f"{cell.length} tokens, {cell.haystack}, depth {cell.depth:g}", refresh=False)
            bar.update(episodes)
            done.append({**asdict(cell), **figures})
    return {"cells": done, "means": means(done)}


def key(cell: dict) -> tuple:
    """A cell's place in the grid, from the dict that `recall_grid` returns."""
    place = Cell(**{name: cell[name] for name in Cell.__dataclass_fields__})
    return (*place.group(), place.depth)


def means(cells: Sequence[dict]) -> list[dict]:
    """Cells that differ by depth only, pooled."""
    groups: dict[tuple, list[dict]] = {}
    for cell in cells:
        groups.setdefault(key(cell)[:-1], []).append(cell)
    pooled = []
    for members in groups.values():
        fields = {name: members[0][name] for name in Cell.__dataclass_fields__ if name != "depth"}
        hits = [hit for cell in members for hit in cell["hits"]]
        digits = sum(cell["digit_accuracy"] * cell["episodes"] for cell in members) / len(hits)
        pooled.append({**fields, **rate(hits), "digit_accuracy": digits})
    return pooled


def _answer_length(episode: Episode) -> int:
    """Tokens of the answer, which stands at the very end of the episode."""
    if episode.answer.stop != len(episode.input_ids):
        raise ValueError("an episode's answer must be its last tokens")
    return episode.answer.stop - episode.answer.start


def _equal_lengths(episodes: Sequence[Episode], batch: int) -> Iterator[list[int]]:
    """Indices of episodes with the same number of tokens, at most `batch` at a time."""
    by_length: dict[int, list[int]] = {}
    for index, episode in enumerate(episodes):
        by_length.setdefault(len(episode.input_ids), []).append(index)
    for members in by_length.values():
        for start in range(0, len(members), batch):
            yield members[start : start + batch]
