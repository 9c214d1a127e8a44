"""What is timed: every form of every operator at every length, those that are right."""

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from kernels.bench.check import SHORT, Truth, attempt, difference, step_difference
from kernels.bench.ops.base import Answers, Draw, Form, Given, Op, Outputs, Shape, answers
from kernels.bench.size import Size
from kernels.peak import peak_bytes

FORWARD, BOTH, DECODE = DIRECTIONS = ("forward", "forward_backward", "decode")
LOG = logging.getLogger(__name__)


@dataclass
class Cell:
    """One row to be.

    Attributes:
        work: one call, None where there is nothing to time.
        note: why not.
        bytes, flops: the fewest that the call has to move and compute.
        peak: bytes taken at once on top of the inputs, None where they are not seen.
        seconds: samples.
    """

    op: str
    provider: str
    direction: str
    shape: Shape
    dtype: torch.dtype
    work: partial | None = None
    note: str = ""
    bytes: float = 0.0
    flops: float = 0.0
    peak: int | None = None
    seconds: list[float] = field(default_factory=list)


class _Inputs:
    """One operator's inputs of one length, what the gradient of out is, and the truth about them."""

    def __init__(self, op: Op, drawn: Given, weight: Tensor, batch: int, length: int) -> None:
        self.given = op.arranged(drawn, batch, length)
        self.weights = op.arranged({"": weight}, batch, length)[""]
        self.truth = Truth(op, self.given, self.weights, length)


def calls(size: Size, ops: Iterable[Op], width: int, device: torch.device) -> Iterator[Cell]:
    """The cells of whole sequences, one after the other as each is found right or wrong."""
    heads = size.hidden // width
    tokens = max(size.tokens, *size.lengths, 2 * SHORT)
    for op in ops:
        drawn = op.draw(Draw(device, size.dtype), tokens, Shape(0, 0, heads, heads, width))
        weight = Draw(device, size.dtype, 1).normal(tokens, heads, width)
        short = _Inputs(op, drawn, weight, 2, SHORT)
        limit = op.longest(size.longest)
        for length in (n for n in size.lengths if limit is None or n <= limit):
            shape = Shape(max(1, size.tokens // length), length, heads, heads, width)
            inputs = _Inputs(op, drawn, weight, shape.batch, length)
            for direction in (FORWARD, BOTH):
                for provider, form in op.forms(device, size.dtype, direction == BOTH).items():
                    cell = Cell(op.name, provider, direction, shape, size.dtype)
                    cell.flops = op.flops(shape, direction)
                    yield _said(cell, attempt(partial(_prepare, cell, op, form, short, inputs)))


def _prepare(cell: Cell, op: Op, form: Form, short: _Inputs, inputs: _Inputs) -> str:
    """Give the cell its work and its cost if the form is right, else say what is wrong."""
    both = cell.direction == BOTH
    for some in (short, inputs):
        wrong = difference(op, form, some.given, some.weights if both else None, some.truth)
        if wrong:
            return wrong
    cell.work = partial(answers, op, form, inputs.given, inputs.weights if both else None)
    got = _weighed(cell, inputs.weights.device)
    assert isinstance(got, Answers)
    # The backward reads the inputs and the gradient of out once more, and writes a gradient for each leaf.
    again = _bytes(inputs.given.values()) + _bytes(got.outputs[:1]) + _bytes(got.gradients) if both else 0
    cell.bytes = _bytes(inputs.given.values()) + _bytes(got.outputs) + again
    return ""


def steps(size: Size, ops: Iterable[Op], width: int, device: torch.device) -> Iterator[Cell]:
    """The cells of one token after contexts of each length."""
    heads = size.hidden // width
    for op in ops:
        for length in size.contexts:
            shape = Shape(1, length, heads, heads, width)
            given = op.context(Draw(device, size.dtype), shape)
            for provider, form in op.steps(device, size.dtype).items():
                cell = Cell(op.name, provider, DECODE, shape, size.dtype)
                cell.flops = op.flops(shape, DECODE)
                yield _said(cell, attempt(partial(_prepare_step, cell, op, form, given)))


def _prepare_step(cell: Cell, op: Op, form: Form, given: Given) -> str:
    """As `_prepare`, of one token."""
    wrong = step_difference(op, form, given)
    if wrong:
        return wrong
    cell.work = partial(_step, form, given)
    cell.bytes = _bytes(given.values()) + _bytes(_weighed(cell, given["q"].device))
    return ""


@torch.no_grad()
def _step(form: Form, given: Given) -> Outputs:
    return form(given)


def _weighed(cell: Cell, device: torch.device) -> tuple:
    """Run the cell's work once, note the memory that it takes, and return what it gave."""
    assert cell.work is not None
    if cell.provider == "flex" and device.type == "cpu":  # compiled code takes memory unseen
        return cell.work()
    gave: list = []
    work = cell.work
    cell.peak = peak_bytes(device, lambda: gave.append(work()))
    return gave[0]


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def _said(cell: Cell, note: str) -> Cell:
    cell.note = note
    if note:
        where = (cell.op, cell.provider, cell.direction, cell.shape.length)
        LOG.warning("no speed for %s by %s, %s at T = %s: %s", *where, note)
        cell.work = None
    return cell


def probes(size: Size, width: int, device: torch.device) -> list[Cell]:
    """A copy and a product of square matrices: what this device can do at the most, for the roofline."""
    source = torch.ones(size.copy, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    factors = Draw(device, size.dtype).normal(2, size.matmul, size.matmul)
    shape = Shape(1, 0, 0, 0, width)
    return [
        Cell(
            "copy", "torch", FORWARD, shape, torch.uint8, partial(target.copy_, source), bytes=2.0 * size.copy
        ),
        Cell(
            "matmul", "torch", FORWARD, shape, size.dtype, partial(torch.matmul, *factors),
            bytes=1.5 * _bytes([factors]), flops=2.0 * size.matmul**3,
        ),
    ]  # fmt: skip
