"""The rows a stage trains on: text and recall episodes.

Row i of a stage depends on the config, the seed, the stage and i alone, so a resumed run needs no data state
but the number of the step.
"""

import random
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from replace.config import Config, StageBudget
from replace.corpora import Document, blocks, token_ids
from replace.episodes import HAYSTACKS, KINDS, Episode, HaystackSource, TooShort, haystack, make_episode
from replace.errors import bad_value
from replace.phrasings import PHRASINGS


@dataclass
class Batch:
    """Rows of one step.

    Attributes:
        input_ids: `[B, T]`.
        answers: `[B, T]` bool, True where the token is part of a recall answer.
        padding: `[B, T]` bool, False for pads; None where nothing is padded.
    """

    input_ids: Tensor
    answers: Tensor
    padding: Tensor | None = None

    def to(self, device: torch.device) -> "Batch":
        """The same rows on a device."""
        padding = None if self.padding is None else self.padding.to(device)
        return Batch(self.input_ids.to(device), self.answers.to(device), padding)

    def rows(self, part: slice) -> "Batch":
        """Some of the rows."""
        padding = None if self.padding is None else self.padding[part]
        return Batch(self.input_ids[part], self.answers[part], padding)


def check_text(documents: list[Document], tokenizer: PreTrainedTokenizerBase, config: Config) -> None:
    """Refuse text that is too short for a row of a stage that will run, and rows too short for an episode.

    Raises:
        UserError: no training document has the tokens of the longest row, or no needle fits into a row.
    """
    lengths = {number: budget.length for number, budget in config.running.items()}
    if not lengths:
        return
    train = [document for document in documents if document.split == "train"]
    longest = max(map(len, token_ids(train, tokenizer)), default=0)
    number = max(lengths, key=lambda number: lengths[number])
    if longest < lengths[number]:
        data = config.data
        field, value = ("data", data.kind) if data.path is None else ("data.path", data.path)
        allowed = f"text with a training document of at least {lengths[number]} tokens, a row of "
        allowed += f"budget.stage{number}.length (the longest has {longest})"
        raise bad_value(field, value, allowed)
    for number, length in lengths.items():
        if share_of(config, number):
            _check_episodes(tokenizer, config, number, length)


def share_of(config: Config, number: int) -> float:
    """The share of recall episodes among a stage's rows."""
    return config.data.recall_transfer if number == 1 else config.data.recall


def _clear(config: Config, length: int) -> int:
    """Tokens between a needle and its answer, so that it lies outside of what is exact if the row allows."""
    attention = config.attention
    exact = attention.block + (0 if attention.local == "segment" else attention.window)
    return min(exact, length // 3)


def _check_episodes(tokenizer: PreTrainedTokenizerBase, config: Config, number: int, length: int) -> None:
    """Every phrasing with one needle fits into a stage's row: how many tokens it takes, a tokenizer says."""
    filler, clear = haystack("filler", [], tokenizer), _clear(config, length)
    for kind in KINDS:
        for index in range(len(PHRASINGS[kind]["train"])):
            rng = random.Random(index)
            try:
                make_episode(tokenizer, rng, length, 0.5, kind, filler, clear=clear, phrasing=index)
            except TooShort as error:
                name = "recall_transfer" if number == 1 else "recall"
                allowed = f"more than {error.least} tokens of this tokenizer, for a needle and its question, "
                allowed += f"or data.{name}=0"
                raise bad_value(f"budget.stage{number}.length", length, allowed) from error


class Mixture:
    """Draws the rows of one stage."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        documents: list[Document],
        config: Config,
        budget: StageBudget,
        *,
        stage: int,
        share: float,
        split: str = "train",
    ) -> None:
        """
        Args:
            documents: the corpus; only `split` is drawn from.
            share: the share of recall episodes among the rows.
            split: of the text, and of the episodes' phrasings.
        """
        chosen = [document for document in documents if document.split == split]
        self.tokenizer, self.split = tokenizer, split
        self.rows = blocks(chosen, tokenizer, budget.length)
        self.budget, self.stage, self.share, self.seed = budget, stage, share, config.seed
        self.accumulate = config.stage.accumulate
        self.clear = _clear(config, budget.length)
        self.haystacks: list[HaystackSource] = [haystack(name, chosen, tokenizer) for name in HAYSTACKS]
        order = torch.Generator().manual_seed(config.seed * 1000 + stage)
        self.order = torch.randperm(len(self.rows), generator=order)

    @property
    def steps(self) -> int:
        """Optimizer steps of the stage: all tokens are used, and less than one step's more."""
        return -(-self.budget.tokens // (self.budget.batch * self.accumulate * self.budget.length))

    def batch(self, step: int, accumulate: int = 1, part: int = 0) -> Batch:
        """The rows of step `step`, or of its part `part` of `accumulate`."""
        size = self.budget.batch
        first = (step * accumulate + part) * size
        rows = [self._row(first + i) for i in range(size)]
        return Batch(torch.stack([r[0] for r in rows]), torch.stack([r[1] for r in rows]))

    def _row(self, number: int) -> tuple[Tensor, Tensor]:
        """One row and its answer mask."""
        recall = int((number + 1) * self.share) > int(number * self.share)
        if not recall:
            ids = self.rows[int(self.order[number % len(self.order)])]
            return ids, torch.zeros_like(ids, dtype=torch.bool)
        rng = random.Random(f"{self.seed} {self.stage} {number}")
        episode = self._episode(rng)
        answers = torch.zeros(self.budget.length, dtype=torch.bool)
        for part in episode.answers:
            answers[part] = True
        return episode.input_ids, answers

    def _episode(self, rng: random.Random) -> Episode:
        """An episode of one to three needles; a row that is too short for so many gets fewer."""
        depth, kind, source = rng.random() * 0.9, rng.choice(KINDS), rng.choice(self.haystacks)
        needles = rng.choice((1, 1, 2, 3))
        while True:
            try:
                return make_episode(
                    self.tokenizer,
                    rng,
                    self.budget.length,
                    depth,
                    kind,
                    source,
                    self.split,
                    needles=needles,
                    clear=self.clear,
                )
            except TooShort:
                needles -= 1
                if not needles:
                    raise
