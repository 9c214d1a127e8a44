"""Switch parts of the replaced attention off in a trained model and see what each of them was worth."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import CacheLayerMixin

from replace.convert import at_rest

PARTS = ("memory", "pairs", "sinks", "window")


def mixers(model: nn.Module) -> list[nn.Module]:
    """The mixers of a swapped model: modules with an attribute `off`, the set of their parts that are off."""
    return [module for module in model.modules() if isinstance(getattr(module, "off", None), frozenset)]


def is_replaced(slot) -> bool:
    """Whether a place in the cache is that of a replaced layer, ours or an export's copy of the class."""
    return getattr(slot, "state", None) is not None


def parts_of(model: nn.Module) -> dict[str, Any]:
    """How many decoder layers keep what between tokens, seen in the cache after a forward of two tokens.

    Returns:
        {"replaced", "memory", "pairs", "sinks", "full_attention": numbers of layers; "unreplaced":
        {"full_attention", "sliding_window", "recurrent": indices of the layers that were left as they were}}.
        A layer with full attention keeps every key, so it can carry a fact by itself; one with a sliding
        window of the teacher's own can as far as that window reaches, and a recurrent one as well as it can.
    """
    rows = torch.zeros(1, 2, dtype=torch.long, device=next(model.parameters()).device)
    # At rest: while it trains with activation checkpointing, transformers makes no cache.
    with torch.inference_mode(), at_rest(model):
        cache = model(input_ids=rows, use_cache=True).past_key_values
    states = [slot.state for slot in cache.layers if is_replaced(slot)]
    unreplaced: dict[str, list[int]] = {"full_attention": [], "sliding_window": [], "recurrent": []}
    for index, slot in enumerate(cache.layers):
        if not is_replaced(slot):
            kind = _kind(slot)
            if kind is not None:
                unreplaced[kind].append(index)
    return {
        "replaced": len(states),
        "memory": sum(state.memory_M is not None for state in states),
        "pairs": sum(state.pair_keys is not None for state in states),
        "sinks": sum(state.sink_keys.shape[2] > 0 for state in states),
        "full_attention": len(unreplaced["full_attention"]),
        "unreplaced": unreplaced,
    }


def _kind(slot) -> str | None:
    """What an ordinary place in the cache keeps; None for one that its layer does not use."""
    if not isinstance(slot, CacheLayerMixin):
        return "recurrent"
    if not slot.is_initialized:
        return None
    return "sliding_window" if getattr(slot, "is_sliding", False) else "full_attention"


@contextmanager
def ablate(
    model: nn.Module,
    memory: bool = False,
    pairs: bool = False,
    sinks: bool = False,
    window: bool = False,
    *,
    beside_memory: bool = False,
) -> Iterator[None]:
    """Within the block the named parts of every mixer are not read; the weights stay as they are.

    What was off before stays off, and afterwards, also after an error, everything is as it was.

    Args:
        beside_memory: only in mixers that have a memory. The window is switched off in these alone: there
            the memory answers by itself, while elsewhere nothing would be left to answer.
    """
    chosen = {"memory": memory, "pairs": pairs, "sinks": sinks, "window": window}
    off = frozenset(part for part in PARTS if chosen[part])
    before = [
        (mixer, mixer.off)
        for mixer in mixers(model)
        if not beside_memory or getattr(mixer, "has_memory", False)
    ]
    try:
        for mixer, already in before:
            mixer.off = already | off  # type: ignore[operator, assignment]
        yield
    finally:
        for mixer, already in before:
            mixer.off = already
