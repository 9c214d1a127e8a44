"""The gated delta rule in Triton, forward and backward.

Tokens are cut into chunks of C. With Z the decayed products of keys, Z_ti = (k_t . k_i) G_ti for i < t, and
the notation of `chunk.py`, what a token t finds missing, y_t = v_t - k_t S, is of the size of v for keys of
any size; so y is what is kept, and u = b y what is written:

    T = (I + Z diag(b))^-1;   y = T V - T diag(g) K S;   S' = g_C S + (diag(g_C / g) K)^T u
    out = diag(g) Q S + tril(Q K^T o G) u

`_transform` computes T of all chunks at once: rows one after the other inside blocks of 16, block after block
between them; then U = T V and W = T diag(g) K. `_states` walks the chunks of a sequence, stores the state
before each and y; `_output` then computes all chunks at once. Backward, with S' the state after a chunk:

    du = tril(Q K^T o G)^T dOut + diag(g_C / g) K dS'          e = T^T diag(b) du = dV
    dS = g_C dS' + (diag(g) Q)^T dOut - W^T diag(b) du         dZ = -tril(e u^T, -1)
    db = rowsum(y o (du - Z^T e))

`_written_gradients` computes du's first part of all chunks, `_state_gradients` walks backwards, adds the
second and stores dS' of each chunk, and `_gradients` computes the rest of all chunks. The gradient of a
token's log decay sums those of all pairs (t, i) with that token in i + 1 .. t, and no pair that cancels, so
it is exact behind a token that forgets everything. Query heads of a group are summed inside a program and
columns by blocks in a fixed order, so that equal inputs give equal bits.

What is stored for the backward, beside inputs, is T/C x F x D states, W `[T, F]`, y `[T, D]`, T `[T, C]` and
three numbers a token. Helpers and rules of masking are those of `kernels.linear_attention.fused`.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gated_delta_rule.chunk import ABSOLUTE, RELATIVE
from kernels.linear_attention.fused import (
    _Cut,
    _machine,
    _rows,
    _tile,
    _walk,
    _written,
    default_precision,
    largest_block,
    operand,
    stored_dtype,
)
from kernels.packing import chunk_count

__all__ = ["backward", "default_precision", "forward", "step"]

_RELATIVE, _ABSOLUTE = tl.constexpr(1 + RELATIVE), tl.constexpr(ABSOLUTE)


@triton.jit
def _decays(log_decay, t, G, g, write, C: tl.constexpr, HAS_DECAY: tl.constexpr):
    """G `[C, C]`: the decay from token i to token t >= i, else 0.

    Every column is summed by itself, so that nothing is lost behind a token that forgets everything.
    """
    order = tl.arange(0, C)
    between = tl.zeros([C, C], tl.float32)
    if HAS_DECAY:
        own = tl.load(log_decay + t * G + g, mask=write, other=0.0).to(tl.float32)
        between = tl.cumsum(tl.where(order[:, None] > order[None, :], own[:, None], between), 0)
    return tl.where(order[:, None] >= order[None, :], tl.exp(between), 0.0)


@triton.jit
def _inverse(x, C: tl.constexpr, PRECISION: tl.constexpr):
    """(I + x)^-1 of a strictly lower triangular x `[C, C]`, C a multiple of 16, by forward substitution."""
    B: tl.constexpr = C // 16
    n = tl.arange(0, B)
    i = tl.arange(0, 16)
    same = n[:, None, None, None] == n[None, None, :, None]
    own = tl.sum(tl.where(same, tl.reshape(x, [B, 16, B, 16]), 0.0), 2)  # the blocks on the diagonal
    inner = tl.where(i[None, :, None] == i[None, None, :], 1.0, 0.0) + tl.zeros([B, 16, 16], tl.float32)
    for row in range(1, 16):
        here = i[None, :, None] == row
        given = tl.sum(tl.where(here, own, 0.0), 1)
        found = tl.sum(given[:, :, None] * inner, 1)
        inner -= tl.where(here, found[:, None, :], 0.0)
    diagonal = tl.reshape(tl.where(same, inner[:, :, None, :], 0.0), [C, C])
    result = diagonal
    if B > 1:
        order = tl.arange(0, C)
        x = tl.where((order // 16)[:, None] == (order // 16)[None, :], 0.0, x)
        x = tl.dot(diagonal, x, input_precision=PRECISION)
        for _ in range(1, B):  # each round makes one more block of rows right
            result = diagonal - tl.dot(x, result, input_precision=PRECISION)
    return result


@triton.jit
def _transform(
    k, v, beta, log_decay, mask, inverse, w, y, since, after, step, starts, stops, T, NT, G,
    F: tl.constexpr, D: tl.constexpr, C: tl.constexpr, BF: tl.constexpr, BD: tl.constexpr,
    SCALED: tl.constexpr, HAS_DECAY: tl.constexpr, HAS_MASK: tl.constexpr, PACKED: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """T, W and U (where y will be) of one group's chunk, its steps b, and the decays since and after."""
    pid = tl.program_id(0)
    g = pid % G
    i = pid // G
    begin, end = _rows(i, starts, stops, T, NT, C, PACKED)
    order = tl.arange(0, C)
    t = begin + order
    rows = t < end
    write = _written(mask, t, rows, HAS_MASK)
    found = tl.zeros([C, C], tl.float32)
    norm = tl.zeros([C], tl.float32)
    for block in range(0, F, BF):
        keys = _tile(k, t, G, g, block + tl.arange(0, BF), write, F)
        found = tl.dot(keys, tl.trans(keys), found, input_precision=PRECISION)
        norm += tl.sum(keys.to(tl.float32) * keys.to(tl.float32), 1)
    share = tl.load(beta + t * G + g, mask=write, other=0.0).to(tl.float32)
    if SCALED:
        share = share / (norm * _RELATIVE + _ABSOLUTE)
    tl.store(step + t * G + g, share, mask=rows)
    between = _decays(log_decay, t, G, g, write, C, HAS_DECAY)
    found = tl.where(order[:, None] > order[None, :], found * between * share[None, :], 0.0)
    solved = _inverse(found, C, PRECISION)
    at = (t[:, None] * G + g) * C + order[None, :]
    tl.store(inverse + at, solved.to(inverse.dtype.element_ty), mask=rows[:, None])
    decayed = solved
    if HAS_DECAY:
        own = tl.load(log_decay + t * G + g, mask=write, other=0.0).to(tl.float32)
        kept = tl.exp(tl.cumsum(own, 0))
        tl.store(since + t * G + g, kept, mask=rows)
        last = tl.sum(tl.where(order[:, None] == C - 1, between, 0.0), 0)
        tl.store(after + t * G + g, last, mask=rows)
        decayed = solved * kept[None, :]
    for block in range(0, D, BD):
        d = block + tl.arange(0, BD)
        values = _tile(v, t, G, g, d, write, D)
        result = tl.dot(solved.to(OPERAND), values.to(OPERAND), input_precision=PRECISION)
        at = (t[:, None] * G + g) * D + d[None, :]
        tl.store(y + at, result.to(y.dtype.element_ty), mask=rows[:, None] & (d < D)[None, :])
    for block in range(0, F, BF):
        f = block + tl.arange(0, BF)
        keys = _tile(k, t, G, g, f, write, F)
        result = tl.dot(decayed.to(OPERAND), keys.to(OPERAND), input_precision=PRECISION)
        at = (t[:, None] * G + g) * F + f[None, :]
        tl.store(w + at, result.to(w.dtype.element_ty), mask=rows[:, None] & (f < F)[None, :])


