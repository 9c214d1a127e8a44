"""Adapters by PEFT: made, saved, merged."""

import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig as PeftLora
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from replace.config import LoraConfig
from replace.errors import UserError
from replace.files import atomic_folder, atomic_write


def adapted(model: PreTrainedModel, options: LoraConfig, targets: list[str], seed: int) -> PeftModel:
    """`model` with adapters in place; it keeps its identity, the result is a wrapper around it.

    The adapters depend on `seed` alone, not on what drew random numbers before.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return get_peft_model(model, config_of(options, targets))  # type: ignore[return-value]


def config_of(options: LoraConfig, targets: list[str]) -> PeftLora:
    """PEFT's own config."""
    bias: Any = options.bias
    return PeftLora(
        task_type="CAUSAL_LM",
        r=options.rank,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        bias=bias,
        use_rslora=options.rslora,
        use_dora=options.dora,
        target_modules=targets,
    )


def trainable(model: nn.Module) -> list[str]:
    """Names of the parameters that learn.

    Raises:
        UserError: there are none.
    """
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not names:
        raise UserError(
            "lora has nothing to train: no adapter parameter requires a gradient; allowed: lora.targets that "
            "name linear modules, and a library that leaves their adapters trainable (lora=peft)."
        )
    return names


def save(wrapped: PeftModel, folder: Path, card: str) -> None:
    """Write the adapter as PEFT reads it back, with a README of ours; whole or not at all.

    PEFT would note the folder that the base was read from, which is of no use elsewhere.
    """
    with atomic_folder(folder) as temporary:
        wrapped.save_pretrained(str(temporary), save_embedding_layers=False)
        path = temporary / "adapter_config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        config["base_model_name_or_path"] = None
        atomic_write(path, json.dumps(config, indent=2, sort_keys=True) + "\n")
        atomic_write(temporary / "README.md", card)


def merged(wrapped: PeftModel) -> PreTrainedModel:
    """The model with its adapters added to the weights and gone; it is the object that was adapted."""
    return _bare(wrapped.merge_and_unload())


def unloaded(wrapped: PeftModel) -> PreTrainedModel:
    """The model without its adapters, as it was before."""
    return _bare(wrapped.unload())


def _bare(model: Any) -> PreTrainedModel:
    """Without what PEFT leaves on a model, so that it can be adapted again."""
    if hasattr(model, "peft_config"):
        del model.peft_config
    return model
