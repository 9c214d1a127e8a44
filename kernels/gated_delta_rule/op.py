"""The public operators: arguments are checked here, then one of the forms runs."""

import torch
from torch import Tensor

from kernels.arguments import (
    Sizes,
    check_borders,
    check_choice,
    check_mask,
    check_one_token,
    check_qkv,
    check_state,
    expect,
    state_dtype,
)
from kernels.dispatch import choose
from kernels.gated_delta_rule import chunk, reference
from kernels.linear_attention.op import PRECISIONS
from kernels.numerics import wide, without_autocast

LARGEST_F, LARGEST_D = 256, 1024
"""F and D beyond these have no Triton kernel: one program holds all of F."""


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scaled: bool = True,
    backend: str = "auto",
    input_precision: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The gated delta rule (Yang et al. 2024) with a step that keys of no size can upset.

        S <- exp(log_decay_t) S;   S <- S + b_t k_t (v_t - k_t S)^T;   out_t = q_t S
        b_t = beta_t / (|k_t|^2 (1 + 1e-6) + 1e-4)

    in O(T) time and memory. b_t has the transition of unit-norm keys and leaves their size in what is read.
    The state is fp32 (fp64 for fp64 inputs); gradients reach q, k, v, beta, log_decay and the initial state.

    Args:
        q: `[B, T, H, F]`, scaled as the caller wants it; fp16, bf16, fp32 or fp64.
        k: `[B, T, G, F]`; G divides H, and head h uses group h // (H / G).
        v: `[B, T, G, D]`.
        beta: `[B, T, G]` from 0 to 1, the share of the old answer to k_t that is replaced; in q's dtype or
            fp32.
        log_decay: `[B, T, G]` <= 0, in q's dtype or fp32; None is the plain delta rule (Schlag et al. 2021).
        initial_state: `[B, G, F, D]` fp32 (fp64 for fp64 inputs); None for zeros.
        mask: `[B, T]` bool, False where a token neither writes nor decays, whatever its k, v, beta and
            log_decay hold, NaN included; what it reads is computed all the same. A token that is written has
            to be finite: it may spoil those before it in its chunk.
        cu_seqlens: `[N + 1]` int32 or int64, where the N sequences packed into one row (B = 1) begin and end;
            states then have N in the place of B. Its values are read once a tensor, which on a GPU waits; the
            chunked form under torch.compile does not read them.
        scaled: False takes b_t = beta_t, for keys whose length is known to be 1.
        backend: "auto", "triton", "chunk", "reference" or "fla".
        input_precision: how Triton multiplies fp32 numbers: "ieee", "tf32" or "tf32x3"; by default "ieee" for
            fp32 inputs.

    Returns:
        out `[B, T, H, D]` in v's dtype, and the state after the last token `[B, G, F, D]`.

    Raises:
        ValueError: an argument of a wrong shape, dtype or device, or a backend that cannot run this.
    """
    sizes = check_qkv(q, k, v, cu_seqlens)
    _check_gates(beta, log_decay, "B, T, G", (sizes.batch, sizes.length, sizes.groups), q)
    check_mask(mask, q, (sizes.batch, sizes.length))
    check_choice("input_precision", input_precision, PRECISIONS)
    _check_state("initial_state", initial_state, sizes, q)
    no = refusal(sizes.features, sizes.width)
    chosen = choose("gated_delta_rule", backend, q.device, q.dtype, no)
    if chosen == "triton":
        return _triton(
            q, k, v, beta, log_decay, initial_state, mask, cu_seqlens, scaled, precision=input_precision
        )
    if cu_seqlens is not None and not torch.compiler.is_compiling():
        check_borders(cu_seqlens, sizes.length)
    if chosen == "fla":
        from kernels.gated_delta_rule import fla

        return fla.gated_delta_rule(q, k, v, beta, log_decay, initial_state, mask, cu_seqlens, scaled)
    form = reference.gated_delta_rule if chosen == "reference" else chunk.gated_delta_rule
    with without_autocast(q.device):
        out, state = form(q, k, v, beta, log_decay, initial_state, mask, cu_seqlens, scaled)
    return out.to(v.dtype), state


def gated_delta_rule_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None = None,
    state: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    scaled: bool = True,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """One more token of `gated_delta_rule`, in constant time and memory; `state` itself stays as it is.

    Args:
        q: `[B, H, F]`; k: `[B, G, F]`; v: `[B, G, D]`; beta, log_decay: `[B, G]`.
        state: `[B, G, F, D]` of the tokens before, None for none.
        mask: `[B]` bool, False where the token neither writes nor decays.
        scaled, backend: as in `gated_delta_rule`, without "fla". The Triton form has no gradients.

    Returns:
        out `[B, H, D]` in v's dtype, and the state with the token.

    Raises:
        ValueError: as `gated_delta_rule`.
    """
    sizes = check_one_token(q, k, v)
    _check_gates(beta, log_decay, "B, G", (sizes.batch, sizes.groups), q)
    check_mask(mask, q, (sizes.batch,))
    _check_state("state", state, sizes, q)
    if backend == "fla":
        raise ValueError("backend='fla' is not possible for gated_delta_rule_step: it has no such operator.")
    if state is None:
        shape = sizes.state(sizes.features, sizes.width)
        state = torch.zeros(shape, device=q.device, dtype=state_dtype(q))
    no = refusal(sizes.features, sizes.width)
    given = [x for x in (q, k, v, beta, log_decay, state) if x is not None]
    if torch.is_grad_enabled() and any(x.requires_grad for x in given):
        no = "a gradient is asked for, and the Triton step has none"
    chosen = choose("gated_delta_rule_step", backend, q.device, q.dtype, no)
    if chosen == "triton":
        from kernels.gated_delta_rule import library

        return library.step(q, k, v, beta, log_decay, state, mask, scaled)
    form = reference.step if chosen == "reference" else chunk.step
    decay = None if log_decay is None else wide(log_decay)
    seen = None if mask is None else mask.unsqueeze(-1)
    with without_autocast(q.device):
        out, after = form(wide(q), wide(k), wide(v), wide(beta), decay, state, seen, scaled)
    return out.to(v.dtype), after


def _triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    scaled: bool,
    precision: str | None,
    size: int = 0,
    block: int = 0,
) -> tuple[Tensor, Tensor]:
    """The fused form; `size` and `block` as in `fused.plan`."""
    from kernels.gated_delta_rule import fused, library  # only here: Triton is imported when it is used

    precision = precision or fused.default_precision(q)
    return library.forward(
        q, k, v, beta, log_decay, initial_state, mask, cu_seqlens, scaled, precision, size, block
    )[:2]


def refusal(features: int, width: int) -> str | None:
    """Why keys and values of these sizes have no Triton kernel, or None where they have."""
    if features > LARGEST_F or width > LARGEST_D:
        return f"F is above {LARGEST_F} or D above {LARGEST_D}"
    return None


def _check_gates(
    beta: Tensor, log_decay: Tensor | None, letters: str, shape: tuple[int, ...], q: Tensor
) -> None:
    dtypes = (q.dtype,) if q.dtype == state_dtype(q) else (q.dtype, state_dtype(q))
    expect("beta", beta, letters, shape, dtypes, q.device)
    if log_decay is not None:
        expect("log_decay", log_decay, letters, shape, dtypes, q.device)


def _check_state(name: str, state: Tensor | None, sizes: Sizes, q: Tensor) -> None:
    if state is not None:
        letter = "N" if sizes.states != sizes.batch else "B"
        check_state(name, state, f"{letter}, G, F, D", sizes.state(sizes.features, sizes.width), q)