@triton.jit
def _states(
    k, mask, w, y, since, after, step, initial, states, final, cu, offsets, T, NT, G,
    F: tl.constexpr, D: tl.constexpr, C: tl.constexpr, BF: tl.constexpr, BD: tl.constexpr,
    HAS_INITIAL: tl.constexpr, HAS_DECAY: tl.constexpr, HAS_MASK: tl.constexpr, PACKED: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BD columns of a sequence's states before each chunk and after the last, and of y, where U was."""
    DB: tl.constexpr = (D + BD - 1) // BD
    pid = tl.program_id(0)
    f = tl.arange(0, BF)
    d = pid % DB * BD + tl.arange(0, BD)
    g = pid // DB % G
    n = pid // (DB * G)
    begin, end, first, count = _walk(n, cu, offsets, T, NT, PACKED)
    inside = (f < F)[:, None] & (d < D)[None, :]
    tile = f[:, None] * D + d[None, :]
    state = tl.zeros([BF, BD], tl.float32)
    if HAS_INITIAL:
        state += tl.load(initial + (n.to(tl.int64) * G + g) * (F * D) + tile, mask=inside, other=0.0)
    for c in range(0, count):
        at = (first + c).to(tl.int64) * G + g
        tl.store(states + at * (F * D) + tile, state.to(states.dtype.element_ty), mask=inside)
        t = begin + c * C + tl.arange(0, C)
        rows = t < end
        write = _written(mask, t, rows, HAS_MASK)
        weights = _tile(w, t, G, g, f, rows, F).to(OPERAND)
        found = tl.dot(weights, state.to(OPERAND), input_precision=PRECISION)
        missing = _tile(y, t, G, g, d, rows, D).to(tl.float32) - found
        at_y = (t[:, None] * G + g) * D + d[None, :]
        tl.store(y + at_y, missing.to(y.dtype.element_ty), mask=rows[:, None] & (d < D)[None, :])
        share = tl.load(step + t * G + g, mask=rows, other=0.0)
        if HAS_DECAY:
            share *= tl.load(after + t * G + g, mask=rows, other=0.0)
            state *= tl.load(since + (tl.minimum(begin + c * C + C, end) - 1) * G + g)
        keys = _tile(k, t, G, g, f, write, F)
        added = (missing * share[:, None]).to(OPERAND)
        state = tl.dot(tl.trans(keys).to(OPERAND), added, state, input_precision=PRECISION)
    tl.store(final + (n.to(tl.int64) * G + g) * (F * D) + tile, state, mask=inside)


@triton.jit
def _output(
    q, k, log_decay, mask, y, since, step, states, out, starts, stops, T, NT, H, G,
    F: tl.constexpr, D: tl.constexpr, C: tl.constexpr, BF: tl.constexpr, BD: tl.constexpr,
    HAS_DECAY: tl.constexpr, HAS_MASK: tl.constexpr, PACKED: tl.constexpr, OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """BD columns of one head's output in one chunk."""
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
    for block in range(0, F, BF):
        f = block + tl.arange(0, BF)
        queries = _tile(q, t, H, h, f, rows, F)
        keys = _tile(k, t, G, g, f, write, F)
        weights = tl.dot(queries, tl.trans(keys), weights, input_precision=PRECISION)
        inside = (f < F)[:, None] & (d < D)[None, :]
        state = tl.load(states + held * (F * D) + f[:, None] * D + d[None, :], mask=inside, other=0.0)
        acc = tl.dot(queries.to(OPERAND), state.to(OPERAND), acc, input_precision=PRECISION)
    if HAS_DECAY:
        acc *= tl.load(since + t * G + g, mask=rows, other=0.0)[:, None]
    share = tl.load(step + t * G + g, mask=rows, other=0.0)
    between = _decays(log_decay, t, G, g, write, C, HAS_DECAY)
    order = tl.arange(0, C)
    weights = tl.where(order[:, None] >= order[None, :], weights * between * share[None, :], 0.0)
    missing = _tile(y, t, G, g, d, rows, D).to(OPERAND)
    acc = tl.dot(weights.to(OPERAND), missing, acc, input_precision=PRECISION)
    at = (t[:, None] * H + h) * D + d[None, :]
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=rows[:, None] & (d < D)[None, :])


@triton.jit
def _written_gradients(
    q, k, log_decay, mask, dout, du, starts, stops, T, NT, H, G,
    F: tl.constexpr, D: tl.constexpr, C: tl.constexpr, BF: tl.constexpr, BD: tl.constexpr,
    HAS_DECAY: tl.constexpr, HAS_MASK: tl.constexpr, PACKED: tl.constexpr, OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """BD columns of what the outputs of one group's chunk pass to its u."""
    DB: tl.constexpr = (D + BD - 1) // BD
    pid = tl.program_id(0)
    d = pid % DB * BD + tl.arange(0, BD)
    g = pid // DB % G
    i = pid // (DB * G)
    begin, end = _rows(i, starts, stops, T, NT, C, PACKED)
    t = begin + tl.arange(0, C)
    rows = t < end
    write = _written(mask, t, rows, HAS_MASK)
    between = _decays(log_decay, t, G, g, write, C, HAS_DECAY)
    grad = tl.zeros([C, BD], tl.float32)
    for h in range(g * (H // G), (g + 1) * (H // G)):
        weights = tl.zeros([C, C], tl.float32)
        for block in range(0, F, BF):
            f = block + tl.arange(0, BF)
            queries = _tile(q, t, H, h, f, rows, F)
            keys = _tile(k, t, G, g, f, write, F)
            weights = tl.dot(queries, tl.trans(keys), weights, input_precision=PRECISION)
        slopes = _tile(dout, t, H, h, d, rows, D).to(OPERAND)
        weights = tl.trans((weights * between).to(OPERAND))
        grad = tl.dot(weights, slopes, grad, input_precision=PRECISION)
    at = (t[:, None] * G + g) * D + d[None, :]
    tl.store(du + at, grad.to(du.dtype.element_ty), mask=rows[:, None] & (d < D)[None, :])


@triton.jit
def _state_gradients(
    q, k, mask, w, dout, du, since, after, step, final, states, initial, cu, offsets, T, NT, H, G,
    F: tl.constexpr, D: tl.constexpr, C: tl.constexpr, BF: tl.constexpr, BD: tl.constexpr,
    HAS_FINAL: tl.constexpr, HAS_DECAY: tl.constexpr, HAS_MASK: tl.constexpr, PACKED: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """As `_states`, from the last chunk to the first: the gradients of the state *after* each chunk, and du.

    The walk begins with those of the final state and ends with those of the initial one.
    """
    DB: tl.constexpr = (D + BD - 1) // BD
    pid = tl.program_id(0)
    f = tl.arange(0, BF)
    d = pid % DB * BD + tl.arange(0, BD)
    g = pid // DB % G
    n = pid // (DB * G)
    begin, end, first, count = _walk(n, cu, offsets, T, NT, PACKED)
    inside = (f < F)[:, None] & (d < D)[None, :]
    tile = f[:, None] * D + d[None, :]
    grad = tl.zeros([BF, BD], tl.float32)
    if HAS_FINAL:
        grad += tl.load(final + (n.to(tl.int64) * G + g) * (F * D) + tile, mask=inside, other=0.0)
    for back in range(0, count):
        c = count - 1 - back
        at = (first + c).to(tl.int64) * G + g
        tl.store(states + at * (F * D) + tile, grad.to(states.dtype.element_ty), mask=inside)
        t = begin + c * C + tl.arange(0, C)
        rows = t < end
        write = _written(mask, t, rows, HAS_MASK)
        keys = _tile(k, t, G, g, f, write, F)
        slopes = tl.dot(keys.to(OPERAND), grad.to(OPERAND), input_precision=PRECISION)
        if HAS_DECAY:
            slopes *= tl.load(after + t * G + g, mask=rows, other=0.0)[:, None]
            grad *= tl.load(since + (tl.minimum(begin + c * C + C, end) - 1) * G + g)
        slopes += _tile(du, t, G, g, d, rows, D).to(tl.float32)
        at_u = (t[:, None] * G + g) * D + d[None, :]
        tl.store(du + at_u, slopes.to(du.dtype.element_ty), mask=rows[:, None] & (d < D)[None, :])
        slopes *= -tl.load(step + t * G + g, mask=rows, other=0.0)[:, None]
        weights = tl.trans(_tile(w, t, G, g, f, rows, F).to(OPERAND))
        grad = tl.dot(weights, slopes.to(OPERAND), grad, input_precision=PRECISION)
        for h in range(g * (H // G), (g + 1) * (H // G)):
            queries = tl.trans(_tile(q, t, H, h, f, rows, F)).to(OPERAND)
            given = _tile(dout, t, H, h, d, rows, D)
            if HAS_DECAY:
                given = given.to(tl.float32) * tl.load(since + t * G + g, mask=rows, other=0.0)[:, None]
            grad = tl.dot(queries, given.to(OPERAND), grad, input_precision=PRECISION)
    tl.store(initial + (n.to(tl.int64) * G + g) * (F * D) + tile, grad, mask=inside)


@triton.jit
def _gradients(
    q, k, log_decay, mask, inverse, y, du, since, after, step, states, states_after, dout,
    dq, dk, dv, dbeta, ddecay, starts, stops, T, NT, H, G, TOKENS,
    F: tl.constexpr, D: tl.constexpr, C: tl.constexpr, BF: tl.constexpr, BD: tl.constexpr,
    SCALED: tl.constexpr, HAS_DECAY: tl.constexpr, HAS_MASK: tl.constexpr, PACKED: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Block x of dq, dk (BF columns) and dv (BD columns) of one group's chunk, dbeta, and x's part of ddecay.

    ddecay is `[X, B, T, G]`. Where F and D are of different numbers of blocks, x lies beyond one of them: all
    of that is masked.
    """
    FB: tl.constexpr = (F + BF - 1) // BF
    DB: tl.constexpr = (D + BD - 1) // BD
    X: tl.constexpr = FB if FB > DB else DB
    pid = tl.program_id(0)
    x = pid % X
    own_f = x * BF + tl.arange(0, BF)
    g = pid // X % G
    i = pid // (X * G)
    begin, end = _rows(i, starts, stops, T, NT, C, PACKED)
    order = tl.arange(0, C)
    t = begin + order
    rows = t < end
    write = _written(mask, t, rows, HAS_MASK)
    held = i.to(tl.int64) * G + g
    strict = order[:, None] > order[None, :]
    share = tl.load(step + t * G + g, mask=rows, other=0.0)
    own_keys = _tile(k, t, G, g, own_f, write, F)

    # e, what the state before and after passes to the keys, and the pairs (t, i) of e and y
    at = (t[:, None] * G + g) * C + order[None, :]
    solved = tl.trans(tl.load(inverse + at, mask=rows[:, None], other=0.0).to(OPERAND))
    slopes = tl.zeros([C, C], tl.float32)
    before = tl.zeros([C, BF], tl.float32)
    later = tl.zeros([C, BF], tl.float32)
    db = tl.zeros([C], tl.float32)
    whole = tl.zeros([BF], tl.float32)
    for block in range(0, D, BD):
        d = block + tl.arange(0, BD)
        missing = _tile(y, t, G, g, d, rows, D)
        given = _tile(du, t, G, g, d, rows, D).to(tl.float32)
        db += tl.sum(missing.to(tl.float32) * given, 1)
        e = tl.dot(solved, (given * share[:, None]).to(OPERAND), input_precision=PRECISION)
        if block == x * BD:
            at = (t[:, None] * G + g) * D + d[None, :]
            tl.store(dv + at, tl.where(write[:, None], e, 0.0).to(dv.dtype.element_ty),
                     mask=rows[:, None] & (d < D)[None, :])  # fmt: skip
        slopes = tl.dot(e.to(OPERAND), tl.trans(missing).to(OPERAND), slopes, input_precision=PRECISION)
        inside = (own_f < F)[:, None] & (d < D)[None, :]
        at = held * (F * D) + own_f[:, None] * D + d[None, :]
        state = tl.load(states + at, mask=inside, other=0.0)
        grad = tl.load(states_after + at, mask=inside, other=0.0)
        before = tl.dot(e.to(OPERAND), tl.trans(state).to(OPERAND), before, input_precision=PRECISION)
        later = tl.dot(missing.to(OPERAND), tl.trans(grad).to(OPERAND), later, input_precision=PRECISION)
        if HAS_DECAY:
            whole += tl.sum(state.to(tl.float32) * grad.to(tl.float32), 1)

    # Z and its gradient
    found = tl.zeros([C, C], tl.float32)
    norm = tl.zeros([C], tl.float32)
    for block in range(0, F, BF):
        keys = _tile(k, t, G, g, block + tl.arange(0, BF), write, F)
        found = tl.dot(keys, tl.trans(keys), found, input_precision=PRECISION)
        norm += tl.sum(keys.to(tl.float32) * keys.to(tl.float32), 1)
    between = _decays(log_decay, t, G, g, write, C, HAS_DECAY)
    slopes = tl.where(strict, slopes * between, 0.0)
    db -= tl.sum(slopes * found, 0)
    slopes = -slopes * share[None, :]
    pairs = slopes * found
    both = (slopes + tl.trans(slopes)).to(OPERAND)
    grad_k = tl.dot(both, own_keys.to(OPERAND), input_precision=PRECISION)
    before = -before
    later *= share[:, None]
    if HAS_DECAY:
        kept = tl.load(since + t * G + g, mask=rows, other=0.0)
        before *= kept[:, None]
        later *= tl.load(after + t * G + g, mask=rows, other=0.0)[:, None]
    grad_k += before + later
    rising = tl.sum(own_keys.to(tl.float32) * before, 1)
    falling = tl.sum(own_keys.to(tl.float32) * later, 1)

    between *= share[None, :]
    for h in range(g * (H // G), (g + 1) * (H // G)):
        weights = tl.zeros([C, C], tl.float32)
        for block in range(0, F, BF):
            f = block + tl.arange(0, BF)
            queries = _tile(q, t, H, h, f, rows, F)
            keys = _tile(k, t, G, g, f, write, F)
            weights = tl.dot(queries, tl.trans(keys), weights, input_precision=PRECISION)
        grad_w = tl.zeros([C, C], tl.float32)
        grad_q = tl.zeros([C, BF], tl.float32)
        for block in range(0, D, BD):
            d = block + tl.arange(0, BD)
            flow = _tile(dout, t, H, h, d, rows, D).to(OPERAND)
            sought = tl.trans(_tile(y, t, G, g, d, rows, D)).to(OPERAND)
            grad_w = tl.dot(flow, sought, grad_w, input_precision=PRECISION)
            inside = (own_f < F)[:, None] & (d < D)[None, :]
            at = held * (F * D) + own_f[:, None] * D + d[None, :]
            turned = tl.trans(tl.load(states + at, mask=inside, other=0.0)).to(OPERAND)
            grad_q = tl.dot(flow, turned, grad_q, input_precision=PRECISION)
        grad_w *= between
        own_queries = _tile(q, t, H, h, own_f, rows, F)
        if HAS_DECAY:
            pairs += grad_w * weights
            grad_q *= kept[:, None]
            rising += tl.sum(own_queries.to(tl.float32) * grad_q, 1)
        paths = grad_w.to(OPERAND)
        grad_q = tl.dot(paths, own_keys.to(OPERAND), grad_q, input_precision=PRECISION)
        at = (t[:, None] * H + h) * F + own_f[None, :]
        tl.store(dq + at, grad_q.to(dq.dtype.element_ty), mask=rows[:, None] & (own_f < F)[None, :])
        grad_k = tl.dot(tl.trans(paths), own_queries.to(OPERAND), grad_k, input_precision=PRECISION)

    if SCALED:
        scale = norm * _RELATIVE + _ABSOLUTE
        db = db / scale
        grad_k -= own_keys.to(tl.float32) * (db * share * _RELATIVE * 2)[:, None]
    at = (t[:, None] * G + g) * F + own_f[None, :]
    grad_k = tl.where(write[:, None], grad_k, 0.0)
    tl.store(dk + at, grad_k.to(dk.dtype.element_ty), mask=rows[:, None] & (own_f < F)[None, :])
    if x == 0:
        tl.store(dbeta + t * G + g, tl.where(write, db, 0.0).to(dbeta.dtype.element_ty), mask=rows)
    if HAS_DECAY:
        if x > 0:
            pairs = tl.zeros([C, C], tl.float32)
        crossing = tl.where(strict, tl.cumsum(pairs, 0, reverse=True) + falling[None, :], rising[None, :])
        total = tl.load(since + (end - 1) * G + g) * tl.sum(whole, 0)
        at = x.to(tl.int64) * TOKENS * G + t * G + g
        tl.store(ddecay + at, tl.where(write, tl.sum(crossing, 1) + total, 0.0), mask=rows)


@triton.jit
def _one_token(
    q, k, v, beta, log_decay, mask, old, new, out, H, G,
    F: tl.constexpr, D: tl.constexpr, BF: tl.constexpr, BD: tl.constexpr,
    SCALED: tl.constexpr, HAS_DECAY: tl.constexpr, HAS_MASK: tl.constexpr,
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
    share = tl.load(beta + held + d * 0, mask=write_d, other=0.0).to(tl.float32)
    if SCALED:
        share = share / (tl.sum(key * key, 0) * _RELATIVE + _ABSOLUTE)
    state = tl.load(old + at, mask=inside, other=0.0)
    if HAS_DECAY:
        state *= tl.exp(tl.load(log_decay + held + d * 0, mask=write_d, other=0.0).to(tl.float32))[None, :]
    missing = value - tl.sum(key[:, None] * state, 0)
    state += key[:, None] * (share * missing)[None, :]
    tl.store(new + at, state, mask=inside)
    R = H // G
    for r in range(0, R):
        head = held * R + r  # b H + h, since H = R G
        query = tl.load(q + head * F + f, mask=f < F, other=0.0).to(tl.float32)
        answer = tl.sum(query[:, None] * state, 0)
        tl.store(out + head * D + d, answer.to(out.dtype.element_ty), mask=d < D)


class Plan(NamedTuple):
    """How a call is cut, and the compiler's settings."""

    size: int
    """C, tokens a chunk."""
    block_f: int
    block_d: int
    """Columns of F and D that a program computes at once."""
    walk_f: int
    walk_d: int
    """The same in a walk over the chunks: all of F, and of D what leaves the state in registers."""
    warps: int
    stages: int


# The backward holds many products: more warps keep them in registers, and a second stage would not fit.
GRADIENTS = {"num_warps": 8, "num_stages": 1}


def choose_size(q: Tensor) -> int:
    """C: 64 in bf16; 32 in fp32, and in fp16, of which the intermediate results are fp32."""
    return 64 if q.dtype == torch.bfloat16 else 32


def plan(q: Tensor, features: int, width: int, size: int, block: int) -> Plan:
    """Blocks that fit the shared memory.

    Args:
        features, width: F and D.
        size, block: to force C (16, 32 or 64) and the columns a program computes, 0 to choose.
    """
    capability, _ = _machine(q.device)
    walk = block or largest_walk(capability, q.dtype, features)
    block = block or min(64, largest_block(capability, q.dtype))
    block_f, block_d, walk_d = (
        max(16, min(triton.next_power_of_2(n), most))
        for n, most in ((features, block), (width, block), (width, walk))
    )
    return Plan(
        size or choose_size(q),
        block_f,
        block_d,
        max(16, triton.next_power_of_2(features)),
        walk_d,
        4,
        2 if capability >= (8, 0) and q.dtype == torch.bfloat16 else 1,
    )


def largest_walk(capability: tuple[int, int], dtype: torch.dtype, features: int) -> int:
    """The columns of D in a walk: what leaves the state in registers and all of F in the shared memory."""
    if capability < (8, 0) or dtype != torch.bfloat16:
        return 16 if features > 128 else 32
    return 32 if features > 128 else 64


def count_chunks(length: int, batch: int, states: int, packed: bool, size: int) -> int:
    """How many chunks are stored in all."""
    return chunk_count(length, states, size) if packed else batch * (-(-length // size))


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    initial: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    scaled: bool,
    precision: str,
    size: int,
    block: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Launch the forward; all tensors contiguous.

    Args:
        precision: of products of fp32: "ieee", "tf32" or "tf32x3".
        size, block: as in `plan`.

    Returns:
        out `[B, T, H, D]`, the final state, y `[B, T, G, D]`, W `[B, T, G, F]`, T `[B, T, G, C]`, the steps,
        the decays since the beginning and until the end of the chunk `[3, B, T, G]` (decays of no meaning
        without log_decay), and the states before each chunk `[X, G, F, D]`.
    """
    (batch, length, heads, features), (groups, width) = q.shape, v.shape[2:]
    settings = plan(q, features, width, size, block)
    cut = _Cut.of(q, cu_seqlens, settings.size)
    stored, single = stored_dtype(q), torch.float32
    out = v.new_empty(batch, length, heads, width)
    y, w, inverse = (
        q.new_empty(batch, length, groups, n, dtype=stored) for n in (width, features, settings.size)
    )
    numbers = q.new_empty(3, batch, length, groups, dtype=single)
    step, since, after = numbers.unbind()
    states = q.new_empty(cut.total, groups, features, width, dtype=stored)
    final = q.new_empty(cut.states, groups, features, width, dtype=single)
    sizes = {"F": features, "D": width, "C": settings.size}
    cells = {"BF": settings.block_f, "BD": settings.block_d}
    common = {
        "HAS_DECAY": log_decay is not None,
        "HAS_MASK": mask is not None,
        "PACKED": cu_seqlens is not None,
        "OPERAND": operand(q),
        "PRECISION": precision,
        "num_warps": settings.warps,
    }
    _transform[(groups * cut.total,)](
        k, v, beta, log_decay, mask, inverse, w, y, since, after, step, cut.starts, cut.stops,
        cut.length, cut.row, groups,
        SCALED=scaled, **sizes, **cells, **common, num_stages=settings.stages,
    )  # fmt: skip
    _states[(triton.cdiv(width, settings.walk_d) * groups * cut.states,)](
        k, mask, w, y, since, after, step, initial, states, final, cut.cu, cut.offsets,
        cut.length, cut.row, groups,
        BF=settings.walk_f, BD=settings.walk_d, HAS_INITIAL=initial is not None,
        **sizes, **common, num_stages=settings.stages,
    )  # fmt: skip
    _output[(triton.cdiv(width, settings.block_d) * heads * cut.total,)](
        q, k, log_decay, mask, y, since, step, states, out, cut.starts, cut.stops,
        cut.length, cut.row, heads, groups,
        **sizes, **cells, **common, num_stages=settings.stages,
    )  # fmt: skip
    return out, final, y, w, inverse, numbers, states


def backward(
    q: Tensor,
    k: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    y: Tensor,
    w: Tensor,
    inverse: Tensor,
    numbers: Tensor,
    states: Tensor,
    dout: Tensor,
    dfinal: Tensor | None,
    scaled: bool,
    precision: str,
    size: int,
    block: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Launch the backward; all tensors contiguous.

    Args:
        y ... states: what `forward` returned.
        dout: `[B, T, H, D]`; dfinal: the gradient of the final state, or None where it has none.

    Returns:
        dq, dk, dv, dbeta, the gradient of log_decay (empty where there is none), and of the initial state.
    """
    (batch, length, heads, features), (groups, width) = q.shape, y.shape[2:]
    settings = plan(q, features, width, size, block)
    cut = _Cut.of(q, cu_seqlens, settings.size)
    step, since, after = numbers.unbind()
    dq, dk, dv, dbeta = torch.empty_like(q), torch.empty_like(k), q.new_empty(y.shape), torch.empty_like(beta)
    du, states_after = torch.empty_like(y), torch.empty_like(states)
    initial = q.new_empty(cut.states, groups, features, width, dtype=torch.float32)
    blocks = max(triton.cdiv(features, settings.block_f), triton.cdiv(width, settings.block_d))
    ddecay = q.new_empty(
        (blocks, batch, length, groups) if log_decay is not None else (0,), dtype=torch.float32
    )
    sizes = {"F": features, "D": width, "C": settings.size}
    cells = {"BF": settings.block_f, "BD": settings.block_d}
    common = {
        "HAS_DECAY": log_decay is not None,
        "HAS_MASK": mask is not None,
        "PACKED": cu_seqlens is not None,
        "OPERAND": operand(q),
        "PRECISION": precision,
    }
    launch = {"num_warps": settings.warps, "num_stages": settings.stages}
    _written_gradients[(triton.cdiv(width, settings.block_d) * groups * cut.total,)](
        q, k, log_decay, mask, dout, du, cut.starts, cut.stops, cut.length, cut.row, heads, groups,
        **sizes, **cells, **common, **launch,
    )  # fmt: skip
    _state_gradients[(triton.cdiv(width, settings.walk_d) * groups * cut.states,)](
        q, k, mask, w, dout, du, since, after, step, dfinal, states_after, initial, cut.cu, cut.offsets,
        cut.length, cut.row, heads, groups,
        BF=settings.walk_f, BD=settings.walk_d, HAS_FINAL=dfinal is not None, **sizes, **common, **launch,
    )  # fmt: skip
    _gradients[(blocks * groups * cut.total,)](
        q, k, log_decay, mask, inverse, y, du, since, after, step, states, states_after, dout,
        dq, dk, dv, dbeta, ddecay, cut.starts, cut.stops, cut.length, cut.row, heads, groups, batch * length,
        SCALED=scaled, **sizes, **cells, **common, **GRADIENTS,
    )  # fmt: skip
    if log_decay is not None:
        ddecay = ddecay.sum(0).to(log_decay.dtype)
    return dq, dk, dv, dbeta, ddecay, initial


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    mask: Tensor | None,
    scaled: bool,
) -> tuple[Tensor, Tensor]:
    """Launch one token: out `[B, H, D]` and the new state; all tensors contiguous."""
    (batch, heads, features), (groups, width) = q.shape, v.shape[1:]
    out, new = v.new_empty(batch, heads, width), torch.empty_like(state)
    block_f = triton.next_power_of_2(features)
    block_d = min(triton.next_power_of_2(width), max(8, 8192 // block_f), 32)
    _one_token[(batch * groups * triton.cdiv(width, block_d),)](
        q, k, v, beta, log_decay, mask, state, new, out, heads, groups,
        F=features, D=width, BF=block_f, BD=block_d,
        SCALED=scaled, HAS_DECAY=log_decay is not None, HAS_MASK=mask is not None, num_warps=4,
    )  # fmt: skip
    return out, new
