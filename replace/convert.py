"""Swap, restore, and the guards that make a swap trustworthy."""

import copy
import inspect
import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig

from replace.config import AttentionConfig
from replace.errors import UserError, bad_value
from replace.families import NOT_CAPTURED
from replace.layer import AttentionModule, ReplacedAttention, become_replaced, heads_of, own_window
from replace.mixer import VARIANTS, Call, Heads
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
    """What a swapped model carries along: its spec, the report, and the frozen originals if kept.

    Attributes:
        trainable: decoder layer index -> names of the parameters of a kept original that were not frozen.
    """

    spec: SwapSpec
    replacements: list[Replacement]
    originals: dict[int, nn.Module]
    trainable: dict[int, set[str]] = field(default_factory=dict)


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
    family = model.config.get_text_config(decoder=True).model_type
    if family in NOT_CAPTURED:
        allowed = f"a family whose attention can be captured, none of {', '.join(NOT_CAPTURED)}"
        raise bad_value("model.family", family, allowed)
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
    originals, trainable, replacements = {}, {}, []
    for index, mixer in made.items():
        path, module = by_index[index]
        if keep_originals:
            original = copy.deepcopy(module, {id(module.config): module.config})  # it follows the model's
            trainable[index] = {name for name, p in original.named_parameters() if p.requires_grad}
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
    conversion = Conversion(spec, replacements, originals, trainable)
    model.layer_replace = conversion  # type: ignore[assignment]  # not a Tensor or Module
    logger.info("replaced %d of %d attention layers", len(replacements), len(layers))
    return conversion


def restore(model: PreTrainedModel) -> None:
    """Undo `swap`: the old classes and configs come back, and the old weights where they were kept.

    Kept weights come back as trainable or frozen as they were.

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
            for key, parameter in original.named_parameters():
                parameter.requires_grad_(key in conversion.trainable[index])
            setattr(parent, name, original)
        else:
            module.__class__ = type(module).__mro__[2]
            module.config = model.config.get_text_config(decoder=True)
            del module.mixer
    del model.layer_replace


def _beside(module: nn.Module, original: nn.Module) -> nn.Module:
    """The kept original, which does not move with the model, on the replaced layer's device and dtype."""
    here, there = next(module.parameters()), next(original.parameters())
    # Within autocast the module may show its weights rounded (`cast_once`); the original must not become so.
    dtype = there.dtype if torch.is_autocast_enabled(here.device.type) else here.dtype
    if (here.device, dtype) != (there.device, there.dtype):
        original.to(here.device, dtype)
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


@contextmanager
def uncounted(model: nn.Module) -> Iterator[None]:
    """Calls, clamped and non-finite updates within the block do not count."""
    names = ("calls", "clamped", "nonfinite")
    held: dict[nn.Module, dict[str, Any]] = {
        module.mixer: {name: vars(module.mixer)[name] for name in names if name in vars(module.mixer)}
        for module in model.modules()
        if isinstance(module, ReplacedAttention)
    }
    try:
        yield
    finally:
        for mixer, counters in held.items():
            vars(mixer).update(counters)


def replaced_layers(model: nn.Module) -> dict[int, AttentionModule]:
    """The replaced attention modules by layer index."""
    return {m.layer_idx: m for _, m in attention_layers(model) if isinstance(m, ReplacedAttention)}


def mixers(model: nn.Module) -> dict[int, nn.Module]:
    """The mixers of the replaced layers by layer index."""
    return {index: layer.mixer for index, layer in replaced_layers(model).items()}


class _Witness(nn.Module):
    """Stands in for a mixer during the probe and holds what the family hands to its attention function."""

    wants_rotated = True

    def __init__(self, heads: Heads) -> None:
        super().__init__()
        self.heads = heads
        self.seen: tuple[Tensor, Tensor | None, Call] | None = None

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, call: Call) -> Tensor:
        """Zeros; refuses keys and values of other shapes than a mixer can take (MLA)."""
        heads, tokens = self.heads, query.shape[2]
        shapes = [tuple(x.shape[1:]) for x in (query, key, value)]
        stored = (heads.key_value, tokens, heads.dim)
        if shapes != [(heads.query, tokens, heads.dim), stored, stored]:
            raise UserError(
                f"queries, keys and values of the shapes {shapes} cannot be replaced; allowed: "
                f"{heads.query} query heads, {heads.key_value} key-value heads, all of one width."
            )
        self.seen = (query, mask, call)
        return torch.zeros_like(query)


