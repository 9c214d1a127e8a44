"""Adapters by Unsloth, on the swapped model and in this process.

Unsloth's own loading replaces the forward of a family's attention class, which a replaced layer calls; a
model that it did not load keeps that forward, and gets what its `get_peft_model` does: adapters, and on a GPU
the fused MLP and projections. Whether the replaced layers are still gone through is proven each time.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distill.lora.patching import import_unsloth, quiet
from distill.lora.proof import Bypassed, probe_logits, prove
from replace.config import Config

FAILS = (
    Bypassed,
    ImportError,
    NotImplementedError,
    RuntimeError,
    AttributeError,
    TypeError,
    ValueError,
    KeyError,
)
"""How Unsloth says that a model is not for it; the model is then as it was and PEFT takes over."""


def adapted_by_unsloth(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: Config, targets: list[str]
) -> Any:
    """`model` with Unsloth's adapters, proven; a PEFT wrapper.

    Raises:
        FAILS: it cannot be adapted, or is bypassed; the model is then as it was.
    """
    options = config.lora
    before = probe_logits(model, config.precision)
    told: Any = model
    fast: Any = import_unsloth().FastLanguageModel
    wrapped = None
    with _undone_on_failure(model), torch.random.fork_rng():
        told._saved_temp_tokenizer = tokenizer  # what its loading would have left there
        told.max_seq_length = config.budget.lora.length
        with quiet():
            wrapped = fast.get_peft_model(
                model,
                r=options.rank,
                lora_alpha=options.alpha,
                lora_dropout=0.0,
                bias="none",
                target_modules=targets,
                use_rslora=options.rslora,
                use_gradient_checkpointing="unsloth" if config.stage.gradient_checkpointing else False,
                random_state=config.seed,
                max_seq_length=config.budget.lora.length,
            )
        prove(model, before, config.precision)
    return wrapped


@contextmanager
def _undone_on_failure(model: PreTrainedModel) -> Iterator[None]:
    """Leave the model as it was if the block fails: modules, their attributes, what requires a gradient.

    Attributes of the config that training changes are put back in any case.
    """
    modules = dict(model.named_modules())
    attributes = {name: set(vars(module)) for name, module in modules.items()}
    learning = {id(parameter): parameter.requires_grad for parameter in model.parameters()}
    use_cache = model.config.use_cache
    try:
        yield
    except FAILS:
        for name, module in modules.items():
            for extra in set(vars(module)) - attributes[name]:
                delattr(module, extra)
            parent, _, leaf = name.rpartition(".")
            if name and getattr(modules[parent], leaf) is not module:
                setattr(modules[parent], leaf, module)
        for parameter in model.parameters():
            parameter.requires_grad_(learning[id(parameter)])
        raise
    finally:
        model.config.use_cache = use_cache


def forget(model: nn.Module) -> None:
    """Take off what Unsloth leaves on modules once the adapters are merged, so that a plain model remains."""
    for module in model.modules():
        for name in [name for name in vars(module) if name in LEFT]:
            delattr(module, name)


LEFT = (
    "forward",
    "apply_qkv",
    "apply_o",
    "max_seq_length",
    "for_training",
    "for_inference",
    "_saved_temp_tokenizer",
    "save_pretrained_merged",
    "push_to_hub_merged",
    "save_pretrained_gguf",
    "generate",
)
"""Attributes that it sets on instances, in front of their classes' own."""
