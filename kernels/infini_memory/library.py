"""The fused kernels as torch.library operators: what torch.compile sees, and how gradients reach them."""

from typing import Any

import torch
from torch import Tensor

from kernels.infini_memory import fused


@torch.library.custom_op("layer_replace::infini_memory", mutates_args=())
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `fused.forward`, of tensors with any strides."""
    given: list = [*_contiguous(q, k, v, local, gate, write_gate, mask, M, z, n)]
    given += [block, lookback, clamp, precision, width, segments]
    with torch.cuda.device_of(q):
        found: Any = fused.forward(*given)
        return found


@forward.register_fake
def _(
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
) -> tuple[Tensor, ...]:
    return tuple(fused.shapes(q, v, block, lookback))


@torch.library.custom_op("layer_replace::infini_memory_backward", mutates_args=())
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
    """As `fused.backward`, of tensors with any strides."""
    q, k, v, local, gate, dout, dM, dz = _contiguous(q, k, v, local, gate, dout, dM, dz)
    with torch.cuda.device_of(q):
        return fused.backward(
            q, k, v, local, gate, totals, answers, den, weight, scale, states_M, states_z, dout, dM, dz,
            block, lookback, precision, width, segments,
        )  # fmt: skip


@backward.register_fake
def _(
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
    dq, dk, dv, dlocal, dgate, dweight = (x.new_empty(x.shape) for x in (q, k, v, local, den, weight))
    shape = (q.shape[0], *states_M.shape[2:])
    initial_M, initial_z = (q.new_empty(size, dtype=torch.float32) for size in (shape, shape[:-1]))
    return dq, dk, dv, dlocal, dgate, dweight, initial_M, initial_z


def _contiguous(*tensors: Tensor | None) -> tuple[Any, ...]:
    return tuple(None if x is None else x.contiguous() for x in tensors)


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    q, k, v, local, gate, write_gate, _, M, _, _, block, lookback, _, *options = inputs
    made = fused.Forward(*output)
    saved = (made.totals, made.answers, made.den, made.weight, made.scale, made.states_M, made.states_z)
    ctx.save_for_backward(q, k, v, local, gate, *saved)
    ctx.options = (block, lookback, *options)
    ctx.write_dtype, ctx.has_initial = None if write_gate is None else write_gate.dtype, M is not None
    ctx.set_materialize_grads(False)


def _gradients(
    ctx: Any, dout: Tensor | None, dM: Tensor | None, dz: Tensor | None, *_: Tensor | None
) -> tuple[Tensor | None, ...]:
    q, k, v, local, gate, *saved = ctx.saved_tensors
    dout = torch.zeros_like(local) if dout is None else dout
    if dM is not None or dz is not None:
        shape = (q.shape[0], *saved[-2].shape[2:])
        dM = saved[-1].new_zeros(shape) if dM is None else dM
        dz = saved[-1].new_zeros(shape[:-1]) if dz is None else dz
    found = backward(q, k, v, local, gate, *saved, dout, dM, dz, *ctx.options)
    dq, dk, dv, dlocal, dgate, dweight, initial_M, initial_z = found
    dgate = (dgate if gate.dim() == 3 else dgate.sum((0, 1))).to(gate.dtype)
    write = None if ctx.write_dtype is None else dweight.to(ctx.write_dtype)
    initial = (initial_M, initial_z) if ctx.has_initial else (None, None)
    return (dq, dk, dv, dlocal, dgate, write, None, *initial, *[None] * 7)


forward.register_autograd(_gradients, setup_context=_save)


@torch.library.custom_op("layer_replace::infini_memory_step", mutates_args=())
def step(q: Tensor, local: Tensor, gate: Tensor, M: Tensor, z: Tensor) -> Tensor:
    """As `fused.step`, of tensors with any strides; without gradients."""
    with torch.cuda.device_of(q):
        return fused.step(*_contiguous(q, local, gate, M, z))


@step.register_fake
def _(q: Tensor, local: Tensor, gate: Tensor, M: Tensor, z: Tensor) -> Tensor:
    return local.new_empty(local.shape)
