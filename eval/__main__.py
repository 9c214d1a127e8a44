"""`python -m eval run=<folder>` measures a run again, `python -m eval model=<folder or id>` any model.

It writes the same metrics.json and report.md as a run. With `run=` the phases that only the run itself could
measure are taken over from its metrics.json, and its last phase is measured anew, from its exported weights;
a narrower set than quick replaces only the figures that it measures. On other text than the run's (`data=`)
nothing is taken over, since its figures could not be compared.
"""

import logging
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace as replace_fields
from pathlib import Path
from typing import Any

from replace.interrupt import CODE, end_quietly

if __name__ == "__main__":
    end_quietly()  # the imports below take seconds

import torch

import replace
from eval.ablation import parts_of
from eval.measure import Yardstick, conclude, measure, yardstick
from eval.measurements import check
from eval.metrics import FILE, last_student, new_metrics, read_metrics, write_metrics
from eval.plan import Plan, clear_tokens_of, only, plan_for
from eval.report import write_report
from replace.compose import choices, compose, load_config
from replace.config import Config, DataConfig, ModelConfig
from replace.console import Console
from replace.errors import UserError, bad_value
from replace.loading import Loaded, load_model
from replace.softmax_backend import softmax_kernels
from replace.validation import check_reach

logger = logging.getLogger(__name__)

