"""The public operators: arguments are checked here, then one of the forms runs."""

from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import pad

from kernels.arguments import (
    FLOATS,
    Sizes,
    check_borders,
    check_choice,
    check_groups,
    check_mask,
    check_number,
    check_qkv,
    check_real,
    expect,
    state_dtype,
)
from kernels.dispatch import FORCED, choose
from kernels.infini_memory.op import check_memory
from kernels.infini_memory.state import InfiniCounters, InfiniState, written_blocks
from kernels.linear_attention.op import LARGEST, PRECISIONS
from kernels.numerics import wide, without_autocast
from kernels.window_linear_attention import chunk, reference
from kernels.window_linear_attention.state import Sinks, WindowLinearState


def window_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    phi_q: Tensor,
    phi_k: Tensor,
    *,
    block: int,
    window: int,
    sinks: int = 0,
    scale: float | None = None,
    write_gate: Tensor | None = None,
    extra: tuple[Tensor, Tensor] | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    initial_state: WindowLinearState | None = None,
    clamp: float = 1e4,
    backend: str = "auto",
    input_precision: str | None = None,
) -> tuple[Tensor, WindowLinearState, InfiniCounters]:
    """Softmax over window and sinks and linear attention to the rest, one denominator (Zhang et al. 2024).

        out_t = (sum_{i in E} e^{s_ti} v_i + phi(q_t) M + e^m a) / (sum_{i in E} e^{s_ti} + phi(q_t).z + e^m)

    with s_ti = scale q_t.k_i. E are the keys of the query's own block of S tokens up to itself, of the
    `window` tokens before that block, and the first `sinks` tokens of the sequence. M and z are the sums of
    w phi(k)^T v and w phi(k) over the blocks before those, without the sinks: every token is in one place. In
    O(T) time and memory. Sums and softmax are fp32 (fp64 for fp64 inputs). Gradients reach everything but n.

    The mean update of a block is guarded as in `infini_memory`: its entries are held to `clamp`, M and z
    scaled down together, and tokens whose phi(k), v or write gate is not finite, or is 1e15 or more, are left
    out of M, z and n of their row and head; both are counted on the device. A query whose window holds a key
    or value that is not finite answers NaN; as a sink such a token is left out. Tokens before it are not
    touched by it.

    Args:
        q: `[B, T, H, K]`, with their position; fp16, bf16, fp32 or fp64.
        k: `[B, T, G, K]`; G divides H, and head h uses group h // (H / G).
        v: `[B, T, G, D]`.
        phi_q: `[B, T, H, F]`, 0 or more. Its size is part of the mix: phi(q).phi(k) weighs as e^s does.
        phi_k: `[B, T, G, F]`, 0 or more.
        block: S; blocks begin at multiples of S.
        window: a multiple of S, or 0.
        sinks: at most S.
        scale: None for 1 / sqrt(K).
        write_gate: `[B, T, G]`, 0 or more, the weight w of each token in M and z, in q's dtype or fp32 (fp64
            for fp64 inputs); None for ones.
        extra: a `[B, T, H, D]` and m `[B, T, H]`, what softmax over some other keys answers and the logarithm
            of its denominator, -inf where there is none; of write_gate's dtypes.
        mask: `[B, T]` bool, False where a token is neither seen nor written, whatever it holds, NaN included;
            what it reads is computed all the same, 0 where that is nothing.
        cu_seqlens: `[N + 1]` int32 or int64, where the N sequences packed into one row (B = 1) begin and end;
            states then have N in the place of B, and blocks begin anew. Its values are read once a tensor,
            which on a GPU waits (the fused form, which takes one sequence after the other, reads them each
            time); the chunked form under torch.compile does not read them.
        initial_state: of an earlier call with the same block, window and sinks; None for an empty one.
        clamp: above 0.
        backend: "auto", "triton", "chunk" or "reference".
        input_precision: how Triton multiplies fp32 numbers: "ieee", "tf32" or "tf32x3"; by default "ieee" for
            fp32 inputs.

    Returns:
        out `[B, T, H, D]` in v's dtype; the state, which holds the first (T - window) // S blocks of this
        call; and the counters. To go on, give this state and begin with the first token that it does not
        hold: the outputs of those given twice lack what has left, and are of no use.

    Raises:
        ValueError: an argument of a wrong shape, dtype, device or value, or a backend that cannot run this.
    """
    sizes = check_qkv(q, k, v, cu_seqlens)
    batch, length, heads, groups, keys, width, _ = sizes
    rows = (batch, length)
    expect("phi_q", phi_q, "B, T, H, F", (*rows, heads, None), (q.dtype,), q.device)
    features = int(phi_q.shape[3])
    expect("phi_k", phi_k, "B, T, G, F", (*rows, groups, features), (q.dtype,), q.device)
    single = (q.dtype, state_dtype(q))
    if write_gate is not None:
        expect("write_gate", write_gate, "B, T, G", (*rows, groups), single, q.device)
    answer, mass = _pair(extra)
    if extra is not None:
        expect("extra[0]", answer, "B, T, H, D", (*rows, heads, width), single, q.device)
        expect("extra[1]", mass, "B, T, H", (*rows, heads), single, q.device)
    check_mask(mask, q, rows)
    check_number("block", block, 1)
    check_number("window", window, 0)
    if window % block:
        raise ValueError(f"window={window} is not possible; expected a multiple of block={block}.")
    check_number("sinks", sinks, 0)
    if sinks > block:
        raise ValueError(f"sinks={sinks} is not possible; expected at most block={block}.")
    scale = _check_scale(scale, keys)
    check_real("clamp", clamp)
    check_choice("input_precision", input_precision, PRECISIONS)
    held = (
        None if initial_state is None else _given("initial_state", initial_state, sizes, features, sinks, q)
    )
    check_choice("backend", backend, FORCED)
    chosen = choose("window_linear_attention", backend, q.device, q.dtype, refusal(keys, features, width))
    if cu_seqlens is not None and not torch.compiler.is_compiling():
        check_borders(cu_seqlens, length)
    lookback = window // block
    before, first, write = _sinks(k, v, held, mask, cu_seqlens, sinks, sizes.states)
    tokens = (q, k, v, phi_q, phi_k, write_gate, answer, mass, mask, write)
    options = (block, lookback, scale, clamp)
    if chosen == "triton":
        out, memory, counters = _triton(*tokens, first, before, held, cu_seqlens, *options, input_precision)
    else:
        initial = _memory(held, sizes, features, q)
        form = reference if chosen == "reference" else chunk
        run = partial(form.window_linear_attention, *tokens, first, before, initial, cu_seqlens, *options)
        with without_autocast(q.device):
            out, memory, counters = run()
    if cu_seqlens is None:
        blocks = before + written_blocks(length, block, lookback)
    else:
        blocks = before + (cu_seqlens.long().diff() // block - lookback).clamp_min(0)
    last = (None, None, None) if first is None else first
    return out, WindowLinearState(memory.M, memory.z, memory.n.detach(), blocks, *last), counters


def window_linear_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    phi_q: Tensor,
    state: WindowLinearState,
    *,
    scale: float | None = None,
    extra: tuple[Tensor, Tensor] | None = None,
    mask: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """What one more token answers, in constant time and memory: `out_t` of `window_linear_attention`.

    A token writes nothing by itself. When a block of S has left the window, `window_linear_attention` over
    that block, with a window of 0 and this state, gives the next one.

    Args:
        q: `[B, H, K]`; phi_q: `[B, H, F]`.
        k: `[B, W, G, K]`; v: `[B, W, G, D]`; the tokens that the state does not hold, this one the last.
        state: the blocks that have left.
        scale: as in `window_linear_attention`; extra: a `[B, H, D]` and m `[B, H]`.
        mask: `[B, W]` bool, False where a token is not seen.
        backend: as in `window_linear_attention`. The Triton form has no gradients.

    Returns:
        `[B, H, D]` in v's dtype.

    Raises:
        ValueError: as `window_linear_attention`.
    """
    if not isinstance(q, Tensor):
        raise ValueError(f"q is a {type(q).__name__}; expected a tensor [B, H, K].")
    expect("q", q, "B, H, K", (None,) * 3, FLOATS, q.device)
    batch, heads, keys = q.shape
    expect("k", k, "B, W, G, K", (batch, None, None, keys), (q.dtype,), q.device)
    span, groups = k.shape[1:3]
    check_groups(q, k, heads, groups)
    expect("v", v, "B, W, G, D", (batch, span, groups, None), (q.dtype,), q.device)
    expect("phi_q", phi_q, "B, H, F", (batch, heads, None), (q.dtype,), q.device)
    features, width = int(phi_q.shape[2]), int(v.shape[3])
    answer, mass = _pair(extra)
    if extra is not None:
        single = (q.dtype, state_dtype(q))
        expect("extra[0]", answer, "B, H, D", (batch, heads, width), single, q.device)
        expect("extra[1]", mass, "B, H", (batch, heads), single, q.device)
    if mask is not None:
        expect("mask", mask, "B, W", (batch, span), (torch.bool,), q.device)
    sizes = Sizes(batch, 1, heads, groups, keys, width, batch)
    held = _given("state", state, sizes, features, None, q)
    scale = _check_scale(scale, keys)
    no = refusal(keys, features, width)
    asked: list = [q, k, v, phi_q, answer, mass, *held]
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in asked):
        no = "a gradient is asked for, and the Triton step has none"
    check_choice("backend", backend, FORCED)
    chosen = choose("window_linear_attention_step", backend, q.device, q.dtype, no)
    if chosen == "triton":
        from kernels.window_linear_attention import library

        asked = [q, k, v, phi_q, answer, mass, mask, *held, scale]
        return library.step(*asked)
    form = reference.step if chosen == "reference" else chunk.step
    sinks = None
    if held.sink_k is not None and held.sink_v is not None and held.sink_seen is not None:
        sinks = Sinks(wide(held.sink_k), wide(held.sink_v), held.sink_seen)
    n = held.n.to(held.M.dtype)
    sums = InfiniState(held.M * n[..., None, None], held.z * n[..., None], held.n)
    asked = [None if x is None else wide(x) for x in (q, k, v, phi_q, answer, mass)]
    asked += [mask, sinks, held.blocks > 0, sums, scale]
    with without_autocast(q.device):
        return form(*asked).to(v.dtype)


