"""From a conversation to tokens, of which the assistant's turns are learnt."""

from itertools import pairwise

import torch
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from distill.lora.chats import Message
from distill.lora.rows import Encoded
from replace.errors import UserError, bad_value

TEMPLATES = {
    "chatml": (
        "{% for turn in messages %}<|im_start|>{{ turn.role }}\n{{ turn.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "llama3": (
        "{{ bos_token }}{% for turn in messages %}<|start_header_id|>{{ turn.role }}<|end_header_id|>\n\n"
        "{{ turn.content }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    ),
    "plain": (
        "{% for turn in messages %}{{ turn.role | capitalize }}: {{ turn.content }}"
        "{% if turn.role == 'assistant' %}{{ eos_token }}{% endif %}\n\n{% endfor %}"
        "{% if add_generation_prompt %}Assistant:{% endif %}"
    ),
}
"""By name, for a tokenizer that has none of its own. chatml and llama3 need a vocabulary with their marks."""

MARKS = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama3": ("<|start_header_id|>", "<|eot_id|>"),
    "plain": (),
}


def use_template(tokenizer: PreTrainedTokenizerBase, name: str | None) -> str:
    """Have `tokenizer` speak the template `name`; an export then carries it too.

    None keeps its own, or gives it the plain one if it has none, as those of base models.

    Returns:
        what it speaks, in words.

    Raises:
        UserError: no such template, or a vocabulary without the template's marks.
    """
    if name is None and tokenizer.chat_template:
        return "the tokenizer's own"
    if name is None:
        tokenizer.chat_template = TEMPLATES["plain"]
        return "plain, since the tokenizer has none of its own"
    if name not in TEMPLATES:
        raise bad_value("lora.template", name, [*TEMPLATES, "null (the tokenizer's own)"])
    missing = [mark for mark in MARKS[name] if mark not in tokenizer.get_vocab()]
    if missing:
        allowed = f"plain, or null for the tokenizer's own; its vocabulary has no {' and no '.join(missing)}"
        raise bad_value("lora.template", name, allowed)
    tokenizer.chat_template = TEMPLATES[name]
    return name


def encode(tokenizer: PreTrainedTokenizerBase, chat: list[Message]) -> Encoded:
    """The tokens of a conversation; learnt are the assistant's turns with the mark that ends them.

    A turn is found by rendering the conversation up to it. Where the template renders an earlier turn in
    another way once there are later ones (some drop its reasoning), or refuses what is before it, that turn
    is not learnt; nor is one that is the first and answers nobody. Where a token would begin before a turn
    and end in it, turns are tokenised apart, as a prompt is when it is answered.

    Raises:
        UserError: the template refuses the conversation, or no turn can be found in what it makes.
    """
    try:
        text = _render(tokenizer, chat)
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in chat)
        raise UserError(
            f"the chat template of this tokenizer refuses a conversation ({roles}: {error}); leave such ones "
            f"out, or name another template by lora.template ({', '.join(TEMPLATES)})."
        ) from error
    turns = []
    for place, message in enumerate(chat):
        if place == 0 or message["role"] != "assistant" or not message["content"]:
            continue
        try:
            prompt = _render(tokenizer, chat[:place], prompt=True)
            said = _render(tokenizer, chat[: place + 1]).rstrip()
        except TemplateError:
            continue
        if said.startswith(prompt) and text.startswith(said):
            turns.append((len(prompt), len(said)))
    if not turns:
        raise UserError(
            "the chat template of this tokenizer renders no assistant's turn behind its own prompt, so none "
            f"can be learnt; name one by lora.template ({', '.join(TEMPLATES)})."
        )
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    offsets = encoded["offset_mapping"]
    begins = {a for a, _ in offsets} | {len(text)}
    if all(border in begins for turn in turns for border in turn):
        learnt = [any(start <= a < stop for start, stop in turns) for a, _ in offsets]
        return Encoded(torch.tensor(encoded["input_ids"]), torch.tensor(learnt))
    borders = [0, *(border for turn in turns for border in turn), len(text)]
    parts = [tokenizer(text[a:b], add_special_tokens=False)["input_ids"] for a, b in pairwise(borders)]
    ids = [token for part in parts for token in part]
    learnt = [bool(number % 2) for number, part in enumerate(parts) for _ in part]
    return Encoded(torch.tensor(ids), torch.tensor(learnt))


def spans(encoded: Encoded) -> list[list[int]]:
    """The runs of learnt tokens, which are the assistant's turns."""
    edges = torch.nn.functional.pad(encoded.learnt.long(), (1, 1)).diff().nonzero().flatten().tolist()
    return [encoded.ids[a:b].tolist() for a, b in list(pairwise(edges))[::2]]


def _render(tokenizer: PreTrainedTokenizerBase, chat: list[Message], prompt: bool = False) -> str:
    rendered = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt)
    assert isinstance(rendered, str)
    return rendered
