"""The losses against their plain definitions."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F

from distill.objective import QUERIES, language_loss, score_loss, transfer_loss, weights_loss
from replace import ranks
from replace.errors import UserError
from replace.observe import Attending


@pytest.fixture
def parts():
    """Hidden states of student and teacher, a head, ids, and answers at two places."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 300, 8, generator=generator, requires_grad=True)
    teacher = torch.randn(2, 300, 8, generator=generator)
    weight = torch.randn(17, 8, generator=generator)
    ids = torch.randint(0, 17, (2, 300), generator=generator)
    answers = torch.zeros(2, 300, dtype=torch.bool)
    answers[0, 290:295] = True
    return hidden, teacher, lambda x: x @ weight.T, ids, answers


def plain(hidden, teacher, head, ids, answers, real, objective):
    log_q, log_p = (head(x)[:, :-1].log_softmax(-1) for x in (hidden, teacher))
    nll = F.nll_loss(log_q.transpose(1, 2), ids[:, 1:], reduction="none")
    use = torch.ones_like(nll, dtype=torch.bool) if real is None else real[:, 1:] & real[:, :-1]
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)[use].mean()
    ce = nll[use].mean()
    asked = answers[:, 1:] & use
    text = {"kl": kl, "ce": ce, "mix": (kl + ce) / 2}[objective]
    return text + (nll[asked].mean() if asked.any() else 0.0)


@pytest.mark.parametrize("objective", ["kl", "ce", "mix"])
@pytest.mark.parametrize("padded", [False, True])
def test_the_chunked_objective_is_the_plain_one(parts, objective, padded):
    hidden, teacher, head, ids, answers = parts
    real = None
    if padded:
        real = torch.ones(2, 300, dtype=torch.bool)
        real[1, 200:] = False
    want = plain(hidden, teacher, head, ids, answers, real, objective)
    (gradient,) = torch.autograd.grad(want, hidden)
    loss = language_loss(hidden, teacher, head, head, ids, answers, real, objective)
    loss.total.backward()
    assert torch.allclose(loss.total, want, atol=1e-5)
    assert torch.allclose(hidden.grad, gradient, atol=1e-6)


def test_text_without_answers_has_no_answer_loss(parts):
    hidden, teacher, head, ids, answers = parts
    loss = language_loss(hidden, teacher, head, head, ids, answers & False, None, "kl")
    assert loss.answers == 0.0
    assert float(loss.total) == pytest.approx(loss.kl, abs=1e-5)


def test_kl_to_oneself_is_zero(parts):
    hidden, _, head, ids, answers = parts
    loss = language_loss(hidden, hidden.detach(), head, head, ids, answers & False, None, "kl")
    loss.total.backward()
    assert abs(loss.kl) < 1e-6
    assert hidden.grad.abs().max() < 1e-6


@pytest.mark.parametrize("kind", ["mse", "huber", "cosine"])
def test_transfer_losses_vanish_on_the_target_and_ignore_pads(kind):
    target = torch.randn(2, 5, 4)
    real = torch.ones(2, 5, dtype=torch.bool)
    real[0, 3:] = False
    spoiled = torch.where(real.unsqueeze(-1), target, torch.full_like(target, 99.0))
    assert transfer_loss(kind, spoiled, target, real)[0] < 1e-6
    assert transfer_loss(kind, spoiled, target, None)[0] > 1e-3


def test_layers_of_different_scale_weigh_alike():
    target, noise = torch.randn(1, 50, 8), torch.randn(1, 50, 8)
    small, _ = transfer_loss("mse", target + 0.1 * noise, target, None)
    large, _ = transfer_loss("mse", 100 * (target + 0.1 * noise), 100 * target, None)
    assert float(small) == pytest.approx(float(large), rel=1e-4)


def test_an_unknown_transfer_loss_is_refused_by_name():
    with pytest.raises(UserError, match=r"stage\.transfer_loss='l1'"):
        transfer_loss("l1", torch.ones(1, 1, 1), torch.ones(1, 1, 1), None)


def test_scores_learn_which_tokens_are_looked_at_later():
    later = torch.tensor([[[0.9, 0.5, 0.01, 0.4, 0.02, 0.0]]])
    wanted = torch.tensor([[[0.0, 9.0, -9.0, 9.0, -9.0, 9.0]]])
    assert score_loss(wanted, later.clone(), keep=2, sinks=1) < 1e-3
    # The sink at 0 and the last token, which nothing followed, do not count.
    other = wanted.clone()
    other[..., 0], other[..., 5] = 50.0, -50.0
    assert torch.equal(score_loss(wanted, later.clone(), 2, 1), score_loss(other, later.clone(), 2, 1))
    assert score_loss(-wanted, later.clone(), 2, 1) > 5


