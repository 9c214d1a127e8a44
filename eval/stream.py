"""Read one text of any length in pieces, with the state carried along, and say how far a model can look.

Nothing here grows with the text where every layer is replaced: neither the state nor the masks.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from eval.ablation import is_replaced, mixers
from replace.config import AttentionConfig

PIECE = 1024
"""Tokens of one forward."""


@dataclass(frozen=True)
class Reach:
    """How far a model looks, and what of it is exact.

    Attributes:
        limit: the most tokens it can take, None where there is no limit and the state does not grow.
        replaced: the options of its replaced layers.
        full: layers that keep every key.
        windows: tokens that its other unreplaced layers keep.
    """

    limit: int | None
    replaced: tuple[AttentionConfig, ...] = ()
    full: int = 0
    windows: tuple[int, ...] = ()

    def exact_from(self, query: int) -> int:
        """The first position from which on the query at position `query` sees every token exactly."""
        if self.full:
            return 0
        starts = [query - window + 1 for window in self.windows]
        starts += [_exact_start(options, query) for options in self.replaced]
        return max(0, min(starts, default=0))

    @property
    def sinks(self) -> int:
        """Tokens at the beginning that stay exact for good."""
        return max((options.sinks for options in self.replaced), default=0)

    def proves_nothing(self, fact: slice, answer: int) -> str | None:
        """Why an answer that begins at token `answer` says nothing about a memory, None where it does.

        The query that predicts the answer's first token reaches back furthest. Retained pairs are part of
        the memory. Exact layers on top of each other could hand a fact on from window to window; whether they
        do is seen with the memory switched off.
        """
        if self.full:
            return f"{self.full} layers keep full attention"
        if fact.stop > self.exact_from(answer - 1):
            return "the needle lies inside the exact window"
        return "the needle lies among the sinks" if fact.start < self.sinks else None


def _exact_start(options: AttentionConfig, query: int) -> int:
    """The first position of a replaced layer's exact part: its own block, and the whole window before it."""
    if options.local == "none":
        return query + 1
    back = options.window if options.local == "sliding_window" else 0
    return max(0, query // options.block * options.block - back)


def reach_of(model: PreTrainedModel) -> Reach:
    """The reach of a model, seen in its cache after a forward of two tokens."""
    rows = torch.zeros(1, 2, dtype=torch.long, device=device_of(model))
    with torch.inference_mode():
        cache = model(input_ids=rows, use_cache=True).past_key_values
    slots = [slot for slot in cache.layers if slot.is_initialized]
    ordinary = [slot for slot in slots if not is_replaced(slot)]
    spec = getattr(getattr(model, "layer_replace", None), "spec", None)
    names = [index for index, slot in enumerate(cache.layers) if slot.is_initialized and is_replaced(slot)]
    windows = [slot.sliding_window for slot in ordinary if getattr(slot, "is_sliding", False)]
    # Without rotary encoding the positions may be a table, and a table ends.
    endless = not ordinary and all(getattr(mixer, "rotary", None) is not None for mixer in mixers(model))
    return Reach(
        limit=None if endless else positions_of(model),
        replaced=() if spec is None else tuple(spec.layers[index] for index in names),
        full=len(ordinary) - len(windows),
        windows=tuple(windows),
    )


def positions_of(model: PreTrainedModel) -> int | None:
    """The positions that a model was made for, None where its config names none."""
    return getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)


def device_of(model: nn.Module) -> torch.device:
    """Where a model is."""
    return next(model.parameters()).device


class Stream:
    """One row of text, read piece by piece through a cache.

    Where all layers are replaced each piece brings a mask of its own size. Replaced layers read from a mask
    only which tokens are real, while transformers would make one as wide as all of the text so far.
    """

    def __init__(self, model: PreTrainedModel, reach: Reach | None = None) -> None:
        """reach: what `reach_of(model)` gave, where the caller has it already."""
        self.model = model
        self.own_masks = (reach or reach_of(model)).limit is None
        self.cache: Cache = DynamicCache(config=model.config)
        self.tokens = 0

    def feed(self, ids: Tensor, keep: int = 1) -> Tensor:
        """Read `ids` [1, T]; the logits [1, keep, V] of the last `keep` tokens, 0: of all."""
        count = ids.shape[1]
        mask = None
        if self.own_masks and count > 1:
            mask = torch.ones(1, 1, count, count, dtype=torch.bool, device=ids.device).tril()
        with torch.inference_mode():
            output = self.model(
                input_ids=ids,
                attention_mask=mask,
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=keep,
            )
        self.cache = output.past_key_values
        self.tokens += count
        return output.logits

    def bytes(self) -> int:
        """Bytes that the cache holds now."""
        return cache_bytes(self.cache)

    def prefill(self, ids: Tensor, label: str = "prefill") -> Tensor:
        """Read `ids` [1, T] in pieces; the logits [1, 1, V] of the last token."""
        logits = None
        for piece in pieces(ids, label=label):
            logits = self.feed(piece)
        assert logits is not None
        return logits


def pieces(ids: Tensor, size: int = PIECE, label: str = "read") -> Iterator[Tensor]:
    """`ids` [1, T] in pieces of at most `size` tokens, with a progress bar where there are several."""
    starts = range(0, ids.shape[1], size)
    for start in tqdm(starts, desc=label, unit="piece", leave=False, disable=len(starts) < 2):
        yield ids[:, start : start + size]


def cache_bytes(cache: Cache) -> int:
    """Bytes of all tensors that a cache holds, replaced layers (an export's too) and ordinary ones alike."""
    return sum(map(slot_bytes, cache.layers))


def slot_bytes(slot) -> int:
    """Bytes of one layer's place in a cache."""
    if not slot.is_initialized:
        return 0
    tensors = list(slot.state.tensors().values()) if is_replaced(slot) else [slot.keys, slot.values]
    return sum(x.numel() * x.element_size() for x in tensors if isinstance(x, Tensor))
