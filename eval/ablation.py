"""Switch parts of the replaced attention off in a trained model and see what each of them was worth."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

PARTS = ("memory", "pairs", "sinks", "window")


def mixers(model: nn.Module) -> list[nn.Module]:
    """The mixers of a swapped model: modules with an attribute `off`, the set of their parts that are off."""
    return [module for module in model.modules() if isinstance(getattr(module, "off", None), frozenset)]


def is_replaced(slot) -> bool:
    """Whether a place in the cache is that of a replaced layer, ours or an export's copy of the class."""
    return getattr(slot, "state", None) is not None


def parts_of(model: nn.Module) -> dict[str, int]:
    """How many decoder layers keep what between tokens, seen in the cache after a forward of two tokens.

    Returns:
        {"replaced", "memory", "pairs", "full_attention": numbers of layers}; a layer with full attention
        keeps every key, so it can carry a fact by itself.
    """
    rows = torch.zeros(1, 2, dtype=torch.long, device=next(model.parameters()).device)
    with torch.inference_mode():
        cache = model(input_ids=rows, use_cache=True).past_key_values
    slots = [slot for slot in cache.layers if slot.is_initialized]
    states = [slot.state for slot in slots if is_replaced(slot)]
    ordinary = [slot for slot in slots if not is_replaced(slot)]
    return {
        "replaced": len(states),
        "memory": sum(state.memory_M is not None for state in states),
        "pairs": sum(state.pair_keys is not None for state in states),
        "full_attention": sum(not getattr(slot, "is_sliding", False) for slot in ordinary),
    }


@contextmanager
def ablate(
    model: nn.Module, memory: bool = False, pairs: bool = False, sinks: bool = False, window: bool = False
) -> Iterator[None]:
    """Within the block the named parts of every mixer are not read; the weights stay as they are.

    What was off before stays off, and afterwards, also after an error, everything is as it was.
    """
    chosen = {"memory": memory, "pairs": pairs, "sinks": sinks, "window": window}
    off = frozenset(part for part in PARTS if chosen[part])
    before = [(mixer, mixer.off) for mixer in mixers(model)]
    try:
        for mixer, already in before:
            mixer.off = already | off  # type: ignore[operator, assignment]
        yield
    finally:
        for mixer, already in before:
            mixer.off = already
