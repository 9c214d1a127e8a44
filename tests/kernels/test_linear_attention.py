"""Linear attention: all forms against the definition, in values and gradients, split, packed and masked."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from kernels import LinearState, linear_attention, linear_attention_step
from kernels.linear_attention import chunk, op
from kernels.testing import assert_close, poisoned, rms_ratio, tolerance

Result = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """The sizes of a call and what it uses."""

    length: int
    heads: int = 2
    groups: int = 1
    features: int = 16
    width: int = 16
    batch: int = 1
    packed: tuple[int, ...] = ()
    masked: bool = False
    initial: bool = True
    normalize: bool = True
    eps: float = 1e-9


CASES = {
    "one_token": Case(1),
    "below_a_chunk": Case(63, masked=True),
    "a_chunk": Case(64),
    "above_a_chunk": Case(65, batch=2),
    "three_chunks": Case(129, initial=False),
    "plain_sums": Case(65, normalize=False, masked=True),
    "large_eps": Case(65, eps=60.0),
    "grouped": Case(65, heads=4, groups=2, masked=True),
    "packed": Case(129, packed=(0, 1, 64, 129), masked=True),
    "packed_empty_start": Case(70, heads=1, packed=(0, 64, 70), initial=False),
    "wider_than_features": Case(65, heads=1, features=8, width=40),
    "dim_64": Case(65, heads=1, features=64, width=64),
    "dims_80_96": Case(65, heads=1, features=80, width=96),
    "dim_128": Case(65, heads=1, features=128, width=128),
    "dim_256": Case(65, heads=1, features=256, width=256),
}
SMALL = ["grouped", "packed", "wider_than_features", "dims_80_96", "large_eps"]


@dataclass
class Inputs:
    """A call's tensors, and the gradients that its results are given."""

    q: Tensor
    k: Tensor
    v: Tensor
    M: Tensor | None
    z: Tensor | None
    mask: Tensor | None
    cu_seqlens: Tensor | None
    out: Tensor
    final_M: Tensor
    final_z: Tensor


