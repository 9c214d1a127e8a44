"""All properties on one model: what is swapped for what, on which texts, in which precision."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from replace.blocks import Call
from replace.config import AttentionConfig
from replace.convert import (
    SwapSpec,
    at_rest,
    attention_layers,
    mixers,
    restore,
    swap,
    teacher_attention,
)
from replace.errors import UserError, bad_value
from replace.layer import heads_of
from replace.memory import MemoryMixer
from replace.mixer import BlockMixer
from replace.properties import Finding, Property, distance, found, scatter
from replace.properties import layer as layer_properties
from replace.properties import model as model_properties
from replace.properties.layer import Layer
from replace.properties.model import Whole
from replace.rotary import Rotary, RotarySpec, family_rotation, unrotate

LARGEST = 1_000_000_000
"""Models with more parameters are examined in their own precision, which needs no second copy."""

SINGLE = 1e-2
"""The limit of logits that should be equal, where they are computed in less than fp64."""

ROWS = 3
QUICK_LENGTH = 72


def examine(model: PreTrainedModel, spec: SwapSpec) -> Iterator[Finding]:
    """Measure every property on `model` with the layers that `spec` names replaced.

    New parameters are moved away from their neutral start first. The model is afterwards as it was.

    Raises:
        UserError: the swap is refused, or the model has too few positions for these windows and pairs.
    """
    options = list(spec.layers.values())
    check_length(options, model.config.get_text_config(decoder=True).max_position_embeddings)
    ids = texts(model, length_for(options))
    with _undisturbed(model), _precise(model) as limit:
        tables: dict[int, Any] = {}
        with _listening(model, tables):
            want = _logits(model, ids[:1])
        yield _identity(model, spec, ids[:1], want, limit)
        yield _unrotation(model, spec, tables)
        yield _everything_exact(model, spec, ids[:1], want)
        with _swapped(model, spec.layers, spec.rotary):
            for mixer in mixers(model).values():
                scatter(mixer)
            # Layers first: what they say is precise, and costs little.
            for alike in _layers(model, ids[:2]):
                prefix = f"layers {', '.join(str(one.index) for one in alike)}: "
                for prop in layer_properties.PROPERTIES:
                    yield prop.on(*alike, prefix=prefix)
            whole, excusable = Whole(model, ids, limit, _exact(options)), []
            for prop in model_properties.PROPERTIES:
                finding = prop.on(whole)
                if finding.passed is False and prop in model_properties.EXCUSABLE:
                    excusable.append((prop, finding))
                else:
                    yield finding
        for prop, finding in excusable:
            yield _unless_excused(prop, finding, replace(whole))


def quick(model: PreTrainedModel) -> list[Finding]:
    """Measure in a few seconds what most often goes wrong, on a model whose layers are replaced.

    Its originals must have been kept. The model is afterwards exactly as it was: weights, counters, the state
    of random numbers.
    """
    held: dict[nn.Module, dict[str, Any]] = {
        mixer: {n: vars(mixer)[n] for n in ("calls", "clamped", "nonfinite") if n in vars(mixer)}
        for mixer in mixers(model).values()
    }
    options = [mixer.options for mixer in held if isinstance(mixer, BlockMixer)]
    length = min(QUICK_LENGTH, length_for(options, pairs=False))
    try:
        with _undisturbed(model):
            drawn = _drawn_layers(model)
            findings = [
                prop.on(one, prefix=f"layer {one.index}: ")
                for one in drawn
                for prop in layer_properties.QUICK
            ]
            with _precise(model) as limit:
                whole = Whole(model, texts(model, length)[:2], limit, min(_exact(options), length - 3))
                for prop in model_properties.QUICK:
                    finding = prop.on(whole)
                    if finding.passed is False and prop in model_properties.EXCUSABLE:
                        with teacher_attention(model):
                            finding = _unless_excused(prop, finding, replace(whole))
                    findings.append(finding)
                return findings
    finally:
        for mixer, counters in held.items():
            vars(mixer).update(counters)


def check(model: PreTrainedModel) -> None:
    """The quick properties as a gate.

    Raises:
        UserError: one of them fails.
    """
    for finding in quick(model):
        if finding.passed is False:
            assert finding.figure is not None
            assert finding.limit is not None
            raise UserError(
                f"the replaced model fails {finding.property!r} (measured {finding.figure:.1e}, limit "
                f"{finding.limit:.0e}): {finding.meaning}; `python -m replace.verify` shows all properties."
            )


def _unless_excused(prop: Property, finding: Finding, teacher: Whole) -> Finding:
    """A failure is none of the swap's doing if the teacher fails as well."""
    own = prop.on(teacher)
    if own.passed:
        return finding
    return found(
        prop.name, "", f"the model does not keep it with its own attention either ({own.figure:.1e})"
    )


