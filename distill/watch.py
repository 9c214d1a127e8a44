"""The failure patterns of the layer-replacement guideline, watched for while a stage trains.

Each is logged once a stage, as one line with its cause and its remedy, and remembered by the step at which it
was first seen. Nothing is stopped: `stage.max_skipped` does that.
"""

import logging
import math
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from statistics import fmean

logger = logging.getLogger(__name__)

GUESSING = 0.8
"""A loss on text of this share of log(vocabulary), what guessing at random costs, says nothing any more."""
HIGH = 100.0
"""The guideline's bound of a loss that cannot be right."""
LEAST = 20
"""Steps below which a loss that does not fall says nothing."""
FALL = 0.001
"""The share by which a loss must have fallen by the middle and by the end of a stage."""


@dataclass(frozen=True)
class Pattern:
    """A way in which training goes wrong."""

    symptom: str
    cause: str
    remedy: str


PATTERNS = {
    "collapse": Pattern(
        "the model's language has collapsed",
        "the new layers' outputs have lost their magnitude, as L2-normalised queries, keys or values do",
        "scale instead of normalising (attention.scale=null), train stage 1 first, and use "
        "stage.transfer_loss=mse, not cosine",
    ),
    "high_loss": Pattern(
        "the loss is far too high",
        "the scale of the outputs does not match the teacher's",
        "set attention.scale=null (the root of the teacher's own) and stage.transfer_loss=mse, or huber "
        "where the ranges differ widely",
    ),
    "nonfinite": Pattern(
        "NaN or infinity",
        "an overflow, in fp16 above all",
        "use precision=bf16 or fp32, lower attention.clamp or attention.scale, or the rates stage.lr_*",
    ),
    "no_progress": Pattern(
        "the loss does not fall",
        "a learning rate that is too low, a gradient that vanishes or is clipped away, or frozen parameters",
        "raise stage.lr_* of this stage and stage.clip; the rates of what should learn must not be 0",
    ),
}


class Watch:
    """Looks at each step of one stage.

    Args:
        stage: what a sentence calls it.
        steps: of the whole stage.
        vocabulary: the model's, None where it is not known.
        seen: pattern -> step at which it was first seen; filled here, so that a resumed stage goes on.
    """

    def __init__(
        self, stage: str, steps: int, vocabulary: int | None, seen: MutableMapping[str, int]
    ) -> None:
        self.stage = stage
        self.steps = steps
        self.guessing = math.inf if vocabulary is None else GUESSING * math.log(vocabulary)
        self.seen = seen
        self.losses: list[float] = []
        self.texts: list[float] = []

    def state(self) -> dict[str, list[float]]:
        """What a stage that goes on after an interruption has to know of the steps before."""
        return {"losses": self.losses, "texts": self.texts}

    def go_on(self, state: Mapping[str, list[float]]) -> None:
        """Take over what `state` gave."""
        self.losses, self.texts = list(state.get("losses", ())), list(state.get("texts", ()))

    def __call__(self, step: int, losses: Mapping[str, float], norm: float, *, finite: bool) -> None:
        """One step.

        Args:
            losses: the step's; `loss` is the one that is minimised, `ce` the one on text.
            norm: of the gradient, before it was clipped.
            finite: False where a loss, a gradient or an update of the memory was not.
        """
        if not finite:
            self._report("nonfinite", step, "a loss, a gradient or a memory update is not finite")
        loss = losses["loss"]
        if not math.isfinite(loss):
            return
        self.losses.append(loss)
        if loss > HIGH:
            self._report("high_loss", step, f"{loss:.4g}, above {HIGH:g}")
        if math.isfinite(losses.get("ce", math.nan)):
            self.texts = [*self.texts, losses["ce"]][-10:]
            if len(self.texts) == 10 and fmean(self.texts) > self.guessing:
                guess = self.guessing / GUESSING
                said = f"{fmean(self.texts):.3g} nats a token over 10 steps; guessing costs {guess:.3g}"
                self._report("collapse", step, said)
        if norm == 0:
            self._report("no_progress", step, "the gradient is 0")
        count = len(self.losses)
        if count >= LEAST and step in (self.steps // 2, self.steps - 1):
            tenth = max(5, count // 10)
            first, last = fmean(self.losses[:tenth]), fmean(self.losses[-tenth:])
            if last > first * (1 - FALL):
                said = f"mean of the first {tenth} steps {first:.4g}, of the last {tenth} {last:.4g}"
                self._report("no_progress", step, said)

    def _report(self, name: str, step: int, figures: str) -> None:
        if name in self.seen:
            return
        self.seen[name] = step
        found = PATTERNS[name]
        logger.warning(
            "%s, step %d: %s (%s); likely cause: %s; remedy: %s.",
            self.stage,
            step,
            found.symptom,
            figures,
            found.cause,
            found.remedy,
        )
