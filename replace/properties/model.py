"""Properties of a whole replaced model: masks, positions, caches and generation as transformers has them."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from replace.convert import mixers
from replace.properties import Property, distance, register

PROPERTIES: list[Property] = []

PAD = 0
SHIFT = 57


@dataclass
class Whole:
    """A replaced model and three texts.

    Attributes:
        ids: `[3, T]`, T longer than any exact part.
        limit: of logits that differ by rounding alone.
        length: tokens that a query sees exactly, sinks and pairs aside.
    """

    model: PreTrainedModel
    ids: Tensor
    limit: float
    exact: int

    def logits(self, ids: Tensor, **kwargs) -> Tensor:
        """`[B, T, V]` without a cache."""
        return self.model(input_ids=ids, use_cache=False, **kwargs).logits

    @cached_property
    def want(self) -> Tensor:
        """`[3, T, V]` of the texts."""
        return self.logits(self.ids)

    @property
    def length(self) -> int:
        """T."""
        return self.ids.shape[1]


def holds(name: str, meaning: str):
    """Enter a property of models."""
    return register(PROPERTIES, name, meaning)


@holds(
    "every replaced layer is called once a forward", "a layer is bypassed: what is measured is the teacher"
)
def every_layer_is_called(whole: Whole) -> tuple[float, float]:
    counted: list[Any] = [mixer for mixer in mixers(whole.model).values() if hasattr(mixer, "calls")]
    before = [mixer.calls for mixer in counted]
    whole.logits(whole.ids[:1, :4])
    return sum(abs(m.calls - calls - 1) for m, calls in zip(counted, before, strict=True)), 0


@holds(
    "model: no token sees the future, nor another row of the batch",
    "logits depend on later tokens or on other rows: perplexity and accuracy are worth nothing",
)
def causal_and_apart(whole: Whole) -> tuple[float, float]:
    changed, inside = whole.ids.clone(), min(whole.length - 2, whole.exact + 1)
    places = [whole.length, inside, whole.length // 3][: len(changed)]
    for row, place in enumerate(places):
        if row:  # row 0 stays, beside others that change
            changed[row, place] = (changed[row, place] + 1) % whole.model.config.get_text_config().vocab_size
    got, wrong = whole.logits(changed), 0
    for row, stop in enumerate(places):
        wrong += int((got[row, :stop] != whole.want[row, :stop]).any(-1).sum())
    return wrong, 0


@holds("model: a row alone = the row in a batch", "results depend on what a text was batched with")
def a_row_alone(whole: Whole) -> tuple[float, float]:
    alone = whole.logits(whole.ids[1:2])
    if not torch.equal(alone, whole.logits(whole.ids[1:2])):
        return float("inf"), whole.limit  # two calls alike must be alike
    return distance(alone, whole.want[1:2]), whole.limit


@holds(
    "model: prefill, chunks and decoding = the full forward",
    "the model that generates is not the one that was trained and measured",
)
@torch.no_grad()
def splits_are_the_whole(whole: Whole) -> tuple[float, float]:
    first = whole.length // 2
    cuts = [first, 1, 1, 2]
    cuts.append(max(1, whole.length - sum(cuts) - 1))
    cuts.append(whole.length - sum(cuts))
    cache, outputs = DynamicCache(config=whole.model.config), []
    for piece in whole.ids[:1].split([cut for cut in cuts if cut > 0], dim=1):
        outputs.append(whole.model(input_ids=piece, past_key_values=cache, use_cache=True).logits)
    return distance(torch.cat(outputs, 1), whole.want[:1]), whole.limit


@holds(
    "model: left and right pads change nothing",
    "padded batches give other logits than single texts: batched evaluation and training are wrong",
)
def pads_do_not_matter(whole: Whole) -> tuple[float, float]:
    sides = [(3, 0), (0, 3), (2, 1)][: len(whole.ids)]
    ids, mask = (torch.zeros(len(sides), whole.length + 3, dtype=torch.long) + PAD for _ in range(2))
    mask = mask * 0
    for row, (left, right) in enumerate(sides):
        stop = whole.length + 3 - right
        ids[row, left:stop], mask[row, left:stop] = whole.ids[row].cpu(), 1
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    device = whole.ids.device
    got = whole.logits(ids.to(device), attention_mask=mask.to(device), position_ids=positions.to(device))
    figure = 0.0
    for row, (left, right) in enumerate(sides):
        own = got[row, left : whole.length + 3 - right]
        figure = max(figure, distance(own, whole.want[row]))
    return figure, whole.limit


@holds(
    "model: pads change nothing in continued forwards",
    "a conversation that goes on in a batch reads its own padding",
)
def pads_in_later_calls(whole: Whole) -> tuple[float, float]:
    cache, device = DynamicCache(config=whole.model.config), whole.ids.device
    half, rest = whole.length // 2, whole.length - whole.length // 2
    # For each call: how many tokens the two rows get, and the side of the pads.
    calls = [((half, half - 2), "left"), ((2, rest - 1), "right"), ((rest - 2, 3), "left")]
    done, seen, figure = [0, 0], torch.zeros(2, 0, dtype=torch.long), 0.0
    for counts, side in calls:
        width = max(counts)
        ids, mask = torch.full((2, width), PAD), torch.zeros(2, width, dtype=torch.long)
        for row, count in enumerate(counts):
            place = slice(width - count, width) if side == "left" else slice(0, count)
            ids[row, place], mask[row, place] = whole.ids[row, done[row] : done[row] + count].cpu(), 1
        seen = torch.cat([seen, mask], 1)
        positions = (seen.cumsum(1) - 1).clamp_min(0)[:, -width:]
        got = whole.model(
            input_ids=ids.to(device),
            attention_mask=seen.to(device),
            position_ids=positions.to(device),
            past_key_values=cache,
            use_cache=True,
        ).logits
        for row, count in enumerate(counts):
            want = whole.want[row, done[row] : done[row] + count]
            figure = max(figure, distance(got[row, mask[row].bool().to(device)], want))
            done[row] += count
    return figure, whole.limit


@holds(
    "model: generate with a cache = without",
    "text that is generated is not what the model thinks likeliest",
)
def generate_is_the_same(whole: Whole) -> tuple[float, float]:
    ids = whole.ids[:2, : min(whole.length - 1, whole.exact + 5)].clone()
    mask = torch.ones_like(ids)
    mask[1, :2], ids[1, :2] = 0, PAD
    settings = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "pad_token_id": PAD}
    model: Any = whole.model
    cached, plain = (
        model.generate(ids, attention_mask=mask, use_cache=use, **settings) for use in (True, False)
    )
    return float((cached != plain).sum()), 0


@holds(
    "model: absolute positions do not matter",
    "a text means something else further on: nothing learned at one length holds at another",
)
def positions_do_not_matter(whole: Whole) -> tuple[float, float] | str:
    found: list[Any] = list(mixers(whole.model).values())
    if any(getattr(mixer, "options", None) is not None and mixer.options.rotary for mixer in found):
        return "attention.rotary=true asks for positions"
    if any(getattr(mixer, "rotary", None) is None for mixer in found):
        return "the model has no rotary encoding, or a variant leaves it to the family"
    most = whole.model.config.get_text_config().max_position_embeddings
    if whole.length + SHIFT > most:
        return f"the model has only {most} positions"
    shifted = torch.arange(SHIFT, SHIFT + whole.length, device=whole.ids.device)[None]
    # The family's tables are fp32, whose rounding grows with the position.
    return distance(whole.logits(whole.ids[:1], position_ids=shifted), whole.want[:1]), 1e-3


@holds(
    "model: packed documents do not see each other",
    "training on packed rows mixes texts that have nothing to do with each other",
)
def documents_are_apart(whole: Whole) -> tuple[float, float]:
    lengths = [whole.length - 1, whole.length // 2 + 1]
    packed = torch.cat([whole.ids[row : row + 1, :n] for row, n in enumerate(lengths)], 1)
    positions = torch.cat([torch.arange(n) for n in lengths])[None].to(packed.device)
    got = whole.logits(packed, position_ids=positions).split(lengths, 1)
    figures = [distance(own[0], whole.want[row, : own.shape[1]]) for row, own in enumerate(got)]
    return max(figures), whole.limit


QUICK = [
    p
    for p in PROPERTIES
    if p.measure in (every_layer_is_called, causal_and_apart, splits_are_the_whole, pads_do_not_matter)
]
"""Those that a run checks at conversion."""

EXCUSABLE = [
    p
    for p in PROPERTIES
    if p.measure in (pads_do_not_matter, pads_in_later_calls, positions_do_not_matter, documents_are_apart)
]
"""Those that depend on the family's own masks and positions, which some families do not keep either."""
