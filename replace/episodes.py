"""Seeded synthetic recall episodes: a fact hidden in a long text, and at the end its question.

An episode is built from token ids: the haystack is encoded once, the needle goes in where a sentence ends,
and both seams fall between words, so that the ids are those of the decoded text.
"""

import random
import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from replace.corpora import PERPLEXITY_BOOKS, SOTU, Document, token_ids
from replace.errors import UserError, bad_value
from replace.phrasings import CITIES, PHRASINGS, PLACES, SIDES, WORDS, Phrasing

KINDS = tuple(PHRASINGS)
HAYSTACKS = ("novel", "filler", "speech", "snippet")
SPLITS = ("train", "dev", "test")

FILLERS = {
    "train": (
        " The road is long. The wind is cold. The house is quiet. We wait for the rain. It will come soon.",
        " The bread is warm. The milk is fresh. The table is set. Sit down with us. There is enough for all.",
        " The boats are out. The tide is low. The sand is wet. Nobody is on the beach. The day goes on.",
        " The clock ticks. The lamp burns. The cat sleeps by the fire. Nothing happens. The night is young.",
    ),
    "dev": (" The leaves fall. The path is soft. The birds are gone. We walk on. The hill is not far.",),
    "test": (
        " The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.",
        " The snow is white. The coal is black. The rose is red. Round and round it goes. So it was always.",
    ),
}
SNIPPET_TOKENS = (40, 160)

DrawFacts = Callable[[random.Random, int, bool], list[tuple[str, str]]]
"""(random numbers, count, rare) -> so many pairs of a key and a value, all different."""


class TooShort(UserError):
    """A length that cannot hold an episode's facts and questions; `least` is about what they need."""

    def __init__(self, length: int, least: int) -> None:
        allowed = f"more than {least} tokens, so that sentences fit around the facts"
        super().__init__(str(bad_value("episode length", length, allowed)))
        self.least = least


@dataclass
class Episode:
    """One episode of T tokens; slices count tokens of `input_ids`.

    `answers` and `needles` list all facts that are asked, `answer`, `needle`, `question` those of the last,
    whose answer ends the episode. `phrasing` is its index in `PHRASINGS[kind][split]`.
    """

    input_ids: torch.Tensor
    answer: slice
    needle: slice
    question: slice
    depth: float
    kind: str
    haystack: str
    phrasing: int
    answer_text: str
    split: str
    answers: list[slice]
    needles: list[slice]


@dataclass
class Pool:
    """Haystack text as ids, int64 [tokens], and the sorted ends of sentences (indices of the next token)."""

    ids: np.ndarray
    ends: np.ndarray


@dataclass
class HaystackSource:
    """Where haystacks of one name come from, by split; `repeat`: a short piece is repeated."""

    name: str
    build: Callable[[str], list[Pool]]
    repeat: bool = False
    pools: dict[str, list[Pool]] = field(default_factory=dict)

    def stretch(self, split: str, rng: random.Random, tokens: int) -> Pool:
        """Exactly `tokens` tokens that end with a sentence."""
        if split not in self.pools:
            self.pools[split] = self.build(split)
        pool = rng.choice(self.pools[split])
        if self.name == "snippet":
            pool = _snippet(pool, rng)
        if self.repeat or len(pool.ids) <= tokens:
            times = -(-tokens // len(pool.ids))
            shifts = np.arange(times) * len(pool.ids)
            pool = Pool(np.tile(pool.ids, times), (pool.ends[None] + shifts[:, None]).ravel())
            stop = len(pool.ids)
        else:
            first = int(np.searchsorted(pool.ends, tokens))
            stop = int(pool.ends[rng.randrange(first, len(pool.ends))])
        start = stop - tokens
        inside = pool.ends[(pool.ends > start) & (pool.ends <= stop)] - start
        return Pool(pool.ids[start:stop], inside)


def haystack(name: str, documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase) -> HaystackSource:
    """The haystacks called `name`: novel, speech, snippet (a repeated piece of a novel) or filler.

    Held-out haystacks are made of held-out documents, without the perplexity books where there are others. Of
    a user's own text, novel, speech and snippet are the same. Nothing is encoded before it is needed.
    """
    if name not in HAYSTACKS:
        raise bad_value("haystack", name, HAYSTACKS)

    def fillers(split: str) -> list[Pool]:
        rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in FILLERS[split]]
        return [pool_of(np.array(row, dtype=np.int64), tokenizer) for row in rows]

    def texts(split: str) -> list[Pool]:
        chosen = [document for document in documents if document.split == split]
        if not chosen:
            raise UserError(
                f"haystack={name!r} has no {split} text; allowed: data with at least three documents."
            )
        spoken = name == "speech"
        chosen = [d for d in chosen if d.source.startswith(SOTU.name) == spoken] or chosen
        chosen = [d for d in chosen if d.name not in PERPLEXITY_BOOKS] or chosen
        gap = np.array(tokenizer("\n\n", add_special_tokens=False)["input_ids"], dtype=np.int64)
        parts = [part for ids in token_ids(chosen, tokenizer) for part in (ids.numpy(), gap)]
        return [pool_of(np.concatenate(parts[:-1]), tokenizer)]

    return HaystackSource(name, fillers if name == "filler" else texts, repeat=name in ("filler", "snippet"))


