"""The Infini memory: all forms against the definition, in values and gradients, split, masked and guarded."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from kernels import InfiniState, infini_memory, infini_memory_step
from kernels.infini_memory import chunk, op
from kernels.packing import Rows
from kernels.testing import assert_close, poisoned, tolerance

Result = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """The sizes of a call and what it uses."""

    length: int
    block: int
    lookback: int = 0
    heads: int = 2
    groups: int = 1
    features: int = 8
    width: int = 8
    batch: int = 1
    masked: bool = False
    initial: bool = True
    gated: bool = True
    per_head: bool = False
    clamp: float = 1e4
    spoiled: bool = False
    packed: tuple[int, ...] = ()

    @property
    def states(self) -> int:
        """N, of which there are as many states: rows, or packed sequences."""
        return len(self.packed) - 1 if self.packed else self.batch


CASES = {
    "one_token": Case(1, 8),
    "below_a_block": Case(7, 8, initial=False, spoiled=True),
    "a_block": Case(8, 8, per_head=True),
    "above_a_block": Case(9, 8, batch=2, gated=False),
    "blocks_in_a_span": Case(67, 16, lookback=1, masked=True),
    "two_spans": Case(70, 8, lookback=2, heads=4, groups=2, width=24, masked=True),
    "blocks_of_one": Case(5, 1, gated=False, initial=False),
    "blocks_that_fill_no_tile": Case(50, 24, spoiled=True),
    "a_block_of_two_tiles": Case(140, 100, heads=1, spoiled=True),
    "all_outside": Case(20, 4, lookback=9),
    "clamped": Case(45, 12, lookback=1, clamp=0.7, batch=2, spoiled=True, masked=True),
    "clamped_blocks_of_two_tiles": Case(140, 70, heads=1, clamp=0.3),
    "packed": Case(41, 4, heads=4, groups=2, masked=True, packed=(0, 3, 4, 17, 26, 34, 41)),
    "packed_lookback": Case(
        42,
        4,
        lookback=1,
        initial=False,
        gated=False,
        per_head=True,
        clamp=0.7,
        spoiled=True,
        packed=(0, 9, 23, 26, 42),
    ),
    "packed_below_a_block": Case(6, 8, masked=True, packed=(0, 5, 6)),
    "dim_64": Case(33, 32, heads=1, features=64, width=64),
    "dims_80_96": Case(20, 8, heads=1, features=80, width=96, initial=False),
    "dim_128": Case(33, 32, heads=1, features=128, width=128),
    "dim_256": Case(20, 16, heads=1, features=256, width=256),
}
SMALL = ["blocks_in_a_span", "above_a_block", "blocks_that_fill_no_tile", "dims_80_96"]


@dataclass
class Inputs:
    """A call's tensors, and the gradients that its results are given."""

    q: Tensor
    k: Tensor
    v: Tensor
    local: Tensor
    gate: Tensor
    write_gate: Tensor | None
    mask: Tensor | None
    cu_seqlens: Tensor | None
    M: Tensor | None
    z: Tensor | None
    n: Tensor | None
    out: Tensor
    final_M: Tensor
    final_z: Tensor


LEAVES = ("q", "k", "v", "local", "gate", "write_gate", "M", "z")


