"""Everything that can be known to be wrong before a weight is loaded; each refusal is one sentence."""

import glob
import importlib.util
import os
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from replace.compose import choices, differences, load_config
from replace.config import (
    AttentionConfig,
    Config,
    DataConfig,
    EvalBudget,
    EvalConfig,
    LayersConfig,
    LoraConfig,
    ModelConfig,
)
from replace.errors import UserError, bad_value
from replace.families import NOT_CAPTURED
from replace.files import expanded
from replace.ranking import MEASURED, SEARCHES, check_k, check_ranking, measurements, read_ranking
from replace.secrets import blot

if TYPE_CHECKING:
    from replace.loading import ModelFacts

SELECTS = ("all", "every", "first", "last", "list", *MEASURED)
LOCALS = ("segment", "sliding_window", "none")
GATES = ("head", "token")
WRITE_GATES = ("none", "token")
PRECISIONS = ("auto", "bf16", "fp16", "fp32")
BACKENDS = ("auto", "triton", "chunk", "reference")
SOFTMAX_BACKENDS = ("auto", "flash", "efficient", "math", "xformers")
LOSSES = ("mse", "huber", "cosine", "attention_weights")
BASES = ("quick", "perplexity", "recall", "probes", "none")
OBJECTIVES = ("kl", "ce", "mix")
SUFFIXES = (".txt", ".jsonl", ".parquet")
# The fields that only some options of their group read: group -> (what chooses, field -> those options).
READ_BY: dict[str, tuple[str, dict[str, tuple[str, ...]]]] = {
    "model": (
        "kind",
        {
            "id": ("hf",),
            "path": ("local",),
            "revision": ("hf",),
            "family": ("tiny",),
            "trust_remote_code": ("hf", "local"),
        },
    ),
    "layers": (
        "select",
        {
            "indices": ("list",),
            "k": ("every", "first", "last", *MEASURED),
            "search": ("auto",),
            "recall_weight": ("auto",),
            "compare": tuple(MEASURED),
            "ranking": tuple(MEASURED),
        },
    ),
    "data": (
        "kind",
        {"path": ("files", "hf"), "name": ("hf",), "split": ("hf",), "text_field": ("files", "hf")},
    ),
    "logger": ("kind", {"project": ("wandb",), "artifact": ("wandb",)}),
    "lora": (
        "kind",
        {field.name: ("peft", "unsloth", "auto") for field in fields(LoraConfig) if field.name != "kind"},
    ),
}
LORA_KINDS = ("none", "peft", "unsloth", "auto")
BIASES = ("none", "all", "lora_only")
TUNING_DATA = ("chat", "text")
EXPORTED = ("fp32", "bf16", "fp16")
LARGEST = 3.4e38
"""The largest number that fp32 holds."""
EPISODE = 128
"""Tokens of a recall episode beside window and block: the facts, the question, the answer, some text."""


def validate(config: Config, facts: "ModelFacts | None" = None) -> None:
    """Check a config as far as it can be checked without weights.

    Args:
        config: a composed run.
        facts: what is known of the model; looked up from `config.model` if None.

    Raises:
        UserError: the first thing found wrong.
    """
    _check_run(config)
    _check_model_fields(config.model)
    _check_read(config, ("model", "layers", "data", "logger", "lora"))
    check_lora(config)
    _check_data(config.data, _longest(config))
    _check_stages(config)
    _check_attention(config.attention)
    _check_budget(config)
    if config.source is not None and config.resume is None:
        _check_source(config, expanded(config.source))
    _check_names(config)
    facts = facts or _facts(config.model)
    _check_fit(config, facts)
    _check_choice(config, facts)
    if _longest(config) > facts.max_position:
        longest = max(
            ("stage1", "stage2", "stage3", "lora"), key=lambda name: getattr(config.budget, name).length
        )
        raise bad_value(
            f"budget.{longest}.length",
            _longest(config),
            f"at most {facts.max_position}, the model's positions",
        )
    check_reach(config.budget.eval, facts.max_position)
    check_eval(config.eval, config.attention)


