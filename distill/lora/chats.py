"""Conversations out of .jsonl files, in the three forms that are about."""

import glob
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from replace.errors import bad_value
from replace.files import expanded

Message = dict[str, str]
"""{"role": system, user, assistant or tool, "content"}."""

ROLES = ("system", "user", "assistant", "tool")
SHAREGPT = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "assistant": "assistant",
    "tool": "tool",
}
"""Who says it, in ShareGPT's `from`."""

FORMS = (
    'a line of {"messages": [{"role", "content"}]}, of ShareGPT ({"conversations": [{"from", "value"}]}) '
    'or of Alpaca ({"instruction", "input", "output"})'
)


def read_chats(path: str) -> list[list[Message]]:
    """The conversations of a .jsonl file, a folder or a glob of them.

    Raises:
        UserError: there is none, or a line has another form; the sentence names file and line.
    """
    place = expanded(path)
    if place.is_dir():
        files = sorted(place.rglob("*.jsonl"))
    else:
        files = [Path(name) for name in sorted(glob.glob(str(place), recursive=True)) if Path(name).is_file()]
    chats = [chat for file in files for chat in _chats_of(file)]
    if not chats:
        raise bad_value("lora.path", path, f"a .jsonl file, a folder or a glob of them, with {FORMS}")
    return chats


def _chats_of(file: Path) -> Iterator[list[Message]]:
    try:
        # Not `splitlines`, which also cuts at separators that stand inside a text.
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise bad_value("lora.path", str(file), "a file of text in UTF-8 that can be read") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            yield messages_of(json.loads(line))
        except (ValueError, RecursionError) as error:  # the second: brackets without end
            allowed = f"{FORMS} (line {number} of {file.name}: {error})"
            raise bad_value("lora.path", str(file), allowed) from error


def messages_of(row: Any) -> list[Message]:
    """A row of any of the forms as messages.

    Raises:
        ValueError: it has none of them; the words say what is wrong.
    """
    if not isinstance(row, dict):
        raise ValueError("it is no object")
    if "messages" in row:
        messages = _turns(row, "messages", "role", "content", {role: role for role in ROLES})
    elif "conversations" in row:
        messages = _turns(row, "conversations", "from", "value", SHAREGPT)
        if isinstance(row.get("system"), str) and row["system"].strip():
            messages.insert(0, {"role": "system", "content": row["system"].strip()})
    elif "instruction" in row and "output" in row:
        texts = {"instruction": row["instruction"], "input": row.get("input") or "", "output": row["output"]}
        for key, text in texts.items():
            if not isinstance(text, str):
                raise ValueError(f"{key} is no text")
        asked = [texts[key].strip() for key in ("instruction", "input")]
        messages = [
            {"role": "user", "content": "\n\n".join(filter(None, asked))},
            {"role": "assistant", "content": texts["output"].strip()},
        ]
    else:
        raise ValueError(f"its keys are {', '.join(map(str, row)) or 'none'}")
    if not any(message["role"] == "assistant" and message["content"] for message in messages[1:]):
        raise ValueError("no assistant answers anything")
    return messages


def _turns(row: dict[str, Any], key: str, who: str, what: str, roles: dict[str, str]) -> list[Message]:
    """The messages of the list `row[key]`, whose turns have keys for who speaks and for what is said."""
    if not isinstance(row[key], list):
        raise ValueError(f"{key} is no list")
    return [_message(turn, who, what, roles) for turn in row[key]]


def _message(turn: Any, who: str, what: str, roles: dict[str, str]) -> Message:
    if not isinstance(turn, dict) or who not in turn or what not in turn:
        raise ValueError(f"a turn without {who} and {what}")
    if not isinstance(turn[who], str) or turn[who] not in roles:
        raise ValueError(f"{who} is {turn[who]!r} and none of {', '.join(roles)}")
    return {"role": roles[turn[who]], "content": _text(turn[what]).strip()}


def _text(content: Any) -> str:
    """A turn's text, which some write as a list of parts."""
    if isinstance(content, str):
        return content
    parts: list[Any] = content if isinstance(content, list) else [None]
    texts: list[Any] = [
        part.get("text") for part in parts if isinstance(part, dict) and part.get("type") == "text"
    ]
    if len(texts) < len(parts) or not all(isinstance(text, str) for text in texts):
        raise ValueError("a turn that is not text")
    return "".join(texts)
