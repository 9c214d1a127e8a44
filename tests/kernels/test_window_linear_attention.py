"""Window, sinks and linear sum: all forms against the definition, in values and gradients, cut, guarded."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from kernels import WindowLinearState, window_linear_attention, window_linear_attention_step
from kernels.testing import assert_close, poisoned, tolerance
from kernels.window_linear_attention import chunk, op
from replace.attention.linear import Linear
from replace.blocks import Call, Heads
from replace.cache import ReplacedCacheLayer
from replace.config import AttentionConfig

Result = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """The sizes of a call and what it uses."""

    length: int
    block: int
    window: int = 0
    sinks: int = 0
    heads: int = 2
    groups: int = 1
    keys: int = 8
    features: int = 8
    width: int = 8
    batch: int = 1
    packed: tuple[int, ...] = ()
    masked: bool = False
    initial: bool = False
    gated: bool = True
    extra: bool = False
    clamp: float = 1e4
    spoiled: bool = False
    scale: float | None = None

    @property
    def states(self) -> int:
        """N."""
        return len(self.packed) - 1 if self.packed else self.batch


CASES = {
    "one_token": Case(1, 8, initial=True),
    "below_a_block": Case(7, 8, sinks=3, extra=True),
    "a_block": Case(8, 8, sinks=8, batch=2),
    "above_a_block": Case(9, 8, gated=False, initial=True, sinks=2),
    "window_of_one_block": Case(67, 16, 16, sinks=4, masked=True, batch=2),
    "several_blocks_in_a_span": Case(
        70, 8, 16, sinks=3, heads=2, groups=2, width=24, masked=True, initial=True
    ),
    "blocks_of_one": Case(5, 1, 2, sinks=1, gated=False),
    "blocks_that_fill_no_tile": Case(50, 24, sinks=2, spoiled=True, extra=True, scale=0.7),
    "a_block_of_two_tiles": Case(140, 70, heads=1, sinks=18, spoiled=True),
    "all_inside": Case(20, 4, 36, sinks=2, extra=True),
    "clamped": Case(
        45, 12, 12, sinks=1, clamp=0.7, batch=2, spoiled=True, masked=True, extra=True, initial=True
    ),
    "packed": Case(61, 8, 8, sinks=3, packed=(0, 1, 20, 28, 61), masked=True, extra=True, initial=True),
    "packed_afresh": Case(45, 4, 8, sinks=4, heads=4, groups=2, packed=(0, 3, 45), clamp=0.7, spoiled=True),
    "dim_64": Case(33, 16, heads=1, keys=64, features=64, width=64, sinks=4),
    "dims_80_96": Case(20, 8, heads=1, keys=24, features=80, width=96),
    "dims_128": Case(5, 4, heads=1, keys=128, features=16, width=128),
    "width_256": Case(3, 2, heads=1, features=16, width=256),
    "keys_256": Case(3, 2, heads=1, keys=256, features=16, width=64),
}
SMALL = ["window_of_one_block", "above_a_block", "blocks_that_fill_no_tile", "dims_80_96"]
LEAVES = (
    *("q", "k", "v", "phi_q", "phi_k", "write_gate", "answer", "mass"),
    *("M", "z", "sink_k", "sink_v"),
)


@dataclass
class Inputs:
    """A call's tensors, and the gradients that its results are given."""

    q: Tensor
    k: Tensor
    v: Tensor
    phi_q: Tensor
    phi_k: Tensor
    write_gate: Tensor | None
    answer: Tensor | None
    mass: Tensor | None
    mask: Tensor | None
    borders: Tensor | None
    M: Tensor | None
    z: Tensor | None
    n: Tensor | None
    blocks: Tensor | None
    sink_k: Tensor | None
    sink_v: Tensor | None
    sink_seen: Tensor | None
    out: Tensor
    final_M: Tensor
    final_z: Tensor

    def state(self, changed: Result | None = None) -> WindowLinearState | None:
        """The initial state, with some of its tensors changed."""
        if self.blocks is None:
            return None
        given = vars(self) | (changed or {})
        return WindowLinearState(*(given[name] for name in WindowLinearState._fields))


