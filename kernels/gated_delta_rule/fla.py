"""The gated delta rule by flash-linear-attention's chunked kernels, where installed: to compare with."""

import importlib
from typing import Any

import torch
from torch import Tensor

from kernels.dispatch import fla_refusal
from kernels.gated_delta_rule.chunk import scaled_step
from kernels.numerics import wide

GATED = ("fla.ops.gated_delta_rule", "chunk_gated_delta_rule")
PLAIN = ("fla.ops.delta_rule", "chunk_delta_rule")


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    initial: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    scaled: bool,
) -> tuple[Tensor, Tensor]:
    """`kernels.gated_delta_rule`: `chunk_gated_delta_rule`, or `chunk_delta_rule` where there is no decay.

    That library is meant for keys of length 1; a scaled step is handed to it as its beta.

    Raises:
        ValueError: it is not installed, has no such function, or cannot run this.
    """
    module, name = PLAIN if log_decay is None else GATED
    refusal = fla_refusal(module, name, q.device)
    if q.shape[2] != k.shape[2]:
        refusal = f"it shares no keys among heads, and q has {q.shape[2]} where k has {k.shape[2]}"
    if q.dtype not in {torch.float16, torch.bfloat16}:
        refusal = f"it takes fp16 and bf16, not {q.dtype}"
    if refusal is not None:
        raise ValueError(f"backend='fla' is not possible for gated_delta_rule: {refusal}.")
    if mask is not None:
        k, v = (torch.where(mask[:, :, None, None], x, 0) for x in (k, v))
        beta = torch.where(mask[:, :, None], beta, 0)
        log_decay = None if log_decay is None else torch.where(mask[:, :, None], log_decay, 0)
    share = scaled_step(wide(k), wide(beta)) if scaled else beta
    given: dict[str, Any] = {"scale": 1.0, "initial_state": initial, "output_final_state": True}
    given["cu_seqlens"] = None if cu_seqlens is None else cu_seqlens.long()
    if log_decay is not None:
        given["g"] = log_decay
    return getattr(importlib.import_module(module), name)(q, k, v, beta=share, **given)
