"""Linear attention in Triton, forward and backward.

Tokens are cut into chunks of C. Forward: `_states` walks the chunks of a sequence and stores the sums M, z
before each; `_output` then computes all chunks at once, as `chunk.py` does. With P = tril(Q K^T) and, where
normalised, W = dOut / den and u = -(dOut . Out) / den (else W = dOut and u = 0), the backward is

    dP = tril(W V^T + u 1^T)        dQ = dP K + W M^T + u z^T
    dK = dP^T Q + V dM'^T + dz'     dV = P^T W + K dM'

where dM', dz' are the gradients of the sums *after* the chunk. `_state_gradients` finds them walking
backwards, dM = dM' + Q^T W, dz = dz' + Q^T u, and `_gradients` then computes all chunks at once. The query
heads of a group are summed inside a program, so that no two programs write the same place: equal inputs give
equal bits.

Where one walk a sequence and tile would leave the GPU idle, a sequence's chunks are divided into segments: a
first walk sums each segment, the second begins at the sum of the segments before its own.

What is stored for the backward, beside inputs and output, is T/C x F x D states and T denominators a head.

Masks are built of whole rows: the interpreter of Triton 3.9 turns `row & scalar` into integers, so a
condition on a scalar is an `if`. No key or value of a token that is not written is loaded, since 0 times NaN
is NaN.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dispatch import interpreted
from kernels.linear_attention.state import EMPTY
from kernels.packing import Chunks, chunk_count, chunk_table

CHUNK = 64
"""C, tokens a chunk."""

_EMPTY = tl.constexpr(EMPTY)


@triton.jit
def _walk(n, cu, offsets, T, NT, PACKED: tl.constexpr):
    """Sequence n: its first token, one past its last, its first chunk and how many chunks it has."""
    if PACKED:
        begin = tl.load(cu + n).to(tl.int64)
        end = tl.load(cu + n + 1).to(tl.int64)
        first = tl.load(offsets + n)
        count = tl.load(offsets + n + 1) - first
    else:
        begin = n.to(tl.int64) * T
        end = begin + T
        first = n.to(tl.int64) * NT
        count = NT
    return begin, end, first, count


@triton.jit
def _rows(i, starts, stops, T, NT, C: tl.constexpr, PACKED: tl.constexpr):
    """Chunk i of all: its first token and one past its last, among the tokens of all rows."""
    if PACKED:
        begin = tl.load(starts + i)
        end = tl.load(stops + i)
    else:
        row = (i // NT).to(tl.int64) * T
        begin = row + (i % NT).to(tl.int64) * C
        end = tl.minimum(begin + C, row + T)
    return begin, end


@triton.jit
def _tile(x, t, heads, head, e, rows, E: tl.constexpr):
    """Rows t `[C]` and columns e `[BE]` of one head of x `[B T, heads, E]`, 0 where `rows` is False."""
    at = (t[:, None] * heads + head) * E + e[None, :]
    return tl.load(x + at, mask=rows[:, None] & (e < E)[None, :], other=0.0)


@triton.jit
def _written(mask, t, rows, HAS_MASK: tl.constexpr):
    """Which of the rows are tokens that are written; the others' keys and values are never loaded."""
    if HAS_MASK:
        rows = rows & (tl.load(mask + t, mask=rows, other=0) != 0)
    return rows


@triton.jit
def _weighted(dout, den, t, heads, head, d, rows, eps, D: tl.constexpr, NORMALIZE: tl.constexpr):
    """w `[C, BD]`: the gradient of the numerator."""
    w = _tile(dout, t, heads, head, d, rows, D).to(tl.float32)
    if NORMALIZE:
        held = tl.load(den + t * heads + head, mask=rows, other=1.0)
        w = tl.where((held < _EMPTY)[:, None], 0.0, w / tl.maximum(held, eps)[:, None])
    return w