def inputs(case: Case, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Inputs:
    """Positive features and a third of the tokens masked, with NaN where k and v are not to be written."""
    draw = torch.Generator().manual_seed(case.length * 1000 + case.features)

    def new(*shape: int, sign: bool = True) -> Tensor:
        x = torch.randn(*shape, generator=draw, dtype=torch.float64)
        return (x if sign else x.abs() + 0.1).to(dtype).to(device)

    def state(*shape: int, sign: bool = True) -> Tensor:
        x = torch.randn(*shape, generator=draw, dtype=torch.float64)
        x = x if sign else x.abs() + 0.1
        return x.to(torch.float64 if dtype == torch.float64 else torch.float32).to(device)

    states = len(case.packed) - 1 if case.packed else case.batch
    k = new(case.batch, case.length, case.groups, case.features, sign=False)
    v = new(case.batch, case.length, case.groups, case.width)
    mask = None
    if case.masked:
        mask = (torch.rand(case.batch, case.length, generator=draw) > 1 / 3).to(device)
        k[~mask], v[~mask] = torch.nan, torch.inf
    shape = (states, case.groups, case.features)
    return Inputs(
        q=new(case.batch, case.length, case.heads, case.features, sign=False),
        k=k,
        v=v,
        M=state(*shape, case.width) if case.initial else None,
        z=state(*shape, sign=False) if case.initial else None,
        mask=mask,
        cu_seqlens=torch.tensor(case.packed, device=device) if case.packed else None,
        out=new(case.batch, case.length, case.heads, case.width),
        final_M=state(*shape, case.width) / 10,
        final_z=state(*shape) / 10,
    )


def wide(x: Inputs) -> Inputs:
    """The same numbers in fp64 on the CPU: what the truth is computed from."""
    moved = {
        name: value.cpu() if value.dtype in {torch.bool, torch.int64} else value.cpu().double()
        for name, value in vars(x).items()
        if value is not None
    }
    return replace(x, **moved)


def outcome(form: Callable[..., tuple[Tensor, LinearState]], x: Inputs, case: Case) -> Result:
    """Values and gradients of one form. `form(q, k, v, initial_state=..., ...)` is as `linear_attention`."""
    leaves = {
        name: value.detach().clone().requires_grad_()
        for name, value in vars(x).items()
        if name in {"q", "k", "v", "M", "z"} and value is not None
    }
    initial = LinearState(leaves["M"], leaves["z"]) if x.M is not None else None
    out, state = form(
        leaves["q"],
        leaves["k"],
        leaves["v"],
        initial_state=initial,
        mask=x.mask,
        cu_seqlens=x.cu_seqlens,
        normalize=case.normalize,
        eps=case.eps,
    )
    given = [x.out, x.final_M, x.final_z]
    torch.autograd.backward([out, *state], given)
    found = {"out": out, "M": state.M, "z": state.z}
    return found | {f"d{name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def compare(got: Result, want: Result, dtype: torch.dtype, device: str = "cpu") -> None:
    """Everything in `want`, each at its tolerance."""
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert_close(name, got[name], value, tolerance(dtype, device, name.startswith("d")))


def quadratic(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    initial_state: LinearState | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    normalize: bool,
    eps: float,
) -> tuple[Tensor, LinearState]:
    """The definition, without a recurrence: out_t sums over all earlier tokens of its sequence."""
    batch, length, heads, _ = q.shape
    groups = k.shape[2]
    written = torch.ones(batch, length, dtype=torch.bool) if mask is None else mask
    k, v = (torch.where(written[:, :, None, None], x, 0) for x in (k, v))
    borders = [0, length] if cu_seqlens is None else cu_seqlens.tolist()
    outs = torch.zeros(batch, length, heads, v.shape[-1], dtype=v.dtype)
    M, z = [], []
    for n, (start, stop) in enumerate(pairwise(borders)):
        rows = slice(None) if cu_seqlens is None else slice(n, n + 1)
        part = slice(start, stop)
        begin_M = torch.zeros(()) if initial_state is None else initial_state.M[rows]
        begin_z = torch.zeros(()) if initial_state is None else initial_state.z[rows]
        for h in range(heads):
            g = h // (heads // groups)
            weights = torch.einsum("bif,bjf->bij", q[:, part, h], k[:, part, g]).tril()
            out, total = torch.einsum("bij,bjd->bid", weights, v[:, part, g]), weights.sum(-1)
            if initial_state is not None:
                out = out + torch.einsum("bif,bfd->bid", q[:, part, h], begin_M[:, g])
                total = total + torch.einsum("bif,bf->bi", q[:, part, h], begin_z[:, g])
            if normalize:
                out = torch.where((total < 1e-9)[..., None], 0, out / total.clamp(min=eps)[..., None])
            place = (torch.arange(batch)[:, None], torch.arange(start, stop), torch.tensor(h))
            outs = outs.index_put(place, out)
        M.append(torch.einsum("bjgf,bjgd->bgfd", k[:, part], v[:, part]) + begin_M)
        z.append(k[:, part].sum(1) + begin_z)
    return outs, LinearState(torch.cat(M), torch.cat(z))


def backend(name: str, **options: object) -> Callable[..., tuple[Tensor, LinearState]]:
    """`linear_attention` with a form forced."""
    return lambda *args, **kwargs: linear_attention(*args, backend=name, **options, **kwargs)  # type: ignore[arg-type]


def triton(block: int = 0, segments: int = 0) -> Callable[..., tuple[Tensor, LinearState]]:
    """The fused form, cut as asked."""

    def form(
        q: Tensor, k: Tensor, v: Tensor, initial_state: LinearState | None, **kwargs: object
    ) -> tuple[Tensor, LinearState]:
        options = (kwargs[name] for name in ("mask", "cu_seqlens", "normalize", "eps"))
        return op._triton(q, k, v, initial_state, *options, "ieee", block, segments)  # type: ignore[arg-type]

    return form


FUSED = [
    pytest.param("cpu", torch.float32, marks=pytest.mark.interpret, id="interpreted-fp32"),
    *(
        pytest.param("cuda", dtype, marks=pytest.mark.gpu, id=f"cuda-{str(dtype)[6:]}")
        for dtype in (torch.bfloat16, torch.float16, torch.float32)
    ),
]


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    """Whatever a test below runs, it runs on memory full of NaN."""
    with poisoned():
        yield


def test_poisoned_memory_holds_nan() -> None:
    assert torch.empty(3).isnan().all()
    assert torch.zeros(2).new_empty(3, dtype=torch.float16).isnan().all()


@pytest.mark.parametrize("name", CASES)
def test_token_by_token_equals_the_definition(name: str) -> None:
    case = replace(CASES[name], features=min(CASES[name].features, 24), width=min(CASES[name].width, 40))
    x = inputs(case)
    compare(outcome(backend("reference"), x, case), outcome(quadratic, x, case), torch.float64)


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

    def form(*args: Tensor, initial_state: LinearState, **kwargs: object) -> tuple[Tensor, LinearState]:
        return chunk.linear_attention(*args, initial_state, **kwargs, size=size, piece=piece)  # type: ignore[arg-type]

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
@pytest.mark.parametrize(
    ("block", "segments", "packed"), [(16, 2, ()), (32, 3, ()), (32, 2, (0, 65, 70, 193))]
)
def test_no_cut_of_the_fused_form_matters(
    block: int, segments: int, packed: tuple[int, ...], device: str, dtype: torch.dtype
) -> None:
    case = Case(193 if packed or segments > 2 else 65, heads=1, features=40, width=24, packed=packed)
    x = inputs(case, dtype, device)
    want = outcome(backend("reference"), wide(x), case)
    compare(outcome(triton(block, segments), x, case), want, dtype, device)


FORMS = [
    pytest.param("reference", "cpu", torch.float64, id="reference"),
    pytest.param("chunk", "cpu", torch.float64, id="chunk"),
    pytest.param("triton", "cpu", torch.float32, marks=pytest.mark.interpret, id="interpreted"),
    pytest.param("triton", "cuda", torch.float32, marks=pytest.mark.gpu, id="cuda"),
]


@pytest.mark.parametrize(("name", "device", "dtype"), FORMS)
def test_split_and_resumed_is_the_whole(name: str, device: str, dtype: torch.dtype) -> None:
    case = Case(71, initial=False)
    x = inputs(case, dtype, device)
    whole = outcome(backend(name), x, case)

    def split(q: Tensor, k: Tensor, v: Tensor, **kwargs: object) -> tuple[Tensor, LinearState]:
        kwargs.pop("initial_state")
        outs, state = [], None
        for part in (slice(0, 1), slice(1, 66), slice(66, 71)):
            out, state = backend(name)(q[:, part], k[:, part], v[:, part], initial_state=state, **kwargs)
            outs.append(out)
        assert state is not None
        return torch.cat(outs, 1), state

    compare(outcome(split, x, case), whole, dtype, device)


@pytest.mark.parametrize(("name", "device", "dtype"), FORMS)
def test_one_token_at_a_time_is_the_whole(name: str, device: str, dtype: torch.dtype) -> None:
    case = Case(5, heads=4, groups=2, features=24, width=40, batch=2, masked=True)
    x = inputs(case, dtype, device)
    want, last = linear_attention(x.q, x.k, x.v, initial_state=(x.M, x.z), mask=x.mask, backend="reference")  # type: ignore[arg-type]
    state, limit = LinearState(x.M, x.z), tolerance(dtype, device)  # type: ignore[arg-type]
    for t in range(case.length):
        mask = None if x.mask is None else x.mask[:, t]
        before = state.M.clone()
        out, after = linear_attention_step(x.q[:, t], x.k[:, t], x.v[:, t], state, mask=mask, backend=name)
        assert torch.equal(state.M, before), "the state given must stay as it is"
        assert_close(f"out {t}", out, want[:, t], limit)
        state = after
    assert_close("M", state.M, last.M, limit)
    assert_close("z", state.z, last.z, limit)

    k, v = (torch.where(y[:, 0].isfinite(), y[:, 0], 1) for y in (x.k, x.v))
    plain, first = linear_attention_step(x.q[:, 0], k, v, normalize=False, backend=name)
    weight = torch.einsum("bgrf,bgf->bgr", x.q[:, 0].unflatten(1, (2, 2)), k)
    assert_close("plain", plain, (weight.unsqueeze(-1) * v.unsqueeze(2)).flatten(1, 2), limit)
    assert torch.equal(first.z, k)


@pytest.mark.parametrize(("name", "device", "dtype"), FORMS)
def test_the_future_changes_no_bit(name: str, device: str, dtype: torch.dtype) -> None:
    x = inputs(Case(70), dtype, device)
    want, _ = linear_attention(x.q, x.k, x.v, backend=name)
    for t in (3, 64):
        q, k, v = (y.clone() for y in (x.q, x.k, x.v))
        q[:, t:], k[:, t:], v[:, t:] = torch.nan, 7.0, -5.0
        out, _ = linear_attention(q, k, v, backend=name)
        assert torch.equal(out[:, :t], want[:, :t])
        assert not torch.equal(out[:, t:], want[:, t:])


@pytest.mark.parametrize(("name", "device", "dtype"), FORMS)
def test_a_row_or_sequence_sees_no_other(name: str, device: str, dtype: torch.dtype) -> None:
    x = inputs(Case(24, batch=2, initial=False), dtype, device)
    want, held = linear_attention(x.q, x.k, x.v, backend=name)
    k = x.k.clone()
    k[1, 3] = torch.nan
    out, state = linear_attention(x.q, k, x.v, backend=name)
    assert torch.equal(out[0], want[0])
    assert out[1, 3:].isnan().all()
    row = [y.flatten(0, 1).unsqueeze(0) for y in (x.q, k, x.v)]
    cu_seqlens = torch.tensor([0, 24, 48], device=device)
    out, state = linear_attention(*row, cu_seqlens=cu_seqlens, backend=name)
    assert_close("packed", out[0, :24], want[0], tolerance(dtype, device))
    assert_close("M", state.M[0], held.M[0], tolerance(dtype, device))
    assert state.M[1].isnan().any()


@pytest.mark.parametrize(("name", "device", "dtype"), FORMS)
def test_equal_calls_give_equal_bits(name: str, device: str, dtype: torch.dtype) -> None:
    case = Case(65, heads=4, groups=2)
    x = inputs(case, dtype, device)
    first, second = (outcome(backend(name), x, case) for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(("name", "device", "dtype"), FORMS)
def test_where_nothing_is_held_the_answer_is_zero(name: str, device: str, dtype: torch.dtype) -> None:
    x = inputs(Case(6), dtype, device)
    mask = torch.tensor([[False, False, True, True, True, True]], device=device)
    k = x.k.clone()
    k[:, :2] = torch.nan
    q = x.q.clone().requires_grad_()
    out, _ = linear_attention(q, k, x.v, mask=mask, backend=name)
    out.sum().backward()
    assert q.grad is not None
    assert torch.equal(out[:, :2], torch.zeros_like(out[:, :2]))
    assert torch.equal(q.grad[:, :2], torch.zeros_like(q.grad[:, :2]))
    assert out[:, 2:].abs().min() > 0
    spoiled, _ = linear_attention(x.q * torch.nan, x.k, x.v, backend=name)
    assert spoiled.isnan().all(), "a NaN is not an empty memory"


@pytest.mark.parametrize(("name", "device", "dtype"), FORMS)
def test_strides_do_not_matter(name: str, device: str, dtype: torch.dtype) -> None:
    case = Case(20, heads=4, groups=2)
    x = inputs(case, dtype, device)
    want = outcome(backend(name), x, case)
    for part in ("q", "k", "v", "M", "z"):
        y = getattr(x, part)
        turned = y.transpose(1, 2).contiguous().transpose(1, 2)
        assert not turned.is_contiguous()
        setattr(x, part, turned)
    x.out = x.out.transpose(1, 2).contiguous().transpose(1, 2)
    got = outcome(backend(name), x, case)
    for key in want:
        assert_close(key, got[key], want[key], tolerance(dtype, device))


@pytest.mark.parametrize(("name", "device", "dtype"), FORMS)
def test_a_gradient_may_reach_one_result_alone(name: str, device: str, dtype: torch.dtype) -> None:
    x = inputs(Case(20), dtype, device)
    v = x.v.clone().requires_grad_()
    _, state = linear_attention(x.q, x.k, v, backend=name)
    (only_M,) = torch.autograd.grad(state.M, v, x.final_M)
    want = torch.einsum("btgf,bgfd->btgd", x.k, x.final_M.to(dtype))
    assert_close("dv", only_M, want, tolerance(dtype, device, True))


def test_gradients_of_chunks_equal_differences() -> None:
    x = inputs(Case(5, features=3, width=2, batch=2, masked=True))
    leaves = [torch.where(y.isfinite(), y, 1).requires_grad_() for y in (x.q, x.k, x.v, x.M, x.z)]

    def call(q: Tensor, k: Tensor, v: Tensor, M: Tensor, z: Tensor) -> tuple[Tensor, ...]:
        initial = LinearState(M, z)
        out, state = chunk.linear_attention(q, k, v, initial, x.mask, None, True, 1e-9, size=2, piece=2)
        return out, *state

    assert torch.autograd.gradcheck(call, leaves)


def test_long_text_neither_overflows_fp16_nor_loses_the_mean() -> None:
    length = 20_000
    q, k = (torch.full((1, length, 1, 4), 30.0, dtype=torch.float16) for _ in range(2))
    v = torch.full((1, length, 1, 4), 100.0, dtype=torch.float16)
    out, state = linear_attention(q, k, v, backend="chunk")
    assert torch.equal(out, torch.full_like(out, 100))
    assert_close("M", state.M, torch.full_like(state.M, 30 * 100 * length), 1e-6)


@pytest.mark.interpret
def test_fused_keeps_large_activations_in_fp16() -> None:
    case = Case(65, heads=1, initial=False)
    x = inputs(case, torch.float16)
    x.q, x.k, x.v = x.q * 1000, x.k * 1000, x.v * 1000
    want = outcome(backend("reference"), wide(x), case)
    got = outcome(backend("triton"), x, case)
    assert_close("out", got["out"], want["out"], tolerance(torch.float16))
    assert_close("dv", got["dv"], want["dv"], tolerance(torch.float16, gradient=True))


def test_autocast_does_not_reach_the_state() -> None:
    x = inputs(Case(20), torch.float32)
    want = linear_attention(x.q, x.k, x.v, backend="chunk")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = linear_attention(x.q, x.k, x.v, backend="chunk")
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1].M, want[1].M)


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
    want = outcome(backend(name), x, case)
    torch.compiler.reset()
    compiled = torch.compile(backend(name), fullgraph=True, backend="aot_eager")
    compare(outcome(compiled, x, case), want, torch.float32, device)


@pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=pytest.mark.interpret), pytest.param("cuda", marks=pytest.mark.gpu)]
)
def test_torch_accepts_the_operators(device: str) -> None:
    from kernels.linear_attention import library

    x = inputs(Case(3, heads=1), torch.float32, device)
    mask = torch.tensor([[True, False, True]], device=device)
    options = (True, 1e-9, "ieee", 0, 0)
    leaves = [y.detach().clone().requires_grad_() for y in (x.q, x.k, x.v, x.M, x.z) if y is not None]
    torch.library.opcheck(library.forward, (*leaves, mask, None, *options))
    out, _, _, *saved = library.forward(x.q, x.k, x.v, None, None, None, None, *options)
    gradients = (x.out, x.final_M, x.final_z)
    torch.library.opcheck(library.backward, (x.q, x.k, x.v, None, None, out, *saved, *gradients, *options))
    torch.library.opcheck(library.step, (x.q[:, 0], x.k[:, 1], x.v[:, 1], x.M, x.z, None, True, 1e-9))


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
def test_a_gpu_runs_the_fused_form_of_long_sequences() -> None:
    case = Case(4097, heads=8, groups=2, features=64, width=64)
    x = inputs(case, torch.bfloat16, "cuda")
    want = outcome(backend("chunk"), wide(x), case)
    compare(outcome(backend("auto"), x, case), want, torch.bfloat16, "cuda")