def validate_swap(config: Config) -> "ModelFacts":
    """As `validate`, for a command that swaps and does not train: model, attention and layers.

    Raises:
        UserError: the first thing found wrong.
    """
    _check_run(config)
    _check_model_fields(config.model)
    _check_read(config, ("model", "layers"))
    _check_attention(config.attention)
    _check_names(config)
    facts = _facts(config.model)
    _check_fit(config, facts)
    _check_ranking(config, facts)
    if config.layers.select == "auto" and config.layers.ranking is None:
        raise bad_value(
            "layers", "auto", "layers.ranking=<run folder> beside it, since nothing is trained here"
        )
    return facts


def _check_fit(config: Config, facts: "ModelFacts") -> None:
    """The model's family can be captured, it has the layers, and its sizes allow the options."""
    allowed = f"a family whose attention can be captured, none of {', '.join(NOT_CAPTURED)}"
    _require(facts.family not in NOT_CAPTURED, "model.family", facts.family, allowed)
    _check_layers(config.layers, facts.layers)
    _check_heads(config, facts.head_dim)
    _check_window(config.attention, facts.max_position)
    allowed = f"0 to {facts.max_position}, the model's positions"
    _require(config.attention.pairs <= facts.max_position, "attention.pairs", config.attention.pairs, allowed)
    _check_kernels(config, facts.head_dim)
    _check_softmax(config, facts)


def check_reach(measured: EvalBudget, positions: int) -> None:
    """Refuse to measure at lengths that the model, or its teacher, has no positions for.

    Raises:
        UserError: the first such length.
    """
    for name in ("phase_lengths", "final_lengths"):
        for length in getattr(measured, name):
            _check_positions(name, length, positions)
    _check_positions("perplexity_length", measured.perplexity_length, positions)


def check_eval(wanted: EvalConfig, attention: AttentionConfig) -> None:
    """The sizes of the measurements that `eval.more` can name; a needle fits into its context.

    Raises:
        UserError: the first thing found wrong.
    """
    from replace.needles import FORMS  # brings torch

    _require(wanted.stream_tokens >= 2, "eval.stream_tokens", wanted.stream_tokens, "2 tokens or more")
    for name in ("niah_episodes", "passkey_episodes"):
        count = getattr(wanted, name)
        _require(count >= 1, f"eval.{name}", count, "a whole number of at least 1")
    for name in ("niah_lengths", "niah_depths", "niah_forms", "passkey_lengths", "speed_lengths"):
        values = getattr(wanted, name)
        _require(bool(values), f"eval.{name}", values, "at least one")
        _require(len(set(values)) == len(values), f"eval.{name}", values, "each value once")
    for depth in wanted.niah_depths:
        allowed = "depths from 0 (the start of the text) to 100 (its end), in %"
        _require(0 <= depth <= 100, "eval.niah_depths", depth, allowed)
    for form in wanted.niah_forms:
        _one_of("eval.niah_forms", form, tuple(FORMS))
        for length in wanted.niah_lengths:
            least = FORMS[form].tokens
            allowed = f"lengths of at least {least}, what needle and question of {form} need"
            _require(length >= least, "eval.niah_lengths", length, allowed)
    for length in wanted.passkey_lengths if "passkey" in wanted.more else ():
        least = EPISODE + attention.window + attention.block
        allowed = (
            f"lengths of at least {least} ({EPISODE} + attention.window + attention.block), "
            "since the needle must lie outside window and block"
        )
        _require(length >= least, "eval.passkey_lengths", length, allowed)
    for length in wanted.speed_lengths:
        _require(length >= 1, "eval.speed_lengths", length, "lengths of at least 1")


def _check_positions(name: str, length: int, positions: int) -> None:
    allowed = f"at most {positions}, the model's positions"
    _require(length <= positions, f"budget.eval.{name}", length, allowed)


