"""Continuations: what is counted, what is compared with the teacher, and what is null without one."""

import math
import random

import pytest
import torch

from eval.measure import keep_teacher, yardstick
from eval.measurements import MEASUREMENTS, generation
from eval.measurements.generation import continuations, distinct, repetition
from eval.sections.writing import writing as section
from replace.config import AttentionConfig, Config, ModelConfig
from replace.convert import SwapSpec, swap
from replace.corpora import Document
from replace.loading import load_model

OPTIONS = AttentionConfig(block=8, window=8, pairs=4, sinks=2, distance_cap=None)


def test_repetition_is_the_share_of_4_grams_that_stood_there_before():
    assert repetition([[1, 2, 3, 4, 5, 6, 7]]) == 0
    assert repetition([[1, 2, 3, 4, 1, 2, 3, 4]]) == pytest.approx(1 / 5)
    assert repetition([[7] * 10]) == pytest.approx(6 / 7)
    assert repetition([[1, 2, 3, 4], [1, 2, 3, 4]]) == 0  # other continuations may say the same
    assert repetition([[1, 2, 3], []]) is None


def test_distinct_counts_over_all_continuations():
    assert distinct([[1, 2, 1, 2]], 1) == 0.5
    assert distinct([[1, 2, 3], [1, 2, 4]], 2) == 0.75
    assert distinct([[1]], 2) is None


def test_padding_changes_no_continuation(tiny):
    prompts = [
        tiny.tokenizer(text)["input_ids"] for text in ("The pass key is", "A", "What is the city? " * 3)
    ]
    together = continuations(tiny.model, tiny.tokenizer, prompts, tokens=6)
    alone = [continuations(tiny.model, tiny.tokenizer, [prompt], tokens=6)[0] for prompt in prompts]
    assert together == alone
    assert any(together)


@pytest.fixture(scope="module")
def measured(tiny):
    """The teacher's figures, those of a student with other weights, and the tools they were measured with."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "TOKENS", 12)
        patch.setattr(generation, "PROMPTS", generation.PROMPTS[:2])
        patch.setattr(generation, "LONG", 40)
        config = Config(model=ModelConfig(kind="tiny"), attention=OPTIONS, precision="fp32")
        config.eval.more = ["writing"]
        rng = random.Random(0)
        text = " ".join(rng.choices(("the", "city", "is", "known", "green", "sky"), k=300))
        using = yardstick(tiny.tokenizer, config, [Document("book", text, "x", "test")])
        keep_teacher(tiny.model, tiny.tokenizer, config, using)
        measure = MEASUREMENTS.get("writing")
        student = load_model(ModelConfig(kind="tiny")).model.eval()
        swap(student, SwapSpec(dict.fromkeys(range(4), OPTIONS)))
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.add_(
                    0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
                )
        found = [measure(model, tiny.tokenizer, config, using)["writing"] for model in (tiny.model, student)]
        yield *found, student, using, config, measure


def test_the_teacher_is_beside_itself(measured):
    teacher, *_ = measured
    assert teacher["kl"]["why"] == "this is the teacher"
    assert teacher["teacher"] == {key: teacher[key] for key in ("repetition", "distinct")}
    assert all(row["change"] == 0 for row in teacher["continuations"])


def test_a_student_is_compared_with_the_teacher_on_its_own_text(measured, tiny):
    teacher, student, model, using, _, _ = measured
    assert student["prompts"] == 3
    changes = [row["change"] for row in student["continuations"]]
    assert changes == sorted(changes, reverse=True)
    assert changes[0] > 0
    assert {row["teacher"] for row in student["continuations"]} == {
        r["text"] for r in teacher["continuations"]
    }
    assert 0 <= student["agreement"] < 1
    # by hand: the same text, both models, token by token
    total, count, loss = 0.0, 0, 0.0
    written = continuations(model, tiny.tokenizer, using.kept["writing"].prompts, 12)
    for prompt, own in zip(using.kept["writing"].prompts, written, strict=True):
        row = torch.tensor([prompt + own])
        with torch.inference_mode():
            p, q = (m(input_ids=row).logits[0].log_softmax(-1) for m in (model, tiny.model))
        for place in range(len(prompt) - 1, row.shape[1] - 1):
            total += float((p[place].exp() * (p[place] - q[place])).sum())
            loss -= float(q[place, row[0, place + 1]])
            count += 1
    assert student["tokens"] == count
    assert student["kl"]["value"] == pytest.approx(total / count, rel=1e-3)
    assert student["kl"]["teacher_loss"] == pytest.approx(loss / count, rel=1e-3)
    assert student["kl"]["interval"][0] <= student["kl"]["value"] <= student["kl"]["interval"][1]
    assert math.isfinite(student["kl"]["own_loss"])


def test_without_a_run_there_is_no_teacher(measured, tiny):
    *_, student, using, config, measure = measured
    using = yardstick(tiny.tokenizer, config, [Document("book", "The city is known. " * 40, "x", "test")])
    found = measure(student, tiny.tokenizer, config, using)["writing"]
    assert found["kl"]["value"] is None
    assert "without the run" in found["kl"]["why"]
    assert found["teacher"] is None
    assert "not measured: the model was measured without the run" in section({"writing": found})
