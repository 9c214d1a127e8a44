"""The tuning from top to bottom: choose, adapt, prove, train, save, merge."""

import copy
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distill.lora import peft as by_peft
from distill.lora.card import adapter_card
from distill.lora.choice import Choice, choose, this_machine
from distill.lora.data import filler_of, tuning_data
from distill.lora.held_out import compared, held_out_loss
from distill.lora.proof import probe_logits
from distill.lora.quantised import check_bitsandbytes, quantise, restore_full
from distill.lora.stage import lora_stage
from distill.lora.targets import targets_of
from distill.lora.unsloth import FAILS, adapted_by_unsloth, forget
from distill.trainer import train
from replace import ranks
from replace.config import Config
from replace.corpora import Document
from replace.logger import Logger
from replace.precision import cast_once

logger = logging.getLogger(__name__)


def check_tuning(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[Document],
    config: Config,
) -> None:
    """Refuse at the start of a run what would otherwise be refused after its stages.

    Raises:
        UserError: the chats, their template, the targets or QLoRA are not possible.
    """
    tuning_data(copy.deepcopy(tokenizer), documents, config)  # its template is the tuning's to set
    targets_of(model, config.lora.targets)
    if config.lora.qlora:
        check_bitsandbytes()


def tune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: Config,
    run_dir: Path,
    documents: Sequence[Document],
    log: Logger,
) -> dict[str, Any]:
    """Train adapters on `model`, write `run_dir/adapter`, and merge them into the weights, in place.

    A tuning that was finished before is taken from its checkpoint. The tokenizer gets the chat template that
    was trained on.

    Returns:
        the phase's "training", and its "tuning": what was chosen and why, the held-out loss, and how far the
        merged model's logits are from those with the adapters beside the weights.
    """
    data = tuning_data(tokenizer, documents, config)
    evaluated = config.budget.eval.perplexity_tokens

    def held_out() -> Any:
        return held_out_loss(model, data.held_out, evaluated, filler_of(tokenizer), config.precision)

    model.requires_grad_(False)
    before = held_out()
    targets = targets_of(model, config.lora.targets)
    kept = quantise(model, config.precision) if config.lora.qlora else {}
    wrapped, choice = _adapted(model, tokenizer, config, targets)
    with cast_once(model, config.precision):
        training = train(model, lora_stage(model, config), data.rows, config, run_dir, log)
    if ranks.is_main():
        by_peft.save(wrapped, run_dir / "adapter", adapter_card(config, choice))
    if kept:
        by_peft.unloaded(wrapped)
        forget(model)
        restore_full(model, kept)
        wrapped = PeftModel.from_pretrained(model, str(run_dir / "adapter"))
    beside = probe_logits(model, "fp32")
    by_peft.merged(wrapped)
    forget(model)
    merged = probe_logits(model, "fp32")
    model.requires_grad_(False)
    tuning: dict[str, Any] = {
        "backend": choice.kind,
        "why": choice.why,
        "targets": targets,
        "rank": config.lora.rank,
        "data": data.provenance,
        "held_out": compared(before, held_out()),
        "merge_difference": float((merged - beside).abs().max() / beside.abs().max().clamp_min(1e-6)),
    }
    return {"training": training, "tuning": tuning}


def _adapted(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: Config, targets: list[str]
) -> tuple[PeftModel, Choice]:
    """The model in its wrapper, and who made it; PEFT where Unsloth turns out to bypass a replaced layer."""
    choice = choose(config.lora, this_machine())
    if choice.kind == "unsloth":
        try:
            wrapped = adapted_by_unsloth(model, tokenizer, config, targets)
            logger.info("lora: adapters by Unsloth (%s; no replaced layer is bypassed)", choice.why)
            return wrapped, choice
        except FAILS as error:
            reason = next(iter(str(error).splitlines()), "") or type(error).__name__
            choice = Choice("peft", f"Unsloth cannot adapt this model ({reason}), so the adapters are PEFT's")
            logger.warning("lora: %s", choice.why)
    logger.info("lora: adapters by PEFT (%s)", choice.why)
    return by_peft.adapted(model, config.lora, targets, config.seed), choice
