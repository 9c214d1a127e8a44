"""Sections of the long measurements: written from figures, drawn, and absent where nothing was measured."""

import copy
import itertools

import pytest

from eval.metrics import problems, write_metrics
from eval.niah import rate
from eval.report import render, write_report
from eval.sections import SECTIONS, pictures, written
from eval.sections.niah import borders


def perplexity(level: float, buckets: int = 4) -> dict:
    edges = [0, *(64 * 2**index for index in range(buckets))]
    places = [
        {"from": a, "to": b, "tokens": b - a, "ppl": level + index, "interval": [level, level + 9]}
        for index, (a, b) in enumerate(itertools.pairwise(edges))
    ]
    return {
        "tokens": edges[-1], "ppl": level, "interval": [level - 1, level + 1], "bits_per_byte": 1.1,
        "by_position": places, "pieces": [{"nll": 1.0, "tokens": 1}], "bytes": 2_900_000, "constant": True,
        "protocol": "one pass in pieces",
    }  # fmt: skip


def grid(full: int) -> dict:
    def cell(form: str, length: int, depth: float) -> dict:
        if length > 8000:
            return {"form": form, "length": length, "depth": depth, "exact": None, "why": "too long"}
        marked = bool(full) or depth == 100
        figures = {
            **rate([1, 0]),
            "hits": [1, 0],
            "ranks": [1, 4],
            "first": 0.5,
            "first_interval": [0.0, 1.0],
        }
        made = {"form": form, "length": length, "depth": depth, **figures, "proves_nothing": marked}
        return made | (
            {"why": "the needle lies inside the exact window"} if marked else {"off": dict(figures)}
        )

    from eval.measurements.niah import means

    cells = [cell(f, n, d) for f in ("sentence", "single_3") for n in (512, 9000) for d in (0, 50, 100)]
    exact = {"window": 32, "block": 32, "segments": False, "sinks": 4, "full": full}
    return {"cells": cells, "means": means(cells), "candidates": 10, "exact": exact}


def keys(off: bool) -> dict:
    from eval.measurements.passkey import means

    cells = [
        {"length": n, "depth": d, "times": n / 1024, **rate([1]), "hits": [1], "bytes": 2_900_000}
        | ({"off": {**rate([0]), "hits": [0], "bytes": 2_900_000}} if off else {})
        for n in (1024, 16384)
        for d in (0.1, 0.5, 0.9)
    ]
    return {"cells": cells, "means": means(cells), "training_length": 1024}


def cost(limit: bool) -> dict:
    def row(length: int) -> dict:
        if limit and length > 8192:
            return {"length": length, "bytes": 9, "why": "longer", "peak_bytes": None}
        return {
            "length": length, "bytes": 23_000 * length, "prefill_tokens_per_second": 300.0,
            "first_token_seconds": 3.0, "decode_tokens_per_second": 12.0, "peak_bytes": 46_000 * length,
        }  # fmt: skip

    return {"rows": [row(length) for length in (1024, 16384)], "piece": 1024}


CHOICE = {
    "version": 1, "select": "auto", "k": 1, "attention": "infini", "taken": [1], "teacher": {"recall": 0.9},
    "orders": {"independent": [1, 0]}, "seconds": {"foreseen": 120.0, "spent": 150.0},
    "layers": [
        {"layer": 0, "cost": 0.5, "kl": 0.4, "kl_error": 0.02, "recall": 0.8},
        {"layer": 1, "cost": 0.1, "kl": 0.1, "kl_error": None, "recall": 1.0},
    ],
    "sets": [
        {"name": "independent", "layers": [1], "kl": 0.1, "kl_error": None, "recall": 1.0},
        {"name": "uniform", "layers": [0], "kl": 0.4, "kl_error": 0.02, "recall": 0.8},
    ],
    "protocol": {
        "text": "dev", "rows": 4, "episodes": 4, "length": 512, "transfer_tokens": 8192, "recall_weight": 1.0,
    },
}  # fmt: skip


