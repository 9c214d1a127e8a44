"""How a model writes when nobody holds its hand: likelihood alone hides repetition and drift.

Greedy continuations of fixed prompts and of the beginnings of held-out texts, which are longer than a usual
window, beside the teacher's of the same prompts. The student's text is then scored by the teacher: after each
prefix of the student's own, KL(student || teacher) over the whole vocabulary, and the loss that the teacher
has on it, beside the loss that it has on its own continuations.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from statistics import fmean

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from eval.ablation import mixers
from eval.intervals import bootstrap
from eval.measurements import KEPT, MEASUREMENTS
from replace.config import Config
from replace.loading import load_model

PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a village by the sea, there lived",
    "To make a good cup of tea, first",
    "The three states of matter are",
    "Dear Sir or Madam,\n\nI am writing to you because",
    "def fibonacci(n):\n",
    "Question: Why is the sky blue?\nAnswer:",
    "A list of things to pack for a journey:\n1.",
)
LONG = 320
"""Tokens of the beginnings of held-out texts."""
TOKENS = 96
"""Tokens of a continuation, unless the model ends it."""
REPEATED, DISTINCT = 4, (1, 2, 3)
SEED = 0


@dataclass
class Writing:
    """Prompts and continuations as token ids, and the loss of the model on its own, a token (or None)."""

    prompts: list[list[int]]
    continuations: list[list[int]]
    loss: float | None


@KEPT.register("writing")
def keep(model, tokenizer, config: Config, using) -> Writing:
    """The teacher's continuations, which every student's are compared with."""
    prompts = prompts_of(tokenizer, using.books)
    written = continuations(model, tokenizer, prompts)
    losses = [
        loss
        for prompt, continuation in zip(prompts, written, strict=True)
        for loss in _losses(_log_probabilities(model, prompt, continuation), continuation)
    ]
    return Writing(prompts, written, fmean(losses) if losses else None)


@MEASUREMENTS.register("writing")
def writing(model, tokenizer, config: Config, using) -> dict:
    """The figures of this model's continuations, and beside them the teacher's.

    Returns:
        {"writing": {"prompts", "tokens" (written in all), "repetition", "distinct" (see `repetition` and
        `distinct`), "agreement" (mean share of a continuation's tokens before the first that is not the
        teacher's), "kl": {"value" (nats a token), "interval" (bootstrap over continuations), "teacher_loss"
        (of the teacher on this text), "own_loss" (of the teacher on its own)}, "teacher": {"repetition",
        "distinct"}, "continuations": [{"prompt", "text", "teacher", "change"}], the most changed first}};
        what needs a teacher is null with "why" where there is none.
    """
    teacher: Writing | None = using.kept.get("writing")
    is_teacher = not mixers(model)
    if teacher is not None and is_teacher:
        prompts, written = teacher.prompts, teacher.continuations
    else:
        prompts = teacher.prompts if teacher is not None else prompts_of(tokenizer, using.books)
        written = continuations(model, tokenizer, prompts)
    result: dict = {"prompts": len(prompts), "tokens": sum(map(len, written)), **_figures(written)}
    theirs = None if teacher is None else teacher.continuations
    result["teacher"] = None if theirs is None else _figures(theirs)
    result["continuations"] = _gallery(tokenizer, prompts, written, theirs)
    if teacher is None or theirs is None:
        nothing = "the model was measured without the run that knows its teacher"
    elif is_teacher:
        nothing = "this is the teacher"
    else:
        result["agreement"] = fmean(_agreement(a, b) for a, b in zip(written, theirs, strict=True))
        scored = _scored_by_the_teacher(model, config, prompts, written)
        result["kl"] = scored | {"own_loss": teacher.loss}
        return {"writing": result}
    return {"writing": result | {"agreement": None, "kl": {"value": None, "interval": None, "why": nothing}}}


def prompts_of(tokenizer, books: dict[str, str]) -> list[list[int]]:
    """The fixed prompts, and the first `LONG` tokens of each held-out text."""
    short = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    long = [tokenizer(text[: 12 * LONG], verbose=False)["input_ids"][:LONG] for text in books.values()]
    return [*short, *long]


@torch.inference_mode()
def continuations(
    model, tokenizer, prompts: Sequence[Sequence[int]], tokens: int | None = None
) -> list[list[int]]:
    """Greedy continuations through the model's own `generate` and cache, without the token that ends them.

    Short prompts are padded on the left and read together; so are the long ones.
    """
    device = model.get_input_embeddings().weight.device
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    ends = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}
    written: list[list[int]] = [[]] * len(prompts)
    middle = LONG // 2
    groups = [[i for i, p in enumerate(prompts) if (len(p) > middle) == long] for long in (False, True)]
    for group in tqdm([g for g in groups if g], desc="writing", unit="batch", leave=False):
        width = max(len(prompts[index]) for index in group)
        rows = torch.full((len(group), width), pad)
        mask = torch.zeros_like(rows)
        for line, index in enumerate(group):
            rows[line, width - len(prompts[index]) :] = torch.tensor(prompts[index])
            mask[line, width - len(prompts[index]) :] = 1
        output = model.generate(
            input_ids=rows.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=TOKENS if tokens is None else tokens,
            do_sample=False,
            pad_token_id=pad,
        )
        for index, line in zip(group, output[:, width:].tolist(), strict=True):
            end = next((place for place, token in enumerate(line) if token in ends), len(line))
            written[index] = line[:end]
    return written


def grams(tokens: Sequence[int], length: int) -> list[tuple[int, ...]]:
    """The n-grams of a continuation, in order."""
    return [tuple(tokens[i : i + length]) for i in range(len(tokens) - length + 1)]


def repetition(texts: Sequence[Sequence[int]]) -> float | None:
    """The share of 4-grams that stood in the same continuation before; None where there are none."""
    found = [grams(text, REPEATED) for text in texts]
    total = sum(map(len, found))
    return sum(len(one) - len(set(one)) for one in found) / total if total else None


def distinct(texts: Sequence[Sequence[int]], length: int) -> float | None:
    """Different n-grams of all continuations over n-grams (Li et al. 2016); None where there are none."""
    found = [gram for text in texts for gram in grams(text, length)]
    return len(set(found)) / len(found) if found else None


def _figures(texts: Sequence[Sequence[int]]) -> dict:
    return {"repetition": repetition(texts), "distinct": {str(n): distinct(texts, n) for n in DISTINCT}}


def _agreement(mine: Sequence[int], theirs: Sequence[int]) -> float:
    """The share of the longer continuation that is their common beginning."""
    length = max(len(mine), len(theirs))
    pairs = enumerate(zip(mine, theirs, strict=False))
    same = next((place for place, (a, b) in pairs if a != b), min(len(mine), len(theirs)))
    return same / length if length else 1.0


def _gallery(
    tokenizer,
    prompts: Sequence[Sequence[int]],
    written: Sequence[Sequence[int]],
    theirs: Sequence[Sequence[int]] | None,
) -> list[dict]:
    """Every continuation beside the teacher's, the most changed first."""
    rows = []
    for place, (prompt, mine) in enumerate(zip(prompts, written, strict=True)):
        row = {
            "prompt": tokenizer.decode(prompt),
            "text": tokenizer.decode(mine),
            "teacher": None,
            "change": None,
        }
        if theirs is not None:
            alike = SequenceMatcher(None, list(mine), list(theirs[place]), autojunk=False).ratio()
            row |= {"teacher": tokenizer.decode(theirs[place]), "change": 1 - alike}
        rows.append(row)
    return sorted(rows, key=lambda row: -(row["change"] or 0.0))


