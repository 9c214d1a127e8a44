"""The fused kernels as torch.library operators: what torch.compile sees, and how gradients reach them."""

from typing import Any

import torch
from torch import Tensor

from kernels.arguments import check_borders
from kernels.window_linear_attention import fused


@torch.library.custom_op("layer_replace::window_linear_attention", mutates_args=())
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
    cu_seqlens: Tensor | None,
    block: int,
    lookback: int,
    scale: float,
    clamp: float,
    precision: str,
    width: int,
    segments: int,
) -> tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor
]:
    """As `fused.forward`, of tensors with any strides."""
    given: list = [*_contiguous(q, k, v, phi_q, phi_k, write_gate, answer, mass, seen, write)]
    given += [*_contiguous(sink_k, sink_v, sink_seen, before, M, z, n), _borders(cu_seqlens, q.shape[1])]
    given += [block, lookback, scale, clamp, precision, width, segments]
    with torch.cuda.device_of(q):
        made: Any = fused.forward(*given)
    # What a custom operator returns must not be part of anything else that it returns.
    return tuple(made._replace(n=made.n.clone()))  # type: ignore[return-value]


@forward.register_fake
def _(
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
    cu_seqlens: Tensor | None,
    block: int,
    lookback: int,
    scale: float,
    clamp: float,
    precision: str,
    width: int,
    segments: int,
) -> tuple[Tensor, ...]:
    sequences = None if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return tuple(fused.shapes(q, v, phi_q, block, lookback, sequences))


@torch.library.custom_op("layer_replace::window_linear_attention_backward", mutates_args=())
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
    cu_seqlens: Tensor | None,
    made: list[Tensor],
    dout: Tensor,
    dM: Tensor | None,
    dz: Tensor | None,
    block: int,
    lookback: int,
    scale: float,
    precision: str,
    width: int,
    segments: int,
) -> list[Tensor]:
    """As `fused.backward`, of tensors with any strides; the gradients of what there is, in their order."""
    given: list = [*_contiguous(q, k, v, phi_q, phi_k, answer, mass, seen, sink_k, sink_v, sink_seen, before)]
    given += [_made(made), *_contiguous(dout, dM, dz), _borders(cu_seqlens, q.shape[1])]
    given += [block, lookback, scale, precision, width, segments]
    with torch.cuda.device_of(q):
        found = fused.backward(*given)
    return [x for x in found if x is not None]


@backward.register_fake
def _(
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
    cu_seqlens: Tensor | None,
    made: list[Tensor],
    dout: Tensor,
    dM: Tensor | None,
    dz: Tensor | None,
    block: int,
    lookback: int,
    scale: float,
    precision: str,
    width: int,
    segments: int,
) -> list[Tensor]:
    states, (groups, columns), features = before.shape[0], v.shape[2:], phi_q.shape[3]
    shape = (states, groups, features, columns)
    found = [x.new_empty(x.shape) for x in (q, k, v, phi_q, phi_k)]
    found.append(q.new_empty(k.shape[:3], dtype=torch.float32))
    found += [x.new_empty(x.shape) for x in (answer, mass) if x is not None]
    found += [x.new_empty(x.shape, dtype=torch.float32) for x in (sink_k, sink_v) if x is not None]
    return found + [q.new_empty(size, dtype=torch.float32) for size in (shape, shape[:-1])]


SAVED = ("out", "lse", "ratio", "totals", "weight", "scale", "states_M", "states_z")
"""The fields of `fused.Forward` that the backward reads."""


def _made(saved: list[Tensor]) -> fused.Forward:
    """A `Forward` of the fields `SAVED`; the others are not read, and a part of them is a part of `out`."""
    known = dict(zip(SAVED, saved, strict=True))
    return fused.Forward(*(known.get(name, saved[0]) for name in fused.Forward._fields))


def _borders(cu_seqlens: Tensor | None, length: int) -> list[int] | None:
    if cu_seqlens is None:
        return None
    check_borders(cu_seqlens, length)
    return cu_seqlens.tolist()


def _contiguous(*tensors: Tensor | None) -> tuple[Any, ...]:
    return tuple(None if x is None else x.contiguous() for x in tensors)


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    q, k, v, phi_q, phi_k, write_gate, answer, mass, seen, _, *states = inputs
    sink_k, sink_v, sink_seen, before, M, _, _, cu_seqlens, block, lookback, scale, _, *options = states
    made = fused.Forward(*output)
    given = (q, k, v, phi_q, phi_k, answer, mass, seen, sink_k, sink_v, sink_seen, before, cu_seqlens)
    ctx.save_for_backward(*given, *(getattr(made, name) for name in SAVED))
    ctx.options = (block, lookback, scale, *options)
    ctx.write_dtype, ctx.has_initial = None if write_gate is None else write_gate.dtype, M is not None
    ctx.set_materialize_grads(False)


def _gradients(
    ctx: Any, dout: Tensor | None, dM: Tensor | None, dz: Tensor | None, *_: Tensor | None
) -> tuple[Tensor | None, ...]:
    *given, out, lse, ratio, totals, weight, scale, states_M, states_z = ctx.saved_tensors
    sink_k, before = given[8], given[11]
    dout = torch.zeros_like(out) if dout is None else dout
    if dM is not None or dz is not None:
        shape = (before.shape[0], *states_M.shape[2:])
        dM = states_z.new_zeros(shape) if dM is None else dM
        dz = states_z.new_zeros(shape[:-1]) if dz is None else dz
    made = [out, lse, ratio, totals, weight, scale, states_M, states_z]
    found = iter(backward(*given, made, dout, dM, dz, *ctx.options))
    near = [next(found) for _ in range(5)]
    dweight = next(found)
    write = None if ctx.write_dtype is None else dweight.to(ctx.write_dtype)
    extra = [None if x is None else next(found) for x in given[5:7]]
    sinks = [None if sink_k is None else next(found).to(sink_k.dtype) for _ in range(2)]
    initial = [x if ctx.has_initial else None for x in found]
    return (*near, write, *extra, None, None, *sinks, None, None, *initial, *[None] * 9)


forward.register_autograd(_gradients, setup_context=_save)


@torch.library.custom_op("layer_replace::window_linear_attention_step", mutates_args=())
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
    """As `fused.step`, of tensors with any strides; without gradients."""
    given: list = [*_contiguous(q, k, v, phi_q, answer, mass, mask, M, z, n, before)]
    given += [*_contiguous(sink_k, sink_v, sink_seen), scale]
    with torch.cuda.device_of(q):
        return fused.step(*given)


@step.register_fake
def _(
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
    return v.new_empty(*q.shape[:2], v.shape[3])
