"""`python -m replace.chat run=<folder>`: talk to a student in the terminal, with a memory that does not grow.

Nothing is kept of the conversation but the cache: a turn is read as a continued forward on it, and so is the
answer, token by token. How a turn is written down comes from the tokenizer's chat template, of which only the
part that a turn adds is read; without a template it is ChatML, where the vocabulary has its signs, and else
plain text that the model continues.
"""

import logging
import math
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from replace.files import expanded
from replace.interrupt import CODE, end_quietly
from replace.launch import refuse_several

if __name__ == "__main__":
    end_quietly()  # the imports below take seconds

import torch
from jinja2 import TemplateError
from transformers import (
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TextStreamer,
    TopPLogitsWarper,
)
from transformers.cache_utils import DynamicCache
from transformers.utils import logging as transformers_logging

from replace.cache import state_bytes
from replace.config import ModelConfig
from replace.convert import attention_layers, mixers
from replace.errors import UserError, bad_value
from replace.export.load import load
from replace.layer import ReplacedAttention
from replace.loading import load_model
from replace.machine import device_of_choice

USAGE = """\
python -m replace.chat run=<run folder>    talk to the student of a run
python -m replace.chat model=<folder>      to an exported folder, any other model's folder or a hub id
    max_new_tokens=<n>     at most so many tokens an answer; by default 512
    temperature=<t>        0 takes the likeliest token each time; by default 0.7
    top_p=<p>              sample from the likeliest tokens that have this share; by default 0.9
    seed=<n>               of the sampling; by default 0
    format=auto|own|chatml|plain
                           how a turn is written: by the tokenizer's template, as ChatML, or as plain text
    system=<text>          what the model is told first
In the chat: /reset begins anew, /bytes shows what is kept, /quit or Ctrl-D ends; Ctrl-C stops an answer.
"""
KEYS = ("run", "model", "max_new_tokens", "temperature", "top_p", "seed", "format", "system", "verbose")
FORMATS = ("auto", "own", "chatml", "plain")
COMMANDS = ("/reset", "/bytes", "/quit")
PROMPT = "> "
CHUNK = 128
"""Tokens of a turn that are read at once: what that takes beside the state is bounded by it."""
START, END = "<|im_start|>", "<|im_end|>"
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARK = "layer-replace-7f3a"
"""Stands for an answer, to find where one begins and ends in a template; no template has it."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn."""

    max_new_tokens: int = 512
    temperature: float = 0.7
    top_p: float = 0.9
    seed: int = 0