@torch.no_grad()
def magnitudes(model: PreTrainedModel) -> dict[int, float]:
    """How much a replaced layer's answer changes when its keys are doubled, for one layer of each kind.

    Where there is a linear memory it is its features of the keys that are compared. With unit-norm keys
    (L2 normalisation) this would be 0.
    """
    found = {}
    with _undisturbed(model):
        for one in _drawn_layers(model):
            q, k, v, hidden = one.tensors
            if isinstance(one.mixer, MemoryMixer):
                place = torch.arange(one.length).expand(q.shape[0], -1)
                _, doubled = one.mixer.features_of(q, 2 * k, place, one.call.scaling)
                _, usual = one.mixer.features_of(q, k, place, one.call.scaling)
                found[one.index] = distance(doubled, usual)
            else:
                found[one.index] = distance(one.attend(q, 2 * k, v, hidden), one.attend())
    return found


def length_for(options: list[AttentionConfig], pairs: bool = True) -> int:
    """Tokens after which the memory holds something, and pairs have been dropped, in every variant."""
    longest = 16
    for one in options:
        held = one.sinks + (one.pairs if pairs else 0)
        whole = max(2, -(-(held + 1) // one.block))  # blocks that leave
        longest = max(longest, _exact([one]) + whole * one.block + min(17, one.block // 2 + 1))
    return longest


def _exact(options: list[AttentionConfig]) -> int:
    """The longest exact part, sinks and pairs aside."""
    return max((o.block + (0 if o.local == "segment" else o.window) for o in options), default=1)


def check_length(options: list[AttentionConfig], positions: int) -> None:
    """Refuse windows and pairs that a text within the model's positions cannot fill.

    Raises:
        UserError: the longest of them.
    """
    longest = max(options, key=lambda one: length_for([one]))
    if length_for([longest]) > positions:
        allowed = (
            f"a window that, with attention.block={longest.block} and attention.pairs={longest.pairs}, a "
            f"text within the model's {positions} positions can fill (it takes {length_for([longest])})"
        )
        raise bad_value("attention.window", longest.window, allowed)


def texts(model: PreTrainedModel, length: int) -> Tensor:
    """`[3, length]` random tokens."""
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, vocabulary - 1, (ROWS, length), generator=generator).to(model.device)


@contextmanager
def _undisturbed(model: PreTrainedModel) -> Iterator[None]:
    """No dropout, no autocast, and random numbers go on afterwards as if nothing had been drawn."""
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), at_rest(model):
        yield


@contextmanager
def _precise(model: PreTrainedModel) -> Iterator[float]:
    """The model in fp64, in which nothing is lost; yields the limit of logits that should be equal.

    Some families compute their norms in fp32 whatever the model's dtype: hence no smaller limit.
    """
    tensors = [*model.parameters(), *model.buffers()]
    tensors = [x for x in tensors if x.is_floating_point()]
    if sum(x.numel() for x in tensors) > LARGEST or model.device.type == "mps":
        yield SINGLE
        return
    dtypes = [x.dtype for x in tensors]
    for x in tensors:
        x.data = x.data.double()
    try:
        double = _computes_in_double(model)
        if not double:
            for x, dtype in zip(tensors, dtypes, strict=True):
                x.data = x.data.to(dtype)
        yield 1e-6 if double else SINGLE
    finally:
        for x, dtype in zip(tensors, dtypes, strict=True):
            x.data = x.data.to(dtype)


@torch.no_grad()
def _computes_in_double(model: PreTrainedModel) -> bool:
    """Whether the family does: some experts know single precision only, some masks overflow."""
    ids = texts(model, 6)[:2]
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    try:
        out = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    except RuntimeError:
        return False
    return bool(out[mask.bool()].isfinite().all())


def _logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


@contextmanager
def _swapped(
    model: PreTrainedModel,
    layers: dict[int, AttentionConfig],
    rotary: dict[int, RotarySpec | None] | None = None,
) -> Iterator[SwapSpec]:
    """Within the block these layers are replaced; in fp64 where the model is.

    Args:
        rotary: what an earlier swap has measured; the guards are then left out, as they have spoken.
    """
    conversion = swap(model, SwapSpec(dict(layers), dict(rotary or {})), guard=rotary is None)
    if model.dtype == torch.float64:
        for mixer in mixers(model).values():
            mixer.double()
    try:
        yield conversion.spec
    finally:
        restore(model)


def _identity(model: PreTrainedModel, spec: SwapSpec, ids: Tensor, want: Tensor, limit: float) -> Finding:
    meaning = "capturing the layers alone changes the model: no later figure can be trusted"
    with _swapped(model, dict.fromkeys(spec.layers, AttentionConfig(name="identity", pairs=0))) as done:
        spec.rotary = done.rotary
        return found("identity swap = the teacher", meaning, (distance(_logits(model, ids), want), limit))


def _everything_exact(model: PreTrainedModel, spec: SwapSpec, ids: Tensor, want: Tensor) -> Finding:
    name = "everything exact = the teacher"
    meaning = (
        "the variant differs from the teacher even where it forgets nothing: queries, keys, order of heads"
    )
    if any(options.local == "none" for options in spec.layers.values()):
        return found(name, meaning, "attention.local=none has no exact part to widen")
    length, layers = ids.shape[1], {}
    for index, options in spec.layers.items():
        window = 0 if options.local == "segment" else length
        layers[index] = replace(options, block=length, window=window, distance_cap=None)
    with _swapped(model, layers, spec.rotary):
        if not all(isinstance(mixer, BlockMixer) for mixer in mixers(model).values()):
            return found(name, meaning, "the variant is not built on BlockMixer, so its window is not known")
        # The family's rotary tables are fp32.
        return found(name, meaning, (distance(_logits(model, ids), want), 1e-4))


@contextmanager
def _listening(model: PreTrainedModel, tables: dict[int, Any]) -> Iterator[None]:
    """Within the block the rotary tables that each attention layer is given are put into `tables`."""

    def look(module: Any, args: tuple, kwargs: dict) -> None:
        tables[module.layer_idx] = kwargs.get("position_embeddings")

    hooks = [m.register_forward_pre_hook(look, with_kwargs=True) for _, m in attention_layers(model)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def _unrotation(model: PreTrainedModel, spec: SwapSpec, tables: dict[int, Any]) -> Finding:
    """Un-rotating the family's rotation gives back what went in, and our own rotation equals the family's."""
    modules = {m.layer_idx: m for _, m in attention_layers(model) if m.layer_idx in spec.layers}
    name, figure = "position-free queries and keys are exact", 0.0
    for index, module in modules.items():
        function, rotary = family_rotation(module), spec.rotary.get(index)
        if function is None or rotary is None or tables.get(index) is None:
            continue
        cos, sin = (x[:1].double() for x in tables[index])
        heads, length = heads_of(module), cos.shape[1]
        x = torch.randn(1, 2, length, heads.dim, generator=torch.Generator().manual_seed(0)).double()
        x, width = x.to(cos.device), rotary.width
        turned = torch.cat([function(x[..., :width], x[..., :width], cos, sin)[0], x[..., width:]], -1)
        ours = Rotary(rotary, 0)(x, torch.arange(length, device=x.device))
        back = unrotate(function, turned, turned, cos, sin, width)[0]
        figure = max(figure, distance(back, x), distance(ours, turned))
    if not any(spec.rotary.values()):
        return found(name, "", "the model has no rotary encoding")
    meaning = "keys in the memory still carry their position, or are turned back by the wrong angle"
    return found(name, meaning, (figure, 1e-3))


def _layers(model: PreTrainedModel, ids: Tensor) -> list[list[Layer]]:
    """The first, middle and last layer of each kind, with what the model gives them for `ids`."""
    given: dict[nn.Module, tuple] = {}
    hooks = [
        mixer.register_forward_pre_hook(lambda mixer, args: given.update({mixer: args}))
        for mixer in mixers(model).values()
    ]
    try:
        _logits(model, ids)
    finally:
        for hook in hooks:
            hook.remove()
    made = []
    for indices in _kinds(model):
        alike = []
        for index in sorted({indices[0], indices[len(indices) // 2], indices[-1]}):
            mixer = mixers(model)[index]
            if mixer in given:
                q, k, v, call = given[mixer]
                sinks = None if call.sink_logit is None else call.sink_logit.detach().cpu()
                plain = replace(call, real=None, document=None, slot=None, dropout=0.0, sink_logit=sinks)
                tensors = [x.detach().cpu().double() for x in (q, k, v, call.hidden)]
                alike.append(Layer(index, _by_itself(mixer), tensors, plain))
        made += [alike] if alike else []
    return made


def _by_itself(mixer: nn.Module) -> nn.Module:
    """A copy in fp64 on the CPU, with counters at 0."""
    counters = [name for name in ("clamped", "nonfinite") if hasattr(mixer, name)]
    made = copy.deepcopy(mixer).cpu().double()
    for name in counters:
        setattr(made, name, 0)
    return made


def _drawn_layers(model: PreTrainedModel) -> list[Layer]:
    """One layer of each kind with drawn queries, keys and values: needs no forward of the model."""
    made, generator = [], torch.Generator().manual_seed(0)
    for indices in _kinds(model):
        index = indices[len(indices) // 2]
        mixer = mixers(model)[index]
        if isinstance(mixer, BlockMixer):
            heads, length = mixer.heads, length_for([mixer.options], pairs=False)
            shapes: list[tuple[int, ...]] = [
                (2, h, length, heads.dim) for h in (heads.query, heads.key_value, heads.key_value)
            ]
            shapes.append((2, length, heads.hidden))
            tensors = [torch.randn(shape, generator=generator).double() for shape in shapes]
            made.append(Layer(index, _by_itself(mixer), tensors, Call(tensors[3], heads.dim**-0.5)))
    return made


def _kinds(model: PreTrainedModel) -> list[list[int]]:
    """The replaced layers, together where they share class, options and heads."""
    kinds: dict[str, list[int]] = {}
    for index, mixer in mixers(model).items():
        options, heads = getattr(mixer, "options", None), getattr(mixer, "heads", None)
        kinds.setdefault(f"{type(mixer)} {options} {heads}", []).append(index)
    return list(kinds.values())
