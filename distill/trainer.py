"""The one training loop: every stage is data for it."""

import json
import logging
import math
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from tqdm import tqdm

from distill.checkpoint import Progress, load_stage, load_step, save_stage, save_step
from distill.dev import Dev, DevRows
from distill.sharding import clip_gradients, in_shards
from distill.stages import LORA, NAMES, Stage, StepResult
from distill.watch import Watch
from replace import ranks
from replace.config import Config
from replace.convert import mixers
from replace.errors import UserError
from replace.files import atomic_write
from replace.interrupt import Hold, held
from replace.logger import Logger
from replace.precision import autocast, cast_once, dtype_of

logger = logging.getLogger(__name__)

LOG_EVERY = 5
"""Steps between two lines of train.jsonl."""


class Rows(Protocol):
    """The rows of one stage: `distill.data.Mixture`, or those of the adapters."""

    @property
    def steps(self) -> int:
        """Optimizer steps of the stage."""

    def batch(self, step: int, accumulate: int = 1, part: int = 0) -> Any:
        """The rows of a step, or of one of its parts: with `input_ids`, `rows(slice)`
        and `to(device)`."""


def learning_rate(step: int, steps: int, warmup: float) -> float:
    """The factor on all learning rates: linear warmup over a share of the steps, then a cosine to a tenth."""
    rise = max(1, round(steps * warmup))
    if step < rise:
        return (step + 1) / rise
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def counts(model: nn.Module) -> tuple[int, int]:
    """Clamped and non-finite memory updates so far, over all replaced layers."""
    counting = mixers(model).values()
    clamped = sum(int(getattr(mixer, "clamped", 0)) for mixer in counting)
    nonfinite = sum(int(getattr(mixer, "nonfinite", 0)) for mixer in counting)
    return clamped, nonfinite


def _counted(model: nn.Module, device: torch.device) -> tuple[int, int]:
    """`counts` of all ranks together."""
    sums = ranks.sum_figures(dict(zip(("clamped", "nonfinite"), counts(model), strict=True)), device)
    return int(sums["clamped"]), int(sums["nonfinite"])


def vocabulary_of(model: nn.Module) -> int | None:
    """Tokens that the model tells apart, where its config says so."""
    config = getattr(model, "config", None)
    return None if config is None else config.get_text_config(decoder=True).vocab_size


def train(
    model: nn.Module,
    stage: Stage,
    mixture: Rows,
    config: Config,
    run_dir: Path,
    log: Logger,
    held_out: DevRows | None = None,
) -> dict:
    """Run one stage, or what is left of it.

    Args:
        held_out: rows on which its loss is measured in between, see `distill.dev`.

    Returns:
        the phase's "training" figures.

    Raises:
        UserError: `stage.max_skipped` steps in a row had a non-finite loss or gradient.
        Stopped: a signal came; the step it came in is finished and kept.
    """
    folder = run_dir / "checkpoints" / stage.phase
    finished = load_stage(folder, model)
    if finished is not None:
        logger.info("%s is finished already and is taken from its checkpoint", stage.title)
        return finished["training"]
    if stage.idle is not None:
        return _left_out(model, stage, folder)
    with held() as hold:
        dev = Dev(model, stage, held_out or DevRows(), config, folder, log)
        rows = getattr(config.budget, stage.phase).batch
        # A shard is gathered in the dtype that it has.
        cast = nullcontext() if in_shards(model) else cast_once(model, config.precision)
        with cast, ranks.teamed(rows, config.stage.accumulate) as team:
            training = _steps(model, stage, mixture, config, run_dir, log, hold, team, dev)
        save_stage(folder, stage.names, model, {"training": training})
        _share_signal(hold)
    return training


def _share_signal(hold: Hold) -> None:
    """A signal to one rank ends all of them, after the same step."""
    hold.code = ranks.maximum(hold.code or 0) or None


def _left_out(model: nn.Module, stage: Stage, folder: Path) -> dict:
    """A stage that has nothing to learn counts as finished, so that others can begin after it."""
    logger.warning("%s; it is left out", stage.idle)
    training: dict[str, Any] = {"tokens": 0, "skipped_steps": 0, "clamped": 0, "nonfinite": 0}
    training |= {"loss_first": None, "loss_last": None, "why": stage.idle}
    save_stage(folder, stage.names, model, {"training": training})
    return training


