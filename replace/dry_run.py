"""`dry_run=true`: what a run would do, roughly, from configs alone; no weight is loaded."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from replace.config import AttentionConfig, Config, StageBudget
from replace.errors import bad_value
from replace.launch import asked_for
from replace.loading import ModelFacts, check_model
from replace.machine import device_of_choice, total_memory
from replace.mixer import VARIANTS, BlockMixer, Heads
from replace.ranking import MEASURED, measurements
from replace.ranks import processes, split
from replace.retrieval import EPISODES, LENGTH
from replace.validation import selected

PlanFor = Callable[..., Any]
FP32 = 4
GIB = 2**30
BOOKS = 2
PROBE = 1024
# A model reaches about this share of a large matrix product's speed: small products, norms, softmax, Python.
SHARE_OF_PEAK = 0.6


@dataclass(frozen=True)
class Plan:
    """Counts of a run. `passes` are token-passes in units of one forward through all parameters."""

    new_layers: int
    rest_layers: int
    projections: int
    added: int
    tokens: tuple[int, int, int]
    trained: tuple[int, int, int]
    training_passes: float
    tuned: int = 0


def describe(config: Config, plan_for: PlanFor) -> str:
    """The text that `dry_run=true` prints; `plan_for` is eval's, which this room does not import."""
    facts = check_model(config.model)
    plan = make_plan(config, facts)
    peak = measure_peak()
    per_minute = SHARE_OF_PEAK * peak * 60 / (2 * facts.parameters)  # token-passes
    training, evaluation, choice = (
        plan.training_passes / per_minute,
        evaluation_tokens(config, facts, plan_for) / per_minute,
        choice_passes(config, facts) / per_minute,
    )
    many = processes(config)
    training /= many  # what is measured is dealt out in large pieces, so all of it is counted
    needed, there = memory_bytes(config, facts, plan), memory_of_device(config)
    each = f" on each of {many} devices ({'FSDP2' if _shards(config) else 'DDP'})" if many > 1 else ""
    others = f"{plan.rest_layers} get {config.layers.rest}" if plan.rest_layers else "others keep theirs"
    lines = [
        f"Dry run of {config.experiment} with budget {config.budget.name}; no weight is loaded.",
        f"  model    {config.model.kind}: {facts.family}, {facts.parameters:,} parameters",
        f"  layers   {plan.new_layers} get {config.attention.name} ({_which(config, facts)}), {others}",
    ]
    for number, trained, tokens in zip((1, 2, 3), plan.trained, plan.tokens, strict=True):
        work = f"trains {trained:,} parameters on {tokens:,} tokens" if tokens else "left out"
        work = "left out, since there is nothing to learn" if tokens and not trained else work
        lines.append(f"  stage {number}  {work}")
    if config.lora.kind != "none" and plan.tuned:
        words = f"{config.lora.kind}, rank {config.lora.rank}, {config.lora.data}"
        lines.append(f"  lora     trains adapters on {plan.tuned:,} tokens ({words})")
    total = training + evaluation + choice
    if choice:
        lines.append(f"  choice   {_choosing(config, facts)}, about {choice:.1f} minutes")
    lines += [
        f"  time     about {total:.0f} minutes (training {training:.0f}, evaluation {evaluation:.0f})",
        f"  memory   about {needed / GIB:.1f} GiB of {there / GIB:.1f} GiB{each}",
        f"  disk     about {disk_bytes(config, facts, plan) / GIB:.1f} GiB in the run's folder",
        "All figures are estimates: parameters, memory, disk from shapes in fp32; time from two operations",
        f"a parameter and token, at {SHARE_OF_PEAK:.0%} of a matrix product's speed here just now",
        f"({peak / 1e9:.0f} GFLOP/s). Downloads come on top.",
    ]
    if many > 1:
        lines.append(
            "The devices are taken to be as fast as this one, and what they tell each other to cost nothing."
        )
    return "\n".join(lines)


def refuse_too_large(config: Config) -> None:
    """Refuse, in a dry run, what will not fit into a device; no run itself is held back by an estimate.

    Raises:
        UserError: it will not.
    """
    facts = check_model(config.model)
    needed, there = memory_bytes(config, facts, make_plan(config, facts)), memory_of_device(config)
    if needed <= there:
        return
    last = f"stage{max(config.running, default=1)}"  # a later stage trains more
    last = "lora" if config.tunes and not config.running else last
    batch = getattr(config.budget, last).batch
    remedies = "fewer rows (with stage.accumulate), stage.gradient_checkpointing=true, stages without 3"
    remedies += "" if _shards(config) else ", or FSDP2 (devices.sharding=fsdp2)"
    raise bad_value(
        f"budget.{last}.batch",
        batch,
        f"what fits into the {there / GIB:.1f} GiB of a device, of which about {needed / GIB:.1f} would be "
        f"needed; what helps: {remedies}",
    )


