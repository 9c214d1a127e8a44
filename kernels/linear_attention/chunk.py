"""Linear attention in chunks, plain PyTorch: what the CPU runs, and the fallback everywhere else.

With a chunk's tokens as rows and (M, z) the sums before it:

    num = Q M + tril(Q K^T) V,   den = Q z + tril(Q K^T) 1,   M' = M + K^T V,   z' = z + K^T 1

Chunks are taken `PIECE` at a time: few enough that what they make stays in the processor's cache, so that a
token costs the same at any length, and many enough that Python's share is small.
"""

from itertools import islice

import torch
from torch import Tensor

from kernels.linear_attention.state import LinearState, divide
from kernels.numerics import contiguous, wide
from kernels.packing import Chunks, chunk_table, token_slots
from kernels.pieces import Pieces

CHUNK = 64
"""C, tokens a chunk.

By measurement (milliseconds of one thread of a Xeon with 2 MB of L2 a core; 4,096 tokens, 4 heads of 64;
forward, and with backward; each with its best PIECE): 32 took 18.8 and 65, 64 17.0 and 56, 128 18.9 and 58,
256 26.7 and 83.
"""

PIECE = 32
"""Chunks times key-value heads computed at once, of one row or of several: 16 took 17.5 and 62 (as above), 32
17.0 and 56, 64 19.8 and 66."""


def step(
    q: Tensor, k: Tensor, v: Tensor, state: LinearState, mask: Tensor | None, normalize: bool, eps: float
) -> tuple[Tensor, LinearState]:
    """As `reference.step`, as two batched products."""
    batch, groups, features = k.shape
    if mask is not None:
        k, v = torch.where(mask[:, None, None], k, 0), torch.where(mask[:, None, None], v, 0)
    rows = q.reshape(batch * groups, -1, features)
    update = (k.reshape(-1, features, 1), v.reshape(batch * groups, 1, -1))
    M = torch.baddbmm(state.M.flatten(0, 1), *update)
    z = state.z + k
    out = torch.bmm(rows, M)
    if normalize:
        out = divide(out, torch.bmm(rows, z.reshape(-1, features, 1)).squeeze(-1), eps)
    return out.reshape(batch, q.shape[1], -1), LinearState(M.view_as(state.M), z)


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    initial: LinearState,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    normalize: bool,
    eps: float,
    size: int = CHUNK,
    piece: int = PIECE,
) -> tuple[Tensor, LinearState]:
    """`kernels.linear_attention` in chunks of `size` tokens, `piece` at a time; arguments checked before.

    bf16 and fp16 are widened piece by piece, also where the processor multiplies bf16 natively. Left as it
    is, bf16 takes two thirds of the time (34 ms for 51, and 109 for 165 with backward; 16,384 tokens, 4 heads
    of 64, one thread of an EPYC with avx512_bf16), but on a CPU such a product rounds its sums to bf16 as
    well: M is off by 2e-3 instead of 7e-8, and dq by 9e-3 instead of 2e-3.
    """
    (batch, length), groups, dtype = q.shape[:2], k.shape[2], v.dtype
    if mask is not None:  # before any product, because 0 times NaN is NaN
        k, v = (torch.where(mask[:, :, None, None], x, 0) for x in (k, v))
    if cu_seqlens is None:
        q, k, v = (_cut(x, size) for x in (q, k, v))
        pieces = Pieces.of(batch, q.shape[1], groups, piece, q.device)
        given = zip(*(pieces.cut(x) for x in (q, k, v)), strict=True)
        outs, states = [], []
        for carry in map(LinearState, *(x.split(pieces.rows) for x in initial)):
            for rows, keys, values in islice(given, pieces.steps):
                keys, values = _by_head(keys), _by_head(values)
                before, carry = _states(*_updates(keys, values), carry)
                outs.append(_read(wide(rows), keys, values, before, normalize, eps).to(dtype))
            states.append(carry)
        out = pieces.join(outs).flatten(1, 2)[:, :length]
        return out, LinearState(*map(torch.cat, zip(*states, strict=True)))
    chunks = chunk_table(cu_seqlens, length, size)
    slot = torch.arange(size, device=q.device)
    token = chunks.start[:, None] + slot
    within = (token < chunks.stop[:, None])[..., None, None]
    token = token.clamp_max(length - 1)
    q, k, v = (torch.where(within, x[0, token], 0).unsqueeze(0) for x in (q, k, v))
    outs, states = [], []
    held = LinearState(*(torch.zeros_like(x[:1]) for x in initial))
    piece = max(1, piece // groups)
    places = torch.arange(q.shape[1], device=q.device).split(piece)
    cut = zip(*(x.split(piece, 1) for x in (q, k, v)), places, strict=True)
    for rows, keys, values, place in cut:
        keys, values = _by_head(keys), _by_head(values)
        before, after = _packed_states(*_updates(keys, values), held, initial, chunks, place)
        outs.append(_read(wide(rows), keys, values, before, normalize, eps).to(dtype))
        states.append(after)
        held = LinearState(after.M[-1:], after.z[-1:])
    out = torch.cat(outs, 1).flatten(1, 2)[:, token_slots(cu_seqlens, chunks, length, size)]
    last = chunks.offsets[1:] - 1
    return out, LinearState(*(torch.cat(x)[last] for x in zip(*states, strict=True)))


def _cut(x: Tensor, size: int) -> Tensor:
    """`[B, T, X, Y]` -> `[B, N, C, X, Y]`, filled with 0: a token of zeros changes no sum."""
    missing = -x.shape[1] % size
    if missing:
        x = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, missing))
    return x.unflatten(1, (-1, size))


