"""What every measured operator says about itself."""

from collections.abc import Callable
from functools import partial
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from kernels.dispatch import triton_refusal

Given = dict[str, Tensor]
Outputs = tuple[Tensor, ...]
Form = Callable[[Given], Outputs]
"""One provider's way to compute an operator: out first, then as much of the state as it gives."""


class Shape(NamedTuple):
    """B, T, H, G and the width of a head, of queries, keys and values alike."""

    batch: int
    length: int
    heads: int
    groups: int
    width: int


class Answers(NamedTuple):
    """What a form gave: its outputs, and gradients of the operator's `leaves` where they were asked for."""

    outputs: Outputs
    gradients: Outputs


class Draw:
    """Random tensors of one device and dtype; equal seeds draw equal ones."""

    def __init__(self, device: torch.device, dtype: torch.dtype, seed: int = 0) -> None:
        self.device, self.dtype = device, dtype
        self._generator = torch.Generator(device).manual_seed(seed)

    def normal(self, *sizes: int) -> Tensor:
        """Independent normal numbers."""
        return torch.randn(*sizes, generator=self._generator, device=self.device, dtype=self.dtype)

    def feature(self, *sizes: int) -> Tensor:
        """ELU + 1 of normal numbers, as a feature map gives them."""
        return torch.nn.functional.elu(self.normal(*sizes)) + 1

    def share(self, *sizes: int) -> Tensor:
        """From 0 to 1."""
        return self.normal(*sizes).sigmoid()


class Op:
    """An operator with a token-by-token reference and a chunked form of this project.

    Tensors are drawn once for all lengths, tokens first (`[N, ...]`), and seen as `[B, T, ...]`.
    """

    name: ClassVar[str]
    leaves: tuple[str, ...] = ("q", "k", "v")
    """Of what gradients are computed."""

    def draw(self, draw: Draw, tokens: int, shape: Shape) -> Given:
        """The inputs of `tokens` tokens; of `shape` only what does not depend on the length is read."""
        raise NotImplementedError

    def arranged(self, given: Given, batch: int, length: int) -> Given:
        """The first tokens as `[B, T, ...]`, without a copy."""
        return {name: x[: batch * length].unflatten(0, (batch, length)) for name, x in given.items()}

    def ours(self, given: Given, backend: str) -> Outputs:
        """By this project's operator."""
        raise NotImplementedError

    def ours_step(self, given: Given, backend: str) -> Outputs:
        """One token by this project's operator."""
        raise NotImplementedError

    def others(self, device: torch.device) -> dict[str, Form]:
        """Other libraries' forms of the same function, by provider, where they are installed."""
        return {}

    def other_steps(self, device: torch.device) -> dict[str, Form]:
        """The same of one token."""
        return {}

    def forms(self, device: torch.device, dtype: torch.dtype, gradients: bool) -> dict[str, Form]:
        """Every form that can run here, by provider."""
        return self._own(self.ours, device, dtype) | self.others(device)

    def steps(self, device: torch.device, dtype: torch.dtype) -> dict[str, Form]:
        """The same of one token."""
        return self._own(self.ours_step, device, dtype) | self.other_steps(device)

    def _own(self, form: Callable[..., Outputs], device: torch.device, dtype: torch.dtype) -> dict[str, Form]:
        fused = device.type == "cuda" and triton_refusal(device, dtype) is None
        return {name: partial(form, backend=name) for name in (*(["triton"] if fused else []), "chunk")}

    def expected(self, given: Given, weights: Tensor | None, short: bool) -> Answers:
        """The truth about fp64 inputs: token by token where `short`, else in chunks.

        Args:
            weights: what the gradient of out is, None for no gradients.
        """
        return answers(self, partial(self.ours, backend="reference" if short else "chunk"), given, weights)

    def expected_step(self, given: Given) -> Outputs:
        """The truth about one token with fp64 inputs."""
        return self.ours_step(given, "reference")

    def compared(self, got: Answers) -> Answers:
        """What of a form's answers `expected` is about."""
        return got

    def context(self, draw: Draw, shape: Shape) -> Given:
        """The inputs of one token after `shape.length` others: their state, really computed, and it."""
        raise NotImplementedError

    def flops(self, shape: Shape, direction: str) -> float:
        """The fewest floating-point operations: those of the recurrence, whatever a form does beside."""
        raise NotImplementedError

    def longest(self, limit: int) -> int | None:
        """The largest T to measure, None for any; `limit` is that of forms whose work is quadratic."""
        return None


def answers(op: Op, form: Form, given: Given, weights: Tensor | None) -> Answers:
    """Run a form, with gradients where `weights` says what the gradient of out is."""
    if weights is None:
        with torch.no_grad():
            return Answers(form(given), ())
    leaves = [given[name].detach().requires_grad_() for name in op.leaves]
    outputs = form(given | dict(zip(op.leaves, leaves, strict=True)))
    # The keys of the first blocks are not read by anything: their gradient is 0.
    gradients = torch.autograd.grad(outputs[0], leaves, weights, materialize_grads=True)
    return Answers(tuple(x.detach() for x in outputs), gradients)
