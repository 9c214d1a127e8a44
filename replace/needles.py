"""Needle forms: which key and value a hidden fact has, and what it lies in.

Besides a sentence (a city and a number) and a pair of words there are the six retrieval tasks that the
benchmark RULER (Hsieh et al. 2024) calls niah_single_1-3 and niah_multikey_1-3, here by its conventions and
in our words: a single fact in a repeated filler (single_1), in a book (single_2), in a book with a UUID for a
value (single_3); four facts in a book of which one is asked (multikey_1); a haystack made of nothing but
facts of the same form (multikey_2), and the same with UUIDs for keys and values (multikey_3). Its keys are
two words with a hyphen, its numbers have seven digits. RULER takes an answer that contains the value; here
the answer has to begin with it.
"""

import random
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from transformers import PreTrainedTokenizerBase

from replace.episodes import Episode, HaystackSource, Pool, draw_facts, make_episode, pool_of
from replace.errors import bad_value
from replace.phrasings import PHRASINGS, WORDS, Phrasing

CANDIDATES = 10
"""Values among which the true one is ranked."""
MOST_TRIES = 1000
NUMBER = Phrasing(
    "The secret number of {key} is {value}.",
    "Question: what is the secret number of {key}?\nAnswer: the secret number of {key} is",
)
CODE = Phrasing(
    "The secret code of {key} is {value}.",
    "Question: what is the secret code of {key}?\nAnswer: the secret code of {key} is",
)


def words(rng: random.Random) -> str:
    """Two words with a hyphen."""
    return "-".join(rng.sample(WORDS, 2))


def number(rng: random.Random) -> str:
    """A number of seven digits."""
    return str(rng.randrange(10**6, 10**7))


def code(rng: random.Random) -> str:
    """A UUID (version 4)."""
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


@dataclass(frozen=True)
class Form:
    """One kind of needle.

    Attributes:
        tokens: what the facts, the question and the answer need at least, with the default teacher's
            tokenizer, for which each digit is a token.
        key, value: draw a key and a value; None where `kind` says how.
        wording: None where `kind` says how.
        haystack: a name of `replace.episodes.HAYSTACKS`; None for a haystack that is made of such facts.
        others: facts of the same form beside the one that is asked.
        kind: a kind of `replace.phrasings.PHRASINGS`, in wordings never trained on.
    """

    tokens: int
    key: Callable[[random.Random], str] | None = None
    value: Callable[[random.Random], str] | None = None
    wording: Phrasing | None = None
    haystack: str | None = "novel"
    others: int = 0
    kind: str | None = None

    def facts(self, rng: random.Random, count: int, rare: bool = False) -> list[tuple[str, str]]:
        """`count` facts of different keys and different values."""
        if self.kind is not None:
            return draw_facts(self.kind, rng, count, rare)
        assert self.key is not None
        assert self.value is not None
        keys, values = _different(rng, self.key, count), _different(rng, self.value, count)
        return list(zip(keys, values, strict=True))


FORMS = {
    "sentence": Form(64, kind="sentence"),
    "key_value": Form(64, kind="key_value"),
    "single_1": Form(96, words, number, NUMBER, haystack="filler"),
    "single_2": Form(96, words, number, NUMBER),
    "single_3": Form(128, words, code, CODE),
    "multikey_1": Form(192, words, number, NUMBER, others=3),
    "multikey_2": Form(192, words, number, NUMBER, haystack=None),
    "multikey_3": Form(448, code, code, CODE, haystack=None),
}


@dataclass
class Needle:
    """An episode with one fact asked, and ten values of its form: the answer first, then wrong ones."""

    episode: Episode
    values: list[str]


def make_needle(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    rng: random.Random,
    length: int,
    depth: float,
    haystacks: Callable[[str], HaystackSource],
) -> Needle:
    """One needle of `length` tokens in held-out text, at any depth, also where an exact part sees it.

    The wrong values are those of the other facts in the text, as far as there are any, and fresh ones that
    the text does not hold. All are drawn alike, so that whoever remembers nothing ranks the true one first in
    one of ten.

    Args:
        name: one of FORMS.
        depth: 0 (start) to 1 (end) of the haystack.
        haystacks: gives the haystack of a name.

    Raises:
        UserError: an unknown name, or a length that cannot hold the facts and the question.
    """
    if name not in FORMS:
        raise bad_value("eval.niah_forms", name, tuple(FORMS))
    form = FORMS[name]
    around = _crowd(form, tokenizer, rng, length) if form.haystack is None else ([], haystacks(form.haystack))
    crowd, source = around
    drawn: list[tuple[str, str]] = []

    def draw(rng: random.Random, count: int, rare: bool) -> list[tuple[str, str]]:
        taken = {part for fact in crowd for part in fact}
        drawn[:] = form.facts(rng, count, rare)
        while any(part in taken for fact in drawn for part in fact):
            drawn[:] = form.facts(rng, count, rare)
        return list(drawn)

    wordings = [form.wording] if form.wording is not None else PHRASINGS[str(form.kind)]["test"]
    episode = make_episode(
        tokenizer,
        rng,
        length,
        depth,
        name,
        source,
        "test",
        distractors=form.others,
        wordings=wordings,
        draw=draw,
    )
    return Needle(episode, _values(form, tokenizer, rng, episode, [fact[1] for fact in drawn[1:] + crowd]))


def _values(
    form: Form, tokenizer: PreTrainedTokenizerBase, rng: random.Random, episode: Episode, present: list[str]
) -> list[str]:
    """The answer and nine other values, of those that are `present` first."""
    text = str(tokenizer.decode(episode.input_ids)).lower()
    present = [value for value in present if value.lower() in text]
    values = [episode.answer_text, *rng.sample(present, min(CANDIDATES - 1, len(present)))]
    rare = " " in episode.answer_text  # a value of two words is ranked among such
    tries = 0
    while len(values) < CANDIDATES:
        value = form.facts(rng, 1, rare)[0][1]
        tries += 1
        # A long book has most of the single words in it.
        if value not in values and (value.lower() not in text or tries > MOST_TRIES):
            values.append(value)
    return values


def _crowd(
    form: Form, tokenizer: PreTrainedTokenizerBase, rng: random.Random, length: int
) -> tuple[list[tuple[str, str]], HaystackSource]:
    """A haystack of facts that no question asks, longer than `length` tokens, and the facts."""
    assert form.wording is not None
    count = 8
    while True:
        facts = form.facts(rng, count)
        text = "".join(" " + form.wording.needle.format(key=key, value=value) for key, value in facts)
        ids = np.array(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int64)
        if len(ids) > length:
            return facts, HaystackSource("facts", partial(_one_pool, pool_of(ids, tokenizer)))
        count *= 2
        if count > len(WORDS) ** 2 // 2:
            raise bad_value("eval.niah_lengths", length, "a length that facts with different keys can fill")


def _one_pool(pool: Pool, split: str) -> list[Pool]:
    return [pool]


def _different(rng: random.Random, draw: Callable[[random.Random], str], count: int) -> list[str]:
    """`count` different draws, in the order drawn."""
    found: dict[str, None] = {}
    while len(found) < count:
        found[draw(rng)] = None
    return list(found)
