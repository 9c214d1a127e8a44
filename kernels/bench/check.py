"""Whether a form is right, found before it is timed.

Each is compared with the token-by-token reference in fp64 on a few odd-length rows, and with a truth in fp64
on the very inputs that are timed, of which the first and the last row are looked at.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from kernels.bench.ops.base import Answers, Form, Given, Op, Outputs, answers
from kernels.testing import rms_ratio, tolerance

SHORT = 130
"""Tokens of the comparison with the reference: no multiple of a chunk."""
WORDY = 256
"""Up to so many tokens the truth is computed token by token."""


class Truth:
    """What one operator should answer to given inputs, computed when it is first asked for."""

    def __init__(self, op: Op, given: Given, weights: Tensor, length: int) -> None:
        self._op, self._given, self._weights = op, _ends(given), _ends({"": weights})[""]
        self._short = length <= WORDY
        self._known: dict[bool, Answers] = {}

    def of(self, gradients: bool) -> Answers:
        """With the gradients or without."""
        if gradients not in self._known:
            weights = self._weights.double() if gradients else None
            self._known[gradients] = self._op.expected(_double(self._given), weights, self._short)
        return self._known[gradients]


def difference(op: Op, form: Form, given: Given, weights: Tensor | None, truth: Truth) -> str:
    """What is wrong with a form's answer to `given`, in a few words; "" where nothing is."""
    got = op.compared(answers(op, form, given, weights))
    want = truth.of(weights is not None)
    dtype, place = given["q"].dtype, given["q"].device.type
    said = _compare(got.outputs, want.outputs, tolerance(dtype, place), "output")
    return said or _compare(
        got.gradients, want.gradients, tolerance(dtype, place, True), "gradient", op.leaves
    )


def step_difference(op: Op, form: Form, given: Given) -> str:
    """The same of one token."""
    with torch.no_grad():
        got, want = form(given), op.expected_step(_double(given))
    return _compare(got, want, tolerance(given["q"].dtype, given["q"].device.type), "output")


def attempt(work: Callable[[], str]) -> str:
    """What `work` says, or why it could not say anything: another library may fail in any way of its own."""
    try:
        return work()
    except failures() as error:
        return f"failed: {type(error).__name__}: {_first_line(error)}"


def failures() -> tuple[type[BaseException], ...]:
    """What a form may fail with: PyTorch's errors, those of another library's checks, Triton's."""
    kinds: tuple[type[BaseException], ...] = (
        RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError, ImportError,
        Warning,
    )  # fmt: skip
    try:
        from triton.errors import TritonError
    except ImportError:
        return kinds
    return (*kinds, TritonError)


def _compare(got: Outputs, want: Outputs, limit: float, kind: str, names: tuple[str, ...] = ()) -> str:
    for n, (have, truth) in enumerate(zip(got, want, strict=False)):  # others' forms give out alone
        error = rms_ratio(have[_rows(have, truth)], truth)
        if not error <= limit:  # a NaN is not
            name = f" of {names[n]}" if names else f" {n}" if n else ""
            return f"wrong: {kind}{name} is off by {error:.1e}, above {limit:.0e}"
    return ""


def _rows(have: Tensor, truth: Tensor) -> Tensor | slice:
    """The rows that the truth is about."""
    return slice(None) if len(have) == len(truth) else torch.tensor([0, -1], device=have.device)


def _ends(given: Given) -> Given:
    """The first and the last row."""
    return {name: x if len(x) <= 2 else x[[0, -1]] for name, x in given.items()}


def _double(given: Given) -> Given:
    return {name: x.double() if x.is_floating_point() else x for name, x in given.items()}


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return lines[0][:160]
