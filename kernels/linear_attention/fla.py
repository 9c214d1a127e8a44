"""Linear attention by flash-linear-attention's `chunk_linear_attn`, where installed: to compare with."""

import importlib

import torch
from torch import Tensor

from kernels.dispatch import fla_refusal
from kernels.linear_attention.state import LinearState, divide

MODULE, NAME = "fla.ops.linear_attn", "chunk_linear_attn"


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    initial: LinearState | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    normalize: bool,
    eps: float,
) -> tuple[Tensor, LinearState]:
    """`kernels.linear_attention`, of which that library has the sums M; z and the division are PyTorch's.

    Raises:
        ValueError: it is not installed, has no such function, or cannot run this.
    """
    refusal = fla_refusal(MODULE, NAME, q.device)
    if q.shape[2] != k.shape[2]:
        refusal = f"it has no grouped heads, and q has {q.shape[2]} where k has {k.shape[2]}"
    if cu_seqlens is not None:
        refusal = "its linear attention takes no cu_seqlens"
    if refusal is not None:
        raise ValueError(f"backend='fla' is not possible for linear_attention: {refusal}.")
    if mask is not None:
        k, v = (torch.where(mask[:, :, None, None], x, 0) for x in (k, v))
    run = getattr(importlib.import_module(MODULE), NAME)
    M = None if initial is None else initial.M
    out, M = run(q, k, v, scale=1.0, initial_state=M, output_final_state=True, normalize=False)
    z = k.float().cumsum(1)
    if initial is not None:
        z = z + initial.z.unsqueeze(1)
    if normalize:
        out = divide(out.float(), (q.float() * z).sum(-1), eps).to(v.dtype)
    return out, LinearState(M, z[:, -1])
