"""The rows of a stage: what does not fit is asked for less, or refused before anything is loaded."""

import pytest

from distill.data import Mixture, check_text
from replace.config import Config, StageBudget
from replace.corpora import Document
from replace.errors import UserError
from replace.tiny import tiny_tokenizer

SENTENCE = "The old house stood near a river and nobody knew who lived there. "


def documents():
    return [Document(str(number), SENTENCE * 60, "files", "train") for number in range(2)]


def config_of(length, **stages):
    """Stage 2 alone, on episodes alone."""
    config = Config(stages=[2])
    config.attention.block = config.attention.window = 8
    config.data.recall = 1.0
    config.budget.stage2 = StageBudget(tokens=4 * length, length=length)
    return config


def mixture(config):
    return Mixture(tiny_tokenizer(), documents(), config, config.budget.stage2, stage=2, share=1.0)


def answers_of(row):
    """Runs of answer tokens."""
    marked = row.answers[0].int()
    return int(marked[0] + (marked.diff() == 1).sum())


def test_a_row_too_short_for_several_needles_gets_fewer():
    """The tokenizer of the tiny model takes up to 80 tokens a needle and its question."""
    rows = {length: mixture(config_of(length)) for length in (144, 400)}
    short, long = ([answers_of(rows[length].batch(i)) for i in range(24)] for length in rows)
    assert all(short)
    assert set(long) == {1, 2, 3}
    assert sum(short) < sum(long)


def test_a_row_too_short_for_one_needle_is_refused_before_anything_is_loaded():
    check_text(documents(), tiny_tokenizer(), config_of(144))
    with pytest.raises(UserError, match=r"^budget\.stage2\.length=72 .* allowed: more than 1?\d\d tokens"):
        check_text(documents(), tiny_tokenizer(), config_of(72))
    without = config_of(72)
    without.data.recall = 0.0
    check_text(documents(), tiny_tokenizer(), without)