def call(**changes: object) -> tuple[Tensor, LinearState]:
    """`linear_attention` on B 2, T 5, H 4, G 2, F 6, D 3, but for `changes`."""
    arguments: dict = {
        "q": torch.rand(2, 5, 4, 6),
        "k": torch.rand(2, 5, 2, 6),
        "v": torch.rand(2, 5, 2, 3),
    }
    return linear_attention(**(arguments | changes))


REFUSED = {
    "not_a_tensor": ({"q": None}, r"q is a NoneType; expected a tensor \[B, T, H, F\]"),
    "dimensions": ({"q": torch.rand(5, 4, 6)}, r"q has shape \[5, 4, 6\], 3 dimensions"),
    "no_tokens": ({"q": torch.rand(2, 0, 4, 6)}, r"q has shape \[2, 0, 4, 6\].*0"),
    "no_width": ({"v": torch.rand(2, 5, 2, 0)}, r"v has shape \[2, 5, 2, 0\].*0"),
    "length": ({"k": torch.rand(2, 4, 2, 6)}, r"k has shape \[2, 4, 2, 6\]; expected .* = \[2, 5, any, 6\]"),
    "features": ({"k": torch.rand(2, 5, 2, 7)}, r"k has shape \[2, 5, 2, 7\]; expected .*6\]"),
    "groups": ({"v": torch.rand(2, 5, 4, 3)}, r"v has shape \[2, 5, 4, 3\]; expected .*\[2, 5, 2, any\]"),
    "heads": ({"q": torch.rand(2, 5, 3, 6)}, r"q has shape .* multiple of G = 2"),
    "dtypes": ({"v": torch.rand(2, 5, 2, 3).half()}, r"v \[2, 5, 2, 3\] is torch.float16; expected torch.fl"),
    "integers": ({"q": torch.ones(2, 5, 4, 6, dtype=torch.int64)}, r"q .* is torch.int64; expected torch.fl"),
    "device": ({"k": torch.rand(2, 5, 2, 6, device="meta")}, r"k .* is on meta; expected cpu"),
    "layout": (
        {"k": torch.rand(2, 5, 2, 6).to_sparse()},
        r"k .* has layout torch.sparse_coo; expected",
    ),
    "eps": ({"eps": torch.nan}, r"eps=nan is not possible; expected a finite number of at least 0"),
    "eps_sign": ({"eps": -1.0}, r"eps=-1.0 is not possible; expected a finite number of at least 0"),
    "eps_type": ({"eps": None}, r"eps=None is not possible; expected a finite number of at least 0"),
    "mask_shape": ({"mask": torch.ones(2, 4) > 0}, r"mask has shape \[2, 4\]; expected .*\[2, 5\]"),
    "mask_dtype": ({"mask": torch.ones(2, 5)}, r"mask .* is torch.float32; expected torch.bool"),
    "state": ({"initial_state": torch.zeros(2, 2, 6, 3)}, r"initial_state is a Tensor; expected LinearState"),
    "state_batch": (
        {"initial_state": (torch.zeros(1, 2, 6, 3), torch.zeros(1, 2, 6))},
        r"initial_state.M has shape \[1, 2, 6, 3\]; expected \[B, G, F, D\] = \[2, 2, 6, 3\]",
    ),
    "state_z": (
        {"initial_state": (torch.zeros(2, 2, 6, 3), torch.zeros(2, 2, 3))},
        r"initial_state.z has shape \[2, 2, 3\]; expected \[B, G, F\] = \[2, 2, 6\]",
    ),
    "state_dtype": (
        {"initial_state": (torch.zeros(2, 2, 6, 3).half(), torch.zeros(2, 2, 6))},
        r"initial_state.M .* is torch.float16; expected torch.float32",
    ),
    "packed_rows": ({"cu_seqlens": torch.tensor([0, 5])}, r"q has shape .* with B = 1 beside cu_seqlens"),
    "backend": ({"backend": "cuda"}, r"backend='cuda' is not possible; expected one of auto, triton, chunk"),
    "precision": ({"input_precision": "fp8"}, r"input_precision='fp8' is not possible; expected one of None"),
    "fla": ({"backend": "fla"}, r"backend='fla' is not possible for linear_attention: .*"),
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
        ([1, 5], r"cu_seqlens\[0\] is 1; expected 0"),
        ([0, 4], r"cu_seqlens ends with 4; expected T = 5"),
        ([0, 3, 2, 5], r"cu_seqlens\[2\] is 2 after 3"),
        ([0, 3, 3, 5], r"cu_seqlens\[2\] is 3 after 3"),
    ],
)
@pytest.mark.parametrize("name", ["reference", "chunk", pytest.param("triton", marks=pytest.mark.interpret)])
def test_wrong_borders_are_named(name: str, borders: list[int], words: str) -> None:
    q, v = torch.rand(1, 5, 2, 6), torch.rand(1, 5, 2, 3)
    with pytest.raises(ValueError, match=words):
        linear_attention(q, q, v, cu_seqlens=torch.tensor(borders), backend=name)


