"""The continued teacher: the unswapped model on the tokens of stages 2 and 3.

Text of one kind adapts any model that is trained on it. What a student owes to that, and not to its new
attention, shows beside a teacher that got the same rows: the same parameters as far as it has them, the same
rates, and of the objective the cross-entropy, since its distance to itself is nothing.
"""

import torch
from torch import nn
from transformers import PreTrainedModel

from distill.data import Batch
from distill.objective import language_loss
from distill.stages import Stage, StepResult, final_hidden, head_of
from replace.config import Config
from replace.convert import attention_layers


def continued_stage(model: PreTrainedModel, config: Config, number: int, layers: list[int]) -> Stage | None:
    """Stage 2 (the attention of `layers`) or 3 (all parameters) of an unswapped model.

    Args:
        layers: indices of the layers that the student has replaced.

    Returns:
        None where the learning rate of these parameters is 0.
    """
    rate = config.stage.lr_projection2 if number == 2 else config.stage.lr_stage3
    if not rate:
        return None
    attention = {
        id(p)
        for _, module in attention_layers(model)
        if module.layer_idx in layers
        for p in module.parameters()
    }
    names: list[str] = []
    parameters: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(number == 3 or id(parameter) in attention)
        if parameter.requires_grad:
            names.append(name)
            parameters.append(parameter)
    if config.stage.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def step(batch: Batch, scale: float | None) -> StepResult:
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.padding, "use_cache": False}
        head = head_of(model)
        with torch.set_grad_enabled(scale is not None):
            hidden = final_hidden(model, inputs)
        loss = language_loss(hidden, None, head, head, batch.input_ids, batch.answers, batch.padding, "ce")
        if scale is not None:
            (loss.total * scale).backward()
        return {"loss": float(loss.total.detach()), "kl": 0.0, "ce": loss.ce, "answers": loss.answers}

    decay = config.stage.weight_decay
    return Stage(
        number, [{"params": parameters, "lr": rate, "name": "all", "weight_decay": decay}], step, names
    )
