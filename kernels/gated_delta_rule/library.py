"""The fused kernels as torch.library operators: what torch.compile sees, and how gradients reach them."""

from typing import Any

import torch
from torch import Tensor

from kernels.arguments import check_borders
from kernels.gated_delta_rule import fused


@torch.library.custom_op("layer_replace::gated_delta_rule", mutates_args=())
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
    """As `fused.forward`, of tensors with any strides."""
    if cu_seqlens is not None:
        check_borders(cu_seqlens, q.shape[1])
    q, k, v, beta, log_decay, initial, mask = (  # type: ignore[assignment]
        None if x is None else x.contiguous() for x in (q, k, v, beta, log_decay, initial, mask)
    )
    with torch.cuda.device_of(q):
        return fused.forward(
            q, k, v, beta, log_decay, initial, mask, cu_seqlens, scaled, precision, size, block
        )


@forward.register_fake
def _(
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
    (batch, length, heads, features), (groups, width) = q.shape, v.shape[2:]
    states = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    size = size or fused.choose_size(q)
    chunks = fused.count_chunks(length, batch, states, cu_seqlens is not None, size)
    stored, single = fused.stored_dtype(q), torch.float32
    return (
        v.new_empty(batch, length, heads, width),
        q.new_empty(states, groups, features, width, dtype=single),
        q.new_empty(batch, length, groups, width, dtype=stored),
        q.new_empty(batch, length, groups, features, dtype=stored),
        q.new_empty(batch, length, groups, size, dtype=stored),
        q.new_empty(3, batch, length, groups, dtype=single),
        q.new_empty(chunks, groups, features, width, dtype=stored),
    )


@torch.library.custom_op("layer_replace::gated_delta_rule_backward", mutates_args=())
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
    """As `fused.backward`, of tensors with any strides."""
    q, k, beta, log_decay, mask, dout, dfinal = (  # type: ignore[assignment]
        None if x is None else x.contiguous() for x in (q, k, beta, log_decay, mask, dout, dfinal)
    )
    with torch.cuda.device_of(q):
        return fused.backward(
            q, k, beta, log_decay, mask, cu_seqlens, y, w, inverse, numbers, states, dout, dfinal,
            scaled, precision, size, block,
        )  # fmt: skip


@backward.register_fake
def _(
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
    count = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    decay = q.new_empty(0, dtype=torch.float32) if log_decay is None else log_decay.new_empty(log_decay.shape)
    return (
        q.new_empty(q.shape),
        k.new_empty(k.shape),
        q.new_empty(y.shape),
        beta.new_empty(beta.shape),
        decay,
        q.new_empty(count, *states.shape[1:], dtype=torch.float32),
    )


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    q, k, _, beta, log_decay, initial, mask, cu_seqlens, *options = inputs
    ctx.save_for_backward(q, k, beta, log_decay, mask, cu_seqlens, *output[2:])
    ctx.options, ctx.has_initial = options, initial is not None
    ctx.set_materialize_grads(False)


def _gradients(
    ctx: Any, dout: Tensor | None, dfinal: Tensor | None, *_: Tensor | None
) -> tuple[Tensor | None, ...]:
    q, k, beta, log_decay, mask, cu_seqlens, y, *rest = ctx.saved_tensors
    if dout is None:
        dout = q.new_zeros(*q.shape[:3], y.shape[3])
    *found, decay, initial = backward(
        q, k, beta, log_decay, mask, cu_seqlens, y, *rest, dout, dfinal, *ctx.options
    )
    return (
        *found,
        None if log_decay is None else decay,
        initial if ctx.has_initial else None,
        *[None] * 6,
    )


forward.register_autograd(_gradients, setup_context=_save)


@torch.library.custom_op("layer_replace::gated_delta_rule_step", mutates_args=())
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
    """As `fused.step`, of tensors with any strides; without gradients."""
    q, k, v, beta, log_decay, state, mask = (  # type: ignore[assignment]
        None if x is None else x.contiguous() for x in (q, k, v, beta, log_decay, state, mask)
    )
    with torch.cuda.device_of(q):
        return fused.step(q, k, v, beta, log_decay, state, mask, scaled)


@step.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    mask: Tensor | None,
    scaled: bool,
) -> tuple[Tensor, Tensor]:
    return v.new_empty(q.shape[0], q.shape[1], v.shape[2]), state.new_empty(state.shape)