def inputs(case: Case, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Inputs:
    """Positive features; with NaN where a mask leaves tokens out, and tokens that must not be written."""
    draw = torch.Generator().manual_seed(case.length * 1000 + case.features)
    single = torch.float64 if dtype == torch.float64 else torch.float32

    def new(*shape: int, positive: bool = False, kind: torch.dtype = dtype) -> Tensor:
        x = torch.randn(*shape, generator=draw, dtype=torch.float64)
        return (x.abs() + 0.1 if positive else x).to(kind).to(device)

    rows, groups = (case.batch, case.length), case.groups
    state = (case.states, groups, case.features)
    k, v = new(*rows, groups, case.features, positive=True), new(*rows, groups, case.width)
    write_gate = new(*rows, groups, kind=single).sigmoid() if case.gated else None
    mask = None
    if case.masked:
        mask = (torch.rand(*rows, generator=draw) > 1 / 3).to(device)
        k[~mask], v[~mask] = torch.nan, torch.inf
    if case.spoiled:
        k[0, 1, 0, 0], v[-1, 2, -1, 0], k[0, 3, 0, 1] = torch.nan, torch.inf, -torch.inf
        if write_gate is not None:
            write_gate[0, 4, 0] = torch.nan
        if dtype != torch.float16:
            v[0, 5, 0, 1] = 2e15
    count = torch.rand(state[:2], generator=draw, dtype=torch.float64).to(device) * 5
    return Inputs(
        q=new(*rows, case.heads, case.features, positive=True),
        k=k,
        v=v,
        local=new(*rows, case.heads, case.width),
        gate=new(*([] if case.per_head else rows), case.heads, kind=single).sigmoid(),
        write_gate=write_gate,
        mask=mask,
        cu_seqlens=torch.tensor(case.packed, device=device) if case.packed else None,
        M=new(*state, case.width, kind=single) if case.initial else None,
        z=new(*state, positive=True, kind=single) if case.initial else None,
        n=count if case.initial else None,
        out=new(*rows, case.heads, case.width),
        final_M=new(*state, case.width, kind=single) / 10,
        final_z=new(*state, kind=single) / 10,
    )


def wide(x: Inputs) -> Inputs:
    """The same numbers in fp64 on the CPU: what the truth is computed from."""
    moved = {
        name: value.cpu().double() if value.is_floating_point() else value.cpu()
        for name, value in vars(x).items()
        if value is not None
    }
    return replace(x, **moved)


Form = Callable[..., tuple[Tensor, InfiniState, op.InfiniCounters]]


def outcome(form: Form, x: Inputs, case: Case) -> Result:
    """Values, counts and gradients of one form. `form(q, ..., initial_state=...)` is as `infini_memory`."""
    leaves = {
        name: value.detach().clone().requires_grad_()
        for name, value in vars(x).items()
        if name in LEAVES and value is not None
    }
    initial = None if x.n is None else InfiniState(leaves["M"], leaves["z"], x.n)
    out, state, counters = form(
        *(leaves[name] for name in ("q", "k", "v", "local", "gate")),
        block=case.block,
        lookback=case.lookback,
        write_gate=leaves.get("write_gate"),
        mask=x.mask,
        cu_seqlens=x.cu_seqlens,
        initial_state=initial,
        clamp=case.clamp,
    )
    assert not state.n.requires_grad
    given = [(out, x.out), (state.M, x.final_M), (state.z, x.final_z)]
    results, gradients = zip(*((a, b) for a, b in given if a.requires_grad), strict=True)
    torch.autograd.backward(results, gradients)
    found = {"out": out, "M": state.M, "z": state.z, "n": state.n}
    found |= {name: getattr(counters, name).double() for name in counters._fields}
    for name, leaf in leaves.items():
        found[f"d{name}"] = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
    return found


def compare(got: Result, want: Result, dtype: torch.dtype, device: str = "cpu") -> None:
    """Everything in `want`, each at its tolerance; counts exactly."""
    assert got.keys() == want.keys()
    for name, value in want.items():
        if name in op.InfiniCounters._fields:
            assert torch.equal(got[name].cpu(), value.cpu()), name
        else:
            assert_close(name, got[name], value, tolerance(dtype, device, name.startswith("d")))


def each_alone(form: Form) -> Form:
    """`form`, given packed sequences one at a time."""

    def run(*tokens: Tensor, cu_seqlens: Tensor, **options: object) -> tuple:
        found, initial = [], options.pop("initial_state")
        *tokens, gate = tokens
        for i, (start, stop) in enumerate(pairwise(cu_seqlens.tolist())):
            own = {"initial_state": InfiniState(*(y[i : i + 1] for y in initial)) if initial else None}  # type: ignore[attr-defined]
            for name in ("write_gate", "mask"):
                y = options[name]
                own[name] = y[:, start:stop] if isinstance(y, Tensor) else None  # type: ignore[assignment]
            share = gate if gate.dim() == 1 else gate[:, start:stop]
            found.append(form(*(y[:, start:stop] for y in tokens), share, **(options | own)))
        outs, states, counters = zip(*found, strict=True)
        return (
            torch.cat(outs, 1),
            InfiniState(*map(torch.cat, zip(*states, strict=True))),
            op.InfiniCounters(*map(torch.cat, zip(*counters, strict=True))),
        )

    return run


def definition(
    q: Tensor, k: Tensor, v: Tensor, local: Tensor, gate: Tensor, *, block: int, lookback: int,
    write_gate: Tensor | None, mask: Tensor | None, initial_state: InfiniState | None, clamp: float,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, InfiniState, op.InfiniCounters]:  # fmt: skip
    """Without a recurrence: each query weighs every token of the blocks that have left before its own."""
    if cu_seqlens is not None:
        return each_alone(definition)(
            q, k, v, local, gate, block=block, lookback=lookback, write_gate=write_gate, mask=mask,
            initial_state=initial_state, clamp=clamp, cu_seqlens=cu_seqlens,
        )  # fmt: skip
    (batch, length), groups = q.shape[:2], k.shape[2]
    weight = torch.ones_like(k[..., 0]) if write_gate is None else write_gate
    sound = (k.abs() < 1e15).all(-1) & (v.abs() < 1e15).all(-1) & weight.isfinite()
    there = torch.ones(batch, length, 1, dtype=torch.bool) if mask is None else mask[..., None]
    k, v = (torch.where((there & sound)[..., None], x, 0) for x in (k, v))
    weight = torch.where(there & sound, weight, 0)
    place = torch.arange(length) // block
    whole = length // block - lookback
    clamped = torch.zeros(batch, groups, dtype=torch.int64)
    share = weight.clone()
    for i in range(max(0, whole)):
        own = (place == i)[None, :, None]
        n = torch.where(own, weight, 0).sum(1).detach()
        z = torch.einsum("btg,btgf->bgf", torch.where(own, weight, 0), k) / n.clamp_min(1e-30)[..., None]
        M = torch.einsum("btg,btgf,btgd->bgfd", torch.where(own, weight, 0), k, v)
        M = M / n.clamp_min(1e-30)[..., None, None]
        most = torch.maximum(M.abs().amax((-1, -2)), z.abs().amax(-1)).detach()
        clamped += most > clamp
        share = torch.where(own, share * (clamp / most.clamp_min(clamp))[:, None], share)
    first = InfiniState.empty(batch, groups, k.shape[-1], v.shape[-1], q.device, q.dtype)
    M0, z0, n0 = initial_state or first
    outs = []
    for t in range(length):
        seen = torch.where((place < int(place[t]) - lookback)[None, :, None], share, 0)
        n = n0 + torch.where(seen > 0, weight, 0).sum(1).detach()
        each = torch.einsum("bhf,btgf->bthg", q[:, t], k) * seen[:, :, None]
        own = torch.arange(groups).repeat_interleave(q.shape[2] // groups)
        each = torch.stack([each[:, :, h, g] for h, g in enumerate(own.tolist())], 2)  # [B, T, H]
        top = torch.einsum("bth,bthd->bhd", each, v[:, :, own])
        top = top + torch.einsum("bhf,bhfd->bhd", q[:, t], (M0 * n0[..., None, None])[:, own])
        down = each.sum(1) + torch.einsum("bhf,bhf->bh", q[:, t], (z0 * n0[..., None])[:, own])
        empty = (down <= 1e-9 * n[:, own])[..., None]
        g = (gate if gate.dim() == 1 else gate[:, t])[..., None]
        answer = top / torch.where(empty, 1, down[..., None])
        outs.append(torch.where(empty, local[:, t], g * answer + (1 - g) * local[:, t]))
    left = (place < whole)[None, :, None]
    written = torch.where(left, share, 0)
    n = n0 + torch.where(left, weight, 0).sum(1).detach()
    safe = n.clamp_min(1e-30)
    M = torch.einsum("btg,btgf,btgd->bgfd", written, k, v) + M0 * n0[..., None, None]
    z = torch.einsum("btg,btgf->bgf", written, k) + z0 * n0[..., None]
    lost = (there & ~sound & left).sum(1)
    counters = op.InfiniCounters(clamped, lost)
    return torch.stack(outs, 1), InfiniState(M / safe[..., None, None], z / safe[..., None], n), counters


def backend(name: str) -> Form:
    """`infini_memory` with a form forced."""
    return lambda *args, **kwargs: infini_memory(*args, backend=name, **kwargs)


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
    case = replace(CASES[name], features=min(CASES[name].features, 24), width=min(CASES[name].width, 24))
    x = inputs(case)
    compare(outcome(backend("reference"), x, case), outcome(definition, x, case), torch.float64)


@pytest.mark.parametrize("name", ["reference", "chunk"])
@pytest.mark.parametrize("case", [name for name in CASES if CASES[name].packed])
def test_a_packed_sequence_is_the_sequence_alone(case: str, name: str) -> None:
    x = inputs(CASES[case])
    want = outcome(each_alone(backend(name)), x, CASES[case])
    compare(outcome(backend(name), x, CASES[case]), want, torch.float64)


def test_what_a_short_sequence_does_not_write_is_not_counted() -> None:
    case = CASES["packed_lookback"]
    found = outcome(backend("chunk"), inputs(case), case)
    assert found["nonfinite"].flatten().tolist() == [3, 0, 0, 0]
    assert (found["n"] > 0).flatten().tolist() == [True, True, False, True]
    assert found["clamped"].sum() > 1


def test_one_long_sequence_among_short_ones_costs_less_than_twice_the_tokens() -> None:
    lengths = [1000, *[1] * 200, 17, 31, 16]
    borders = torch.tensor([0, *lengths]).cumsum(0)
    rows = Rows.of(borders, borders.tolist(), sum(lengths))
    assert rows.shapes == [(200, 1), (3, 31), (1, 1000)]
    x = torch.arange(sum(lengths)).view(1, -1) + 1
    laid = rows.lay(x)
    assert torch.equal(laid[2], x[:, :1000])
    assert laid[1][0].tolist() == [*x[0, -16:].tolist(), *[0] * 15]
    assert torch.equal(rows.tokens(laid), x)


def test_borders_that_are_not_read_keep_tokens_in_place_and_wrong_ones_in_bounds() -> None:
    x = torch.arange(7).view(1, -1) + 1
    rows = Rows.of(torch.tensor([0, 4, 7]), None, 7)
    assert rows.lay(x)[0].tolist() == [[5, 6, 7, 0, 0, 0, 0], [1, 2, 3, 4, 0, 0, 0]]
    assert torch.equal(rows.tokens(rows.lay(x)), x)
    for wrong in ([3, 9, 1, -2], [7, 0], [5, 5, 5]):
        rows = Rows.of(torch.tensor(wrong), None, 7)
        assert rows.tokens(rows.lay(x)).shape == x.shape


def test_a_block_far_longer_than_the_text_costs_no_memory() -> None:
    case = Case(7, 10**12, masked=True)
    x = inputs(case)
    compare(outcome(backend("chunk"), x, case), outcome(backend("reference"), x, case), torch.float64)
    case = replace(case, lookback=10**12, packed=(0, 3, 7))
    x = inputs(case)
    compare(outcome(backend("chunk"), x, case), outcome(backend("reference"), x, case), torch.float64)


def test_the_cases_see_the_guard() -> None:
    case = CASES["clamped"]
    found = outcome(backend("reference"), inputs(case), case)
    assert found["clamped"].sum() > 1
    assert found["nonfinite"].sum() > 1
    assert found["nonfinite"][1] < found["nonfinite"][0]
    for name in ("two_spans", "dim_64"):
        assert outcome(backend("reference"), inputs(CASES[name]), CASES[name])["clamped"].sum() == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_blocks_equal_token_by_token(name: str, dtype: torch.dtype) -> None:
    x = inputs(CASES[name], dtype)
    want = outcome(backend("reference"), wide(x), CASES[name])
    compare(outcome(backend("chunk"), x, CASES[name]), want, dtype)


@pytest.mark.parametrize("piece", [1, 40, 300])
def test_no_size_of_piece_matters(piece: int) -> None:
    case = replace(CASES["two_spans"], batch=3)
    x = inputs(case)

    def form(*args: Tensor, block: int, lookback: int, clamp: float, **given: Tensor | InfiniState) -> tuple:
        rest = (given["write_gate"], given["mask"], given["initial_state"], block, lookback, clamp)
        out, state, counters = chunk.infini_memory(*args, *rest, piece=piece)  # type: ignore[arg-type]
        return out, InfiniState(state.M, state.z, state.n.detach()), counters

    compare(outcome(form, x, case), outcome(backend("reference"), x, case), torch.float64)


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


@pytest.mark.parametrize(("device", "dtype"), FUSED)
@pytest.mark.parametrize(("width", "segments", "block"), [(16, 2, 32), (32, 3, 70)])
def test_no_cut_of_the_fused_form_matters(
    width: int, segments: int, block: int, device: str, dtype: torch.dtype
) -> None:
    case = Case(200, block, lookback=1, heads=1, features=40, width=24)
    x = inputs(case, dtype, device)

    def form(q: Tensor, k: Tensor, v: Tensor, local: Tensor, gate: Tensor, **given: object) -> tuple:
        names = ("write_gate", "mask", "initial_state", "block", "lookback", "clamp")
        rest = (given[name] for name in names)
        return op._triton(q, k, v, local, gate, *rest, "ieee", width, segments)  # type: ignore[arg-type]

    want = outcome(backend("reference"), wide(x), case)
    compare(outcome(form, x, case), want, dtype, device)


@pytest.mark.parametrize(("name", "device", "dtype"), FORMS)
def test_split_and_resumed_is_the_whole(name: str, device: str, dtype: torch.dtype) -> None:
    case = Case(39, 4, lookback=2, batch=2, initial=False)
    x = inputs(case, dtype, device)
    assert x.write_gate is not None
    options = {"block": 4, "lookback": 2, "backend": name}
    given = (x.q, x.k, x.v, x.local, x.gate, x.write_gate)
    *first, write_gate = given
    want, last, _ = infini_memory(*first, write_gate=write_gate, **options)  # type: ignore[arg-type]
    outs, state, done, kept = [], None, 0, 0
    for stop in (18, 20, 39):
        *first, write_gate = (y[:, kept:stop] for y in given)
        out, state, _ = infini_memory(*first, write_gate=write_gate, initial_state=state, **options)  # type: ignore[arg-type]
        outs.append(out[:, done - kept :])
        done, kept = stop, kept + max(0, (stop - kept) // 4 - 2) * 4
    assert state is not None
    limit = tolerance(dtype, device)
    assert_close("out", torch.cat(outs, 1), want, limit)
    for part in ("M", "z", "n"):
        assert_close(part, getattr(state, part), getattr(last, part), limit)


@pytest.mark.parametrize(("name", "device", "dtype"), FORMS)
def test_one_token_at_a_time_is_the_whole(name: str, device: str, dtype: torch.dtype) -> None:
    case = Case(5, 2, heads=4, groups=2, features=24, width=40)
    x = inputs(case, dtype, device)
    assert x.M is not None
    assert x.z is not None
    assert x.n is not None
    empty = InfiniState(torch.zeros_like(x.M), torch.zeros_like(x.z), torch.zeros_like(x.n))
    for state in (InfiniState(x.M, x.z, x.n), empty):
        options = {"write_gate": x.write_gate, "block": 2, "initial_state": state}
        want, _, _ = infini_memory(x.q, x.k, x.v, x.local, x.gate, backend="reference", **options)  # type: ignore[arg-type]
        for t in range(case.length):
            got = infini_memory_step(x.q[:, t], x.local[:, t], x.gate[:, t], state, backend=name)
            assert_close(f"out {t}", got, want[:, t], tolerance(dtype, device))
            if t % 2 == 1:
                assert x.write_gate is not None
                given = (y[:, t - 1 : t + 1] for y in (x.q, x.k, x.v, x.local, x.gate))
                options = {"write_gate": x.write_gate[:, t - 1 : t + 1], "block": 2, "initial_state": state}
                _, state, _ = infini_memory(*given, backend=name, **options)  # type: ignore[arg-type]
    single = x.gate[0, 0].expand(1, -1)
    assert_close(
        "per head",
        infini_memory_step(x.q[:, 0], x.local[:, 0], x.gate[0, 0], (x.M, x.z, x.n), backend=name),
        infini_memory_step(x.q[:, 0], x.local[:, 0], single, (x.M, x.z, x.n)),
        tolerance(dtype, device),
    )


@pytest.mark.parametrize(("name", "device", "dtype"), FORMS)
def test_the_future_changes_no_bit(name: str, device: str, dtype: torch.dtype) -> None:
    x = inputs(Case(20, 4, lookback=1), dtype, device)
    given = (x.q, x.k, x.v, x.local, x.gate)
    want, _, _ = infini_memory(*given, block=4, lookback=1, backend=name)
    for t in (3, 8):
        q, k, v, local, gate = (y.clone() for y in given)
        q[:, t:], k[:, t:], v[:, t:], local[:, t:] = torch.nan, torch.nan, torch.inf, 7.0
        out, _, _ = infini_memory(q, k, v, local, gate, block=4, lookback=1, backend=name)
        assert torch.equal(out[:, :t], want[:, :t])
        own = (t // 4 + 2) * 4  # what a block's own tokens change is read L + 1 blocks later
        q[:, t:], local[:, t:] = x.q[:, t:], x.local[:, t:]
        out, _, _ = infini_memory(q, k, v, local, gate, block=4, lookback=1, backend=name)
        assert torch.equal(out[:, :own], want[:, :own])
        assert out.isfinite().all()


@pytest.mark.parametrize(("name", "device", "dtype"), FORMS)
def test_a_bad_token_is_left_out_of_its_row_and_head_only(name: str, device: str, dtype: torch.dtype) -> None:
    x = inputs(Case(20, 4, heads=4, groups=2, batch=2, initial=False), dtype, device)
    options = {"write_gate": x.write_gate, "block": 4, "backend": name}
    want = infini_memory(x.q, x.k, x.v, x.local, x.gate, **options)  # type: ignore[arg-type]
    for spoil in (torch.nan, torch.inf, -3e15):
        v = x.v.clone()
        v[1, 5, 0, 2] = spoil
        got = infini_memory(x.q, x.k, v, x.local, x.gate, **options)  # type: ignore[arg-type]
        assert got[2].nonfinite.tolist() == [[0, 0], [1, 0]]
        assert int(got[2].clamped.sum()) == 0
        assert torch.equal(got[0][0], want[0][0])
        assert torch.equal(got[0][1, :, 2:], want[0][1, :, 2:])
        assert got[0].isfinite().all()
        assert not torch.equal(got[0][1, 8:, :2], want[0][1, 8:, :2])
        mask = torch.ones(2, 20, dtype=torch.bool, device=device)
        mask[1, 5] = False
        left = infini_memory(x.q, x.k, x.v, x.local, x.gate, mask=mask, **options)  # type: ignore[arg-type]
        for one, other in zip((got[0], *got[1]), (left[0], *left[1]), strict=True):
            if one.dim() == 4 and one.shape[1] == 20:
                assert torch.equal(one[1, :, :2], other[1, :, :2])
            else:
                assert torch.equal(one[1, 0], other[1, 0])


@pytest.mark.parametrize(("name", "device", "dtype"), FORMS)
def test_equal_calls_give_equal_bits_and_strides_do_not_matter(
    name: str, device: str, dtype: torch.dtype
) -> None:
    case = Case(13, 4, lookback=1, heads=4, groups=2, batch=2)
    x = inputs(case, dtype, device)
    first, second = (outcome(backend(name), x, case) for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)
    for part in ("q", "k", "v", "local", "gate", "write_gate", "M", "z", "out"):
        y = getattr(x, part)
        setattr(x, part, y.transpose(1, 2).contiguous().transpose(1, 2))
        assert not getattr(x, part).is_contiguous()
    compare(outcome(backend(name), x, case), first, dtype, device)


@pytest.mark.parametrize(("name", "device", "dtype"), FORMS)
def test_an_empty_memory_gives_the_local_output(name: str, device: str, dtype: torch.dtype) -> None:
    x = inputs(Case(12, 4, initial=False), dtype, device)
    leaves = [y.clone().requires_grad_() for y in (x.q, x.k, x.v, x.local, x.gate)]
    mask = torch.arange(12, device=device).unsqueeze(0) >= 4
    out, _, _ = infini_memory(*leaves, block=4, mask=mask, backend=name)
    assert torch.equal(out[:, :8], x.local[:, :8])
    assert not torch.equal(out[:, 8:], x.local[:, 8:])
    slope = torch.ones_like(out)
    slope[:, 3] = torch.inf
    out.backward(slope)
    q, _, _, local, gate = (leaf.grad for leaf in leaves)
    assert q is not None
    assert local is not None
    assert gate is not None
    for gradient in (q, gate):
        assert torch.equal(gradient[:, :8], torch.zeros_like(gradient[:, :8]))
        assert gradient[:, 8:].abs().min() > 0
    assert torch.equal(local[:, :8], slope[:, :8])
    spoiled, _, _ = infini_memory(x.q * torch.nan, x.k, x.v, x.local, x.gate, block=4, backend=name)
    assert spoiled[:, 4:].isnan().all(), "a NaN is not an empty memory"


@pytest.mark.parametrize(("name", "device", "dtype"), FORMS)
def test_a_read_lies_within_the_values_however_limited(name: str, device: str, dtype: torch.dtype) -> None:
    x = inputs(Case(24, 4, initial=False), dtype, device)
    ones = torch.ones_like(x.gate)
    for clamp in (1e4, 0.1):
        out, state, counters = infini_memory(x.q, x.k, x.v, x.local, ones, block=4, clamp=clamp, backend=name)
        assert (out[:, 4:] <= x.v.amax(1) + 1e-5).all()
        assert (out[:, 4:] >= x.v.amin(1) - 1e-5).all()
        assert state.M.abs().max() <= clamp * (1 + 1e-6)
        assert state.z.abs().max() <= clamp * (1 + 1e-6)
        assert int(counters.clamped.sum()) == (6 if clamp < 1 else 0)


@pytest.mark.parametrize(("name", "device", "dtype"), FORMS)
def test_a_gradient_may_reach_one_result_alone(name: str, device: str, dtype: torch.dtype) -> None:
    x = inputs(Case(9, 4, initial=False), dtype, device)
    v = x.v.clone().requires_grad_()
    _, state, _ = infini_memory(x.q, x.k, v, x.local, x.gate, block=4, backend=name)
    (only_M,) = torch.autograd.grad(state.M, v, x.final_M)
    want = torch.einsum("btgf,bgfd->btgd", x.k[:, :8], x.final_M.to(dtype)) / 8
    assert_close("dv", only_M[:, :8], want, tolerance(dtype, device, True))
    assert torch.equal(only_M[:, 8:], torch.zeros_like(only_M[:, 8:]))


def test_gradients_of_blocks_equal_differences() -> None:
    case = Case(7, 2, lookback=1, features=3, width=2)
    x = inputs(case)
    leaves = [x.q, x.k, x.v, x.local, x.gate, x.write_gate, x.M, x.z]

    def call(*given: Tensor) -> tuple[Tensor, ...]:
        *first, write_gate, M, z = given
        initial = InfiniState(M, z, x.n)  # type: ignore[arg-type]
        options = {"write_gate": write_gate, "initial_state": initial, "backend": "chunk"}
        out, state, _ = infini_memory(*first, block=2, lookback=1, **options)  # type: ignore[arg-type]
        return out, state.M * state.n[..., None, None], state.z * state.n[..., None]

    assert torch.autograd.gradcheck(call, [y.requires_grad_() for y in leaves if y is not None])


def test_long_text_neither_overflows_fp16_nor_loses_the_mean() -> None:
    length = 20_000
    q, k = (torch.full((1, length, 1, 4), 30.0, dtype=torch.float16) for _ in range(2))
    v = torch.full((1, length, 1, 4), 100.0, dtype=torch.float16)
    gate = torch.ones(1)
    out, state, _ = infini_memory(q, k, v, v * 0, gate, block=1000, backend="chunk")
    assert torch.equal(out[:, 1000:], v[:, 1000:])
    assert_close("M", state.M, torch.full_like(state.M, 3000), 1e-6)
    assert float(state.n) == length


def test_autocast_does_not_reach_the_state() -> None:
    x = inputs(Case(20, 4), torch.float32)
    given = (x.q, x.k, x.v, x.local, x.gate)
    want = infini_memory(*given, block=4, backend="chunk")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = infini_memory(*given, block=4, backend="chunk")
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1].M, want[1].M)


@pytest.mark.parametrize(
    "name",
    [
        "chunk",
        pytest.param("triton", marks=pytest.mark.interpret),
        pytest.param("auto", marks=pytest.mark.gpu),
    ],
)
@pytest.mark.parametrize("packed", [(), (0, 5, 9)])
def test_it_compiles_as_one_graph(name: str, packed: tuple[int, ...]) -> None:
    case = Case(9, 4, masked=True, packed=packed)
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
    from kernels.infini_memory import fused, library

    x = inputs(Case(3, 1, heads=1), torch.float32, device)
    leaves = [y.detach().clone().requires_grad_() for y in (x.q, x.k, x.v, x.local, x.gate)]
    state = [y.detach().clone().requires_grad_() for y in (x.M, x.z) if y is not None]
    mask = torch.tensor([[True, False, True]], device=device)
    options = (1, 0, 1e4, "ieee", 0, 0)
    torch.library.opcheck(library.forward, (*leaves, x.write_gate, mask, *state, x.n, *options))
    given = (x.q, x.k, x.v, x.local, x.gate)
    made = fused.Forward(*library.forward(*given, x.write_gate, None, None, None, None, *options))
    saved = (made.totals, made.answers, made.den, made.weight, made.scale, made.states_M, made.states_z)
    gradients = (x.out, x.final_M, x.final_z, *options[:2], *options[3:])
    torch.library.opcheck(library.backward, (*given, *saved, *gradients))
    torch.library.opcheck(library.step, (x.q[:, 0], x.local[:, 0], x.gate[:, 0], x.M, x.z))


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [(), (0, 70, 80, 200)])
def test_nothing_waits_for_the_gpu(packed: tuple[int, ...]) -> None:
    case = Case(200, 32, lookback=1, heads=4, groups=2, masked=True, spoiled=True, packed=packed)
    x = inputs(case, torch.bfloat16, "cuda")
    leaves = [y.clone().requires_grad_() for y in (x.q, x.k, x.v, x.local, x.gate)]

    def run() -> None:
        options = {"mask": x.mask, "cu_seqlens": x.cu_seqlens}
        out, _, counters = infini_memory(*leaves, block=32, lookback=1, **options)  # type: ignore[arg-type]
        out.backward(x.out)
        counters.clamped.sum()

    run()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_a_gpu_runs_the_fused_form_of_long_sequences() -> None:
    case = Case(4100, 32, lookback=1, heads=8, groups=2, features=128, width=64)
    x = inputs(case, torch.bfloat16, "cuda")
    want = outcome(backend("chunk"), wide(x), case)
    compare(outcome(backend("auto"), x, case), want, torch.bfloat16, "cuda")


def call(**changes: object) -> tuple:
    """`infini_memory` on B 2, T 5, H 4, G 2, F 6, D 3, but for `changes`."""
    arguments: dict = {
        "q": torch.rand(2, 5, 4, 6),
        "k": torch.rand(2, 5, 2, 6),
        "v": torch.rand(2, 5, 2, 3),
        "local": torch.rand(2, 5, 4, 3),
        "gate": torch.rand(4),
        "block": 2,
    }
    return infini_memory(**(arguments | changes))


STATE = (torch.zeros(2, 2, 6, 3), torch.zeros(2, 2, 6), torch.zeros(2, 2, dtype=torch.int64))
REFUSED = {
    "dimensions": ({"q": torch.rand(5, 4, 6)}, r"q has shape \[5, 4, 6\], 3 dimensions"),
    "no_tokens": ({"q": torch.rand(2, 0, 4, 6)}, r"q has shape \[2, 0, 4, 6\].*0"),
    "heads": ({"q": torch.rand(2, 5, 3, 6)}, r"q has shape .* multiple of G = 2"),
    "local": (
        {"local": torch.rand(2, 5, 2, 3)},
        r"local has shape \[2, 5, 2, 3\]; expected .*\[2, 5, 4, 3\]",
    ),
    "local_dtype": ({"local": torch.rand(2, 5, 4, 3).half()}, r"local .* is torch.float16; expected torch.f"),
    "gate": ({"gate": torch.rand(2)}, r"gate has shape \[2\]; expected \[H\] = \[4\]"),
    "gate_token": ({"gate": torch.rand(2, 4, 5)}, r"gate has shape .*; expected \[B, T, H\] = \[2, 5, 4\]"),
    "write_gate": ({"write_gate": torch.rand(2, 5, 4)}, r"write_gate has shape .*\[B, T, G\] = \[2, 5, 2\]"),
    "mask": ({"mask": torch.ones(2, 5)}, r"mask .* is torch.float32; expected torch.bool"),
    "block": ({"block": 0}, r"block=0 is not possible; expected a whole number of at least 1"),
    "block_type": ({"block": 2.0}, r"block=2.0 is not possible"),
    "lookback": ({"lookback": -1}, r"lookback=-1 is not possible; expected a whole number of at least 0"),
    "clamp_type": ({"clamp": None}, r"clamp=None is not possible; expected a finite number above 0"),
    "clamp": ({"clamp": 0.0}, r"clamp=0.0 is not possible; expected a finite number above 0"),
    "state": ({"initial_state": STATE[:2]}, r"initial_state is a tuple; expected InfiniState\(M, z, n\)"),
    "state_batch": (
        {"initial_state": (torch.zeros(1, 2, 6, 3), *STATE[1:])},
        r"initial_state.M has shape \[1, 2, 6, 3\]; expected \[B, G, F, D\] = \[2, 2, 6, 3\]",
    ),
    "state_n": ({"initial_state": (*STATE[:2], torch.zeros(2, 2))}, r"initial_state.n .* is torch.float32"),
    "packed_rows": ({"cu_seqlens": torch.tensor([0, 5])}, r"q has shape .* with B = 1 beside cu_seqlens"),
    "backend": ({"backend": "fla"}, r"backend='fla' is not possible; expected one of auto, triton, chunk"),
    "wide": (
        {"q": torch.rand(2, 5, 4, 1025), "k": torch.rand(2, 5, 2, 1025), "backend": "triton"},
        "infini_memory: F or D is above 1024",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_wrong_is_named(name: str) -> None:
    changes, words = REFUSED[name]
    with pytest.raises(ValueError, match=words):
        call(**changes)


@pytest.mark.parametrize(
    ("borders", "words"),
    [
        ([0], r"cu_seqlens has shape \[1\]"),
        ([0.0, 5.0], r"cu_seqlens \[2\] is torch.float32; expected torch.int32 or torch.int64"),
        ([1, 5], r"cu_seqlens\[0\] is 1; expected 0"),
        ([0, 4], r"cu_seqlens ends with 4; expected T = 5"),
        ([0, 3, 2, 5], r"cu_seqlens\[2\] is 2 after 3"),
        ([0, 3, 3, 5], r"cu_seqlens\[2\] is 3 after 3"),
    ],
)
@pytest.mark.parametrize("name", ["reference", "chunk", pytest.param("triton", marks=pytest.mark.interpret)])
def test_wrong_borders_are_named(name: str, borders: list[float], words: str) -> None:
    row = {key: torch.rand(1, 5, 2, 3) for key in ("q", "k", "v", "local")} | {"gate": torch.rand(2)}
    with pytest.raises(ValueError, match=words):
        call(**row, cu_seqlens=torch.tensor(borders), backend=name)


def test_borders_that_change_in_place_are_read_again() -> None:
    row = {key: torch.rand(1, 5, 2, 3) for key in ("q", "k", "v", "local")} | {"gate": torch.rand(2)}
    borders = torch.tensor([0, 2, 5])
    before, *_ = call(**row, cu_seqlens=borders)
    borders[1] = 4
    after, *_ = call(**row, cu_seqlens=borders)
    assert torch.equal(after, call(**row, cu_seqlens=torch.tensor([0, 4, 5]))[0])
    assert not torch.equal(after, before)


def test_a_state_of_rows_is_refused_beside_packed_sequences() -> None:
    row = {key: torch.rand(1, 5, 2, 3) for key in ("q", "k", "v", "local")} | {"gate": torch.rand(2)}
    state = (torch.zeros(1, 2, 3, 3), torch.zeros(1, 2, 3), torch.zeros(1, 2, dtype=torch.int64))
    words = r"initial_state.M has shape \[1, 2, 3, 3\]; expected \[N, G, F, D\] = \[2, 2, 3, 3\]"
    with pytest.raises(ValueError, match=words):
        call(**row, cu_seqlens=torch.tensor([0, 2, 5]), initial_state=state)


def test_counts_may_be_whole_numbers() -> None:
    _, state, _ = call(initial_state=STATE, backend="chunk")
    assert state.n.tolist() == [[4.0, 4.0]] * 2


def test_a_step_names_what_is_wrong() -> None:
    q, local, gate = torch.rand(2, 4, 6), torch.rand(2, 4, 3), torch.rand(4)
    with pytest.raises(
        ValueError, match=r"state.z has shape \[2, 2, 5\]; expected \[B, G, F\] = \[2, 2, 6\]"
    ):
        infini_memory_step(q, local, gate, (STATE[0], torch.zeros(2, 2, 5), STATE[2]))
    with pytest.raises(ValueError, match=r"state.M has shape \[2, 3, 6, 3\].* G a divisor of H = 4"):
        infini_memory_step(q, local, gate, (torch.zeros(2, 3, 6, 3), *STATE[1:]))
    with pytest.raises(ValueError, match=r"gate has shape \[4, 2\]; expected \[B, H\] = \[2, 4\]"):
        infini_memory_step(q, local, torch.rand(4, 2), STATE)


@pytest.mark.interpret
def test_a_step_with_gradients_has_no_triton_form() -> None:
    q, local = torch.rand(2, 4, 6, requires_grad=True), torch.rand(2, 4, 3)
    with pytest.raises(ValueError, match="a gradient is asked for"):
        infini_memory_step(q, local, torch.rand(4), STATE, backend="triton")
    with torch.no_grad():
        infini_memory_step(q, local, torch.rand(4), STATE, backend="triton")