def make_episode(
    tokenizer: PreTrainedTokenizerBase,
    rng: random.Random,
    length: int,
    depth: float,
    kind: str,
    haystack: HaystackSource,
    phrasing_split: str = "train",
    needles: int = 1,
    distractors: int = 0,
    *,
    clear: int = 0,
    phrasing: int | None = None,
    haystack_split: str | None = None,
    wordings: Sequence[Phrasing] | None = None,
    draw: DrawFacts | None = None,
) -> Episode:
    """One episode of exactly `length` tokens.

    Args:
        depth: where the needle of the last question lies, 0 (start) to 1 (end) of the haystack.
        needles: facts that are asked, one after the other; all but the last lie anywhere.
        distractors: further facts of the same form with other keys, never asked, spread evenly.
        clear: the least number of tokens between a needle's end and the first answer.
        phrasing: an index in `PHRASINGS[kind][phrasing_split]`; drawn if None.
        haystack_split: `phrasing_split` if None.
        wordings: instead of those of `kind`, which may then have any name.
        draw: draws the facts, instead of `draw_facts` for `kind`.

    Raises:
        TooShort: a length that cannot hold the facts and questions.
        UserError: an unknown name.
    """
    kinds = KINDS if wordings is None else (kind,)
    for name, value, allowed in (("kind", kind, kinds), ("phrasing_split", phrasing_split, SPLITS)):
        if value not in allowed:
            raise bad_value(f"episode {name}", value, allowed)
    prefix = _prefix(tokenizer)
    wordings = PHRASINGS[kind][phrasing_split] if wordings is None else wordings
    draw = partial(draw_facts, kind) if draw is None else draw
    for attempt in range(64):
        asked = [rng.randrange(len(wordings)) for _ in range(needles)]
        if phrasing is not None:
            asked[-1] = phrasing
        facts = draw(rng, needles + distractors, attempt >= 8)
        forms = [wordings[index] for index in [*asked, *[asked[-1]] * distractors]]
        written = [_needle(tokenizer, form, fact) for form, fact in zip(forms, facts, strict=True)]
        tail, questions, answers = _tail(tokenizer, forms[:needles], facts[:needles])
        room = length - len(prefix) - len(tail) - sum(map(len, written))
        stretch = haystack.stretch(haystack_split or phrasing_split, rng, room) if room > 0 else None
        if stretch is None or stretch.ends[0] > room - max(0, clear - answers[0].start):
            if attempt < 8:
                continue
            raise TooShort(length, length - room + clear)
        text = str(tokenizer.decode(stretch.ids)).lower()
        if not any(value.lower() in text for _, value in facts):
            break
    else:
        raise UserError(f"No answer could be found that a haystack of {length} tokens does not hold already.")

    last = room - max(0, clear - answers[0].start)
    targets = [rng.random() for _ in range(needles - 1)] + [depth]
    targets += [(index + 0.5) / distractors for index in range(distractors)]
    order = [needles - 1, *range(needles - 1), *range(needles, needles + distractors)]
    cuts: dict[int, int] = {}
    for index in order:
        limit = last if index < needles else room
        cuts[index] = _nearest_end(stretch.ends, targets[index] * room, limit, set(cuts.values()))

    pieces, places, position, done = [np.array(prefix, dtype=np.int64)], {}, len(prefix), 0
    for index in sorted(cuts, key=lambda i: (cuts[i], i)):
        pieces += [stretch.ids[done : cuts[index]], np.array(written[index], dtype=np.int64)]
        position += cuts[index] - done
        places[index] = slice(position, position + len(written[index]))
        position, done = places[index].stop, cuts[index]
    pieces += [stretch.ids[done:], np.array(tail, dtype=np.int64)]
    base = length - len(tail)
    answers = [slice(base + part.start, base + part.stop) for part in answers]
    question = slice(base + questions[-1].start, base + questions[-1].stop)
    return Episode(
        input_ids=torch.from_numpy(np.concatenate(pieces)),
        answer=answers[-1],
        needle=places[needles - 1],
        question=question,
        depth=depth,
        kind=kind,
        haystack=haystack.name,
        phrasing=asked[-1],
        answer_text=facts[needles - 1][1],
        split=phrasing_split,
        answers=answers,
        needles=[places[index] for index in range(needles)],
    )


def draw_facts(kind: str, rng: random.Random, count: int, rare: bool = False) -> list[tuple[str, str]]:
    """`count` pairs of a key and a value, all different. `rare`: word values are two words (long texts)."""
    places = [f" of the {side} {place}" for side in SIDES for place in PLACES]
    keys = {"passkey": places, "key_value": WORDS, "sentence": CITIES}[kind]
    values: Sequence[object] = {"passkey": range(10000, 100000), "sentence": range(2100, 10000)}.get(
        kind, WORDS
    )
    if count > len(keys) // 2:
        raise bad_value("episode needles and distractors", count, f"at most {len(keys) // 2} for {kind}")
    chosen = rng.sample(keys, count) if kind != "passkey" or count > 1 else [""]
    if kind != "key_value":
        return [(key, str(value)) for key, value in zip(chosen, rng.sample(values, count), strict=True)]
    free = [word for word in WORDS if word not in chosen]
    if rare:
        return [(key, " ".join(rng.sample(free, 2))) for key in chosen]
    return list(zip(chosen, rng.sample(free, count), strict=True))