class Writing:
    """How turns are written down: as text that continues what was read before."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, form: str = "auto", system: str | None = None
    ) -> None:
        """form: one of `FORMATS`; system: what the model is told first.

        Raises:
            UserError: the tokenizer has not what the form needs, or its template cannot be continued.
        """
        self.tokenizer, self.system = tokenizer, system
        known = tokenizer.get_vocab()
        signs = START in known and END in known
        if form == "auto":
            form = "own" if tokenizer.chat_template else "chatml" if signs else "plain"
        if form == "own" and not tokenizer.chat_template:
            allowed = "chatml, plain" if signs else "plain"
            raise bad_value("format", form, f"auto, {allowed}, since the tokenizer has no chat template")
        if form == "chatml" and not signs:
            raise bad_value("format", form, f"auto, plain, since the vocabulary has no {START} and {END}")
        if form == "plain" and system is not None:
            raise bad_value("system", system, "nothing beside format=plain, which has no roles")
        self.form = form
        self.template = None if form == "plain" else CHATML if form == "chatml" else tokenizer.chat_template
        # What closes an answer, and what stands before the user's words of a later turn.
        self.closing = "" if form == "plain" else self._closing()

    def first(self, text: str) -> list[int]:
        """The tokens of the first turn, up to where the answer begins."""
        if self.form == "plain":
            return self.tokenizer(text)["input_ids"]
        told = [] if self.system is None else [{"role": "system", "content": self.system}]
        return self._tokens(self._render([*told, {"role": "user", "content": text}], prompt=True))

    def next(self, text: str) -> list[int]:
        """The tokens that end the answer before and bring a later turn, up to where its answer begins."""
        if self.form == "plain":
            return self._tokens("\n" + text)
        before = [{"role": "user", "content": MARK}, {"role": "assistant", "content": MARK}]
        whole = self._render([*before, {"role": "user", "content": text}], prompt=True)
        # After the mark of the answer; the user's own words cannot be taken for it, since they come later.
        place = whole.index(MARK, whole.index(MARK) + len(MARK)) + len(MARK)
        return self._tokens(whole[place:])

    def ends(self) -> set[int]:
        """The tokens that end an answer."""
        ends = {self.tokenizer.eos_token_id} if self.tokenizer.eos_token_id is not None else set()
        tokens = self._tokens(self.closing)
        return ends | ({tokens[0]} if tokens and tokens[0] in self.tokenizer.all_special_ids else set())

    def _closing(self) -> str:
        """What the template writes behind an answer.

        Raises:
            UserError: the template fails, or writes an answer otherwise than it stands.
        """
        before = [{"role": "user", "content": MARK}, {"role": "assistant", "content": MARK}]
        try:
            self.first("x")
            closed = self._render(before, prompt=False)
            more = self._render([*before, {"role": "user", "content": "x"}], prompt=True)
        except TemplateError as error:
            raise self._unfit(f"it fails ({' '.join(str(error).split())})") from error
        if closed.count(MARK) != 2 or more.count(MARK) != 2 or not more.startswith(closed.rstrip()):
            raise self._unfit("it writes earlier turns anew when a later one comes")
        return closed[closed.rindex(MARK) + len(MARK) :]

    def _unfit(self, why: str) -> UserError:
        others = "chatml, plain" if START in self.tokenizer.get_vocab() else "plain"
        allowed = f"{others}, since a memory reads each turn once, and of the tokenizer's template {why}"
        return bad_value("format", self.form, allowed)

    def _render(self, messages: Sequence[dict[str, str]], *, prompt: bool) -> str:
        rendered = self.tokenizer.apply_chat_template(
            list(messages), chat_template=self.template, tokenize=False, add_generation_prompt=prompt
        )
        assert isinstance(rendered, str)
        return rendered

    def _tokens(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]


@dataclass
class Conversation:
    """The model with what it keeps of a conversation: the cache, and tokens that it has yet to read.

    Attributes:
        pending: the last drawn token, or what an interrupted reading left.
        read: tokens in the cache.
        stopped: asked between two forwards, since one that is broken off would leave layers at odds.
    """

    model: PreTrainedModel
    writing: Writing
    sampling: Sampling
    stopped: Callable[[], bool] = lambda: False
    cache: DynamicCache = field(init=False)
    pending: list[int] = field(default_factory=list)
    read: int = 0
    began: bool = False

    def __post_init__(self) -> None:
        self.generator = torch.Generator(self.model.device).manual_seed(self.sampling.seed)
        self.warpers: Any = LogitsProcessorList()
        if self.sampling.temperature > 0:
            self.warpers.append(TemperatureLogitsWarper(self.sampling.temperature))
            self.warpers.append(TopPLogitsWarper(self.sampling.top_p))
        made: Any = self.model.generation_config.eos_token_id if self.model.generation_config else None
        self.ends = self.writing.ends() | set(
            made if isinstance(made, list) else [] if made is None else [made]
        )
        mixed = mixers(self.model).values()
        # Where positions are rotations there is always another; where they are a table it ends.
        rotated = any(getattr(mixer, "rotary", None) is not None for mixer in mixed)
        text = self.model.config.get_text_config(decoder=True)
        self.room = None if rotated else getattr(text, "max_position_embeddings", None)
        self.reset()

    def reset(self) -> None:
        """Forget everything; sampling goes on."""
        self.cache = DynamicCache(config=self.model.config)
        self.pending, self.read, self.began = [], 0, False

    def bytes(self) -> int:
        """Bytes of everything that is kept."""
        return state_bytes(self.cache)

    @torch.no_grad()
    def answer(self, text: str) -> Iterator[int]:
        """Read a turn and yield the tokens of the answer; when it ends or is stopped, the turn is over."""
        new = self.writing.next(text) if self.began else self.writing.first(text)
        self.began = True
        self.pending += new
        logits = self._read()
        for _ in range(self.sampling.max_new_tokens):
            if logits is None:
                return
            token = self._draw(logits)
            if token in self.ends:
                return  # unread: the turn after it begins with what closes this one
            self.pending.append(token)
            yield token
            logits = None if self.stopped() else self._read()

    def _read(self) -> torch.Tensor | None:
        """Let the model read what is pending; `[1, V]` logits of what follows, or None if it was stopped."""
        logits = None
        while self.pending:
            if logits is not None and self.stopped():
                return None
            ids = torch.tensor([self.pending[:CHUNK]], device=self.model.device)
            if self.room is not None and self.read + ids.shape[1] > self.room:
                raise UserError(
                    f"the model has {self.room} positions, and they are used up; /reset begins anew."
                )
            logits = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True).logits[:, -1]
            del self.pending[:CHUNK]
            self.read += ids.shape[1]
        return logits

    def _draw(self, logits: torch.Tensor) -> int:
        if self.sampling.temperature == 0:
            return int(logits.argmax(-1))
        scores = self.warpers(torch.empty(1, 0, dtype=torch.long), logits.float())
        return int(torch.multinomial(scores.softmax(-1), 1, generator=self.generator))


class _Stream(TextStreamer):
    """Writes an answer as words are complete."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        sys.stdout.write(text + ("\n" if stream_end else ""))
        sys.stdout.flush()


