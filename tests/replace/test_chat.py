"""`python -m replace.chat` says what generate() says of the whole conversation, on a state of one size."""

import io
import os
import pty
import re
import select
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from replace import AttentionConfig, SwapSpec, export_model, swap
from replace import chat as chat_module
from replace.chat import CHATML, CHUNK, Conversation, Sampling, Writing, main
from replace.convert import mixers
from replace.errors import UserError
from replace.tiny import tiny_model, tiny_tokenizer

ROOT = Path(__file__).parents[2]
TURNS = ("What is the pass key?", "Here we go, there and back again. " * 20, "42", "Remember it well.")
GREEDY = Sampling(max_new_tokens=12, temperature=0)
SILENCE = 120
"""Seconds without a word, on a busy machine, after which a chat hangs; its start takes most of them."""
PATIENCE = 10
"""Seconds after which a key is pressed again."""


def a_tokenizer(signs: bool = True):
    """One whose vocabulary has ChatML's signs in the place of two others."""
    tokenizer = tiny_tokenizer()
    if signs:
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return tokenizer


def a_student(family: str = "llama", layers: tuple[int, ...] = (0, 1, 2, 3), dtype=torch.float32):
    tokenizer = a_tokenizer()
    model = tiny_model(family, dtype, vocab_size=len(tokenizer))
    options = AttentionConfig(block=8, window=8, sinks=2, distance_cap=32, pairs=4)
    swap(model, SwapSpec(dict.fromkeys(layers, options)))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for mixer in mixers(model).values():
            for parameter in mixer.parameters():
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        for module in model.modules():  # so that what was read long ago decides about what is said
            if isinstance(module, torch.nn.Linear) and module is not model.get_output_embeddings():
                module.weight *= 4
    return model, tokenizer


class Read:
    """What a model is given to read, token by token, in every forward."""

    def __init__(self, model) -> None:
        self.ids: list[int] = []
        self.longest = 0
        model.register_forward_pre_hook(self.hear, with_kwargs=True)

    def hear(self, model, args, kwargs) -> None:
        self.ids += kwargs["input_ids"][0].tolist()
        self.longest = max(self.longest, kwargs["input_ids"].shape[1])


@pytest.mark.parametrize(
    ("form", "layers"),
    [("chatml", (0, 1, 2, 3)), ("own", (0, 1, 2, 3)), ("plain", (0, 1, 2, 3)), ("chatml", (0, 2))],
)
def test_it_answers_as_generate_does_over_the_whole_conversation(form: str, layers: tuple[int, ...]) -> None:
    model, tokenizer = a_student(layers=layers)
    if form == "own":
        tokenizer.chat_template = CHATML.replace("message.content", "(message.content | trim)")
    reference, _ = a_student(layers=layers)
    read = Read(model)
    conversation = Conversation(model, Writing(tokenizer, form), GREEDY)
    messages, said = [], []
    for turn, text in enumerate(TURNS):
        ends = None
        if turn == 1:  # an answer that ends by itself: at the token that is last to come up
            told = conversation_like(reference, read.ids, conversation, text)
            ends = max(told, key=told.index)
            short = told.index(ends)
            conversation.ends.add(ends)
        answer = list(conversation.answer(text.strip()))
        before = read.ids[: len(read.ids) - len(answer)]
        whole = torch.tensor([before])
        stop = sorted(conversation.ends)
        with torch.no_grad():
            wanted = reference.generate(
                whole, max_new_tokens=GREEDY.max_new_tokens, do_sample=False, eos_token_id=stop
            )[0, whole.shape[1] :].tolist()
        assert answer == [token for token in wanted if token not in conversation.ends]
        said += answer
        if turn == 1:
            assert len(answer) == short > 0
            conversation.ends.discard(ends)
        messages += [
            {"role": "user", "content": text.strip()},
            {"role": "assistant", "content": tokenizer.decode(answer)},
        ]
    assert conversation.read == len(read.ids)
    assert read.longest == CHUNK
    assert len(set(said)) > 5, "a model that says one thing shows nothing"
    if form != "plain":  # what was read is what the template makes of the whole
        told = tokenizer.apply_chat_template(messages, chat_template=CHATML, tokenize=False)
        assert tokenizer.decode(read.ids) == told.removesuffix("<|im_end|>\n")