def inputs(case: Case, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Inputs:
    """With NaN where a mask leaves tokens out, and tokens whose features must not be written."""
    draw = torch.Generator().manual_seed(case.length * 1000 + case.features)
    single = torch.float64 if dtype == torch.float64 else torch.float32

    def new(*shape: int, positive: bool = False, kind: torch.dtype = dtype) -> Tensor:
        x = torch.randn(*shape, generator=draw, dtype=torch.float64)
        return (x.abs() * 0.5 + 0.1 if positive else x).to(kind).to(device)

    def some(*shape: int) -> Tensor:
        return (torch.rand(*shape, generator=draw) > 1 / 3).to(device)

    rows, groups, states = (case.batch, case.length), case.groups, case.states
    k, v = new(*rows, groups, case.keys), new(*rows, groups, case.width)
    phi_k = new(*rows, groups, case.features, positive=True)
    write_gate = new(*rows, groups, kind=single).sigmoid() if case.gated else None
    mask = None
    if case.masked:
        mask = some(*rows)
        k[~mask], v[~mask], phi_k[~mask] = torch.nan, torch.inf, torch.nan
    if case.spoiled:
        phi_k[0, 5, 0, 0], phi_k[-1, 6, -1, 1], phi_k[0, 7, 0, 1] = torch.nan, torch.inf, -torch.inf
        if write_gate is not None:
            write_gate[0, 8, 0] = torch.nan
    memory, sunk = (states, groups, case.features), (states, case.sinks, groups)
    mass = new(*rows, case.heads, kind=single)
    mass[:, ::5] = -torch.inf
    return Inputs(
        q=new(*rows, case.heads, case.keys),
        k=k,
        v=v,
        phi_q=new(*rows, case.heads, case.features, positive=True),
        phi_k=phi_k,
        write_gate=write_gate,
        answer=new(*rows, case.heads, case.width, kind=single) if case.extra else None,
        mass=mass if case.extra else None,
        mask=mask,
        borders=torch.tensor(case.packed, device=device) if case.packed else None,
        M=new(*memory, case.width, kind=single) if case.initial else None,
        z=new(*memory, positive=True, kind=single) if case.initial else None,
        n=new(*memory[:2], positive=True, kind=torch.float64) if case.initial else None,
        blocks=torch.arange(states, device=device) + int(states == 1) if case.initial else None,
        sink_k=new(*sunk, case.keys) if case.initial and case.sinks else None,
        sink_v=new(*sunk, case.width) if case.initial and case.sinks else None,
        sink_seen=some(*sunk) if case.initial and case.sinks else None,
        out=new(*rows, case.heads, case.width),
        final_M=new(*memory, case.width, kind=single) / 10,
        final_z=new(*memory, kind=single) / 10,
    )


def wide(x: Inputs) -> Inputs:
    """The same numbers in fp64 on the CPU: what the truth is computed from."""
    moved = {
        name: value.cpu().double() if value.is_floating_point() else value.cpu()
        for name, value in vars(x).items()
        if value is not None
    }
    return replace(x, **moved)


Form = Callable[..., tuple[Tensor, WindowLinearState, op.InfiniCounters]]


def outcome(form: Form, x: Inputs, case: Case) -> Result:
    """Values, counts and gradients of one form. `form(q, ...)` is as `window_linear_attention`."""
    leaves = {
        name: value.detach().clone().requires_grad_()
        for name, value in vars(x).items()
        if name in LEAVES and value is not None
    }
    out, state, counters = form(
        *(leaves[name] for name in ("q", "k", "v", "phi_q", "phi_k")),
        block=case.block,
        window=case.window,
        sinks=case.sinks,
        scale=case.scale,
        write_gate=leaves.get("write_gate"),
        extra=(leaves["answer"], leaves["mass"]) if case.extra else None,
        mask=x.mask,
        cu_seqlens=x.borders,
        initial_state=x.state(leaves),
        clamp=case.clamp,
    )
    assert not state.n.requires_grad
    given = [(out, x.out), (state.M, x.final_M), (state.z, x.final_z)]
    if state.sink_k is not None and state.sink_v is not None:
        given += [(y, y.detach()) for y in (state.sink_k, state.sink_v)]
    results, gradients = zip(*((a, b) for a, b in given if a.requires_grad), strict=True)
    torch.autograd.backward(results, gradients)
    found = {"out": out} | {name: y.double() for name, y in state._asdict().items() if y is not None}
    found |= {name: getattr(counters, name).double() for name in counters._fields}
    for name, leaf in leaves.items():
        found[f"d{name}"] = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
    return found


EXACTLY = (*op.InfiniCounters._fields, "blocks", "sink_seen")


def compare(got: Result, want: Result, dtype: torch.dtype, device: str = "cpu") -> None:
    """Everything in `want`, each at its tolerance; counts exactly."""
    assert got.keys() == want.keys()
    for name, value in want.items():
        if name in EXACTLY:
            assert torch.equal(got[name].cpu(), value.cpu()), name
        else:
            assert_close(name, got[name], value, tolerance(dtype, device, name.startswith("d")))


def definition(
    q: Tensor, k: Tensor, v: Tensor, phi_q: Tensor, phi_k: Tensor, *, block: int, window: int, sinks: int,
    scale: float | None, write_gate: Tensor | None, extra: tuple[Tensor, Tensor] | None, mask: Tensor | None,
    cu_seqlens: Tensor | None, initial_state: WindowLinearState | None, clamp: float,
) -> tuple[Tensor, WindowLinearState, op.InfiniCounters]:  # fmt: skip
    """Without a recurrence: each query weighs all tokens, each in one place."""
    if cu_seqlens is not None:
        found = []
        for i, (start, stop) in enumerate(pairwise(cu_seqlens.tolist())):
            one = None
            if initial_state is not None:
                one = WindowLinearState(*(None if y is None else y[i : i + 1] for y in initial_state))
            part = slice(start, stop)
            found.append(
                definition(
                    *(y[:, part] for y in (q, k, v, phi_q, phi_k)),
                    write_gate=None if write_gate is None else write_gate[:, part],
                    extra=None if extra is None else (extra[0][:, part], extra[1][:, part]),
                    mask=None if mask is None else mask[:, part],
                    cu_seqlens=None, initial_state=one,
                    block=block, window=window, sinks=sinks, scale=scale, clamp=clamp,
                )
            )  # fmt: skip
        outs, states, counts = zip(*found, strict=True)
        joined = (None if ys[0] is None else torch.cat(ys) for ys in zip(*states, strict=True))
        counters = op.InfiniCounters(*(torch.cat(ys) for ys in zip(*counts, strict=True)))
        return torch.cat(outs, 1), WindowLinearState(*joined), counters
    (batch, length, heads), groups = q.shape[:3], k.shape[2]
    scale, lookback, place = scale or q.shape[-1] ** -0.5, window // block, torch.arange(length)
    there = torch.ones(batch, length, dtype=torch.bool) if mask is None else mask
    state = initial_state
    before = torch.zeros(batch, dtype=torch.int64) if state is None else state.blocks
    of = torch.arange(groups).repeat_interleave(heads // groups)
    k, v = (torch.where(there[..., None, None], y, 0) for y in (k, v))
    # Exactly seen: the window, and this call's sinks where nothing has left before it.
    start = (place // block - lookback) * block
    inside = (place <= place[:, None]) & (place >= start[:, None])
    far = (place < sinks) & (place < start[:, None])
    seen = inside | (far & (before == 0)[:, None, None])  # [B, T, T]
    weights = torch.einsum("bthk,bjhk->bhtj", q, k[:, :, of]).mul(scale).exp()
    weights = torch.where((seen & there[:, None])[:, None], weights, 0)
    top = torch.einsum("bhtj,bjhd->bthd", weights, v[:, :, of])
    down = weights.sum(-1).transpose(1, 2)
    if state is not None and state.sink_k is not None:
        assert state.sink_v is not None
        assert state.sink_seen is not None
        past = before[:, None] + place // block - lookback > 0
        past = past & (before > 0)[:, None]
        each = torch.einsum("bthk,bjhk->bthj", q, state.sink_k[:, :, of]).mul(scale).exp()
        each = each * past[..., None, None] * state.sink_seen[:, :, of].transpose(1, 2)[:, None]
        top, down = top + torch.einsum("bthj,bjhd->bthd", each, state.sink_v[:, :, of]), down + each.sum(-1)
    # Written: what has left, no sinks.
    weight = torch.ones_like(k[..., 0]) if write_gate is None else write_gate
    sound = (phi_k.abs() < 1e15).all(-1) & (v.abs() < 1e15).all(-1) & weight.isfinite()
    here = there & ~((place < sinks) & (before == 0)[:, None])
    taken = here[..., None] & sound
    phi_k, weight = torch.where(taken[..., None], phi_k, 0), torch.where(taken, weight, 0)
    whole = max(0, length // block - lookback)
    leaves = (place // block < whole)[None, :, None]
    clamped, share = torch.zeros(batch, groups, dtype=torch.int64), weight.clone()
    for i in range(whole):
        own = torch.where((place // block == i)[None, :, None], weight, 0)
        n = own.sum(1).detach().clamp_min(1e-30)
        z = torch.einsum("btg,btgf->bgf", own, phi_k) / n[..., None]
        M = torch.einsum("btg,btgf,btgd->bgfd", own, phi_k, v) / n[..., None, None]
        most = torch.maximum(M.abs().amax((-1, -2)), z.abs().amax(-1)).detach()
        clamped += most > clamp
        share = torch.where(own > 0, share * (clamp / most.clamp_min(clamp))[:, None], share)
    older = (place // block)[None] < (place // block - lookback)[:, None]
    each = (
        torch.einsum("bthf,bjhf->bhtj", phi_q, phi_k[:, :, of]) * share[:, :, of].permute(0, 2, 1)[:, :, None]
    )
    each = torch.where(older, each, 0)
    top, down = top + torch.einsum("bhtj,bjhd->bthd", each, v[:, :, of]), down + each.sum(-1).transpose(1, 2)
    M = torch.zeros(batch, groups, phi_k.shape[-1], v.shape[-1], dtype=q.dtype)
    z, n = M[..., 0], torch.zeros(batch, groups, dtype=torch.float64)
    if state is not None:
        n = state.n
        M, z = state.M * n[..., None, None], state.z * n[..., None]
        top = top + torch.einsum("bthf,bhfd->bthd", phi_q, M[:, of])
        down = down + torch.einsum("bthf,bhf->bth", phi_q, z[:, of])
    if extra is not None:
        top, down = top + extra[1].exp()[..., None] * extra[0], down + extra[1].exp()
    share = torch.where(leaves, share, 0)
    M = M + torch.einsum("btg,btgf,btgd->bgfd", share, phi_k, v)
    z = z + torch.einsum("btg,btgf->bgf", share, phi_k)
    n = n + torch.where(leaves, weight, 0).sum(1).detach()
    safe = n.clamp_min(1e-30)
    last: tuple = (None, None, None)
    if sinks:
        room = max(0, sinks - length)
        last = tuple(torch.nn.functional.pad(y[:, :sinks], (0, 0, 0, 0, 0, room)) for y in (k, v))
        last = (*last, torch.nn.functional.pad(there[:, :sinks], (0, room))[..., None].expand(-1, -1, groups))
        if state is not None:
            new = (before == 0)[:, None, None]
            last = tuple(
                torch.where(new.view(-1, *[1] * (y.dim() - 1)), y, past)
                for y, past in zip(last, state[4:], strict=True)
            )
    out = top / torch.where(down == 0, 1, down)[..., None]
    counters = op.InfiniCounters(clamped, (here[..., None] & ~sound & leaves).sum(1))
    return (
        out,
        WindowLinearState(M / safe[..., None, None], z / safe[..., None], n, before + whole, *last),
        counters,
    )


def backend(name: str) -> Form:
    """`window_linear_attention` with a form forced."""
    return lambda *args, **kwargs: window_linear_attention(*args, backend=name, **kwargs)


FUSED = [
    pytest.param("cpu", torch.float32, marks=pytest.mark.interpret, id="interpreted-fp32"),
    *(
        pytest.param("cuda", dtype, marks=pytest.mark.gpu, id=f"cuda-{str(dtype)[6:]}")
        for dtype in (torch.bfloat16, torch.float16, torch.float32)
    ),
]
FORMS = [
    pytest.param("reference", "cpu", torch.float64, id="reference"),
    pytest.param("chunk", "cpu", torch.float64, id="chunk"),
    pytest.param("triton", "cpu", torch.float32, marks=pytest.mark.interpret, id="interpreted"),
    pytest.param("triton", "cuda", torch.float32, marks=pytest.mark.gpu, id="cuda"),
]


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    """Whatever a test below runs, it runs on memory full of NaN."""
    with poisoned():
        yield


@pytest.mark.parametrize("name", CASES)
def test_token_by_token_equals_the_definition(name: str) -> None:
    case = CASES[name]
    narrow = {part: min(getattr(case, part), 24) for part in ("keys", "features", "width")}
    case = replace(case, **narrow)
    x = inputs(case)
    compare(outcome(backend("reference"), x, case), outcome(definition, x, case), torch.float64)


def test_the_cases_see_the_guard() -> None:
    found = outcome(backend("reference"), inputs(CASES["clamped"]), CASES["clamped"])
    assert found["clamped"].sum() > 1
    assert found["nonfinite"].sum() > 1
    found = outcome(backend("reference"), inputs(CASES["packed_afresh"]), CASES["packed_afresh"])
    assert found["clamped"].sum() > 1
    assert found["nonfinite"].tolist()[0] == [0, 0]
    assert found["nonfinite"].sum() > 1
    found = outcome(backend("reference"), inputs(CASES["packed"]), CASES["packed"])
    assert found["clamped"].sum() == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_blocks_equal_token_by_token(name: str, dtype: torch.dtype) -> None:
    x = inputs(CASES[name], dtype)
    want = outcome(backend("reference"), wide(x), CASES[name])
    compare(outcome(backend("chunk"), x, CASES[name]), want, dtype)


def test_a_block_far_longer_than_the_text_costs_no_memory() -> None:
    for packed in ((), (0, 3, 7)):
        case = Case(7, 10**12, window=10**12, sinks=2, packed=packed, initial=True)
        x = inputs(case)
        compare(outcome(backend("chunk"), x, case), outcome(backend("reference"), x, case), torch.float64)


@pytest.mark.parametrize(("device", "dtype"), FUSED)
@pytest.mark.parametrize("name", CASES)
def test_fused_equals_token_by_token(name: str, device: str, dtype: torch.dtype) -> None:
    x = inputs(CASES[name], dtype, device)
    want = outcome(backend("reference"), wide(x), CASES[name])
    compare(outcome(backend("triton"), x, CASES[name]), want, dtype, device)


@pytest.mark.interpret
@pytest.mark.parametrize("name", SMALL)
def test_fused_in_fp16_equals_token_by_token(name: str) -> None:
    x = inputs(CASES[name], torch.float16)
    want = outcome(backend("reference"), wide(x), CASES[name])
    compare(outcome(backend("triton"), x, CASES[name]), want, torch.float16)


@pytest.mark.parametrize("piece", [1, 8, 24])
def test_no_size_of_piece_matters(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("several_blocks_in_a_span", "packed"):
        x = inputs(CASES[name])
        want = outcome(backend("reference"), x, CASES[name])
        form = chunk.window_linear_attention
        with monkeypatch.context() as patch:
            patch.setattr(
                chunk, "window_linear_attention", lambda *given, form=form: form(*given, piece=piece)
            )
            compare(outcome(backend("chunk"), x, CASES[name]), want, torch.float64)


@pytest.mark.parametrize(("device", "dtype"), FUSED)
@pytest.mark.parametrize(
    ("width", "segments", "block"), [(16, 2, 64), pytest.param(32, 3, 70, marks=pytest.mark.slow)]
)
def test_no_cut_of_the_fused_form_matters(
    width: int, segments: int, block: int, device: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(140, block, block, sinks=2, heads=1, keys=20, features=20, width=20, initial=True)
    x = inputs(case, dtype, device)
    want = outcome(backend("reference"), wide(x), case)
    form = op._triton
    monkeypatch.setattr(op, "_triton", lambda *given: form(*given, width, segments))
    compare(outcome(backend("triton"), x, case), want, dtype, device)


@pytest.mark.parametrize(("name", "device", "dtype"), FORMS)
def test_split_and_resumed_is_the_whole(name: str, device: str, dtype: torch.dtype) -> None:
    case = Case(39, 4, 8, sinks=3, batch=2, extra=True, masked=True)
    x = inputs(case, dtype, device)
    assert x.answer is not None
    assert x.mass is not None
    names = ("q", "k", "v", "phi_q", "phi_k", "write_gate", "answer", "mass", "mask")

    def run(start: int, stop: int, state: WindowLinearState | None) -> tuple[Tensor, WindowLinearState]:
        *tokens, write_gate, answer, mass, mask = (getattr(x, part)[:, start:stop] for part in names)
        out, state, _ = window_linear_attention(
            *tokens, block=4, window=8, sinks=3, write_gate=write_gate, extra=(answer, mass), mask=mask,
            initial_state=state, backend=name,
        )  # fmt: skip
        return out, state

    want, last = run(0, 39, None)
    outs, state, done, kept = [], None, 0, 0
    for stop in (2, 18, 20, 39):  # the first of them ends inside the sinks
        out, state = run(kept, stop, state)
        outs.append(out[:, done - kept :])
        assert state.blocks.tolist() == [max(0, stop // 4 - 2)] * 2
        done, kept = stop, max(0, stop // 4 - 2) * 4
    assert state is not None
    limit = tolerance(dtype, device)
    assert_close("out", torch.cat(outs, 1), want, limit)
    for part in ("M", "z", "n", "sink_k", "sink_v"):
        assert_close(part, getattr(state, part), getattr(last, part), limit)
    assert torch.equal(state.sink_seen, last.sink_seen)  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "device", "dtype"), FORMS)
def test_one_token_at_a_time_is_the_whole(name: str, device: str, dtype: torch.dtype) -> None:
    case = Case(6, 2, 2, sinks=1, heads=2, groups=2, keys=8, features=24, width=40, extra=True, masked=True)
    x = inputs(case, dtype, device)
    assert x.answer is not None
    assert x.mass is not None
    assert x.mask is not None
    assert x.write_gate is not None
    given = {"block": 2, "sinks": 1, "scale": 0.4}
    want, last, _ = window_linear_attention(
        x.q, x.k, x.v, x.phi_q, x.phi_k, window=2, write_gate=x.write_gate, extra=(x.answer, x.mass),
        mask=x.mask, backend="reference", **given,
    )  # fmt: skip
    tokens = (x.q, x.k, x.v, x.phi_q, x.phi_k)
    nothing = {"window": 0, "mask": torch.zeros(1, 1, dtype=torch.bool, device=device)}
    _, state, _ = window_linear_attention(*(y[:, :1] for y in tokens), **given, **nothing)
    held = 0
    for t in range(case.length):
        near, here = slice(held * 2, t + 1), (x.answer[:, t], x.mass[:, t])
        got = window_linear_attention_step(
            x.q[:, t], x.k[:, near], x.v[:, near], x.phi_q[:, t], state,
            scale=0.4, extra=here, mask=x.mask[:, near], backend=name,
        )  # fmt: skip
        assert_close(f"out {t}", got, want[:, t], tolerance(dtype, device))
        if t % 2 == 1 and t >= 3:
            part = slice(held * 2, held * 2 + 2)
            options = {"window": 0, "write_gate": x.write_gate[:, part], "mask": x.mask[:, part]}
            _, state, _ = window_linear_attention(
                *(y[:, part] for y in tokens), initial_state=state, backend=name, **options, **given
            )
            held += 1
    for part in ("M", "z", "n", "sink_k", "sink_v"):
        assert_close(part, getattr(state, part), getattr(last, part), tolerance(dtype, device))
    plain = window_linear_attention_step(x.q[:, 1], x.k[:, :2], x.v[:, :2], x.phi_q[:, 1], state[:4])
    got = window_linear_attention_step(
        x.q[:, 1], x.k[:, :2], x.v[:, :2], x.phi_q[:, 1], state[:4], backend=name
    )
    assert_close("without anything", got.nan_to_num(), plain.nan_to_num(), tolerance(dtype, device))


@pytest.mark.parametrize(("name", "device", "dtype"), FORMS)
def test_the_future_changes_no_bit(name: str, device: str, dtype: torch.dtype) -> None:
    x = inputs(Case(20, 4, 4, sinks=2), dtype, device)
    given = (x.q, x.k, x.v, x.phi_q, x.phi_k)
    options = {"block": 4, "window": 4, "sinks": 2, "backend": name}
    want, _, _ = window_linear_attention(*given, **options)
    for t in (1, 3, 8):
        q, k, v, phi_q, phi_k = (y.clone() for y in given)
        q[:, t:], k[:, t:], v[:, t:], phi_q[:, t:], phi_k[:, t:] = 7.0, torch.nan, torch.inf, 9.0, torch.nan
        out, _, _ = window_linear_attention(q, k, v, phi_q, phi_k, **options)
        assert torch.equal(out[:, :t], want[:, :t])
        own = (t // 4 + 2) * 4  # features are read when they have left
        out, _, _ = window_linear_attention(x.q, x.k, x.v, x.phi_q, phi_k, **options)
        assert torch.equal(out[:, :own], want[:, :own])
        assert out.isfinite().all()
        assert not torch.equal(out[:, own:], want[:, own:])


@pytest.mark.parametrize(("name", "device", "dtype"), FORMS)
def test_a_bad_token_is_seen_by_its_window_and_then_left_out(
    name: str, device: str, dtype: torch.dtype
) -> None:
    x = inputs(Case(16, 4, 4, heads=4, groups=2, batch=2), dtype, device)
    options = {"write_gate": x.write_gate, "block": 4, "window": 4, "backend": name}
    given = (x.q, x.k, x.v, x.phi_q, x.phi_k)
    want = window_linear_attention(*given, **options)
    for spoil, where in ((torch.nan, "k"), (torch.inf, "v")):
        q, k, v, phi_q, phi_k = (y.clone() for y in given)
        {"k": k, "v": v}[where][1, 5, 0, 2] = spoil
        if where == "k":
            phi_k[1, 5, 0, 2] = spoil
        out, state, counters = window_linear_attention(q, k, v, phi_q, phi_k, **options)
        assert counters.nonfinite.tolist() == [[0, 0], [1, 0]]
        assert torch.equal(out[0], want[0][0])
        assert torch.equal(out[1, :, 2:], want[0][1, :, 2:])
        assert out[1, 5:12, :2].isnan().any(-1).all()
        assert torch.equal(out[1, :5, :2], want[0][1, :5, :2])
        assert out[1, 12:].isfinite().all()
        assert state.M.isfinite().all()
        mask = torch.ones(2, 16, dtype=torch.bool, device=device)
        mask[1, 5] = False
        left = window_linear_attention(*given, mask=mask, **options)
        assert torch.equal(out[1, 12:, :2], left[0][1, 12:, :2])
        assert not torch.equal(out[1, 12:, :2], want[0][1, 12:, :2])
    v = x.v.clone()
    v[1, 0, 0, 0] = torch.nan  # a sink
    out, state, _ = window_linear_attention(x.q, x.k, v, x.phi_q, x.phi_k, sinks=1, **options)
    assert state.sink_seen is not None
    assert state.sink_seen[:, 0].tolist() == [[True, True], [False, True]]
    assert out[1, 8:].isfinite().all()


@pytest.mark.parametrize(("name", "device", "dtype"), FORMS)
def test_equal_calls_give_equal_bits_and_strides_do_not_matter(
    name: str, device: str, dtype: torch.dtype
) -> None:
    case = Case(13, 4, 4, sinks=2, heads=4, groups=2, batch=2, initial=True, extra=True)
    x = inputs(case, dtype, device)
    first, second = (outcome(backend(name), x, case) for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)
    for part in (*LEAVES, "out"):
        y = getattr(x, part)
        setattr(x, part, y.transpose(1, 2).contiguous().transpose(1, 2))
        assert not getattr(x, part).is_contiguous()
    compare(outcome(backend(name), x, case), first, dtype, device)


@pytest.mark.parametrize(("name", "device", "dtype"), FORMS)
def test_a_query_that_sees_nothing_answers_nothing(name: str, device: str, dtype: torch.dtype) -> None:
    x = inputs(Case(12, 4), dtype, device)
    leaves = [y.clone().requires_grad_() for y in (x.q, x.k, x.v, x.phi_q, x.phi_k)]
    mask = torch.arange(12, device=device).unsqueeze(0) >= 6
    out, _, _ = window_linear_attention(*leaves, block=4, window=0, mask=mask, backend=name)
    assert torch.equal(out[:, :6], torch.zeros_like(out[:, :6]))
    assert out[:, 6:].abs().min() > 0
    out.sum().backward()
    for leaf in leaves:
        assert leaf.grad is not None
        assert torch.equal(leaf.grad[:, :6], torch.zeros_like(leaf.grad[:, :6]))
        assert leaf.grad.isfinite().all()
    assert leaves[2].grad is not None
    assert leaves[2].grad[:, 6:].abs().min() > 0


@pytest.mark.parametrize(("name", "device", "dtype"), FORMS)
def test_it_is_softmax_while_nothing_has_left(name: str, device: str, dtype: torch.dtype) -> None:
    x = inputs(Case(15, 4, heads=4, groups=2), dtype, device)
    out, state, _ = window_linear_attention(
        x.q, x.k, x.v, x.phi_q, x.phi_k, block=4, window=12, sinks=2, backend=name
    )
    q, k, v = (y.transpose(1, 2) for y in (x.q, x.k, x.v))
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert_close("out", out, want.transpose(1, 2), tolerance(dtype, device))
    assert int(state.blocks) == 0
    assert float(state.n.abs().sum()) == 0


def test_a_window_of_any_size_takes_no_more_memory_than_the_text() -> None:
    x = inputs(Case(9, 2))
    tokens = (x.q, x.k, x.v, x.phi_q, x.phi_k)
    got, want = (
        window_linear_attention(*tokens, block=2, window=window, sinks=2, backend="chunk")[0]
        for window in (2**40, 10)
    )
    assert torch.equal(got, want)


@pytest.mark.parametrize(("name", "device", "dtype"), FORMS)
def test_logits_of_any_size_are_survived(name: str, device: str, dtype: torch.dtype) -> None:
    x = inputs(Case(12, 4, sinks=1), dtype, device)
    for size in (1e4, -1e4):
        k = torch.ones_like(x.k) * size
        q = torch.ones_like(x.q)
        leaves = [y.clone().requires_grad_() for y in (q, k, x.v, x.phi_q * 1e-3, x.phi_k)]
        out, _, _ = window_linear_attention(*leaves, block=4, window=0, sinks=1, backend=name)
        assert out.isfinite().all()
        out.sum().backward()
        assert all(leaf.grad is not None and leaf.grad.isfinite().all() for leaf in leaves)
        # The window outweighs the memory, or is outweighed by it.
        assert (leaves[3].grad[:, 8:].abs().max() == 0) == (size > 0)  # type: ignore[index]


@pytest.mark.parametrize(("name", "device", "dtype"), FORMS)
def test_a_gradient_may_reach_one_result_alone(name: str, device: str, dtype: torch.dtype) -> None:
    x = inputs(Case(9, 4), dtype, device)
    v = x.v.clone().requires_grad_()
    _, state, _ = window_linear_attention(x.q, x.k, v, x.phi_q, x.phi_k, block=4, window=0, backend=name)
    (only_M,) = torch.autograd.grad(state.M, v, x.final_M)
    want = torch.einsum("btgf,bgfd->btgd", x.phi_k[:, :8], x.final_M.to(dtype)) / 8
    assert_close("dv", only_M[:, :8], want, tolerance(dtype, device, True))
    assert torch.equal(only_M[:, 8:], torch.zeros_like(only_M[:, 8:]))


@pytest.mark.parametrize("gate", ["none", "token"])
@pytest.mark.parametrize("name", ["reference", "chunk"])
def test_it_is_the_layer_of_linear_attention(name: str, gate: str) -> None:
    torch.manual_seed(0)
    sizes = {"block": 4, "window": 8, "sinks": 3}
    options = AttentionConfig(name="linear", pairs=0, distance_cap=None, write_gate=gate, **sizes)
    layer = Linear(options, Heads(4, 2, 8, 16), None).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    q, k, v = (torch.randn(2, heads, 39, 8, dtype=torch.float64) for heads in (4, 2, 2))
    hidden = torch.randn(2, 39, 16, dtype=torch.float64)
    slope = torch.randn(2, 4, 39, 8, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    weights = [x for x in layer.parameters() if x.requires_grad]
    slot = ReplacedCacheLayer()
    want = layer(q, k, v, Call(hidden, 0.35, slot=slot))
    expected = torch.autograd.grad(want, [*leaves, *weights], slope)
    assert layer.log_amplitude is not None
    phi_q, phi_k = layer.features_of(q, k, torch.arange(39).expand(2, -1), 0.35)
    phi_q = phi_q * layer.log_amplitude.exp().view(1, -1, 1, 1)
    gates = layer.write_weights(hidden)
    out, state, _ = window_linear_attention(
        *(x.transpose(1, 2) for x in (q, k, v, phi_q, phi_k)), scale=0.35, **sizes, backend=name,
        write_gate=None if gates is None else gates.transpose(1, 2),
    )  # fmt: skip
    limit = tolerance(torch.float64)
    assert_close("out", out.transpose(1, 2), want, limit)
    found = torch.autograd.grad(out.transpose(1, 2), [*leaves, *weights], slope)
    for i, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert_close(f"gradient {i}", one, other, limit)
    assert slot.state is not None
    assert slot.state.memory_M is not None
    assert slot.state.memory_n is not None
    assert state.blocks.tolist() == [7, 7]
    assert slot.state.length.tolist() == [39, 39]
    assert_close("M", state.M, slot.state.memory_M, limit)
    assert_close("n", state.n, slot.state.memory_n, limit)


def test_gradients_of_blocks_equal_differences() -> None:
    case = Case(7, 2, 2, sinks=1, keys=2, features=3, width=2, extra=True, initial=True)
    x = inputs(case)
    assert x.mass is not None
    x.mass = x.mass.nan_to_num(neginf=0.3)
    names = [name for name in LEAVES if getattr(x, name) is not None]

    def call(*given: Tensor) -> tuple[Tensor, ...]:
        leaves = dict(zip(names, given, strict=True))
        out, state, _ = window_linear_attention(
            *given[:5], block=2, window=2, sinks=1, write_gate=leaves["write_gate"],
            extra=(leaves["answer"], leaves["mass"]), initial_state=x.state(leaves), backend="chunk",
        )  # fmt: skip
        return out, state.M * state.n[..., None, None], state.z * state.n[..., None]

    assert torch.autograd.gradcheck(call, [getattr(x, name).requires_grad_() for name in names])


def test_autocast_does_not_reach_the_sums() -> None:
    x = inputs(Case(20, 4, 4), torch.float32)
    given = (x.q, x.k, x.v, x.phi_q, x.phi_k)
    want = window_linear_attention(*given, block=4, window=4, backend="chunk")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = window_linear_attention(*given, block=4, window=4, backend="chunk")
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1].M, want[1].M)


@pytest.mark.parametrize(
    ("name", "packed"),
    [
        ("chunk", ()),
        pytest.param("chunk", (0, 2, 9), marks=pytest.mark.slow),
        pytest.param("triton", (), marks=pytest.mark.interpret),
        pytest.param("triton", (0, 2, 9), marks=pytest.mark.interpret),
        pytest.param("auto", (), marks=pytest.mark.gpu),
        pytest.param("auto", (0, 2, 9), marks=pytest.mark.gpu),
    ],
)
def test_it_compiles_as_one_graph(name: str, packed: tuple[int, ...]) -> None:
    case = Case(9, 4, masked=True, sinks=1, packed=packed)
    device = "cuda" if name == "auto" else "cpu"
    x = inputs(case, torch.float32, device)
    want = outcome(backend(name), x, case)
    torch.compiler.reset()
    compiled = torch.compile(backend(name), fullgraph=True, backend="aot_eager")
    compare(outcome(compiled, x, case), want, torch.float32, device)


@pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=pytest.mark.interpret), pytest.param("cuda", marks=pytest.mark.gpu)]
)
def test_torch_accepts_the_operators(device: str) -> None:
    from kernels.window_linear_attention import library

    case = Case(3, 1, sinks=1, heads=1, keys=2, features=2, width=2, extra=True, initial=True, masked=True)
    x = inputs(case, torch.float32, device)
    tokens = [getattr(x, name) for name in LEAVES[:8]]
    leaves = [y.detach().clone().requires_grad_() for y in tokens]
    sinks = [y.detach().clone().requires_grad_() for y in (x.sink_k, x.sink_v) if y is not None]
    initial = [y.detach().clone().requires_grad_() for y in (x.M, x.z) if y is not None]
    options = (1, 0, 1.0, 1e4, "ieee", 0, 0)
    given = (*leaves, x.mask, x.mask, *sinks, x.sink_seen, x.blocks, *initial, x.n, None, *options)
    torch.library.opcheck(library.forward, given)
    made = library.forward(*(y.detach() if isinstance(y, Tensor) else y for y in given))
    saved = [dict(zip(library.fused.Forward._fields, made, strict=True))[name] for name in library.SAVED]
    near = [*tokens[:5], *tokens[6:8], x.mask, x.sink_k, x.sink_v, x.sink_seen, x.blocks, None]
    gradients = (saved, x.out, x.final_M, x.final_z, *options[:3], *options[4:])
    torch.library.opcheck(library.backward, (*near, *gradients))
    assert x.mass is not None
    assert x.answer is not None
    one = (x.q[:, 0], x.k, x.v, x.phi_q[:, 0], x.answer[:, 0], x.mass[:, 0], x.mask)
    held = (x.M, x.z, x.n, x.blocks, x.sink_k, x.sink_v, x.sink_seen)
    torch.library.opcheck(library.step, (*one, *held, 1.0))


@pytest.mark.gpu
def test_nothing_waits_for_the_gpu() -> None:
    case = Case(200, 32, 32, sinks=4, heads=4, groups=2, masked=True, spoiled=True, initial=True, extra=True)
    x = inputs(case, torch.bfloat16, "cuda")
    outcome(backend("auto"), x, case)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        outcome(backend("auto"), x, case)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [(), (0, 1000, 1001, 4100)])
def test_a_gpu_runs_the_fused_form_of_long_sequences(packed: tuple[int, ...]) -> None:
    sizes = {"heads": 8, "groups": 2, "keys": 64, "features": 128, "width": 64}
    case = Case(4100, 32, 64, sinks=4, packed=packed, **sizes)
    x = inputs(case, torch.bfloat16, "cuda")
    want = outcome(backend("chunk"), wide(x), case)
    compare(outcome(backend("auto"), x, case), want, torch.bfloat16, "cuda")


def call(**changes: object) -> tuple:
    """`window_linear_attention` on B 2, T 5, H 4, G 2, K 6, F 7, D 3, but for `changes`."""
    arguments: dict = {
        "q": torch.rand(2, 5, 4, 6),
        "k": torch.rand(2, 5, 2, 6),
        "v": torch.rand(2, 5, 2, 3),
        "phi_q": torch.rand(2, 5, 4, 7),
        "phi_k": torch.rand(2, 5, 2, 7),
        "block": 2,
        "window": 2,
    }
    return window_linear_attention(**(arguments | changes))


STATE = WindowLinearState(
    torch.zeros(2, 2, 7, 3), torch.zeros(2, 2, 7), torch.zeros(2, 2, dtype=torch.int64), torch.tensor([0, 3]),
    torch.zeros(2, 1, 2, 6), torch.zeros(2, 1, 2, 3), torch.ones(2, 1, 2, dtype=torch.bool),
)  # fmt: skip
REFUSED = {
    "not_a_tensor": ({"q": None}, r"q is a NoneType; expected a tensor"),
    "dimensions": ({"q": torch.rand(5, 4, 6)}, r"q has shape \[5, 4, 6\], 3 dimensions"),
    "no_tokens": ({"q": torch.rand(2, 0, 4, 6)}, r"q has shape \[2, 0, 4, 6\].*0"),
    "heads": ({"q": torch.rand(2, 5, 3, 6)}, r"q has shape .* multiple of G = 2"),
    "dtype": (
        {"v": torch.rand(2, 5, 2, 3).half()},
        r"v \[2, 5, 2, 3\] is torch.float16; expected torch.float32",
    ),
    "device": ({"phi_k": torch.rand(2, 5, 2, 7, device="meta")}, r"phi_k .* is on meta; expected cpu"),
    "features": (
        {"phi_k": torch.rand(2, 5, 2, 6)},
        r"phi_k has shape \[2, 5, 2, 6\]; expected .*\[2, 5, 2, 7\]",
    ),
    "features_of_q": ({"phi_q": torch.rand(2, 5, 2, 7)}, r"phi_q has shape .*\[2, 5, 4, any\]"),
    "write_gate": ({"write_gate": torch.rand(2, 5, 4)}, r"write_gate has shape .*\[B, T, G\] = \[2, 5, 2\]"),
    "extra": ({"extra": torch.rand(2, 5, 4, 3)}, r"extra is a Tensor; expected a pair of tensors or None"),
    "extra_answer": (
        {"extra": (torch.rand(2, 5, 2, 3), torch.rand(2, 5, 4))},
        r"extra\[0\] has shape \[2, 5, 2, 3\]; expected \[B, T, H, D\] = \[2, 5, 4, 3\]",
    ),
    "extra_mass": (
        {"extra": (torch.rand(2, 5, 4, 3), torch.rand(2, 5, 2))},
        r"extra\[1\] has shape \[2, 5, 2\]; expected \[B, T, H\] = \[2, 5, 4\]",
    ),
    "extra_nothing": ({"extra": (None, None)}, r"extra\[0\] is a NoneType"),
    "mask": ({"mask": torch.ones(2, 5)}, r"mask .* is torch.float32; expected torch.bool"),
    "block": ({"block": 0}, r"block=0 is not possible; expected a whole number of at least 1"),
    "window": ({"window": -2}, r"window=-2 is not possible; expected a whole number of at least 0"),
    "window_and_block": ({"window": 3}, r"window=3 is not possible; expected a multiple of block=2"),
    "sinks": ({"sinks": 3}, r"sinks=3 is not possible; expected at most block=2"),
    "sinks_type": ({"sinks": True}, r"sinks=True is not possible"),
    "scale": ({"scale": 0.0}, r"scale=0.0 is not possible; expected a finite number above 0"),
    "scale_type": ({"scale": "1"}, r"scale='1' is not possible; expected a finite number above 0, or None"),
    "clamp_type": ({"clamp": "1"}, r"clamp='1' is not possible; expected a finite number above 0"),
    "clamp": ({"clamp": 0.0}, r"clamp=0.0 is not possible; expected a finite number above 0"),
    "packed_rows": ({"cu_seqlens": torch.tensor([0, 5])}, r"q has shape .* with B = 1 beside cu_seqlens"),
    "state": ({"initial_state": STATE[:3]}, r"initial_state is a tuple; expected a WindowLinearState"),
    "state_batch": (
        {"initial_state": STATE._replace(M=torch.zeros(1, 2, 7, 3))},
        r"initial_state.M has shape \[1, 2, 7, 3\]; expected \[B, G, F, D\] = \[2, 2, 7, 3\]",
    ),
    "state_blocks": (
        {"initial_state": STATE._replace(blocks=torch.zeros(2, dtype=torch.int32))},
        r"initial_state.blocks \[2\] is torch.int32; expected torch.int64",
    ),
    "state_sinks": (
        {"initial_state": STATE, "sinks": 2},
        r"initial_state.sink_k has shape \[2, 1, 2, 6\]; expected \[B, sinks, G, K\] = \[2, 2, 2, 6\]",
    ),
    "state_no_sinks": (
        {"initial_state": STATE[:4], "sinks": 1},
        r"initial_state.sink_k is a NoneType; expected a tensor \[B, sinks, G, K\]",
    ),
    "backend": ({"backend": "fla"}, r"backend='fla' is not possible; expected one of auto, triton, chunk"),
    "precision": ({"input_precision": "fp8"}, r"input_precision='fp8' is not possible; expected one of None"),
    "wide": (
        {"q": torch.rand(2, 5, 4, 1025), "k": torch.rand(2, 5, 2, 1025), "backend": "triton"},
        "window_linear_attention: K, F or D is above 1024",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_wrong_is_named(name: str) -> None:
    changes, words = REFUSED[name]
    with pytest.raises(ValueError, match=words):
        call(**changes)


@pytest.mark.parametrize("name", ["reference", "chunk", pytest.param("triton", marks=pytest.mark.interpret)])
def test_wrong_borders_are_named(name: str) -> None:
    x = inputs(Case(5, 2))
    given = (y.float() for y in (x.q, x.k, x.v, x.phi_q, x.phi_k))
    with pytest.raises(ValueError, match=r"cu_seqlens ends with 4; expected T = 5"):
        window_linear_attention(*given, block=2, window=0, cu_seqlens=torch.tensor([0, 4]), backend=name)


def test_a_step_names_what_is_wrong() -> None:
    q, k, v, phi_q = torch.rand(2, 4, 6), torch.rand(2, 5, 2, 6), torch.rand(2, 5, 2, 3), torch.rand(2, 4, 7)
    with pytest.raises(
        ValueError, match=r"state.z has shape \[2, 2, 5\]; expected \[B, G, F\] = \[2, 2, 7\]"
    ):
        window_linear_attention_step(q, k, v, phi_q, STATE._replace(z=torch.zeros(2, 2, 5)))
    with pytest.raises(ValueError, match=r"v has shape \[2, 4, 2, 3\]; expected .* = \[2, 5, 2, any\]"):
        window_linear_attention_step(q, k, v[:, :4], phi_q, STATE)
    with pytest.raises(ValueError, match=r"k has shape \[2, 0, 2, 6\].*, no size of which may be 0"):
        window_linear_attention_step(q, k[:, :0], v[:, :0], phi_q, STATE)
    with pytest.raises(ValueError, match=r"mask has shape \[2, 4\]; expected \[B, W\] = \[2, 5\]"):
        window_linear_attention_step(q, k, v, phi_q, STATE, mask=torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="state is a Tensor; expected a WindowLinearState"):
        window_linear_attention_step(q, k, v, phi_q, q)  # type: ignore[arg-type]


@pytest.mark.interpret
def test_a_step_with_gradients_has_no_triton_form() -> None:
    q, k, v, phi_q = torch.rand(2, 4, 6), torch.rand(2, 5, 2, 6), torch.rand(2, 5, 2, 3), torch.rand(2, 4, 7)
    with pytest.raises(ValueError, match="a gradient is asked for"):
        window_linear_attention_step(q.requires_grad_(), k, v, phi_q, STATE, backend="triton")
    with torch.no_grad():
        window_linear_attention_step(q, k, v, phi_q, STATE, backend="triton")
