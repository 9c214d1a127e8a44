"""Window, sinks and linear sum in Triton, forward and backward.

Writing, the sums before each span of blocks, and what goes back through both are the kernels of the Infini
memory, in the sums of its paper (`infini_memory.fused`). What is added here is the softmax over window and
sinks, and the denominator that all parts share:

    out_t = (sum_E e^s v + q M_i + e^m a) / l e^top,   l e^top = sum_E e^s + q z_i + e^m.

`_output` begins with what the sums answer, of weight log(q z_i), and goes on with `extra`, the sinks and the
window, `CHUNK` keys at a time, each rescaled to the largest logit so far. It leaves lse = log(l) + top, and
ratio = e^-lse, 0 where the sums hold nothing. With p = e^(s - lse) and delta = dOut . Out the backward is

    dS = p (dOut V^T - delta),   dQ = scale dS K,   dK = scale dS^T Q,   dV = p^T dOut + the memory's,
    da = e^(m - lse) dOut,   dm = e^(m - lse) (dOut . a - delta),

and W = ratio dOut, u = -ratio delta are the gradients of q M and q z. `_key_gradients` walks the queries that
see a tile of keys, `_sink_gradients` a run of all queries; the latter's shares are added up afterwards. No
two programs write the same place: equal inputs give equal bits.

What is stored for the backward, beside inputs and output, are the states of `infini_memory.fused` and two
figures a token and head. Packed sequences are launched one after the other.

A key or value that is not finite makes the queries that see it NaN, and is 0 in every product, since 0 times
NaN is NaN.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.infini_memory import fused as memory
from kernels.infini_memory.fused import Cut, Written, _coefficients
from kernels.linear_attention.fused import CHUNK, GRADIENTS, _tile, operand, plan, stored_dtype

RUN = 512
"""Queries whose shares of the sinks' gradients one program adds up."""

_NONE = tl.constexpr(float("-inf"))
_INF = tl.constexpr(float("inf"))
_TINY = tl.constexpr(torch.finfo(torch.float32).tiny)


