"""The verdict and the recovery follow from constructed figures as design 03 says."""

import copy
import math

import pytest

from eval.verdict import paired_hits, recovery, verdict

PARTS = {"replaced": 4, "memory": 4, "pairs": 0, "full_attention": 0}


def cells(hits: list[list[int]], distractors: int = 0) -> dict:
    """A pass-key grid with one cell for each list of hits."""
    grid = [
        {
            "length": 1024,
            "depth": index / 10,
            "kind": "passkey",
            "phrasing": "train",
            "haystack": "novel",
            "distractors": distractors,
            "episodes": len(row),
            "hits": row,
        }
        for index, row in enumerate(hits)
    ]
    return {"cells": grid, "means": []}


def books(losses: list[float]) -> dict:
    """A text whose windows of 100 tokens have these losses a token."""
    windows = [{"nll": 100 * loss, "tokens": 100} for loss in losses]
    return {"book": {"ppl": math.exp(sum(losses) / len(losses)), "windows": windows}}


def judged(on: dict, off: dict, parts: dict = PARTS) -> dict:
    return verdict({**on, "ablation": {"memory_off": off}}, parts)


NOISE = [0.0, 0.3, -0.2, 0.1, -0.1, 0.2, -0.3, 0.05]


@pytest.mark.parametrize(
    ("on", "off", "word"),
    [
        ([[1] * 24], [[0] * 24], "used"),
        ([[0] * 24], [[1] * 24], "harmful"),
        ([[1] * 24], [[1] * 24], "window-only"),
        ([[1] * 5 + [0] * 19], [[0] * 24], "window-only"),  # 21 points, but McNemar's p is .06
        ([[1] * 6 + [0] * 18], [[0] * 24], "used"),
        ([[1] * 10 + [0] * 190], [[0] * 200], "window-only"),  # certain, but 5 points only
        ([[1, 0] * 12], [[0, 1] * 12], "window-only"),
    ],
)
def test_recall_alone(on, off, word):
    assert judged({"passkey": cells(on)}, {"passkey": cells(off)})["memory"] == word


@pytest.mark.parametrize(
    ("gain", "spread", "word"),
    [
        (0.02, 0.001, "used"),
        (-0.02, 0.001, "harmful"),
        (0.0, 0.001, "window-only"),
        (0.004, 0.0001, "window-only"),  # certain, but below half a percent
        (0.02, 0.2, "window-only"),  # large, but the interval holds 0
    ],
)
def test_perplexity_alone(gain, spread, word):
    on = [3 + noise for noise in NOISE]
    off = [loss + gain + spread * sign for loss, sign in zip(on, [1, -1, 1, -1, -1, 1, -1, 1], strict=True)]
    found = judged({"perplexity": books(on)}, {"perplexity": books(off)})
    assert found["memory"] == word
    detail = found["details"]["memory"]["perplexity"]
    assert detail["difference"] == pytest.approx(math.expm1(gain), abs=1e-9)
    assert detail["interval"][0] <= detail["difference"] <= detail["interval"][1]


def test_recall_decides_where_the_two_contradict_each_other():
    on = {"passkey": cells([[1] * 24]), "perplexity": books([3.1] * 8)}
    off = {"passkey": cells([[0] * 24]), "perplexity": books([3.0] * 8)}
    found = judged(on, off)
    assert found["memory"] == "used"
    assert "perplexity says harmful" in found["details"]["memory"]["conflict"]
    assert "conflict" not in judged(on, on)["details"]["memory"]


def test_a_part_that_is_not_there_is_not_judged():
    found = judged({"passkey": cells([[1] * 9])}, {"passkey": cells([[0] * 9])})
    assert found["pairs"] is None
    assert "no layer" in found["details"]["pairs"]["why"]
    assert found["memory_and_pairs"] is None
    assert "not measured" in found["details"]["memory_and_pairs"]["why"]


@pytest.mark.parametrize("remaining", [0, 3])
def test_remaining_full_attention_is_named(remaining):
    found = judged({"passkey": cells([[1] * 9])}, {}, PARTS | {"full_attention": remaining})
    assert found["carried_by_full_attention"] is (remaining > 0)
    assert found["memory"] is None