def make_plan(config: Config, facts: ModelFacts) -> Plan:
    """Count layers, parameters and passes of a run."""
    chosen = selected(config.layers, facts.layers)
    new = len(chosen) if chosen is not None else min(config.layers.k, facts.layers)
    rest = 0 if config.layers.rest == "keep" else facts.layers - new
    projections = 2 * facts.hidden * facts.head_dim * (facts.heads + facts.kv_heads)
    added = new * added_parameters(config.attention, config.attention.name, facts)
    added += rest * added_parameters(config.attention, config.layers.rest, facts)
    local = (new + rest) * projections + added
    budgets = (config.budget.stage1, config.budget.stage2, config.budget.stage3)
    tokens = tuple(
        _whole_steps(budget, config.stage.accumulate) if stage in config.stages else 0
        for stage, budget in enumerate(budgets, 1)
    )
    # Stage 1: a teacher's forward and the new layers' work; 2 and 3: two forwards, a backward of 1.5 or 2.
    shares = (1 + 3 * local / facts.parameters, 3.5, 4.0)
    training = sum(count * share for count, share in zip(tokens, shares, strict=True))
    training += sum(
        _held_out_passes(config, budget, count) for budget, count in zip(budgets, tokens, strict=True)
    )
    tuned = _whole_steps(config.budget.lora, config.stage.accumulate) if config.lora.kind != "none" else 0
    training += 2.0 * tuned  # no gradient of the weights that the adapters are beside
    return Plan(
        new_layers=new,
        rest_layers=rest,
        projections=projections,
        added=added,
        tokens=tokens,  # type: ignore[arg-type]  # three of them
        trained=(local if config.stage.lr_projection1 else added, local, facts.parameters + added),
        training_passes=training,
        tuned=tuned,
    )


