"""What must hold for every variant, as figures with limits, measured on a user's own model.

`layer` looks at one replaced layer by itself, in fp64, where a leak has no rounding noise to hide in; `model`
at the whole replaced model; `examine` puts both together.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

Outcome: TypeAlias = tuple[float, float] | str
"""A figure and the limit that it must not exceed, or why the property does not apply."""


@dataclass(frozen=True)
class Finding:
    """One property on one model.

    Attributes:
        property: what must hold, in words.
        figure, limit: what was measured, and the most it may be; None where the property does not apply.
        passed: None where it does not apply.
        meaning: what a failure would mean; where the property does not apply, why.
    """

    property: str
    figure: float | None
    limit: float | None
    passed: bool | None
    meaning: str


@dataclass(frozen=True)
class Property:
    """A property, what its failure would mean, and how it is measured on its subject."""

    name: str
    meaning: str
    measure: Callable[[Any], Outcome]

    @torch.no_grad()
    def on(self, *subjects: object, prefix: str = "") -> Finding:
        """Measure it on one or several, of which the worst counts; `prefix` says on what."""
        outcomes = [self.measure(subject) for subject in subjects]
        worst = max(outcomes, key=lambda x: -1.0 if isinstance(x, str) else x[0])
        return found(prefix + self.name, self.meaning, worst)


def found(name: str, meaning: str, outcome: Outcome) -> Finding:
    """The finding of an outcome; a figure that is not a number fails."""
    if isinstance(outcome, str):
        return Finding(name, None, None, None, outcome)
    figure, limit = outcome
    return Finding(name, figure, limit, figure <= limit, meaning)


def register(into: list[Property], name: str, meaning: str) -> Callable:
    """Decorator that enters a measuring function into a list of properties."""

    def enter(measure: Callable[[Any], Outcome]) -> Callable[[Any], Outcome]:
        into.append(Property(name, meaning, measure))
        return measure

    return enter


def distance(got: Tensor, want: Tensor) -> float:
    """The largest difference relative to the largest entry; infinite where something is not finite."""
    if got.shape != want.shape or not bool(got.isfinite().all()):
        return float("inf")
    if not got.numel():
        return 0.0
    return float((got - want).abs().max() / want.abs().max().clamp_min(1e-9))


@torch.no_grad()
def scatter(module: nn.Module, seed: int = 1) -> None:
    """Move all parameters away from their neutral start, where much is equal that must not be.

    Rows of matrices move by a vector of length .5, so that a gate is neither shut nor open.
    """
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        size = 0.5 / (parameter.shape[-1] ** 0.5 if parameter.ndim > 1 else 1)
        noise = torch.randn(parameter.shape, generator=generator) * size
        parameter.add_(noise.to(parameter.device, parameter.dtype))