USAGE = """\
python -m eval run=<run folder>          measure the model of a run again
python -m eval model=<folder or hub id>  measure any causal language model
    out=<folder>           where metrics.json and report.md go; by default <run folder>/eval, or
                           outputs/eval/<model>/<date and time>
    eval={sets}
    eval.<key>=<value>     any field of the set, such as eval.limit=500 or 'eval.tasks=[offline_piqa]'
    data=<file or folder>  text to measure on, instead of the run's or the default books
    budget=<name>          how much is measured, as in `python -m replace`; by default the run's own, or quick
    trust_remote_code=true run the code that a model's folder brings along
    verbose=true           show the traceback of an error
"""
KEYS = ("run", "model", "out", "eval", "data", "budget", "trust_remote_code", "verbose")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit code is 0, or 2 after a mistake that one sentence on stderr explains."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help", "help=true"):
        (sys.stdout if given else sys.stderr).write(USAGE.format(sets="|".join(choices("eval"))))
        return 0 if given else 2
    try:
        options = parse(given)
        _log(options)
        folder = evaluate(options)
    except (UserError, OSError) as error:
        if "verbose=true" in given:
            raise
        sys.stderr.write(f"error: {_sentence(error)}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("error: interrupted; nothing was written, so the same command starts anew.\n")
        return CODE
    sys.stdout.write(f"{folder / 'report.md'}\n")
    return 0


def parse(arguments: Sequence[str]) -> dict[str, str]:
    """key=value arguments.

    Raises:
        UserError: one is not key=value, or its key is unknown or given twice, or its value is not possible.
    """
    options: dict[str, str] = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or not value:
            raise bad_value("argument", argument, "key=value, such as run=<run folder> or eval=recall")
        if key not in KEYS and not key.startswith("eval."):
            raise bad_value(key, value, f"the keys {', '.join(KEYS)}, eval.<key>")
        if key in options:
            raise bad_value(key, value, "one value")
        options[key] = value
    if ("run" in options) == ("model" in options):
        raise bad_value("run", options.get("run"), "either run=<run folder> or model=<folder or id>")
    if options.get("eval", "quick") not in choices("eval"):
        raise bad_value("eval", options["eval"], choices("eval"))
    for key in ("verbose", "trust_remote_code"):
        if options.get(key, "true") not in ("true", "false"):
            raise bad_value(key, options[key], ("true", "false"))
    return options


def evaluate(options: dict[str, str]) -> Path:
    """Measure, and write metrics.json and report.md.

    Returns:
        the folder they are in.
    """
    start = time.perf_counter()
    if "run" in options:
        source = Path(options["run"]).expanduser()
        config = load_config(source, "run")
        folder = _folder(options, source / "eval")
    else:
        source = None
        config = _config_for(options["model"], options.get("trust_remote_code") == "true")
        folder = _folder(options, _new_folder(options["model"]))
    if "budget" in options:
        config.budget = compose([f"budget={options['budget']}"]).budget
    same_text = _take_data(config, options.get("data"))
    fields = [f"{key}={value}" for key, value in options.items() if key.startswith("eval.")]
    if "eval" in options or fields:
        name, control = options.get("eval", config.eval.name), config.eval.control
        config.eval = compose([f"eval={name}", *fields]).eval
        config.eval.control = config.eval.control or control
    check(config)

    recorded = None
    if source is not None:
        recorded = read_metrics(source) if (source / FILE).is_file() else None
        model, tokenizer = replace.load(source)
    else:
        loaded = _loaded(config.model)
        model, tokenizer = loaded.model, loaded.tokenizer
    positions = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if positions is not None:
        check_reach(config.budget.eval, positions)
    using = yardstick(tokenizer, config, clear=clear_tokens_of(model, config.attention))
    teacher = _teacher(config, using) if source is not None else {}
    model = _moved(model)

    metrics = recorded or new_metrics(
        model=options.get("model") or config.model.id or config.model.path or config.model.kind,
        attention=config.attention.name if source is not None else None,
        layers=[],
        seed=config.seed,
        device=str(model.device),
    )
    parts = parts_of(model)
    phase = (last_student(metrics) if recorded else None) or "model"
    before = metrics["phases"].get(phase, {})
    if recorded and not same_text:
        logger.warning("the recorded phases were measured on other text than data= and are left out")
        metrics["phases"], metrics["wall_seconds"] = {}, {}
    if config.eval.more and teacher:
        metrics["phases"]["teacher"] = merged(metrics["phases"].get("teacher", {}), teacher)
    kept = before if same_text and config.eval.base != "quick" else {}
    training = {"training": before["training"]} if "training" in before else {}
    plan = plan_for(config.budget.eval, parts, phase=phase, final=True, dev=using.dev is not None)
    if same_text and "dev" in before:
        plan, kept = replace_fields(plan, dev=None), {"dev": before["dev"]} | kept  # the model is the same
    plan = only(plan, config.eval.base)
    with softmax_kernels(model, config.softmax_backend, config.precision) as chosen:
        measured = measure(model, tokenizer, config, phase=phase, final=True, using=using, plan=plan)
    metrics["softmax_attention"] = chosen
    measured["test_reads"] += before.get("test_reads", 0) if same_text else 0
    metrics["phases"][phase] = merged(kept, measured) | training
    metrics["wall_seconds"][f"eval {phase}"] = round(time.perf_counter() - start, 1)
    conclude(metrics, parts)
    write_metrics(folder, metrics)
    write_report(folder, source)
    return folder


def merged(recorded: dict, measured: dict) -> dict:
    """A recorded phase with the figures that were measured anew in place of the old ones.

    What holds figures of several measurements, the seconds and each ablation, is merged in the same way.
    """
    result = recorded | measured
    if "seconds" in recorded and "seconds" in measured:
        result["seconds"] = recorded["seconds"] | measured["seconds"]
    if "dev" in recorded and "dev" in measured:
        result["dev"] = merged(recorded["dev"], measured["dev"])
    if "ablation" in recorded and "ablation" in measured:
        old, new = recorded["ablation"], measured["ablation"]
        result["ablation"] = old | {
            name: old[name] if "why" in twin and name in old else _without_why(old.get(name, {})) | twin
            for name, twin in new.items()
        }
    return result


def _without_why(twin: dict) -> dict:
    return {name: figure for name, figure in twin.items() if name != "why"}


def _take_data(config: Config, path: str | None) -> bool:
    """Put the text that `data=` names into the config; whether it is the text that the config had."""
    if path is None:
        return True
    old = config.data
    config.data = DataConfig(kind="files", path=path)
    places = [Path(place).expanduser().resolve() for place in (old.path or "", path)]
    return old.kind == "files" and places[0] == places[1]


def _new_folder(model: str) -> Path:
    """A folder of this moment's own, named after the model with its parent, since every export is `model`."""
    place = Path(model).expanduser()
    parts = place.resolve().parts if place.exists() else place.parts
    name = "-".join(part for part in parts[-2:] if part != place.anchor)
    return Path("outputs") / "eval" / name / time.strftime("%Y-%m-%d_%H-%M-%S")


def _config_for(name: str, trust: bool) -> Config:
    """The default config for a model that is no run's: a folder where there is one, else a hub id."""
    config = compose([])
    if Path(name).expanduser().exists():
        config.model = ModelConfig(kind="local", path=name, trust_remote_code=trust)
    elif name in ("smollm2", "tiny"):
        config.model = ModelConfig(kind=name)
    else:
        config.model = ModelConfig(kind="hf", id=name, trust_remote_code=trust)
    return config


def _teacher(config: Config, using: Yardstick) -> dict:
    """Capture the teacher's layer outputs in `using`, and measure of it what `eval.more` names.

    The teacher is gone from memory afterwards.
    """
    loaded = load_model(config.model)
    model, nothing = _moved(loaded.model), only(Plan(), "none")
    with softmax_kernels(model, config.softmax_backend, config.precision):
        return measure(
            model, loaded.tokenizer, config, phase="teacher", final=False, using=using, plan=nothing
        )


def _loaded(model: ModelConfig) -> Loaded:
    """The model of `model=`; a refusal names this command's keys instead of those of a run."""
    try:
        return load_model(model)
    except UserError as error:
        sentence = str(error)
        for theirs, ours in (("model.trust_remote_code", "trust_remote_code"), ("model.path=", "model=")):
            sentence = sentence.replace(theirs, ours)
        raise UserError(sentence.replace("model.id=", "model=")) from error


def _folder(options: dict[str, str], default: Path) -> Path:
    """The folder to write to; an unwritable one is found before anything is measured, and nothing is left."""
    folder = Path(options["out"]).expanduser() if "out" in options else default
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise bad_value("out", str(folder), f"a folder that can be written ({error.strerror})") from error
    return folder


def _moved(model: Any) -> Any:
    """The model on the GPU, where there is one."""
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def _log(options: dict[str, str]) -> None:
    handler = Console()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    level = logging.INFO if options.get("verbose") == "true" else logging.WARNING
    for name in ("httpx", "transformers", "matplotlib"):
        logging.getLogger(name).setLevel(level)


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError):
        return f"{error.filename or 'The disk'} cannot be read or written: {error.strerror or error}."
    return " ".join(str(error).split())


if __name__ == "__main__":
    sys.exit(main())
