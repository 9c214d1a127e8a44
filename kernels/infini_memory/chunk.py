"""The Infini memory by block, plain PyTorch: what the CPU runs, and the fallback everywhere else.

The recurrence is `kernels.linear_memory.chunk`: block i of the queries reads the running means of the blocks
before i - L. Keys are put L blocks later, so that the means before block i are those it reads. Blocks are
taken a few at a time, so that what they make stays in the processor's cache.
"""

from itertools import islice

import torch
from torch import Tensor

from kernels.infini_memory.state import InfiniCounters, InfiniState, written_blocks
from kernels.linear_memory.chunk import EMPTY, LARGEST, Memory, read, write_linear
from kernels.numerics import count_dtype, wide
from kernels.pieces import Pieces

PIECE = 1024
"""Tokens times key-value heads computed at once, of one row or of several, at least one block.

By measurement (milliseconds of one thread of a Xeon with 2 MB of L2 a core; 4,096 tokens, 4 heads of 64,
blocks of 32; forward, and with backward): 512 took 38.9 and 108, 1024 36.1 and 109, 2048 43.9 and 118, 4096
40.7 and 122.
"""


def mixed(numerator: Tensor, denominator: Tensor, gate: Tensor, local: Tensor) -> Tensor:
    """g numerator / denominator + (1 - g) local, with g = 0 where the denominator says nothing is held.

    Args:
        numerator, local: `[..., D]`; denominator, gate: `[..., 1]`, of running means.
    """
    empty = denominator <= EMPTY
    answer = numerator / torch.where(empty, 1, denominator)
    return torch.where(empty, local, gate * answer + (1 - gate) * local)


def step(q: Tensor, local: Tensor, gate: Tensor, state: InfiniState) -> Tensor:
    """As `reference.step`, as two batched products."""
    batch, groups, features = state.z.shape
    rows = q.reshape(batch * groups, -1, features)
    numerator = torch.bmm(rows, state.M.flatten(0, 1)).view(local.shape)
    denominator = torch.bmm(rows, state.z.reshape(-1, features, 1)).view(*local.shape[:2], 1)
    return mixed(numerator, denominator, gate.to(q.dtype).unsqueeze(-1), local)


def infini_memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    local: Tensor,
    gate: Tensor,
    write_gate: Tensor | None,
    mask: Tensor | None,
    initial: InfiniState,
    block: int,
    lookback: int,
    clamp: float,
    piece: int = PIECE,
) -> tuple[Tensor, InfiniState, InfiniCounters]:
    """`kernels.infini_memory`, about `piece` tokens at a time; arguments checked before."""
    dtype, (batch, length), groups = v.dtype, q.shape[:2], k.shape[2]
    block = min(block, length + 1)  # of a longer one nothing leaves either, and what it lacks is filled up
    weight = wide(k.new_ones(batch, length, groups) if write_gate is None else write_gate)
    leaving = torch.arange(length, device=q.device) < written_blocks(length, block, lookback) * block
    here = leaving.view(1, -1, 1) if mask is None else leaving.view(1, -1, 1) & mask.unsqueeze(-1)
    k, v, weight, lost = taken(k, v, weight, here)
    blocks = -(-length // block)
    now = (_later(x, blocks, block, 0) for x in (q, local, gate.expand(q.shape[:3]).unsqueeze(-1)))
    past = (_later(x, blocks, block, lookback) for x in (k, v, weight.unsqueeze(-1)))
    pieces = Pieces.of(batch, blocks, groups, piece // block, q.device)
    given = zip(*(pieces.cut(x) for x in (*now, *past)), strict=True)
    state = (initial.M, initial.z, initial.n.to(count_dtype(q.device)))
    outs, limited, ends = [], [], []
    for carry in map(Memory, *(x.split(pieces.rows) for x in state)):
        over = []
        for some in islice(given, pieces.steps):
            queries, exact, share, keys, values, gates = map(wide, some)
            keys, values, gates = (x.permute(0, 3, 1, 2, 4) for x in (keys, values, gates))
            states, clamped = write_linear(keys, values, gates.squeeze(-1), carry, clamp)
            before = Memory(states.M[:, :, :-1], states.z[:, :, :-1], states.n[:, :, :-1])
            carry = Memory(states.M[:, :, -1], states.z[:, :, -1], states.n[:, :, -1].detach())
            held, mass = (_by_token(x, block) for x in read(_by_group(queries, groups), before))
            outs.append(mixed(held, mass, share, exact).to(dtype))
            over.append(clamped.sum(-1))
        limited.append(torch.stack(over).sum(0))
        ends.append((carry.M, carry.z, carry.n))
    out = pieces.join(outs).flatten(1, 2)[:, :length]
    counters = InfiniCounters(torch.cat(limited), lost.sum(1))
    return out, InfiniState(*map(torch.cat, zip(*ends, strict=True))), counters


def taken(k: Tensor, v: Tensor, weight: Tensor, here: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keys, values and weights, 0 for what is not written, and which tokens were left out, `[B, T, G]`.

    Args:
        here: bool `[B, T, 1]` (or broadcast to it), the tokens that are to be written.
    """
    largest = torch.maximum(k.detach().abs().amax(-1), v.detach().abs().amax(-1))
    fits = torch.maximum(largest, weight.detach().abs()) < LARGEST  # a NaN is not
    written = here & fits & (weight > 0)
    # Before any product, because 0 times NaN is NaN.
    k, v = (torch.where(written.unsqueeze(-1), x, 0) for x in (k, v))
    return k, v, torch.where(written, weight, 0), here & ~fits & ~(weight <= 0)


def _later(x: Tensor, blocks: int, block: int, lookback: int) -> Tensor:
    """`[B, T, X, E]` -> `[B, N, S, X, E]`, moved back by L blocks of zeros."""
    first = min(lookback * block, blocks * block)
    kept = x[:, : blocks * block - first]
    missing = blocks * block - first - kept.shape[1]
    x = torch.nn.functional.pad(kept, (0, 0, 0, 0, first, missing)) if first or missing else kept
    return x.unflatten(1, (blocks, block))


def _by_group(q: Tensor, groups: int) -> Tensor:
    """`[B, N, S, H, F]` -> `[B, G, N, R S, F]`: the heads of a group side by side."""
    return q.unflatten(3, (groups, -1)).permute(0, 3, 1, 4, 2, 5).flatten(3, 4)


def _by_token(x: Tensor, block: int) -> Tensor:
    """`[B, G, N, R S, E]` -> `[B, N, S, H, E]`."""
    return x.unflatten(3, (-1, block)).permute(0, 2, 4, 1, 3, 5).flatten(3, 4)