def refusal(keys: int, features: int, width: int) -> str | None:
    """Why keys, features and values of these sizes have no Triton kernel, or None where they have."""
    return f"K, F or D is above {LARGEST}" if max(keys, features, width) > LARGEST else None


def _triton(
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
    sinks: Sinks | None,
    before: Tensor,
    initial: WindowLinearState | None,
    cu_seqlens: Tensor | None,
    block: int,
    lookback: int,
    scale: float,
    clamp: float,
    precision: str | None = None,
    width: int = 0,
    segments: int = 0,
) -> tuple[Tensor, InfiniState, InfiniCounters]:
    """The fused form; `width` and `segments` as in `fused.forward`."""
    from kernels.linear_attention.fused import default_precision  # only here: Triton is imported when used
    from kernels.window_linear_attention import library

    given: list = [q, k, v, phi_q, phi_k, write_gate, answer, mass, seen, write]
    given += [*((None, None, None) if sinks is None else sinks), before]
    given += [*((None, None, None) if initial is None else initial[:3]), cu_seqlens, block, lookback, scale]
    given += [float(clamp), precision or default_precision(q), width, segments]
    out, *memory, clamped, lost = library.forward(*given)[:6]
    return out, InfiniState(*memory), InfiniCounters(clamped, lost)


def _sinks(
    k: Tensor,
    v: Tensor,
    held: WindowLinearState | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    count: int,
    states: int,
) -> tuple[Tensor, Sinks | None, Tensor | None]:
    """How many blocks of each sequence have left, `[N]`; the sinks; which tokens may be written, or None.

    The sinks are the first tokens of the call, where nothing has left before it.
    """
    before = torch.zeros(states, dtype=torch.int64, device=k.device) if held is None else held.blocks
    if count == 0:
        return before, None, mask
    length, place = k.shape[1], torch.arange(count, device=k.device)
    known = torch.ones(k.shape[:2], dtype=torch.bool, device=k.device) if mask is None else mask
    if cu_seqlens is None:
        missing = max(0, count - length)
        k, v = (pad(x[:, :count], (0, 0, 0, 0, 0, missing)) for x in (k, v))
        seen = pad(known[:, :count], (0, missing))
        inside = torch.arange(length, device=k.device) < count
        fresh = (before == 0).unsqueeze(1)
    else:
        borders = cu_seqlens.long()
        token = borders[:-1, None] + place  # [N, count]
        there = token < borders[1:, None]
        token = token.clamp_max(length - 1)
        k, v, seen = k[0, token], v[0, token], known[0, token] & there
        own = torch.arange(length, device=k.device)
        sequence = (torch.searchsorted(borders, own, right=True) - 1).clamp(0, states - 1)
        inside = own - borders[sequence] < count
        fresh = (before == 0)[sequence].unsqueeze(0)
    visible = seen.unsqueeze(-1) & k.isfinite().all(-1) & v.isfinite().all(-1)
    k, v = (torch.where(visible.unsqueeze(-1), x, 0) for x in (k, v))
    sinks = Sinks(k, v, visible)
    if (
        held is not None
        and held.sink_k is not None
        and held.sink_v is not None
        and held.sink_seen is not None
    ):
        new = (before == 0).view(-1, 1, 1)
        past = (held.sink_k, held.sink_v, held.sink_seen)
        k, v = (torch.where(new.unsqueeze(-1), x, y) for x, y in zip((k, v), past[:2], strict=True))
        sinks = Sinks(k, v, torch.where(new, visible, past[2]))
    return before, sinks, known & ~(inside & fresh)


