"""Look at the teacher's queries and keys while its own attention runs, and at what it attends to later."""

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kernels.numerics import wide
from replace.layer import AttentionModule, own_window, real_tokens, visible

OBSERVED = "layer_replace_observed"
CHUNK = 128
"""Queries whose attention is computed at once; nothing of size T x T is held."""


@dataclass
class Attending:
    """What a teacher's layer hands to its attention function, and how it attends.

    Attributes:
        query: `[B, H, T, D]`; key: `[B, G, T, D]`, rotated.
        mask: bool or additive `[B, 1, T, T]`, or None (causal, nothing padded).
        scaling, softcap, sliding_window: the teacher's; the last two may be None.
        sink_logit: `[H]`, the teacher's learned sinks, or None.
    """

    query: Tensor
    key: Tensor
    scaling: float
    mask: Tensor | None = None
    softcap: float | None = None
    sliding_window: int | None = None
    sink_logit: Tensor | None = None

    def real(self) -> Tensor:
        """`[B, T]` bool, False for pads."""
        batch, _, length, _ = self.query.shape
        real = real_tokens(self.mask, length)
        return torch.ones(batch, length, dtype=torch.bool, device=self.query.device) if real is None else real

    @torch.no_grad()
    def log_weights(self, start: int, stop: int) -> Tensor:
        """Logarithms of the attention of the queries start .. stop - 1, `[B, G, R, stop - start, stop]` fp32.

        -inf for keys that are not seen, which are all keys for pads.
        """
        groups = self.key.shape[1]
        grouped = self.query.unflatten(1, (groups, -1))[:, :, :, start:stop]
        logits = wide(grouped @ self.key[:, :, None, :stop].transpose(-1, -2)).mul_(self.scaling)
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        place = torch.arange(stop, device=logits.device)
        own = place[start:].unsqueeze(-1)
        if self.mask is None and self.sliding_window is None:
            logits[..., start:].masked_fill_(place[start:] > own, -torch.inf)  # all keys before are seen
        else:
            seen = place <= own
            if self.sliding_window is not None:
                seen = seen & (own - place < self.sliding_window)
            if self.mask is not None:
                allowed = visible(self.mask[:, 0, start:stop, :stop]) & self.real()[:, start:stop, None]
                seen = (seen & allowed)[:, None, None]
            logits.masked_fill_(~seen, -torch.inf)
        mass = logits.logsumexp(-1, keepdim=True)
        if self.sink_logit is not None:
            mass = torch.logaddexp(mass, wide(self.sink_logit).view(groups, -1, 1, 1))
        return logits.sub_(mass.masked_fill(mass == -torch.inf, 0))


Look = Callable[[AttentionModule, Attending], None]


def observed_attention(
    module: AttentionModule, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs
):
    """The module's own attention function, once the observer was told what it is given."""
    name, look = module.layer_replace_observer
    scaling, window = kwargs.get("scaling"), kwargs.get("sliding_window")
    attending = Attending(
        query,
        key,
        query.shape[-1] ** -0.5 if scaling is None else scaling,
        mask,
        kwargs.get("softcap"),
        own_window(module) if window is None else window,
        kwargs.get("s_aux"),
    )
    look(module, attending)
    # Any, because transformers asks for a function even where none is needed.
    eager: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)(module, query, key, value, mask, **kwargs)


AttentionInterface.register(OBSERVED, observed_attention)


@contextmanager
def observe(modules: list[AttentionModule], look: Look) -> Iterator[None]:
    """Within the block every forward of these attention modules calls `look(module, attending)`."""
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
def later_attention(attending: Attending, gap: int) -> Tensor:
    """How much each token is attended to after it left the window: the teacher's word on what to retain.

    Args:
        gap: only queries of chunks that begin at least this many tokens after the key count.

    Returns:
        `[B, G, T]` fp32: the largest attention probability over those queries and over the heads that share
        the key-value head; 0 for tokens that no counted query sees: near the end, beyond the teacher's own
        window, pads.
    """
    query, groups = attending.query, attending.key.shape[1]
    batch, _, length, _ = query.shape
    best = torch.zeros(batch, groups, length, device=query.device)
    for start in range(0, length, CHUNK):
        stop, reach = min(length, start + CHUNK), max(0, start - gap)
        if reach == 0:
            continue
        probability = attending.log_weights(start, stop)[..., :reach].amax((2, 3)).exp()
        best[..., :reach] = torch.maximum(best[..., :reach], probability)
    return best