def _steps(
    model: nn.Module,
    stage: Stage,
    mixture: Rows,
    config: Config,
    run_dir: Path,
    log: Logger,
    hold: Hold,
    team: ranks.Team,
    dev: Dev,
) -> dict:
    """The steps that are left of a stage; returns its counters."""
    options, folder = config.stage, run_dir / "checkpoints" / stage.phase
    device = next(model.parameters()).device
    # One group may hold shards beside what is whole, which no fused form takes.
    optimizer = torch.optim.AdamW(
        stage.groups, betas=(0.9, 0.99), foreach=False if in_shards(model) else None
    )
    base = [group["lr"] for group in optimizer.param_groups]
    # Half precision's range is too small for gradients as they are; bf16 and fp32 need no scaling.
    half = dtype_of(config.precision, device) == torch.float16
    steps, progress = mixture.steps, load_step(folder, stage.names, model, optimizer) or Progress(0, {})
    forget_steps(run_dir, stage.number, progress.step)
    counters = {"skipped_steps": 0, "clamped": 0, "nonfinite": 0, "tokens": 0} | progress.counters
    scaler = torch.amp.GradScaler(device.type, enabled=half)
    scaler.load_state_dict(counters.pop("scaler", scaler.state_dict()))
    scaler.scale(torch.zeros((), device=device))  # sets it up: the stages multiply by its scale themselves
    start_counts, carried = _counted(model, device), (counters["clamped"], counters["nonfinite"])
    watch = Watch(stage.title, steps, vocabulary_of(model), counters.setdefault("patterns", {}))
    watch.go_on(counters.pop("watched", {}))
    skipped_in_row, began, tokens_begun = 0, time.perf_counter(), counters["tokens"]
    trainable = [p for group in optimizer.param_groups for p in group["params"]]
    ranks.broadcast(trainable)
    model.train()
    dev.begin(counters.pop("dev", None), progress.step)
    bar = tqdm(
        range(progress.step, steps),
        initial=progress.step,
        total=steps,
        desc=f"{stage.title}: {NAMES[stage.number]}",
        leave=False,
    )
    last: StepResult = {}
    for step in bar:
        # A step's random numbers depend on seed, stage, step and rank alone, so there is no state of them to
        # keep, and no rank drops out what another does.
        torch.manual_seed(((config.seed << 2) + stage.number << 28) + step ^ ranks.rank() << 48)
        factor = learning_rate(step, steps, options.warmup)
        for group, rate in zip(optimizer.param_groups, base, strict=True):
            group["lr"] = rate * factor
        parts: list[StepResult] = []
        for part in team.parts(options.accumulate):
            rows = mixture.batch(step, options.accumulate, part)
            batch = rows.rows(team.share(len(rows.input_ids))).to(device)
            with autocast(config.precision, device):
                parts.append(stage.step(batch, scaler.get_scale() / options.accumulate))
            counters["tokens"] += rows.input_ids.numel() * team.teams
        shares = {key: sum(part[key] for part in parts) / options.accumulate for key in parts[0]}
        last = ranks.sum_figures(shares, device)
        ranks.sum_gradients(trainable)
        scaler.unscale_(optimizer)
        norm = clip_gradients(trainable, options.clip)
        healthy = math.isfinite(norm) and math.isfinite(last["loss"])
        if healthy:
            scaler.step(optimizer)
            skipped_in_row = 0
        else:
            counters["skipped_steps"] += 1
            # A loss that is finite while its scaled gradient is not: the scaler is still finding its scale.
            searching = math.isfinite(last["loss"]) and scaler.get_scale() > 1
            skipped_in_row += not searching
            healthy = searching
            logger.warning(
                "%s, step %d: loss %s, gradient norm %s; the step is skipped",
                stage.title,
                step,
                last["loss"],
                norm,
            )
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        now = _counted(model, device)
        counters["clamped"] = carried[0] + now[0] - start_counts[0]
        counters["nonfinite"] = carried[1] + now[1] - start_counts[1]
        watch(step, last, norm, finite=healthy and not counters["nonfinite"])
        if skipped_in_row >= options.max_skipped:
            raise UserError(
                f"{stage.title} skipped {skipped_in_row} steps in a row for a non-finite loss or gradient; "
                f"lower its learning rates ({'lora.lr' if stage.number == LORA else 'stage.lr_*'}) or "
                "attention.clamp, or use precision=fp32."
            )
        counters.setdefault("loss_first", last["loss"])
        counters["loss_last"] = last["loss"]
        bar.set_postfix(loss=f"{last['loss']:.3f}")
        found = dev(step + 1, steps, counters["tokens"])
        if step % LOG_EVERY == 0 or step == steps - 1 or found is not None:
            rate = (counters["tokens"] - tokens_begun) / max(1e-9, time.perf_counter() - began)
            _log_step(run_dir, log, stage, step, last, counters, base[0] * factor, rate, found)
        _share_signal(hold)
        if dev.stopped:
            break
        due = (step + 1) % options.checkpoint_every == 0 or hold.code is not None
        if due and step + 1 < steps:
            kept = {"scaler": scaler.state_dict(), "watched": watch.state(), "dev": dev.losses}
            save_step(folder, stage.names, model, optimizer, Progress(step + 1, counters | kept))
            hold.end()
    return counters | dev.close()


def forget_steps(run_dir: Path, stage: int, step: int) -> None:
    """Drop what an interrupted try logged after the checkpoint from which the stage goes on."""
    path = run_dir / "train.jsonl"
    if not ranks.is_main() or not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:  # the line in which the run was killed
            continue
        number = LORA if entry["stage"] == "lora" else entry["stage"]
        if number != stage or entry["step"] < step:
            kept.append((number, entry["step"], line))
    # In order also where a stage was done again, since its last checkpoint was damaged.
    atomic_write(path, "".join(f"{line}\n" for *_, line in sorted(kept)))


def _log_step(
    run_dir: Path,
    log: Logger,
    stage: Stage,
    step: int,
    losses: StepResult,
    counters: dict,
    rate: float,
    speed: float,
    dev_loss: float | None,
) -> None:
    """One line of train.jsonl; its losses go to the logger too."""
    line = {
        "stage": "lora" if stage.number == LORA else stage.number,
        "step": step,
        "tokens": counters["tokens"],
        "loss": losses["loss"],
        "losses": {key: value for key, value in losses.items() if key != "loss"},
        "lr": rate,
        "tokens_per_second": round(speed, 1),
        "skipped": counters["skipped_steps"],
        "clamped": counters["clamped"],
        "nonfinite": counters["nonfinite"],
    }
    if dev_loss is not None:
        line["dev_loss"] = dev_loss
    if not ranks.is_main():
        return
    with (run_dir / "train.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    log.log(
        {f"{stage.phase}/{key}": value for key, value in line["losses"].items()}
        | {f"{stage.phase}/loss": losses["loss"]},
        counters["tokens"],
    )
