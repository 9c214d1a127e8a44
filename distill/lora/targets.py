"""Which linear modules get an adapter."""

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from replace.errors import bad_value

ALL = "all-linear"


def targets_of(model: PreTrainedModel, wanted: list[str]) -> list[str]:
    """The modules that `wanted` names, as PEFT takes them: leaf names where these name nothing else.

    Modules of a mixer are left out: they are small, new, and trained in full by the stages before. So is the
    output embedding, whose logits the losses make in pieces from its bare weight.

    Raises:
        UserError: one of the names matches nothing; the sentence lists what there is.
    """
    there = linear_modules(model)
    leaves = sorted({name.rpartition(".")[2] for name in there})
    for name in wanted:
        if name != ALL and not any(_matches(one, name) for one in there):
            allowed = f"{ALL}, or names among {', '.join(leaves)}, the linear modules of the decoder layers"
            raise bad_value("lora.targets", name, allowed)
    if not there:
        raise bad_value("lora", "peft", "none, since no decoder layer of this model has a linear module")
    chosen = [one for one in there if ALL in wanted or any(_matches(one, name) for name in wanted)]
    short = sorted({name.rpartition(".")[2] for name in chosen})
    reached = [name for name, _ in model.named_modules() if any(_matches(name, leaf) for leaf in short)]
    return short if sorted(reached) == sorted(chosen) else chosen


def linear_modules(model: PreTrainedModel) -> list[str]:
    """Full names of the linear modules of the decoder layers, those of mixers left out."""
    head = model.get_output_embeddings()
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head and ".mixer." not in name
    ]


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")
