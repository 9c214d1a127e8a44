"""The arguments of `python -m eval`, and the config that they make of a run's own or of the default one."""

from collections.abc import Sequence
from dataclasses import fields

from replace.compose import choices, compose, overridden
from replace.config import Config, DataConfig, EvalConfig, ModelConfig
from replace.errors import bad_value
from replace.files import expanded
from replace.validation import BASES, check_eval, check_eval_budget

WHAT = ("run", "model", "compare")
KEYS = (*WHAT, "out", "eval", "data", "budget", "cache", "trust_remote_code", "verbose")
SWITCHES = ("cache", "trust_remote_code", "verbose")
SINGLE = ("eval.", "budget.eval.")
"""What the keys of single options begin with."""


def parse(arguments: Sequence[str]) -> dict[str, str]:
    """key=value arguments.

    Raises:
        UserError: one is not key=value, or its key is unknown or given twice, or its value is not possible.
    """
    options: dict[str, str] = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        key = "trust_remote_code" if key == "model.trust_remote_code" else key
        if not equals or not value:
            raise bad_value("argument", argument, "key=value, such as run=<run folder> or eval=recall")
        if key not in KEYS and not key.startswith(SINGLE):
            raise bad_value(key, value, f"the keys {', '.join(KEYS)}, eval.<key> and budget.eval.<key>")
        if key in options:
            raise bad_value(key, value, "one value")
        options[key] = value
    asked = [key for key in WHAT if key in options]
    if len(asked) != 1:
        last = asked[-1] if asked else "run"
        allowed = "either run=<run folder> or model=<folder or id> or compare=[...]"
        raise bad_value(last, options.get(last), allowed)
    sets_of(listed(options.get("eval", "quick")))
    for key in SWITCHES:
        if options.get(key, "true") not in ("true", "false"):
            raise bad_value(key, options[key], ("true", "false"))
    return options


def listed(value: str) -> list[str]:
    """`a`, `a,b` or `[a,b]`; a path that exists is one item, whatever signs it holds."""
    if expanded(value).exists():
        return [value]
    inner = value[1:-1] if value.startswith("[") and value.endswith("]") else value
    return list(dict.fromkeys(part.strip().strip("'\"") for part in inner.split(",") if part.strip()))


def sets_of(names: Sequence[str]) -> EvalConfig:
    """The union of several sets of measurements; a later set's own options go before an earlier one's.

    Raises:
        UserError: a set is unknown.
    """
    for name in names:
        if name not in choices("eval"):
            raise bad_value("eval", name, choices("eval"))
    sets = [compose([f"eval={name}"]).eval for name in names]
    bases = list(dict.fromkeys(part for one in sets for part in one.base.split("+") if part != "none"))
    result, usual = EvalConfig(), EvalConfig()
    for field in fields(EvalConfig):
        for one in sets:
            if getattr(one, field.name) != getattr(usual, field.name):
                setattr(result, field.name, getattr(one, field.name))
    result.name = ",".join(names)
    result.base = "quick" if "quick" in bases else "+".join(bases) or "none"
    result.more = list(dict.fromkeys(name for one in sets for name in one.more))
    return result


def configure(config: Config, options: dict[str, str]) -> bool:
    """Put what the options say into the config; whether it has the text that it had before.

    Raises:
        UserError: an option is not possible.
    """
    if "budget" in options:
        config.budget = compose([f"budget={options['budget']}"]).budget
    same_text = _take_data(config, options.get("data"))
    if "eval" in options:
        control = config.eval.control
        config.eval = sets_of(listed(options["eval"]))
        config.eval.control = config.eval.control or control
    single = [f"{key}={value}" for key, value in options.items() if key.startswith(SINGLE)]
    changed = overridden(config, single)
    config.eval, config.budget = changed.eval, changed.budget
    for base in config.eval.base.split("+"):
        if base not in BASES:
            raise bad_value(
                "eval.base", config.eval.base, f"one of {', '.join(BASES)}, or several joined by +"
            )
    check_eval(config.eval, config.attention)
    check_eval_budget(config)
    return same_text


def _take_data(config: Config, path: str | None) -> bool:
    """Put the text that `data=` names into the config; whether it is the text that the config had."""
    if path is None:
        return True
    old = config.data
    config.data = DataConfig(kind="files", path=path)
    places = [expanded(place).resolve() for place in (old.path or "", path)]
    return old.kind == "files" and places[0] == places[1]


def config_for(name: str, trust: bool) -> Config:
    """The default config for a model that is no run's: a folder where there is one, else a hub id."""
    config = compose([])
    if expanded(name).exists():
        config.model = ModelConfig(kind="local", path=name, trust_remote_code=trust)
    elif name in ("smollm2", "tiny"):
        config.model = ModelConfig(kind=name)
    else:
        config.model = ModelConfig(kind="hf", id=name, trust_remote_code=trust)
    return config
