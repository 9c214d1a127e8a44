"""Measurements made before, found by everything they follow from: a rerun computes only what is missing.

Within `keeping(store, model)` every function marked `@kept` first looks for its result under a hash of the
model's weights, config and code, of what is switched off in it, of the function's own code and arguments
(texts and episodes by their content), of precision, device and versions. Nothing is looked up by a name or a
date, and nothing is unpickled: a result is JSON, written as soon as it is there. Outside of `keeping`, or for
another model than the one given there, a marked function is itself.
"""

import ast
import functools
import hashlib
import inspect
import json
import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, fields, is_dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from eval.metrics import clean
from replace.config import Config
from replace.corpora import Document
from replace.files import atomic_write, expanded
from replace.loading import cache_dir

logger = logging.getLogger(__name__)

Function = TypeVar("Function", bound=Callable[..., Any])

ROOT = Path(__file__).resolve().parent.parent
MODEL_CODE = ("replace", "kernels")
"""Rooms whose code is the model's: a change there may change any figure."""
FOLLOWED = ("eval", "distill")
"""Rooms of which only the code that a measurement imports counts."""
SHOWN_ONLY = ("bar", "label")
"""Arguments that change what is shown and no figure."""


class Unknown(Exception):
    """A function was given something whose content cannot be hashed, so its result cannot be kept."""


class Store:
    """Results in files named after the hash of what they follow from.

    Attributes:
        read: whether results are looked up; they are always written.
        about: hashes of all text that episodes may be made of, and what else says of which items figures are.
        subject: the model that is measured now.
        taken, made: names of the measurements that were found, and of those that were made anew.
    """

    def __init__(self, folder: Path | None = None, *, read: bool = True) -> None:
        self.folder = folder or cache_dir() / "measured"
        self.read = read
        self.about: dict = {}
        self.subject: nn.Module | None = None
        self.taken: list[str] = []
        self.made: list[str] = []
        self._weights: str | None = None

    def of(self, model: nn.Module) -> dict:
        """What every figure of the model depends on. Its weights are hashed once for each subject."""
        if self._weights is None:
            self._weights = _hash(_parts(model.state_dict()))
        return {"weights": self._weights, **identity(model)}

    def load(self, key: dict) -> Any:
        """The result of `key`; None if there is none that can be read, or nothing is to be looked up."""
        if not self.read:
            return None
        try:
            return json.loads(self._file(key).read_text(encoding="utf-8"))["value"]
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def save(self, key: dict, value: Any) -> None:
        """Keep a result; a cache folder that cannot be written costs a warning, not the result."""
        entry = json.dumps({"key": key, "value": value}, allow_nan=False)
        try:
            atomic_write(self._file(key), entry)
        except OSError as error:
            logger.warning("a result is not kept: %s cannot be written (%s)", self.folder, error.strerror)

    def _file(self, key: dict) -> Path:
        return self.folder / f"{_hash([json.dumps(key, sort_keys=True)])}.json"


_store: ContextVar[Store | None] = ContextVar("store", default=None)


@contextmanager
def keeping(store: Store, model: nn.Module, about: dict) -> Iterator[None]:
    """Within the block figures of `model` are looked up in and written to the store.

    Its weights must not change meanwhile.

    Args:
        about: from `items_of`.
    """
    token = _store.set(store)
    store.subject, store.about, store._weights = model, about, None
    try:
        yield
    finally:
        store.subject = None
        _store.reset(token)


def kept(function: Function) -> Function:
    """Mark a measurement whose first argument is the model and whose result JSON can hold."""

    @functools.wraps(function)
    def stored(model: nn.Module, *arguments: Any, **keywords: Any) -> Any:
        store = _store.get()
        if store is None or model is not store.subject:
            return function(model, *arguments, **keywords)
        given = inspect.signature(function).bind(model, *arguments, **keywords)
        given.apply_defaults()
        known = [name for name in given.arguments if name not in SHOWN_ONLY][1:]
        name = getattr(function, "__name__", str(function))
        try:
            options = {name: content(given.arguments[name]) for name in known}
        except Unknown as what:
            logger.debug("%s is not kept: %s cannot be hashed", name, what)
            return function(model, *arguments, **keywords)
        key = {"measurement": name, "code": code_hash(function.__module__), "options": options}
        if any(isinstance(argument, Config) for argument in given.arguments.values()):
            key["about"] = store.about  # such a measurement makes its own items
        key = clean(key | store.of(model))
        value = store.load(key)
        if value is not None:
            store.taken.append(name)
            return value
        start = time.perf_counter()
        value = clean(function(model, *arguments, **keywords))
        logger.debug("%s took %.2f s", name, time.perf_counter() - start)
        store.save(key, value)
        store.made.append(name)
        return value

    return stored  # type: ignore[return-value]  # of the same signature


def identity(model: nn.Module) -> dict:
    """What figures of a model depend on besides its weights: config, code, arithmetic, what is off."""
    device = next(model.parameters()).device
    config: Any = model.config
    named = ("_name_or_path", "transformers_version")
    options = {key: value for key, value in config.to_dict().items() if key not in named}
    conversion = getattr(model, "layer_replace", None)
    classes = sorted({type(module).__module__ for module in model.modules()})
    own = [name for name in classes if name.partition(".")[0] not in ("torch", "transformers", *MODEL_CODE)]
    autocast = torch.is_autocast_enabled(device.type)
    return {
        "config": _hash([json.dumps(options, sort_keys=True, default=str)]),
        "attention": str(getattr(config, "_attn_implementation", None)),
        "replaced": None if conversion is None else content(conversion.spec.to_json()),
        "off": [sorted(off) for module in model.modules() if isinstance(off := _off(module), frozenset)],
        "classes": _hash(_sources(own)),
        "arithmetic": str(torch.get_autocast_dtype(device.type)) if autocast else None,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "versions": [metadata.version(name) for name in ("torch", "transformers")],
    }