def _by_head(x: Tensor) -> Tensor:
    """`[B, N, C, G, X]` -> `[B, N, G, C, X]`, wide, copied once here instead of by every product."""
    return contiguous(x.transpose(2, 3))


def _updates(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """What each chunk adds to M and z: `[B, N, G, F, D]` and `[B, N, G, F]`."""
    return k.transpose(-1, -2) @ v, k.sum(-2)


def _read(q: Tensor, k: Tensor, v: Tensor, before: LinearState, normalize: bool, eps: float) -> Tensor:
    """What the tokens of each chunk read, `[B, N, C, H, D]`; k and v are shared by R rows, never repeated.

    Args:
        q: `[B, N, C, H, F]`; k: `[B, N, G, C, F]`; v: `[B, N, G, C, D]`.
        before: the state before each chunk, M `[B, N, G, F, D]`.
    """
    groups, size = k.shape[2:4]
    rows = q.unflatten(3, (groups, -1)).permute(0, 1, 3, 4, 2, 5).flatten(3, 4)  # [B, N, G, R C, F]
    weights = rows @ k.transpose(-1, -2)
    weights = weights.unflatten(3, (-1, size)).tril().flatten(3, 4)  # also takes away what is NaN above
    out = rows @ before.M + weights @ v
    if normalize:
        out = divide(out, (rows @ before.z.unsqueeze(-1)).squeeze(-1) + weights.sum(-1), eps)
    return out.unflatten(3, (-1, size)).permute(0, 1, 4, 2, 3, 5).flatten(3, 4)


def _states(M: Tensor, z: Tensor, carry: LinearState) -> tuple[LinearState, LinearState]:
    """The states before each chunk, and the one after the last."""
    M = torch.cat([carry.M.unsqueeze(1), M], 1).cumsum(1)
    z = torch.cat([carry.z.unsqueeze(1), z], 1).cumsum(1)
    return LinearState(M[:, :-1], z[:, :-1]), LinearState(M[:, -1], z[:, -1])


def _packed_states(
    M: Tensor, z: Tensor, held: LinearState, initial: LinearState, chunks: Chunks, place: Tensor
) -> tuple[LinearState, LinearState]:
    """The states before and after each of the chunks `place [P]` of a packed row.

    Args:
        M, z: what the chunks add.
        held: the state after the chunk before them, `[1, G, ...]`.

    Returns:
        M `[1, P, G, F, D]` and z `[1, P, G, F]` before, and M `[P, G, F, D]` and z `[P, G, F]` after.
    """
    sequence = chunks.sequence[place]
    first = place == chunks.offsets[sequence]
    before, after = [], []
    for update, past, start in zip((M[0], z[0]), held, initial, strict=True):
        begins = first.view(-1, *[1] * (past.dim() - 1))
        opened = start[sequence]
        total = update + torch.where(begins, opened, 0)
        total = torch.cat([total[:1] + torch.where(begins[:1], 0, past), total[1:]])
        distance = 1
        while distance < total.shape[0]:  # each pass doubles how many chunks of its sequence an entry sums
            same = (sequence[distance:] == sequence[:-distance]).view(-1, *[1] * (past.dim() - 1))
            joined = total[distance:] + torch.where(same, total[:-distance], 0)
            total, distance = torch.cat([total[:distance], joined]), 2 * distance
        before.append(torch.where(begins, opened, torch.cat([past, total[:-1]])).unsqueeze(0))
        after.append(total)
    return LinearState(*before), LinearState(*after)
