"""Causal softmax attention, what the others replace: PyTorch's SDPA and FlexAttention."""

import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from kernels.bench.ops.base import Answers, Draw, Form, Given, Op, Outputs, Shape

SAMPLED = 64
"""Queries that are compared where T is too long for a T x T matrix of fp64 numbers."""
TILE = 128
"""FlexAttention's own block."""


class SoftmaxAttention(Op):
    """Queries, keys and values are `[B, H, T, D]`, the layout that suits both providers best."""

    name = "softmax_attention"

    def draw(self, draw: Draw, tokens: int, shape: Shape) -> Given:
        """q, k and v."""
        return {
            "q": draw.normal(tokens, shape.heads, shape.width),
            "k": draw.normal(tokens, shape.groups, shape.width),
            "v": draw.normal(tokens, shape.groups, shape.width),
        }

    def arranged(self, given: Given, batch: int, length: int) -> Given:
        """The same numbers as `[B, H, T, D]`."""
        return {
            name: x[: batch * length].view(batch, x.shape[1], length, x.shape[2]) for name, x in given.items()
        }

    def forms(self, device: torch.device, dtype: torch.dtype, gradients: bool) -> dict[str, Form]:
        """FlexAttention has no backward on a CPU."""
        found: dict[str, Form] = {"sdpa": _sdpa}
        if device.type == "cuda" or not gradients:
            found["flex"] = _flex
        return found

    def steps(self, device: torch.device, dtype: torch.dtype) -> dict[str, Form]:
        """One query over all keys."""
        return {"sdpa": partial(_sdpa, causal=False)}

    def expected(self, given: Given, weights: Tensor | None, short: bool) -> Answers:
        """Out and all gradients where `short`, else out and the gradient of q of the sampled queries."""
        q, k, v = given["q"], given["k"], given["v"]
        where = torch.arange(q.shape[2], device=q.device) if short else _sampled(q)
        leaves = [x.detach().requires_grad_(weights is not None) for x in (q[:, :, where], k, v)]
        keys, values = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in leaves[1:])
        seen = where[:, None] >= torch.arange(k.shape[2], device=q.device)
        scores = (leaves[0] @ keys.transpose(-1, -2)) * q.shape[-1] ** -0.5
        out = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ values
        if weights is None:
            return Answers((out,), ())
        asked = leaves if short else leaves[:1]
        gradients = torch.autograd.grad(out, asked, weights[:, :, where])
        return Answers((out.detach(),), gradients)

    def expected_step(self, given: Given) -> Outputs:
        """One query over all keys, spelled out."""
        k, v = (
            given[name].repeat_interleave(given["q"].shape[1] // given[name].shape[1], 1) for name in "kv"
        )
        scores = (given["q"] @ k.transpose(-1, -2)) * k.shape[-1] ** -0.5
        return (scores.softmax(-1) @ v,)

    def compared(self, got: Answers) -> Answers:
        """The sampled queries' part, which is everything where T is short."""
        where = _sampled(got.outputs[0])
        if len(where) == got.outputs[0].shape[2]:
            return got
        return Answers(
            tuple(x[:, :, where] for x in got.outputs), tuple(x[:, :, where] for x in got.gradients[:1])
        )

    def context(self, draw: Draw, shape: Shape) -> Given:
        """A key-value cache of `shape.length` tokens and one query."""
        cache = self.arranged(self.draw(draw, shape.batch * shape.length, shape), shape.batch, shape.length)
        return {"q": draw.normal(shape.batch, shape.heads, 1, shape.width), "k": cache["k"], "v": cache["v"]}

    def flops(self, shape: Shape, direction: str) -> float:
        """Two products with all keys that a query sees; the backward has five."""
        pairs = shape.length if direction == "decode" else shape.length * (shape.length + 1) / 2
        forward = 4.0 * shape.batch * shape.heads * pairs * shape.width
        return 3.5 * forward if direction == "forward_backward" else forward

    def longest(self, limit: int) -> int | None:
        """Its work grows with the square of T."""
        return limit


def _sampled(q: Tensor) -> Tensor:
    """Positions spread over the queries `[B, H, T, D]`, the first and the last among them."""
    length = q.shape[2]
    count = length if length <= 4 * SAMPLED else SAMPLED
    return torch.linspace(0, length - 1, count, device=q.device, dtype=torch.float64).round().long()


def _sdpa(given: Given, causal: bool = True) -> Outputs:
    q, k, v = given["q"], given["k"], given["v"]
    return (scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1]),)


def _flex(given: Given) -> Outputs:
    q, k, v = given["q"], given["k"], given["v"]
    mask = _blocks(q.shape[2], str(q.device))
    return (_compiled()(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1]),)


@cache
def _compiled() -> Callable[..., Any]:
    """Compiled anew for each T, because a kernel for any T is slower; that is more often than usual."""
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(flex_attention, dynamic=False)


@cache
def _blocks(length: int, device: str) -> BlockMask:
    """Which blocks of keys each block of queries sees: those before wholly, its own in part."""
    count = math.ceil(length / TILE)
    order = torch.arange(count, dtype=torch.int32, device=device)
    own = torch.zeros(1, 1, count, count, dtype=torch.int32, device=device)
    own[0, 0, :, 0] = order
    return BlockMask.from_kv_blocks(
        torch.ones(1, 1, count, dtype=torch.int32, device=device),
        own,
        order.view(1, 1, count).clone(),
        order.view(1, 1, 1, count).expand(1, 1, count, count).contiguous(),
        BLOCK_SIZE=TILE,
        mask_mod=_causal,
        seq_lengths=(length, length),
    )


def _causal(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return query >= key
