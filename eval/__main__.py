"""`python -m eval`: measure runs and models, or set them side by side.

`run=<folder>` measures a run again and `model=<folder or id>` any model; both write the same metrics.json
and report as a run. With `run=` the figures that are not measured anew are taken over from the run's
metrics.json, unless `data=` names other text, since such figures could not be compared. Measurements are
kept by the hash of what they follow from (`eval.stored`), so that a rerun computes only what is missing.
`compare=` reads the figures of runs and puts them into one table (`eval.compare`).
"""

import logging
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from replace.files import expanded
from replace.interrupt import code_of, end_quietly, stoppable
from replace.launch import refuse_several

if __name__ == "__main__":
    end_quietly()  # the imports below take seconds

import torch

from distill.checkpoint import load_last, stages_of
from eval.ablation import parts_of
from eval.arguments import WHAT, config_for, configure, listed, parse
from eval.checklist import checklist
from eval.compare import Item, compare, find_items, write_comparison
from eval.measure import Yardstick, conclude, keep_teacher, measure, yardstick
from eval.measurements import check
from eval.metrics import FILE, last_student, new_metrics, read_metrics, write_metrics
from eval.plan import Plan, clear_tokens, clear_tokens_of, only, plan_for
from eval.report import read_log, write_report
from eval.stored import Store, items_of, keeping, vocabulary_hash
from replace.compose import choices, load_config
from replace.config import Config
from replace.console import Console
from replace.convert import swap
from replace.corpora import Document, load_documents
from replace.errors import UserError, bad_value, resume_argument
from replace.export.load import load
from replace.loading import check_memory, load_model, load_tokenizer
from replace.pipeline import choose
from replace.precision import autocast, cast_once
from replace.softmax_backend import softmax_kernels
from replace.validation import check_reach

logger = logging.getLogger(__name__)

USAGE = """\
python -m eval run=<run folder>[,<run folder>...]          measure the model of a run again
python -m eval model=<folder or hub id>[,...]              measure any causal language model
python -m eval compare=[<run folder>,<run folder>,<model>] one table of recorded figures, differences to
                           the first; also the folder of a multirun; runs that differ in the seed only are one
    out=<folder>           where metrics.json and the report go; by default <run folder>/eval, or
                           outputs/eval/<model>/<date and time>, or outputs/compare/<date and time>
    eval=<set>[,<set>...]  {sets}
    eval.<key>=...         a single option of what is measured, such as eval.limit=500 or
                           'eval.tasks=[offline_piqa]'; budget.eval.<key>=... how much of it
    data=<file or folder>  text to measure on, instead of the run's or the default books
    budget=<name>          how much is measured, as in `python -m replace`; by default the run's own, or quick
    cache=false            measure anew what is in the cache
    trust_remote_code=true run the code that a model's folder brings along
    verbose=true           show the traceback of an error
"""
NOTHING = Plan(perplexity=False, probes=False, layer_outputs=False)


@dataclass
class Interrupted(Exception):
    """A signal while something was measured; the cause is the interrupt itself.

    Attributes:
        folder: where what was measured before is written; None if there was nothing.
    """

    folder: Path | None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit code is 0, 2 after a mistake that one sentence explains, 130 after Ctrl-C,
    143 after SIGTERM.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help", "help=true"):
        (sys.stdout if given else sys.stderr).write(USAGE.format(sets=" ".join(choices("eval"))))
        return 0 if given else 2
    try:
        refuse_several("eval")
        options = parse(given)
        _log(options)
        store = Store(read=options.get("cache") != "false")
        with stoppable():
            reports = run(options, store)
        if store.taken:
            logger.info("%d results were in the cache, %d were measured", len(store.taken), len(store.made))
        for report in reports:
            sys.stdout.write(f"{report}\n")
    except (UserError, OSError) as error:
        if "verbose=true" in given:
            raise
        sys.stderr.write(f"error: {_sentence(error)}\n")
        return 2
    except (KeyboardInterrupt, Interrupted) as error:
        folder = getattr(error, "folder", None)
        kept = f"what was measured is in {folder}" if folder else "nothing is lost"
        sys.stderr.write(f"error: interrupted; {kept}, and the same command measures only what is missing.\n")
        return code_of(error if isinstance(error, KeyboardInterrupt) else error.__cause__)
    return 0


