"""Which layer gets what: the config's `layers`, for the attention layers that a model has."""

from torch import nn

from replace.config import Config
from replace.convert import SwapSpec, attention_layers
from replace.validation import selected


def layers_of(model: nn.Module) -> list[int]:
    """The indices of the decoder layers that have attention; some decoders have it in some layers only."""
    return [module.layer_idx for _, module in attention_layers(model)]


def spec_of(config: Config, indices: list[int], measured: list[int] | None = None) -> SwapSpec:
    """`attention` for the selected layers, `layers.rest` for the others.

    Args:
        indices: of `layers_of`.
        measured: the layers that a measurement chose, if `layers` asks for one.
    """
    chosen = selected(config.layers, len(indices)) if measured is None else measured
    assert chosen is not None
    if measured is None and config.layers.select != "list":
        chosen = [indices[place] for place in chosen]
    spec = dict.fromkeys(chosen, config.attention)
    if config.layers.rest != "keep":
        rest = config.attention.shared_with(config.layers.rest)
        spec |= {i: rest for i in indices if i not in spec}
    return SwapSpec(dict(sorted(spec.items())))
