"""`gated_delta_rule`: all its forms against the definition: values, gradients, splits, packing, masks."""

import importlib
import json
import os
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels import gated_delta_rule, gated_delta_rule_step
from kernels.gated_delta_rule import chunk, fla, op
from kernels.testing import assert_close, poisoned, tolerance

ROOT = Path(__file__).resolve().parents[2]
Result = dict[str, Tensor]
Form = Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Case:
    """The sizes of a call and what it uses; `size` is the fused form's chunk, `block` its columns."""

    length: int
    heads: int = 1
    groups: int = 1
    features: int = 16
    width: int = 16
    batch: int = 1
    packed: tuple[int, ...] = ()
    masked: bool = False
    initial: bool = True
    decay: bool = True
    scaled: bool = True
    size: int = 0
    block: int = 0


CASES = {
    "one_token": Case(1, size=16),
    "below_a_chunk": Case(63, masked=True, size=64),
    "a_chunk": Case(64, size=64, decay=False),
    "above_a_chunk": Case(65, batch=2, size=64, initial=False),
    "three_chunks": Case(65, size=32),
    "grouped": Case(17, heads=4, groups=2, masked=True, size=16),
    "packed": Case(40, heads=2, packed=(0, 1, 17, 40), masked=True, size=16),
    "packed_from_nothing": Case(21, packed=(0, 16, 21), initial=False, decay=False, size=16),
    "unit_keys": Case(20, scaled=False, size=16),
    "wider_than_features": Case(20, heads=2, features=8, width=40, size=16, block=16),
    "more_features": Case(20, features=40, width=24, size=16, block=16),
    "dim_64": Case(33, features=64, width=64),
    "dims_80_96": Case(20, features=80, width=96, size=16),
    "dim_128": Case(20, features=128, width=128, size=16),
    "dim_256": Case(17, features=256, width=256, size=16, block=64),
}
FEW = ["grouped", "packed", "above_a_chunk"]


@dataclass
class Inputs:
    """A call's tensors, and the gradients that its results are given."""

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    log_decay: Tensor | None
    state: Tensor | None
    mask: Tensor | None
    cu_seqlens: Tensor | None
    out: Tensor
    final: Tensor


LEAVES = ("q", "k", "v", "beta", "log_decay", "state")