@pytest.mark.parametrize(
    ("parts", "on", "off", "words"),
    [
        (PARTS, [[1] * 24], [[1] * 24], ["window-only"]),
        (PARTS, [[1] * 24], [[0] * 24], ["used"]),
        (PARTS | {"full_attention": 1}, [[1] * 24], [[0] * 24], ["used", "carried-by-full-attention"]),
        (PARTS | {"memory": 0}, [[1] * 24], [[0] * 24], ["window-only"]),  # nothing is stored
        (PARTS | {"pairs": 2}, [[1] * 24], [[0] * 24], ["not-judged"]),  # both together were not measured
        (PARTS | {"replaced": 0, "memory": 0, "full_attention": 4}, [[1] * 24], [[0] * 24], []),
    ],
)
def test_what_the_whole_model_is_called(parts, on, off, words):
    assert judged({"passkey": cells(on)}, {"passkey": cells(off)}, parts)["called"] == words


def test_the_layers_that_could_carry_a_fact_are_listed():
    kept = {"full_attention": [3, 9], "sliding_window": [], "recurrent": [1]}
    found = judged({"passkey": cells([[1] * 9])}, {}, PARTS | {"full_attention": 2, "unreplaced": kept})
    assert found["carriers"] == {"full_attention": [3, 9], "recurrent": [1]}


def test_the_gain_over_the_control_is_paired():
    phase = {
        "passkey": cells([[1] * 9]),
        "ablation": {"sliding_window_control": {"passkey": cells([[0] * 9])}},
    }
    assert verdict(phase, PARTS)["details"]["control"]["recall"]["only_on"] == 9
    phase["ablation"]["sliding_window_control"] = {"why": "none"}
    assert "control" not in verdict(phase, PARTS)["details"]


def test_pairs_are_matched_by_cell_and_distractors_left_out():
    on = {"passkey": cells([[1, 0, 1], [1, 1, 1]])}
    off = {"passkey": cells([[0, 1]])}
    assert paired_hits(on, off) == ([1, 0], [0, 1])
    crowded = {"passkey": cells([[1, 1]], distractors=8)}
    assert paired_hits(crowded, crowded) == ([], [])
    assert paired_hits(crowded, crowded, distractors=True) == ([1, 1], [1, 1])


def phases(teacher: float, swapped: float, student: float) -> dict:
    return {
        name: {"perplexity": books([level + noise for noise in NOISE])}
        for name, level in (("teacher", teacher), ("swapped", swapped), ("stage2", student))
    }


@pytest.mark.parametrize(("student", "share"), [(3.5, 0.0), (3.0, 1.0), (3.25, 0.5), (3.6, -0.2), (2.9, 1.2)])
def test_recovery_is_the_share_of_the_damage_in_log_perplexity(student, share):
    found = recovery(phases(3.0, 3.5, student), "stage2")["perplexity/book"]
    assert found["value"] == pytest.approx(share)
    assert found["interval"] == pytest.approx([share, share])


def test_recovery_of_no_damage_is_null():
    found = recovery(phases(3.0, 3.0, 2.9), "stage2")
    assert found["perplexity/book"]["value"] is None
    assert "cannot be told from 0" in found["perplexity/book"]["why"]
    assert found["recall"]["why"].startswith("not measured")


def test_recovery_uses_the_windows_that_all_have():
    several = phases(3.0, 3.5, 3.25)
    several["stage2"]["perplexity"]["book"]["windows"] += [{"nll": 900.0, "tokens": 100}]
    assert recovery(several, "stage2")["perplexity/book"]["value"] == pytest.approx(0.5)


def test_recovery_of_recall():
    hits = {"teacher": [1] * 8, "swapped": [0] * 8, "stage2": [1] * 6 + [0] * 2}
    several = {name: {"passkey": cells([row])} for name, row in hits.items()}
    found = recovery(several, "stage2")["recall"]
    assert found["value"] == 0.75
    assert found["interval"][0] < 0.75 < found["interval"][1] <= 1


def test_recovery_without_a_phase_says_which():
    several = phases(3.0, 3.5, 3.25)
    del several["swapped"]
    assert "swapped" in recovery(several, "stage2")["all"]["why"]
    assert recovery(phases(3.0, 3.5, 3.25), "swapped")["all"]["why"] == "nothing was trained"


def test_judging_changes_nothing(run):
    before = copy.deepcopy(run["phases"])
    verdict(run["phases"]["stage3"], run["parts"])
    recovery(run["phases"], "stage3")
    assert run["phases"] == before