def selected(layers: LayersConfig, count: int) -> list[int] | None:
    """The indices that `layers` selects in a model of `count` layers; None where they are measured."""
    if layers.select in MEASURED:
        return None
    if layers.select == "list":
        return sorted(layers.indices)
    return {
        "all": list(range(count)),
        "every": list(range(0, count, max(1, layers.k))),
        "first": list(range(min(layers.k, count))),
        "last": list(range(max(0, count - layers.k), count)),
    }[layers.select]


def _require(condition: bool, field: str, value: object, allowed: str) -> None:
    if not condition:
        raise bad_value(field, value, allowed)


def _one_of(field: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise bad_value(field, value, allowed)


def _check_values(node: object, key: str = "") -> None:
    """Every float of a config is finite, also where nothing else bounds it; no text holds a key."""
    if isinstance(node, float):
        _require(abs(node) <= LARGEST, key, node, f"a finite number of at most {LARGEST:g}")
    elif isinstance(node, str):
        hidden = blot(node)
        _require(hidden == node, key, hidden, "no keys, which belong into the environment")
    elif isinstance(node, list):
        for item in node:
            _check_values(item, key)
    elif isinstance(node, dict):
        for name, item in node.items():
            _check_values(item, f"{key}.{name}")
    elif is_dataclass(node):
        for field in fields(node):
            _check_values(getattr(node, field.name), f"{key}.{field.name}".lstrip("."))


def _check_read(config: Config, groups: tuple[str, ...]) -> None:
    """Refuse a value that the chosen option of its group would not read; the group's default may stand."""
    if config.resume is not None:  # that run began, and what it never read changes no figure
        return
    for group in groups:
        chooser, readers = READ_BY[group]
        node = getattr(config, group)
        chosen, default = getattr(node, chooser), type(node)()
        if chosen not in choices(group):  # refused by its own name
            continue
        for name, options in readers.items():
            value = getattr(node, name)
            needed = " or ".join(f"{group}={option}" for option in options)
            allowed = f"{getattr(default, name)!r} beside {group}={chosen}, since it needs {needed}"
            unread = chosen not in options and value != getattr(default, name)
            _require(not unread, f"{group}.{name}", value, allowed)


def _check_run(config: Config) -> None:
    _check_values(config)
    _one_of("precision", config.precision, PRECISIONS)
    _one_of("kernels.backend", config.kernels.backend, BACKENDS)
    _one_of("softmax_backend", config.softmax_backend, SOFTMAX_BACKENDS)
    stages = config.stages
    alone = config.source is not None and config.lora.kind != "none"
    allowed = "one or more of 1, 2, 3, or [] beside from= and lora=, which tunes that run's student"
    _require(bool(stages) or alone, "stages", stages, allowed)
    _require(all(stage in (1, 2, 3) for stage in stages), "stages", stages, "1, 2 and 3")
    _require(stages == sorted(set(stages)), "stages", stages, "each stage once, in rising order")
    _require(0 <= config.seed < 2**32, "seed", config.seed, "a whole number from 0 to 2**32 - 1")
    cores = os.cpu_count() or 1
    if config.threads is not None:
        _require(
            1 <= config.threads <= cores,
            "threads",
            config.threads,
            f"1 to {cores}, the cores of this machine, or null",
        )
    _one_of("lora.kind", config.lora.kind, LORA_KINDS)
    _one_of("export_dtype", config.export_dtype, EXPORTED)
    _one_of("eval.name", config.eval.name, tuple(choices("eval")))
    for base in config.eval.base.split("+"):
        _one_of("eval.base", base, BASES)
    if config.eval.control is not None:
        load_config(expanded(config.eval.control), "eval.control")
    _one_of("logger.kind", config.logger.kind, ("none", "wandb"))


def check_lora(config: Config) -> None:
    """The tuning's options, also those that Unsloth cannot take; nothing is imported for it.

    Raises:
        UserError: the first thing found wrong.
    """
    lora = config.lora
    _one_of("lora.kind", lora.kind, LORA_KINDS)
    if lora.kind == "none":
        return
    _require(lora.rank >= 1, "lora.rank", lora.rank, "a whole number of at least 1")
    _require(lora.alpha >= 1, "lora.alpha", lora.alpha, "a whole number of at least 1")
    _require(0 <= lora.dropout < 1, "lora.dropout", lora.dropout, "a share from 0 to below 1")
    _require(0 < lora.lr < 1, "lora.lr", lora.lr, "a learning rate above 0 and below 1")
    _require(bool(lora.targets), "lora.targets", lora.targets, "all-linear, or names of linear modules")
    _one_of("lora.bias", lora.bias, BIASES)
    _one_of("lora.data", lora.data, TUNING_DATA)
    if lora.data == "text":
        for name in ("path", "template"):
            value = getattr(lora, name)
            _require(
                value is None, f"lora.{name}", value, "null beside lora.data=text; it needs lora.data=chat"
            )
    if lora.path is not None:
        found = glob.glob(str(expanded(lora.path)), recursive=True)
        _require(bool(found), "lora.path", lora.path, "a .jsonl file, a folder or a glob of them that exists")
    if lora.kind == "unsloth":
        _check_unsloth(lora)


def _check_unsloth(lora: LoraConfig) -> None:
    """What Unsloth's fast patches need; with anything else it would run, slowly and in more memory."""
    slow = "since Unsloth's fast patches need it and are lost otherwise, with more memory; or lora=peft"
    _require(lora.dropout == 0, "lora.dropout", lora.dropout, f"0 beside lora=unsloth, {slow}")
    _require(lora.bias == "none", "lora.bias", lora.bias, f"none beside lora=unsloth, {slow}")
    _require(not lora.dora, "lora.dora", lora.dora, f"false beside lora=unsloth, {slow}")
    allowed = "none, peft, auto, since Unsloth is not installed here (README, `Tuning`, has the commands)"
    _require(importlib.util.find_spec("unsloth") is not None, "lora", lora.kind, allowed)


def _check_model_fields(model: ModelConfig) -> None:
    _one_of("model.kind", model.kind, ("smollm2", "tiny", "hf", "local"))
    if model.kind == "hf":
        _require(
            bool(model.id), "model.id", model.id, "the id of a hub model, such as HuggingFaceTB/SmolLM2-135M"
        )
    if model.kind == "local":
        folder = expanded(model.path or "")
        found = bool(model.path) and (folder / "config.json").is_file()
        _require(found, "model.path", model.path, "a folder with a config.json, as save_pretrained writes it")


def _check_attention(attention: AttentionConfig) -> None:
    _one_of("attention.local", attention.local, LOCALS)
    _one_of("attention.gate", attention.gate, GATES)
    _one_of("attention.write_gate", attention.write_gate, WRITE_GATES)
    block, window = attention.block, attention.window
    _require(block >= 1, "attention.block", block, "a whole number of at least 1")
    if attention.local == "sliding_window":
        _require(
            window >= block and window % block == 0,
            *("attention.window", window),
            f"a multiple of attention.block={block} above 0 (attention.local=segment has no window)",
        )
    else:
        allowed = f"0, since attention.local={attention.local} has no window"
        _require(window == 0, "attention.window", window, allowed)
    _require(
        0 <= attention.sinks <= block, "attention.sinks", attention.sinks, f"0 to attention.block={block}"
    )
    _require(attention.pairs >= 0, "attention.pairs", attention.pairs, "0 or more")
    recent = attention.pairs_recent
    _require(0 <= recent <= 1, "attention.pairs_recent", recent, "a share of attention.pairs, from 0 to 1")
    _require(0 <= attention.pairs_fade <= 1e6, "attention.pairs_fade", attention.pairs_fade, "0 to 1e6")
    exact = block + window
    if attention.distance_cap is not None:
        _require(
            attention.distance_cap >= exact,
            *("attention.distance_cap", attention.distance_cap),
            f"at least {exact}, the tokens that are exact (attention.window + attention.block), or null",
        )
    _require(attention.clamp > 0, "attention.clamp", attention.clamp, "a number above 0")
    scale = attention.scale
    _require(scale is None or scale > 0, "attention.scale", scale, "a number above 0, or null")


def _check_names(config: Config) -> None:
    """Names that registries know; imported only here and last, since they bring torch."""
    from replace.feature_maps import FEATURE_MAPS
    from replace.memory import UPDATES
    from replace.mixer import VARIANTS, BlockMixer, check_own
    from replace.scores import SCORES

    attention = config.attention
    variant = VARIANTS.get(attention.name)
    FEATURE_MAPS.get(attention.feature_map)
    UPDATES.get(attention.update)
    SCORES.get(attention.pairs_score)
    rest = config.layers.rest
    if ":" in rest:
        VARIANTS.get(rest, "layers.rest")
    elif rest != "keep":
        _one_of("layers.rest", rest, ("keep", *VARIANTS.names()))
    if issubclass(variant, BlockMixer):
        variant.check(attention)
    else:
        check_own(attention.own, getattr(variant, "own_options", {}))
    learns = issubclass(variant, BlockMixer) and variant.learns_map(attention)
    if config.stage.transfer_loss == "attention_weights" and not learns:
        why = f"since attention.name={attention.name} has no feature map that learns"
        if issubclass(variant, BlockMixer) and variant.has_memory:
            learned = [name for name in FEATURE_MAPS.names() if FEATURE_MAPS.get(name).learned]
            why = f"or attention.feature_map={' or '.join(learned)}, which learn"
        raise bad_value("stage.transfer_loss", config.stage.transfer_loss, f"mse, huber, cosine, {why}")
    refusal = None if rest == "keep" else _refusal(rest, attention)
    if refusal is not None:
        others = [name for name in VARIANTS.names() if _refusal(name, attention) is None]
        shared = f"since all layers share the options of attention, and with {rest} {refusal.rstrip('.')}"
        raise bad_value("layers.rest", rest, f"keep, {', '.join(others)}, {shared}")


def _check_window(attention: AttentionConfig, positions: int) -> None:
    """Softmax over a window and the own block stays within the distances that the model was made for."""
    if attention.local != "none":
        block = attention.block
        _require(block <= positions, "attention.block", block, f"at most {positions}, the model's positions")
        allowed = f"at most {positions - block}: the model's {positions} positions less attention.block"
        _require(attention.window + block <= positions, "attention.window", attention.window, allowed)


def _check_heads(config: Config, head_dim: int) -> None:
    """What the width of the model's heads rules out."""
    from replace.mixer import VARIANTS, BlockMixer

    for name in (config.attention.name, config.layers.rest):
        variant = None if name == "keep" else VARIANTS.get(name)
        if variant is not None and issubclass(variant, BlockMixer):
            variant.check_heads(config.attention, head_dim)


def _check_kernels(config: Config, head_dim: int) -> None:
    """Triton, where it is asked for, runs on this machine and with these features."""
    from kernels.dispatch import triton_refusal
    from kernels.linear_attention.op import LARGEST
    from replace.attention.infini import Infini
    from replace.attention.linear import Linear
    from replace.feature_maps import FEATURE_MAPS
    from replace.machine import device_of_choice
    from replace.mixer import VARIANTS
    from replace.operators import operand_dtype
    from replace.precision import dtype_of

    if config.kernels.backend != "triton":
        return
    device, others = device_of_choice(), "auto, chunk, reference"
    refusal = triton_refusal(device, operand_dtype(dtype_of(config.precision, device), device))
    _require(refusal is None, "kernels.backend", "triton", f"{others}, since {refusal}")
    variant = VARIANTS.get(config.attention.name)
    features = FEATURE_MAPS.get(config.attention.feature_map).features(head_dim)
    fits = features <= LARGEST or not issubclass(variant, (Infini, Linear))
    why = (
        f"since attention.feature_map={config.attention.feature_map} has {features} features, above {LARGEST}"
    )
    _require(fits, "kernels.backend", "triton", f"{others}, {why}")


def _check_softmax(config: Config, facts: "ModelFacts") -> None:
    """The kernel that is asked for takes heads of this form on this machine; asked of the kernel itself."""
    from replace.machine import device_of_choice
    from replace.precision import dtype_of
    from replace.softmax_backend import device_name, trials_of

    wanted, device = config.softmax_backend, device_of_choice()
    if wanted in ("auto", "math"):
        return
    dtype = dtype_of(config.precision, device)
    layout = (device, dtype, facts.heads, facts.kv_heads, facts.head_dim)
    if trials_of(*layout, names=[wanted])[wanted].forward is None:
        return
    trials = trials_of(*layout)
    able = ", ".join(["auto", *(name for name, trial in trials.items() if trial.forward is None)])
    where = f"{str(dtype).removeprefix('torch.')} with head_dim={facts.head_dim} on {device_name(device)}"
    why = f"since for {where} there is no {wanted}: {trials[wanted].forward}"
    raise bad_value("softmax_backend", wanted, f"{able}, {why}")


def _refusal(name: str, attention: AttentionConfig) -> str | None:
    """Why these options do not go together in the variant `name`, or None where they do."""
    from replace.mixer import VARIANTS, BlockMixer

    variant = VARIANTS.get(name)
    if issubclass(variant, BlockMixer):
        try:
            variant.check(attention.shared_with(name))
        except UserError as error:
            return str(error)
    return None


def _check_layers(layers: LayersConfig, count: int) -> None:
    _one_of("layers.select", layers.select, SELECTS)
    if layers.select == "list":
        indices = layers.indices
        _require(
            bool(indices), "layers.indices", indices, f"one or more of 0 to {count - 1}, the model's layers"
        )
        wrong = [index for index in indices if not 0 <= index < count]
        _require(
            not wrong, "layers.indices", wrong[0] if wrong else None, f"0 to {count - 1}, the model's layers"
        )
        _require(len(set(indices)) == len(indices), "layers.indices", indices, "each layer once")
    elif layers.select == "retrieval":
        _require(
            layers.k >= 1, "layers.k", layers.k, "at least 1; a model with fewer layers gives all of them"
        )
    elif layers.select == "auto":
        check_k(layers, count)
        allowed = "keep, since layers=auto chooses which layers to swap at all"
        _require(layers.rest == "keep", "layers.rest", layers.rest, allowed)
    elif layers.select != "all":
        _require(1 <= layers.k <= count, "layers.k", layers.k, f"1 to {count}, the model's layers")
    _one_of("layers.search", layers.search, SEARCHES)
    weight = layers.recall_weight
    _require(weight >= 0, "layers.recall_weight", weight, "0 (by the KL alone) or more")


def _check_ranking(config: Config, facts: "ModelFacts") -> None:
    """The ranking that is named is one, and fits; a run that began has its own copy."""
    layers = config.layers
    if layers.select in MEASURED and layers.ranking is not None and config.resume is None:
        _require(bool(layers.ranking.strip()), "layers.ranking", layers.ranking, "a file, or a run's folder")
        check_ranking(read_ranking(expanded(layers.ranking)), layers, facts.layers)


def _check_choice(config: Config, facts: "ModelFacts") -> None:
    """The ranking that is named fits; or what is measured for one is possible."""
    layers, budget = config.layers, config.budget.choice
    _check_ranking(config, facts)
    if not any(measurements(layers, facts.layers)):
        return
    exact = config.attention.block + config.attention.window
    for name in ("batch", "rows", "episodes"):
        value = getattr(budget, name)
        _require(value >= 1, f"budget.choice.{name}", value, "a whole number of at least 1")
    least = max(2 * config.attention.block, EPISODE + exact)
    _require(
        least <= budget.length <= facts.max_position,
        *("budget.choice.length", budget.length),
        f"{least} ({EPISODE} + attention.window + attention.block, and two blocks at least) "
        f"to {facts.max_position}, the model's positions",
    )
    step = budget.batch * budget.length
    allowed = f"at least {step}, one step of batch x length, or 0 (no transfer)"
    _require(budget.tokens == 0 or budget.tokens >= step, "budget.choice.tokens", budget.tokens, allowed)


def _check_stages(config: Config) -> None:
    stage = config.stage
    _one_of("stage.transfer_loss", stage.transfer_loss, LOSSES)
    _one_of("stage.objective", stage.objective, OBJECTIVES)
    if stage.transfer_loss == "attention_weights":
        allowed = "above 0, since stage.transfer_loss=attention_weights teaches feature maps only"
        _require(stage.lr_map1 > 0, "stage.lr_map1", stage.lr_map1, allowed)
    for name in ("projection1", "map1", "gate", "score", "projection2", "map2", "stage3"):
        rate = getattr(stage, f"lr_{name}")
        _require(0 <= rate < 1, f"stage.lr_{name}", rate, "a learning rate from 0 to below 1")
    if 3 in config.running:
        # One rate for all parameters, so that nothing would be trained.
        _require(
            stage.lr_stage3 > 0, "stage.lr_stage3", stage.lr_stage3, "above 0, or budget.stage3.tokens=0"
        )
    _require(0 <= stage.warmup <= 1, "stage.warmup", stage.warmup, "a share from 0 to 1")
    _require(0 <= stage.weight_decay <= 1, "stage.weight_decay", stage.weight_decay, "a number from 0 to 1")
    _require(stage.clip > 0, "stage.clip", stage.clip, "a number above 0")
    for name in ("accumulate", "max_skipped", "checkpoint_every", "validate_rows"):
        value = getattr(stage, name)
        _require(value >= 1, f"stage.{name}", value, "a whole number of at least 1")
    every, patience = stage.validate_every, stage.patience
    _require(every >= 0, "stage.validate_every", every, "0 (never) or a number of steps")
    allowed = "0 (never end early) or a number of measurements"
    _require(patience >= 0, "stage.patience", patience, allowed)
    allowed = "0 beside stage.validate_every=0, since nothing would be measured to wait for"
    _require(patience == 0 or every > 0, "stage.patience", patience, allowed)


def _check_budget(config: Config) -> None:
    block = config.attention.block
    exact = block + config.attention.window
    for name in ("stage1", "stage2", "stage3", "lora"):
        stage, field = getattr(config.budget, name), f"budget.{name}"
        _require(stage.tokens >= 0, f"{field}.tokens", stage.tokens, "0 (leave the stage out) or more")
        if stage.tokens == 0:
            continue
        _require(stage.batch >= 1, f"{field}.batch", stage.batch, "a whole number of at least 1")
        _require(
            stage.length >= 2 * block,
            *(
                f"{field}.length",
                stage.length,
                f"at least {2 * block}, two blocks of attention.block={block}",
            ),
        )
        share = "recall_transfer" if name == "stage1" else "recall"
        _require(
            name == "lora" or getattr(config.data, share) == 0 or stage.length >= EPISODE + exact,
            *(f"{field}.length", stage.length),
            f"at least {EPISODE + exact} ({EPISODE} + attention.window + attention.block), so that "
            f"an episode of data.{share}={getattr(config.data, share)} fits in",
        )
        step = stage.batch * stage.length
        _require(
            stage.tokens >= step,
            f"{field}.tokens",
            stage.tokens,
            f"at least {step}, one step of batch x length, or 0",
        )
    check_eval_budget(config)


def check_eval_budget(config: Config) -> None:
    """Refuse an evaluation's sizes that are not possible with the config's attention.

    Raises:
        UserError: the first such size.
    """
    exact = config.attention.block + config.attention.window
    measured = config.budget.eval
    _require(
        measured.perplexity_length >= 2,
        "budget.eval.perplexity_length",
        measured.perplexity_length,
        "2 or more",
    )
    _require(
        measured.perplexity_tokens >= measured.perplexity_length,
        *("budget.eval.perplexity_tokens", measured.perplexity_tokens),
        f"at least budget.eval.perplexity_length={measured.perplexity_length}",
    )
    _require(
        measured.episodes >= 1, "budget.eval.episodes", measured.episodes, "a whole number of at least 1"
    )
    for name in ("phase_lengths", "final_lengths"):
        lengths = getattr(measured, name)
        _require(bool(lengths), f"budget.eval.{name}", lengths, "at least one length, such as [1024]")
        for length in lengths:
            allowed = (
                f"lengths of at least {EPISODE + exact} ({EPISODE} + attention.window + attention.block), "
                "since the needle must lie outside window and block"
            )
            _require(length >= EPISODE + exact, f"budget.eval.{name}", length, allowed)
    for length in measured.speed_lengths:
        _require(length >= 1, "budget.eval.speed_lengths", length, "lengths of at least 1")


def _check_data(data: DataConfig, length: int) -> None:
    _one_of("data.kind", data.kind, ("index", "files", "hf"))
    for name in ("recall", "recall_transfer"):
        share = getattr(data, name)
        _require(0 <= share <= 1, f"data.{name}", share, "a share from 0 to 1")
    if data.kind == "hf":
        _require(bool(data.path), "data.path", data.path, "the name of a hub data set, such as allenai/c4")
    if data.kind == "files":
        _check_files(data.path, length)


def _check_files(path: str | None, length: int) -> None:
    """A user's files exist, hold text, and fill one row of `length` tokens (a token is a byte or more)."""
    wanted = f"a file, folder or glob of {', '.join(SUFFIXES)}"
    _require(bool(path), "data.path", path, wanted)
    place = expanded(str(path))
    if place.is_dir():
        found = sorted(file for file in place.rglob("*") if file.suffix in SUFFIXES)
    else:
        found = [Path(name) for name in sorted(glob.glob(str(place), recursive=True)) if Path(name).is_file()]
    _require(bool(found), "data.path", path, f"{wanted} that exists")
    for file in found:
        _require(file.suffix in SUFFIXES, "data.path", str(file), f"files that end in {', '.join(SUFFIXES)}")
        _require(file.stat().st_size > 0, "data.path", str(file), "files that are not empty")
        if file.suffix != ".parquet":
            with file.open("rb") as opened:
                binary = b"\0" in opened.read(1 << 16)
            _require(not binary, "data.path", str(file), "text in UTF-8, not binary data")
    size = sum(file.stat().st_size for file in found)
    _require(
        size >= length,
        "data.path",
        str(path),
        f"text of at least one row of {length} tokens (budget.stage*.length)",
    )


def _check_source(config: Config, run: Path) -> None:
    """The run whose stages are reused trained the same layers of the same model."""
    theirs = load_config(run, "from")
    for part in ("model", "attention", "layers"):
        for key, mine, other in differences(getattr(config, part), getattr(theirs, part), part):
            raise bad_value(
                "from", str(run), f"a run with the same {part}; there {key} is {other!r}, here {mine!r}"
            )
    left = bool(config.running) or config.tunes
    _require(left, "from", str(run), "nothing, where neither a stage nor a tuning is left to do")
    allowed = "stages after 1 where from= gives what came before"
    _require(1 not in config.stages, "stages", config.stages, allowed)


def _facts(model: ModelConfig) -> "ModelFacts":
    from replace.loading import check_model

    return check_model(model)


def _longest(config: Config) -> int:
    """Tokens of the longest training row."""
    budget = config.budget
    tuning = [budget.lora] if config.lora.kind != "none" else []
    stages = (budget.stage1, budget.stage2, budget.stage3, *tuning)
    return max((stage.length for stage in stages if stage.tokens), default=0)