def _scored_by_the_teacher(
    model, config: Config, prompts: Sequence[Sequence[int]], written: Sequence[Sequence[int]]
) -> dict:
    """KL(student || teacher) after each prefix that the student wrote, and the teacher's loss there."""
    teacher = load_model(config.model).model
    teacher.to(model.device).eval()  # type: ignore[arg-type]  # transformers' decorated `to`
    kls: list[np.ndarray] = []
    losses: list[float] = []
    for prompt, continuation in zip(prompts, written, strict=True):
        if continuation:
            mine = _log_probabilities(model, prompt, continuation)
            theirs = _log_probabilities(teacher, prompt, continuation)
            kls.append((mine.exp() * (mine - theirs)).sum(-1).cpu().numpy())
            losses += _losses(theirs, continuation)
    if not kls:
        return {"value": None, "interval": None, "why": "the model wrote nothing", "teacher_loss": None}
    sums, counts = np.array([kl.sum() for kl in kls]), np.array([len(kl) for kl in kls])
    interval = bootstrap(len(kls), lambda draw: float(sums[draw].sum() / counts[draw].sum()), seed=SEED)
    value = float(sums.sum() / counts.sum())
    return {"value": value, "interval": interval, "teacher_loss": fmean(losses)}


@torch.inference_mode()
def _log_probabilities(model, prompt: Sequence[int], continuation: Sequence[int]) -> Tensor:
    """log p `[T, V]` in fp32 of each token of the continuation, given what stands before it."""
    if not continuation:
        return torch.zeros(0, 1)
    row = torch.tensor([[*prompt, *continuation]], device=model.get_input_embeddings().weight.device)
    keep = len(continuation)
    logits = model(input_ids=row[:, :-1], use_cache=False, logits_to_keep=keep).logits
    return logits[0, -keep:].float().log_softmax(-1)


def _losses(log: Tensor, continuation: Sequence[int]) -> list[float]:
    if not continuation:
        return []
    return (-log.gather(1, torch.tensor([continuation], device=log.device).T)).flatten().tolist()
