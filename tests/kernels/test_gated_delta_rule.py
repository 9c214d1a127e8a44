"""The gated delta rule: chunks against tokens, splits, masks, and a step that keys of no size can upset."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.gated_delta_rule import chunk, reference
from kernels.gated_delta_rule.chunk import ABSOLUTE, LARGEST, write_gated_delta

MOST = 50
"""Times |v|: the most that one token may add to a state, whatever its key."""


def tokens(
    length: int, batch: int = 2, groups: int = 2, repeat: int = 2, dim: int = 5, width: int = 3, seed: int = 0
) -> list[Tensor]:
    """q, k, v, beta, log_decay and an initial state in fp64; log_decay from a hundredth to about 3."""
    generator = torch.Generator().manual_seed(seed + length)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    beta = torch.rand(batch, length, groups, generator=generator, dtype=torch.float64)
    return [
        normal(batch, length, groups * repeat, dim),
        normal(batch, length, groups, dim),
        normal(batch, length, groups, width),
        beta,
        -(normal(batch, length, groups) - 2).exp(),
        normal(batch, groups, dim, width),
    ]


def random_mask(batch: int, length: int, *groups: int) -> Tensor:
    """Two tokens in three are seen."""
    return torch.rand(batch, length, *groups, generator=torch.Generator().manual_seed(length)) < 2 / 3


def close(got: Tensor, want: Tensor, limit: float = 1e-10) -> None:
    """RMS of the difference within `limit` of the RMS of `want` (design 04)."""
    assert got.shape == want.shape
    assert got.isfinite().all()
    got, want = got.detach(), want.detach()
    error = (got - want).square().mean().sqrt() / want.square().mean().sqrt().clamp_min(1e-12)
    assert float(error) <= limit, f"relative RMS error {float(error):.1e} above {limit:.0e}"


@pytest.mark.parametrize("masked", ["", "tokens", "heads"])
@pytest.mark.parametrize("length", [1, 63, 64, 65])
def test_chunks_equal_the_reference(length: int, masked: str) -> None:
    mask = {"": None, "tokens": random_mask(2, length), "heads": random_mask(2, length, 2)}[masked]
    found = []
    for form in (chunk, reference):
        leaves = [x.requires_grad_() for x in tokens(length)]
        out, state = form.gated_delta_rule(*leaves, mask=mask)
        (out.sin().sum() + (state * torch.arange(3)).sum()).backward()
        found.append([out, state, *(x.grad for x in leaves)])
    for got, want in zip(*found, strict=True):
        close(got, want)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 150), st.integers(0, 150), st.integers(1, 3), st.integers(1, 2), st.booleans())
def test_split_and_resume(first: int, second: int, repeat: int, groups: int, masked: bool) -> None:
    length = first + second
    q, k, v, beta, log_decay, initial = tokens(length, 1, groups, repeat)
    mask = random_mask(1, length, groups) if masked else torch.ones(1, length, dtype=torch.bool)
    whole, final = chunk.gated_delta_rule(q, k, v, beta, log_decay, initial, mask)
    cut = [x.split([first, second], 1) for x in (q, k, v, beta, log_decay, mask)]
    state, outputs = initial, []
    for i in range(2):
        *given_, seen = (x[i] for x in cut)
        out, state = chunk.gated_delta_rule(*given_, state, seen)
        outputs.append(out)
    if length:
        close(torch.cat(outputs, 1), whole)
    close(state, final)


def test_compiles_as_one_graph() -> None:
    leaves = tokens(130)
    compiled = torch.compile(chunk.gated_delta_rule, backend="eager", fullgraph=True)
    close(compiled(*leaves)[0], chunk.gated_delta_rule(*leaves)[0])


def test_gradcheck() -> None:
    leaves = [x.requires_grad_() for x in tokens(5, 1, 2, 2, 3, 2)]
    assert torch.autograd.gradcheck(lambda *x: chunk.gated_delta_rule(*x, mask=random_mask(1, 5, 2)), leaves)


def test_query_heads_share_key_value_heads_in_blocks() -> None:
    q, k, v, *rest = tokens(20, repeat=3)
    rest = [x.repeat_interleave(3, dim=1 if x is rest[2] else 2) for x in rest]
    expanded, _ = chunk.gated_delta_rule(q, k.repeat_interleave(3, 2), v.repeat_interleave(3, 2), *rest)
    close(chunk.gated_delta_rule(*tokens(20, repeat=3))[0], expanded)


@pytest.mark.parametrize("form", [chunk, reference])
@pytest.mark.parametrize("poison", [3.0, torch.nan, torch.inf])
def test_a_masked_token_neither_writes_nor_decays(form, poison: float) -> None:
    q, k, v, beta, log_decay, initial = tokens(30)
    mask = random_mask(2, 30)
    kept = [i for i in range(30) if mask[0, i]]
    want, final = form.gated_delta_rule(
        *(x[:1, kept] for x in (q, k, v, beta, log_decay)), initial_state=initial[:1]
    )
    for x in (k, v, beta, log_decay):
        x[~mask] = poison
    out, state = form.gated_delta_rule(q, k, v, beta, log_decay, initial, mask)
    close(out[:1, kept], want)
    close(state[:1], final)


@pytest.mark.parametrize("form", [chunk, reference])
def test_tokens_do_not_see_the_future(form) -> None:
    leaves = tokens(70)
    out, _ = form.gated_delta_rule(*leaves)
    for x in leaves[:5]:
        x[:, 40] += -5.0 if x is leaves[4] else 5.0
    changed, _ = form.gated_delta_rule(*leaves)
    assert torch.equal(changed[:, :40], out[:, :40])
    assert not torch.equal(changed[:, 40], out[:, 40])


@pytest.mark.parametrize("size", [0.1, 1.0, 1e4])
def test_a_repeated_pair_is_read_back_as_the_value(size: float) -> None:
    k = size * torch.nn.functional.normalize(
        torch.randn(5, generator=torch.Generator().manual_seed(0)), dim=0
    )
    k, v = k.double(), torch.tensor([1.0, -2.0, 0.5]).double()
    ones, zeros = torch.ones(1, 90, 1).double(), torch.zeros(1, 90, 1).double()
    out, _ = chunk.gated_delta_rule(
        k.expand(1, 90, 1, 5), k.expand(1, 90, 1, 5), v.expand(1, 90, 1, 3), ones, zeros
    )
    lost = ABSOLUTE / (size**2 + ABSOLUTE) + 2e-6  # what the two constants take from the first write
    assert float((out[0, 0, 0] - v).abs().max()) <= 2 * lost
    close(out[0, 8:, 0], v.expand(82, 3), 1e-12)  # and nothing from what is repeated


def test_the_step_is_that_of_unit_norm_keys_but_reads_keep_their_size() -> None:
    q, k, v, beta, log_decay, _ = tokens(40)
    norm = k.norm(dim=-1, keepdim=True)
    _, state = chunk.gated_delta_rule(q, k, v, beta, log_decay)
    _, unit = chunk.gated_delta_rule(q, k / norm, v / norm, beta, log_decay)
    close(state, unit, 1e-3)  # the two differ by ABSOLUTE alone
    _, doubled = chunk.gated_delta_rule(q, 2 * k, v, beta, log_decay)
    close(2 * doubled, state, 1e-3)


@pytest.mark.parametrize("form", [chunk, reference])
@pytest.mark.parametrize("size", [1e-4, 1e-2, 1.0, 1e2, 1e4, None])
def test_the_state_is_bounded_for_keys_of_any_size(size: float | None, form) -> None:
    q, k, v, *_ = (x.float() for x in tokens(600, 1, 1, 1, 8, 4))
    generator = torch.Generator().manual_seed(1)
    each = 10 ** (8 * torch.rand(1, 600, 1, 1, generator=generator) - 4) if size is None else size
    ones = torch.ones(1, 600, 1)
    out, state = form.gated_delta_rule(q, k * each, v, ones, ones * -1e-3)
    most = MOST * float(v.norm(dim=-1).max())
    assert out.isfinite().all()
    assert float(state.norm()) < 3 * most
    if size is not None and size >= 1:
        assert float(state.norm()) < 20 * float(v.norm(dim=-1).max()) / size


@pytest.mark.parametrize("key", [1e-9, 1e-3, 1e-2, 0.1, 10.0])
def test_one_token_adds_no_more_than_it_may(key: float) -> None:
    k, v = torch.full((1, 1, 1, 1), key), torch.full((1, 1, 1, 1), 7.0)
    ones, zeros = torch.ones(1, 1, 1), torch.zeros(1, 1, 1)
    _, state = chunk.gated_delta_rule(k, k, v, ones, zeros)
    assert float(state.abs()) <= MOST * 7 * (1 + 1e-5)


@pytest.mark.parametrize("form", [chunk, reference])
def test_a_write_without_new_values_makes_nothing_larger(form) -> None:
    """Keys of every size, fp32, decay 1: the transition has no eigenvalue outside 0 .. 1."""
    q, k, v, beta, _, initial = (x.float() for x in tokens(200, 1, 1, 1, 8, 4))
    sizes = torch.logspace(-6, 6, 200).view(1, 200, 1, 1)
    for share in (beta, torch.ones_like(beta)):
        _, state = form.gated_delta_rule(q, k * sizes, v * 0, share, share * 0, initial)
        assert float(state.norm()) <= float(initial.norm())


def test_what_follows_a_token_that_forgets_everything_is_exact() -> None:
    leaves = [x.float() for x in tokens(60)]
    leaves[4][:, 20] = -1e7
    for got, want in zip(chunk.gated_delta_rule(*leaves), reference.gated_delta_rule(*leaves), strict=True):
        close(got, want, 1e-5)
    leaves[4][:, 20] = -torch.inf
    for got, want in zip(chunk.gated_delta_rule(*leaves), reference.gated_delta_rule(*leaves), strict=True):
        close(got, want, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_states_are_fp32_whatever_comes_in(dtype: torch.dtype) -> None:
    leaves = [x.to(dtype) for x in tokens(70)]
    leaves[1:3] = [x * 1e3 for x in leaves[1:3]]
    out, state = chunk.gated_delta_rule(*leaves)
    want, final = reference.gated_delta_rule(*(x.double() for x in leaves))
    assert out.dtype == state.dtype == torch.float32
    close(out.double(), want, 1e-5)
    close(state.double(), final, 1e-5)


# Prefix states ---------------------------------------------------------------------------------------------


def blocks(count: int, size: int) -> list[Tensor]:
    """k, v, beta, log_decay and a mask as `[B, G, N, S, ...]`, and an initial state."""
    _, k, v, beta, log_decay, initial = tokens(count * size)
    shaped = [x.transpose(1, 2).unflatten(2, (count, size)) for x in (k, v, beta, log_decay)]
    return [*shaped, random_mask(2, count * size, 2).transpose(1, 2).unflatten(2, (count, size)), initial]


@pytest.mark.parametrize(("count", "size"), [(1, 1), (4, 3), (5, 1), (2, 7)])
def test_prefix_states_are_those_of_the_tokens_before(count: int, size: int) -> None:
    k, v, beta, log_decay, mask, initial = blocks(count, size)
    states, written, clamped = write_gated_delta(k, v, beta, log_decay, mask, initial, 1e9)
    assert torch.equal(written, mask)
    assert not clamped.any()
    k, v, beta, log_decay, mask = (x.flatten(2, 3).transpose(1, 2) for x in (k, v, beta, log_decay, mask))
    for i in range(count + 1):
        end = i * size
        given_ = [x[:, :end] for x in (k, k, v, beta, log_decay)]
        _, want = reference.gated_delta_rule(*given_, initial, mask[:, :end])
        close(states[:, :, i], want)


def test_what_cannot_be_written_is_left_out_for_its_row_and_head() -> None:
    k, v, beta, log_decay, mask, initial = blocks(3, 4)
    mask = torch.ones_like(mask)
    places = [(k, 0, torch.nan), (v, 1, torch.inf), (k, 2, 2 * LARGEST), (v, 3, -2 * LARGEST)]
    places += [(beta, 4, torch.nan), (log_decay, 5, -torch.inf)]
    expected = mask.clone()
    for x, place, poison in places:
        x[1, 0, place // 4, place % 4] = poison
        expected[1, 0, place // 4, place % 4] = False
    leaves = [x.requires_grad_() for x in (k, v, beta, log_decay)]
    states, written, clamped = write_gated_delta(*leaves, mask, initial, 1e4)
    assert torch.equal(written, expected)
    assert not clamped.any()
    clean = blocks(3, 4)
    want = write_gated_delta(*clean[:4], expected, initial, 1e4).states
    close(states, want)
    states[:, :, -1].sum().backward()
    assert all(x.grad.isfinite().all() for x in leaves)


def test_the_largest_that_is_written_stays_finite() -> None:
    k, v, beta, log_decay, _, initial = (x.float() for x in blocks(6, 4))
    k[0, 0, ::2, 1], v[0, 0, 1:, 2] = 0.9 * LARGEST, 0.9 * LARGEST
    k[0, 0, 1:, 3] = 1e-9
    beta = torch.ones_like(beta)
    mask = torch.ones(beta.shape, dtype=torch.bool)
    states, written, clamped = write_gated_delta(k, v, beta, log_decay, mask, initial, 1e4)
    assert written.all()
    assert states.isfinite().all()
    assert clamped[0, 0].any()
    assert not clamped[1:].any()


def test_a_limited_change_is_counted_and_keeps_its_direction() -> None:
    k, v, beta, log_decay, mask, initial = blocks(1, 4)
    mask, v2 = torch.ones_like(mask), v.clone()
    v2[1, 0] *= 1e3
    free = write_gated_delta(k, v2, beta, log_decay, mask, initial, 1e9)
    limited = write_gated_delta(k, v2, beta, log_decay, mask, initial, 10.0)
    assert limited.clamped.nonzero().tolist() == [[1, 0, 0]]
    assert not free.clamped.any()
    decayed = initial * log_decay.sum((-1, -2)).exp()[..., None, None]
    change, whole = (x.states[:, :, 1] - decayed for x in (limited, free))
    assert float(change[1, 0].abs().max()) == pytest.approx(10.0)
    close(change[1, 0] / change[1, 0].norm(), whole[1, 0] / whole[1, 0].norm())
    for b, g in ((0, 0), (0, 1), (1, 1)):
        close(change[b, g], whole[b, g])