@pytest.mark.parametrize("length", [1, 19, 2 * QUERIES + 5])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    "more",
    [{}, {"softcap": 1.5, "sliding_window": 7, "sink_logit": torch.tensor([0.3, -1.0, 2.0, 0.0]).double()}],
)
def test_the_chunked_loss_of_weights_is_the_quadratic_one(length, padded, more):
    generator = torch.Generator().manual_seed(length)
    query, key = (torch.randn(2, heads, length, 6, generator=generator).double() for heads in (4, 2))
    phi_q, phi_k = (torch.rand(2, heads, length, 5, generator=generator).double() for heads in (4, 2))
    phi_q[..., 1:3, :, 1:] = 0  # weights of exactly 0 in some places
    phi_k[:, 0, ::3, 0] = 0
    real = torch.ones(2, length, dtype=torch.bool)
    if padded:
        real[0, : length // 3], real[1, length - length // 4 :] = False, False
    leaves = [phi_q.requires_grad_(), phi_k.requires_grad_()]
    own, place = torch.arange(length).unsqueeze(-1), torch.arange(length)
    mask = ((place <= own) & real[:, None] & real[:, :, None]).unsqueeze(1) if padded else None
    softmax = Attending(query, key, 0.5, mask, **more)
    total, count = 0, 0
    for row in range(2):
        for head in range(4):
            seen = (place <= own) & real[row]
            logits = softmax.scaling * query[row, head] @ key[row, head // 2].T
            near = seen
            if softmax.softcap is not None:
                logits = softmax.softcap * torch.tanh(logits / softmax.softcap)
                near = seen & (own - place < softmax.sliding_window)
            weights = logits.exp() * near
            extra = 0 if softmax.sink_logit is None else softmax.sink_logit[head].exp()
            target = weights / (weights.sum(-1, keepdim=True) + extra)
            mine = phi_q[row, head] @ phi_k[row, head // 2].T * seen
            share = mine.clamp_min(1e-20) / mine.sum(-1, keepdim=True).clamp_min(1e-20)
            for t in range(length):
                if real[row, t]:
                    total = total - (target[t, : t + 1] * share[t, : t + 1].log()).sum()
                    count += 1
    want = total / count
    gradients = torch.autograd.grad(want, leaves)
    got = weights_loss(phi_q, phi_k, softmax)
    assert got.item() == pytest.approx(want.item(), rel=1e-10)
    for mine, wanted in zip(torch.autograd.grad(got, leaves), gradients, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-9, atol=1e-12)


def by_two_ranks(loss, rows, shares):
    """The figures of `loss` of `rows[share]`, one rank a share; the ranks are threads, joined by gloo."""
    store = dist.HashStore()

    def of(index):
        group = dist.ProcessGroupGloo(store, index, 2, timedelta(seconds=30))
        token = ranks._team.set(ranks.Team(size=2, place=index, group=group))
        try:
            return loss(*(row[shares[index]] for row in rows))
        finally:
            ranks._team.reset(token)

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(of, range(2)))


@pytest.mark.parametrize("pads", [0, 1, 2])
@pytest.mark.parametrize("kind", ["mse", "huber", "cosine"])
def test_shares_of_a_transfer_loss_add_up_also_where_a_rank_has_pads_only(kind, pads):
    torch.manual_seed(0)
    rows = torch.randn(4, 6, 8), 3 * torch.randn(4, 6, 8) + 5, torch.rand(4, 6) < 0.7
    rows[2][4 - pads :] = False

    def loss(student, target, real):
        student = student.clone().requires_grad_(True)
        found, raw = transfer_loss(kind, student, target, real)
        found.backward()
        return found.detach(), raw, student.grad

    whole = loss(*rows)
    found, raw, gradient = zip(*by_two_ranks(loss, rows, [slice(0, 2), slice(2, 4)]), strict=True)
    torch.testing.assert_close(sum(found), whole[0])
    torch.testing.assert_close(sum(raw), whole[1])
    torch.testing.assert_close(torch.cat(gradient), whole[2])