def content(value: Any) -> Any:
    """A value as JSON holds it; what is large, a text, a tensor, a vocabulary, by its hash.

    Raises:
        Unknown: it is of no kind whose content is known, a function for instance.
    """
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        return value if len(value) < 200 else _hash([value])
    if isinstance(value, Path):
        return _hash(_contents(value))
    if isinstance(value, Tensor):
        return _hash(_parts({"": value}))
    if isinstance(value, slice | range):
        return [value.start, value.stop, value.step]
    if isinstance(value, PreTrainedTokenizerBase):
        return vocabulary_hash(value)
    if isinstance(value, Config):
        return options_of(value)
    if isinstance(value, dict):
        return {str(key): content(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        items = [content(item) for item in (value if isinstance(value, list | tuple) else sorted(value))]
        return items if len(items) < 50 else _hash([json.dumps(items, sort_keys=True)])
    if is_dataclass(value) and not isinstance(value, type):
        # A field that only says how items are made does not count; the items do, where they are measured.
        shown = [field for field in fields(value) if not callable(getattr(value, field.name))]
        return {field.name: content(getattr(value, field.name)) for field in shown}
    raise Unknown(type(value).__name__)


def options_of(config: Config) -> dict:
    """What of a config a measurement may depend on besides the model and the text.

    Where an option of `eval` names a file or a folder, what is in it counts.
    """
    wanted = {key: value for key, value in asdict(config.eval).items() if key not in ("name", "base", "more")}
    return {
        "eval": wanted,
        "files": {str(path): content(path) for path in _paths(wanted)},
        "budget": asdict(config.budget.eval),
        "attention": asdict(config.attention),
        "data": asdict(config.data),
        "teacher": asdict(config.model),
    }


def vocabulary_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Of the tokens, their numbers, and how text is put together from them."""
    fast = getattr(tokenizer, "backend_tokenizer", None)
    merging = None if fast is None else json.loads(fast.to_str())["model"]
    return _hash([json.dumps([sorted(tokenizer.get_vocab().items()), merging], sort_keys=True)])


def items_of(documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, clear: int) -> dict:
    """Which windows and episodes an evaluation measures: two with the same dict measure the same ones.

    Args:
        clear: least tokens between a needle and the answer.
    """
    texts = [part for document in documents for part in (document.name, document.split, document.text)]
    return {"data": _hash(texts), "vocabulary": vocabulary_hash(tokenizer), "clear": clear}


@functools.cache
def code_hash(module: str) -> str:
    """Of the source of a module, of what it imports of `FOLLOWED` but this file, and of the model's rooms."""
    files = {path for room in MODEL_CODE for path in (ROOT / room).rglob("*.py")}
    waiting = [module]
    while waiting:
        path = _file_of(waiting.pop())
        if path is not None and path not in files:
            files.add(path)
            waiting += _imports(path)
    return _hash(part for path in sorted(files) for part in (path.name, path.read_bytes()))


def _off(module: nn.Module) -> object:
    """What is switched off in a mixer, see `eval.ablation`."""
    return getattr(module, "off", None)


def _file_of(module: str) -> Path | None:
    """The source of a module of `FOLLOWED`, or of a loaded one outside of the project; else None."""
    top = module.partition(".")[0]
    if top in FOLLOWED:
        place = ROOT.joinpath(*module.split("."))
        return next(filter(Path.is_file, (place.with_suffix(".py"), place / "__init__.py")), None)
    loaded: ModuleType | None = None if top in MODEL_CODE else sys.modules.get(module)
    file = getattr(loaded, "__file__", None)
    return Path(file) if file and Path(file).is_file() else None


def _imports(path: Path) -> Iterator[str]:
    """The modules of `FOLLOWED` that a file imports."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in FOLLOWED:
            if node.module == __name__:
                continue
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _sources(modules: Iterable[str]) -> Iterator[bytes]:
    for name in modules:
        file = getattr(sys.modules.get(name), "__file__", None)
        if file and Path(file).is_file():
            yield Path(file).read_bytes()


def _paths(options: Any) -> Iterator[Path]:
    """The files and folders that options name, told from words by a dot or a slash."""
    if isinstance(options, dict | list):
        for item in options.values() if isinstance(options, dict) else options:
            yield from _paths(item)
    elif isinstance(options, str) and ("." in options or "/" in options):
        path = expanded(options)
        if path.exists():
            yield path


def _contents(path: Path) -> Iterator[str | bytes]:
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            yield str(file.relative_to(path))
            yield file.read_bytes()


def _parts(tensors: dict[str, Tensor]) -> Iterator[str | memoryview]:
    for name, tensor in tensors.items():
        yield f"{name} {tensor.dtype} {tuple(tensor.shape)}"
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        yield flat.view(torch.uint8).numpy().data


def _hash(parts: Iterable[str | bytes | memoryview]) -> str:
    """SHA-256 of parts, each preceded by its length, so that no two lists of parts look alike."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(f"{len(data)}:".encode())
        digest.update(data)
    return digest.hexdigest()