def _needle(tokenizer: PreTrainedTokenizerBase, form: Phrasing, fact: tuple[str, str]) -> list[int]:
    key, value = fact
    return tokenizer(" " + form.needle.format(key=key, value=value), add_special_tokens=False)["input_ids"]


def _tail(
    tokenizer: PreTrainedTokenizerBase, forms: Sequence[Phrasing], facts: Sequence[tuple[str, str]]
) -> tuple[list[int], list[slice], list[slice]]:
    """Questions and answers as ids, with their places; a lone space before an answer is the question's."""
    ids: list[int] = []
    questions, answers = [], []
    for form, (key, value) in zip(forms, facts, strict=True):
        start = len(ids)
        opening = "\n\n" if not ids else ".\n\n"
        ids += tokenizer(opening + form.question.format(key=key), add_special_tokens=False)["input_ids"]
        space, answer = answer_ids(tokenizer, value)
        ids += space
        questions.append(slice(start, len(ids)))
        answers.append(slice(len(ids), len(ids) + len(answer)))
        ids += answer
    return ids, questions, answers


def answer_ids(tokenizer: PreTrainedTokenizerBase, value: str) -> tuple[list[int], list[int]]:
    """An answer after a space: the tokens that are space only, which stay the question's, and the rest."""
    ids = tokenizer(" " + value, add_special_tokens=False)["input_ids"]
    first = 0
    while first < len(ids) - 1 and not str(tokenizer.decode(ids[first : first + 1])).strip():
        first += 1
    return ids[:first], ids[first:]


def _prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The beginning-of-text token, for tokenizers that set one."""
    ids = tokenizer("a")["input_ids"]
    return ids[:1] if len(ids) > 1 and ids[0] == tokenizer.bos_token_id else []


def _nearest_end(ends: np.ndarray, target: float, limit: int, taken: set[int]) -> int:
    """The free sentence end nearest `target`, at most `limit`; a taken one where none is free."""
    allowed = [int(end) for end in ends[: bisect_left(ends, limit + 1)]]
    free = [end for end in allowed if end not in taken] or allowed
    return min(free, key=lambda end: abs(end - target))


def _snippet(pool: Pool, rng: random.Random) -> Pool:
    """A piece of some sentences, to be repeated."""
    low, high = SNIPPET_TOKENS
    first = rng.randrange(len(pool.ends))
    start = int(pool.ends[first]) if len(pool.ids) - pool.ends[first] > high else 0
    later = pool.ends[(pool.ends >= start + low) & (pool.ends <= start + high)]
    stop = int(later[rng.randrange(len(later))]) if len(later) else min(len(pool.ids), start + high)
    inside = pool.ends[(pool.ends > start) & (pool.ends < stop)]
    return Pool(pool.ids[start:stop], np.append(inside, stop) - start)


_TERMINAL = re.compile(r".*[.!?][\"')\]”’]*")
_CLOSING = re.compile(r"[\"')\]”’]+")
_OPENING = re.compile(r"[ĠĊ▁\s]+(?![a-z0-9])|<0x0A>")
_ABBREVIATION = re.compile(r"[Ġ▁]?(?:Mr|Mrs|Ms|Dr|St|Messrs|Hon|Gen|Col|Capt|No|[A-Z])")


def pool_of(ids: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> Pool:
    """Find where sentences end: a full stop, then a space and a capital or a new line; not after Mr.

    In text without sentences every border between words serves, and in text without words every token.
    """
    unique, inverse = np.unique(ids, return_inverse=True)
    tokens = [
        token if isinstance(token, str) else "" for token in tokenizer.convert_ids_to_tokens(unique.tolist())
    ]

    def marks(pattern: re.Pattern[str], whole: bool) -> np.ndarray:
        match = pattern.fullmatch if whole else pattern.match
        return np.array([match(token) is not None for token in tokens])[inverse]

    terminal, closing = marks(_TERMINAL, whole=True), marks(_CLOSING, whole=True)
    opening, abbreviation = marks(_OPENING, whole=False), marks(_ABBREVIATION, whole=True)
    terminal[1:] &= ~abbreviation[:-1]
    terminal[1:] |= closing[1:] & terminal[:-1]
    ends = np.flatnonzero(terminal[:-1] & opening[1:]) + 1
    if not len(ends):
        ends = np.flatnonzero(marks(re.compile(r"[ĠĊ▁\s]"), whole=False)[1:]) + 1
    if not len(ends):
        ends = np.arange(1, len(ids))
    return Pool(ids, np.unique(np.append(ends, len(ids))))