@triton.jit
def _states(
    k, v, mask, initial_M, initial_z, sums_M, sums_z, states_M, states_z, final_M, final_z, cu, offsets,
    T, NT, G, SEGMENTS,
    F: tl.constexpr, D: tl.constexpr, C: tl.constexpr, BF: tl.constexpr, BD: tl.constexpr,
    STORE: tl.constexpr, HAS_INITIAL: tl.constexpr, HAS_MASK: tl.constexpr, PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The states before each chunk of a segment and, of the last segment, the final one.

    Without STORE only what the segment adds goes to sums `[N, SEGMENTS, G, ...]`.
    """
    FB: tl.constexpr = (F + BF - 1) // BF
    DB: tl.constexpr = (D + BD - 1) // BD
    pid = tl.program_id(0)
    f = (pid % (FB * DB)) // DB * BF + tl.arange(0, BF)
    d = pid % DB * BD + tl.arange(0, BD)
    column = pid % DB == 0  # one of the programs that share f sees to z
    segment = pid // (FB * DB) % SEGMENTS
    g = pid // (FB * DB * SEGMENTS) % G
    n = pid // (FB * DB * SEGMENTS * G)
    begin, end, first, count = _walk(n, cu, offsets, T, NT, PACKED)
    share = (count + SEGMENTS - 1) // SEGMENTS
    low = segment * share
    high = tl.minimum(low + share, count)
    inside = (f < F)[:, None] & (d < D)[None, :]
    tile = f[:, None] * D + d[None, :]
    M = tl.zeros([BF, BD], tl.float32)
    z = tl.zeros([BF], tl.float32)
    if STORE:
        if HAS_INITIAL:
            at = n.to(tl.int64) * G + g
            M += tl.load(initial_M + at * (F * D) + tile, mask=inside, other=0.0)
            z += tl.load(initial_z + at * F + f, mask=f < F, other=0.0)
        for earlier in range(0, segment):
            at = (n.to(tl.int64) * SEGMENTS + earlier) * G + g
            M += tl.load(sums_M + at * (F * D) + tile, mask=inside, other=0.0)
            z += tl.load(sums_z + at * F + f, mask=f < F, other=0.0)
    for c in range(low, high):
        if STORE:
            at = (first + c).to(tl.int64) * G + g
            tl.store(states_M + at * (F * D) + tile, M.to(states_M.dtype.element_ty), mask=inside)
            if column:
                tl.store(states_z + at * F + f, z, mask=f < F)
        t = begin + c * C + tl.arange(0, C)
        write = _written(mask, t, t < end, HAS_MASK)
        keys = _tile(k, t, G, g, f, write, F)
        values = _tile(v, t, G, g, d, write, D)
        M = tl.dot(tl.trans(keys), values, M, input_precision=PRECISION)
        z += tl.sum(keys.to(tl.float32), 0)
    if STORE:
        at = n.to(tl.int64) * G + g
        if segment == SEGMENTS - 1:
            tl.store(final_M + at * (F * D) + tile, M, mask=inside)
            if column:
                tl.store(final_z + at * F + f, z, mask=f < F)
    else:
        at = (n.to(tl.int64) * SEGMENTS + segment) * G + g
        tl.store(sums_M + at * (F * D) + tile, M, mask=inside)
        if column:
            tl.store(sums_z + at * F + f, z, mask=f < F)


@triton.jit
def _output(
    q, k, v, mask, states_M, states_z, out, den, starts, stops, T, NT, H, G, eps,
    F: tl.constexpr, D: tl.constexpr, C: tl.constexpr, BF: tl.constexpr, BD: tl.constexpr,
    NORMALIZE: tl.constexpr, HAS_MASK: tl.constexpr, PACKED: tl.constexpr, OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """BD columns of one head's output in one chunk.

    The heads of a group run side by side, so that what they share is still in the cache.
    """
    DB: tl.constexpr = (D + BD - 1) // BD
    pid = tl.program_id(0)
    d = pid % DB * BD + tl.arange(0, BD)
    h = pid // DB % H
    g = h // (H // G)
    i = pid // (DB * H)
    begin, end = _rows(i, starts, stops, T, NT, C, PACKED)
    t = begin + tl.arange(0, C)
    rows = t < end
    write = _written(mask, t, rows, HAS_MASK)
    held = i.to(tl.int64) * G + g
    weights = tl.zeros([C, C], tl.float32)
    acc = tl.zeros([C, BD], tl.float32)
    total = tl.zeros([C], tl.float32)
    for block in range(0, F, BF):
        f = block + tl.arange(0, BF)
        queries = _tile(q, t, H, h, f, rows, F)
        keys = _tile(k, t, G, g, f, write, F)
        weights = tl.dot(queries, tl.trans(keys), weights, input_precision=PRECISION)
        inside = (f < F)[:, None] & (d < D)[None, :]
        M = tl.load(states_M + held * (F * D) + f[:, None] * D + d[None, :], mask=inside, other=0.0)
        acc = tl.dot(queries.to(OPERAND), M.to(OPERAND), acc, input_precision=PRECISION)
        if NORMALIZE:
            z = tl.load(states_z + held * F + f, mask=f < F, other=0.0)
            total += tl.sum(queries.to(tl.float32) * z[None, :], 1)
    order = tl.arange(0, C)
    weights = tl.where(order[:, None] >= order[None, :], weights, 0.0)
    values = _tile(v, t, G, g, d, write, D)
    acc = tl.dot(weights.to(OPERAND), values.to(OPERAND), acc, input_precision=PRECISION)
    if NORMALIZE:
        total += tl.sum(weights, 1)
        acc = tl.where((total < _EMPTY)[:, None], 0.0, acc / tl.maximum(total, eps)[:, None])
        if pid % DB == 0:
            tl.store(den + t * H + h, total, mask=rows)
    at = (t[:, None] * H + h) * D + d[None, :]
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=rows[:, None] & (d < D)[None, :])


@triton.jit
def _denominator_gradients(out, dout, den, u, rows, eps, D: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr):
    """u of BR rows of `[B T H, D]`: 0 where the denominator was not what divided."""
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    d = tl.arange(0, BD)
    inside = (row < rows)[:, None] & (d < D)[None, :]
    at = row[:, None] * D + d[None, :]
    product = tl.load(out + at, mask=inside, other=0.0).to(tl.float32)
    product *= tl.load(dout + at, mask=inside, other=0.0).to(tl.float32)
    held = tl.load(den + row, mask=row < rows, other=1.0)
    divided = (held < _EMPTY) | (held < eps)
    result = tl.where(divided, 0.0, -tl.sum(product, 1) / tl.maximum(held, eps))
    tl.store(u + row, result, mask=row < rows)


@triton.jit
def _state_gradients(
    q, dout, den, u, final_M, final_z, sums_M, sums_z, states_M, states_z, initial_M, initial_z, cu, offsets,
    T, NT, H, G, SEGMENTS, eps,
    F: tl.constexpr, D: tl.constexpr, C: tl.constexpr, BF: tl.constexpr, BD: tl.constexpr,
    STORE: tl.constexpr, HAS_FINAL: tl.constexpr, NORMALIZE: tl.constexpr, PACKED: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """As `_states`, from the last chunk to the first: the gradients of the state *after* each chunk.

    The walk begins with those of the final state and ends with those of the initial one. Segment 0 is the
    last in time.
    """
    FB: tl.constexpr = (F + BF - 1) // BF
    DB: tl.constexpr = (D + BD - 1) // BD
    pid = tl.program_id(0)
    f = (pid % (FB * DB)) // DB * BF + tl.arange(0, BF)
    d = pid % DB * BD + tl.arange(0, BD)
    column = pid % DB == 0
    segment = pid // (FB * DB) % SEGMENTS
    g = pid // (FB * DB * SEGMENTS) % G
    n = pid // (FB * DB * SEGMENTS * G)
    begin, end, first, count = _walk(n, cu, offsets, T, NT, PACKED)
    share = (count + SEGMENTS - 1) // SEGMENTS
    low = segment * share
    high = tl.minimum(low + share, count)
    inside = (f < F)[:, None] & (d < D)[None, :]
    tile = f[:, None] * D + d[None, :]
    M = tl.zeros([BF, BD], tl.float32)
    z = tl.zeros([BF], tl.float32)
    if STORE:
        if HAS_FINAL:
            at = n.to(tl.int64) * G + g
            M += tl.load(final_M + at * (F * D) + tile, mask=inside, other=0.0)
            z += tl.load(final_z + at * F + f, mask=f < F, other=0.0)
        for later in range(0, segment):
            at = (n.to(tl.int64) * SEGMENTS + later) * G + g
            M += tl.load(sums_M + at * (F * D) + tile, mask=inside, other=0.0)
            z += tl.load(sums_z + at * F + f, mask=f < F, other=0.0)
    for back in range(low, high):
        c = count - 1 - back
        if STORE:
            at = (first + c).to(tl.int64) * G + g
            tl.store(states_M + at * (F * D) + tile, M.to(states_M.dtype.element_ty), mask=inside)
            if column:
                tl.store(states_z + at * F + f, z, mask=f < F)
        t = begin + c * C + tl.arange(0, C)
        rows = t < end
        for h in range(g * (H // G), (g + 1) * (H // G)):
            queries = _tile(q, t, H, h, f, rows, F)
            w = _weighted(dout, den, t, H, h, d, rows, eps, D, NORMALIZE)
            M = tl.dot(tl.trans(queries).to(OPERAND), w.to(OPERAND), M, input_precision=PRECISION)
            if NORMALIZE:
                share_u = tl.load(u + t * H + h, mask=rows, other=0.0)
                z += tl.sum(queries.to(tl.float32) * share_u[:, None], 0)
    if STORE:
        at = n.to(tl.int64) * G + g
        if segment == SEGMENTS - 1:
            tl.store(initial_M + at * (F * D) + tile, M, mask=inside)
            if column:
                tl.store(initial_z + at * F + f, z, mask=f < F)
    else:
        at = (n.to(tl.int64) * SEGMENTS + segment) * G + g
        tl.store(sums_M + at * (F * D) + tile, M, mask=inside)
        if column:
            tl.store(sums_z + at * F + f, z, mask=f < F)


@triton.jit
def _gradients(
    q, k, v, mask, dout, den, u, states_M, states_z, after_M, after_z, dq, dk, dv, starts, stops,
    T, NT, H, G, eps,
    F: tl.constexpr, D: tl.constexpr, C: tl.constexpr, BF: tl.constexpr, BD: tl.constexpr,
    NORMALIZE: tl.constexpr, HAS_MASK: tl.constexpr, PACKED: tl.constexpr, OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Block x of dq, dk (BF columns) and dv (BD columns) of one group's heads in one chunk.

    Where F and D are of different numbers of blocks, x lies beyond one of them: all of that is masked.
    """
    FB: tl.constexpr = (F + BF - 1) // BF
    DB: tl.constexpr = (D + BD - 1) // BD
    X: tl.constexpr = FB if FB > DB else DB
    pid = tl.program_id(0)
    own_f = pid % X * BF + tl.arange(0, BF)
    own_d = pid % X * BD + tl.arange(0, BD)
    g = pid // X % G
    i = pid // (X * G)
    begin, end = _rows(i, starts, stops, T, NT, C, PACKED)
    t = begin + tl.arange(0, C)
    rows = t < end
    write = _written(mask, t, rows, HAS_MASK)
    held = i.to(tl.int64) * G + g
    order = tl.arange(0, C)
    causal = order[:, None] >= order[None, :]
    own_keys = _tile(k, t, G, g, own_f, write, F).to(OPERAND)
    own_z = tl.load(states_z + held * F + own_f, mask=own_f < F, other=0.0)
    grad_k = tl.zeros([C, BF], tl.float32)
    grad_v = tl.zeros([C, BD], tl.float32)
    for h in range(g * (H // G), (g + 1) * (H // G)):
        weights = tl.zeros([C, C], tl.float32)
        for block in range(0, F, BF):
            f = block + tl.arange(0, BF)
            queries = _tile(q, t, H, h, f, rows, F)
            keys = _tile(k, t, G, g, f, write, F)
            weights = tl.dot(queries, tl.trans(keys), weights, input_precision=PRECISION)
        weights = tl.where(causal, weights, 0.0)
        slopes = tl.zeros([C, C], tl.float32)
        grad_q = tl.zeros([C, BF], tl.float32)
        for block in range(0, D, BD):
            d = block + tl.arange(0, BD)
            w = _weighted(dout, den, t, H, h, d, rows, eps, D, NORMALIZE).to(OPERAND)
            values = _tile(v, t, G, g, d, write, D).to(OPERAND)
            slopes = tl.dot(w, tl.trans(values), slopes, input_precision=PRECISION)
            inside = (own_f < F)[:, None] & (d < D)[None, :]
            at = held * (F * D) + own_f[:, None] * D + d[None, :]
            M = tl.load(states_M + at, mask=inside, other=0.0).to(OPERAND)
            grad_q = tl.dot(w, tl.trans(M), grad_q, input_precision=PRECISION)
        if NORMALIZE:
            slope = tl.load(u + t * H + h, mask=rows, other=0.0)
            slopes += slope[:, None]
            grad_q += slope[:, None] * own_z[None, :]
        slopes = tl.where(causal, slopes, 0.0).to(OPERAND)
        grad_q = tl.dot(slopes, own_keys, grad_q, input_precision=PRECISION)
        at = (t[:, None] * H + h) * F + own_f[None, :]
        tl.store(dq + at, grad_q.to(dq.dtype.element_ty), mask=rows[:, None] & (own_f < F)[None, :])
        own_queries = _tile(q, t, H, h, own_f, rows, F).to(OPERAND)
        grad_k = tl.dot(tl.trans(slopes), own_queries, grad_k, input_precision=PRECISION)
        own_w = _weighted(dout, den, t, H, h, own_d, rows, eps, D, NORMALIZE).to(OPERAND)
        grad_v = tl.dot(tl.trans(weights.to(OPERAND)), own_w, grad_v, input_precision=PRECISION)
    for block in range(0, D, BD):
        d = block + tl.arange(0, BD)
        values = _tile(v, t, G, g, d, write, D).to(OPERAND)
        inside = (own_f < F)[:, None] & (d < D)[None, :]
        at = held * (F * D) + own_f[:, None] * D + d[None, :]
        M = tl.load(after_M + at, mask=inside, other=0.0).to(OPERAND)
        grad_k = tl.dot(values, tl.trans(M), grad_k, input_precision=PRECISION)
    for block in range(0, F, BF):
        f = block + tl.arange(0, BF)
        keys = _tile(k, t, G, g, f, write, F).to(OPERAND)
        inside = (f < F)[:, None] & (own_d < D)[None, :]
        at = held * (F * D) + f[:, None] * D + own_d[None, :]
        M = tl.load(after_M + at, mask=inside, other=0.0).to(OPERAND)
        grad_v = tl.dot(keys, M, grad_v, input_precision=PRECISION)
    grad_k += tl.load(after_z + held * F + own_f, mask=own_f < F, other=0.0)[None, :]
    grad_k = tl.where(write[:, None], grad_k, 0.0)
    grad_v = tl.where(write[:, None], grad_v, 0.0)
    at = (t[:, None] * G + g) * F + own_f[None, :]
    tl.store(dk + at, grad_k.to(dk.dtype.element_ty), mask=rows[:, None] & (own_f < F)[None, :])
    at = (t[:, None] * G + g) * D + own_d[None, :]
    tl.store(dv + at, grad_v.to(dv.dtype.element_ty), mask=rows[:, None] & (own_d < D)[None, :])


@triton.jit
def _one_token(
    q, k, v, mask, old_M, old_z, new_M, new_z, out, H, G, eps,
    F: tl.constexpr, D: tl.constexpr, BF: tl.constexpr, BD: tl.constexpr,
    NORMALIZE: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """BD columns of one row's and group's state, read and written once, asked by each head of the group."""
    DB: tl.constexpr = (D + BD - 1) // BD
    pid = tl.program_id(0)
    d = pid % DB * BD + tl.arange(0, BD)
    f = tl.arange(0, BF)
    held = (pid // DB).to(tl.int64)  # b G + g
    write_f = f < F
    write_d = d < D
    if HAS_MASK:
        write_f = write_f & (tl.load(mask + held // G + f * 0) != 0)
        write_d = write_d & (tl.load(mask + held // G + d * 0) != 0)
    inside = (f < F)[:, None] & (d < D)[None, :]
    at = held * (F * D) + f[:, None] * D + d[None, :]
    key = tl.load(k + held * F + f, mask=write_f, other=0.0).to(tl.float32)
    value = tl.load(v + held * D + d, mask=write_d, other=0.0).to(tl.float32)
    M = tl.load(old_M + at, mask=inside, other=0.0) + key[:, None] * value[None, :]
    z = tl.load(old_z + held * F + f, mask=f < F, other=0.0) + key
    tl.store(new_M + at, M, mask=inside)
    if pid % DB == 0:
        tl.store(new_z + held * F + f, z, mask=f < F)
    R = H // G
    for r in range(0, R):
        head = held * R + r  # b H + h, since H = R G
        query = tl.load(q + head * F + f, mask=f < F, other=0.0).to(tl.float32)
        answer = tl.sum(query[:, None] * M, 0)
        if NORMALIZE:
            total = tl.sum(query * z, 0)
            answer = tl.where(total < _EMPTY, 0.0, answer / tl.maximum(total, eps))
        tl.store(out + head * D + d, answer.to(out.dtype.element_ty), mask=d < D)


class Plan(NamedTuple):
    """How a call is cut: blocks of F and D, segments a sequence, and the compiler's settings."""

    block_f: int
    block_d: int
    segments: int
    warps: int
    stages: int


@functools.cache
def _machine(device: torch.device) -> tuple[tuple[int, int], int]:
    """Compute capability and multiprocessors; of the interpreter, those of nothing in particular."""
    if device.type != "cuda":
        return (8, 0), 1
    properties = torch.cuda.get_device_properties(device)
    return (properties.major, properties.minor), properties.multi_processor_count


def largest_block(capability: tuple[int, int], dtype: torch.dtype) -> int:
    """The columns of F and D a program may hold, so that each kernel fits the shared memory.

    That is 64 KB on Turing, 99 KB on consumer GPUs since, 163 KB or more on those named here.
    """
    if capability < (8, 0) or dtype == torch.float32:
        return 32
    return 128 if dtype == torch.bfloat16 and capability in {(8, 0), (9, 0), (10, 0)} else 64


# The backward holds three accumulators: more warps keep them in registers, and a second stage would not fit.
GRADIENTS = {"num_warps": 8, "num_stages": 1}


def plan(q: Tensor, v: Tensor, groups: int, states: int, chunks: int, block: int, segments: int) -> Plan:
    """Blocks that fit the shared memory, and segments enough to give every multiprocessor two walks.

    Args:
        states: N; chunks: of the longest sequence, at most.
        block, segments: to force them, 0 to choose.
    """
    capability, processors = _machine(q.device)
    block = block or largest_block(capability, q.dtype)
    block_f, block_d = (max(16, min(triton.next_power_of_2(n), block)) for n in (q.shape[-1], v.shape[-1]))
    if not segments:
        walks = states * groups * triton.cdiv(q.shape[-1], block_f) * triton.cdiv(v.shape[-1], block_d)
        segments = max(1, min(triton.cdiv(2 * processors, walks), chunks // 4))
    warps = 8 if max(block_f, block_d) > 64 else 4
    return Plan(block_f, block_d, segments, warps, 2 if capability >= (8, 0) else 1)


def stored_dtype(q: Tensor) -> torch.dtype:
    """Of the chunks' states, and of what meets them in a product.

    bf16 for bf16 inputs. fp32 for fp16, whose range a sum over many tokens leaves.
    """
    return torch.bfloat16 if q.dtype == torch.bfloat16 else torch.float32


def operand(q: Tensor) -> tl.dtype:
    """`stored_dtype` as the compiler names it."""
    return tl.bfloat16 if q.dtype == torch.bfloat16 else tl.float32


def count_chunks(length: int, batch: int, states: int, packed: bool) -> int:
    """How many chunks are stored in all."""
    return chunk_count(length, states, CHUNK) if packed else batch * (-(-length // CHUNK))


class _Cut(NamedTuple):
    """The chunks of a call, as the kernels take them."""

    cu: Tensor | None
    offsets: Tensor | None
    starts: Tensor | None
    stops: Tensor | None
    length: int
    row: int
    """Chunks a row, where rows are not packed."""
    total: int
    states: int

    @classmethod
    def of(cls, q: Tensor, cu_seqlens: Tensor | None, size: int = CHUNK) -> "_Cut":
        batch, length = q.shape[:2]
        if cu_seqlens is None:
            row = triton.cdiv(length, size)
            return cls(None, None, None, None, length, row, batch * row, batch)
        chunks: Chunks = chunk_table(cu_seqlens, length, size)
        states, total = cu_seqlens.shape[0] - 1, chunk_count(length, cu_seqlens.shape[0] - 1, size)
        cu = cu_seqlens.clamp(0, length)
        return cls(cu, chunks.offsets, chunks.start, chunks.stop, length, total, total, states)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    M: Tensor | None,
    z: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    normalize: bool,
    eps: float,
    precision: str,
    block: int,
    segments: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Launch the forward; all tensors contiguous.

    Args:
        M, z: the initial state, or None for an empty one.
        precision: of products of fp32: "ieee", "tf32" or "tf32x3".
        block, segments: as in `plan`.

    Returns:
        out `[B, T, H, D]`, the final M and z, the denominators `[B, T, H]` (of no meaning unless normalised),
        and the states before each chunk, `[X, G, F, D]` and `[X, G, F]`.
    """
    (batch, length, heads, features), (groups, width) = q.shape, v.shape[2:]
    cut = _Cut.of(q, cu_seqlens)
    settings = plan(q, v, groups, cut.states, cut.row, block, segments)
    out = v.new_empty(batch, length, heads, width)
    den = q.new_empty(batch, length, heads, dtype=torch.float32)
    states_M = q.new_empty(cut.total, groups, features, width, dtype=stored_dtype(q))
    states_z = q.new_empty(cut.total, groups, features, dtype=torch.float32)
    final_M = q.new_empty(cut.states, groups, features, width, dtype=torch.float32)
    final_z = q.new_empty(cut.states, groups, features, dtype=torch.float32)
    sums_M, sums_z = _sums(final_M, final_z, settings.segments)
    blocks = triton.cdiv(features, settings.block_f), triton.cdiv(width, settings.block_d)
    sizes = {"F": features, "D": width, "C": CHUNK, "BF": settings.block_f, "BD": settings.block_d}
    common = {"HAS_MASK": mask is not None, "PACKED": cu_seqlens is not None, "PRECISION": precision}
    launch = {"num_warps": settings.warps, "num_stages": settings.stages}
    for store in _passes(settings.segments):
        _states[(blocks[0] * blocks[1] * settings.segments * groups * cut.states,)](
            k, v, mask, M, z, sums_M, sums_z, states_M, states_z, final_M, final_z, cut.cu, cut.offsets,
            cut.length, cut.row, groups, settings.segments,
            STORE=store, HAS_INITIAL=M is not None, **sizes, **common, **launch,
        )  # fmt: skip
    _output[(blocks[1] * heads * cut.total,)](
        q, k, v, mask, states_M, states_z, out, den, cut.starts, cut.stops,
        cut.length, cut.row, heads, groups, eps,
        NORMALIZE=normalize, OPERAND=operand(q), **sizes, **common, **launch,
    )  # fmt: skip
    return out, final_M, final_z, den, states_M, states_z


def _passes(segments: int) -> tuple[bool, ...]:
    """STORE of the walks to make: with segments, one that sums them comes first."""
    return (True,) if segments == 1 else (False, True)


def _sums(M: Tensor, z: Tensor, segments: int) -> tuple[Tensor, Tensor]:
    """Room for what the segments of each sequence add; with one segment none is used."""
    if segments == 1:
        return M, z
    return tuple(x.new_empty(x.shape[0], segments, *x.shape[1:]) for x in (M, z))  # type: ignore[return-value]


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    out: Tensor,
    den: Tensor,
    states_M: Tensor,
    states_z: Tensor,
    dout: Tensor,
    dM: Tensor | None,
    dz: Tensor | None,
    normalize: bool,
    eps: float,
    precision: str,
    block: int,
    segments: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Launch the backward; all tensors contiguous.

    Args:
        out ... states_z: what `forward` returned.
        dout: `[B, T, H, D]`; dM, dz: the gradients of the final state, or None where it has none.

    Returns:
        dq, dk, dv, and the gradients of the initial M and z.
    """
    (heads, features), (groups, width) = q.shape[2:], v.shape[2:]
    cut = _Cut.of(q, cu_seqlens)
    settings = plan(q, v, groups, cut.states, cut.row, block, segments)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    u = torch.empty_like(den)
    after_M, after_z = torch.empty_like(states_M), torch.empty_like(states_z)
    initial_M = q.new_empty(cut.states, groups, features, width, dtype=torch.float32)
    initial_z = q.new_empty(cut.states, groups, features, dtype=torch.float32)
    sums_M, sums_z = _sums(initial_M, initial_z, settings.segments)
    if normalize:
        rows, span = 16, triton.next_power_of_2(width)
        _denominator_gradients[(triton.cdiv(den.numel(), rows),)](
            out, dout, den, u, den.numel(), eps, D=width, BR=rows, BD=span
        )
    blocks = triton.cdiv(features, settings.block_f), triton.cdiv(width, settings.block_d)
    sizes = {"F": features, "D": width, "C": CHUNK, "BF": settings.block_f, "BD": settings.block_d}
    common = {
        "NORMALIZE": normalize,
        "PACKED": cu_seqlens is not None,
        "OPERAND": operand(q),
        "PRECISION": precision,
    }
    launch = {"num_warps": settings.warps, "num_stages": settings.stages}
    for store in _passes(settings.segments):
        _state_gradients[(blocks[0] * blocks[1] * settings.segments * groups * cut.states,)](
            q, dout, den, u, dM, dz, sums_M, sums_z, after_M, after_z, initial_M, initial_z,
            cut.cu, cut.offsets, cut.length, cut.row, heads, groups, settings.segments, eps,
            STORE=store, HAS_FINAL=dM is not None, **sizes, **common, **launch,
        )  # fmt: skip
    _gradients[(max(blocks) * groups * cut.total,)](
        q, k, v, mask, dout, den, u, states_M, states_z, after_M, after_z, dq, dk, dv, cut.starts, cut.stops,
        cut.length, cut.row, heads, groups, eps,
        HAS_MASK=mask is not None, **sizes, **common, **GRADIENTS,
    )  # fmt: skip
    return dq, dk, dv, initial_M, initial_z


def step(
    q: Tensor, k: Tensor, v: Tensor, M: Tensor, z: Tensor, mask: Tensor | None, normalize: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch one token: out `[B, H, D]` and the new M and z; all tensors contiguous."""
    (batch, heads, features), (groups, width) = q.shape, v.shape[1:]
    out, new_M, new_z = v.new_empty(batch, heads, width), torch.empty_like(M), torch.empty_like(z)
    block_f = triton.next_power_of_2(features)
    block_d = min(triton.next_power_of_2(width), max(8, 8192 // block_f), 32)
    _one_token[(batch * groups * triton.cdiv(width, block_d),)](
        q, k, v, mask, M, z, new_M, new_z, out, heads, groups, eps,
        F=features, D=width, BF=block_f, BD=block_d, NORMALIZE=normalize, HAS_MASK=mask is not None,
        num_warps=4,
    )  # fmt: skip
    return out, new_M, new_z


def default_precision(q: Tensor) -> str:
    """Of products of fp32: exact for fp32 inputs, as fine as fp16 for fp16 ones, whose range is too small."""
    return "ieee" if q.dtype == torch.float32 or interpreted() else "tf32"