@contextmanager
def _captured(module: AttentionModule, mixer: nn.Module) -> Iterator[None]:
    """Within the block the mixer answers for the layer."""
    kept = type(module), module.config
    try:
        become_replaced(module, mixer)
        yield
    finally:
        module.__class__, module.config = kept
        if hasattr(module, "mixer"):
            del module.mixer


@torch.no_grad()
def _probe(model: PreTrainedModel, modules: list[AttentionModule]) -> dict[int, RotarySpec | None]:
    """Read each layer's rotary encoding off what its forward is given; check that it can be captured.

    Raises:
        UserError: it cannot.
    """
    given: dict[int, tuple[tuple, dict]] = {}
    precise: dict[int, tuple[Tensor, Tensor]] = {}

    def look(module: AttentionModule, args: tuple, kwargs: dict) -> None:
        given[module.layer_idx] = args, kwargs

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
        with at_rest(model):
            model(input_ids=probe_ids(model), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    specs: dict[int, RotarySpec | None] = {}
    for module in modules:
        name, index = type(module).__name__, module.layer_idx
        if index not in given:
            raise UserError(f"{name} in layer {index} is not called by the model's forward.")
        args, kwargs = given[index]
        with at_rest(module):
            query = _witnessed(module, args, kwargs)
            tables = kwargs.get("position_embeddings")
            specs[index] = None if tables is None else _rotary_of(module, args, kwargs, query, precise)
    return specs


def _witnessed(module: AttentionModule, args: tuple, kwargs: dict) -> Tensor:
    """The queries `[1, H, T, D]` that the layer hands to its attention function.

    Raises:
        UserError: it calls none, or hands over what the mixers do not know of.
    """
    name, witness = type(module).__name__, _Witness(heads_of(module))
    parameters = inspect.signature(type(module).forward).parameters.values()
    if len(args) > 1 or all(p.kind is not p.VAR_KEYWORD for p in parameters):
        raise UserError(f"{name}.forward takes no keyword arguments of ours, so it cannot be replaced.")
    own_window(module)
    with _captured(module, witness):
        module(*args, **kwargs)
    if witness.seen is None:
        raise UserError(f"{name} bypasses the attention interface, so it cannot be replaced.")
    query, mask, call = witness.seen
    before = kwargs.get("attention_mask")
    same = torch.equal(mask, before) if mask is not None and before is not None else mask is before
    if not same:
        raise UserError(f"{name} makes an attention mask of its own, so it cannot be replaced.")
    implementation = module.config._attn_implementation
    if call.softcap is not None and implementation == "sdpa":
        allowed = "eager, since sdpa drops the soft cap of this model's attention"
        raise bad_value("attn_implementation", implementation, allowed)
    return query


def _rotary_of(
    module: AttentionModule, args: tuple, kwargs: dict, query: Tensor, precise: dict
) -> RotarySpec | None:
    """Measure the layer's rotary encoding; None for one that is given tables and does not use them.

    Such layers (smollm3, cohere2 and others have some) are known by handing them tables of position 0 only.

    Raises:
        UserError: un-rotating does not give back the queries that such tables give.
    """
    name, tables, function = type(module).__name__, kwargs["position_embeddings"], family_rotation(module)
    known = isinstance(tables, tuple) and len(tables) == 2 and all(t.ndim == 3 for t in tables)
    if function is None or not known:
        raise UserError(f"{name} rotates by tables of an unknown form, so it cannot be replaced.")
    still = torch.ones_like(tables[0]), torch.zeros_like(tables[1])
    plain = _witnessed(module, args, kwargs | {"position_embeddings": still})
    if torch.equal(plain, query):
        return None
    cos, sin = precise.get(id(tables[0]), tables)
    spec = measure_rotary(function, cos, sin, heads_of(module).dim)
    back, _ = unrotate(function, query, query, tables[0], tables[1], spec.width)
    error = float((back - plain).abs().max() / plain.abs().max())
    limit = 1e-4 if query.dtype in (torch.float32, torch.float64) else 5e-2
    if not error < limit:
        raise UserError(
            f"un-rotating the queries of {name} is off by {error:.1e} of their size (limit {limit:.0e}); "
            "this rotary encoding cannot be replaced."
        )
    return spec


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
    with ExitStack() as stack:
        for _, module in layers.values():
            identity = VARIANTS.get("identity")(None, heads_of(module), None)
            stack.enter_context(_captured(module, identity))
        with at_rest(model):
            got = model(input_ids=ids, use_cache=False).logits.float()
        silent = [i for i, (_, module) in layers.items() if module.mixer.calls != 1]
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
