"""Every box of the guideline follows from figures: met, not met, or not measured and why."""

import pytest

from eval.checklist import checklist, patterns
from eval.metrics import new_metrics
from eval.report import render

CONFIG = {"budget": {"stage1": {"tokens": 2048, "length": 1024}, "stage2": {"tokens": 0, "length": 9999}}}


def boxes(run, log=(), config=CONFIG):
    return {(box["section"], box["box"]): box for box in checklist(run, log, config)}


def find(run, words, log=(), config=CONFIG):
    (box,) = [
        box for (section, name), box in boxes(run, log, config).items() if words in f"{section}: {name}"
    ]
    return box


def test_the_boxes_are_those_of_sections_6_and_8(run, train_log):
    """Four for debugging; three before the swap, four of the implementation, three each of the rest."""
    sections = [section for section, _ in boxes(run, train_log)]
    counts = {section: sections.count(section) for section in dict.fromkeys(sections)}
    assert counts == {
        "debugging": 4,
        "before the swap": 3,
        "implementation": 4,
        "training": 3,
        "evaluation": 3,
    }


def test_a_sound_run_meets_all_of_them(run, train_log):
    for box in checklist(run, train_log, CONFIG):
        assert box["passed"] is True, box
        assert box["value"]
        assert box["limit"]
        assert box["why"] is None


def spoil(path, value):
    def change(run):
        node = run
        for key in path[:-1]:
            node = node[key]
        node[path[-1]] = value

    return change


LAST = ("phases", "stage3")


@pytest.mark.parametrize(
    ("words", "change"),
    [
        ("language ability", spoil((*LAST, "probes", 0, "hit"), False)),
        ("scale of the outputs", spoil((*LAST, "layer_outputs", 4, "std"), 0.9)),
        ("scale of the outputs", spoil((*LAST, "layer_outputs", 4, "std"), None)),
        ("no NaN", spoil((*LAST, "training", "nonfinite"), 1)),
        ("no NaN", spoil((*LAST, "training", "skipped_steps"), 1)),
        ("analysed", spoil(("replaced", 3, "output", "max"), None)),
        ("fp16 and bf16", spoil(("replaced", 3, "output", "beyond_fp16"), 0.01)),
        ("never L2", spoil(("replaced", 3, "magnitude"), 0.0)),
        ("scaling factor", spoil(("replaced", 3, "scale"), 1.0)),
        ("are detected", lambda run: run["phases"]["stage2"]["training"].pop("nonfinite")),
        ("basic language test was run", spoil(("phases", "swapped", "probes"), [])),
        ("compared with the originals", lambda run: run["phases"]["stage3"]["layer_outputs"].pop()),
    ],
)
def test_a_figure_beyond_its_limit_is_not_met(run, train_log, words, change):
    change(run)
    assert find(run, words, train_log)["passed"] is False


def test_what_the_teacher_does_not_complete_is_not_asked_of_the_student(run):
    assert find(run, "language ability")["value"] == "1 of 1 prompts"  # it says that 1 + 1 is 11


def test_a_loss_that_rises_is_not_met(run, train_log):
    for line in train_log:
        if line["stage"] == 2:
            line["loss"] = 1 + line["step"]
    assert find(run, "has every loss converged", train_log)["passed"] is False
    assert find(run, "distillation loss", train_log)["passed"] is True


def test_long_means_longer_than_the_training(run, train_log):
    config = {"budget": {"stage1": {"tokens": 1, "length": 4096}}}
    assert find(run, "long texts", train_log, config)["passed"] is False


def test_nothing_measured_is_null_and_says_why():
    empty = new_metrics(model="m", attention=None, layers=[], seed=0, device="cpu")
    for box in checklist(empty):
        assert box["value"] is None
        assert box["passed"] is None
        assert box["why"]
    assert "not measured: no probe was run" in render(empty, {})


def test_the_report_shows_boxes_and_failure_patterns(run, train_log):
    run["phases"]["stage2"]["training"]["patterns"] = {"high_loss": 12}
    run["phases"]["stage1"]["training"].pop("patterns")
    text = render(run, {}, log=train_log, config=CONFIG)
    section = text.partition("## Guideline checklist")[2].partition("\n## ")[0]
    assert section.count("| met |") == 17
    rows = {line.split("|")[1].strip(): line for line in section.splitlines() if line.startswith("|")}
    high = rows["the loss is far too high"]
    assert "not watched for" in high
    assert "**seen from step 12**" in high
    assert rows["NaN or infinity"].count("not seen") == 2
    assert [stage["phase"] for stage in patterns(run)] == ["stage1", "stage2", "stage3"]
