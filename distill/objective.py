"""The losses: transfer losses per layer, the score loss, and the language-model objective in chunks.

Where ranks share the rows of a batch, each loss here is a rank's share of the one over all of them.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from replace import ranks
from replace.errors import bad_value
from replace.observe import Attending

CHUNK = 256
"""Tokens whose logits exist at once."""

QUERIES = 128
"""Queries whose attention weights exist at once."""

FLOOR = 1e-20
"""Of a feature weight: a ReLU may give exactly 0, whose logarithm has no gradient."""


def transfer_loss(kind: str, student: Tensor, teacher: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor]:
    """The loss of one layer's attention output against the teacher's; for its weights see `weights_loss`.

    Args:
        kind: mse, huber or cosine. Cosine looks at directions only: magnitude is lost, a last resort.
        student, teacher: `[B, T, C]`.
        real: `[B, T]` bool, False for pads, or None.

    Returns:
        the loss relative to the target's variance (cosine as it is), so that layers weigh alike, and the raw
        loss.
    """
    s, t = student.float(), teacher.float()
    if real is not None:
        s, t = s[real], t[real]
    # Sums, since the mean over a rank's rows is NaN where all of them are pads.
    count = ranks.total(torch.tensor(t.numel(), device=t.device)).clamp_min(1)
    if kind == "mse":
        raw = F.mse_loss(s, t, reduction="sum") / count
    elif kind == "huber":
        deviation = ranks.variance(t).sqrt().clamp_min(1e-6)
        loss = F.huber_loss(s / deviation, t / deviation, reduction="sum") / count
        return loss, loss.detach() * deviation.square()
    elif kind == "cosine":
        raw = (1 - F.cosine_similarity(s, t, dim=-1)).sum() * t.shape[-1] / count
        return raw, raw.detach()
    else:
        raise bad_value("stage.transfer_loss", kind, ["mse", "huber", "cosine"])
    return raw / ranks.variance(t).clamp_min(1e-12), raw.detach()


def weights_loss(phi_q: Tensor, phi_k: Tensor, attending: Attending) -> Tensor:
    """Cross-entropy of the normalised feature weights against the teacher's softmax (Zhang et al. 2024).

    A query's weights are phi(q).phi(k) over their sum, over itself and all keys before it. They are made
    chunk by chunk and made again in the backward, so nothing of size T x T is held.

    Args:
        phi_q: `[B, H, T, F]`; phi_k: `[B, G, T, F]`; the gradient goes to these.
        attending: what the teacher's attention was given.

    Returns:
        the mean over real queries and heads, in nats.
    """
    heads, length = phi_q.shape[1:3]
    groups = phi_k.shape[1]
    real = attending.real()

    def part(student_q: Tensor, student_k: Tensor, real: Tensor) -> Tensor:
        size, stop = student_q.shape[2], student_k.shape[2]
        own = torch.arange(stop - size, stop, device=real.device).unsqueeze(-1)
        seen = (torch.arange(stop, device=real.device) <= own) & real[:, None]  # [B, c, stop]
        with torch.no_grad():
            target = attending.log_weights(stop - size, stop).exp()  # [B, G, R, c, stop]
        weights = student_q.unflatten(1, (groups, -1)) @ student_k.unsqueeze(2).transpose(-1, -2)
        weights = torch.where(seen[:, None, None], weights, 0)
        log = weights.clamp_min(FLOOR).log() - weights.sum(-1, keepdim=True).clamp_min(FLOOR).log()
        loss = -(target * log).sum(-1)  # [B, G, R, c]
        return (loss * real[:, None, None, -size:]).sum()

    total = torch.zeros((), dtype=phi_q.dtype, device=phi_q.device)
    for start in range(0, length, QUERIES):
        known = slice(0, start + QUERIES)
        arguments = (phi_q[:, :, start : start + QUERIES], phi_k[:, :, known], real[:, known])
        total = total + checkpoint(part, *arguments, use_reentrant=False)
    return total / (heads * ranks.total(real.sum()).clamp_min(1))


def score_loss(score: Tensor, later: Tensor, keep: int, sinks: int) -> Tensor:
    """Binary cross-entropy of scores against "is among the `keep` tokens with the largest later attention".

    Args:
        score: `[B, G, T]` logits.
        later: `[B, G, T]` from `replace.observe.later_attention`, 0 where no query counted.
        sinks: the first tokens, which need no score, do not count.
    """
    known = later > 0
    known[..., :sinks] = False
    ranked = later.masked_fill(~known, -1.0)
    top = ranked.topk(min(keep, ranked.shape[-1]), dim=-1).indices
    target = torch.zeros_like(score).scatter_(-1, top, 1.0)
    loss = F.binary_cross_entropy_with_logits(score, target, reduction="none")
    return (loss * known).sum() / ranks.total(known.sum()).clamp_min(1)


@dataclass
class LanguageLoss:
    """The parts of one language-model loss; `total` carries the gradient."""

    total: Tensor
    kl: float
    ce: float
    answers: float


def language_loss(
    hidden: Tensor,
    teacher_hidden: Tensor | None,
    head: Callable[[Tensor], Tensor],
    teacher_head: Callable[[Tensor], Tensor],
    input_ids: Tensor,
    answers: Tensor,
    real: Tensor | None,
    objective: str,
) -> LanguageLoss:
    """KL to the teacher, cross-entropy on the text or both, plus cross-entropy on recall answers.

    Logits are made chunk by chunk and made again in the backward, so `[B, T, V]` never exists.

    Args:
        hidden, teacher_hidden: `[B, T, C]`, what the output embedding is given.
        head, teacher_head: `[N, C]` -> logits `[N, V]`.
        input_ids: `[B, T]`; position t predicts t + 1.
        answers, real: `[B, T]` bool; real is None where nothing is padded.
        objective: kl, ce or mix (their mean).
    """
    target = input_ids[:, 1:].flatten()
    counted = (
        torch.ones_like(target, dtype=torch.bool) if real is None else (real[:, 1:] & real[:, :-1]).flatten()
    )
    answer = answers[:, 1:].flatten() & counted
    student = hidden[:, :-1].flatten(0, 1)
    teacher = None if teacher_hidden is None else teacher_hidden[:, :-1].flatten(0, 1)

    def part(s: Tensor, t: Tensor | None, label: Tensor, use: Tensor, asked: Tensor) -> Tensor:
        log_q = head(s).float().log_softmax(-1)
        nll = -log_q.gather(-1, label.unsqueeze(-1)).squeeze(-1)
        sums = [(nll * use).sum(), (nll * asked).sum()]
        if t is None:
            return torch.stack([nll.new_zeros(()), *sums])
        with torch.no_grad():
            log_p = teacher_head(t).float().log_softmax(-1)
        kl = (log_p.exp() * (log_p - log_q)).sum(-1)
        return torch.stack([(kl * use).sum(), *sums])

    total = torch.zeros(3, device=hidden.device)
    for start in range(0, len(target), CHUNK):
        piece = slice(start, start + CHUNK)
        arguments = (
            student[piece],
            None if teacher is None else teacher[piece],
            target[piece],
            counted[piece],
            answer[piece],
        )
        total = total + checkpoint(part, *arguments, use_reentrant=False)
    tokens, asked = ranks.total(torch.stack([counted.sum(), answer.sum()]))
    tokens = tokens.clamp_min(1)
    kl, ce = total[0] / tokens, total[1] / tokens
    on_answers = total[2] / asked.clamp_min(1)
    text = {"kl": kl, "ce": ce, "mix": (kl + ce) / 2}[objective]
    # One lost answer should weigh like the text around it, not like one token among a thousand.
    loss = text + torch.where(asked > 0, on_answers, torch.zeros_like(on_answers))
    return LanguageLoss(
        loss, float(kl.detach()), float(ce.detach()), float(on_answers.detach()) if bool(asked) else 0.0
    )
