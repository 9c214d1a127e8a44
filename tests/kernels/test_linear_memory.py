"""The linear memory: blocks against tokens, means against sums, and a guard that keeps M, z and n in step."""

import pytest
import torch

from kernels.linear_memory.chunk import Memory, read, write_delta, write_delta_bounded, write_linear
from kernels.linear_memory.reference import delta, delta_bounded, linear_memory

WRITES = [write_linear, write_delta, write_delta_bounded]


def tokens(
    blocks: int, size: int, features: int = 4, width: int = 3, batch: int = 2, groups: int = 2
) -> tuple:
    """phi_k > 0, v and weights in fp64, a third of the weights 0."""
    generator = torch.Generator().manual_seed(blocks * 100 + size)
    shape = (batch, groups, blocks, size)
    phi = torch.rand(*shape, features, generator=generator, dtype=torch.float64) + 0.1
    v = torch.randn(*shape, width, generator=generator, dtype=torch.float64)
    weight = torch.rand(*shape, generator=generator, dtype=torch.float64)
    return phi, v, torch.where(weight > 1 / 3, weight, 0)


def empty(phi: torch.Tensor, v: torch.Tensor) -> Memory:
    """An fp64 memory that holds nothing."""
    memory = Memory.empty(*phi.shape[:2], phi.shape[-1], v.shape[-1], phi.device)
    return Memory(memory.M.double(), memory.z.double(), memory.n)


def entry(memory: Memory, i: int) -> Memory:
    """The prefix state after i blocks."""
    return Memory(memory.M[:, :, i], memory.z[:, :, i], memory.n[:, :, i])


def close(got: torch.Tensor, want: torch.Tensor, limit: float = 1e-10) -> None:
    """RMS of the difference within `limit` of the RMS of `want` (design 04)."""
    error = (got - want).square().mean().sqrt() / want.square().mean().sqrt().clamp_min(1e-12)
    assert float(error) <= limit, f"relative RMS error {float(error):.1e} above {limit:.0e}"