def conversation_like(reference, ids: list[int], conversation: Conversation, text: str) -> list[int]:
    """What the reference would say to a turn."""
    whole = torch.tensor([[*ids, *conversation.writing.next(text.strip())]])
    with torch.no_grad():
        return reference.generate(whole, max_new_tokens=8, do_sample=False)[0, whole.shape[1] :].tolist()


def test_what_is_kept_does_not_grow() -> None:
    model, tokenizer = a_student()
    conversation = Conversation(model, Writing(tokenizer), GREEDY)
    list(conversation.answer("What is the pass key?"))
    kept, read = conversation.bytes(), conversation.read
    assert kept > 0
    for text in ("Remember it. " * 60, "x", "Here we go. " * 60, "There."):
        list(conversation.answer(text))
        assert conversation.bytes() == kept
    assert conversation.read > 10 * read
    assert len(conversation.pending) <= 1
    conversation.reset()
    assert (conversation.bytes(), conversation.read, conversation.pending) == (0, 0, [])


def test_layers_that_are_not_replaced_are_told_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a chat from a pipe ends with it."""
    model, tokenizer = a_student(layers=(0, 2))
    export_model(model, tokenizer, tmp_path / "model", provenance={"kind": "tiny"})
    monkeypatch.setattr("sys.stdin", io.StringIO("What?\n\n/bytes\n"))
    assert main([f"model={tmp_path / 'model'}", "max_new_tokens=2"]) == 0
    said = capsys.readouterr().out
    assert "(turns as chatml; 2 of 4 attention layers are not replaced, so their cache grows;" in said
    assert "bytes kept)" in said
    monkeypatch.setattr("sys.stdin", io.StringIO("/quit\nWhat?\n"))
    assert main([f"model={tmp_path}"]) == 0
    assert capsys.readouterr().out.count("> ") == 1


@pytest.mark.parametrize("after", [0, 5])
def test_a_stopped_answer_leaves_the_conversation_whole(after: int) -> None:
    """What was said until then is read; the next turn continues behind it."""
    model, tokenizer = a_student()
    reference, _ = a_student()
    read = Read(model)
    said: list[int] = []
    conversation = Conversation(model, Writing(tokenizer), GREEDY, lambda: len(said) > after)
    for token in conversation.answer("What is the pass key? " * 20):
        said.append(token)
    assert len(said) == after + 1
    assert said == conversation_said(reference, read.ids, after)
    conversation.stopped = lambda: False
    answer = list(conversation.answer("Go on."))
    assert tokenizer.decode(said) + "<|im_end|>\n<|im_start|>user\nGo on." in tokenizer.decode(read.ids)
    whole = torch.tensor([read.ids[: len(read.ids) - len(answer)]])
    with torch.no_grad():
        wanted = reference.generate(whole, max_new_tokens=GREEDY.max_new_tokens, do_sample=False)
    assert answer == wanted[0, whole.shape[1] :].tolist()[: len(answer)]


def conversation_said(reference, ids: list[int], after: int) -> list[int]:
    whole = torch.tensor([ids[: len(ids) - after]])
    with torch.no_grad():
        return reference.generate(whole, max_new_tokens=after + 1, do_sample=False)[
            0, whole.shape[1] :
        ].tolist()


def test_a_turn_whose_reading_was_stopped_is_read_with_the_next() -> None:
    model, tokenizer = a_student()
    read = Read(model)
    conversation = Conversation(model, Writing(tokenizer), GREEDY, lambda: True)
    text = "Here we go, there and back again. " * 40
    assert list(conversation.answer(text)) == []
    assert len(read.ids) == CHUNK
    conversation.stopped = lambda: False
    list(conversation.answer("Now."))
    assert f"{text}<|im_end|>\n<|im_start|>assistant\n<|im_end|>\n<|im_start|>user\nNow." in tokenizer.decode(
        read.ids
    )


def test_a_second_press_when_the_answer_has_ended_ends_no_chat(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever presses Ctrl-C twice wants silence, and not the end of the conversation."""

    class Pressed(chat_module._Stream):
        def end(self) -> None:
            super().end()
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(chat_module, "_Stream", Pressed)
    monkeypatch.setattr("sys.stdin", io.StringIO("What?\n/bytes\n"))
    before = signal.getsignal(signal.SIGINT)
    assert main([f"run={run}", "max_new_tokens=2"]) == 0
    assert "bytes kept)" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("later", [False, True], ids=["at the prompt", "between the line and the answer"])