@pytest.fixture
def measured(run) -> dict:
    student, teacher = run["phases"]["stage3"], run["phases"]["teacher"]
    ratio = {"ratio": 0.97, "interval": [0.95, 0.99]}
    student["streaming"] = {
        "book": "The Voyage Out", **perplexity(40.0), "off": perplexity(44.0, 3) | {"against_on": ratio},
        "teacher_window": perplexity(41.0) | {"window": 96, "sinks": 4}, "against_teacher": ratio,
    }  # fmt: skip
    teacher["streaming"] = {"book": "The Voyage Out", "tokens": 9, "ppl": None, "why": "it grows"}
    student["niah_grid"], teacher["niah_grid"] = grid(0), grid(30)
    student["passkey_long"], teacher["passkey_long"] = keys(off=True), keys(off=False)
    teacher["choice"] = CHOICE
    student["cost"], teacher["cost"] = cost(limit=False), cost(limit=True)
    student["tuning"] = {
        "rank": 8, "backend": "peft", "why": "no GPU", "targets": ["q_proj"], "merge_difference": 1e-6,
        "data": {"kind": "chat", "read": 90, "conversations": 100},
        "held_out": {
            "tokens": 900, "rows": 10, "before": 2.0, "after": 1.5, "difference": -0.5, "standard_error": 0.1,
        },
    }  # fmt: skip
    return run


def test_every_section_is_written_and_drawn(measured, tmp_path):
    assert problems(measured) == []
    write_metrics(tmp_path, measured)
    text = write_report(tmp_path).read_text()
    for name in SECTIONS.names():
        section = SECTIONS.get(name)
        assert f"## {section.title}" in text
        for file, (title, _) in section.pictures.items():
            assert f"![{title}](plots/{file})" in text
            assert (tmp_path / "plots" / file).stat().st_size > 10_000
    lines = text.splitlines()
    for above, line in itertools.pairwise(lines):
        if above.startswith("|") and line.startswith("|"):
            assert line.replace("\\|", "").count("|") == above.replace("\\|", "").count("|"), line


def test_the_words_follow_the_figures(measured):
    by_title = {text.splitlines()[0]: text for text in written(measured["phases"], {})}
    choice = by_title["## Choice of layers"]
    assert "the 1 of 2 layers that cost least" in choice
    assert "| 0 |  | 0.5 | 0.4 ± 0.02 | 0.80 |" in choice
    assert "The smallest KL is that of the independent set." in choice
    assert "It took 2.5 minutes, 2.0 foreseen" in choice
    streaming = by_title["## Streaming perplexity"]
    assert "0.970 [0.950, 0.990]" in streaming
    assert "not measured: it grows" in streaming
    assert "2,900,000, constant" in streaming
    needles = by_title["## Needle in a haystack"]
    assert "4 of 12 cells" not in needles
    assert "2 of 12 cells prove nothing about a memory: the needle lies inside the exact window" in needles
    assert "| 512 | sentence | 2 of 3 |" in needles
    assert "16 times the training's" in by_title["## Pass keys beyond the training's length"]
    assert (
        "teacher at 16,384 tokens: not measured: longer"
        in by_title["## Cost against the length of the context"]
    )


def test_nothing_measured_is_no_section(run):
    keys = {SECTIONS.get(name).key for name in SECTIONS.names()}
    run["phases"] = {
        name: {key: value for key, value in phase.items() if key not in keys}
        for name, phase in run["phases"].items()
    }
    assert written(run["phases"], {}) == []
    assert pictures(run["phases"]) == {}
    assert "Needle in a haystack" not in render(run, {})


def test_a_teacher_alone_has_its_sections(measured):
    alone = copy.deepcopy(measured["phases"])
    phases = {"teacher": alone["teacher"]}
    there = [name for name in SECTIONS.names() if SECTIONS.get(name).key in phases["teacher"]]
    assert len(written(phases, {})) == len(there) >= 4


def test_borders_of_blocks_and_window():
    exact = {"window": 64, "block": 32, "full": 0}
    lines = borders(512, exact)
    assert [place for place, _, width in lines if width > 1] == [100 * (480 - 64) / 512]
    assert len(lines) == 17
    assert len(borders(32768, exact)) == 1
    assert borders(512, exact | {"full": 3}) == []
