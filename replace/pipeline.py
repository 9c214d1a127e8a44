"""One run, from top to bottom."""

import dataclasses
import json
import logging
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from distill.checkpoint import load_stage, stages_of
from distill.continued import continued_stage
from distill.data import Mixture, check_text, share_of
from distill.dev import dev_rows
from distill.lora.tune import check_tuning, tune
from distill.selection import rank
from distill.sharding import shard, shards
from distill.stages import LORA, Stage, check_head, language_stage, transfer_stage
from distill.trainer import train
from eval.ablation import mixers as mixers_of
from eval.ablation import parts_of
from eval.card import results_of
from eval.checklist import checklist
from eval.measure import Yardstick, conclude, keep_teacher, measure, yardstick
from eval.metrics import FILE, clean, comparable, new_metrics, read_metrics, write_metrics
from eval.objective import objective
from eval.plan import clear_tokens
from eval.report import read_log, write_report
from eval.stored import Store, code_hash, content, items_of
from kernels.allocator import keep_freed_memory
from kernels.dispatch import force
from replace import ranks
from replace.cache import ReplacedCacheLayer
from replace.choice import layers_of, spec_of
from replace.compose import load_config
from replace.config import Config
from replace.convert import Conversion, SwapSpec, attention_layers, mixers, probe_ids, swap
from replace.corpora import Document, load_documents
from replace.errors import UserError
from replace.export.write import export
from replace.files import atomic_write, clear, expanded
from replace.loading import Loaded, cache_dir, load_model, load_tokenizer
from replace.logger import Logger, NoLogger, open_logger
from replace.machine import device_of_choice
from replace.memory import MemoryMixer
from replace.precision import DTYPES, autocast
from replace.properties.examine import check as check_properties
from replace.properties.examine import magnitudes
from replace.provenance import FILE as PROVENANCE
from replace.provenance import end_provenance, for_export, write_provenance
from replace.ranking import FILE as RANKING
from replace.ranking import read_ranking, taken
from replace.softmax_backend import SoftmaxKernels
from replace.validation import selected

logger = logging.getLogger(__name__)

COUNTED = ("tokens", "skipped_steps", "clamped", "nonfinite")
"""What adds up over stages."""


def run(config: Config, run_dir: Path) -> dict:
    """Swap, distil, measure, export; returns the metrics that also stand in `run_dir/metrics.json`.

    A folder that already holds part of this run is continued: finished phases are not repeated. Of several
    ranks the first alone reads and writes it; all train, and share what is measured on text.
    """
    began = time.perf_counter()
    prepare(config, run_dir)
    try:
        with ranks.main_first():
            documents = load_documents(config.data)  # first: a mistake in it should not wait for the model
            check_text(documents, load_tokenizer(config.model), config)
            loaded = load_model(config.model)
        if config.tunes:
            check_tuning(loaded.model, loaded.tokenizer, documents, config)
    except UserError:
        if ranks.is_main() and not (run_dir / PROVENANCE).exists():  # it has not begun
            (run_dir / "config.json").unlink(missing_ok=True)  # resuming could only refuse it again
        raise
    model = loaded.model.to(device_of_choice())  # type: ignore[arg-type]  # transformers' decorated `to`
    if ranks.is_main() and (changed := write_provenance(run_dir, config, loaded, documents)):
        logger.warning("the run began elsewhere, so figures may differ: %s", "; ".join(changed))
    metrics = ranks.by_main(lambda: _open_metrics(run_dir, config, loaded, model))
    metrics["items"] = items_of(documents, loaded.tokenizer, clear_tokens(config.attention))
    using = yardstick(loaded.tokenizer, config, documents)
    log = open_logger(config, run_dir) if ranks.is_main() else NoLogger()
    softmax = SoftmaxKernels(config.softmax_backend, config.precision)
    try:
        with ranks.or_lost():  # shards are exchanged by torch itself
            _phases(config, run_dir, loaded, documents, metrics, using, log, softmax)
        log.results(metrics, run_dir)
    except (UserError, OSError) as error:
        log.failed(str(error))
        raise
    finally:
        softmax.close()
        log.finish()
    if ranks.is_main():
        end_provenance(run_dir, began)
    ranks.barrier()
    return metrics


