"""Swap, restore, and the guards that make a swap trustworthy."""

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig

from replace.config import AttentionConfig
from replace.errors import UserError
from replace.layer import AttentionModule, ReplacedAttention, become_replaced, heads_of
from replace.mixer import VARIANTS
from replace.rotary import RotarySpec, family_rotation, measure_rotary, unrotate

logger = logging.getLogger(__name__)

IDENTITY_LIMIT = 1e-3
"""Largest difference of logits, relative to their largest magnitude, of an identity swap in fp32."""


@dataclass
class SwapSpec:
    """Which layer gets which variant, in plain values that JSON can hold.

    Attributes:
        layers: decoder layer index -> options of its variant; layers that are not named keep their attention.
        rotary: decoder layer index -> measured rotary encoding; filled by `swap`, given again by an export.
    """

    layers: dict[int, AttentionConfig]
    rotary: dict[int, RotarySpec | None] = field(default_factory=dict)

    def to_json(self) -> dict:
        """Plain dicts."""
        return {
            "layers": {str(i): asdict(options) for i, options in self.layers.items()},
            "rotary": {str(i): None if r is None else asdict(r) for i, r in self.rotary.items()},
        }

    @classmethod
    def from_json(cls, data: dict) -> "SwapSpec":
        """The inverse of `to_json`."""
        return cls(
            {int(i): AttentionConfig(**options) for i, options in data["layers"].items()},
            {int(i): None if r is None else RotarySpec(**r) for i, r in data.get("rotary", {}).items()},
        )


@dataclass
class Replacement:
    """What became of one layer, for the report."""

    layer: int
    path: str
    old_class: str
    new_class: str
    variant: str
    parameters: int
    new_parameters: int


@dataclass
class Conversion:
    """What a swapped model carries along: its spec, the report, and the frozen originals if kept."""

    spec: SwapSpec
    replacements: list[Replacement]
    originals: dict[int, nn.Module]


def attention_layers(model: nn.Module) -> list[tuple[str, AttentionModule]]:
    """The self-attention modules of a decoder, `(path, module)`, in the order of their layers.

    Raises:
        UserError: none is found.
    """
    found: list[tuple[str, AttentionModule]] = [
        (path, module)
        for path, module in model.named_modules()
        if "Attention" in type(module).__name__
        and isinstance(getattr(module, "layer_idx", None), int)
        and isinstance(getattr(module, "config", None), PreTrainedConfig)
        and "cross" not in path
    ]
    if not found:
        raise UserError(
            f"{type(model).__name__} has no attention layer that goes through transformers' "
            "attention interface."
        )
    return sorted(found, key=lambda item: item[1].layer_idx)