def test_a_press_between_two_answers_is_heard(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, later: bool
) -> None:
    lines = iter(["What?", "/bytes"])

    def pressed(prompt: str) -> str:
        line = next(lines, None)
        if line is None:
            raise EOFError
        if line == "What?" and not later:
            signal.raise_signal(signal.SIGINT)
        return line

    class Pressed(chat_module._Stream):
        def __init__(self, *arguments, **named) -> None:
            super().__init__(*arguments, **named)
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("builtins.input", pressed)
    if later:
        monkeypatch.setattr(chat_module, "_Stream", Pressed)
    assert main([f"run={run}", "max_new_tokens=2"]) == 0
    said = capsys.readouterr().out
    assert ("(stopped)" in said) == later
    assert ("(/quit or Ctrl-D ends the chat)" in said) != later
    assert "bytes kept)" in said


def test_sampling_follows_its_seed() -> None:
    def said(**changes: float) -> list[int]:
        model, tokenizer = a_student()
        sampling = Sampling(max_new_tokens=16, **{"temperature": 1.0, "top_p": 1.0, "seed": 3, **changes})
        return list(Conversation(model, Writing(tokenizer), sampling).answer("What?"))

    assert said() == said()
    assert said() != said(seed=4)
    assert said(top_p=1e-6) == said(temperature=0)


def test_positions_that_are_a_table_come_to_an_end() -> None:
    model, tokenizer = a_student("gpt2")
    conversation = Conversation(model, Writing(tokenizer, "plain"), GREEDY)
    assert conversation.room == 4096
    conversation.room = 60
    list(conversation.answer("What is the pass key?"))
    with pytest.raises(UserError, match="60 positions"):
        list(conversation.answer("What is the pass key? " * 8))
    conversation.reset()
    assert list(conversation.answer("What?"))


