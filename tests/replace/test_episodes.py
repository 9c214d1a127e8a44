"""Recall episodes: exact length, one answer, seams that a tokenizer would make itself, held-out wording."""

import random

import pytest
import torch

from replace.config import DataConfig, ModelConfig
from replace.corpora import Document, load_documents
from replace.episodes import FILLERS, HAYSTACKS, KINDS, SPLITS, haystack, make_episode
from replace.errors import UserError
from replace.loading import load_tokenizer
from replace.phrasings import PHRASINGS

STORY = (
    'Mr. Grey went home early. "Is that you?" his sister asked. Nobody spoke. The rain stopped by noon.\n\n'
    "They walked down to the sea, which was calm. A boat lay on the sand. It had no name. "
)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(ModelConfig(kind="tiny"))


@pytest.fixture(scope="module")
def sources(tokenizer, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LAYER_REPLACE_CACHE", str(cache))
        texts = [Document(split, f"{split.title()} begins. " + STORY * 80, "x", split) for split in SPLITS]
        result = {name: haystack(name, texts, tokenizer) for name in HAYSTACKS}
        for source in result.values():
            for split in SPLITS:
                source.stretch(split, random.Random(0), 10)
        return result


@pytest.mark.parametrize("name", HAYSTACKS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("split", SPLITS)
def test_an_episode_is_what_it_says(tokenizer, sources, name, kind, split):
    rng = random.Random(7)
    for depth in (0.0, 0.5, 1.0):
        episode = make_episode(tokenizer, rng, 512, depth, kind, sources[name], split, clear=96)
        ids = episode.input_ids
        assert ids.shape == (512,)
        assert ids.dtype == torch.int64
        assert episode.answer.stop == 512
        assert tokenizer.decode(ids[episode.answer]).strip() == episode.answer_text
        assert episode.answer.start - episode.needle.stop >= 96
        needle = tokenizer.decode(ids[episode.needle])
        assert needle.startswith(" ")
        assert episode.answer_text in needle
        assert tokenizer.decode(ids[: episode.question.start]).count(episode.answer_text) == 1
        before = tokenizer.decode(ids[: episode.needle.start]).rstrip("\"'")
        assert before[-1] in ".!?"
        assert not before.endswith("Mr.")
        assert tokenizer(tokenizer.decode(ids))["input_ids"][-400:] == ids.tolist()[-400:]


def test_the_same_seed_gives_the_same_episode(tokenizer, sources):
    def draw(seed):
        return make_episode(
            tokenizer, random.Random(seed), 600, 0.3, "sentence", sources["novel"], distractors=3
        )

    assert torch.equal(draw(1).input_ids, draw(1).input_ids)
    assert not torch.equal(draw(1).input_ids, draw(2).input_ids)


def test_depth_moves_the_needle(tokenizer, sources):
    places = [
        make_episode(tokenizer, random.Random(3), 1024, depth, "passkey", sources["filler"]).needle.start
        for depth in (0.0, 0.25, 0.5, 0.75, 1.0)
    ]
    assert places == sorted(places)
    assert places[0] < 60
    assert abs(places[2] - 500) < 60
    assert places[-1] > 900


def test_several_needles_are_all_asked(tokenizer, sources):
    episode = make_episode(
        tokenizer, random.Random(5), 1024, 0.5, "passkey", sources["novel"], needles=3, clear=200
    )
    assert len(episode.answers) == len(episode.needles) == 3
    assert episode.answers[-1] == episode.answer
    for needle, answer in zip(episode.needles, episode.answers, strict=True):
        value = tokenizer.decode(episode.input_ids[answer]).strip()
        assert value in tokenizer.decode(episode.input_ids[needle])
        assert answer.start - needle.stop >= 200


def test_distractors_have_the_same_form_and_other_keys(tokenizer, sources):
    episode = make_episode(
        tokenizer,
        random.Random(5),
        2048,
        0.5,
        "sentence",
        sources["novel"],
        "test",
        distractors=8,
        phrasing=0,
    )
    text = tokenizer.decode(episode.input_ids[: episode.question.start])
    stem = PHRASINGS["sentence"]["test"][0].needle.split("{")[0].strip()
    assert text.count(stem) == 9
    assert text.count(episode.answer_text) == 1


def test_train_and_held_out_share_no_wording():
    for kind, splits in PHRASINGS.items():
        assert len(splits["train"]) >= 10
        assert len(splits["test"]) >= 4
        for part in ("needle", "question"):
            texts = [getattr(form, part) for forms in splits.values() for form in forms]
            assert len(set(texts)) == len(texts), kind
    assert not set(FILLERS["train"]) & set(FILLERS["test"])


def test_held_out_haystacks_come_from_held_out_books():
    documents = load_documents(DataConfig())
    tokenizer = load_tokenizer(ModelConfig())
    source = haystack("novel", documents, tokenizer)
    proust = " ".join(next(d.text for d in documents if d.name == "Swann's Way").split())
    text = " ".join(tokenizer.decode(source.stretch("test", random.Random(1), 300).ids).split())
    assert text[5:] in proust


def test_a_long_haystack_is_made_of_a_short_text(tokenizer, sources):
    episode = make_episode(tokenizer, random.Random(1), 20000, 0.5, "key_value", sources["novel"])
    assert len(episode.input_ids) == 20000


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"length": 20}, "episode length=20"),
        ({"length": 200, "clear": 300}, "episode length=200"),
        ({"kind": "riddle"}, "episode kind='riddle'"),
        ({"phrasing_split": "all"}, "episode phrasing_split='all'"),
        ({"distractors": 500}, "episode needles and distractors"),
    ],
)
def test_bad_requests_name_the_value(tokenizer, sources, options, words):
    given = {"length": 512, "depth": 0.5, "kind": "passkey", "haystack": sources["filler"], **options}
    with pytest.raises(UserError, match=words):
        make_episode(tokenizer, random.Random(0), **given)


def test_an_unknown_haystack_names_the_value(tokenizer):
    with pytest.raises(UserError, match="haystack='hay'"):
        haystack("hay", [], tokenizer)