def _memory(held: WindowLinearState | None, sizes: Sizes, features: int, q: Tensor) -> InfiniState:
    if held is not None:
        return InfiniState(held.M, held.z, held.n)
    return InfiniState.empty(sizes.states, sizes.groups, features, sizes.width, q.device, state_dtype(q))


def _pair(extra: tuple[Tensor, Tensor] | None) -> tuple[Tensor | None, Tensor | None]:
    if extra is None:
        return None, None
    if not isinstance(extra, tuple) or len(extra) != 2:
        raise ValueError(f"extra is a {type(extra).__name__}; expected a pair of tensors or None.")
    return extra


def _check_scale(scale: float | None, keys: int) -> float:
    if scale is None:
        return keys**-0.5
    check_real("scale", scale, words=", or None")
    return float(scale)


def _given(
    name: str, state: WindowLinearState, sizes: Sizes, features: int, sinks: int | None, q: Tensor
) -> WindowLinearState:
    """The state, checked.

    Args:
        sizes: with K for F; features: F.
        sinks: how many it must have; None for as many as it has.
    """
    if not isinstance(state, tuple) or len(state) not in (4, 7):
        raise ValueError(f"{name} is a {type(state).__name__}; expected a WindowLinearState.")
    state = WindowLinearState(*state)
    check_memory(name, InfiniState(*state[:3]), sizes._replace(features=features), q)
    letter = "N" if sizes.states != sizes.batch else "B"
    expect(f"{name}.blocks", state.blocks, letter, (sizes.states,), (torch.int64,), q.device)
    if sinks is None:
        sinks = 0 if state.sink_k is None else state.sink_k.shape[1]
    if sinks == 0:
        return state._replace(sink_k=None, sink_v=None, sink_seen=None)
    shape, letters = (sizes.states, sinks, sizes.groups), f"{letter}, sinks, G"
    expect(f"{name}.sink_k", state.sink_k, f"{letters}, K", (*shape, sizes.features), (q.dtype,), q.device)
    expect(f"{name}.sink_v", state.sink_v, f"{letters}, D", (*shape, sizes.width), (q.dtype,), q.device)
    expect(f"{name}.sink_seen", state.sink_seen, letters, shape, (torch.bool,), q.device)
    return state
