"""A benchmark of a second: a few tokens, without FlexAttention, which takes long to compile."""

from collections.abc import Callable

import pytest
import torch

from kernels.bench.cells import Cell
from kernels.bench.ops.base import Form, Op, Shape
from kernels.bench.ops.softmax_attention import SoftmaxAttention
from kernels.bench.size import Size


class Sdpa(SoftmaxAttention):
    """Softmax attention by SDPA alone."""

    def forms(self, device: torch.device, dtype: torch.dtype, gradients: bool) -> dict[str, Form]:
        """Without flex."""
        return {"sdpa": super().forms(device, dtype, True)["sdpa"]}


@pytest.fixture
def sdpa() -> Op:
    """Softmax attention by SDPA alone."""
    return Sdpa()


@pytest.fixture
def tiny() -> Size:
    """A few tokens."""
    return Size(
        lengths=(32, 64), tokens=64, widths=(8,), hidden=16, longest=32, contexts=(16, 32), steps=10,
        rounds=3, seconds=5, dtype=torch.float32, copy=2**12, matmul=16,
    )  # fmt: skip


@pytest.fixture
def cell() -> Callable[..., Cell]:
    """Makes a cell with samples."""

    def make(
        op: str, provider: str, direction: str, length: int, seconds: list[float], **more: object
    ) -> Cell:
        shape = Shape(4096 // length, length, 2, 2, 64)
        return Cell(op, provider, direction, shape, torch.float32, seconds=seconds, **more)  # type: ignore[arg-type]

    return make
