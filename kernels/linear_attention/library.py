"""The fused kernels as torch.library operators: what torch.compile sees, and how gradients reach them."""

from typing import Any

import torch
from torch import Tensor

from kernels.arguments import check_borders
from kernels.linear_attention import fused


@torch.library.custom_op("layer_replace::linear_attention", mutates_args=())
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
    """As `fused.forward`, of tensors with any strides."""
    if cu_seqlens is not None:
        check_borders(cu_seqlens, q.shape[1])
    q, k, v, M, z, mask = (None if x is None else x.contiguous() for x in (q, k, v, M, z, mask))  # type: ignore[assignment]
    with torch.cuda.device_of(q):
        return fused.forward(q, k, v, M, z, mask, cu_seqlens, normalize, eps, precision, block, segments)


@forward.register_fake
def _(
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
    (batch, length, heads, features), (groups, width) = q.shape, v.shape[2:]
    states = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    chunks = fused.count_chunks(length, batch, states, cu_seqlens is not None)
    single = torch.float32
    return (
        v.new_empty(batch, length, heads, width),
        q.new_empty(states, groups, features, width, dtype=single),
        q.new_empty(states, groups, features, dtype=single),
        q.new_empty(batch, length, heads, dtype=single),
        q.new_empty(chunks, groups, features, width, dtype=fused.stored_dtype(q)),
        q.new_empty(chunks, groups, features, dtype=single),
    )


@torch.library.custom_op("layer_replace::linear_attention_backward", mutates_args=())
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
    """As `fused.backward`, of tensors with any strides."""
    q, k, v, mask, dout, dM, dz = (  # type: ignore[assignment]
        None if x is None else x.contiguous() for x in (q, k, v, mask, dout, dM, dz)
    )
    with torch.cuda.device_of(q):
        return fused.backward(
            q, k, v, mask, cu_seqlens, out, den, states_M, states_z, dout, dM, dz,
            normalize, eps, precision, block, segments,
        )  # fmt: skip


@backward.register_fake
def _(
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
    states = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    shape = (states, *states_M.shape[1:])
    like = [x.new_empty(x.shape) for x in (q, k, v)]
    single = [q.new_empty(size, dtype=torch.float32) for size in (shape, shape[:-1])]
    return like[0], like[1], like[2], single[0], single[1]


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    q, k, v, M, _, mask, cu_seqlens, *options = inputs
    out, _, _, den, states_M, states_z = output
    ctx.save_for_backward(q, k, v, mask, cu_seqlens, out, den, states_M, states_z)
    ctx.options, ctx.has_initial = options, M is not None
    ctx.set_materialize_grads(False)


def _gradients(
    ctx: Any, dout: Tensor | None, dM: Tensor | None, dz: Tensor | None, *_: Tensor | None
) -> tuple[Tensor | None, ...]:
    q, k, v, mask, cu_seqlens, out, den, states_M, states_z = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout
    if dM is not None or dz is not None:
        states = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        shape = (states, *states_M.shape[1:])
        dM = states_z.new_zeros(shape) if dM is None else dM
        dz = states_z.new_zeros(shape[:-1]) if dz is None else dz
    dq, dk, dv, initial_M, initial_z = backward(
        q, k, v, mask, cu_seqlens, out, den, states_M, states_z, dout, dM, dz, *ctx.options
    )
    initial = (initial_M, initial_z) if ctx.has_initial else (None, None)
    return (dq, dk, dv, *initial, *[None] * 7)


forward.register_autograd(_gradients, setup_context=_save)


@torch.library.custom_op("layer_replace::linear_attention_step", mutates_args=())
def step(
    q: Tensor, k: Tensor, v: Tensor, M: Tensor, z: Tensor, mask: Tensor | None, normalize: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As `fused.step`, of tensors with any strides; without gradients."""
    q, k, v, M, z, mask = (None if x is None else x.contiguous() for x in (q, k, v, M, z, mask))  # type: ignore[assignment]
    with torch.cuda.device_of(q):
        return fused.step(q, k, v, M, z, mask, normalize, eps)


@step.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, M: Tensor, z: Tensor, mask: Tensor | None, normalize: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return v.new_empty(q.shape[0], q.shape[1], v.shape[2]), M.new_empty(M.shape), z.new_empty(z.shape)
