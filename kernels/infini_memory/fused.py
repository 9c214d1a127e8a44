"""The Infini memory in Triton, forward and backward.

Written out in the sums of the paper, with c_t the write gate of token t times the limit of its block (0 for
what is not written), M_i = sum c k^T v and z_i = sum c k over the blocks before i - L:

    out_t = g q M_i / (q z_i) + (1 - g) local_t,   i = t // S,

and local_t alone where q z_i is below `EMPTY` times n_i. Means and sums have the same quotient, so that n is
needed for that comparison and at both ends only, where a state comes in or goes out.

`_prepare` looks at each block once: which tokens are written, how much they weigh, how large they are.
`_limits` bounds a block's mean update by those sizes, and computes it only where the bound does not settle
the matter. `_totals` adds up n.

Blocks are then taken a span at a time, P tokens: one block, or as many small ones as fit `CHUNK`. `_states`
walks the spans of a row and stores the sums before each; `_output` then computes all spans at once, `CHUNK`
tokens a program. Where a span has several blocks a query also reads the earlier blocks of its own span. With
A = Q K^T over those pairs, W = g dOut / den and u = -g (dOut . answer) / den, the backward is

    dQ = W M^T + u z^T + (W V^T + u 1^T)_A diag(c) K
    dK = diag(c) K~,   K~ = (W V^T + u 1^T)_A^T Q + V dM'^T + dz'
    dV = diag(c) ((A^T W) + K dM'),   dgate_t = limit k_t . K~_t

where dM', dz' are the gradients of the sums *after* the span, found by `_state_gradients` walking backwards.
Keys stand L blocks before the queries of the same span. The query heads of a group are summed inside a
program, so that no two programs write the same place: equal inputs give equal bits. Where one walk a row and
tile would leave the GPU idle, a row's spans are divided into segments, as in `linear_attention.fused`.

What is stored for the backward, beside the inputs, is T/P x F x D states, the memory's answers, and some
figures a token and head.

No key or value of a token that is not written is loaded into a product, since 0 times NaN is NaN.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.infini_memory.state import written_blocks
from kernels.linear_attention.fused import CHUNK, GRADIENTS, _tile, operand, plan, stored_dtype
from kernels.linear_memory.chunk import EMPTY, LARGEST, TINY

_EMPTY = tl.constexpr(EMPTY)
_LARGEST = tl.constexpr(LARGEST)
_TINY = tl.constexpr(TINY)


@triton.jit
def _prepare(
    k, v, gate, mask, weight, counts, bounds, lost, T, NB, G,
    S: tl.constexpr, F: tl.constexpr, D: tl.constexpr, BT: tl.constexpr, TILES: tl.constexpr,
    BF: tl.constexpr,
    BD: tl.constexpr, HAS_GATE: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """One block: the weights of its tokens, their sum, how many were lost, and what bounds its mean."""
    pid = tl.program_id(0)
    g = pid % G
    j = pid // G % NB
    first = (pid // (G * NB)).to(tl.int64) * T + j * S
    total = tl.zeros([BT], tl.float32)
    missing = tl.zeros([BT], tl.int32)
    top_k = tl.zeros([BT], tl.float32)
    top_v = tl.zeros([BT], tl.float32)
    for tile in range(0, TILES):
        place = tile * BT + tl.arange(0, BT)
        t = first + place
        inside = place < S
        rows = inside
        if HAS_MASK:
            rows = rows & (tl.load(mask + t, mask=rows, other=0) != 0)
        if HAS_GATE:
            w = tl.load(gate + t * G + g, mask=rows, other=0.0).to(tl.float32)
        else:
            w = tl.where(rows, 1.0, 0.0)
        large = tl.where(tl.abs(w) < _LARGEST, 0, 1)
        high_k = tl.zeros([BT], tl.float32)
        high_v = tl.zeros([BT], tl.float32)
        for block in range(0, F, BF):
            f = block + tl.arange(0, BF)
            size = tl.abs(_tile(k, t, G, g, f, rows, F).to(tl.float32))
            fits = size < _LARGEST
            large += tl.sum(tl.where(fits, 0, 1), 1)
            high_k = tl.maximum(high_k, tl.max(tl.where(fits, size, 0.0), 1))
        for block in range(0, D, BD):
            d = block + tl.arange(0, BD)
            size = tl.abs(_tile(v, t, G, g, d, rows, D).to(tl.float32))
            fits = size < _LARGEST
            large += tl.sum(tl.where(fits, 0, 1), 1)
            high_v = tl.maximum(high_v, tl.max(tl.where(fits, size, 0.0), 1))
        taken = rows & (large == 0) & (w > 0)
        missing += tl.where(rows, tl.where(large == 0, 0, tl.where(w <= 0, 0, 1)), 0)
        w = tl.where(taken, w, 0.0)
        total += w
        top_k = tl.maximum(top_k, tl.where(taken, high_k, 0.0))
        top_v = tl.maximum(top_v, tl.where(taken, high_v, 0.0))
        tl.store(weight + t * G + g, w, mask=inside)
    high = tl.max(top_k, 0)
    tl.store(counts + pid, tl.sum(total, 0))
    tl.store(bounds + pid, tl.maximum(high, high * tl.max(top_v, 0)))
    tl.store(lost + pid, tl.sum(missing, 0))


@triton.jit
def _limits(
    k, v, weight, counts, bounds, scale, limited, T, NB, G, clamp,
    S: tl.constexpr, F: tl.constexpr, D: tl.constexpr, BT: tl.constexpr, TILES: tl.constexpr,
    BF: tl.constexpr,
    BD: tl.constexpr,
):  # fmt: skip
    """One block: by how much its mean update is scaled down, and whether it is.

    A mean of products is at most the largest key times the largest value; only beyond that is it computed.
    """
    pid = tl.program_id(0)
    g = pid % G
    first = (pid // (G * NB)).to(tl.int64) * T + pid // G % NB * S
    largest = tl.load(bounds + pid)
    if largest > clamp:
        share = 1.0 / tl.maximum(tl.load(counts + pid), _TINY)
        peak_M = tl.zeros([BF], tl.float32)
        peak_z = tl.zeros([BF], tl.float32)
        for block_f in range(0, F, BF):
            f = block_f + tl.arange(0, BF)
            z = tl.zeros([BF], tl.float32)
            for block_d in range(0, D, BD):
                d = block_d + tl.arange(0, BD)
                M = tl.zeros([BF, BD], tl.float32)
                z = tl.zeros([BF], tl.float32)
                for tile in range(0, TILES):
                    place = tile * BT + tl.arange(0, BT)
                    t = first + place
                    w = tl.load(weight + t * G + g, mask=place < S, other=0.0)
                    keys = _tile(k, t, G, g, f, w > 0, F).to(tl.float32) * (w * share)[:, None]
                    values = _tile(v, t, G, g, d, w > 0, D).to(tl.float32)
                    M = tl.dot(tl.trans(keys), values, M, input_precision="ieee")
                    z += tl.sum(keys, 0)
                peak_M = tl.maximum(peak_M, tl.max(tl.abs(M), 1))
            peak_z = tl.maximum(peak_z, tl.abs(z))
        largest = tl.max(tl.maximum(peak_M, peak_z), 0)
    tl.store(scale + pid, clamp / tl.maximum(largest, clamp))
    tl.store(limited + pid, tl.where(largest > clamp, 1, 0))


@triton.jit
def _totals(counts, initial_n, totals, NB, G, BN: tl.constexpr, HAS_INITIAL: tl.constexpr):
    """n of one row and group before each block and after the last, in fp64."""
    pid = tl.program_id(0)
    g = pid % G
    b = (pid // G).to(tl.int64)
    total = tl.zeros([1], tl.float64)
    if HAS_INITIAL:
        total += tl.load(initial_n + pid + tl.arange(0, 1)).to(tl.float64)
    for start in range(0, NB, BN):
        j = start + tl.arange(0, BN)
        count = tl.load(counts + (b * NB + j) * G + g, mask=j < NB, other=0.0).to(tl.float64)
        before = total + (tl.cumsum(count, 0) - count)
        tl.store(totals + (b * (NB + 1) + j) * G + g, before, mask=j < NB)
        total += tl.sum(count, 0)
    tl.store(totals + (b * (NB + 1) + NB) * G + g + tl.arange(0, 1), total)


@triton.jit
def _coefficients(weight, scale, row, b, key, rows, g, G, NB, S: tl.constexpr):
    """c of some keys of row b, 0 for what is not written."""
    w = tl.load(weight + (row + key) * G + g, mask=rows, other=0.0)
    return w * tl.load(scale + (b * NB + key // S) * G + g, mask=rows, other=0.0)


@triton.jit
def _states(
    k, v, weight, scale, totals, initial_M, initial_z, sums_M, sums_z, states_M, states_z, final_M, final_z,
    T, NS, NB, G, SHIFT, SEGMENTS,
    S: tl.constexpr, F: tl.constexpr, D: tl.constexpr, P: tl.constexpr, BT: tl.constexpr, TILES: tl.constexpr,
    BF: tl.constexpr, BD: tl.constexpr, STORE: tl.constexpr, HAS_INITIAL: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The sums before each span of a segment and, of the last segment, the final means.

    Without STORE only what the segment adds goes to sums `[B, SEGMENTS, G, ...]`.
    """
    FB: tl.constexpr = (F + BF - 1) // BF
    DB: tl.constexpr = (D + BD - 1) // BD
    pid = tl.program_id(0)
    f = (pid % (FB * DB)) // DB * BF + tl.arange(0, BF)
    d = pid % DB * BD + tl.arange(0, BD)
    column = pid % DB == 0  # one of the programs that share f sees to z
    segment = pid // (FB * DB) % SEGMENTS
    g = pid // (FB * DB * SEGMENTS) % G
    b = (pid // (FB * DB * SEGMENTS * G)).to(tl.int64)
    row = b * T
    share = (NS + SEGMENTS - 1) // SEGMENTS
    low = segment * share
    high = tl.minimum(low + share, NS)
    inside = (f < F)[:, None] & (d < D)[None, :]
    tile = f[:, None] * D + d[None, :]
    M = tl.zeros([BF, BD], tl.float32)
    z = tl.zeros([BF], tl.float32)
    if STORE:
        if HAS_INITIAL:
            at = b * G + g
            n = tl.load(totals + b * (NB + 1) * G + g).to(tl.float32)
            M += tl.load(initial_M + at * (F * D) + tile, mask=inside, other=0.0) * n
            z += tl.load(initial_z + at * F + f, mask=f < F, other=0.0) * n
        for earlier in range(0, segment):
            at = (b * SEGMENTS + earlier) * G + g
            M += tl.load(sums_M + at * (F * D) + tile, mask=inside, other=0.0)
            z += tl.load(sums_z + at * F + f, mask=f < F, other=0.0)
    for i in range(low * TILES, high * TILES):
        if STORE:
            if i % TILES == 0:
                at = (b * NS + i // TILES) * G + g
                tl.store(states_M + at * (F * D) + tile, M.to(states_M.dtype.element_ty), mask=inside)
                if column:
                    tl.store(states_z + at * F + f, z, mask=f < F)
        place = i % TILES * BT + tl.arange(0, BT)
        key = i // TILES * P - SHIFT + place
        rows = (place < P) & (key >= 0) & (key < NB * S)
        c = _coefficients(weight, scale, row, b, key, rows, g, G, NB, S)
        keys = _tile(k, row + key, G, g, f, c > 0, F)
        values = _tile(v, row + key, G, g, d, c > 0, D).to(tl.float32) * c[:, None]
        M = tl.dot(tl.trans(keys).to(OPERAND), values.to(OPERAND), M, input_precision=PRECISION)
        z += tl.sum(keys.to(tl.float32) * c[:, None], 0)
    if STORE:
        if segment == SEGMENTS - 1:
            at = b * G + g
            n = tl.maximum(tl.load(totals + (b * (NB + 1) + NB) * G + g).to(tl.float32), _TINY)
            tl.store(final_M + at * (F * D) + tile, M / n, mask=inside)
            if column:
                tl.store(final_z + at * F + f, z / n, mask=f < F)
    else:
        at = (b * SEGMENTS + segment) * G + g
        tl.store(sums_M + at * (F * D) + tile, M, mask=inside)
        if column:
            tl.store(sums_z + at * F + f, z, mask=f < F)


@triton.jit
def _output(
    q, k, v, local, gate, weight, scale, totals, states_M, states_z, out, answers, den,
    T, NS, NB, H, G, SHIFT,
    S: tl.constexpr, F: tl.constexpr, D: tl.constexpr, P: tl.constexpr, BT: tl.constexpr, TILES: tl.constexpr,
    BF: tl.constexpr, BD: tl.constexpr, WITHIN: tl.constexpr, PER_TOKEN: tl.constexpr,
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
    total = tl.zeros([BT], tl.float32)
    if WITHIN:
        weights = tl.zeros([BT, BT], tl.float32)
        key = own - SHIFT
        keys_here = (place < P) & (key >= 0) & (key < NB * S)
        c = _coefficients(weight, scale, row, b, key, keys_here, g, G, NB, S)
    for block in range(0, F, BF):
        f = block + tl.arange(0, BF)
        queries = _tile(q, t, H, h, f, rows, F)
        inside = (f < F)[:, None] & (d < D)[None, :]
        M = tl.load(states_M + held * (F * D) + f[:, None] * D + d[None, :], mask=inside, other=0.0)
        z = tl.load(states_z + held * F + f, mask=f < F, other=0.0)
        acc = tl.dot(queries.to(OPERAND), M.to(OPERAND), acc, input_precision=PRECISION)
        total += tl.sum(queries.to(tl.float32) * z[None, :], 1)
        if WITHIN:
            keys = _tile(k, row + key, G, g, f, c > 0, F)
            weights = tl.dot(queries, tl.trans(keys), weights, input_precision=PRECISION)
    if WITHIN:
        earlier = (place // S)[:, None] > (place // S)[None, :]
        weights = tl.where(earlier, weights * c[None, :], 0.0)
        values = _tile(v, row + key, G, g, d, c > 0, D)
        acc = tl.dot(weights.to(OPERAND), values.to(OPERAND), acc, input_precision=PRECISION)
        total += tl.sum(weights, 1)
    before = tl.minimum(tl.maximum(own // S - SHIFT // S, 0), NB)
    n = tl.load(totals + (b * (NB + 1) + before) * G + g, mask=rows, other=0.0).to(tl.float32)
    empty = total <= _EMPTY * n
    answer = tl.where(empty[:, None], 0.0, acc / tl.where(empty, 1.0, total)[:, None])
    if PER_TOKEN:
        mix = tl.load(gate + t * H + h, mask=rows, other=0.0).to(tl.float32)
    else:
        mix = tl.load(gate + h + place * 0, mask=rows, other=0.0).to(tl.float32)
    inside = rows[:, None] & (d < D)[None, :]
    at = (t[:, None] * H + h) * D + d[None, :]
    near = tl.load(local + at, mask=inside, other=0.0).to(tl.float32)
    joined = mix[:, None] * answer + (1.0 - mix)[:, None] * near
    tl.store(answers + at, answer.to(answers.dtype.element_ty), mask=inside)
    tl.store(out + at, tl.where(empty[:, None], near, joined).to(out.dtype.element_ty), mask=inside)
    if pid % DB == 0:
        tl.store(den + t * H + h, tl.where(empty, 0.0, total), mask=rows)


@triton.jit
def _mix_gradients(
    answers, dout, local, den, gate, dlocal, dgate, ratio, u, rows, H,
    D: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr, PER_TOKEN: tl.constexpr,
):  # fmt: skip
    """Of BR rows of `[B T H, D]`: the gradients of local and gate, W as a multiple of dout, and u."""
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    d = tl.arange(0, BD)
    inside = (row < rows)[:, None] & (d < D)[None, :]
    at = row[:, None] * D + d[None, :]
    slope = tl.load(dout + at, mask=inside, other=0.0).to(tl.float32)
    near = tl.load(local + at, mask=inside, other=0.0).to(tl.float32)
    answer = tl.load(answers + at, mask=inside, other=0.0).to(tl.float32)
    total = tl.load(den + row, mask=row < rows, other=0.0)
    if PER_TOKEN:
        mix = tl.load(gate + row, mask=row < rows, other=0.0).to(tl.float32)
    else:
        mix = tl.load(gate + row % H, mask=row < rows, other=0.0).to(tl.float32)
    empty = total == 0
    mix = tl.where(empty, 0.0, mix)
    share = mix / tl.where(empty, 1.0, total)
    tl.store(dlocal + at, (slope * (1.0 - mix)[:, None]).to(dlocal.dtype.element_ty), mask=inside)
    change = tl.where(empty[:, None], 0.0, slope * (answer - near))
    tl.store(dgate + row, tl.sum(change, 1), mask=row < rows)
    tl.store(ratio + row, share, mask=row < rows)
    taken = tl.where(share == 0, 0.0, -share * tl.sum(slope * answer, 1))  # whose gradient may be inf
    tl.store(u + row, taken, mask=row < rows)


@triton.jit
def _weighted(dout, ratio, t, heads, head, d, rows, D: tl.constexpr):
    """W `[BT, BD]`: the gradient of the numerator."""
    share = tl.load(ratio + t * heads + head, mask=rows, other=0.0)
    # An output that did not come from the memory may have any gradient, inf included.
    return tl.where(
        (share == 0)[:, None], 0.0, _tile(dout, t, heads, head, d, rows, D).to(tl.float32) * share[:, None]
    )


@triton.jit
def _state_gradients(
    q, dout, ratio, u, totals, final_M, final_z, sums_M, sums_z, states_M, states_z, initial_M, initial_z,
    T, NS, NB, H, G, SEGMENTS,
    F: tl.constexpr, D: tl.constexpr, P: tl.constexpr, BT: tl.constexpr, TILES: tl.constexpr,
    BF: tl.constexpr, BD: tl.constexpr, STORE: tl.constexpr, HAS_FINAL: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """As `_states`, from the last span to the first: the gradients of the sums *after* each span.

    The walk begins with those of the final means and ends with those of the initial ones. Segment 0 is the
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
    b = (pid // (FB * DB * SEGMENTS * G)).to(tl.int64)
    row = b * T
    share = (NS + SEGMENTS - 1) // SEGMENTS
    low = segment * share
    high = tl.minimum(low + share, NS)
    inside = (f < F)[:, None] & (d < D)[None, :]
    tile = f[:, None] * D + d[None, :]
    M = tl.zeros([BF, BD], tl.float32)
    z = tl.zeros([BF], tl.float32)
    if STORE:
        if HAS_FINAL:
            at = b * G + g
            n = tl.maximum(tl.load(totals + (b * (NB + 1) + NB) * G + g).to(tl.float32), _TINY)
            M += tl.load(final_M + at * (F * D) + tile, mask=inside, other=0.0) / n
            z += tl.load(final_z + at * F + f, mask=f < F, other=0.0) / n
        for later in range(0, segment):
            at = (b * SEGMENTS + later) * G + g
            M += tl.load(sums_M + at * (F * D) + tile, mask=inside, other=0.0)
            z += tl.load(sums_z + at * F + f, mask=f < F, other=0.0)
    for back in range(low * TILES, high * TILES):
        span = NS - 1 - back // TILES
        if STORE:
            if back % TILES == 0:
                at = (b * NS + span) * G + g
                tl.store(states_M + at * (F * D) + tile, M.to(states_M.dtype.element_ty), mask=inside)
                if column:
                    tl.store(states_z + at * F + f, z, mask=f < F)
        place = back % TILES * BT + tl.arange(0, BT)
        own = span * P + place
        rows = (place < P) & (own < T)
        t = row + own
        for h in range(g * (H // G), (g + 1) * (H // G)):
            slope = tl.load(u + t * H + h, mask=rows, other=0.0)
            read = tl.load(ratio + t * H + h, mask=rows, other=0.0) != 0  # an empty memory may be asked NaN
            queries = _tile(q, t, H, h, f, read, F)
            w = _weighted(dout, ratio, t, H, h, d, rows, D)
            M = tl.dot(tl.trans(queries).to(OPERAND), w.to(OPERAND), M, input_precision=PRECISION)
            z += tl.sum(queries.to(tl.float32) * slope[:, None], 0)
    if STORE:
        if segment == SEGMENTS - 1:
            at = b * G + g
            n = tl.load(totals + b * (NB + 1) * G + g).to(tl.float32)
            tl.store(initial_M + at * (F * D) + tile, M * n, mask=inside)
            if column:
                tl.store(initial_z + at * F + f, z * n, mask=f < F)
    else:
        at = (b * SEGMENTS + segment) * G + g
        tl.store(sums_M + at * (F * D) + tile, M, mask=inside)
        if column:
            tl.store(sums_z + at * F + f, z, mask=f < F)


@triton.jit
def _gradients(
    q, k, v, dout, ratio, u, weight, scale, states_M, states_z, after_M, after_z, dq, dk, dv, dweight,
    T, NS, NB, H, G, SHIFT, ROWS,
    S: tl.constexpr, F: tl.constexpr, D: tl.constexpr, P: tl.constexpr, BT: tl.constexpr, TILES: tl.constexpr,
    BF: tl.constexpr, BD: tl.constexpr, WITHIN: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Block x of dq, dk (BF columns) and dv (BD columns) of one group's heads in BT tokens of a span.

    Where F and D are of different numbers of blocks, x lies beyond one of them: all of that is masked. What
    the BF columns add to the write gates' gradients goes to dweight `[FB, B T, G]`, ROWS = B T.
    """
    FB: tl.constexpr = (F + BF - 1) // BF
    DB: tl.constexpr = (D + BD - 1) // BD
    X: tl.constexpr = FB if FB > DB else DB
    pid = tl.program_id(0)
    own_f = pid % X * BF + tl.arange(0, BF)
    own_d = pid % X * BD + tl.arange(0, BD)
    g = pid // X % G
    span = pid // (X * G * TILES)
    b = (span // NS).to(tl.int64)
    row = b * T
    place = pid // (X * G) % TILES * BT + tl.arange(0, BT)
    own = span % NS * P + place
    rows = (place < P) & (own < T)
    t = row + own
    key = own - SHIFT
    there = (place < P) & (key >= 0) & (key < T)
    written = there & (key < NB * S)
    c = _coefficients(weight, scale, row, b, key, written, g, G, NB, S)
    write = c > 0
    at_key = row + key
    held = span.to(tl.int64) * G + g
    own_keys = _tile(k, at_key, G, g, own_f, write, F)
    weighted_keys = (own_keys.to(tl.float32) * c[:, None]).to(OPERAND)
    own_z = tl.load(states_z + held * F + own_f, mask=own_f < F, other=0.0)
    earlier = (place // S)[:, None] > (place // S)[None, :]
    grad_k = tl.zeros([BT, BF], tl.float32)
    grad_v = tl.zeros([BT, BD], tl.float32)
    for h in range(g * (H // G), (g + 1) * (H // G)):
        slope = tl.load(u + t * H + h, mask=rows, other=0.0)
        read = tl.load(ratio + t * H + h, mask=rows, other=0.0) != 0
        grad_q = slope[:, None] * own_z[None, :]
        slopes = tl.zeros([BT, BT], tl.float32)
        for block in range(0, D, BD):
            d = block + tl.arange(0, BD)
            w = _weighted(dout, ratio, t, H, h, d, rows, D).to(OPERAND)
            inside = (own_f < F)[:, None] & (d < D)[None, :]
            at = held * (F * D) + own_f[:, None] * D + d[None, :]
            M = tl.load(states_M + at, mask=inside, other=0.0).to(OPERAND)
            grad_q = tl.dot(w, tl.trans(M), grad_q, input_precision=PRECISION)
            if WITHIN:
                values = _tile(v, at_key, G, g, d, write, D).to(OPERAND)
                slopes = tl.dot(w, tl.trans(values), slopes, input_precision=PRECISION)
        if WITHIN:
            slopes = tl.where(earlier, slopes + slope[:, None], 0.0).to(OPERAND)
            grad_q = tl.dot(slopes, weighted_keys, grad_q, input_precision=PRECISION)
            weights = tl.zeros([BT, BT], tl.float32)
            for block in range(0, F, BF):
                f = block + tl.arange(0, BF)
                queries = _tile(q, t, H, h, f, read, F)
                keys = _tile(k, at_key, G, g, f, write, F)
                weights = tl.dot(queries, tl.trans(keys), weights, input_precision=PRECISION)
            weights = tl.where(earlier, weights, 0.0).to(OPERAND)
            own_queries = _tile(q, t, H, h, own_f, read, F).to(OPERAND)
            grad_k = tl.dot(tl.trans(slopes), own_queries, grad_k, input_precision=PRECISION)
            own_w = _weighted(dout, ratio, t, H, h, own_d, rows, D).to(OPERAND)
            grad_v = tl.dot(tl.trans(weights), own_w, grad_v, input_precision=PRECISION)
        at = (t[:, None] * H + h) * F + own_f[None, :]
        tl.store(dq + at, grad_q.to(dq.dtype.element_ty), mask=rows[:, None] & (own_f < F)[None, :])
    for block in range(0, D, BD):
        d = block + tl.arange(0, BD)
        values = _tile(v, at_key, G, g, d, write, D).to(OPERAND)
        inside = (own_f < F)[:, None] & (d < D)[None, :]
        at = held * (F * D) + own_f[:, None] * D + d[None, :]
        M = tl.load(after_M + at, mask=inside, other=0.0).to(OPERAND)
        grad_k = tl.dot(values, tl.trans(M), grad_k, input_precision=PRECISION)
    for block in range(0, F, BF):
        f = block + tl.arange(0, BF)
        keys = _tile(k, at_key, G, g, f, write, F).to(OPERAND)
        inside = (f < F)[:, None] & (own_d < D)[None, :]
        at = held * (F * D) + f[:, None] * D + own_d[None, :]
        M = tl.load(after_M + at, mask=inside, other=0.0).to(OPERAND)
        grad_v = tl.dot(keys, M, grad_v, input_precision=PRECISION)
    grad_k += tl.load(after_z + held * F + own_f, mask=own_f < F, other=0.0)[None, :]
    if pid % X < FB:
        limit = tl.load(scale + (b * NB + key // S) * G + g, mask=written, other=0.0)
        change = tl.where(write, limit * tl.sum(own_keys.to(tl.float32) * grad_k, 1), 0.0)
        tl.store(dweight + ((pid % X).to(tl.int64) * ROWS + at_key) * G + g, change, mask=there)
    grad_k = tl.where(write[:, None], grad_k * c[:, None], 0.0)
    grad_v = tl.where(write[:, None], grad_v * c[:, None], 0.0)
    at = (at_key[:, None] * G + g) * F + own_f[None, :]
    tl.store(dk + at, grad_k.to(dk.dtype.element_ty), mask=there[:, None] & (own_f < F)[None, :])
    at = (at_key[:, None] * G + g) * D + own_d[None, :]
    tl.store(dv + at, grad_v.to(dv.dtype.element_ty), mask=there[:, None] & (own_d < D)[None, :])


@triton.jit
def _one_token(
    q, local, gate, M, z, out, H, G,
    F: tl.constexpr, D: tl.constexpr, BF: tl.constexpr, BD: tl.constexpr, PER_TOKEN: tl.constexpr,
):  # fmt: skip
    """BD columns of one row's and group's means, read once, asked by each head of the group."""
    DB: tl.constexpr = (D + BD - 1) // BD
    pid = tl.program_id(0)
    d = pid % DB * BD + tl.arange(0, BD)
    f = tl.arange(0, BF)
    held = (pid // DB).to(tl.int64)  # b G + g
    at = held * (F * D) + f[:, None] * D + d[None, :]
    means = tl.load(M + at, mask=(f < F)[:, None] & (d < D)[None, :], other=0.0)
    keys = tl.load(z + held * F + f, mask=f < F, other=0.0)
    R = H // G
    for r in range(0, R):
        head = held * R + r  # b H + h, since H = R G
        query = tl.load(q + head * F + f, mask=f < F, other=0.0).to(tl.float32)
        total = tl.sum(query * keys, 0)
        empty = total <= _EMPTY
        answer = tl.sum(query[:, None] * means, 0) / tl.where(empty, 1.0, total)
        if PER_TOKEN:
            mix = tl.load(gate + head).to(tl.float32)
        else:
            mix = tl.load(gate + head % H).to(tl.float32)
        near = tl.load(local + head * D + d, mask=d < D, other=0.0).to(tl.float32)
        joined = tl.where(empty, near, mix * answer + (1.0 - mix) * near)
        tl.store(out + head * D + d, joined.to(out.dtype.element_ty), mask=d < D)


class Cut(NamedTuple):
    """How the tokens of a row are taken."""

    span: int
    """P, tokens between two stored states: a block, or as many small ones as fit `CHUNK`."""
    spans: int
    tile: int
    """Tokens a program, a power of two."""
    tiles: int
    """Programs a span."""
    written: int
    """Blocks that are written."""

    @classmethod
    def of(cls, length: int, block: int, lookback: int) -> "Cut":
        """The cut of T tokens in blocks of S."""
        span = block * max(1, CHUNK // block)
        tile = max(16, min(CHUNK, triton.next_power_of_2(span)))
        written = written_blocks(length, block, lookback)
        return cls(span, triton.cdiv(length, span), tile, triton.cdiv(span, tile), written)


class Written(NamedTuple):
    """What writing makes: the final state, and what reading and the backward need."""

    M: Tensor
    z: Tensor
    totals: Tensor
    """`[B, NB + 1, G]` fp64, n before each block and after the last."""
    limited: Tensor
    """`[B, NB, G]` int32, which blocks' means were limited."""
    lost: Tensor
    """`[B, NB, G]` int32, tokens left out of each block."""
    weight: Tensor
    """`[B, T, G]` fp32, the write gate of what is written; of no meaning beyond the blocks written."""
    scale: Tensor
    """`[B, NB, G]` fp32, the limit."""
    states_M: Tensor
    """`[B, X, G, F, D]`, the sums before each span."""
    states_z: Tensor


class Forward(NamedTuple):
    """What `forward` makes: the results, and after them what the backward needs; see `Written`."""

    out: Tensor
    M: Tensor
    z: Tensor
    totals: Tensor
    limited: Tensor
    lost: Tensor
    answers: Tensor
    """`[B, T, H, D]`, what the memory answered, 0 where it is empty."""
    den: Tensor
    """`[B, T, H]` fp32, the answers' denominators in sums, 0 where the memory is empty."""
    weight: Tensor
    scale: Tensor
    states_M: Tensor
    states_z: Tensor


def room(q: Tensor, v: Tensor, block: int, lookback: int) -> Written:
    """The tensors of a `Written`, empty."""
    (batch, length, _, features), (groups, width) = q.shape, v.shape[2:]
    cut = Cut.of(length, block, lookback)
    single, by_block = torch.float32, (batch, cut.written, groups)
    return Written(
        M=q.new_empty(batch, groups, features, width, dtype=single),
        z=q.new_empty(batch, groups, features, dtype=single),
        totals=q.new_empty(batch, cut.written + 1, groups, dtype=torch.float64),
        limited=q.new_empty(by_block, dtype=torch.int32),
        lost=q.new_empty(by_block, dtype=torch.int32),
        weight=q.new_empty(batch, length, groups, dtype=single),
        scale=q.new_empty(by_block, dtype=single),
        states_M=q.new_empty(batch, cut.spans, groups, features, width, dtype=stored_dtype(q)),
        states_z=q.new_empty(batch, cut.spans, groups, features, dtype=single),
    )


def shapes(q: Tensor, v: Tensor, block: int, lookback: int) -> Forward:
    """The tensors of a `Forward`, empty."""
    return _around(q, v, room(q, v, block, lookback))


def _around(q: Tensor, v: Tensor, written: Written) -> Forward:
    lead, width = q.shape[:3], v.shape[3]
    return Forward(
        out=v.new_empty(*lead, width),
        answers=v.new_empty(*lead, width),
        den=q.new_empty(lead, dtype=torch.float32),
        **written._asdict(),
    )


def write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    write_gate: Tensor | None,
    mask: Tensor | None,
    M: Tensor | None,
    z: Tensor | None,
    n: Tensor | None,
    block: int,
    lookback: int,
    clamp: float,
    precision: str,
    width: int,
    segments: int,
) -> Written:
    """Launch what writes; arguments as in `forward`."""
    (batch, length, _, features), (groups, columns) = q.shape, v.shape[2:]
    cut, made = Cut.of(length, block, lookback), room(q, v, block, lookback)
    settings = plan(q, v, groups, batch, cut.spans, width, segments)
    sizes = {"S": block, "F": features, "D": columns, "BF": settings.block_f, "BD": settings.block_d}
    blocks = batch * cut.written * groups
    if blocks:
        tile = max(16, min(CHUNK, triton.next_power_of_2(block)))
        by_block = {"BT": tile, "TILES": triton.cdiv(block, tile), "num_warps": 4, "num_stages": 1}
        counts, bounds = torch.empty_like(made.scale), torch.empty_like(made.scale)
        _prepare[(blocks,)](
            k, v, write_gate, mask, made.weight, counts, bounds, made.lost,
            length, cut.written, groups,
            HAS_GATE=write_gate is not None, HAS_MASK=mask is not None, **sizes, **by_block,
        )  # fmt: skip
        _limits[(blocks,)](
            k, v, made.weight, counts, bounds, made.scale, made.limited,
            length, cut.written, groups, clamp, **sizes, **by_block,
        )  # fmt: skip
    else:
        counts = made.scale
    _totals[(batch * groups,)](counts, n, made.totals, cut.written, groups, BN=256, HAS_INITIAL=n is not None)
    tiles = triton.cdiv(features, settings.block_f), triton.cdiv(columns, settings.block_d)
    sums_M, sums_z = _sums(made.M, made.z, settings.segments)
    common = {"P": cut.span, "BT": cut.tile, "TILES": cut.tiles, "PRECISION": precision}
    common |= {"OPERAND": operand(q), "num_warps": settings.warps, "num_stages": settings.stages}
    for store in _passes(settings.segments):
        _states[(tiles[0] * tiles[1] * settings.segments * groups * batch,)](
            k, v, made.weight, made.scale, made.totals, M, z, sums_M, sums_z,
            made.states_M, made.states_z, made.M, made.z,
            length, cut.spans, cut.written, groups, lookback * block, settings.segments,
            STORE=store, HAS_INITIAL=M is not None, **sizes, **common,
        )  # fmt: skip
    return made


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    local: Tensor,
    gate: Tensor,
    write_gate: Tensor | None,
    mask: Tensor | None,
    M: Tensor | None,
    z: Tensor | None,
    n: Tensor | None,
    block: int,
    lookback: int,
    clamp: float,
    precision: str,
    width: int,
    segments: int,
) -> Forward:
    """Launch the forward; all tensors contiguous.

    Args:
        M, z, n: the initial state, or None for an empty one.
        precision: of products of fp32: "ieee", "tf32" or "tf32x3".
        width, segments: the columns of F and D a program takes, and the segments of a row; 0 to choose.
    """
    (batch, length, heads, features), (groups, columns) = q.shape, v.shape[2:]
    cut, options = Cut.of(length, block, lookback), (block, lookback, clamp, precision, width, segments)
    made = _around(q, v, write(q, k, v, write_gate, mask, M, z, n, *options))
    settings = plan(q, v, groups, batch, cut.spans, width, segments)
    sizes = {"S": block, "F": features, "D": columns, "BF": settings.block_f, "BD": settings.block_d}
    common = {"P": cut.span, "BT": cut.tile, "TILES": cut.tiles, "PRECISION": precision}
    common |= {"OPERAND": operand(q), "num_warps": settings.warps, "num_stages": settings.stages}
    tiles = triton.cdiv(columns, settings.block_d)
    _output[(tiles * heads * cut.tiles * cut.spans * batch,)](
        q, k, v, local, gate, made.weight, made.scale, made.totals, made.states_M, made.states_z,
        made.out, made.answers, made.den,
        length, cut.spans, cut.written, heads, groups, lookback * block,
        WITHIN=cut.span > block, PER_TOKEN=gate.dim() == 3, **sizes, **common,
    )  # fmt: skip
    return made


def _passes(segments: int) -> tuple[bool, ...]:
    """STORE of the walks to make: with segments, one that sums them comes first."""
    return (True,) if segments == 1 else (False, True)


def _sums(M: Tensor, z: Tensor, segments: int) -> tuple[Tensor, Tensor]:
    """Room for what the segments of each row add; with one segment none is used."""
    if segments == 1:
        return M, z
    return tuple(x.new_empty(x.shape[0], segments, *x.shape[1:]) for x in (M, z))  # type: ignore[return-value]


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    local: Tensor,
    gate: Tensor,
    totals: Tensor,
    answers: Tensor,
    den: Tensor,
    weight: Tensor,
    scale: Tensor,
    states_M: Tensor,
    states_z: Tensor,
    dout: Tensor,
    dM: Tensor | None,
    dz: Tensor | None,
    block: int,
    lookback: int,
    precision: str,
    width: int,
    segments: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Launch the backward; all tensors contiguous.

    Args:
        totals ... states_z: of `Forward`.
        dout: `[B, T, H, D]`; dM, dz: the gradients of the final state, or None where it has none.

    Returns:
        dq, dk, dv, dlocal, and in fp32 those of gate `[B, T, H]`, write gate `[B, T, G]`, initial M and z.
    """
    dlocal, (dgate, ratio, u) = torch.empty_like(local), (torch.empty_like(den) for _ in range(3))
    rows, columns = 16, v.shape[3]
    _mix_gradients[(triton.cdiv(den.numel(), rows),)](
        answers, dout, local, den, gate, dlocal, dgate, ratio, u, den.numel(), q.shape[2],
        D=columns, BR=rows, BD=triton.next_power_of_2(columns), PER_TOKEN=gate.dim() == 3,
    )  # fmt: skip
    dq, dk, dv, dweight, initial_M, initial_z = read_gradients(
        q, k, v, dout, ratio, u, totals, weight, scale, states_M, states_z, dM, dz, torch.empty_like(v),
        block, lookback, precision, width, segments,
    )  # fmt: skip
    return dq, dk, dv, dlocal, dgate, dweight, initial_M, initial_z


def read_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    ratio: Tensor,
    u: Tensor,
    totals: Tensor,
    weight: Tensor,
    scale: Tensor,
    states_M: Tensor,
    states_z: Tensor,
    dM: Tensor | None,
    dz: Tensor | None,
    dv: Tensor,
    block: int,
    lookback: int,
    precision: str,
    width: int,
    segments: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Launch what goes back through read and write, given the gradients of a read's two sums.

    Args:
        ratio, u: `[B, T, H]` fp32; W = ratio dout and u are the gradients of q M and q z. Where ratio is 0
            nothing was read.
        dv: filled, in its dtype.

    Returns:
        dq, dk, dv, and in fp32 the gradients of write gate `[B, T, G]`, initial M and z.
    """
    (batch, length, heads, features), (groups, columns) = q.shape, v.shape[2:]
    cut = Cut.of(length, block, lookback)
    settings = plan(q, v, groups, batch, cut.spans, width, segments)
    tiles = triton.cdiv(features, settings.block_f), triton.cdiv(columns, settings.block_d)
    dq, dk = torch.empty_like(q), torch.empty_like(k)
    dweight = weight.new_empty(tiles[0], *weight.shape)
    # The keys of the last L blocks are read by no query, and no program comes to them.
    covered = max(0, cut.spans * cut.span - lookback * block)
    if covered < length:
        for x in (dk, dv, dweight[0], *dweight[1:]):
            x[:, covered:] = 0
    after_M, after_z = torch.empty_like(states_M), torch.empty_like(states_z)
    initial_M = q.new_empty(batch, groups, features, columns, dtype=torch.float32)
    initial_z = q.new_empty(batch, groups, features, dtype=torch.float32)
    sums_M, sums_z = _sums(initial_M, initial_z, settings.segments)
    sizes = {"S": block, "F": features, "D": columns, "BF": settings.block_f, "BD": settings.block_d}
    sizes |= {"P": cut.span, "BT": cut.tile, "TILES": cut.tiles}
    common = {"OPERAND": operand(q), "PRECISION": precision}
    for store in _passes(settings.segments):
        _state_gradients[(tiles[0] * tiles[1] * settings.segments * groups * batch,)](
            q, dout, ratio, u, totals, dM, dz, sums_M, sums_z, after_M, after_z, initial_M, initial_z,
            length, cut.spans, cut.written, heads, groups, settings.segments,
            STORE=store, HAS_FINAL=dM is not None, **sizes, **common,
            num_warps=settings.warps, num_stages=settings.stages,
        )  # fmt: skip
    _gradients[(max(tiles) * groups * cut.tiles * cut.spans * batch,)](
        q, k, v, dout, ratio, u, weight, scale, states_M, states_z, after_M, after_z, dq, dk, dv, dweight,
        length, cut.spans, cut.written, heads, groups, lookback * block, batch * length,
        WITHIN=cut.span > block, **sizes, **common, **GRADIENTS,
    )  # fmt: skip
    return dq, dk, dv, dweight.sum(0), initial_M, initial_z


def step(q: Tensor, local: Tensor, gate: Tensor, M: Tensor, z: Tensor) -> Tensor:
    """Launch one token's read: out `[B, H, D]`; all tensors contiguous."""
    (batch, heads, features), (groups, width) = q.shape, (z.shape[1], local.shape[2])
    out = torch.empty_like(local)
    block_f = triton.next_power_of_2(features)
    block_d = min(triton.next_power_of_2(width), max(8, 8192 // block_f), 32)
    _one_token[(batch * groups * triton.cdiv(width, block_d),)](
        q, local, gate, M, z, out, heads, groups,
        F=features, D=width, BF=block_f, BD=block_d, PER_TOKEN=gate.dim() == 2, num_warps=4,
    )  # fmt: skip
    return out