def run(options: dict[str, str], store: Store) -> list[Path]:
    """Do what the options ask for.

    Returns:
        the reports.
    """
    if "compare" in options:
        return [_compare(options, store)]
    kind = "run" if "run" in options else "model"
    names = listed(options[kind])
    reports = []
    for name in names:
        out = expanded(options["out"]) if "out" in options else None
        if out is not None and len(names) > 1:
            out = out / _short(name)
        reports.append(evaluate(kind, name, options, store, out) / "report.md")
    return reports


def evaluate(
    kind: str,
    name: str,
    options: dict[str, str],
    store: Store,
    out: Path | None = None,
    like: Config | None = None,
) -> Path:
    """Measure one run or model, and write metrics.json and the report.

    Args:
        kind: run or model.
        out: the folder to write to.
        like: the config whose text, items and budget a model is measured with.

    Returns:
        the folder they are in.
    """
    start = time.perf_counter()
    source = expanded(name) if kind == "run" else None
    if source is not None:
        config = load_config(source, "run")
        _check_trained(source)
        folder = _folder(out or source / "eval")
    else:
        config = config_for(name, options.get("trust_remote_code") == "true")
        if like is not None:
            config = replace(like, model=config.model)
        folder = _folder(out or _new_folder(name))
    recorded_eval = config.eval
    same_text = configure(config, options)
    check(config)
    with _own_keys(kind):
        check_memory(config.model)
    documents = load_documents(config.data)

    recorded = None if source is None else _recorded(source, same_text)
    metrics = recorded or new_metrics(
        model=name if kind == "model" else config.model.id or config.model.path or config.model.kind,
        attention=config.attention.name if source is not None else None,
        layers=[],
        seed=config.seed,
        device="cuda" if torch.cuda.is_available() else "cpu",
    )
    metrics["notes"], metrics["command"] = [], _command(kind, name, options)
    if source is None:
        with _own_keys(kind):
            loaded = load_model(config.model)
        model, tokenizer = _moved(loaded.model), loaded.tokenizer
        _check_reach(config, model)
        clear = clear_tokens_of(model, config.attention)
        using = yardstick(tokenizer, config, documents, clear=clear)
        metrics["items"] = items_of(documents, tokenizer, clear)
    else:
        tokenizer = _tokenizer_of(source, config)
        metrics["items"] = items_of(documents, tokenizer, clear_tokens(config.attention))
        _add_earlier(metrics, folder)
        using = yardstick(tokenizer, config, documents)
        known = metrics["phases"].get("teacher", {}).get("seconds", {})
        again = config.eval != recorded_eval
        missing = [name for name in config.eval.more if again or name not in known]
        _with_teacher(config, using, tokenizer, metrics, store, missing)
        model = _student(source, config, documents, metrics)
        _check_reach(config, model)
    _check_vocabulary(kind, name, model, tokenizer)

    parts = parts_of(model)
    phase = _phase(metrics, recorded)
    before = metrics["phases"].get(phase, {})
    plan = plan_for(config.budget.eval, parts, phase=phase, final=True, dev=using.dev is not None)
    if "dev" in before:
        plan = replace(plan, dev=None)  # the model is the one that was measured on it
    plan = only(plan, config.eval.base)
    measured, made = {}, len(store.made)  # type: dict, int
    try:
        with (
            keeping(store, model, about=metrics["items"]),
            softmax_kernels(model, config.softmax_backend, config.precision) as chosen,
        ):
            metrics["softmax_attention"] = chosen
            measure(model, tokenizer, config, phase=phase, final=True, using=using, plan=plan, into=measured)
    except KeyboardInterrupt as error:
        if not measured:
            raise
        metrics["notes"].append("This evaluation was interrupted; what it had not measured yet is missing.")
        _finish(metrics, phase, merged(before, measured), parts, folder, source, config)
        raise Interrupted(folder) from error
    metrics["wall_seconds"][f"eval {phase}"] = round(time.perf_counter() - start, 1)
    if len(store.made) == made:
        measured["test_reads"] = 0  # figures of the cache were counted when they were made
    measured["test_reads"] += before.get("test_reads", 0)
    _finish(metrics, phase, merged(before, measured), parts, folder, source, config)
    return folder