def _phases(
    config: Config,
    run_dir: Path,
    loaded: Loaded,
    documents: list[Document],
    metrics: dict,
    using: Yardstick,
    log: Logger,
    softmax: SoftmaxKernels,
) -> None:
    """Teacher, swap, stages, export, report: the phases, one after the other."""
    model, tokenizer = loaded.model, loaded.tokenizer
    softmax.settle(model)
    with phase(metrics, run_dir, "teacher", log) as result:
        if result is not None:
            result |= measure(model, tokenizer, config, phase="teacher", final=False, using=using)
    if using.reference is None and ranks.is_main():
        with autocast(config.precision, model.device):
            keep_teacher(model, tokenizer, config, using)

    began = time.perf_counter()
    spec = choose(config, loaded, documents, run_dir)
    ranking = ranks.by_main(lambda: _known_ranking(run_dir))
    if ranking is not None:
        metrics["wall_seconds"].setdefault("choice", round(time.perf_counter() - began, 1))
        metrics["phases"]["teacher"]["choice"] = ranking | {"taken": taken(ranking, config.layers)}
    seed(config.seed)
    conversion = swap(model, spec, keep_originals=True)
    check_head(model, probe_ids(model))
    check_properties(model)
    metrics["softmax_attention"] = softmax.settle(model)
    metrics["layers"] = [r.layer for r in conversion.replacements]
    metrics["replaced"] = describe(model, conversion, using)
    todo = list(config.running)
    final = "lora" if config.tunes else f"stage{todo[-1]}" if todo else "swapped"
    with phase(metrics, run_dir, "swapped", log) as result:
        if result is not None:
            last = final == "swapped"
            result |= measure(model, tokenizer, config, phase="swapped", final=last, using=using)

    adopt(model, config)
    for number in todo:
        with phase(metrics, run_dir, f"stage{number}", log) as result:
            mixture = _mixture(loaded, documents, config, number)
            held_out = dev_rows(tokenizer, documents, config, number)
            with shards(model, number, ranks.sharded()) as subject:
                stage = _stage(subject, config, number)
                training = train(subject, stage, mixture, config, run_dir, log, held_out)
            if result is not None:
                name, last = f"stage{number}", final == f"stage{number}"
                if last or "why" not in training:  # a model that learned nothing was measured before
                    seed(config.seed)
                    result |= measure(model, tokenizer, config, phase=name, final=last, using=using)
                result["training"] = training

    if config.tunes:
        _export(model, tokenizer, config, run_dir, "base", metrics)
        with phase(metrics, run_dir, "lora", log) as result:
            tuning = tune(model, tokenizer, config, run_dir, documents, log)
            if result is not None:
                seed(config.seed)
                result |= measure(model, tokenizer, config, phase="lora", final=True, using=using)
                result |= tuning
    _export(model, tokenizer, config, run_dir, "model", metrics)
    parts = parts_of(model)
    if config.budget.continued_teacher and set(todo) & {2, 3}:
        with phase(metrics, run_dir, "continued_teacher", log) as result:
            if result is not None:
                result |= continued_teacher(config, run_dir, documents, metrics["layers"], todo, using)
    if not ranks.is_main():
        return
    conclude(metrics, parts)
    metrics["checklist"] = checklist(metrics, read_log(run_dir / "train.jsonl"), dataclasses.asdict(config))
    write_metrics(run_dir, metrics)
    write_report(run_dir)
    logger.info("done: %s", run_dir / "report.md")


def _export(
    model: PreTrainedModel, tokenizer, config: Config, run_dir: Path, name: str, metrics: dict
) -> None:
    """Write the student into a folder of the run, with the figures that are known so far in its card."""
    if not ranks.is_main():
        return
    provenance = for_export(run_dir)
    tuned = metrics["phases"].get("lora", {}).get("tuning", {}).get("data", {}).get("source")
    if tuned is not None and name == "model":
        provenance["data"]["tuning"] = tuned
    export(
        model,
        tokenizer,
        run_dir / name,
        provenance=provenance,
        dtype=DTYPES[config.export_dtype],
        results=results_of(metrics),
    )


def continued_teacher(
    config: Config,
    run_dir: Path,
    documents: list[Document],
    layers: list[int],
    todo: list[int],
    using: Yardstick,
) -> dict:
    """Train and measure the unswapped model on the rows of stages 2 and 3, since those adapt to the text too.

    Its checkpoints and train.jsonl are in a folder of their own; the logger hears of the measurement only.

    Returns:
        the phase: its figures, and the "training" of both stages together.
    """
    loaded, folder = load_model(config.model), run_dir / "continued_teacher"
    model = loaded.model.to(device_of_choice())  # type: ignore[arg-type]  # transformers' decorated `to`
    if ranks.is_main():
        folder.mkdir(exist_ok=True)
    trained = []
    for number in sorted(set(todo) & {2, 3}):
        with shards(model, number, ranks.sharded()) as subject:
            stage = continued_stage(subject, config, number, layers)
            if stage is not None:
                mixture = _mixture(loaded, documents, config, number)
                held_out = dev_rows(loaded.tokenizer, documents, config, number)
                trained.append(train(subject, stage, mixture, config, folder, NoLogger(), held_out))
    name = "continued_teacher"
    result = measure(model, loaded.tokenizer, config, phase=name, final=False, using=using)
    if trained:
        counted = {key: sum(one[key] for one in trained) for key in COUNTED}
        ends = {"loss_first": trained[0]["loss_first"], "loss_last": trained[-1]["loss_last"]}
        result["training"] = counted | ends
    return result


