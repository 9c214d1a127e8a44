"""The memory of another text: is it what was written that answers, or that there is a memory at all?

A text is read up to a cut. Then each replaced layer's memory and retained pairs are exchanged for those that
the model has after as many tokens of another text, and the rest is read on top of these. What is fair here:

- Window and sinks stay the text's own, so that the words just before the cut follow on from each other as
  they did, and all that has changed is what was stored of older text. With the other text's window a loss
  would also come from the broken sentence.
- The cut lies before the question, so that no token that asks has seen the true state; its window has, and
  may carry on in its keys and values what it read of a needle. That is meant: a needle that is still found
  was handed on from window to window, and not kept in the memory.
- The needle must have left the window at the cut. Where it has not it would be written into the exchanged
  state after it, so such cells are left out.
- A layer that was not replaced keeps its keys and values: that it can carry the needle is what the verdict's
  "carried-by-full-attention" says.

A variant's own state (`State.own`) stays, since only the variant knows whether it is local.
"""

import random
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from eval.ablation import is_replaced
from eval.niah import Cell, MakeEpisode, episodes_of, means, rate, recall
from eval.perplexity import tokenise
from eval.side_by_side import side_by_side
from replace.episodes import Episode

EXCHANGED = ("memory_", "pair_")
"""What the fields of `replace.cache.State` that are exchanged begin with."""


class OtherText:
    """States of a model after the first tokens of a text, which is repeated where it is too short.

    Args:
        text: what is read.
        tokens: the most that will be asked for.
    """

    def __init__(self, model, tokenizer, text: str, tokens: int) -> None:
        ids, _ = tokenise(tokenizer, text, max(2, tokens))
        device = model.get_input_embeddings().weight.device
        self.model = model
        self.row = torch.tensor([ids * -(-tokens // len(ids))], device=device)
        self.states: dict[int, list[Any]] = {}

    def after(self, tokens: int) -> list[Any]:
        """The state of each layer after `tokens` tokens, None where a layer was not replaced."""
        if tokens not in self.states:
            with torch.inference_mode():
                output = self.model(input_ids=self.row[:, :tokens], use_cache=True, logits_to_keep=1)
            slots = output.past_key_values.layers
            self.states[tokens] = [slot.state if is_replaced(slot) else None for slot in slots]
        return self.states[tokens]


class Exchanged:
    """A model that reads its rows with the state exchanged at `cut`, or in the middle; for the measurements.

    It is called as they call a model, without a cache, and gives the logits alone.
    """

    def __init__(self, model, other: OtherText, cut: int | None = None) -> None:
        self.model, self.other, self.cut = model, other, cut

    def __getattr__(self, name: str) -> Any:
        """All else is the model's."""
        return getattr(self.model, name)

    def __call__(self, input_ids: Tensor, use_cache: bool = False, logits_to_keep: int = 0) -> Any:
        """The logits of rows `[B, T]`, of the last `logits_to_keep` positions or of all."""
        tokens = input_ids.shape[1]
        cut = tokens // 2 if self.cut is None else self.cut
        late = tokens - cut
        if logits_to_keep > late:
            raise ValueError(f"{logits_to_keep} logits are asked for, {late} tokens follow the cut")
        keep = 1 if logits_to_keep else 0
        before = self.model(input_ids=input_ids[:, :cut], use_cache=True, logits_to_keep=keep)
        cache = before.past_key_values
        for slot, state in zip(cache.layers, self.other.after(cut), strict=True):
            if state is not None:
                slot.state = exchanged(slot.state, state)
        after = self.model(
            input_ids=input_ids[:, cut:],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=logits_to_keep,
        ).logits
        return SimpleNamespace(logits=after if keep else torch.cat([before.logits, after], dim=1))


def exchanged(own: Any, other: Any) -> Any:
    """The state `own` of B rows with the memory and the retained pairs of `other`, a state of one row."""
    rows = own.length.shape[0]
    taken = {
        field.name: None if value is None else value.expand(rows, *value.shape[1:])
        for field in fields(own)
        if field.name.startswith(EXCHANGED)
        for value in [getattr(other, field.name)]
    }
    return replace(own, **taken)


def left_the_window(episode: Episode, clear: int) -> bool:
    """Whether no needle is in the local part when the question begins.

    Args:
        clear: window and block, `eval.plan.clear_tokens`.
    """
    return all(needle.stop + clear <= episode.question.start + 1 for needle in episode.needles)


def recall_with_other_state(
    model,
    cells: Sequence[Cell],
    make: MakeEpisode,
    other: OtherText,
    *,
    episodes: int,
    clear: int,
    seed: int = 0,
    batch: int = 1,
) -> dict:
    """`eval.niah.recall_grid` with the state exchanged before each question; cells are left out as above."""
    fair = []
    for cell in cells:
        drawn = episodes_of(cell, make, episodes, seed)
        if all(left_the_window(episode, clear) for episode in drawn):
            fair.append((cell, drawn))
    done = []
    with tqdm(total=len(fair) * episodes, desc="other text", unit="episode", leave=False) as bar:

        def measured(items: tuple[Cell, list[Episode]]) -> dict:
            return _recall(model, items[1], other, batch)

        for (cell, _), figures in zip(fair, side_by_side(measured, fair, model), strict=True):
            done.append({**asdict(cell), **figures})
            bar.update(episodes)
    return {"cells": done, "means": means(done)}


def _recall(model, episodes: Sequence[Episode], other: OtherText, batch: int) -> dict:
    """As `eval.niah.recall`; episodes whose questions begin at the same token are read together."""
    hits = [0] * len(episodes)
    right = loss = 0.0
    total = 0
    for cut in sorted({episode.question.start for episode in episodes}):
        places = [place for place, episode in enumerate(episodes) if episode.question.start == cut]
        alike = [episodes[place] for place in places]
        found = recall(Exchanged(model, other, cut), alike, batch=batch)
        tokens = sum(episode.answer.stop - episode.answer.start for episode in alike)
        right, loss = right + found["digit_accuracy"] * tokens, loss + found["answer_loss"] * tokens
        total += tokens
        for place, hit in zip(places, found["hits"], strict=True):
            hits[place] = hit
    return {**rate(hits), "digit_accuracy": right / total, "answer_loss": loss / total, "hits": hits}


def another(books: dict[str, str], name: str) -> str:
    """A held-out text that is not `name`; where there is no other, that one's second half."""
    others = [text for other, text in books.items() if other != name]
    return random.Random(name).choice(others) if others else books[name][len(books[name]) // 2 :]
