"""The one figure that sweeps minimise."""

import math

import pytest

from eval.objective import objective


def phase(ppl, hits, text="a"):
    cells = [{"hits": hits, "episodes": len(hits)}]
    return {"perplexity": {text: {"ppl": ppl}}, "niah": {"cells": cells}}


def test_it_is_what_perplexity_and_recall_lost():
    phases = {"teacher": {"dev": phase(10, [1, 1, 1, 1])}, "stage1": {"dev": phase(11, [1, 0, 0, 1])}}
    assert objective(phases) == pytest.approx(math.log(1.1) + 0.5)


def test_the_last_student_counts_and_more_recall_than_the_teacher_s_buys_no_perplexity():
    phases = {"teacher": {"dev": phase(10, [1, 0])}, "stage1": {"dev": phase(30, [0, 0])}}
    assert objective(phases | {"stage3": {"dev": phase(10, [1, 1])}}) == 0
    assert objective(phases | {"continued_teacher": {"dev": phase(5, [1, 1])}}) == objective(phases)


@pytest.mark.parametrize(
    "phases",
    [
        {},
        {"teacher": {"dev": phase(10, [1])}},
        {"teacher": phase(10, [1]), "stage3": phase(11, [1])},
        {"teacher": {"dev": phase(10, [1])}, "stage3": phase(11, [1])},
        {"teacher": {"dev": phase(10, [1])}, "stage3": {"dev": phase(None, [1])}},
        {"teacher": {"dev": phase(10, [1])}, "stage3": {"dev": phase(11, [1], text="b")}},
    ],
)
def test_test_figures_are_never_an_objective(phases):
    """Without dev figures of both there is none."""
    assert objective(phases) is None
