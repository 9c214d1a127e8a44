"""A wrong form is found before it is timed, whatever is wrong with it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels.bench.check import attempt
from kernels.bench.ops.base import Form, Given, Op, Outputs
from kernels.bench.ops.gated_delta_rule import DeltaRule, GatedDeltaRule
from kernels.bench.ops.infini_memory import InfiniMemory
from kernels.bench.ops.linear_attention import LinearAttention, UnnormalizedLinearAttention
from kernels.bench.ops.softmax_attention import SoftmaxAttention
from kernels.bench.run import bench
from kernels.bench.size import Size

CPU = torch.device("cpu")
OPS = [
    LinearAttention, UnnormalizedLinearAttention, GatedDeltaRule, DeltaRule, InfiniMemory, SoftmaxAttention,
]  # fmt: skip
EVERY, BOTH = {32, 64}, {"forward", "forward_backward"}


def planted(op: type[Op], spoil: Callable[[Outputs, Given], Outputs]) -> tuple[Op, list[int]]:
    """The operator with a provider "planted" that spoils a right answer, and the T of its calls."""
    calls: list[int] = []

    class Planted(op):  # type: ignore[valid-type,misc]
        def forms(self, device: torch.device, dtype: torch.dtype, gradients: bool) -> dict[str, Form]:
            (form,) = super().forms(device, dtype, True).values()

            def run(given: Given) -> Outputs:
                calls.append(given["q"].shape[2 if issubclass(op, SoftmaxAttention) else 1])
                return spoil(form(given), given)

            return {"planted": run}

        def steps(self, device: torch.device, dtype: torch.dtype) -> dict[str, Form]:
            return {}

    return Planted(), calls


def out(change: Callable[[Tensor], Tensor]) -> Callable[[Outputs, Given], Outputs]:
    return lambda outputs, given: (change(outputs[0]), *outputs[1:])


def last_row(x: Tensor) -> Tensor:
    return torch.cat([x[:-1], x[-1:] * 1.1])


def late(x: Tensor) -> Tensor:
    """Wrong at the last tokens of a long row only."""
    return x if x.shape[1] != 64 else torch.cat([x[:, :-8], x[:, -8:] * 2], 1)


def backward_only(x: Tensor) -> Tensor:
    return x if not x.requires_grad else 2 * x - x.detach()


def not_a_number(x: Tensor) -> Tensor:
    return x.masked_fill(torch.arange(x.shape[1]).view(1, -1, 1, 1) == 0, torch.nan)


@pytest.mark.parametrize("op", OPS)
def test_an_answer_that_is_a_little_off_is_not_timed(op: type[Op], tiny: Size, tmp_path: Path) -> None:
    wrong, calls = planted(op, out(lambda x: x * 1.0001))
    rows = [row for row in bench(tiny, [wrong], CPU, tmp_path / "x.csv") if row["provider"] == "planted"]
    assert rows
    assert {row["correct"] for row in rows} == {"False"}
    assert {row["ms"] for row in rows} == {""}
    assert all(row["note"].startswith("wrong: output is off by 1.0e-04") for row in rows)
    assert set(calls) == {130}  # found at once, on the short comparison


@pytest.mark.parametrize(
    ("spoil", "directions", "lengths"),
    [
        (out(last_row), BOTH, EVERY),
        (out(late), BOTH, {64}),
        (out(backward_only), {"forward_backward"}, EVERY),
        (out(not_a_number), BOTH, EVERY),
        (lambda outputs, given: (outputs[0], 2 * outputs[1], outputs[2]), BOTH, EVERY),
    ],
    ids=["last row", "late", "gradient", "nan", "state"],
)  # fmt: skip
def test_what_is_wrong_in_one_place_is_found(
    spoil: Callable[[Outputs, Given], Outputs],
    directions: set[str],
    lengths: set[int],
    tiny: Size,
    tmp_path: Path,
) -> None:
    op, _ = planted(LinearAttention, spoil)
    rows = [row for row in bench(tiny, [op], CPU, tmp_path / "x.csv") if row["provider"] == "planted"]
    wrong = {(row["direction"], int(row["T"])) for row in rows if row["correct"] == "False"}
    assert wrong == {(direction, length) for direction in directions for length in lengths}
    assert all(bool(row["ms"]) == (row["correct"] == "True") for row in rows)


def test_a_wrong_step_is_not_timed(tiny: Size, tmp_path: Path) -> None:
    class Wrong(LinearAttention):
        def ours_step(self, given: Given, backend: str) -> Outputs:
            out, *state = super().ours_step(given, backend)
            return (out if backend == "reference" else out + 1e-3, *state)

    rows = bench(tiny, [Wrong()], CPU, tmp_path / "x.csv")
    assert [row["ms"] for row in rows if row["direction"] == "decode" and row["op"] == Wrong.name] == ["", ""]


def test_a_form_that_fails_is_noted_and_the_others_are_timed(tiny: Size, tmp_path: Path) -> None:
    def fail(outputs: Outputs, given: Given) -> Outputs:
        raise NotImplementedError("no kernel for this\nand more")

    op, _ = planted(LinearAttention, fail)
    rows = bench(tiny, [op, GatedDeltaRule()], CPU, tmp_path / "x.csv")
    notes = {row["note"] for row in rows if row["provider"] == "planted"}
    assert notes == {"failed: NotImplementedError: no kernel for this"}
    assert all(row["ms"] for row in rows if row["op"] == "gated_delta_rule")


def test_an_interrupt_is_no_failure_of_a_form() -> None:
    def stop() -> str:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        attempt(stop)
