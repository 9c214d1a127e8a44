"""A decoder whose layers are replaced as soon as it is built: what is the same in every export."""

from transformers import PreTrainedModel

from replace.convert import SwapSpec, swap


def convert(model: PreTrainedModel, spec: SwapSpec) -> None:
    """Replace the layers that `spec` names in a model without weights, before `from_pretrained` fills it.

    No guard runs: there may be no memory behind the tensors yet, and the swap was checked when it was made.
    The mixers' parameters are read as fp32 whatever dtype is asked for: they are few, they decide what is
    kept, and their state is fp32 anyway.
    """
    conversion = swap(model, spec, guard=False)
    paths = {f"{done.path}.mixer" for done in conversion.replacements}
    model._keep_in_fp32_modules_strict = set(model._keep_in_fp32_modules_strict or ()) | paths


class ReplacedModel:
    """Mixed into a family's model class; the spec is in `config.replacement`."""

    def __init__(self, config, *args, **kwargs) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]  # the family's
        convert(self, SwapSpec.from_json(config.replacement))  # type: ignore[arg-type]  # once mixed in