def _held_out_passes(config: Config, budget: StageBudget, tokens: int) -> float:
    """Token-passes of the dev losses during a stage: two forwards each, one before its first step."""
    every = config.stage.validate_every
    if not every or not tokens:
        return 0.0
    steps = tokens // (budget.batch * config.stage.accumulate * budget.length)
    return 2.0 * (1 + -(-steps // every)) * config.stage.validate_rows * budget.length


def choice_passes(config: Config, facts: ModelFacts) -> float:
    """Token-passes of a choice of layers; 0 where nothing is measured for one."""
    layers, budget = config.layers, config.budget.choice
    many, transfers = measurements(layers, facts.layers)
    projections = 2 * facts.hidden * facts.head_dim * (facts.heads + facts.kv_heads)
    local = facts.layers * (projections + added_parameters(config.attention, config.attention.name, facts))
    looked = EPISODES * LENGTH if layers.select == "retrieval" and layers.ranking is None else 0
    trained = transfers * budget.tokens * (1 + 3 * local / facts.parameters)
    return looked + many * (budget.rows + budget.episodes) * budget.length + trained


def added_parameters(attention: AttentionConfig, variant: str, facts: ModelFacts) -> int:
    """New parameters of one layer: the variant is built without memory for its weights and counted."""
    if variant == "keep":
        return 0
    heads = Heads(facts.heads, facts.kv_heads, facts.head_dim, facts.hidden)
    with torch.device("meta"):
        mixer = VARIANTS.get(variant)(attention.shared_with(variant), heads, None)
    return sum(parameter.numel() for parameter in mixer.parameters())


def evaluation_tokens(config: Config, facts: ModelFacts, plan_for: PlanFor) -> int:
    """Tokens that evaluation reads in all phases: books and recall episodes, each once and per ablation."""
    measured = config.budget.eval
    phases = ["teacher", "swapped", *(f"stage{stage}" for stage in config.running)]
    phases += ["lora"] if config.tunes else []
    total = 0
    for phase in phases:
        parts = {} if phase == "teacher" else _parts(config, facts)
        plan = plan_for(measured, parts, phase=phase, final=phase == phases[-1], dev=True)
        for part in filter(None, (plan, plan.dev)):
            for grid in part.grids:
                lengths = sum(cell.length for cell in grid.cells)
                total += lengths * (grid.episodes + sum(map(grid.episodes_of, grid.ablations)))
            total += BOOKS * measured.perplexity_tokens * (part.perplexity + len(part.perplexity_ablations))
    return total


def _parts(config: Config, facts: ModelFacts) -> dict[str, int]:
    """Layers with a memory and layers with retained pairs, as `eval.ablation.parts_of` counts them."""
    chosen = selected(config.layers, facts.layers)
    new = min(config.layers.k, facts.layers) if chosen is None else len(chosen)
    counts = {config.attention.name: new}
    if config.layers.rest != "keep":
        counts[config.layers.rest] = counts.get(config.layers.rest, 0) + facts.layers - new
    pairs = config.attention.pairs > 0
    sinks = new if config.attention.sinks else 0
    return {
        "sinks": sinks,
        "memory": sum(
            count for name, count in counts.items() if getattr(VARIANTS.get(name), "has_memory", False)
        ),
        "pairs": sum(
            count for name, count in counts.items() if pairs and issubclass(VARIANTS.get(name), BlockMixer)
        ),
    }


def memory_bytes(config: Config, facts: ModelFacts, plan: Plan) -> int:
    """Bytes on one device: weights, originals, the largest stage's gradients and moments, its activations.

    In shards (`distill.sharding`) the decoder's layers are divided, but for one that is put together and the
    next; embeddings and, before stage 3, the replaced attention are not. Between the stages no weight is.
    """
    running = [stage for stage in config.stages if plan.tokens[stage - 1]]
    many, shards = processes(config), _shards(config)
    replaced = plan.new_layers + plan.rest_layers
    originals = replaced * plan.projections
    held = facts.parameters + plan.added + originals
    largest = held
    for stage in running:
        trained = plan.trained[stage - 1]
        teacher = facts.parameters if stage == 3 else 0
        if shards:
            outside = facts.vocab * facts.hidden
            apart = 0 if stage == 3 else originals + plan.added  # the replaced attention
            layers = facts.parameters + plan.added - outside - apart
            gathered = 2 * layers // facts.layers
            weights = outside + apart + layers // many + gathered + originals
            trained = outside + (trained - outside) // many if stage == 3 else trained
            teacher = outside + (teacher - outside) // many if teacher else 0
        else:
            weights = held
        largest = max(largest, weights + teacher + 3 * trained)
    return FP32 * (largest + _activations(config, facts, many))


def _activations(config: Config, facts: ModelFacts, many: int) -> int:
    """Numbers kept for the backward of the rows that one device has at once."""
    rows = 0
    for budget in _budgets(config):
        _, sharing = split(budget.batch, config.stage.accumulate, many)
        rows = max(rows, budget.batch // sharing * budget.length)
    # About 20 tensors of the hidden width a layer, of which checkpointing keeps the first; three of the
    # vocabulary's.
    kept = facts.layers + 20 if config.stage.gradient_checkpointing else 20 * facts.layers
    return rows * (kept * facts.hidden + 3 * facts.vocab)


def memory_of_device(config: Config) -> int:
    """Bytes of the device that is planned for, or that is here."""
    if config.devices.memory:
        return round(config.devices.memory * GIB)
    if device_of_choice().type == "cuda":
        return torch.cuda.get_device_properties(device_of_choice()).total_memory
    return total_memory()


def _shards(config: Config) -> bool:
    """Whether the devices that are planned for shard the model."""
    return config.devices.sharding == "fsdp2" or (not config.devices.processes and asked_for() == "FSDP")


def disk_bytes(config: Config, facts: ModelFacts, plan: Plan) -> int:
    """Bytes of the export and a checkpoint a stage: weights, and two moments of what it trains."""
    model = facts.parameters + plan.added
    checkpoints = sum(
        model + 2 * plan.trained[stage - 1] for stage in config.stages if plan.tokens[stage - 1]
    )
    exports = 2 if plan.tuned else 1  # the base of the adapters, and the merged model
    return FP32 * (exports * model + checkpoints)


def measure_peak(seconds: float = 0.3) -> float:
    """Operations a second of the fastest of some fp32 matrix products, on the device that a run would use."""
    device = device_of_choice()
    matrix = torch.randn(PROBE, PROBE, device=device)
    (matrix @ matrix).sum().item()  # the first one pays for start-up
    best, end = float("inf"), time.perf_counter() + seconds
    while (start := time.perf_counter()) < end:
        (matrix @ matrix).sum().item()
        best = min(best, time.perf_counter() - start)
    return 2 * PROBE**3 / best


def _choosing(config: Config, facts: ModelFacts) -> str:
    """What is measured for a choice of layers, in words."""
    many, transfers = measurements(config.layers, facts.layers)
    budget = config.budget.choice
    words = [f"the teacher's attention in {EPISODES} episodes"] if config.layers.select == "retrieval" else []
    if many:
        tokens = (budget.rows + budget.episodes) * budget.length
        words.append(f"{many} measurements of {tokens:,} tokens of dev text")
        words.append(f"a transfer of {transfers * budget.tokens:,} tokens")
    return " and ".join(words)


def _which(config: Config, facts: ModelFacts) -> str:
    """The chosen layers in words."""
    chosen = selected(config.layers, facts.layers)
    if config.layers.ranking is not None:
        return f"as ranked in {config.layers.ranking}"
    if chosen is None:
        return f"measured first: {MEASURED[config.layers.select]}"
    return "all" if len(chosen) == facts.layers else ", ".join(map(str, chosen))


def _budgets(config: Config) -> list[StageBudget]:
    """Of all that is trained, the adapters too."""
    return [*config.running.values(), *([config.budget.lora] if config.tunes else [])]


def _whole_steps(budget: StageBudget, accumulate: int) -> int:
    """Tokens of a stage, whose last step may exceed the budget."""
    step = max(1, budget.batch * accumulate * budget.length)
    return -(-budget.tokens // step) * step
