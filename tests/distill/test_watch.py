"""Each failure pattern of the guideline is logged once, with cause and remedy, and only when it is there."""

import math

import pytest

from distill.watch import LEAST, PATTERNS, Watch

VOCABULARY = 49152


def watched(losses, norm=1.0, finite=lambda step: True, vocabulary=VOCABULARY, seen=None):
    seen = {} if seen is None else seen
    watch = Watch("stage 2", len(losses), vocabulary, seen)
    for step, loss in enumerate(losses):
        watch(step, loss if isinstance(loss, dict) else {"loss": loss}, norm, finite=finite(step))
    return seen


def falling(steps=60, start=4.0):
    return [start * (0.3 + 0.7 * math.exp(-step / 20)) for step in range(steps)]


def test_a_sound_stage_is_silent(caplog):
    assert watched([{"loss": x, "ce": 3 + x} for x in falling()]) == {}
    assert not caplog.records


CASES = {
    "collapse": ([{"loss": x, "ce": 10.6} for x in falling()], {}),
    "high_loss": ([140.0, *falling()], {}),
    "nonfinite": (falling(), {"finite": lambda step: step != 7}),
    "no_progress": ([3.0] * 40, {}),
}


@pytest.mark.parametrize("name", PATTERNS)
def test_each_pattern_is_seen_alone_and_logged_once(name, caplog):
    losses, given = CASES[name]
    seen = watched(losses, **given)
    assert set(seen) == {name}
    (record,) = caplog.records
    line = record.getMessage()
    assert "\n" not in line
    assert line.startswith(f"stage 2, step {seen[name]}: {PATTERNS[name].symptom}")
    assert f"likely cause: {PATTERNS[name].cause}" in line
    assert f"remedy: {PATTERNS[name].remedy}" in line


def test_the_step_is_the_first_one():
    assert watched(falling(), finite=lambda step: step < 7) == {"nonfinite": 7}
    assert watched([*falling(3), 200.0, 300.0, *falling(57)]) == {"high_loss": 3}


def test_a_vanished_gradient_is_seen_at_once():
    assert watched(falling(5), norm=0.0) == {"no_progress": 0}


def test_few_steps_and_single_texts_say_nothing():
    assert watched([3.0] * (LEAST - 1)) == {}
    hard = [{"loss": x, "ce": 10.6 if step % 3 == 0 else 3.0} for step, x in enumerate(falling())]
    assert watched(hard) == {}


def test_what_was_seen_before_a_resume_is_not_logged_again(caplog):
    assert watched([140.0, *falling()], seen={"high_loss": 3}) == {"high_loss": 3}
    assert not caplog.records


def test_a_vocabulary_that_is_not_known_rules_only_the_collapse_out():
    losses = [{"loss": x, "ce": 10.6} for x in falling()]
    assert watched(losses, vocabulary=None) == {}
    assert set(watched([{"loss": x, "ce": 6.0} for x in falling()], vocabulary=512)) == {"collapse"}
