"""The public operators: arguments are checked here, then one of the forms runs."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from kernels.arguments import (
    FLOATS,
    Sizes,
    check_borders,
    check_choice,
    check_mask,
    check_number,
    check_qkv,
    check_real,
    check_state,
    expect,
    state_dtype,
)
from kernels.dispatch import FORCED, choose
from kernels.infini_memory import chunk, reference
from kernels.infini_memory.state import InfiniCounters, InfiniState
from kernels.linear_attention.op import LARGEST, PRECISIONS
from kernels.numerics import wide, without_autocast
from kernels.packing import Rows

State = InfiniState | tuple[Tensor, Tensor, Tensor]
Result = tuple[Tensor, InfiniState, InfiniCounters]


def infini_memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    local: Tensor,
    gate: Tensor,
    *,
    block: int,
    lookback: int = 0,
    write_gate: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    initial_state: State | None = None,
    clamp: float = 1e4,
    backend: str = "auto",
    input_precision: str | None = None,
) -> Result:
    """The memory of Infini-attention (Munkhdalai et al. 2024), joined with a local attention's output.

        A_t = q_t M / (q_t . z),   out_t = g A_t + (1 - g) local_t

    with M and z the running means of w k^T v and w k, w the write gate, over the blocks of S tokens at least
    L + 1 before the token's own; out_t = local_t while they hold nothing. A block is read before it is
    written. Sums are fp32 (fp64 for fp64 inputs). Gradients reach everything but n, which is in a read's
    numerator and denominator alike.

    Entries of a block's mean update are held to `clamp`, M and z scaled down together. Tokens whose key,
    value or write gate is not finite, or is 1e15 or more, are left out of M, z and n of their row and head.
    Both are counted on the device.

    Args:
        q: `[B, T, H, F]`, phi(q); fp16, bf16, fp32 or fp64.
        k: `[B, T, G, F]`, phi(k); G divides H, and head h uses group h // (H / G).
        v: `[B, T, G, D]`.
        local: `[B, T, H, D]`, what the attention over the query's own and the L blocks before answers.
        gate: `[B, T, H]` or `[H]`, 0 to 1, the share of the memory; fp32 (fp64 for fp64 inputs), or as q.
        block: S; blocks begin at multiples of S.
        lookback: L.
        write_gate: `[B, T, G]`, 0 or more, the weight of each token, of gate's dtypes; None for ones.
        mask: `[B, T]` bool, False where a token is not written, whatever it holds.
        cu_seqlens: `[N + 1]` int32 or int64, where the N sequences packed into one row (B = 1) begin and end;
            states and counters then have N in the place of B, and blocks begin anew. Each sequence is laid
            into a row of its own, beside others of like length: memory and work of less than 2 T tokens. Its
            values are read once a tensor, which on a GPU waits; under torch.compile, and where a CUDA graph
            is captured before they were read, they are not, and each of the N rows takes T tokens.
        initial_state: of earlier calls; None for an empty one.
        clamp: above 0.
        backend: "auto", "triton", "chunk" or "reference".
        input_precision: how Triton multiplies fp32 numbers: "ieee", "tf32" or "tf32x3"; by default "ieee" for
            fp32 inputs.

    Returns:
        out `[B, T, H, D]` in v's dtype; the state, which holds the first T // S - L blocks of this call, T of
        each packed sequence its own; and the counters. To go on, give this state and begin with the first
        token that it does not hold: the outputs of those given twice are the local ones' and of no use.

    Raises:
        ValueError: an argument of a wrong shape, dtype, device or value, or a backend that cannot run this.
    """
    sizes = check_qkv(q, k, v, cu_seqlens)
    head = (sizes.batch, sizes.length, sizes.heads)
    expect("local", local, "B, T, H, D", (*head, sizes.width), (q.dtype,), q.device)
    _check_gate(gate, head, q)
    if write_gate is not None:
        shape = (sizes.batch, sizes.length, sizes.groups)
        expect("write_gate", write_gate, "B, T, G", shape, (q.dtype, state_dtype(q)), q.device)
    check_mask(mask, q, (sizes.batch, sizes.length))
    check_choice("input_precision", input_precision, PRECISIONS)
    check_number("block", block, 1)
    check_number("lookback", lookback, 0)
    check_real("clamp", clamp)
    initial = None if initial_state is None else _given("initial_state", initial_state, sizes, q)
    check_choice("backend", backend, FORCED)
    chosen = choose("infini_memory", backend, q.device, q.dtype, refusal(sizes.features, sizes.width))
    run = partial(_run, chosen, block, lookback, clamp, input_precision)
    if cu_seqlens is None:
        return run(q, k, v, local, gate, write_gate, mask, initial)
    borders = None if torch.compiler.is_compiling() else check_borders(cu_seqlens, sizes.length)
    rows = Rows.of(cu_seqlens, borders, sizes.length)
    mask = _leaving(rows, mask, block, lookback)
    return _in_rows(run, rows, q, k, v, local, gate, write_gate, mask, initial)


def infini_memory_step(
    q: Tensor, local: Tensor, gate: Tensor, state: State, *, backend: str = "auto"
) -> Tensor:
    """What one more token reads, in constant time and memory: `out_t` of `infini_memory`.

    A token writes nothing by itself. When a block of S has gone by and L blocks after it, `infini_memory`
    over that block, with L = 0 and this state, gives the next one.

    Args:
        q: `[B, H, F]`; local: `[B, H, D]`; gate: `[B, H]` or `[H]`.
        state: the blocks that have left; M `[B, G, F, D]`, G divides H.
        backend: as in `infini_memory`. The Triton form has no gradients.

    Returns:
        `[B, H, D]` in local's dtype.

    Raises:
        ValueError: as `infini_memory`.
    """
    if not isinstance(q, Tensor):
        raise ValueError(f"q is a {type(q).__name__}; expected a tensor [B, H, F].")
    expect("q", q, "B, H, F", (None,) * 3, FLOATS, q.device)
    batch, heads, features = q.shape
    expect("local", local, "B, H, D", (batch, heads, None), (q.dtype,), q.device)
    _check_gate(gate, (batch, heads), q)
    groups = _groups("state", state, heads)
    sizes = Sizes(batch, 1, heads, groups, features, local.shape[2], batch)
    held = _given("state", state, sizes, q)
    no = refusal(features, local.shape[2])
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, local, gate, held.M, held.z)):
        no = "a gradient is asked for, and the Triton step has none"
    check_choice("backend", backend, FORCED)
    chosen = choose("infini_memory_step", backend, q.device, q.dtype, no)
    if chosen == "triton":
        from kernels.infini_memory import library

        return library.step(q, local, gate, held.M, held.z)
    form = reference.step if chosen == "reference" else chunk.step
    with without_autocast(q.device):
        return form(wide(q), wide(local), gate, held).to(local.dtype)


def refusal(features: int, width: int) -> str | None:
    """Why keys and values of these sizes have no Triton kernel, or None where they have."""
    return f"F or D is above {LARGEST}" if max(features, width) > LARGEST else None


def _run(
    chosen: str,
    block: int,
    lookback: int,
    clamp: float,
    precision: str | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    local: Tensor,
    gate: Tensor,
    write_gate: Tensor | None,
    mask: Tensor | None,
    initial: InfiniState | None,
) -> Result:
    """One sequence a row, in the form chosen."""
    if chosen == "triton":
        options = (block, lookback, clamp, precision)
        return _triton(q, k, v, local, gate, write_gate, mask, initial, *options)
    if initial is None:
        sizes = (q.shape[0], k.shape[2], k.shape[3], v.shape[3])
        initial = InfiniState.empty(*sizes, q.device, state_dtype(q))
    form = reference.infini_memory if chosen == "reference" else chunk.infini_memory
    with without_autocast(q.device):
        out, (M, z, n), counters = form(
            q, k, v, local, gate, write_gate, mask, initial, block, lookback, clamp
        )
    return out, InfiniState(M, z, n.detach()), counters


def _leaving(rows: Rows, mask: Tensor | None, block: int, lookback: int) -> Tensor:
    """`[1, T]` bool, the tokens that packed sequences write: of each its own whole blocks but the last L.

    The others have to be masked: in a row beside longer ones a short sequence's last block is filled up with
    pads, and pads follow it as whole blocks, so that it would be written.
    """
    length = len(rows.place)
    block, lookback = min(block, length + 1), min(lookback, length)  # more changes nothing, and may not fit
    whole = (rows.lengths // block - lookback).clamp_min(0)
    leaving = (rows.place < whole * block).unsqueeze(0)
    return leaving if mask is None else leaving & mask


def _in_rows(
    run: Callable[..., Result],
    rows: Rows,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    local: Tensor,
    gate: Tensor,
    write_gate: Tensor | None,
    mask: Tensor,
    initial: InfiniState | None,
) -> Result:
    """Packed sequences, each in a row of its own; what pads read is dropped."""
    count = len(rows.shapes)
    given: list = [rows.lay(x) for x in (q, k, v, local)]
    given.append([gate] * count if gate.dim() == 1 else rows.lay(gate))
    given.append([None] * count if write_gate is None else rows.lay(write_gate))
    given.append(rows.lay(mask))
    held: list = [None] * count
    if initial is not None:
        held = [InfiniState(*parts) for parts in zip(*map(rows.split, initial), strict=True)]
    outs, states, counters = zip(*(run(*some) for some in zip(*given, held, strict=True)), strict=True)
    return (
        rows.tokens(outs),
        InfiniState(*map(rows.join, zip(*states, strict=True))),
        InfiniCounters(*map(rows.join, zip(*counters, strict=True))),
    )


def _triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    local: Tensor,
    gate: Tensor,
    write_gate: Tensor | None,
    mask: Tensor | None,
    initial: InfiniState | None,
    block: int,
    lookback: int,
    clamp: float,
    precision: str | None = None,
    width: int = 0,
    segments: int = 0,
) -> Result:
    """The fused form; `width` and `segments` as in `fused.forward`."""
    from kernels.infini_memory import fused, library  # only here: Triton is imported when it is used
    from kernels.linear_attention.fused import default_precision

    M, z, n = (None, None, None) if initial is None else initial
    options = (block, lookback, float(clamp), precision or default_precision(q), width, segments)
    made = fused.Forward(*library.forward(q, k, v, local, gate, write_gate, mask, M, z, n, *options))
    counters = InfiniCounters(made.limited.sum(1), made.lost.sum(1))
    return made.out, InfiniState(made.M, made.z, made.totals[:, -1].detach()), counters


def _check_gate(gate: Tensor, shape: tuple[int, ...], q: Tensor) -> None:
    """gate `shape` or `[H]`."""
    letters = "B, T, H" if len(shape) == 3 else "B, H"
    if isinstance(gate, Tensor) and gate.dim() == 1:
        letters, shape = "H", shape[-1:]
    expect("gate", gate, letters, shape, (q.dtype, state_dtype(q)), q.device)


def _groups(name: str, state: object, heads: int) -> int:
    """G, which has to divide H."""
    M = state[0] if isinstance(state, tuple) and len(state) == 3 else None
    if not isinstance(M, Tensor) or M.dim() != 4:
        raise ValueError(
            f"{name} is a {type(state).__name__}; expected InfiniState(M, z, n), M [B, G, F, D]."
        )
    groups = int(M.shape[1])
    if groups == 0 or heads % groups:
        raise ValueError(
            f"{name}.M has shape {list(M.shape)}; expected [B, G, F, D] with G a divisor of H = {heads}."
        )
    return groups


def _given(name: str, state: State, sizes: Sizes, q: Tensor) -> InfiniState:
    if not isinstance(state, tuple) or len(state) != 3:
        raise ValueError(f"{name} is a {type(state).__name__}; expected InfiniState(M, z, n) or None.")
    held = InfiniState(*state)
    check_memory(name, held, sizes, q)
    return held


def check_memory(name: str, state: InfiniState, sizes: Sizes, q: Tensor) -> None:
    """The three tensors of a state.

    Raises:
        ValueError: as `expect`.
    """
    letter = "N" if sizes.states != sizes.batch else "B"
    check_state(f"{name}.M", state.M, f"{letter}, G, F, D", sizes.state(sizes.features, sizes.width), q)
    check_state(f"{name}.z", state.z, f"{letter}, G, F", sizes.state(sizes.features), q)
    counts = (torch.float64, torch.int64, *([torch.float32] if q.device.type == "mps" else []))
    expect(f"{name}.n", state.n, f"{letter}, G", sizes.state(), counts, q.device)