def parent_of(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The module that holds `path`, and the attribute's name."""
    head, _, name = path.rpartition(".")
    return model.get_submodule(head), name


def conversion_of(model: nn.Module) -> Conversion:
    """The conversion that a swapped model carries.

    Raises:
        UserError: the model was not swapped.
    """
    conversion = getattr(model, "layer_replace", None)
    if conversion is None:
        raise UserError(f"this {type(model).__name__} has no replaced layers; call swap(model, spec) first.")
    return conversion


def swap(
    model: PreTrainedModel, spec: SwapSpec, *, keep_originals: bool = False, guard: bool = True
) -> Conversion:
    """Replace the attention of the layers that `spec` names, in place.

    Args:
        model: a decoder that transformers loaded.
        keep_originals: keep frozen copies of the old attention layers, for `teacher_attention` and `restore`.
        guard: check on a probe that capturing changes nothing and that un-rotating is exact (off only where
            an export that was checked when it was made is loaded).

    Raises:
        UserError: a layer does not exist or cannot be captured, an option is refused, or the model is swapped
            already; it is then as it was.
    """
    layers = attention_layers(model)
    by_index = {module.layer_idx: (path, module) for path, module in layers}
    if not spec.layers:
        raise UserError("layers={} names no layer to replace; allowed: at least one decoder layer.")
    if getattr(model, "layer_replace", None) is not None:
        raise UserError("this model is already swapped; call restore(model) before another swap.")
    for index in spec.layers:
        if index not in by_index:
            raise UserError(
                f"layers={index} is not possible; allowed: {min(by_index)} to {max(by_index)} for this model."
            )
    if guard:
        spec.rotary = _probe(model, [by_index[i][1] for i in spec.layers])
        _identity_guard(model, {i: by_index[i] for i in spec.layers})
    made = {}  # all of them before the first layer changes, because an option may be refused
    for index, options in sorted(spec.layers.items()):
        module = by_index[index][1]
        mixer = VARIANTS.get(options.name)(options, heads_of(module), spec.rotary.get(index))
        made[index] = mixer.to(device=next(module.parameters()).device)
    originals, replacements = {}, []
    for index, mixer in made.items():
        path, module = by_index[index]
        if keep_originals:
            original = copy.deepcopy(module, {id(module.config): module.config})  # it follows the model's
            originals[index] = original.requires_grad_(False)
        old_class, old_parameters = type(module).__name__, sum(p.numel() for p in module.parameters())
        become_replaced(module, mixer)
        new = sum(p.numel() for p in mixer.parameters())
        replacements.append(
            Replacement(
                *(index, path, old_class, type(module).__name__, spec.layers[index].name),
                *(old_parameters + new, new),
            )
        )
    conversion = Conversion(spec, replacements, originals)
    model.layer_replace = conversion  # type: ignore[assignment]  # not a Tensor or Module
    logger.info("replaced %d of %d attention layers", len(replacements), len(layers))
    return conversion


def restore(model: PreTrainedModel) -> None:
    """Undo `swap`: the old classes and configs come back, and the old weights where they were kept.

    Raises:
        UserError: the model was not swapped.
    """
    conversion = conversion_of(model)
    for path, module in attention_layers(model):
        if not isinstance(module, ReplacedAttention):
            continue
        index = module.layer_idx
        parent, name = parent_of(model, path)
        if index in conversion.originals:
            original = _beside(module, conversion.originals[index]).train(module.training)
            setattr(parent, name, original.requires_grad_(True))
        else:
            module.__class__ = type(module).__mro__[2]
            module.config = model.config.get_text_config(decoder=True)
            del module.mixer
    del model.layer_replace


def _beside(module: nn.Module, original: nn.Module) -> nn.Module:
    """The kept original, which does not move with the model, on the replaced layer's device and dtype."""
    here, there = next(module.parameters()), next(original.parameters())
    if (here.device, here.dtype) != (there.device, there.dtype):
        original.to(here.device, here.dtype)
    return original


@contextmanager
def teacher_attention(model: PreTrainedModel) -> Iterator[None]:
    """Within the block the frozen originals attend again: the teacher, without a second model.

    Raises:
        UserError: the originals were not kept.
    """
    conversion = conversion_of(model)
    if not conversion.originals:
        raise UserError("the teacher's attention layers were not kept; swap with keep_originals=True.")
    places = []
    for path, module in attention_layers(model):
        if isinstance(module, ReplacedAttention):
            places.append((*parent_of(model, path), module))
    try:
        for parent, name, module in places:
            setattr(parent, name, _beside(module, conversion.originals[module.layer_idx]))
        yield
    finally:
        for parent, name, module in places:
            setattr(parent, name, module)


@contextmanager
def at_rest(model: nn.Module) -> Iterator[None]:
    """No dropout within the block: what the teacher says must not be noisy."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def mixers(model: nn.Module) -> dict[int, nn.Module]:
    """The mixers of the replaced layers by layer index."""
    return {m.layer_idx: m.mixer for _, m in attention_layers(model) if isinstance(m, ReplacedAttention)}


@torch.no_grad()
def _probe(model: PreTrainedModel, modules: list[AttentionModule]) -> dict[int, RotarySpec | None]:
    """Read each layer's rotary encoding off what its forward is given; check that un-rotating is exact."""
    seen: dict[int, tuple[Tensor, Tensor] | None] = {}
    precise: dict[int, tuple[Tensor, Tensor]] = {}

    def look(module: AttentionModule, args: tuple, kwargs: dict) -> None:
        tables = kwargs.get("position_embeddings")
        seen[module.layer_idx] = None if tables is None else precise.get(id(tables[0]), tables)

    def compute_precisely(module: nn.Module, args: tuple, kwargs: dict, tables: object) -> None:
        # Families round their tables to the model's dtype; angles read off bf16 tables would be wrong by
        # radians at position 512.
        if isinstance(tables, tuple) and len(tables) == 2 and args:
            precise[id(tables[0])] = module.forward(args[0].float(), *args[1:], **kwargs)
            kept.append(tables)

    kept: list[object] = []  # so that no id is used twice
    hooks = [m.register_forward_pre_hook(look, with_kwargs=True) for m in modules]
    hooks += [
        m.register_forward_hook(compute_precisely, with_kwargs=True)
        for m in model.modules()
        if "RotaryEmbedding" in type(m).__name__
    ]
    try:
        model(input_ids=probe_ids(model), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    specs: dict[int, RotarySpec | None] = {}
    for module in modules:
        name = type(module).__name__
        if module.layer_idx not in seen:
            raise UserError(
                f"{name} in layer {module.layer_idx} is not called by the model's forward, "
                "so it cannot be replaced."
            )
        tables, function = seen[module.layer_idx], family_rotation(module)
        if tables is None or function is None:
            specs[module.layer_idx] = None
            continue
        dim = heads_of(module).dim
        specs[module.layer_idx] = measure_rotary(function, *tables, dim)
        cos, sin = (t[:1].float() for t in tables)
        x = torch.randn(1, 2, cos.shape[1], dim, generator=torch.Generator().manual_seed(0)).to(cos.device)
        width = min(cos.shape[-1], dim)
        turned = torch.cat([function(x[..., :width], x[..., :width], cos, sin)[0], x[..., width:]], dim=-1)
        error = float((unrotate(function, turned, turned, cos, sin)[0] - x).abs().max())
        if not error < 1e-4:
            raise UserError(
                f"un-rotating the queries of {name} is off by {error:.1e}; "
                "this rotary encoding cannot be replaced."
            )
    return specs


def probe_ids(model: PreTrainedModel, length: int = 24) -> Tensor:
    """`[1, length]` fixed token ids that every vocabulary has."""
    vocab = model.config.get_text_config(decoder=True).vocab_size
    ids = (torch.arange(length) * 7919 + 11) % max(2, vocab - 1)
    return ids.unsqueeze(0).to(model.device)


@torch.no_grad()
def _identity_guard(model: PreTrainedModel, layers: dict[int, tuple[str, AttentionModule]]) -> None:
    """Capture with the teacher's own softmax must give the teacher's logits, or it cannot be trusted.

    Raises:
        UserError: it does not; the model is as it was.
    """
    ids = probe_ids(model)
    with at_rest(model):
        want = model(input_ids=ids, use_cache=False).logits.float()
    kept = {index: (type(module), module.config) for index, (_, module) in layers.items()}
    try:
        for _, module in layers.values():
            become_replaced(module, VARIANTS.get("identity")(None, heads_of(module), None))
        with at_rest(model):
            got = model(input_ids=ids, use_cache=False).logits.float()
        silent = [i for i, (_, module) in layers.items() if module.mixer.calls != 1]
    finally:
        for index, (_, module) in layers.items():
            module.__class__, module.config = kept[index]
            if hasattr(module, "mixer"):
                del module.mixer
    if silent:
        raise UserError(
            f"layers {silent} of {type(model).__name__} bypass the capture, so they cannot be replaced."
        )
    error = float((got - want).abs().max() / want.abs().max().clamp_min(1e-6))
    limit = IDENTITY_LIMIT if next(model.parameters()).dtype == torch.float32 else 5e-2
    if not error < limit:
        raise UserError(
            f"capturing {type(model).__name__} changes its logits by {error:.1e} of their size "
            f"(limit {limit:.0e}), so this family cannot be replaced."
        )
    logger.info("identity swap: logits differ by %.1e of their size", error)
