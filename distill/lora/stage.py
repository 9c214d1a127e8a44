"""The tuning as data for the one training loop: which parameters, which learning rate, which loss."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from distill.lora.peft import trainable
from distill.lora.rows import IGNORED, Packed
from distill.objective import CHUNK
from distill.stages import LORA, Stage, StepResult, final_hidden, head_of
from replace.config import Config
from replace.errors import UserError


def lora_stage(model: PreTrainedModel, config: Config) -> Stage:
    """The stage over whatever is trainable in `model`, which has its adapters.

    Raises:
        UserError: nothing is trainable; in a step, that the loss has no gradient.
    """
    names = trainable(model)
    present = dict(model.named_parameters())
    group = {
        "params": [present[name] for name in names],
        "lr": config.lora.lr,
        "name": "adapters",
        "weight_decay": config.stage.weight_decay,
    }
    if config.stage.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def step(batch: Packed, scale: float | None) -> StepResult:
        total = loss_of(model, batch)
        if not total.requires_grad:
            raise UserError(
                f"the loss of lora has no gradient, although {len(names)} parameters require one "
                f"({names[0]} and others); use lora=peft, or lora.targets that the forward reaches."
            )
        # The loop takes the mean over the parts of a step; a part's share of it is by its learnt tokens.
        loss = total * config.stage.accumulate / max(1, batch.counted)
        if scale is not None:
            (loss * scale).backward()
        return {"loss": float(loss.detach())}

    return Stage(LORA, [group], step, names)


def loss_of(model: PreTrainedModel, batch: Packed) -> Tensor:
    """The sum of the cross-entropies of the learnt tokens, in nats; logits are made chunk by chunk."""
    total = torch.zeros((), device=batch.input_ids.device)
    head = head_of(model)
    for hidden, label in pieces(model, batch):
        total = total + checkpoint(cross_entropies, hidden, label, head, use_reentrant=False).sum()
    return total


def pieces(model: PreTrainedModel, batch: Packed) -> Iterator[tuple[Tensor, Tensor]]:
    """Hidden states `[N, C]` that predict a learnt token, and these `[N]`, at most CHUNK of them at once."""
    inputs = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "use_cache": False}
    hidden = final_hidden(model, inputs)[:, :-1]
    learnt = batch.labels[:, 1:] != IGNORED
    hidden, labels = hidden[learnt], batch.labels[:, 1:][learnt]
    for start in range(0, len(labels), CHUNK):
        yield hidden[start : start + CHUNK], labels[start : start + CHUNK]


def cross_entropies(hidden: Tensor, label: Tensor, head: Callable[[Tensor], Tensor]) -> Tensor:
    """`[N]` in nats."""
    return torch.nn.functional.cross_entropy(head(hidden).float(), label, reduction="none")