def _finish(
    metrics: dict,
    phase: str,
    figures: dict,
    parts: dict,
    folder: Path,
    source: Path | None,
    config: Config,
) -> None:
    """Write metrics.json and the report."""
    metrics["phases"][phase] = figures
    conclude(metrics, parts)
    metrics["checklist"] = checklist(metrics, read_log((source or folder) / "train.jsonl"), asdict(config))
    write_metrics(folder, metrics)
    write_report(folder, source)


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


def _command(kind: str, name: str, options: dict[str, str]) -> str:
    """The command that gives the same figures."""
    others = [f"{k}={v}" for k, v in options.items() if k not in (*WHAT, "out", "cache", "verbose")]
    return shlex.join(["python", "-m", "eval", f"{kind}={name}", *others])


# What is measured


@contextmanager
def _own_keys(kind: str) -> Iterator[None]:
    """What is refused about `model=` names this command's keys instead of those of a run."""
    try:
        yield
    except UserError as error:
        if kind != "model":
            raise
        sentence = str(error)
        for theirs, ours in (("model.trust_remote_code", "trust_remote_code"), ("model.path=", "model=")):
            sentence = sentence.replace(theirs, ours)
        raise UserError(sentence.replace("model.id=", "model=")) from error


def _check_trained(source: Path) -> None:
    """Refuse a run that has neither an exported model nor a whole checkpoint, before anything is loaded.

    Raises:
        UserError: so it is.
    """
    if (source / "model" / "config.json").is_file():
        return
    folders = stages_of(source).values()
    if not any((folder / "final").exists() or any(folder.glob("step-*")) for folder in folders):
        raise _untrained(source)


def _untrained(source: Path) -> UserError:
    return UserError(
        f"run={str(source)!r} is unfinished and has no whole checkpoint yet; "
        f"`python -m replace {resume_argument(source)}` continues it."
    )


def _recorded(source: Path, same_text: bool) -> dict | None:
    """The run's metrics, without figures of other text; None if there are none."""
    if not (source / FILE).is_file():
        return None
    metrics = read_metrics(source)
    if not same_text:
        logger.warning("the recorded phases were measured on other text than data= and are left out")
        last = last_student(metrics)
        training = (
            {} if last is None else {k: v for k, v in metrics["phases"][last].items() if k == "training"}
        )
        metrics["phases"], metrics["wall_seconds"] = {}, {}
        return metrics | ({"phases": {last: training}} if last is not None else {})
    return metrics


def _add_earlier(metrics: dict, folder: Path) -> None:
    """Add what an earlier evaluation of the run, of the same items, left in its folder."""
    if (folder / FILE).is_file():
        earlier = read_metrics(folder)
        if earlier.get("items") == metrics["items"]:
            for phase, figures in earlier["phases"].items():
                own = metrics["phases"].get(phase, {})
                reads = max(part.get("test_reads", 0) for part in (figures, own))
                metrics["phases"][phase] = merged(figures, own) | {"test_reads": reads}


def _phase(metrics: dict, recorded: dict | None) -> str:
    """The phase that is measured: the one of an unfinished run's checkpoint, else the last one."""
    reached = metrics.get("checkpoint")
    if reached is not None:
        return f"stage{reached['stage']}"
    return (last_student(metrics) if recorded else None) or "model"


def _with_teacher(
    config: Config, using: Yardstick, tokenizer: Any, metrics: dict, store: Store, missing: list[str]
) -> None:
    """Keep in `using` what a student is compared with, and measure of the teacher what is `missing`.

    It is gone from memory afterwards.
    """
    if not config.eval.more and not {"quick", "probes"} & set(config.eval.base.split("+")):
        return
    teacher = _moved(load_model(config.model).model)
    with (
        softmax_kernels(teacher, config.softmax_backend, config.precision),
        autocast(config.precision, teacher.device),
        cast_once(teacher, config.precision),
    ):
        keep_teacher(teacher, tokenizer, config, using)
    if not missing:
        return
    only_missing = replace(config, eval=replace(config.eval, more=missing))
    with (
        keeping(store, teacher, about=metrics["items"]),
        softmax_kernels(teacher, config.softmax_backend, config.precision),
    ):
        measured = measure(
            teacher, tokenizer, only_missing, phase="teacher", final=False, using=using, plan=NOTHING
        )
    metrics["phases"]["teacher"] = merged(metrics["phases"].get("teacher", {}), measured)