def inputs(case: Case, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Inputs:
    """A third of the tokens masked, with NaN where they are not to be read; decays from .99 down to .05."""
    draw = torch.Generator().manual_seed(case.length * 1000 + case.features)
    single = torch.float64 if dtype == torch.float64 else torch.float32

    def new(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64).to(kind).to(device)

    states = len(case.packed) - 1 if case.packed else case.batch
    tokens = (case.batch, case.length, case.groups)
    k, v = new(*tokens, case.features), new(*tokens, case.width)
    if not case.scaled:
        k = k / k.norm(dim=-1, keepdim=True)
    beta = torch.rand(*tokens, generator=draw, dtype=torch.float64).to(dtype).to(device)
    log_decay = -(new(*tokens, kind=single) - 2).exp() if case.decay else None
    mask = None
    if case.masked:
        mask = (torch.rand(case.batch, case.length, generator=draw) > 1 / 3).to(device)
        for x in (k, v, beta, log_decay):
            if x is not None:
                x[~mask] = torch.nan
    shape = (states, case.groups, case.features, case.width)
    return Inputs(
        q=new(case.batch, case.length, case.heads, case.features),
        k=k,
        v=v,
        beta=beta,
        log_decay=log_decay,
        state=new(*shape, kind=single) if case.initial else None,
        mask=mask,
        cu_seqlens=torch.tensor(case.packed, device=device) if case.packed else None,
        out=new(case.batch, case.length, case.heads, case.width),
        final=new(*shape, kind=single),
    )


def wide(x: Inputs) -> Inputs:
    """The same numbers in fp64 on the CPU: what the truth is computed from."""
    moved = {
        name: value.cpu() if value.dtype in {torch.bool, torch.int64} else value.cpu().double()
        for name, value in vars(x).items()
        if value is not None
    }
    return replace(x, **moved)


def outcome(form: Form, x: Inputs, case: Case) -> Result:
    """Values and gradients of one form."""
    leaves = {name: getattr(x, name) for name in LEAVES}
    leaves = {n: None if y is None else y.detach().clone().requires_grad_() for n, y in leaves.items()}
    initial = leaves.pop("state")
    out, state = form(
        *leaves.values(), initial_state=initial, mask=x.mask, cu_seqlens=x.cu_seqlens, scaled=case.scaled
    )
    torch.autograd.backward([out, state], [x.out, x.final])
    found = {"out": out, "state": state}
    leaves["state"] = initial
    return found | {f"d{name}": leaf.grad for name, leaf in leaves.items() if leaf is not None}


def compare(got: Result, want: Result, dtype: torch.dtype, device: str = "cpu") -> None:
    """Everything in `want`, each at its tolerance."""
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert_close(name, got[name], value, tolerance(dtype, device, name.startswith("d")))


def backend(name: str, case: Case = CASES["one_token"]) -> Form:
    """`gated_delta_rule` with a form forced; of the fused one, cut as the case says."""
    if name != "triton":
        return lambda *args, **kwargs: gated_delta_rule(*args, **kwargs, backend=name)

    def form(*args: Tensor, initial_state: Tensor | None, **options: object) -> tuple[Tensor, Tensor]:
        given = {"mask": None, "cu_seqlens": None, "scaled": True} | options
        size, block = case.size, case.block
        return op._triton(*args, initial_state, *given.values(), None, size, block)  # type: ignore[arg-type]

    return form


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


def transitions(x: Inputs, case: Case) -> tuple[Tensor, Tensor]:
    """One row and group by matrices: S_t = a_t (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T."""
    assert x.state is not None
    assert x.log_decay is not None
    state, outs = x.state[0, 0], []
    for t in range(case.length):
        key, value = x.k[0, t, 0], x.v[0, t, 0]
        size = (key @ key) * (1 + 1e-6) + 1e-4 if case.scaled else torch.ones(())
        step = x.beta[0, t, 0] / size
        turn = torch.eye(case.features, dtype=key.dtype) - step * torch.outer(key, key)
        state = x.log_decay[0, t, 0].exp() * turn @ state + step * torch.outer(key, value)
        outs.append(x.q[0, t] @ state)
    return torch.stack(outs)[None], state[None, None]


@pytest.mark.parametrize("scaled", [True, False])
def test_token_by_token_equals_the_definition(scaled: bool) -> None:
    case = Case(9, heads=3, features=5, width=4, scaled=scaled)
    x = inputs(case)
    got = gated_delta_rule(
        x.q, x.k, x.v, x.beta, x.log_decay, initial_state=x.state, scaled=scaled, backend="reference"
    )
    for name, have, want in zip(("out", "state"), got, transitions(x, case), strict=True):
        assert_close(name, have, want, tolerance(torch.float64))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_chunks_equal_token_by_token(name: str, dtype: torch.dtype) -> None:
    x = inputs(CASES[name], dtype)
    want = outcome(backend("reference"), wide(x), CASES[name])
    compare(outcome(backend("chunk"), x, CASES[name]), want, dtype)


@pytest.mark.parametrize(("size", "piece"), [(4, 1), (4, 6), (16, 2), (16, 16), (1, 8)])
@pytest.mark.parametrize("packed", [(), (0, 3, 4, 20, 21, 50)])
def test_no_size_of_chunk_or_piece_matters(size: int, piece: int, packed: tuple[int, ...]) -> None:
    batch = 1 if packed else 3
    case = Case(50, heads=4, groups=2, features=5, width=3, batch=batch, packed=packed, masked=True)
    x = inputs(case)

    def form(*args: Tensor, **options: object) -> tuple[Tensor, Tensor]:
        return chunk.gated_delta_rule(*args, **options, size=size, piece=piece)  # type: ignore[arg-type]

    compare(outcome(form, x, case), outcome(backend("reference"), x, case), torch.float64)


@pytest.mark.parametrize(("device", "dtype"), FUSED)
@pytest.mark.parametrize("name", CASES)
def test_fused_equals_token_by_token(name: str, device: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    x = inputs(case, dtype, device)
    want = outcome(backend("reference"), wide(x), case)
    compare(outcome(backend("triton", case), x, case), want, dtype, device)


@pytest.mark.interpret
@pytest.mark.parametrize("name", FEW)
def test_fused_in_fp16_equals_token_by_token(name: str) -> None:
    case = CASES[name]
    x = inputs(case, torch.float16)
    want = outcome(backend("reference"), wide(x), case)
    compare(outcome(backend("triton", case), x, case), want, torch.float16)


@pytest.mark.parametrize(("device", "dtype"), FUSED[:1] + FUSED[-1:])
def test_nothing_is_lost_behind_a_token_that_forgets_everything(device: str, dtype: torch.dtype) -> None:
    case = Case(24, size=16, masked=True)
    for forgotten in (-1e7, -torch.inf):
        x = inputs(case, dtype, device)
        assert x.log_decay is not None
        x.log_decay[0, 7], x.log_decay[0, 20] = forgotten, forgotten
        want = outcome(backend("reference"), wide(x), case)
        compare(outcome(backend("triton", case), x, case), want, dtype, device)


@pytest.mark.parametrize(("device", "dtype"), FUSED[:1] + FUSED[-1:])
def test_fused_takes_keys_of_any_size(device: str, dtype: torch.dtype) -> None:
    case = Case(24, size=16)
    x = inputs(case, dtype, device)
    x.k *= torch.logspace(-4, 4, 24, device=device).roll(5).view(1, 24, 1, 1)
    want = outcome(backend("reference"), wide(x), case)
    got = outcome(backend("triton", case), x, case)
    for name in ("out", "state", "dq", "dv", "dbeta"):
        assert_close(name, got[name], want[name], tolerance(dtype, device))


@pytest.mark.interpret
def test_fused_keeps_large_activations_in_fp16() -> None:
    case = Case(24, initial=False, size=16)
    x = inputs(case, torch.float16)
    x.q, x.k, x.v = x.q * 10, x.k * 1000, x.v * 1000
    want, got = outcome(backend("reference"), wide(x), case), outcome(backend("triton", case), x, case)
    assert_close("out", got["out"], want["out"], tolerance(torch.float16))
    assert_close("dv", got["dv"], want["dv"], tolerance(torch.float16, gradient=True))


@pytest.mark.parametrize(("name", "device", "dtype"), FORMS)
def test_a_repeated_pair_is_read_back_as_the_value(name: str, device: str, dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(0)
    for size in (0.1, 1e4):
        k = torch.nn.functional.normalize(torch.randn(16, generator=draw, dtype=torch.float64), dim=0) * size
        k, v = (x.to(dtype).to(device) for x in (k, torch.randn(16, generator=draw, dtype=torch.float64)))
        ones = torch.ones(1, 20, 1, dtype=dtype, device=device)
        k, v = k.expand(1, 20, 1, 16), v.expand(1, 20, 1, 16)
        out, _ = gated_delta_rule(k, k, v, ones, backend=name)
        assert_close("out", out[:, 6:], v[:, 6:], 1e-10 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize(
    ("name", "device", "length"),
    [
        ("reference", "cpu", 300),
        ("chunk", "cpu", 600),
        pytest.param("triton", "cpu", 48, marks=pytest.mark.interpret),
        pytest.param("triton", "cuda", 3000, marks=pytest.mark.gpu),
    ],
)
def test_the_state_is_bounded_for_keys_of_any_size(name: str, device: str, length: int) -> None:
    x = inputs(Case(length, features=8, width=4), torch.float32, device)
    ones = torch.ones(1, length, 1, device=device)
    longest = float(x.v.norm(dim=-1).max())
    for size in (1e-4, 1e-2, 1.0, 1e2, 1e4, None):
        each = torch.logspace(-4, 4, length).roll(length // 3).view(1, length, 1, 1) if size is None else size
        k = x.k * (each if size is not None else each.to(device))
        out, state = gated_delta_rule(x.q, k, x.v, ones, ones * -1e-3, backend=name)
        assert out.isfinite().all()
        assert float(state.norm()) < 150 * longest


@pytest.mark.parametrize(("name", "device", "dtype"), FORMS)
def test_split_and_resumed_is_the_whole(name: str, device: str, dtype: torch.dtype) -> None:
    case = Case(37, size=16)
    x = inputs(case, dtype, device)
    whole = outcome(backend(name, case), x, case)

    def split(*tokens: Tensor, initial_state: Tensor, **_: object) -> tuple[Tensor, Tensor]:
        outs, state = [], initial_state
        for part in (slice(0, 1), slice(1, 34), slice(34, 37)):
            out, state = backend(name, case)(*(y[:, part] for y in tokens), initial_state=state)
            outs.append(out)
        return torch.cat(outs, 1), state

    compare(outcome(split, x, case), whole, dtype, device)


@pytest.mark.parametrize(("name", "device", "dtype"), FORMS)
@pytest.mark.parametrize("decay", [True, False])
def test_one_token_at_a_time_is_the_whole(decay: bool, name: str, device: str, dtype: torch.dtype) -> None:
    case = Case(4, heads=4, groups=2, features=24, width=40, batch=2, masked=True, decay=decay, scaled=decay)
    x = inputs(case, dtype, device)
    want, last = gated_delta_rule(
        *(x.q, x.k, x.v, x.beta, x.log_decay),  # type: ignore[arg-type]
        initial_state=x.state,
        mask=x.mask,
        scaled=case.scaled,
        backend="reference",
    )
    state, limit = x.state, tolerance(dtype, device)
    assert state is not None
    assert x.mask is not None
    for t in range(case.length):
        tokens = [None if y is None else y[:, t] for y in (x.q, x.k, x.v, x.beta, x.log_decay)]
        before = state.clone()
        out, after = gated_delta_rule_step(  # type: ignore[misc]
            *tokens,
            state,
            mask=x.mask[:, t],
            scaled=case.scaled,
            backend=name,  # type: ignore[arg-type]
        )
        assert torch.equal(state, before), "the state given must stay as it is"
        assert_close(f"out {t}", out, want[:, t], limit)
        state = after
    assert_close("state", state, last, limit)


@pytest.mark.parametrize(("name", "device", "dtype"), FORMS)
def test_the_future_changes_no_bit(name: str, device: str, dtype: torch.dtype) -> None:
    case = Case(40, size=16)
    x = inputs(case, dtype, device)
    tokens = [x.q, x.k, x.v, x.beta, x.log_decay]
    want, _ = backend(name, case)(*tokens, initial_state=x.state)
    changed = [y.clone() for y in tokens if y is not None]
    for y, value in zip(changed, (torch.nan, 7.0, -5.0, 0.9, -3.0), strict=True):
        y[:, 20:] = value
    out, _ = backend(name, case)(*changed, initial_state=x.state)
    assert torch.equal(out[:, :20], want[:, :20])
    assert not torch.equal(out[:, 20:], want[:, 20:])


@pytest.mark.parametrize(("name", "device", "dtype"), FORMS)
def test_a_row_sees_no_other(name: str, device: str, dtype: torch.dtype) -> None:
    case = Case(20, batch=2, size=16)
    x = inputs(case, dtype, device)
    tokens = [y for y in (x.q, x.k, x.v, x.beta, x.log_decay) if y is not None]
    want, held = backend(name, case)(*tokens, initial_state=x.state)
    tokens[1] = tokens[1].clone()
    tokens[1][1, 3] = torch.nan
    out, state = backend(name, case)(*tokens, initial_state=x.state)
    assert torch.equal(out[0], want[0])
    assert torch.equal(state[0], held[0])
    assert out[1, 3:].isnan().all()


@pytest.mark.parametrize(("name", "device", "dtype"), FORMS)
def test_equal_calls_give_equal_bits_whatever_the_strides(name: str, device: str, dtype: torch.dtype) -> None:
    case = Case(17, heads=4, groups=2, size=16)
    x = inputs(case, dtype, device)
    first, second = (outcome(backend(name, case), x, case) for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)
    for part in (*LEAVES, "out", "final"):
        y = getattr(x, part)
        setattr(x, part, y.transpose(1, 2).contiguous().transpose(1, 2))
        assert not getattr(x, part).is_contiguous()
    third = outcome(backend(name, case), x, case)
    for key in first:
        assert_close(key, third[key], first[key], tolerance(dtype, device))


@pytest.mark.interpret
def test_a_gradient_may_reach_one_result_alone() -> None:
    case = Case(20, size=16, initial=False)
    x = inputs(case, torch.float32)
    for pick, given in ((0, x.out), (1, x.final)):
        grads = []
        for form in (backend("reference"), backend("triton", case)):
            v = x.v.clone().requires_grad_()
            result = form(x.q, x.k, v, x.beta, x.log_decay, initial_state=None)[pick]
            grads.append(torch.autograd.grad(result, v, given)[0])
        assert_close("dv", grads[1], grads[0], tolerance(torch.float32, gradient=True))


def test_autocast_does_not_reach_the_state() -> None:
    x = inputs(Case(20), torch.float32)
    want = gated_delta_rule(x.q, x.k, x.v, x.beta, x.log_decay, backend="chunk")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = gated_delta_rule(x.q, x.k, x.v, x.beta, x.log_decay, backend="chunk")
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


@pytest.mark.parametrize("packed", [(), (0, 7, 20)])
@pytest.mark.parametrize(
    "name",
    [
        "chunk",
        pytest.param("triton", marks=pytest.mark.interpret),
        pytest.param("auto", marks=pytest.mark.gpu),
    ],
)
def test_it_compiles_as_one_graph(name: str, packed: tuple[int, ...]) -> None:
    case = Case(20, packed=packed, masked=True)
    device = "cuda" if name == "auto" else "cpu"
    x = inputs(case, torch.float32, device)
    form = lambda *args, **kwargs: gated_delta_rule(*args, **kwargs, backend=name)  # noqa: E731
    want = outcome(form, x, case)
    torch.compiler.reset()
    compiled = torch.compile(form, fullgraph=True, backend="aot_eager")
    compare(outcome(compiled, x, case), want, torch.float32, device)


@pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=pytest.mark.interpret), pytest.param("cuda", marks=pytest.mark.gpu)]
)
def test_torch_accepts_the_operators(device: str) -> None:
    from kernels.gated_delta_rule import library

    x = inputs(Case(3), torch.float32, device)
    mask = torch.tensor([[True, False, True]], device=device)
    leaves = [getattr(x, name).detach().clone().requires_grad_() for name in LEAVES]
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(library.forward, (*leaves, mask, None, True, "ieee", 16, 0), test_utils=tests)
    _, _, *saved = library.forward(x.q, x.k, x.v, x.beta, None, None, None, None, True, "ieee", 16, 0)
    given = (x.q, x.k, x.beta, None, None, None, *saved, x.out, x.final, True, "ieee", 16, 0)
    torch.library.opcheck(library.backward, given, test_utils=("test_schema", "test_faketensor"))
    one = [None if y is None else y[:, 0] for y in (x.q, x.k, x.v, x.beta, x.log_decay)]
    torch.library.opcheck(library.step, (*one, x.state, None, True), test_utils=tests[:3])


@pytest.mark.gpu
def test_nothing_waits_for_the_gpu() -> None:
    case = Case(200, heads=4, groups=2, masked=True)
    x = inputs(case, torch.bfloat16, "cuda")
    outcome(backend("auto"), x, case)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        outcome(backend("auto"), x, case)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("width", [64, 128])
def test_a_gpu_runs_the_fused_form_of_long_sequences(width: int) -> None:
    case = Case(4097, heads=8, groups=2, features=width, width=width)
    x = inputs(case, torch.bfloat16, "cuda")
    want = outcome(backend("chunk"), wide(x), case)
    compare(outcome(backend("auto"), x, case), want, torch.bfloat16, "cuda")


def test_fla_gets_what_its_functions_take(monkeypatch: pytest.MonkeyPatch) -> None:
    def chunk_gated_delta_rule(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        beta: Tensor,
        scale: float,
        initial_state: Tensor | None,
        output_final_state: bool,
        cu_seqlens: Tensor | None,
        g: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        assert scale == 1.0
        assert output_final_state
        share = beta.to(q.dtype) if g is None else beta
        return gated_delta_rule(
            q, k, v, share, g, initial_state=initial_state, cu_seqlens=cu_seqlens, scaled=False,
            backend="reference",
        )  # fmt: skip

    for path, name in (fla.GATED, fla.PLAIN):
        module = types.ModuleType(path)
        setattr(module, name, chunk_gated_delta_rule)
        monkeypatch.setitem(sys.modules, path, module)
    monkeypatch.setattr(importlib, "import_module", lambda path: sys.modules[path])
    monkeypatch.setattr(fla, "fla_refusal", lambda *_: None)
    for case in (Case(9, masked=True), Case(9, decay=False, packed=(0, 4, 9)), Case(9, scaled=False)):
        x = inputs(case, torch.float16)
        options = {"mask": x.mask, "cu_seqlens": x.cu_seqlens, "scaled": case.scaled}
        options |= {"initial_state": x.state}
        tokens = (x.q, x.k, x.v, x.beta, x.log_decay)
        got = gated_delta_rule(*tokens, **options, backend="fla")  # type: ignore[arg-type]
        want = gated_delta_rule(*tokens, **options, backend="reference")  # type: ignore[arg-type]
        for name, have, truth in zip(("out", "state"), got, want, strict=True):
            assert_close(name, have, truth, 2e-3)
    with pytest.raises(ValueError, match=r"it takes fp16 and bf16, not torch\.float32"):
        gated_delta_rule(*(y.float() for y in tokens if y is not None), backend="fla")
    with pytest.raises(ValueError, match="it shares no keys among heads, and q has 2 where k has 1"):
        gated_delta_rule(x.q.expand(1, 9, 2, 16), *tokens[1:], backend="fla")


def call(**changes: object) -> tuple[Tensor, Tensor]:
    """`gated_delta_rule` on B 2, T 5, H 4, G 2, F 6, D 3, but for `changes`."""
    arguments: dict = {
        "q": torch.rand(2, 5, 4, 6),
        "k": torch.rand(2, 5, 2, 6),
        "v": torch.rand(2, 5, 2, 3),
        "beta": torch.rand(2, 5, 2),
    }
    return gated_delta_rule(**(arguments | changes))


REFUSED = {
    "no_tokens": ({"q": torch.rand(2, 0, 4, 6)}, r"q has shape \[2, 0, 4, 6\].*0"),
    "features": ({"k": torch.rand(2, 5, 2, 7)}, r"k has shape \[2, 5, 2, 7\]; expected .*6\]"),
    "heads": ({"q": torch.rand(2, 5, 3, 6)}, r"q has shape .* multiple of G = 2"),
    "beta": ({"beta": None}, r"beta is a NoneType; expected a tensor \[B, T, G\]"),
    "beta_heads": ({"beta": torch.rand(2, 5, 4)}, r"beta has shape \[2, 5, 4\]; .* = \[2, 5, 2\]"),
    "beta_dtype": ({"beta": torch.rand(2, 5, 2).half()}, r"beta .* is torch.float16; expected torch.float32"),
    "decay": ({"log_decay": torch.rand(2, 4, 2)}, r"log_decay has shape \[2, 4, 2\]; .* = \[2, 5, 2\]"),
    "decay_device": ({"log_decay": torch.rand(2, 5, 2, device="meta")}, r"log_decay .* is on meta"),
    "mask": (
        {"mask": torch.ones(2, 5, 2) > 0},
        r"mask has shape \[2, 5, 2\], 3 dimensions; expected \[B, T\]",
    ),
    "state_batch": (
        {"initial_state": torch.zeros(1, 2, 6, 3)},
        r"initial_state has shape \[1, 2, 6, 3\]; expected \[B, G, F, D\] = \[2, 2, 6, 3\]",
    ),
    "state_dtype": ({"initial_state": torch.zeros(2, 2, 6, 3).half()}, r"initial_state .* is torch.float16"),
    "packed_rows": ({"cu_seqlens": torch.tensor([0, 5])}, r"q has shape .* with B = 1 beside cu_seqlens"),
    "backend": ({"backend": "cuda"}, r"backend='cuda' is not possible; expected one of auto, triton, chunk"),
    "precision": ({"input_precision": "fp8"}, r"input_precision='fp8' is not possible; expected one of None"),
    "fla": ({"backend": "fla"}, r"backend='fla' is not possible for gated_delta_rule: .*"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_wrong_is_named(name: str) -> None:
    changes, words = REFUSED[name]
    with pytest.raises(ValueError, match=words):
        call(**changes)


@pytest.mark.parametrize("name", ["reference", "chunk", pytest.param("triton", marks=pytest.mark.interpret)])
def test_wrong_borders_are_named(name: str) -> None:
    q, v, beta = torch.rand(1, 5, 2, 6), torch.rand(1, 5, 2, 3), torch.rand(1, 5, 2)
    with pytest.raises(ValueError, match=r"cu_seqlens\[2\] is 2 after 3"):
        gated_delta_rule(q, q, v, beta, cu_seqlens=torch.tensor([0, 3, 2, 5]), backend=name)


@pytest.mark.interpret
def test_what_has_no_kernel_is_refused() -> None:
    q, v = torch.rand(1, 2, 1, 257), torch.rand(1, 2, 1, 4)
    with pytest.raises(ValueError, match="F is above 256"):
        gated_delta_rule(q, q, v, torch.rand(1, 2, 1), backend="triton")
    k, beta = torch.rand(1, 1, 4, requires_grad=True), torch.rand(1, 1)
    with pytest.raises(ValueError, match="a gradient is asked for"):
        gated_delta_rule_step(k, k, k, beta, backend="triton")
    with pytest.raises(ValueError, match="backend='fla' is not possible for gated_delta_rule_step"):
        gated_delta_rule_step(k, k, k, beta, backend="fla")
    with pytest.raises(ValueError, match=r"state has shape \[2, 1, 4, 4\]; expected .* = \[1, 1, 4, 4\]"):
        gated_delta_rule_step(k, k, k, beta, state=torch.zeros(2, 1, 4, 4))


# Bytes a block may use (CUDA C++ Programming Guide, technical specifications per compute capability).
SHARED = {75: 65_536, 80: 166_912, 86: 101_376, 90: 232_448}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "dtype", "width"),
    [
        (75, "fp16", 128),
        (80, "bf16", 128),
        (86, "bf16", 128),
        (90, "bf16", 128),
        (90, "bf16", 256),
        (90, "fp32", 128),
    ],
)
def test_the_kernels_fit(capability: int, dtype: str, width: int, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path)}
    script = "tests/kernels/compile_gated_delta_rule.py"
    command = [sys.executable, script, str(capability), dtype, str(width)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    assert ended.returncode == 0, ended.stderr[-3000:]
    found = json.loads(ended.stdout)
    assert {"_transform", "_states", "_output", "_state_gradients", "_gradients"} <= found.keys()
    assert {name: size for name, size in found.items() if size > SHARED[capability]} == {}
