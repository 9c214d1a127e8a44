"""Look at the teacher's queries and keys while its own attention runs, and at what it attends to later."""

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from replace.layer import AttentionModule

OBSERVED = "layer_replace_observed"
CHUNK = 128
"""Queries whose attention is computed at once; nothing of size T x T is held."""

Look = Callable[[AttentionModule, Tensor, Tensor, float], None]


def observed_attention(
    module: AttentionModule, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs
):
    """The module's own attention function, once the observer saw q `[B, H, T, D]` and k `[B, G, T, D]`."""
    name, look = module.layer_replace_observer
    scaling = kwargs.get("scaling")
    look(module, query, key, query.shape[-1] ** -0.5 if scaling is None else scaling)
    # Any, because transformers asks for a function even where none is needed.
    eager: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)(module, query, key, value, mask, **kwargs)


AttentionInterface.register(OBSERVED, observed_attention)


@contextmanager
def observe(modules: list[AttentionModule], look: Look) -> Iterator[None]:
    """Within the block every forward of these attention modules calls `look(module, q, k, scaling)`."""
    configs = [module.config for module in modules]
    try:
        for module, config in zip(modules, configs, strict=True):
            module.layer_replace_observer = (config._attn_implementation, look)
            module.config = copy.copy(config)
            module.config._attn_implementation_internal = OBSERVED
        yield
    finally:
        for module, config in zip(modules, configs, strict=True):
            module.config = config
            del module.layer_replace_observer


@torch.no_grad()
def later_attention(query: Tensor, key: Tensor, scaling: float, gap: int) -> Tensor:
    """How much each token is attended to after it left the window: the teacher's word on what to retain.

    Args:
        query: `[B, H, T, D]`; key: `[B, G, T, D]`, rotated.
        gap: only queries of chunks that begin at least this many tokens after the key count.

    Returns:
        `[B, G, T]` fp32: the largest attention probability over those queries and over the heads that share
        the key-value head; 0 for tokens near the end, which no counted query follows.
    """
    batch, heads, length, _ = query.shape
    groups = key.shape[1]
    grouped = query.unflatten(1, (groups, heads // groups))
    best = torch.zeros(batch, groups, length, device=query.device)
    place = torch.arange(length, device=query.device)
    for start in range(0, length, CHUNK):
        stop, reach = min(length, start + CHUNK), max(0, start - gap)
        if reach == 0:
            continue
        logits = (grouped[:, :, :, start:stop] @ key[:, :, None, :stop].transpose(-1, -2)).float() * scaling
        logits[..., start:].masked_fill_(place[start:stop] > place[start:stop].unsqueeze(-1), -torch.inf)
        probability = (logits - logits.logsumexp(-1, keepdim=True))[..., :reach].amax((2, 3)).exp()
        best[..., :reach] = torch.maximum(best[..., :reach], probability)
    return best