@pytest.mark.parametrize(
    ("length", "block", "lookback"), [(1, 4, 0), (15, 4, 1), (16, 4, 0), (17, 4, 2), (13, 1, 3), (7, 16, 0)]
)
def test_chunks_equal_the_reference(length: int, block: int, lookback: int) -> None:
    torch.manual_seed(length)
    groups, repeat, features, width = 2, 2, 5, 3
    phi_q = torch.rand(2, length, groups * repeat, features).double()
    phi_k = torch.rand(2, length, groups, features).double()
    v = torch.randn(2, length, groups, width).double()
    weight = torch.rand(2, length, groups).double()
    want, M, z = linear_memory(phi_q, phi_k, v, weight, block, lookback)
    blocks = -(-length // block)

    def arranged(x: torch.Tensor) -> torch.Tensor:  # [B, T, X, ...] -> [B, X, N, S, ...]
        fill = x.new_zeros(x.shape[0], blocks * block - length, *x.shape[2:])
        return torch.cat([x, fill], 1).transpose(1, 2).unflatten(2, (blocks, block))

    states, clamped = write_linear(
        arranged(phi_k), arranged(v), arranged(weight), empty(arranged(phi_k), v), 1e4
    )
    assert int(clamped.sum()) == 0
    last = entry(states, blocks)
    close(last.M * last.n[..., None, None], M)
    close(last.z * last.n[..., None], z)
    for t in range(length):
        before = entry(states, max(0, t // block - lookback))
        q = phi_q[:, t].unflatten(1, (groups, repeat)).unsqueeze(2)
        one = Memory(before.M.unsqueeze(2), before.z.unsqueeze(2), before.n.unsqueeze(2))
        numerator, denominator = read(q, one)
        answer = torch.where(denominator > 0, numerator / denominator, 0).squeeze(2).flatten(1, 2)
        torch.testing.assert_close(answer, want[:, t], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("blocks", "size"), [(1, 1), (4, 3), (5, 1), (2, 7)])
@pytest.mark.parametrize(("write", "reference"), [(write_delta, delta), (write_delta_bounded, delta_bounded)])
def test_delta_equals_the_reference(blocks: int, size: int, write, reference) -> None:
    phi, v, weight = tokens(blocks, size)
    states, _ = write(phi, v, weight, empty(phi, v), 1e9)
    last = entry(states, blocks)
    for b in range(phi.shape[0]):
        for g in range(phi.shape[1]):
            M, z, n = reference(phi[b, g], v[b, g], weight[b, g])
            torch.testing.assert_close(last.M[b, g] * last.n[b, g], M, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(last.z[b, g] * last.n[b, g], z, rtol=1e-9, atol=1e-9)
            assert float(last.n[b, g]) == pytest.approx(n, rel=1e-9)


@pytest.mark.parametrize("write", WRITES)
def test_split_and_resume(write) -> None:
    phi, v, weight = tokens(7, 3)
    whole, _ = write(phi, v, weight, empty(phi, v), 1e4)
    for cut in range(8):
        first, _ = write(phi[:, :, :cut], v[:, :, :cut], weight[:, :, :cut], empty(phi, v), 1e4)
        rest, _ = write(phi[:, :, cut:], v[:, :, cut:], weight[:, :, cut:], entry(first, cut), 1e4)
        for name in ("M", "z", "n"):
            close(getattr(rest, name)[:, :, -1], getattr(whole, name)[:, :, -1])


@pytest.mark.parametrize("write", WRITES)
def test_gradients(write) -> None:
    phi, v, weight = tokens(3, 2, features=3, width=2, batch=1)
    start, _ = write(*tokens(2, 2, features=3, width=2, batch=1), empty(phi, v), 1e4)
    start = entry(start, 2)

    def call(phi, v, weight, M, z):
        states, _ = write(phi, v, weight, Memory(M, z, start.n), 1e4)
        # What is read is M / z, or M and z times n: the only ways in which gradients are asked for.
        n = states.n.detach()
        return states.M * n[..., None, None], states.z * n[..., None]

    # Weights of exactly 0 are a kink.
    leaves = (phi, v, weight.clamp_min(0.2), start.M.clone(), start.z.clone())
    assert torch.autograd.gradcheck(call, tuple(x.requires_grad_() for x in leaves))


@pytest.mark.parametrize("write", WRITES)
def test_a_block_without_tokens_changes_nothing(write) -> None:
    phi, v, weight = tokens(3, 4)
    weight[:, :, 1] = 0
    states, _ = write(phi, v, weight, empty(phi, v), 1e4)
    for name in ("M", "z", "n"):
        torch.testing.assert_close(
            getattr(states, name)[:, :, 2], getattr(states, name)[:, :, 1], rtol=1e-12, atol=0
        )


@pytest.mark.parametrize("write", WRITES)
def test_a_limited_update_is_counted_and_keeps_its_direction(write) -> None:
    phi, v, weight = tokens(1, 4)
    weight = weight.clamp_min(0.2)
    free, none = write(phi, v, weight, empty(phi, v), 1e9)
    v2, limit = v.clone(), 10.0
    v2[1, 0] *= 1e3
    limited, clamped = write(phi, v2, weight, empty(phi, v2), limit)
    assert int(none.sum()) == 0
    assert int(clamped.sum()) == 1
    close(limited.M[0], free.M[0])
    close(limited.M[1, 1], free.M[1, 1])
    assert float(limited.M[1, 0, 1].abs().max()) == pytest.approx(limit)
    q = torch.rand(1, phi.shape[-1]).double()
    unlimited, _ = write(phi, v2, weight, empty(phi, v2), 1e9)
    answers = [(q @ s.M[1, 0, 1]) / (q @ s.z[1, 0, 1]) for s in (limited, unlimited)]
    close(*answers)


def test_running_mean_is_the_papers_sum_over_many_blocks() -> None:
    phi, v, weight = tokens(2000, 2, batch=1, groups=1)
    states, _ = write_linear(
        phi.float(), v.float(), weight.float(), Memory.empty(1, 1, 4, 3, phi.device), 1e4
    )
    M = torch.einsum("bgnsf,bgnsd->bgfd", phi * weight.unsqueeze(-1), v)
    z = (phi * weight.unsqueeze(-1)).sum((2, 3))
    last = entry(states, 2000)
    close(last.M.double() * last.n[..., None, None], M, 1e-4)
    close(last.z.double() * last.n[..., None], z, 1e-5)


def test_a_linear_read_lies_within_the_values_and_ignores_the_scale_of_keys() -> None:
    phi, v, weight = tokens(4, 3)
    weight = weight.clamp_min(0.1)
    q = torch.rand(*phi.shape[:2], 1, 5, phi.shape[-1]).double()

    def answer(phi: torch.Tensor) -> torch.Tensor:
        last = entry(write_linear(phi, v, weight, empty(phi, v), 1e9)[0], 4)
        numerator, denominator = read(q, Memory(last.M.unsqueeze(2), last.z.unsqueeze(2), last.n))
        return numerator / denominator

    got, values = answer(phi).squeeze(2), v.flatten(2, 3)
    assert (got <= values.amax(2, keepdim=True) + 1e-12).all()
    assert (got >= values.amin(2, keepdim=True) - 1e-12).all()
    close(answer(phi * 37), answer(phi))


def test_a_repeated_pair_settles_at_half_by_the_published_delta_rule() -> None:
    phi = torch.tensor([0.3, 1.0, 0.1, 2.0]).double().expand(1, 1, 6, 1, 4)
    v = torch.tensor([1.0, -2.0, 0.5]).double().expand(1, 1, 6, 1, 3)
    states, _ = write_delta(phi, v, torch.ones(1, 1, 6, 1).double(), empty(phi, v), 1e4)
    for i, share in enumerate((1, 0.5, 0.5, 0.5, 0.5, 0.5), start=1):
        held = entry(states, i)
        got = (phi[0, 0, 0] @ held.M[0, 0]) / (phi[0, 0, 0] @ held.z[0, 0])
        torch.testing.assert_close(got, share * v[0, 0, 0], rtol=1e-12, atol=0)


def test_a_repeated_pair_is_read_back_by_the_bounded_delta_rule() -> None:
    phi = torch.tensor([0.3, 1.0, 0.1, 2.0]).double().expand(1, 1, 6, 1, 4)
    v = torch.tensor([1.0, -2.0, 0.5]).double().expand(1, 1, 6, 1, 3)
    states, _ = write_delta_bounded(phi, v, torch.ones(1, 1, 6, 1).double(), empty(phi, v), 1e4)
    for i in range(1, 7):
        held = entry(states, i)
        torch.testing.assert_close((phi[0, 0, 0] @ held.M[0, 0]) / (phi[0, 0, 0] @ held.z[0, 0]), v[0, 0, 0])


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("first", [1, 2, 8])
def test_the_delta_state_stays_bounded(scale: float, first: int) -> None:
    generator = torch.Generator().manual_seed(first)
    size, blocks = 8, 40
    phi = torch.rand(1, 1, blocks, size, 6, generator=generator) * scale
    phi = phi * torch.logspace(0, 1, blocks).view(1, 1, -1, 1, 1)  # keys that grow
    v = torch.randn(1, 1, blocks, size, 4, generator=generator)
    weight = torch.ones(1, 1, blocks, size)
    weight[:, :, 0, first:] = 0
    states, clamped = write_delta_bounded(phi, v, weight, Memory.empty(1, 1, 6, 4, phi.device), 1e30)
    q = torch.rand(1, 1, blocks + 1, 3, 6, generator=generator)
    numerator, denominator = read(q, states)
    answers = (numerator / denominator)[:, :, 1:]
    assert answers.isfinite().all()
    assert float(answers.abs().max()) < 50
    assert int(clamped.sum()) == 0
