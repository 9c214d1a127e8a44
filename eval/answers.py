"""Score an answer after a text that was read once: really generated, and ranked among wrong ones."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from eval.stream import Reach, Stream, device_of
from replace.episodes import Episode, answer_ids


def read_prompt(model, episode: Episode, reach: Reach, label: str = "prefill") -> tuple[Stream, Tensor]:
    """Read everything before the answer in pieces.

    Returns:
        the stream, and the logits [V] of the answer's first token.
    """
    stream = Stream(model, reach)
    prompt = episode.input_ids[: episode.answer.start].unsqueeze(0).to(device_of(model))
    return stream, stream.prefill(prompt, label)[0, -1]


def generates(stream: Stream, logits: Tensor, tokenizer: PreTrainedTokenizerBase, answer: str) -> bool:
    """Whether greedy decoding begins with `answer` as a whole word; the stream has read on afterwards.

    Text is compared, not tokens, since one word may be tokenised in several ways. Decoding ends with the
    first character that is wrong.
    """
    ids: list[int] = []
    steps = 2 * len(tokenizer(" " + answer, add_special_tokens=False)["input_ids"]) + 2
    for _ in range(steps):
        ids.append(int(logits.argmax()))
        text = str(tokenizer.decode(ids)).lstrip()
        if text.startswith(answer) and len(text) > len(answer):
            return not text[len(answer)].isalnum()
        if not answer.startswith(text):
            return False
        logits = stream.feed(torch.tensor([[ids[-1]]], device=logits.device))[0, -1]
    return text == answer


def rank(stream: Stream, logits: Tensor, tokenizer: PreTrainedTokenizerBase, values: Sequence[str]) -> int:
    """How many of `values` are at least as likely as the first, the true one: 1 is best.

    The likelihood is that of all tokens of a value together. It favours short ones, which does no harm where
    all values were drawn alike, the true one too. The stream stays where it is.
    """
    scores = [_log_likelihood(stream, logits, answer_ids(tokenizer, value)[1]) for value in values]
    return sum(score >= scores[0] for score in scores)


def _log_likelihood(stream: Stream, logits: Tensor, ids: list[int]) -> float:
    """log p of `ids` after what the stream has read, natural logarithm."""
    row = torch.tensor([ids], device=logits.device)
    rows = logits.unsqueeze(0)
    if len(ids) > 1:
        ahead = copy.copy(stream)
        ahead.cache = copy.deepcopy(stream.cache)
        rows = torch.cat([rows, ahead.feed(row[:, :-1], keep=0)[0]])
    chosen = rows.float().log_softmax(-1).gather(1, row.T)
    return float(chosen.sum())