@triton.jit
def _products(
    q, k, at_q, at_k, h, g, H, G, rows, there,
    K: tl.constexpr, BQ: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """q k^T `[BQ, BN]` of a head."""
    s = tl.zeros([BQ, BN], tl.float32)
    for block in range(0, K, BK):
        e = block + tl.arange(0, BK)
        queries = _tile(q, at_q, H, h, e, rows, K)
        s = tl.dot(queries, tl.trans(_tile(k, at_k, G, g, e, there, K)), s, input_precision=PRECISION)
    return s


@triton.jit
def _window(
    q, k, mask, row, own, key, h, g, H, G, T, SHIFT, scale,
    S: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The logits of queries `own` for keys `key`, both positions in the row, `[BT, BT]`; -inf if not seen."""
    rows = own < T
    there = key < T
    s = _products(q, k, row + own, row + key, h, g, H, G, rows, there, K, BT, BT, BK, PRECISION)
    if HAS_MASK:
        there = there & (tl.load(mask + row + key, mask=there, other=0) != 0)
    begin = own // S * S - SHIFT
    seen = (key[None, :] <= own[:, None]) & (key[None, :] >= begin[:, None])
    return tl.where(seen & there[None, :] & rows[:, None], s * scale, _NONE)


@triton.jit
def _sinks(
    q, sink_k, sink_seen, before, row, b, own, j, h, g, H, G, T, SHIFT, scale,
    S: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, SINKS: tl.constexpr,
    BS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The logits of queries `own` for sinks j, `[BT, BS]`; -inf where they are not seen, or in the window."""
    rows = own < T
    there = j < SINKS
    at = b * SINKS + j
    s = _products(q, sink_k, row + own, at, h, g, H, G, rows, there, K, BT, BS, BK, PRECISION)
    there = there & (tl.load(sink_seen + at * G + g, mask=there, other=0) != 0)
    apart = tl.load(before + b + own * 0) + own // S > SHIFT // S
    return tl.where((apart & rows)[:, None] & there[None, :], s * scale, _NONE)


@triton.jit
def _finite(x):
    return tl.where(tl.abs(x.to(tl.float32)) < _INF, x, 0.0)


@triton.jit
def _joined(m, total, acc, s, values, OPERAND: tl.constexpr, PRECISION: tl.constexpr):
    """What is summed so far, of largest logit m, with keys of logits s `[BQ, BN]` and values `[BN, BD]`."""
    values = values.to(tl.float32)
    bad = tl.sum(tl.where(tl.abs(values) < _INF, 0, 1), 1) > 0
    s = tl.where(bad[None, :] & (s > _NONE), float("nan"), s)
    top = tl.maximum(m, tl.max(s, 1))
    safe = tl.where(top == _NONE, 0.0, top)
    keep = tl.exp(m - safe)
    p = tl.exp(s - safe[:, None])
    acc = tl.dot(p.to(OPERAND), _finite(values).to(OPERAND), acc * keep[:, None], input_precision=PRECISION)
    return top, total * keep + tl.sum(p, 1), acc


@triton.jit
def _output(
    q, k, v, phi_q, phi_k, answer, mass, mask, sink_k, sink_v, sink_seen, before, weight, limit,
    states_M, states_z, out, lse, ratio,
    T, NS, NB, H, G, SHIFT, scale,
    S: tl.constexpr, K: tl.constexpr, F: tl.constexpr, D: tl.constexpr, P: tl.constexpr, BT: tl.constexpr,
    TILES: tl.constexpr, BK: tl.constexpr, BF: tl.constexpr, BD: tl.constexpr, SINKS: tl.constexpr,
    BS: tl.constexpr, WITHIN: tl.constexpr, EXTRA: tl.constexpr, HAS_MASK: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BD columns of one head's output in BT tokens of a span.

    WITHIN: a span has several blocks. The heads of a group run side by side, so that what they share is still
    in the cache.
    """
    DB: tl.constexpr = (D + BD - 1) // BD
    pid = tl.program_id(0)
    d = pid % DB * BD + tl.arange(0, BD)
    h = pid // DB % H
    g = h // (H // G)
    span = pid // (DB * H * TILES)
    b = (span // NS).to(tl.int64)
    row = b * T
    place = pid // (DB * H) % TILES * BT + tl.arange(0, BT)
    own = span % NS * P + place
    rows = (place < P) & (own < T)
    t = row + own
    held = span.to(tl.int64) * G + g
    acc = tl.zeros([BT, BD], tl.float32)
    reach = tl.zeros([BT], tl.float32)
    for block in range(0, F, BF):
        f = block + tl.arange(0, BF)
        queries = _tile(phi_q, t, H, h, f, rows, F)
        inside = (f < F)[:, None] & (d < D)[None, :]
        M = tl.load(states_M + held * (F * D) + f[:, None] * D + d[None, :], mask=inside, other=0.0)
        z = tl.load(states_z + held * F + f, mask=f < F, other=0.0)
        acc = tl.dot(queries.to(OPERAND), M.to(OPERAND), acc, input_precision=PRECISION)
        reach += tl.sum(queries.to(tl.float32) * z[None, :], 1)
    if WITHIN:
        leaving = own - SHIFT
        keys_here = (place < P) & (leaving >= 0) & (leaving < NB * S)
        c = _coefficients(weight, limit, row, b, leaving, keys_here, g, G, NB, S)
        weights = _products(phi_q, phi_k, t, row + leaving, h, g, H, G, rows, c > 0, F, BT, BT, BF, PRECISION)
        earlier = (place // S)[:, None] > (place // S)[None, :]
        weights = tl.where(earlier, weights * c[None, :], 0.0)
        written = _tile(v, row + leaving, G, g, d, c > 0, D)
        acc = tl.dot(weights.to(OPERAND), written.to(OPERAND), acc, input_precision=PRECISION)
        reach += tl.sum(weights, 1)
    empty = reach <= _TINY
    divisor = tl.where(empty, 1.0, reach)
    m = tl.where(empty, _NONE, tl.log(divisor))
    total = tl.where(empty, 0.0, 1.0)
    acc = tl.where(empty[:, None], 0.0, acc / divisor[:, None])
    if EXTRA:
        beside = tl.load(mass + t * H + h, mask=rows, other=_NONE).to(tl.float32)
        top = tl.maximum(m, beside)
        safe = tl.where(top == _NONE, 0.0, top)
        keep = tl.exp(m - safe)
        share = tl.exp(beside - safe)
        near = _tile(answer, t, H, h, d, rows, D).to(tl.float32)
        acc = acc * keep[:, None] + near * share[:, None]
        total = total * keep + share
        m = top
    for block in range(0, SINKS, BS):
        j = block + tl.arange(0, BS)
        s = _sinks(
            q, sink_k, sink_seen, before, row, b, own, j, h, g, H, G, T, SHIFT, scale,
            S, K, BT, BK, SINKS, BS, PRECISION,
        )  # fmt: skip
        values = _tile(sink_v, b * SINKS + j, G, g, d, j < SINKS, D)
        m, total, acc = _joined(m, total, acc, s, values, OPERAND, PRECISION)
    begin = span % NS * P + pid // (DB * H) % TILES * BT
    for start in range(tl.maximum(begin // S * S - SHIFT, 0), tl.minimum(begin + BT, T), BT):
        key = start + tl.arange(0, BT)
        s = _window(q, k, mask, row, own, key, h, g, H, G, T, SHIFT, scale, S, K, BT, BK, HAS_MASK, PRECISION)
        there = key < T
        if HAS_MASK:
            there = there & (tl.load(mask + row + key, mask=there, other=0) != 0)
        values = _tile(v, row + key, G, g, d, there, D)
        m, total, acc = _joined(m, total, acc, s, values, OPERAND, PRECISION)
    nothing = total == 0
    acc = acc / tl.where(nothing, 1.0, total)[:, None]
    at = (t[:, None] * H + h) * D + d[None, :]
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=rows[:, None] & (d < D)[None, :])
    if pid % DB == 0:
        log = tl.where(nothing, 0.0, tl.log(tl.where(nothing, 1.0, total)) + m)
        tl.store(lse + t * H + h, log, mask=rows)
        tl.store(ratio + t * H + h, tl.where(empty, 0.0, tl.exp(tl.where(empty, 0.0, -log))), mask=rows)


@triton.jit
def _row_gradients(
    out, dout, lse, ratio, answer, mass, danswer, dmass, delta, u, rows,
    D: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr, EXTRA: tl.constexpr,
):  # fmt: skip
    """Of BR rows of `[B T H, D]`: delta, u, and the gradients of extra."""
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    d = tl.arange(0, BD)
    inside = (row < rows)[:, None] & (d < D)[None, :]
    at = row[:, None] * D + d[None, :]
    slope = tl.load(dout + at, mask=inside, other=0.0).to(tl.float32)
    product = tl.sum(slope * tl.load(out + at, mask=inside, other=0.0).to(tl.float32), 1)
    share = tl.load(ratio + row, mask=row < rows, other=0.0)
    tl.store(delta + row, product, mask=row < rows)
    tl.store(u + row, tl.where(share == 0, 0.0, -share * product), mask=row < rows)
    if EXTRA:
        near = tl.load(answer + at, mask=inside, other=0.0).to(tl.float32)
        beside = tl.load(mass + row, mask=row < rows, other=_NONE).to(tl.float32)
        weight = tl.exp(beside - tl.load(lse + row, mask=row < rows, other=0.0))
        tl.store(danswer + at, (slope * weight[:, None]).to(danswer.dtype.element_ty), mask=inside)
        change = weight * (tl.sum(slope * near, 1) - product)
        tl.store(dmass + row, change.to(dmass.dtype.element_ty), mask=row < rows)


@triton.jit
def _slopes(
    s, dout, v, lse, delta, t, at_v, h, g, H, G, rows, there,
    D: tl.constexpr, BQ: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """p and dS `[BQ, BN]` of logits s, 0 where they are not numbers."""
    p = tl.exp(s - tl.load(lse + t * H + h, mask=rows, other=0.0)[:, None])
    change = tl.zeros([BQ, BN], tl.float32)
    for block in range(0, D, BD):
        d = block + tl.arange(0, BD)
        values = _finite(_tile(v, at_v, G, g, d, there, D))
        slope = _tile(dout, t, H, h, d, rows, D)
        change = tl.dot(slope, tl.trans(values), change, input_precision=PRECISION)
    change -= tl.load(delta + t * H + h, mask=rows, other=0.0)[:, None]
    seen = s > _NONE
    return tl.where(seen, p, 0.0), tl.where(seen, p * change, 0.0)


@triton.jit
def _query_gradients(
    q, k, v, mask, sink_k, sink_v, sink_seen, before, dout, lse, delta, dq,
    T, NT, H, G, SHIFT, scale,
    S: tl.constexpr, K: tl.constexpr, D: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
    SINKS: tl.constexpr, BS: tl.constexpr, HAS_MASK: tl.constexpr, OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """BK columns of dq of BT queries of one head."""
    KB: tl.constexpr = (K + BK - 1) // BK
    pid = tl.program_id(0)
    e = pid % KB * BK + tl.arange(0, BK)
    h = pid // KB % H
    g = h // (H // G)
    tile = pid // (KB * H)
    b = (tile // NT).to(tl.int64)
    row = b * T
    begin = tile % NT * BT
    own = begin + tl.arange(0, BT)
    rows = own < T
    t = row + own
    grad = tl.zeros([BT, BK], tl.float32)
    for block in range(0, SINKS, BS):
        j = block + tl.arange(0, BS)
        s = _sinks(
            q, sink_k, sink_seen, before, row, b, own, j, h, g, H, G, T, SHIFT, scale,
            S, K, BT, BK, SINKS, BS, PRECISION,
        )  # fmt: skip
        at = b * SINKS + j
        _, change = _slopes(
            s, dout, sink_v, lse, delta, t, at, h, g, H, G, rows, j < SINKS, D, BT, BS, BD, PRECISION
        )
        keys = _tile(sink_k, at, G, g, e, j < SINKS, K).to(OPERAND)
        grad = tl.dot(change.to(OPERAND), keys, grad, input_precision=PRECISION)
    for start in range(tl.maximum(begin // S * S - SHIFT, 0), tl.minimum(begin + BT, T), BT):
        key = start + tl.arange(0, BT)
        s = _window(q, k, mask, row, own, key, h, g, H, G, T, SHIFT, scale, S, K, BT, BK, HAS_MASK, PRECISION)
        there = key < T
        _, change = _slopes(
            s, dout, v, lse, delta, t, row + key, h, g, H, G, rows, there, D, BT, BT, BD, PRECISION
        )
        keys = _finite(_tile(k, row + key, G, g, e, there, K)).to(OPERAND)
        grad = tl.dot(change.to(OPERAND), keys, grad, input_precision=PRECISION)
    at_q = (t[:, None] * H + h) * K + e[None, :]
    tl.store(dq + at_q, (grad * scale).to(dq.dtype.element_ty), mask=rows[:, None] & (e < K)[None, :])


@triton.jit
def _key_gradients(
    q, k, v, mask, dout, lse, delta, dv_memory, dk, dv,
    T, NT, H, G, SHIFT, scale,
    S: tl.constexpr, K: tl.constexpr, D: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
    HAS_MASK: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Block x of dk (BK columns) and dv (BD columns) of BT keys of one group, with the memory's share of dv.

    Where K and D are of different numbers of blocks, x lies beyond one of them: all of that is masked.
    """
    KB: tl.constexpr = (K + BK - 1) // BK
    DB: tl.constexpr = (D + BD - 1) // BD
    X: tl.constexpr = KB if KB > DB else DB
    pid = tl.program_id(0)
    e = pid % X * BK + tl.arange(0, BK)
    d = pid % X * BD + tl.arange(0, BD)
    g = pid // X % G
    tile = pid // (X * G)
    row = (tile // NT).to(tl.int64) * T
    begin = tile % NT * BT
    key = begin + tl.arange(0, BT)
    there = key < T
    at_key = row + key
    at_v = (at_key[:, None] * G + g) * D + d[None, :]
    inside = there[:, None] & (d < D)[None, :]
    grad_k = tl.zeros([BT, BK], tl.float32)
    grad_v = tl.load(dv_memory + at_v, mask=inside, other=0.0)
    end = tl.minimum((begin + BT - 1) // S * S + S + SHIFT, T)
    for h in range(g * (H // G), (g + 1) * (H // G)):
        for start in range(begin, end, BT):
            own = start + tl.arange(0, BT)
            rows = own < T
            t = row + own
            s = _window(
                q, k, mask, row, own, key, h, g, H, G, T, SHIFT, scale, S, K, BT, BK, HAS_MASK, PRECISION
            )
            p, change = _slopes(
                s, dout, v, lse, delta, t, at_key, h, g, H, G, rows, there, D, BT, BT, BD, PRECISION
            )
            queries = _tile(q, t, H, h, e, rows, K).to(OPERAND)
            grad_k = tl.dot(tl.trans(change.to(OPERAND)), queries, grad_k, input_precision=PRECISION)
            slope = _tile(dout, t, H, h, d, rows, D).to(OPERAND)
            grad_v = tl.dot(tl.trans(p.to(OPERAND)), slope, grad_v, input_precision=PRECISION)
    at_k = (at_key[:, None] * G + g) * K + e[None, :]
    tl.store(dk + at_k, (grad_k * scale).to(dk.dtype.element_ty), mask=there[:, None] & (e < K)[None, :])
    tl.store(dv + at_v, grad_v.to(dv.dtype.element_ty), mask=inside)


@triton.jit
def _sink_gradients(
    q, sink_k, sink_v, sink_seen, before, dout, lse, delta, dsink_k, dsink_v,
    T, RUNS, H, G, SHIFT, scale,
    S: tl.constexpr, K: tl.constexpr, D: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
    SINKS: tl.constexpr, BS: tl.constexpr, LENGTH: tl.constexpr, OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """What LENGTH queries add to block x of the gradients of BS sinks; dsink `[B, RUNS, SINKS, G, ...]`."""
    KB: tl.constexpr = (K + BK - 1) // BK
    DB: tl.constexpr = (D + BD - 1) // BD
    X: tl.constexpr = KB if KB > DB else DB
    SB: tl.constexpr = (SINKS + BS - 1) // BS
    pid = tl.program_id(0)
    e = pid % X * BK + tl.arange(0, BK)
    d = pid % X * BD + tl.arange(0, BD)
    j = pid // X % SB * BS + tl.arange(0, BS)
    g = pid // (X * SB) % G
    run = pid // (X * SB * G)
    b = (run // RUNS).to(tl.int64)
    row = b * T
    begin = run % RUNS * LENGTH
    at = b * SINKS + j
    grad_k = tl.zeros([BS, BK], tl.float32)
    grad_v = tl.zeros([BS, BD], tl.float32)
    for h in range(g * (H // G), (g + 1) * (H // G)):
        for start in range(begin, tl.minimum(begin + LENGTH, T), BT):
            own = start + tl.arange(0, BT)
            rows = own < T
            t = row + own
            s = _sinks(
                q, sink_k, sink_seen, before, row, b, own, j, h, g, H, G, T, SHIFT, scale,
                S, K, BT, BK, SINKS, BS, PRECISION,
            )  # fmt: skip
            p, change = _slopes(
                s, dout, sink_v, lse, delta, t, at, h, g, H, G, rows, j < SINKS, D, BT, BS, BD, PRECISION
            )
            queries = _tile(q, t, H, h, e, rows, K).to(OPERAND)
            grad_k = tl.dot(tl.trans(change.to(OPERAND)), queries, grad_k, input_precision=PRECISION)
            slope = _tile(dout, t, H, h, d, rows, D).to(OPERAND)
            grad_v = tl.dot(tl.trans(p.to(OPERAND)), slope, grad_v, input_precision=PRECISION)
    place = (run.to(tl.int64) * SINKS + j) * G + g
    known = (j < SINKS)[:, None]
    tl.store(dsink_k + place[:, None] * K + e[None, :], grad_k * scale, mask=known & (e < K)[None, :])
    tl.store(dsink_v + place[:, None] * D + d[None, :], grad_v, mask=known & (d < D)[None, :])


@triton.jit
def _asked(m, total, acc, query, keys, values, seen, scale):
    """As `_joined`, of one query `[BK]`, keys `[BN, BK]` and values `[BN, BD]`."""
    s = tl.where(seen, tl.sum(query[None, :] * keys, 1) * scale, _NONE)
    top = tl.maximum(m, tl.max(s, 0))
    safe = tl.where(top == _NONE, 0.0, top)
    keep = tl.exp(m - safe)
    p = tl.exp(s - safe)
    return top, total * keep + tl.sum(p, 0), acc * keep + tl.sum(p[:, None] * values, 0)


@triton.jit
def _one_token(
    q, k, v, phi_q, answer, mass, mask, M, z, n, before, sink_k, sink_v, sink_seen, out,
    W, H, G, scale,
    K: tl.constexpr, F: tl.constexpr, D: tl.constexpr, BK: tl.constexpr, BF: tl.constexpr, BD: tl.constexpr,
    BW: tl.constexpr, SINKS: tl.constexpr, BS: tl.constexpr, EXTRA: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """BD columns of the answers to one row's and group's heads."""
    DB: tl.constexpr = (D + BD - 1) // BD
    pid = tl.program_id(0)
    d = pid % DB * BD + tl.arange(0, BD)
    e = tl.arange(0, BK)
    f = tl.arange(0, BF)
    held = (pid // DB).to(tl.int64)  # b G + g
    b = held // G
    g = held % G
    count = tl.load(n + held).to(tl.float32)
    at = held * (F * D) + f[:, None] * D + d[None, :]
    means = tl.load(M + at, mask=(f < F)[:, None] & (d < D)[None, :], other=0.0)
    ends = tl.load(z + held * F + f, mask=f < F, other=0.0)
    R = H // G
    for r in range(0, R):
        head = held * R + r  # b H + h, since H = R G
        asked = tl.load(phi_q + head * F + f, mask=f < F, other=0.0).to(tl.float32)
        reach = tl.sum(asked * ends, 0) * count
        empty = reach <= _TINY
        divisor = tl.where(empty, 1.0, reach)
        m = tl.where(empty, _NONE, tl.log(divisor))
        total = tl.where(empty, 0.0, 1.0)
        acc = tl.where(empty, 0.0, tl.sum(asked[:, None] * means, 0) * count / divisor)
        if EXTRA:
            beside = tl.load(mass + head).to(tl.float32)
            top = tl.maximum(m, beside)
            safe = tl.where(top == _NONE, 0.0, top)
            near = tl.load(answer + head * D + d, mask=d < D, other=0.0).to(tl.float32)
            acc = acc * tl.exp(m - safe) + near * tl.exp(beside - safe)
            total = total * tl.exp(m - safe) + tl.exp(beside - safe)
            m = top
        query = tl.load(q + head * K + e, mask=e < K, other=0.0).to(tl.float32)
        for block in range(0, SINKS, BS):
            j = block + tl.arange(0, BS)
            place = b * SINKS + j
            seen = (j < SINKS) & (tl.load(before + b + j * 0) > 0)
            seen = seen & (tl.load(sink_seen + place * G + g, mask=seen, other=0) != 0)
            keys = _tile(sink_k, place, G, g, e, seen, K).to(tl.float32)
            values = _tile(sink_v, place, G, g, d, seen, D).to(tl.float32)
            m, total, acc = _asked(m, total, acc, query, keys, values, seen, scale)
        for start in range(0, W, BW):
            j = start + tl.arange(0, BW)
            place = b * W + j
            seen = j < W
            if HAS_MASK:
                seen = seen & (tl.load(mask + place, mask=seen, other=0) != 0)
            keys = _tile(k, place, G, g, e, seen, K).to(tl.float32)
            values = _tile(v, place, G, g, d, seen, D).to(tl.float32)
            m, total, acc = _asked(m, total, acc, query, keys, values, seen, scale)
        acc = acc / tl.where(total == 0, 1.0, total)
        tl.store(out + head * D + d, acc.to(out.dtype.element_ty), mask=d < D)


class Forward(NamedTuple):
    """What `forward` makes: the results, and after them what the backward needs.

    Of packed sequences `totals`, `scale` and the states have room for any lengths.
    """

    out: Tensor
    M: Tensor
    z: Tensor
    n: Tensor
    """`[N, G]` fp64."""
    clamped: Tensor
    """`[N, G]` int64, blocks whose means were limited."""
    lost: Tensor
    """`[N, G]` int64, tokens left out."""
    lse: Tensor
    """`[B, T, H]` fp32, the logarithm of the denominator; 0 where a query sees nothing."""
    ratio: Tensor
    """`[B, T, H]` fp32, e^-lse, 0 where the sums hold nothing."""
    totals: Tensor
    weight: Tensor
    scale: Tensor
    states_M: Tensor
    states_z: Tensor


class _Place(NamedTuple):
    """Where a packed sequence is among the tokens, the states, and what is stored by block and by span."""

    tokens: slice
    state: slice
    totals: slice
    blocks: slice
    spans: slice

    def of(self, made: Forward) -> Forward:
        """The sequence's part of everything."""
        where: dict = dict.fromkeys(("M", "z", "n", "clamped", "lost"), (self.state,))
        where |= dict.fromkeys(("out", "lse", "ratio", "weight"), (slice(None), self.tokens))
        where |= {"totals": (slice(None), self.totals), "scale": (slice(None), self.blocks)}
        where |= dict.fromkeys(("states_M", "states_z"), (slice(None), self.spans))
        return Forward(**{name: x[where[name]] for name, x in made._asdict().items()})


def _places(borders: list[int], block: int, lookback: int) -> Iterator[_Place]:
    totals = blocks = spans = 0
    for i, (start, stop) in enumerate(pairwise(borders)):
        cut = Cut.of(stop - start, block, lookback)
        yield _Place(
            slice(start, stop),
            slice(i, i + 1),
            slice(totals, totals + cut.written + 1),
            slice(blocks, blocks + cut.written),
            slice(spans, spans + cut.spans),
        )
        totals, blocks, spans = totals + cut.written + 1, blocks + cut.written, spans + cut.spans


def shapes(q: Tensor, v: Tensor, phi_q: Tensor, block: int, lookback: int, sequences: int | None) -> Forward:
    """The tensors of a `Forward`, empty; `sequences` N where they are packed."""
    (batch, length, heads), features, (groups, width) = q.shape[:3], phi_q.shape[3], v.shape[2:]
    cut, states = Cut.of(length, block, lookback), sequences or batch
    written, totals, spans = cut.written, cut.written + 1, cut.spans
    if sequences is not None:
        written, totals, spans = length // block, length // block + states, length // cut.span + states
    single = torch.float32
    return Forward(
        out=v.new_empty(batch, length, heads, width),
        M=q.new_empty(states, groups, features, width, dtype=single),
        z=q.new_empty(states, groups, features, dtype=single),
        n=q.new_empty(states, groups, dtype=torch.float64),
        clamped=q.new_empty(states, groups, dtype=torch.int64),
        lost=q.new_empty(states, groups, dtype=torch.int64),
        lse=q.new_empty(batch, length, heads, dtype=single),
        ratio=q.new_empty(batch, length, heads, dtype=single),
        totals=q.new_empty(batch, totals, groups, dtype=torch.float64),
        weight=q.new_empty(batch, length, groups, dtype=single),
        scale=q.new_empty(batch, written, groups, dtype=single),
        states_M=q.new_empty(batch, spans, groups, features, width, dtype=stored_dtype(q)),
        states_z=q.new_empty(batch, spans, groups, features, dtype=single),
    )


def _settings(q: Tensor, v: Tensor, phi_q: Tensor, sinks: int, width: int) -> tuple[dict, dict, dict]:
    """Sizes of one program, what the compiler is told, and how it is launched."""
    near, far = (plan(x, v, v.shape[2], 1, 1, width, 1) for x in (q, phi_q))
    sizes = {"K": q.shape[3], "D": v.shape[3], "BK": near.block_f, "BD": near.block_d}
    sizes |= {"SINKS": sinks, "BS": max(16, min(CHUNK, triton.next_power_of_2(max(1, sinks))))}
    memory_sizes = {"F": phi_q.shape[3], "BF": far.block_f}
    return sizes, memory_sizes, {"num_warps": max(near.warps, far.warps), "num_stages": near.stages}


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    phi_q: Tensor,
    phi_k: Tensor,
    write_gate: Tensor | None,
    answer: Tensor | None,
    mass: Tensor | None,
    seen: Tensor | None,
    write: Tensor | None,
    sink_k: Tensor | None,
    sink_v: Tensor | None,
    sink_seen: Tensor | None,
    before: Tensor,
    M: Tensor | None,
    z: Tensor | None,
    n: Tensor | None,
    borders: list[int] | None,
    block: int,
    lookback: int,
    scale: float,
    clamp: float,
    precision: str,
    width: int,
    segments: int,
) -> Forward:
    """Launch the forward; all tensors contiguous; arguments as in `reference.window_linear_attention`.

    Args:
        M, z, n: the initial state, or None for an empty one.
        borders: where packed sequences begin and end.
        precision: of products of fp32: "ieee", "tf32" or "tf32x3".
        width, segments: the columns of K, F and D a program takes, and the segments of a row; 0 to choose.
    """
    options: list = [block, lookback, scale, clamp, precision, width, segments]
    tokens = [q, k, v, phi_q, phi_k, write_gate, answer, mass, seen, write]
    states = [sink_k, sink_v, sink_seen, before, M, z, n]
    if borders is None:
        given: list = [*tokens, *states, *options]
        return _forward(*given)
    made = shapes(q, v, phi_q, block, lookback, len(borders) - 1)
    for place in _places(borders, block, lookback):
        own: list = [None if x is None else x[:, place.tokens] for x in tokens]
        own += [None if x is None else x[place.state] for x in states]
        for whole, part in zip(place.of(made), _forward(*own, *options), strict=True):
            whole.copy_(part)
    return made


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    phi_q: Tensor,
    phi_k: Tensor,
    write_gate: Tensor | None,
    answer: Tensor | None,
    mass: Tensor | None,
    seen: Tensor | None,
    write: Tensor | None,
    sink_k: Tensor | None,
    sink_v: Tensor | None,
    sink_seen: Tensor | None,
    before: Tensor,
    M: Tensor | None,
    z: Tensor | None,
    n: Tensor | None,
    block: int,
    lookback: int,
    scale: float,
    clamp: float,
    precision: str,
    width: int,
    segments: int,
) -> Forward:
    (batch, length, heads), groups = q.shape[:3], k.shape[2]
    cut, options = Cut.of(length, block, lookback), (block, lookback, clamp, precision, width, segments)
    written: Written = memory.write(phi_q, phi_k, v, write_gate, write, M, z, n, *options)
    out = v.new_empty(batch, length, heads, v.shape[3])
    lse, ratio = (q.new_empty(batch, length, heads, dtype=torch.float32) for _ in range(2))
    sizes, features, launch = _settings(q, v, phi_q, 0 if sink_k is None else sink_k.shape[1], width)
    _output[(triton.cdiv(v.shape[3], sizes["BD"]) * heads * cut.tiles * cut.spans * batch,)](
        q, k, v, phi_q, phi_k, answer, mass, seen, sink_k, sink_v, sink_seen, before,
        written.weight, written.scale, written.states_M, written.states_z, out, lse, ratio,
        length, cut.spans, cut.written, heads, groups, lookback * block, scale,
        S=block, P=cut.span, BT=cut.tile, TILES=cut.tiles, WITHIN=cut.span > block, EXTRA=mass is not None,
        HAS_MASK=seen is not None, OPERAND=operand(q), PRECISION=precision, **sizes, **features, **launch,
    )  # fmt: skip
    return Forward(
        out,
        written.M,
        written.z,
        written.totals[:, -1],
        written.limited.sum(1),
        written.lost.sum(1),
        lse,
        ratio,
        *(written.totals, written.weight, written.scale, written.states_M, written.states_z),
    )


class Backward(NamedTuple):
    """The gradients; of extra in its dtypes, of the write gate, the initial state and the sinks in fp32.

    Of what was not given there is none.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    phi_q: Tensor
    phi_k: Tensor
    write_gate: Tensor
    answer: Tensor | None
    mass: Tensor | None
    sink_k: Tensor | None
    sink_v: Tensor | None
    M: Tensor
    z: Tensor


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    phi_q: Tensor,
    phi_k: Tensor,
    answer: Tensor | None,
    mass: Tensor | None,
    seen: Tensor | None,
    sink_k: Tensor | None,
    sink_v: Tensor | None,
    sink_seen: Tensor | None,
    before: Tensor,
    made: Forward,
    dout: Tensor,
    dM: Tensor | None,
    dz: Tensor | None,
    borders: list[int] | None,
    block: int,
    lookback: int,
    scale: float,
    precision: str,
    width: int,
    segments: int,
) -> Backward:
    """Launch the backward; all tensors contiguous.

    Args:
        made: what `forward` returned; of it, out, lse and what follows are read.
        dout: `[B, T, H, D]`; dM, dz: the gradients of the final state, or None where it has none.
    """
    options: list = [block, lookback, scale, precision, width, segments]
    tokens = [q, k, v, phi_q, phi_k, answer, mass, seen]
    states = [sink_k, sink_v, sink_seen, before]
    if borders is None:
        given: list = [*tokens, *states, made, dout, dM, dz, *options]
        return _backward(*given)
    found = []
    for place in _places(borders, block, lookback):
        own: list = [None if x is None else x[:, place.tokens] for x in tokens]
        own += [None if x is None else x[place.state] for x in states]
        own += [place.of(made), dout[:, place.tokens]]
        own += [None if x is None else x[place.state] for x in (dM, dz)]
        found.append(_backward(*own, *options))
    parts = zip(Backward._fields, zip(*found, strict=True), strict=True)
    by_state = ("sink_k", "sink_v", "M", "z")
    return Backward(
        *(None if x[0] is None else torch.cat(x, 0 if name in by_state else 1) for name, x in parts)  # type: ignore[arg-type]
    )


def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    phi_q: Tensor,
    phi_k: Tensor,
    answer: Tensor | None,
    mass: Tensor | None,
    seen: Tensor | None,
    sink_k: Tensor | None,
    sink_v: Tensor | None,
    sink_seen: Tensor | None,
    before: Tensor,
    made: Forward,
    dout: Tensor,
    dM: Tensor | None,
    dz: Tensor | None,
    block: int,
    lookback: int,
    scale: float,
    precision: str,
    width: int,
    segments: int,
) -> Backward:
    (batch, length, heads), (groups, columns) = q.shape[:3], v.shape[2:]
    sinks = 0 if sink_k is None else sink_k.shape[1]
    sizes = _settings(q, v, phi_q, sinks, width)[0]
    lse, ratio, delta, u = made.lse, made.ratio, torch.empty_like(made.lse), torch.empty_like(made.lse)
    danswer, dmass = (None if x is None else torch.empty_like(x) for x in (answer, mass))
    rows = 16
    _row_gradients[(triton.cdiv(lse.numel(), rows),)](
        made.out, dout, lse, ratio, answer, mass, danswer, dmass, delta, u, lse.numel(),
        D=columns, BR=rows, BD=triton.next_power_of_2(columns), EXTRA=mass is not None,
    )  # fmt: skip
    dv_memory = torch.empty_like(v, dtype=torch.float32)
    dphi_q, dphi_k, _, dweight, initial_M, initial_z = memory.read_gradients(
        phi_q, phi_k, v, dout, ratio, u, made.totals, made.weight, made.scale, made.states_M, made.states_z,
        dM, dz, dv_memory, block, lookback, precision, width, segments,
    )  # fmt: skip
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    tile = max(16, min(CHUNK, triton.next_power_of_2(length)))
    tiles = triton.cdiv(length, tile)
    lead = (length, tiles, heads, groups, lookback * block, scale)
    common = {"S": block, "BT": tile, "OPERAND": operand(q), "PRECISION": precision} | sizes
    keys = {name: x for name, x in common.items() if name not in {"SINKS", "BS"}}
    blocks = triton.cdiv(q.shape[3], sizes["BK"]), triton.cdiv(columns, sizes["BD"])
    _query_gradients[(blocks[0] * heads * tiles * batch,)](
        q, k, v, seen, sink_k, sink_v, sink_seen, before, dout, lse, delta, dq, *lead,
        HAS_MASK=seen is not None, **common, **GRADIENTS,
    )  # fmt: skip
    _key_gradients[(max(blocks) * groups * tiles * batch,)](
        q, k, v, seen, dout, lse, delta, dv_memory, dk, dv, *lead,
        HAS_MASK=seen is not None, **keys, **GRADIENTS,
    )  # fmt: skip
    dsink_k = dsink_v = None
    if sink_k is not None:
        runs = triton.cdiv(length, RUN)
        shape = (batch, runs, sinks, groups)
        dsink_k, dsink_v = (q.new_empty(*shape, x, dtype=torch.float32) for x in (q.shape[3], columns))
        _sink_gradients[(max(blocks) * triton.cdiv(sinks, sizes["BS"]) * groups * runs * batch,)](
            q, sink_k, sink_v, sink_seen, before, dout, lse, delta, dsink_k, dsink_v,
            length, runs, heads, groups, lookback * block, scale, LENGTH=RUN, **common, **GRADIENTS,
        )  # fmt: skip
        dsink_k, dsink_v = dsink_k.sum(1), dsink_v.sum(1)
    return Backward(
        dq, dk, dv, dphi_q, dphi_k, dweight, danswer, dmass, dsink_k, dsink_v, initial_M, initial_z
    )


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    phi_q: Tensor,
    answer: Tensor | None,
    mass: Tensor | None,
    mask: Tensor | None,
    M: Tensor,
    z: Tensor,
    n: Tensor,
    before: Tensor,
    sink_k: Tensor | None,
    sink_v: Tensor | None,
    sink_seen: Tensor | None,
    scale: float,
) -> Tensor:
    """Launch one token's read: out `[B, H, D]`; all tensors contiguous."""
    (batch, heads, keys), (span, groups, width), features = q.shape, v.shape[1:], phi_q.shape[2]
    out = v.new_empty(batch, heads, width)
    block_k, block_f = triton.next_power_of_2(keys), triton.next_power_of_2(features)
    block_d = min(triton.next_power_of_2(width), max(8, 8192 // block_f), 32)
    block_w = max(1, min(64, 8192 // block_k, triton.next_power_of_2(span)))
    sinks = 0 if sink_k is None else sink_k.shape[1]
    block_s = max(1, min(64, 8192 // block_k, triton.next_power_of_2(max(1, sinks))))
    _one_token[(batch * groups * triton.cdiv(width, block_d),)](
        q, k, v, phi_q, answer, mass, mask, M, z, n, before, sink_k, sink_v, sink_seen, out,
        span, heads, groups, scale,
        K=keys, F=features, D=width, BK=block_k, BF=block_f, BD=block_d, BW=block_w, SINKS=sinks, BS=block_s,
        EXTRA=mass is not None, HAS_MASK=mask is not None, num_warps=4,
    )  # fmt: skip
    return out
