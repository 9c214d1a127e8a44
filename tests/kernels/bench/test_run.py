"""A benchmark from beginning to end, in a second: what it writes, in which order it measures."""

import csv
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kernels.bench import clock, record
from kernels.bench.cells import Cell
from kernels.bench.ops import window_linear_attention
from kernels.bench.ops.base import Given, Op, Outputs
from kernels.bench.ops.linear_attention import LinearAttention
from kernels.bench.ops.softmax_attention import SoftmaxAttention
from kernels.bench.run import bench, ops_for
from kernels.bench.size import Size
from kernels.testing import tolerance

CPU = torch.device("cpu")
Make = Callable[..., Cell]


class Bar:
    """Takes what a progress bar is told."""

    done = 0.0

    def update(self, n: float = 1) -> None:
        self.done += n


def test_every_form_length_and_direction_has_a_row(tiny: Size, sdpa: Op, tmp_path: Path) -> None:
    path = tmp_path / "cpu.csv"
    rows = bench(tiny, [*ops_for(CPU)[:-1], sdpa], CPU, path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["cpu.csv", "cpu.png"]
    assert record.read(path) == rows
    with path.open(newline="") as file:
        assert tuple(next(csv.reader(file))) == record.COLUMNS
    found = {(row["op"], row["provider"], row["direction"], int(row["T"])) for row in rows}
    ours = ["linear_attention", "gated_delta_rule", "infini_memory"]
    ours += [window_linear_attention.NAME] if window_linear_attention.there() else []
    both = ("forward", "forward_backward")
    assert found == (
        {(op, "chunk", direction, length) for op in ours for direction in both for length in (32, 64)}
        | {("softmax_attention", "sdpa", direction, 32) for direction in both}
        | {(op, "chunk", "decode", length) for op in ours for length in (16, 32)}
        | {("softmax_attention", "sdpa", "decode", length) for length in (16, 32)}
        | {(op, "torch", "forward", 0) for op in record.PROBES}
    )
    for row in rows:
        assert row["correct"] == "True", row
        assert 0 < float(row["p20"]) <= float(row["ms"]) <= float(row["p80"])
        assert float(row["roofline"]) > 0
        assert int(row["samples"]) >= 3
        assert row["T"] == "0" or float(row["peak_mib"]) >= 0
        assert int(row["batch"]) * max(int(row["T"]), 1) == (
            64 if row["direction"] != "decode" and row["T"] != "0" else max(int(row["T"]), 1)
        )


def test_an_interrupt_keeps_the_rows_that_were_measured(tiny: Size, tmp_path: Path) -> None:
    class Stops(LinearAttention):
        calls = 0

        def ours(self, given: Given, backend: str) -> Outputs:
            Stops.calls += 1
            if Stops.calls > limit:
                raise KeyboardInterrupt
            return super().ours(given, backend)

    limit = 10**9
    bench(tiny, [Stops()], CPU, tmp_path / "whole.csv")
    limit, Stops.calls = Stops.calls - 3, 0  # in the second half, before the steps are timed
    with pytest.raises(KeyboardInterrupt):
        bench(tiny, [Stops()], CPU, tmp_path / "part.csv")
    rows = record.read(tmp_path / "part.csv")
    assert {row["direction"] for row in rows if row["op"] == Stops.name} == {"forward", "forward_backward"}
    assert all(row["ms"] for row in rows)
    assert {file.name for file in tmp_path.iterdir() if file.stem == "part"} == {"part.csv", "part.png"}


def test_forms_take_turns(cell: Make) -> None:
    order: list[str] = []
    cells = [
        cell("a", "x", "forward", 64, []),
        cell("b", "x", "forward", 64, []),
        cell("c", "x", "forward", 64, []),
    ]
    for one in cells[:2]:
        one.work = lambda name=one.op: order.append(name)  # type: ignore[assignment,misc]
    bar, rounds = Bar(), []
    take = lambda work: clock.sample(work, CPU, 1, 1.0)  # noqa: E731
    clock.in_turns(cells, take, 4, 60, bar, lambda: rounds.append(len(order)))
    assert order == ["a", "b"] * 4
    assert rounds == [2, 4, 6, 8]
    assert [len(one.seconds) for one in cells] == [4, 4, 0]
    assert bar.done == 12


def test_rounds_end_with_the_time_but_are_three_at_least(cell: Make) -> None:
    slow = cell("a", "x", "forward", 64, [])
    slow.work = lambda: time.sleep(0.02)  # type: ignore[assignment]
    take = lambda work: clock.sample(work, CPU, 1, 1.0)  # noqa: E731
    clock.in_turns([slow], take, 100, 0.01, Bar(), lambda: None)
    assert len(slow.seconds) == clock.LEAST_ROUNDS


def test_costs_are_relative_to_the_shortest_length_and_rates_to_the_probes(cell: Make) -> None:
    place = record.Place("a device", "torch", "abc")
    cells = [
        cell("copy", "torch", "forward", 4096, [1.0], bytes=100e9),
        cell("matmul", "torch", "forward", 4096, [2.0], flops=4e12),
        cell("x", "chunk", "forward", 2048, [0.5, 0.3, 0.4], bytes=20e9, flops=1.2e12),
        cell("x", "chunk", "forward", 1024, [0.2, 0.2, 0.2], bytes=15e9),
        cell("x", "chunk", "decode", 1024, [0.1]),
        cell("x", "chunk", "decode", 2048, [0.2]),
        cell("x", "fla", "forward", 1024, [], note="wrong: output"),
        cell("x", "sdpa", "forward", 1024, []),
    ]
    rows = record.rows(cells, place)
    assert len(rows) == 7
    long, short, first, second, wrong = rows[2:]
    assert [float(row["relative_cost"]) for row in (short, long, first, second)] == [1, 2, 1, 2]
    assert float(long["ms"]) == 400
    assert float(long["p20"]) == pytest.approx(340)
    assert float(long["GB/s"]) == 50
    assert float(long["TFLOP/s"]) == 3
    assert float(long["roofline"]) == pytest.approx(0.6 / 0.4)  # operations, not bytes
    assert float(short["roofline"]) == pytest.approx(0.15 / 0.2)
    assert (wrong["ms"], wrong["correct"], wrong["note"]) == ("", "False", "wrong: output")


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"x\.csv is not a CSV of this benchmark"):
        record.read(tmp_path / "x.csv")


def test_long_softmax_attention_is_compared_at_sampled_queries() -> None:
    op = SoftmaxAttention()
    generator = torch.Generator().manual_seed(0)
    q, k, v, weights = (torch.randn(1, 2, 600, 8, generator=generator, dtype=torch.float64) for _ in range(4))
    given = {"q": q, "k": k, "v": v}
    sampled, whole = op.expected(given, weights, False), op.expected(given, weights, True)
    assert sampled.outputs[0].shape[2] == 64
    for part, full in zip(
        sampled.outputs + sampled.gradients, op.compared(whole)[0] + op.compared(whole)[1], strict=True
    ):
        torch.testing.assert_close(part, full)


@pytest.mark.slow
def test_flex_attention_is_right_on_a_cpu() -> None:
    op = SoftmaxAttention()
    generator = torch.Generator().manual_seed(0)
    given = {name: torch.randn(1, 2, 300, 16, generator=generator) for name in ("q", "k", "v")}
    with torch.no_grad():
        (out,) = op.forms(CPU, torch.float32, False)["flex"](given)
    want = op.expected({name: x.double() for name, x in given.items()}, None, True).outputs[0]
    assert float((out - want).norm() / want.norm()) < tolerance(torch.float32)