def prepare(config: Config, run_dir: Path) -> None:
    """Seeds, threads and the config as composed, before anything is loaded."""
    keep_freed_memory()
    force(config.kernels.backend)
    if config.threads:
        torch.set_num_threads(config.threads)
    seed(config.seed)
    if not ranks.is_main():
        return
    run_dir.mkdir(parents=True, exist_ok=True)
    clear(run_dir)
    if not (run_dir / "config.json").exists():
        atomic_write(run_dir / "config.json", json.dumps(dataclasses.asdict(config), indent=1))


def seed(number: int) -> None:
    """Begin the random numbers anew, so that what follows does not depend on what was skipped before."""
    random.seed(number)
    torch.manual_seed(number)


@contextmanager
def phase(metrics: dict, run_dir: Path, name: str, log: Logger) -> Iterator[dict | None]:
    """Yield a phase's dict to fill, which is kept when the block ends; None if it was measured already."""
    seed(metrics["seed"])
    if name in metrics["phases"]:
        logger.info("%s was measured already", name)
        yield None
        return
    began = time.perf_counter()
    result: dict = {}
    yield result
    metrics["phases"][name] = result
    metrics["wall_seconds"][name] = round(time.perf_counter() - began, 1)
    if ranks.is_main():
        write_metrics(run_dir, metrics)
    books = comparable(result).get("perplexity", {})
    figures = {f"{name}/perplexity/{book}": figures["ppl"] for book, figures in books.items()}
    aim = objective(metrics["phases"])
    log.log(
        figures | ({"objective": aim} if aim is not None else {}),
        step=result.get("training", {}).get("tokens", 0),
    )
    for book, figures in books.items():
        logger.info("%s: perplexity %.2f on %s", name, figures["ppl"], book)


def choose(config: Config, loaded: Loaded, documents: list[Document], run_dir: Path) -> SwapSpec:
    """Which layer gets what: `attention` for the selected ones, `layers.rest` for the others.

    A ranking, where one is needed, is read from the run's folder if it is there: no run chooses anew.
    """
    indices = layers_of(loaded.model)
    if selected(config.layers, len(indices)) is not None:
        return spec_of(config, indices)

    def read() -> list[int]:
        path = run_dir / RANKING
        if not path.exists():
            earlier = config.source or config.layers.ranking
            if earlier is None:
                ranking = _ranked(config, loaded, documents)
            else:
                ranking = read_ranking(expanded(earlier), "from" if config.source else "layers.ranking")
                logger.info("the layers' ranking is taken from %s", earlier)
            atomic_write(path, json.dumps(ranking, indent=1) + "\n")
        return taken(read_ranking(path, "resume"), config.layers)

    chosen = ranks.by_main(read)
    logger.info("layers=%s: %s", config.layers.select, ", ".join(map(str, chosen)))
    return spec_of(config, indices, chosen)


def _known_ranking(run_dir: Path) -> dict | None:
    """The ranking in a run's folder, if there is one."""
    path = run_dir / RANKING
    return read_ranking(path) if path.exists() else None


def _ranked(config: Config, loaded: Loaded, documents: list[Document]) -> dict:
    """The layers' ranking: the one that the same model, text and options had before, or a new one."""
    store = Store(cache_dir() / "rankings")
    known = [document for document in documents if document.split != "test"]
    parts = [config.attention, config.layers, config.stage, config.data, config.budget.choice]
    key = {
        "measurement": "layers",
        "code": code_hash("distill.selection"),
        "options": [content(part) for part in [*parts, config.model, config.seed, config.precision]],
        "about": items_of(known, loaded.tokenizer, clear_tokens(config.attention)),
        **store.of(loaded.model),
    }
    ranking = store.load(key)
    if ranking is None:
        ranking = clean(rank(loaded.model, loaded.tokenizer, known, config))
        store.save(key, ranking)
    else:
        minutes = ranking["seconds"]["spent"] / 60
        logger.info(
            "the layers were ranked before, in %.1f minutes: the same model, text and options", minutes
        )
    return ranking


