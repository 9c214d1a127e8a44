"""What generation costs at several lengths: bytes kept between tokens, and decoded tokens a second."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from eval.ablation import is_replaced
from eval.stored import kept
from replace.convert import attention_layers

CHUNK = 1024
"""Tokens of one forward while a context is read."""
PROBE = 64


def prefill(model: PreTrainedModel, length: int, *, seed: int = 0, label: str = "prefill") -> Cache:
    """Read `length` random tokens (one row) in chunks and return the cache.

    What is read costs the same as any text.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(0, model.config.get_text_config().vocab_size, (1, length), generator=generator).to(
        device
    )
    cache: Cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        for start in tqdm(
            range(0, length, CHUNK), desc=label, unit="chunk", leave=False, disable=length <= CHUNK
        ):
            part = rows[:, start : start + CHUNK]
            cache = model(
                input_ids=part, past_key_values=cache, use_cache=True, logits_to_keep=1
            ).past_key_values
    return cache


@kept
def kept_bytes(model: PreTrainedModel, lengths: list[int]) -> list[dict]:
    """Bytes kept between tokens for one row at each length.

    Ordinary caches grow by a fixed number of bytes a token, up to their window, so theirs are computed. A
    swapped model is really run, but only the first layer of each kind (shapes of its state).

    Returns:
        [{"length", "bytes", "how"}].
    """
    probe = prefill(model, PROBE)
    kinds = [_kind(slot) for slot in probe.layers]
    if not any(is_replaced(slot) for slot in probe.layers):
        how = "computed from the bytes of one token"
        return [
            {"length": n, "bytes": sum(_ordinary(s, n) for s in probe.layers), "how": how} for n in lengths
        ]
    firsts = sorted({kinds.index(kind) for kind in kinds})
    results = []
    for length in lengths:
        with only_layers(model, firsts):
            cache = prefill(model, length, label=f"state at {length} tokens")
        total = sum(_bytes(cache.layers[kinds.index(kind)]) for kind in kinds)
        how = (
            "measured"
            if len(firsts) == len(kinds)
            else f"measured in {len(firsts)} layers, one of each kind of state"
        )
        results.append({"length": length, "bytes": total, "how": how})
    return results


@kept
def decode_speed(model: PreTrainedModel, lengths: list[int], *, steps: int = 12) -> list[dict]:
    """Greedy decoding of one row after contexts of each length.

    Returns:
        [{"length", "tokens_per_second", "steps"}]; the figure is the median over the steps.
    """
    results: list[dict] = []
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for length in lengths:
        if limit is not None and length + steps > limit:
            why = f"longer than the model's {limit} positions"
            results.append({"length": length, "tokens_per_second": None, "why": why})
            continue
        cache = prefill(model, length, label=f"speed at {length} tokens")
        token = torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device)
        seconds = []
        with torch.inference_mode():
            for _ in range(steps):
                start = time.perf_counter()
                output = model(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1)
                cache, token = output.past_key_values, output.logits[:, -1:].argmax(-1)
                int(token)  # waits for an accelerator
                seconds.append(time.perf_counter() - start)
        median = sorted(seconds)[len(seconds) // 2]
        results.append({"length": length, "tokens_per_second": 1 / median, "steps": steps})
    return results


@contextmanager
def only_layers(model: nn.Module, indices: list[int]) -> Iterator[None]:
    """Within the block the decoder has the layers at `indices` and no others."""
    total = len(attention_layers(model))
    for owner in model.modules():
        for name, child in owner.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == total:
                setattr(owner, name, nn.ModuleList([child[index] for index in indices]))
                try:
                    yield
                finally:
                    setattr(owner, name, child)
                return
    raise ValueError(f"no list of {total} decoder layers in {type(model).__name__}")


def _kind(slot) -> tuple:
    """What tells layers with different states apart."""
    if is_replaced(slot):
        return tuple((name, tuple(x.shape), x.dtype) for name, x in slot.state.tensors().items())
    return (type(slot).__name__, _shape(slot), getattr(slot, "sliding_window", None))


def _shape(slot) -> tuple:
    keys = getattr(slot, "keys", None)
    return tuple(keys.shape) if isinstance(keys, torch.Tensor) else ()


def _ordinary(slot, length: int) -> int:
    """Bytes of an ordinary cache layer at `length` tokens, from one that holds `PROBE` tokens."""
    window = getattr(slot, "sliding_window", None)
    tokens = length if window is None else min(length, window - 1)
    kept = min(PROBE, PROBE if window is None else window - 1)
    return _bytes(slot) * tokens // kept


def _bytes(slot) -> int:
    """Bytes of one layer's slot."""
    tensors = list(slot.state.tensors().values()) if is_replaced(slot) else [slot.keys, slot.values]
    return sum(x.numel() * x.element_size() for x in tensors if isinstance(x, torch.Tensor))