def test_borders_that_change_in_place_are_read_again() -> None:
    q, v, borders = torch.rand(1, 5, 2, 6), torch.rand(1, 5, 2, 3), torch.tensor([0, 2, 5])
    linear_attention(q, q, v, cu_seqlens=borders)
    borders[1] = 7
    with pytest.raises(ValueError, match=r"cu_seqlens\[2\] is 5 after 7"):
        linear_attention(q, q, v, cu_seqlens=borders)


def test_a_step_names_what_is_wrong() -> None:
    q, k, v = torch.rand(2, 4, 6), torch.rand(2, 2, 6), torch.rand(2, 2, 3)
    with pytest.raises(ValueError, match=r"state.M has shape \[1, 2, 6, 3\]"):
        linear_attention_step(q, k, v, (torch.zeros(1, 2, 6, 3), torch.zeros(1, 2, 6)))
    with pytest.raises(ValueError, match=r"mask has shape \[3\]; expected \[B\] = \[2\]"):
        linear_attention_step(q, k, v, mask=torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"eps='1' is not possible"):
        linear_attention_step(q, k, v, eps="1")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"backend='fla' is not possible for linear_attention_step"):
        linear_attention_step(q, k, v, backend="fla")


@pytest.mark.interpret
def test_a_step_with_gradients_has_no_triton_form() -> None:
    q = torch.rand(1, 1, 4, requires_grad=True)
    with pytest.raises(ValueError, match="a gradient is asked for"):
        linear_attention_step(q, q, q, backend="triton")
    with torch.no_grad():
        linear_attention_step(q, q, q, backend="triton")


def test_the_yardstick_sees_a_difference() -> None:
    ratio = rms_ratio(torch.tensor([1.0, 1.1]), torch.ones(2))
    assert ratio == pytest.approx(0.1 / 2**0.5, rel=1e-5)
    with pytest.raises(AssertionError, match="out: relative RMS error nan"):
        assert_close("out", torch.tensor([torch.nan]), torch.tensor([1.0]), 1.0)
    assert tolerance(torch.float32, "cuda") == 1e-3
    assert tolerance(torch.bfloat16, "cuda", gradient=True) == 1e-2
