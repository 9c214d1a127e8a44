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
        70, 8, 16, sinks=3, heads=4, groups=2, width=24, masked=True, initial=True
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
    "dims_128": Case(33, 16, heads=1, keys=128, features=128, width=128),
    "dims_256": Case(20, 8, heads=1, keys=256, features=256, width=256, sinks=1),
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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", CASES)
def test_blocks_equal_token_by_token(name: str, dtype: torch.dtype) -> None:
    x = inputs(CASES[name], dtype)
    want = outcome(backend("reference"), wide(x), CASES[name])
    compare(outcome(backend("chunk"), x, CASES[name]), want, dtype)


@pytest.mark.parametrize(("device", "dtype"), FUSED)
@pytest.mark.parametrize("name", CASES)
def test_fused_equals_token_by_token(name: str, device: str, dtype: torch.dtype) -> None:
    x = inputs(CASES[name], dtype, device)
    want = outcome(backend("reference"), wide(x), CASES[name])
    compare(outcome(backend("triton"), x, CASES[name]), want, dtype, device)