def _student(source: Path, config: Config, documents: list[Document], metrics: dict) -> Any:
    """The exported model of a run, or of an unfinished one the last whole checkpoint.

    Raises:
        UserError: there is neither.
    """
    if (source / "model" / "config.json").is_file():
        return _moved(load(source)[0])
    loaded = load_model(config.model)
    swap(loaded.model, choose(config, loaded, documents, source))
    last = load_last(source, loaded.model)
    if last is None:
        raise _untrained(source)
    number, step = last
    where = f"stage {number}, finished" if step is None else f"stage {number} after {step} steps"
    note = f"This run did not finish; its last whole checkpoint was measured: {where}."
    logger.warning("%s", note)
    metrics["notes"].append(note)
    metrics["checkpoint"] = {"stage": number, "step": step}
    loaded.model.eval()
    return _moved(loaded.model)


def _tokenizer_of(source: Path, config: Config) -> Any:
    """The run's tokenizer, which must be the teacher's, or their figures would be of other tokens.

    Raises:
        UserError: it is another one.
    """
    teacher = load_tokenizer(config.model)
    folder = source / "model"
    if not (folder / "config.json").is_file():
        return teacher
    mine = load_tokenizer(config.model, folder)
    probe = "The pass key is 71482. Straße, naïve, 東京: was it 3 or 4?"
    alike = vocabulary_hash(mine) == vocabulary_hash(teacher)
    if not alike or mine(probe)["input_ids"] != teacher(probe)["input_ids"]:
        raise bad_value(
            "run",
            str(source),
            "a run whose model/ has the tokenizer of its teacher; this one's splits text into other tokens",
        )
    return mine


def _check_vocabulary(kind: str, name: str, model: Any, tokenizer: Any) -> None:
    """Refuse a tokenizer with tokens that the model has no embedding for."""
    rows = model.get_input_embeddings().weight.shape[0]
    highest = max(tokenizer.get_vocab().values())
    if highest >= rows:
        allowed = (
            f"a model whose tokenizer matches; this one's has tokens up to {highest}, "
            f"the model embeddings for {rows}"
        )
        raise bad_value(kind, name, allowed)


def _check_reach(config: Config, model: Any) -> None:
    """Refuse lengths that the model has no positions for."""
    positions = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if positions is not None:
        check_reach(config.budget.eval, positions)


# Comparing


def _compare(options: dict[str, str], store: Store) -> Path:
    """Read the figures of runs, measure the models among the items, and write the comparison."""
    items = find_items(listed(options["compare"]))
    folder = _folder(
        expanded(options["out"])
        if "out" in options
        else Path("outputs") / "compare" / time.strftime("%Y-%m-%d_%H-%M-%S")
    )
    like = next((item.config for item in items if item.config is not None), None)
    done = []
    for item in items:
        if item.metrics is None and "eval" not in options:
            item = _as_teacher(item, items) or item
        if item.metrics is None:
            again = {key: value for key, value in options.items() if key not in ("compare", "out")}
            place = evaluate("model", item.name, again, store, folder / _short(item.name), like)
            item = Item(item.name, place, read_metrics(place), None)
        done.append(item)
    command = shlex.join(["python", "-m", "eval", *(f"{key}={value}" for key, value in options.items())])
    return write_comparison(folder, compare(done), command)


def _as_teacher(item: Item, others: Sequence[Item]) -> Item | None:
    """A model that is the teacher of one of the runs, with the figures that the run has of it."""
    wanted = config_for(item.name, False).model
    for other in others:
        if other.config is not None and other.metrics is not None and "teacher" in other.metrics["phases"]:
            model = other.config.model
            if (model.kind, model.id, model.path) == (wanted.kind, wanted.id, wanted.path):
                only_teacher = other.metrics | {"phases": {"teacher": other.metrics["phases"]["teacher"]}}
                return Item(item.name, other.folder, only_teacher, None)
    return None


# Places


def _short(name: str) -> str:
    """A folder's name for a run or a model: its last two parts, since every export is `model`."""
    place = expanded(name)
    parts = place.resolve().parts if place.exists() else place.parts
    return "-".join(part for part in parts[-2:] if part != place.anchor)


def _new_folder(model: str) -> Path:
    """A folder of this moment's own, named after the model."""
    return Path("outputs") / "eval" / _short(model) / time.strftime("%Y-%m-%d_%H-%M-%S")


def _folder(folder: Path) -> Path:
    """The folder to write to; an unwritable one is found before anything is measured, and nothing is left."""
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