class _Stop:
    """Whether Ctrl-C was pressed since the last prompt; while a line is awaited it interrupts that."""

    def __init__(self) -> None:
        self.pressed = self.waiting = False

    def __call__(self) -> bool:
        return self.pressed

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within the block Ctrl-C ends an answer or a line, not the program."""
        before = signal.signal(signal.SIGINT, self._press)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def line(self) -> str:
        """The next line of the terminal.

        Raises:
            EOFError: there is none.
            KeyboardInterrupt: Ctrl-C was pressed instead, once however often.
        """
        self.pressed, self.waiting = False, True
        try:
            return input(PROMPT)
        finally:
            self.waiting = False

    def _press(self, *_: object) -> None:
        if self.waiting:
            self.waiting = False  # before it raises: no second press breaks into what handles the first
            raise KeyboardInterrupt
        self.pressed = True


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit code is 0, or 2 after a mistake that one sentence on stderr explains."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help", "help=true"):
        (sys.stdout if given else sys.stderr).write(USAGE)
        return 0 if given else 2
    try:
        refuse_several("replace.chat")
        options = parse(given)
        sampling = sampling_of(options)
        for noisy in ("transformers", "replace"):
            logging.getLogger(noisy).setLevel(logging.ERROR)
        transformers_logging.disable_progress_bar()
        model, tokenizer = _loaded(options)
        stop = _Stop()
        writing = Writing(tokenizer, options.get("format", "auto"), options.get("system"))
        conversation = Conversation(model, writing, sampling, stop)
        with stop.listening():
            chat(conversation, stop)
    except (UserError, OSError) as error:
        if "verbose=true" in given:
            raise
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("error: interrupted before the chat began.\n")
        return CODE
    return 0


def chat(conversation: Conversation, stop: _Stop) -> None:
    """Read turns from the terminal (or a pipe) until it ends."""
    with suppress(ImportError):  # editing of lines, where Python has it
        import readline  # noqa: F401
    sys.stdout.write(_greeting(conversation))
    while True:
        try:
            line = stop.line().strip()
        except EOFError:
            sys.stdout.write("\n")
            return
        except KeyboardInterrupt:
            sys.stdout.write("\n(/quit or Ctrl-D ends the chat)\n")
            continue
        if line == "/quit":
            return
        if line == "/reset":
            conversation.reset()
            sys.stdout.write("(begun anew)\n")
        elif line == "/bytes":
            sys.stdout.write(f"({conversation.read:,} tokens read, {conversation.bytes():,} bytes kept)\n")
        elif line.startswith("/") and " " not in line:
            sys.stdout.write(f"({line} is no command; there are {', '.join(COMMANDS)})\n")
        elif line:
            _say(conversation, line, stop)


def _say(conversation: Conversation, line: str, stop: _Stop) -> None:
    """Answer a line on the screen; what is refused stands there too, in brackets."""
    stream = _Stream(conversation.writing.tokenizer, skip_special_tokens=True)  # type: ignore[arg-type]
    said = ""
    try:
        for token in conversation.answer(line):
            stream.put(torch.tensor([token]))
    except UserError as error:
        said = f"({error})\n"
    stream.end()
    sys.stdout.write(said or ("(stopped)\n" if stop.pressed else ""))
    sys.stdout.flush()


def _greeting(conversation: Conversation) -> str:
    """What is talked to, and whether its memory grows."""
    layers = [module for _, module in attention_layers(conversation.model)]
    kept = sum(not isinstance(module, ReplacedAttention) for module in layers)
    growing = (
        f"; {kept} of {len(layers)} attention layers are not replaced, so their cache grows" if kept else ""
    )
    return f"(turns as {conversation.writing.form}{growing}; /reset, /bytes, /quit)\n"


def parse(arguments: Sequence[str]) -> dict[str, str]:
    """key=value arguments.

    Raises:
        UserError: one is not key=value, or its key is unknown or given twice, or its value is not possible.
    """
    options: dict[str, str] = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or not value:
            raise bad_value("argument", argument, "key=value, such as run=<run folder> or temperature=0")
        if key not in KEYS:
            raise bad_value(key, value, f"the keys {', '.join(KEYS)}")
        if key in options:
            raise bad_value(key, value, "one value")
        options[key] = value
    if ("run" in options) == ("model" in options):
        raise bad_value("run", options.get("run"), "either run=<run folder> or model=<folder or id>")
    if options.get("format", "auto") not in FORMATS:
        raise bad_value("format", options["format"], FORMATS)
    if options.get("verbose", "true") not in ("true", "false"):
        raise bad_value("verbose", options["verbose"], ("true", "false"))
    return options


def sampling_of(options: dict[str, str]) -> Sampling:
    """How answers are drawn.

    Raises:
        UserError: a value is not possible.
    """
    default = Sampling()
    sampling = Sampling(
        max_new_tokens=_whole(options, "max_new_tokens", default.max_new_tokens, least=1),
        temperature=_number(options, "temperature", default.temperature),
        top_p=_number(options, "top_p", default.top_p),
        seed=_whole(options, "seed", default.seed, least=0),
    )
    if not 0 <= sampling.temperature < math.inf:
        raise bad_value("temperature", options["temperature"], "0 or a number above")
    if not 0 < sampling.top_p <= 1:
        raise bad_value("top_p", options["top_p"], "a share above 0, at most 1")
    return sampling


def _whole(options: dict[str, str], key: str, default: int, *, least: int) -> int:
    value = options.get(key, str(default))
    if not value.isdecimal() or not least <= int(value) < 2**63:
        raise bad_value(key, value, f"a whole number of at least {least}")
    return int(value)


def _number(options: dict[str, str], key: str, default: float) -> float:
    try:
        return float(options.get(key, default))
    except ValueError as error:
        raise bad_value(key, options[key], "a number") from error


def _loaded(options: dict[str, str]) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer, on the device of choice; of an export no code of its folder runs."""
    if "run" in options:
        model, tokenizer = load(options["run"])
    else:
        folder = expanded(options["model"])
        model, tokenizer = load(folder) if _is_export(folder) else _plain(options["model"])
    model.to(device_of_choice())  # type: ignore[arg-type]  # transformers' decorated `to`
    return model.eval(), tokenizer


def _plain(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model that is no export; a refusal names this command's key instead of those of a run."""
    if name in ("smollm2", "tiny"):
        kind = ModelConfig(kind=name)
    elif expanded(name).exists():
        kind = ModelConfig(kind="local", path=name)
    else:
        kind = ModelConfig(kind="hf", id=name)
    try:
        loaded = load_model(kind)
    except UserError as error:
        raise UserError(re.sub(r"model\.(path|id)=", "model=", str(error))) from error
    return loaded.model, loaded.tokenizer


def _is_export(folder: Path) -> bool:
    """Whether a folder is of this project's making."""
    place = folder / "model" if (folder / "model" / "config.json").is_file() else folder
    file = place / "config.json"
    return file.is_file() and '"replacement"' in file.read_text(encoding="utf-8", errors="replace")


if __name__ == "__main__":
    sys.exit(main())
