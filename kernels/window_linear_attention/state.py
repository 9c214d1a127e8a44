"""What window and linear attention carry from one call to the next."""

from typing import NamedTuple

from torch import Tensor


class WindowLinearState(NamedTuple):
    """The tokens that have left the window: a memory of them, and the first of them as they were.

    M `[B, G, F, D]`, z `[B, G, F]` and n `[B, G]` are those of `InfiniState`: running means of w phi(k)^T v
    and w phi(k) over what was written, fp32 (fp64 for fp64 inputs), and the sum of w in fp64 or int64.
    With `cu_seqlens` there is one state a sequence: N stands for B.
    """

    M: Tensor
    z: Tensor
    n: Tensor
    blocks: Tensor
    """`[B]` int64, how many blocks of the sequence have left; the next call begins with the block after them.
    """
    sink_k: Tensor | None = None
    """`[B, sinks, G, K]`, the keys of the first tokens; of no meaning before the first block has left."""
    sink_v: Tensor | None = None
    """`[B, sinks, G, D]`."""
    sink_seen: Tensor | None = None
    """`[B, sinks, G]` bool, which of them are there and finite."""


class Sinks(NamedTuple):
    """The first tokens of each sequence, in a call whose windows they are older than or in.

    Attributes:
        k: `[N, n, G, K]`; v: `[N, n, G, D]`; both 0 where not seen.
        seen: `[N, n, G]` bool.
    """

    k: Tensor
    v: Tensor
    seen: Tensor
