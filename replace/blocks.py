"""The shapes that a mixer works on: heads, what a call brings, tokens in blocks."""

from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from kernels.linear_memory.chunk import Memory
from kernels.retained_pairs.chunk import Selection
from replace.cache import ReplacedCacheLayer, State
from replace.layout import Layout


@dataclass
class Heads:
    """The shape of an attention layer: H query heads, G key-value heads, D per head, C its input's width."""

    query: int
    key_value: int
    dim: int
    hidden: int

    @property
    def repeat(self) -> int:
        """R = H / G query heads share a key-value head; head h belongs to key-value head h // R."""
        return self.query // self.key_value


@dataclass
class Call:
    """What one forward brings besides q, k and v.

    Attributes:
        hidden: `[B, T, C]`, the attention layer's input.
        scaling: the teacher's softmax scale.
        dropout, softcap, sliding_window: the teacher's, or 0 / None.
        sink_logit: `[H]`, the teacher's learned sinks, or None.
        real: `[B, T]` bool, False for pads; None where nothing is padded.
        document: `[B, T]` int64 numbers of packed documents, or None.
        slot: the layer's place in the cache, or None.
    """

    hidden: Tensor
    scaling: float
    dropout: float = 0.0
    softcap: float | None = None
    sliding_window: int | None = None
    sink_logit: Tensor | None = None
    real: Tensor | None = None
    document: Tensor | None = None
    slot: ReplacedCacheLayer | None = None


@dataclass
class Blocks:
    """One call in block-aligned form. Q sequences, N blocks of queries, W = (L + N) S slots.

    Attributes:
        q: `[Q, H, N S, D]` position-free.
        k, v: `[Q, G, W, D]` position-free and finite.
        valid: `[Q, W]` bool, slots that hold a token.
        bad: `[Q, G, W]` bool, tokens whose key or value was not finite (they are zero in k and v).
        state: the state before the call, or None.
        score, weight: `[Q, G, W]` fp32 or None.
        selection: the retained pairs before each block, or None.
        phi_q: `[Q, G, N, R S, F]` the queries' features, where the variant has a memory.
        pool_k, pool_v: `[Q, G, K + N S, D]`, what its indices point into.
        written: the memory before each block and after the last, where the variant has one.
        after: the memory after the call, where an operator made that alone.
        own: whatever else a variant computes once and needs again in the same call, by name.
        step: one token that completes no block, so that nothing leaves: only q, layout and state are there
            (`replace.one_token`).
    """

    layout: Layout
    q: Tensor
    k: Tensor
    v: Tensor
    valid: Tensor
    bad: Tensor
    state: State | None
    score: Tensor | None = None
    weight: Tensor | None = None
    selection: Selection | None = None
    pool_k: Tensor | None = None
    pool_v: Tensor | None = None
    written: Memory | None = None
    after: Memory | None = None
    phi_q: Tensor | None = None
    own: dict[str, Tensor] = field(default_factory=dict)
    step: bool = False

    @property
    def leaving(self) -> slice:
        """The slots of the N blocks that leave the window during the call: local blocks 0 .. N - 1."""
        return slice(0, self.layout.blocks * self.layout.block)


class Part(NamedTuple):
    """Exact keys and values of each block, their positions, and which of them each query sees.

    Attributes:
        k, v: `[Q, G, N, P, D]`.
        position: `[Q, 1 or G, N, P]` int64.
        seen: `[Q, 1 or G, N, 1 or S, P]` bool.
    """

    k: Tensor
    v: Tensor
    position: Tensor
    seen: Tensor


def grouped(x: Tensor, heads: Heads, block: int) -> Tensor:
    """Queries of R heads and one block side by side: `[Q, H, N S, F]` -> `[Q, G, N, R S, F]`."""
    x = x.unflatten(2, (-1, block)).unflatten(1, (heads.key_value, heads.repeat))
    return x.transpose(2, 3).flatten(3, 4)
