"""From a command line to a `Config`, and from Hydra's errors to one sentence.

Hydra judges; `explain` says in one sentence what was refused: the field, the value, what is allowed.
"""

import copy
import dataclasses
import functools
import json
import logging
import re
import types
import typing
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, ValueType
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from replace.config import Config
from replace.errors import UserError, bad_value

log = logging.getLogger(__name__)

# Beside this package in a checkout and in an installed wheel alike. Not `import conf`: a folder `conf` in the
# user's working directory would be found first.
CONF = Path(__file__).resolve().parent.parent / "conf"
SWEEPS, LAUNCHES = "sweep", "accelerate"
"""The folders of W&B's sweep files and of accelerate's configs, which are no options of a run."""
GROUPS = tuple(
    sorted(d.name for d in CONF.iterdir() if any(d.glob("*.yaml")) and d.name not in (SWEEPS, LAUNCHES))
)

OWN = "attention.own."
"""What the keys begin with that only a variant knows."""

_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a word", type(None): "null"}


@functools.cache
def _schema() -> DictConfig:
    """A config of nothing but defaults, for who copies it: it takes longer to make than to copy."""
    return OmegaConf.structured(Config)


@functools.cache
def register() -> None:
    """Give Hydra the dataclasses as the schema of conf/config.yaml. May be called more than once."""
    ConfigStore.instance().store(name="schema", node=Config)


def normalise(arguments: Sequence[str]) -> list[str]:
    """The command line as Hydra takes it.

    `from=` becomes `source=` (a keyword cannot be a field), `exp=` becomes `+exp=`, and `attention.own.x=`
    becomes `++attention.own.x=`, because the file of a variant need not name all options of its own.
    """
    renamed = [re.sub(r"^\+*from=", "source=", argument) for argument in arguments]
    renamed = [re.sub(r"^exp=", "+exp=", argument) for argument in renamed]
    return [re.sub(rf"^\+*({re.escape(OWN)})", r"++\1", argument) for argument in renamed]


def compose(overrides: Sequence[str]) -> Config:
    """Compose `conf/` with the overrides of a command line.

    Raises:
        UserError: an override was refused.
    """
    register()
    overrides = normalise(overrides)
    refuse_unknown(overrides)
    for override in parse(overrides):
        if override.is_sweep_override():
            raise bad_value(
                override.key_or_group, override.get_value_string(), "one value, or several with --multirun"
            )
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            return typed(hydra_compose("config", overrides=list(overrides)))
    except (HydraException, OmegaConfBaseException) as error:
        raise explain(error, overrides) from error


def typed(config: DictConfig) -> Config:
    """The composed config as plain dataclasses."""
    result = OmegaConf.to_object(config)
    assert isinstance(result, Config)
    return result


ALWAYS = ("model", "attention", "layers", "data", "stage", "budget", "eval", "stages", "seed")
"""What every run's config.json has had from the first version on."""


def load_config(run: Path, field: str) -> Config:
    """The config of an earlier run from `<run>/config.json`; `field` is the key that named it.

    A field that came later has its default, which is what runs did before there was the field.

    Raises:
        UserError: it is no run's, or of a later version.
    """
    file = run / "config.json"
    if not file.is_file():
        raise bad_value(field, str(run), "the folder of a run, which holds a config.json")
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        lacking = _lacking(Config, stored)
        foreign = [name for name in ALWAYS if name in lacking]
        words = f"{', '.join(lacking[:6])}{f' and {len(lacking) - 6} more' if len(lacking) > 6 else ''}"
        if foreign:
            raise bad_value(field, str(run), f"the folder of a run; its {file.name} lacks {words}")
        if lacking:
            log.warning("%s is of an older version; what it lacks has its default: %s", file, words)
        merged = OmegaConf.merge(_schema(), stored)  # into a copy
        return typed(merged)  # type: ignore[arg-type]  # a DictConfig
    except (OSError, ValueError, OmegaConfBaseException) as error:
        raise bad_value(
            field, str(run), f"a run of this version; {file.name} does not fit: {_flat(error)}"
        ) from error


def _lacking(kind: type, stored: object, prefix: str = "") -> list[str]:
    """The dotted fields of the dataclass `kind` that a stored config does not have."""
    if not isinstance(stored, dict):
        return []  # merging refuses it
    found = []
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        key = f"{prefix}{field.name}"
        if field.name not in stored:
            found.append(key)
        elif dataclasses.is_dataclass(hints[field.name]):
            found += _lacking(hints[field.name], stored[field.name], f"{key}.")
    return found


def overridden(config: Config, overrides: Sequence[str]) -> Config:
    """A config with single values replaced, checked as those of a command line are.

    Raises:
        UserError: an override was refused.
    """
    refuse_unknown(overrides)
    node = OmegaConf.structured(config)
    for override in parse(overrides):
        if override.is_sweep_override():
            raise bad_value(override.key_or_group, override.get_value_string(), "one value")
        OmegaConf.update(node, override.key_or_group, override.value())
    return typed(node)


def parse(overrides: Sequence[str]) -> list[Override]:
    """Hydra's own reading of the overrides.

    Raises:
        UserError: one of them is not of the form key=value.
    """
    parsed = []
    for override in overrides:
        try:
            parsed += OverridesParser.create().parse_overrides([override])
        except (HydraException, OmegaConfBaseException) as error:
            raise explain(error, overrides) from error
    return parsed