def adopt(model: nn.Module, config: Config) -> None:
    """Take over the stages of the run that `from=` names before this run's first; all, if it only tunes.

    Raises:
        UserError: that run has not finished one of those stages.
    """
    first = min(config.running, default=LORA)
    if config.source is None:
        if 1 < first < LORA and any(getattr(m, "learns_score", False) for m in mixers_of(model)):
            logger.warning(
                "stages=%s without from=: no stage 1 taught the pair scores, so position alone decides",
                config.stages,
            )
        return
    source = expanded(config.source)
    found = stages_of(source)
    for number in range(1, first) if first < LORA else found:
        if number not in found or load_stage(found[number], model) is None:
            raise UserError(
                f"from={config.source!r} is not possible; allowed: a run that has finished stage {number}."
            )
        logger.info("stage %d is taken from %s", number, found[number].parent.parent)
    if load_config(source, "from").tunes:
        logger.warning("of %s the stages are taken; its tuning with adapters is not", config.source)


def describe(model: PreTrainedModel, conversion: Conversion, using: Yardstick) -> list[dict]:
    """The replaced layers for the report: classes, parameters, state bytes, the old outputs' distribution."""
    cache = DynamicCache(config=model.config)
    training = model.training
    with torch.no_grad():
        model.eval()(input_ids=probe_ids(model, 2), past_key_values=cache, use_cache=True)
    model.train(training)
    outputs = using.reference.outputs if using.reference is not None else []
    order = [module.layer_idx for _, module in attention_layers(model)]
    changes, inside = magnitudes(model), mixers(model)
    rows = []
    for replacement in conversion.replacements:
        slot = cache.layers[replacement.layer]
        row = dataclasses.asdict(replacement)
        if isinstance(slot, ReplacedCacheLayer) and slot.state is not None:
            row["state_bytes"] = sum(x.numel() * x.element_size() for x in slot.state.tensors().values())
        row |= {"magnitude": changes.get(replacement.layer), **bounds_of(model, inside[replacement.layer])}
        if outputs:
            row["output"] = distribution(outputs[order.index(replacement.layer)])
        rows.append(row)
    return rows


def bounds_of(model: PreTrainedModel, mixer: nn.Module) -> dict[str, float | None]:
    """The factor on queries and keys, and the bound of updates, as far as a mixer has them."""
    options, heads = getattr(mixer, "options", None), getattr(mixer, "heads", None)
    if options is None or heads is None:
        return {"scale": None, "clamp": None}
    softmax = next((m.scaling for _, m in attention_layers(model) if hasattr(m, "scaling")), heads.dim**-0.5)
    has_memory = bool(getattr(mixer, "has_memory", False))
    own = options.scale if isinstance(mixer, MemoryMixer) else None
    return {
        "scale": float(softmax**0.5 if own is None else own),
        "clamp": options.clamp if has_memory else None,
    }


def distribution(x: Tensor) -> dict[str, float]:
    """Mean, standard deviation, extremes and the share of values beyond fp16's range."""
    return {
        "mean": float(x.mean()),
        "std": float(x.std()),
        "min": float(x.min()),
        "max": float(x.max()),
        "beyond_fp16": float((x.abs() > torch.finfo(torch.float16).max).float().mean()),
    }


def _stage(model: PreTrainedModel, config: Config, number: int) -> Stage:
    """The stage as data; stage 3 trains what teacher and student share, so its teacher is a second model."""
    if number == 1:
        return transfer_stage(model, config)
    if number == 2 or config.stage.objective == "ce":
        return language_stage(model, config, number)
    logger.info("stage 3: the teacher is a second copy of the model (%d MiB)", _mebibytes(model))
    teacher = load_model(config.model).model
    teacher.to(model.device)  # type: ignore[arg-type]  # transformers' decorated `to`
    teacher.eval().requires_grad_(False)
    if ranks.sharded():
        shard(teacher, set())
    return language_stage(model, config, number, teacher)


def _mixture(loaded: Loaded, documents: list[Document], config: Config, number: int) -> Mixture:
    """The rows of one stage."""
    budget, share = getattr(config.budget, f"stage{number}"), share_of(config, number)
    return Mixture(loaded.tokenizer, documents, config, budget, stage=number, share=share)


def _mebibytes(model: nn.Module) -> int:
    """Size of the parameters."""
    return sum(p.numel() * p.element_size() for p in model.parameters()) >> 20


def _open_metrics(run_dir: Path, config: Config, loaded: Loaded, model: PreTrainedModel) -> dict:
    """The metrics of an earlier try, or new ones."""
    if (run_dir / FILE).exists():
        return read_metrics(run_dir)
    return new_metrics(
        model=str(next(filter(None, map(loaded.provenance.get, ("note", "id", "path"))), config.model.kind)),
        attention=config.attention.name,
        experiment=config.experiment,
        layers=[],
        seed=config.seed,
        device=str(model.device),
    )
