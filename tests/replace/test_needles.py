"""Needles: exactly one asked fact, exactly as long as asked for, nine wrong values of the same form."""

import random
import re

import pytest

from replace.config import ModelConfig
from replace.corpora import Document
from replace.episodes import haystack
from replace.errors import UserError
from replace.loading import load_tokenizer
from replace.needles import CANDIDATES, FORMS, make_needle

WORDS = ("the", "old", "house", "stood", "near", "a", "river", "nobody", "knew", "who", "lived", "there")
VALUES = {
    "sentence": r"\d{4}",
    "key_value": r"[a-z]+( [a-z]+)?",
    "single_3": r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}",
}
VALUES["multikey_3"] = VALUES["single_3"]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(ModelConfig(kind="tiny"))


@pytest.fixture(scope="module")
def haystacks(tokenizer):
    rng = random.Random(0)
    text = " ".join(" ".join(rng.choices(WORDS, k=9)).capitalize() + "." for _ in range(150))
    documents = [Document("a", text, "x", "test")]
    return lambda name: haystack(name, documents, tokenizer)


def made(form, tokenizer, haystacks, depth=0.5, seed=1, length=512):
    return make_needle(form, tokenizer, random.Random(seed), length, depth, haystacks)


@pytest.mark.parametrize("form", FORMS)
def test_a_needle_of_every_form(form, tokenizer, haystacks):
    needle = made(form, tokenizer, haystacks)
    episode, values = needle.episode, needle.values
    assert len(episode.input_ids) == 512
    assert len(set(values)) == CANDIDATES
    assert values[0] == episode.answer_text
    pattern = VALUES.get(form, r"\d{7}")
    assert all(re.fullmatch(pattern, value) for value in values), values
    text = tokenizer.decode(episode.input_ids)
    before = tokenizer.decode(episode.input_ids[: episode.answer.start])
    assert before.count(values[0]) == 1
    assert text.endswith(values[0])
    inside = tokenizer.decode(episode.input_ids[episode.needle])
    assert values[0] in inside
    again = made(form, tokenizer, haystacks)
    assert again.episode.input_ids.tolist() == episode.input_ids.tolist()
    assert again.values == values
    assert made(form, tokenizer, haystacks, seed=2).values != values


def test_other_facts_are_ranked_beside_the_asked_one(tokenizer, haystacks):
    needle = made("multikey_1", tokenizer, haystacks)
    text = tokenizer.decode(needle.episode.input_ids)
    assert text.count("The secret number of") == 1 + FORMS["multikey_1"].others
    assert sum(value in text for value in needle.values) == 1 + FORMS["multikey_1"].others


@pytest.mark.parametrize("form", ["multikey_2", "multikey_3"])
def test_a_crowd_is_made_of_facts_alone(form, tokenizer, haystacks):
    needle = made(form, tokenizer, haystacks, length=768)
    text = tokenizer.decode(needle.episode.input_ids)
    facts = re.findall(r"The secret (?:number|code) of (\S+) is (\S+)\.", text)
    assert len(facts) >= 4
    assert len({key for key, _ in facts}) == len(facts)
    asked = [key for key, value in facts if value == needle.values[0]]
    assert len(asked) == 1
    assert f"is the secret {'number' if form == 'multikey_2' else 'code'} of {asked[0]}?" in text


def test_depths_reach_from_the_start_to_the_question(tokenizer, haystacks):
    first, last = (made("single_1", tokenizer, haystacks, depth=depth).episode for depth in (0.0, 1.0))
    assert first.needle.start < 40
    assert last.needle.stop == last.question.start


def test_what_does_not_fit_is_refused(tokenizer, haystacks):
    with pytest.raises(UserError, match="episode length=64"):
        made("multikey_1", tokenizer, haystacks, length=64)
    with pytest.raises(UserError, match="haiku"):
        made("haiku", tokenizer, haystacks)


@pytest.mark.parametrize("form", FORMS)
def test_the_stated_size_is_enough_for_the_facts(form):
    """With the default teacher's tokenizer; a sentence of the haystack comes on top."""
    tokenizer = load_tokenizer(ModelConfig())
    needle = make_needle(
        form,
        tokenizer,
        random.Random(3),
        FORMS[form].tokens + 64,
        0.5,
        lambda name: haystack("filler", [], tokenizer),
    )
    assert len(needle.episode.input_ids) == FORMS[form].tokens + 64