def refuse_unknown(overrides: Sequence[str]) -> None:
    """Refuse what Hydra would let through or trip over: `+` and `~` on typed keys, options that are no names.

    Raises:
        UserError: the first override at fault.
    """
    schema = copy.deepcopy(_schema())
    for override in parse(overrides):
        found = _refused(override, schema)
        if found is not None:
            raise found


def explain(error: Exception, overrides: Sequence[str]) -> UserError:
    """One sentence for an error of Hydra's: the field, the value and what is allowed."""
    if isinstance(error, OverrideParseException):
        allowed = "key=value, such as +exp=infini, budget=smoke or attention.window=64"
        return bad_value("argument", error.override, allowed)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, option = error.missing_cfg_file.rpartition("/")
        return bad_value(group or "config", option, error.options or choices(group))
    try:
        refuse_unknown(overrides)
    except UserError as found:
        return found
    key = re.search(r"full_key: (\S+)", f"{error}\n{error.__cause__}")
    if key is not None and not key[1].startswith("hydra"):  # in a file, such as a user's own experiment
        return UserError(f"{key[1]} is not possible ({_flat(error)}); allowed: {_allowed(key[1])}.")
    return UserError(f"The command line does not compose: {_flat(error)}.")


def choices(group: str) -> list[str]:
    """The options of a config group."""
    return sorted(file.stem for file in (CONF / group).glob("*.yaml"))


def differences(mine: object, theirs: object, prefix: str = "") -> list[tuple[str, object, object]]:
    """(key, mine, theirs) for every leaf in which two configs of the same type differ."""
    if not dataclasses.is_dataclass(mine):
        return [] if mine == theirs else [(prefix, mine, theirs)]
    found = []
    for field in dataclasses.fields(mine):
        key = f"{prefix}.{field.name}" if prefix else field.name
        found += differences(getattr(mine, field.name), getattr(theirs, field.name), key)
    return found


def select(config: Config, key: str) -> object:
    """The value at a dotted key."""
    node: object = config
    for part in key.split("."):
        node = node.get(part) if isinstance(node, dict) else getattr(node, part)
    return node


def _refused(override: Override, schema: DictConfig) -> UserError | None:
    """The sentence for this override if it is at fault; `schema` is a config to try its values on."""
    key, written = override.key_or_group, override.input_line or ""
    if override.is_delete():
        return bad_value("argument", written, "key=value; nothing can be deleted")
    if key.startswith("hydra"):
        named = override.is_sweep_override() or isinstance(override.value(), str | list)
        is_group = key == "hydra" or "/" in key  # of other values Hydra speaks in a traceback
        return bad_value(key, override.value(), "the name of an option") if is_group and not named else None
    if override.value_type in (ValueType.GLOB_CHOICE_SWEEP, ValueType.INTERVAL_SWEEP):
        return bad_value(key, override.get_value_string(), "one value, or several with commas in a multirun")
    values = list(override.sweep_iterator()) if override.is_sweep_override() else [override.value()]
    if key in GROUPS:
        hint = "; for single layers layers=list layers.indices=[3,9,15]" if key == "layers" else ""
        wrong = [value for value in values if value not in choices(key)]
        return bad_value(key, wrong[0], f"one of {', '.join(choices(key))}{hint}") if wrong else None
    kind = _type_at(key)
    if dataclasses.is_dataclass(kind):
        return bad_value(key, values[0], f"its fields, such as {key}.{dataclasses.fields(kind)[0].name}=...")
    for value in values:
        try:
            OmegaConf.update(schema, key, value)
        except OmegaConfBaseException:
            return bad_value(key, value, _allowed(key))
    if override.is_add() and not key.startswith(OWN):
        return bad_value("argument", written, f"{key}=..., without the +")
    return None


def _type_at(key: str) -> object | None:
    """The annotated type of a dotted key; None for an unknown key."""
    kind: object = Config
    for part in key.split("."):
        if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
            return None
        kind = typing.get_type_hints(kind).get(part)
    return kind


def _allowed(key: str) -> str:
    """What a key may be: its type, or for an unknown key the keys that exist at the nearest known place."""
    kind = _type_at(key)
    if kind is not None:
        return _word(kind)
    parent, name = key, ""
    while parent and _type_at(parent) is None:
        parent, _, name = parent.rpartition(".")
    owner = _type_at(parent) if parent else Config
    if not (isinstance(owner, type) and dataclasses.is_dataclass(owner)):
        return f"{parent} without further keys"
    names = [field.name for field in dataclasses.fields(owner)]
    close = get_close_matches(name, names, n=1)
    hint = f" (did you mean {close[0]}?)" if close else ""
    return f"{f'under {parent} ' if parent else ''}the keys {', '.join(names)}{hint}"


def _word(kind: object) -> str:
    """A type in words."""
    if isinstance(kind, types.UnionType):
        return " or ".join(_word(part) for part in typing.get_args(kind))
    if typing.get_origin(kind) is list:
        return f"a list such as [1,2], each {_word(typing.get_args(kind)[0])}"
    if typing.get_origin(kind) is dict:
        return "names with values, such as {name: 1}"
    return _WORDS.get(kind, str(kind)) if isinstance(kind, type) else str(kind)


def _flat(error: Exception) -> str:
    """An error's message on one line, without its final stop."""
    return " ".join(str(error).split()).rstrip(".")
