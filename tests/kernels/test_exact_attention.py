"""Softmax over a bounded set of keys: both chunked forms against one query at a time."""

import pytest
import torch

from kernels.exact_attention.chunk import exact_attention, exact_attention_with_mass
from kernels.exact_attention.reference import exact_keys, softmax_read


def inputs(
    batch: int = 2,
    groups: int = 2,
    blocks: int = 3,
    queries: int = 4,
    keys: int = 7,
    width: int = 5,
    repeat: int = 1,
) -> tuple:
    """q, k, v in fp64 (value width apart from key width) and a mask in which every query sees its own key;
    `queries` are those of `repeat` heads, which share the mask.
    """
    torch.manual_seed(0)
    shape = (batch, groups, blocks)
    q, k = torch.randn(*shape, queries, width).double(), torch.randn(*shape, keys, width).double()
    v = torch.randn(*shape, keys, width + 1).double()
    mask = torch.rand(batch, 1, blocks, queries // repeat, keys) > 0.4
    mask[..., 0] = True
    return q, k, v, mask


@pytest.mark.parametrize("repeat", [1, 2])
@pytest.mark.parametrize("gradients", [False, True])
def test_both_forms_equal_the_reference(repeat: int, gradients: bool) -> None:
    q, k, v, mask = inputs(repeat=repeat)
    with torch.set_grad_enabled(gradients):
        plain = exact_attention(q, k, v, mask, 0.7)
    spelled, mass = exact_attention_with_mass(q, k, v, mask, 0.7)
    for place in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:4])).tolist():
        b, g, n, i = place
        seen = mask[b, 0, n, i % mask.shape[3]]
        want = softmax_read(q[b, g, n, i], k[b, g, n][seen], v[b, g, n][seen], 0.7)
        torch.testing.assert_close(plain[b, g, n, i], want, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(spelled[b, g, n, i], want, rtol=1e-10, atol=1e-10)
        logits = 0.7 * k[b, g, n][seen] @ q[b, g, n, i]
        torch.testing.assert_close(mass[b, g, n, i, 0], logits.logsumexp(0), rtol=1e-10, atol=1e-10)


def test_learned_sink_and_soft_cap() -> None:
    q, k, v, mask = inputs()
    sink = torch.randn(1, q.shape[1], 1, q.shape[3], 1).double()
    out, mass = exact_attention_with_mass(q, k, v, mask, 0.7, softcap=2.0, sink_logit=sink)
    logits = (2 * torch.tanh(0.7 * q @ k.transpose(-1, -2) / 2)).exp() * mask
    total = logits.sum(-1, keepdim=True) + sink.exp()
    torch.testing.assert_close(out, logits @ v / total, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(mass, total.log(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("sink", [False, True])
def test_gradients(sink: bool) -> None:
    q, k, v, mask = inputs(1, 2, 2, 2, 3, 2)
    logit = torch.randn(1, 2, 1, 2, 1).double().requires_grad_() if sink else None

    def call(q, k, v, logit):
        return exact_attention_with_mass(q, k, v, mask, 0.7, softcap=3.0 if sink else None, sink_logit=logit)

    leaves = [x.requires_grad_() for x in (q, k, v)]
    assert torch.autograd.gradcheck(call, (*leaves, logit))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_finite_at_large_activations(dtype: torch.dtype) -> None:
    q, k, v, mask = (x.to(dtype) * 1e3 if x.dtype != torch.bool else x for x in inputs())
    assert exact_attention(q, k, v, mask, 0.1).isfinite().all()
    with torch.no_grad():
        assert exact_attention(q, k, v, mask, 0.1).isfinite().all()
    assert exact_attention_with_mass(q, k, v, mask, 0.1)[0].isfinite().all()


def test_exact_keys_are_between_window_and_window_plus_block() -> None:
    assert exact_keys(9, block=4, lookback=1, sinks=2, retained=[3]) == [0, 1, 3, 4, 5, 6, 7, 8, 9]
    assert exact_keys(5, block=4, lookback=1, sinks=2, retained=[]) == [0, 1, 2, 3, 4, 5]
    for t in range(50):
        window = exact_keys(t, 4, 2, 0, [])
        assert min(t + 1, 8) <= len(window) <= 8 + 4
