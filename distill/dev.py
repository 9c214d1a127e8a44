"""How a stage does on text that it does not train on, while it trains.

Every `stage.validate_every` steps its own loss is measured on the same few rows of the dev text, without a
gradient; test text is never read. The weights of the best step are kept beside the checkpoints and taken at
the end, if they are better than the last, and a stage that no longer improves ends early. All of it follows
from the list of losses, so that is what a checkpoint has to hold.
"""

import dataclasses
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from distill.checkpoint import forget_best, load_best, save_best
from distill.data import Batch, Mixture, share_of
from distill.stages import Stage
from replace import ranks
from replace.config import Config, StageBudget
from replace.convert import at_rest, uncounted
from replace.corpora import Document, token_ids
from replace.episodes import TooShort
from replace.logger import Logger
from replace.precision import autocast

logger = logging.getLogger(__name__)

SEED = 0
"""Of the rows: the same in every run, whatever its training seed, so that dev losses compare."""


@dataclass
class DevRows:
    """Rows of the dev text, each a batch of its own; `why` there are none although they were asked for."""

    rows: list[Batch] = field(default_factory=list)
    why: str | None = None


def dev_rows(
    tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document], config: Config, number: int
) -> DevRows:
    """The rows of a stage: of its length, with its share of recall episodes, in phrasings for dev."""
    if not config.stage.validate_every:
        return DevRows()
    length, count = getattr(config.budget, f"stage{number}").length, config.stage.validate_rows
    dev = [document for document in documents if document.split == "dev"]
    longest = max(map(len, token_ids(dev, tokenizer)), default=0)
    if longest < length:
        return DevRows(why=f"no dev document has the {length} tokens of a row (the longest has {longest})")
    alike = dataclasses.replace(config, seed=SEED)
    budget, share = StageBudget(count * length, 1, length), share_of(config, number)
    mixture = Mixture(tokenizer, dev, alike, budget, stage=number, share=share, split="dev")
    try:
        return DevRows([mixture.batch(index) for index in range(count)])
    except TooShort as error:
        return DevRows(why=f"a row of {length} tokens holds no dev episode, which needs {error.least}")


class Dev:
    """The dev losses of one stage, and what follows from them.

    Attributes:
        losses: [steps done, loss] of each measurement, null where it was not finite. The first is of the
            model as the stage begins.
    """

    def __init__(
        self, model: nn.Module, stage: Stage, held_out: DevRows, config: Config, folder: Path, log: Logger
    ) -> None:
        """
        Args:
            folder: of the stage's checkpoints.
        """
        self.model, self.stage, self.held_out = model, stage, held_out
        self.options, self.precision = config.stage, config.precision
        self.folder, self.log = folder, log
        self.losses: list[list] = []
        if held_out.why is not None:
            logger.warning("%s: its dev loss is not measured, since %s", stage.title, held_out.why)

    def begin(self, losses: list[list] | None, step: int) -> None:
        """Go on after `step` steps with the losses of a checkpoint, or measure the model as it is."""
        if not self.held_out.rows:
            return
        forget_best(self.folder, step if losses else -1)
        if losses:
            self.losses = losses
        else:
            self._add(step, 0, keep=True)

    def __call__(self, step: int, steps: int, tokens: int) -> float | None:
        """The dev loss after `step` of `steps` steps, if it is time to measure it.

        Args:
            tokens: trained on so far.
        """
        if not self.held_out.rows or (step % self.options.validate_every and step < steps):
            return None
        return self._add(step, tokens, keep=step < steps)  # the last step's weights are kept anyway

    def _add(self, step: int, tokens: int, *, keep: bool) -> float | None:
        loss = self._measure()
        self.losses.append([step, loss])
        if loss is None:
            logger.warning("%s, step %d: the dev loss is not finite", self.stage.title, step)
            return None
        self.log.log({f"{self.stage.phase}/dev_loss": loss}, tokens)
        if keep and self.best == step:
            save_best(self.folder, self.stage.names, self.model, step)
        return loss

    @torch.no_grad()
    def _measure(self) -> float | None:
        """The mean over rows; None where it is not finite. Each rank reads them all, and rank 0's counts."""
        device, found = next(self.model.parameters()).device, []
        model = self.model
        with at_rest(model), uncounted(model), ranks.alone(), autocast(self.precision, device):
            for row in self.held_out.rows:
                found.append(self.stage.step(row.to(device), None)["loss"])
        loss = fmean(found)
        return ranks.by_main(lambda: loss if math.isfinite(loss) else None)

    @property
    def best(self) -> int | None:
        """The step with the lowest loss, the earliest of several; None without one."""
        known = [(loss, step) for step, loss in self.losses if loss is not None]
        return min(known)[1] if known else None

    @property
    def stopped(self) -> bool:
        """Whether there was nothing better for `stage.patience` measurements."""
        if not self.options.patience or self.best is None:
            return False
        return sum(step > self.best for step, _ in self.losses) >= self.options.patience

    def close(self) -> dict:
        """At the end of the stage: take the best step, where it is not the last.

        Returns:
            {"dev": figures}; nothing where nothing was asked for.
        """
        if not self.held_out.rows:
            return {} if self.held_out.why is None else {"dev": {"losses": None, "why": self.held_out.why}}
        last, taken, title = self.losses[-1][0], self.losses[-1][0], self.stage.title
        if self.best not in (None, last) and load_best(self.folder, self.model, self.best):
            taken = self.best
            logger.info("%s: the weights after step %d are taken, best on dev of %d", title, taken, last)
        figures = {"rows": len(self.held_out.rows), "losses": self.losses, "best_step": self.best}
        return {"dev": figures | {"taken_step": taken, "stopped_early": self.stopped}}
