"""The public operators: arguments are checked here, then one of the forms runs."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from kernels.arguments import (
    Sizes,
    check_borders,
    check_choice,
    check_mask,
    check_one_token,
    check_qkv,
    check_real,
    check_state,
    state_dtype,
)
from kernels.dispatch import choose
from kernels.linear_attention import chunk, reference
from kernels.linear_attention.state import EMPTY, LinearState
from kernels.numerics import wide, without_autocast

PRECISIONS = (None, "ieee", "tf32", "tf32x3")

LARGEST = 1024
"""F and D beyond this have no Triton kernel."""


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    initial_state: LinearState | tuple[Tensor, Tensor] | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    normalize: bool = True,
    eps: float = EMPTY,
    backend: str = "auto",
    input_precision: str | None = None,
) -> tuple[Tensor, LinearState]:
    """Causal linear attention (Katharopoulos et al. 2020) of feature-mapped queries and keys.

        M_t = M_{t-1} + k_t^T v_t,   z_t = z_{t-1} + k_t,   out_t = q_t M_t / max(q_t . z_t, eps)

    in O(T) time and memory. Sums are fp32 (fp64 for fp64 inputs); gradients reach q, k, v and the initial
    state.

    Args:
        q: `[B, T, H, F]`, phi(q), scaled as the caller wants it; fp16, bf16, fp32 or fp64.
        k: `[B, T, G, F]`, phi(k); G divides H, and head h uses group h // (H / G).
        v: `[B, T, G, D]`.
        initial_state: M `[B, G, F, D]` and z `[B, G, F]` of earlier tokens, sums in fp32 (fp64 for fp64
            inputs); None for an empty one.
        mask: `[B, T]` bool, False where a token is not written, whatever its k and v hold, NaN included; what
            it reads is computed all the same. A token that is written has to be finite: it may spoil those
            before it in its chunk.
        cu_seqlens: `[N + 1]` int32 or int64, where the N sequences packed into one row (B = 1) begin and end;
            states then have N in the place of B. Its values are read once a tensor, which on a GPU waits; the
            chunked form under torch.compile does not read them.
        normalize: False gives out_t = q_t M_t.
        eps: the smallest divisor. Where q_t . z_t is below 1e-9 nothing is held, and out_t is 0.
        backend: "auto", "triton", "chunk", "reference" or "fla".
        input_precision: how Triton multiplies fp32 numbers: "ieee", "tf32" or "tf32x3"; by default "ieee" for
            fp32 inputs.

    Returns:
        out `[B, T, H, D]` in v's dtype, and the state after the last token.

    Raises:
        ValueError: an argument of a wrong shape, dtype or device, or a backend that cannot run this.
    """
    sizes = check_qkv(q, k, v, cu_seqlens)
    check_mask(mask, q, (sizes.batch, sizes.length))
    check_choice("input_precision", input_precision, PRECISIONS)
    check_real("eps", eps, zero=True)
    initial = _given("initial_state", initial_state, sizes, q)
    chosen = choose("linear_attention", backend, q.device, q.dtype, _too_large(sizes))
    if chosen == "triton":
        return _triton(q, k, v, initial, mask, cu_seqlens, normalize, eps, input_precision)
    if cu_seqlens is not None and not torch.compiler.is_compiling():
        check_borders(cu_seqlens, sizes.length)
    if chosen == "fla":
        from kernels.linear_attention import fla

        return fla.linear_attention(q, k, v, initial, mask, cu_seqlens, normalize, eps)
    form = reference.linear_attention if chosen == "reference" else chunk.linear_attention
    held = initial or _empty(sizes, q)
    return _full(q, partial(form, q, k, v, held, mask, cu_seqlens, normalize, eps))


def linear_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: LinearState | tuple[Tensor, Tensor] | None = None,
    *,
    mask: Tensor | None = None,
    normalize: bool = True,
    eps: float = EMPTY,
    backend: str = "auto",
) -> tuple[Tensor, LinearState]:
    """One more token of `linear_attention`, in constant time and memory; `state` itself stays as it is.

    Args:
        q: `[B, H, F]`; k: `[B, G, F]`; v: `[B, G, D]`.
        state: of the tokens before, None for none.
        mask: `[B]` bool, False where the token is not written.
        normalize, eps, backend: as in `linear_attention`, without "fla". The Triton form has no gradients.

    Returns:
        out `[B, H, D]` in v's dtype, and the state with the token.

    Raises:
        ValueError: as `linear_attention`.
    """
    sizes = check_one_token(q, k, v)
    check_mask(mask, q, (sizes.batch,))
    check_real("eps", eps, zero=True)
    held = _given("state", state, sizes, q) or _empty(sizes, q)
    if backend == "fla":
        raise ValueError("backend='fla' is not possible for linear_attention_step: it has no such operator.")
    refusal = _too_large(sizes)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, *held)):
        refusal = "a gradient is asked for, and the Triton step has none"
    chosen = choose("linear_attention_step", backend, q.device, q.dtype, refusal)
    if chosen == "triton":
        from kernels.linear_attention import library

        out, M, z = library.step(q, k, v, held.M, held.z, mask, normalize, eps)
        return out, LinearState(M, z)
    form = reference.step if chosen == "reference" else chunk.step
    out, after = _full(q, partial(form, wide(q), wide(k), wide(v), held, mask, normalize, eps))
    return out.to(v.dtype), after


def _triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    initial: LinearState | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    normalize: bool,
    eps: float,
    precision: str | None,
    block: int = 0,
    segments: int = 0,
) -> tuple[Tensor, LinearState]:
    """The fused form; `block` and `segments` as in `fused.plan`."""
    from kernels.linear_attention import fused, library  # only here: Triton is imported when it is used

    precision = precision or fused.default_precision(q)
    M, z = (None, None) if initial is None else initial
    out, *after = library.forward(
        q, k, v, M, z, mask, cu_seqlens, normalize, eps, precision, block, segments
    )[:3]
    return out, LinearState(*after)


def _full(q: Tensor, form: Any) -> tuple[Tensor, LinearState]:
    """Run `form` with autocast off."""
    with without_autocast(q.device):
        return form()


def _too_large(sizes: Sizes) -> str | None:
    large = sizes.features > LARGEST or sizes.width > LARGEST
    return f"F or D is above {LARGEST}" if large else None


def _given(
    name: str, state: LinearState | tuple[Tensor, Tensor] | None, sizes: Sizes, q: Tensor
) -> LinearState | None:
    if state is None:
        return None
    if not isinstance(state, tuple) or len(state) != 2:
        raise ValueError(f"{name} is a {type(state).__name__}; expected LinearState(M, z) or None.")
    M, z = state
    letter = "N" if sizes.states != sizes.batch else "B"
    check_state(f"{name}.M", M, f"{letter}, G, F, D", sizes.state(sizes.features, sizes.width), q)
    check_state(f"{name}.z", z, f"{letter}, G, F", sizes.state(sizes.features), q)
    return LinearState(M, z)


def _empty(sizes: Sizes, q: Tensor) -> LinearState:
    return LinearState.empty(
        sizes.states, sizes.groups, sizes.features, sizes.width, q.device, state_dtype(q)
    )