def test_the_form_follows_the_tokenizer() -> None:
    assert Writing(a_tokenizer(signs=False)).form == "plain"
    assert Writing(a_tokenizer()).form == "chatml"
    tokenizer = a_tokenizer()
    tokenizer.chat_template = CHATML
    writing = Writing(tokenizer, system="Be brief.")
    assert writing.form == "own"
    assert tokenizer.decode(writing.first("Hi")) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert writing.ends() == {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")}


@pytest.mark.parametrize(
    ("template", "form", "system", "said"),
    [
        (
            None,
            "own",
            None,
            "format='own' is not possible; allowed: auto, chatml, plain, since the tokenizer has no",
        ),
        (None, "plain", "Hi", "system='Hi' is not possible; allowed: nothing beside format=plain"),
        ("{{ raise_exception('no') }}", "auto", None, "format='own'.*chatml, plain.*it fails \\(no\\)"),
        # Of earlier answers only a part is repeated, as thinking is left out by some.
        (CHATML.replace("message.content", "message.content[2:]"), "auto", None, "writes earlier turns anew"),
        (
            "{% if messages[0].role == 'system' %}{{ raise_exception('No system.') }}{% endif %}" + CHATML,
            "auto",
            "Be brief.",
            "it fails \\(No system.\\)",
        ),
    ],
)
def test_a_form_that_cannot_be_is_refused(template: str, form: str, system: str | None, said: str) -> None:
    tokenizer = a_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(UserError, match=said):
        Writing(tokenizer, form, system)


def test_chatml_without_its_signs_is_refused() -> None:
    with pytest.raises(UserError, match="allowed: auto, plain, since the vocabulary has no"):
        Writing(a_tokenizer(signs=False), "chatml")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    model, tokenizer = a_student()
    export_model(model, tokenizer, folder / "model", provenance={"kind": "tiny"})
    return folder


class Terminal:
    """A process behind a pseudo-terminal."""

    def __init__(self, *arguments: str) -> None:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "dumb", "OMP_NUM_THREADS": "1"}
        self.child, self.end = pty.fork()
        if self.child == 0:
            os.execve(sys.executable, [sys.executable, "-m", "replace.chat", *arguments], environment)
        self.text = ""

    def read(self, seconds: float = SILENCE) -> str:
        """What is written next."""
        assert select.select([self.end], [], [], seconds)[0], self.text
        new = os.read(self.end, 1 << 16).decode(errors="replace")
        self.text += new
        return new

    def until(self, wanted: str, after: int = 0) -> str:
        """Everything from `after` on, once it holds `wanted`."""
        while wanted not in self.text[after:]:
            self.read()
        return self.text[after:]

    def type(self, keys: str) -> int:
        """Press keys; returns where the answer to them begins."""
        here = len(self.text)
        os.write(self.end, keys.encode())
        return here

    def say(self, line: str, wanted: str) -> str:
        """Type a line at the prompt; returns what is said until the next prompt, which holds `wanted`."""
        return self.prompted(self.type(line), wanted)

    def interrupt(self, wanted: str) -> str:
        """Press Ctrl-C until it is answered; returns what is said until the next prompt, as `say` does.

        Python shows its prompt and then waits for a key. A signal between the two, where a busy machine may
        let us run, is noted and wakes nothing: once in some 20,000 presses nothing happens before the next
        (`readline_until_enter_or_signal` in CPython's Modules/readline.c). A person presses again.
        """
        here = self.type("\x03")
        for _ in range(SILENCE // PATIENCE):
            while wanted not in self.text[here:] and select.select([self.end], [], [], PATIENCE)[0]:
                self.read()
            if wanted in self.text[here:]:
                break
            self.type("\x03")
        return self.prompted(here, wanted)

    def prompted(self, here: int, wanted: str) -> str:
        """What is said from `here` until the prompt that follows `wanted`."""
        self.until(wanted, here)
        return self.until("\n> ", here + self.text[here:].index(wanted))

    def ended(self, seconds: float = SILENCE) -> int:
        """The exit code; what does not end is killed."""
        deadline = time.monotonic() + seconds
        while (found := os.waitpid(self.child, os.WNOHANG))[0] == 0:
            if time.monotonic() > deadline:
                os.kill(self.child, signal.SIGKILL)
            time.sleep(0.1)
        os.close(self.end)
        return os.waitstatus_to_exitcode(found[1])


def test_a_chat_in_a_terminal(run: Path) -> None:
    terminal = Terminal(f"run={run}", "temperature=0", "max_new_tokens=100000", "format=plain")
    terminal.until("> ")
    for turn in ("What is the pass key?", "There and back again. And again."):
        here = terminal.type(turn + "\n")
        while len(terminal.text) < here + len(turn) + 40:  # words come while the answer is being made
            terminal.read()
        terminal.interrupt("(stopped)\r\n")
        terminal.say("/bytes\n", "bytes kept)")
    shown = re.findall(r"([\d,]+) tokens read, ([\d,]+) bytes", terminal.text)
    ((first, bytes_first), (second, bytes_second)) = shown
    assert int(second.replace(",", "")) > int(first.replace(",", "")) > 8
    assert bytes_first == bytes_second != "0"
    terminal.interrupt("(/quit or Ctrl-D ends the chat)")
    terminal.say("/nothing\n", "(/nothing is no command; there are /reset, /bytes, /quit)")
    terminal.say("/reset\n", "(begun anew)")
    terminal.say("/bytes\n", "(0 tokens read, 0 bytes kept)")
    terminal.type("\x04")
    assert terminal.ended() == 0
    assert "Traceback" not in terminal.text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run"], "argument='run' is not possible; allowed: key=value"),
        (["run=a", "model=b"], "either run=<run folder> or model=<folder or id>"),
        (["temperature=1"], "either run=<run folder> or model=<folder or id>"),
        (["run=a", "fast=true"], "fast='true' is not possible; allowed: the keys run, model,"),
        (["run=a", "run=b"], "run='b' is not possible; allowed: one value"),
        (["run=a", "temperature=-1"], "temperature='-1' is not possible; allowed: 0 or a number above"),
        (["run=a", "temperature=nan"], "temperature='nan' is not possible"),
        (["run=a", "temperature=warm"], "temperature='warm' is not possible; allowed: a number"),
        (["run=a", "top_p=0"], "top_p='0' is not possible; allowed: a share above 0, at most 1"),
        (
            ["run=a", "max_new_tokens=0"],
            "max_new_tokens='0' is not possible; allowed: a whole number of at least 1",
        ),
        (["run=a", "seed=-1"], "seed='-1' is not possible"),
        (
            ["run=a", "format=alpaca"],
            "format='alpaca' is not possible; allowed: one of auto, own, chatml, plain",
        ),
        (["run=/nowhere"], "run='/nowhere' is not possible; allowed: a run's folder that has model/"),
        (["model=/"], "model='/' is not possible; allowed: a folder that has a config.json"),
    ],
)
def test_bad_input_is_one_sentence(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.strip().splitlines()
    assert line.startswith("error: ")
    assert said in line


def test_bare_says_how_to_start(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "python -m replace.chat run=<run folder>" in capsys.readouterr().err
    assert main(["--help"]) == 0
