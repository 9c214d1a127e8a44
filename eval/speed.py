"""What generation costs at several lengths: bytes kept between tokens, time to read, time to write."""

import copy
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from eval.ablation import is_replaced
from eval.stored import kept
from eval.stream import Stream, cache_bytes, device_of, pieces, reach_of, slot_bytes
from kernels.peak import peak_bytes
from replace.convert import attention_layers

CHUNK = 1024
"""Tokens of one forward while a context is read."""
PROBE = 64
TIMED = ("prefill_tokens_per_second", "first_token_seconds", "decode_tokens_per_second", "peak_bytes")
"""What `costs` measures by running the whole model."""


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
        total = sum(slot_bytes(cache.layers[kinds.index(kind)]) for kind in kinds)
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


def costs(model: PreTrainedModel, lengths: list[int], *, steps: int = 12) -> list[dict]:
    """Reading a context of each length (one row of random tokens, in pieces) and writing on after it.

    Returns:
        [{"length", "bytes" (of the cache), "prefill_tokens_per_second", "first_token_seconds" (from nothing
        to the first new token), "decode_tokens_per_second" (the median of `steps` tokens), "peak_bytes" (the
        cache and all tensors at once while the last piece is read, weights left out)}]; beyond the model's
        positions only "bytes", nulls and "why".
    """
    reach, device = reach_of(model), device_of(model)
    results: list[dict] = []
    kept = {row["length"]: row["bytes"] for row in kept_bytes(model, lengths)}
    for length in lengths:
        row: dict = {"length": length, "bytes": kept[length]}
        if reach.limit is not None and length + steps > reach.limit:
            row |= dict.fromkeys(TIMED) | {"why": f"longer than the model's {reach.limit} positions"}
            results.append(row)
            continue
        generator = torch.Generator().manual_seed(0)
        vocabulary = model.config.get_text_config().vocab_size
        ids = torch.randint(0, vocabulary, (1, length), generator=generator).to(device)
        stream, seconds = Stream(model, reach), 0.0
        logits, before, last = torch.empty(0), stream.cache, ids
        for piece in pieces(ids, label=f"cost at {length} tokens"):
            before, last = copy.deepcopy(stream.cache), piece
            start = time.perf_counter()
            logits = stream.feed(piece)
            int(logits.argmax())  # waits for an accelerator
            seconds += time.perf_counter() - start
        steps_taken = []
        token = logits[:, -1:].argmax(-1)
        for _ in range(steps):
            start = time.perf_counter()
            token = stream.feed(token)[:, -1:].argmax(-1)
            int(token)
            steps_taken.append(time.perf_counter() - start)
        row |= {
            "prefill_tokens_per_second": length / seconds,
            "first_token_seconds": seconds,
            "decode_tokens_per_second": 1 / sorted(steps_taken)[steps // 2],
        }
        stream.cache = before
        row["peak_bytes"] = cache_bytes(before) + peak_bytes(device, partial(stream.feed, last))
        results.append(row)
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
    return slot_bytes(slot) * tokens // kept
