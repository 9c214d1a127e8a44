"""Proof that a patched model goes through its replaced layers, and that its adapters do what they say."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from distill.lora.rows import IGNORED, Packed
from distill.lora.stage import loss_of
from replace.convert import at_rest, mixers, probe_ids, replaced_layers
from replace.precision import autocast, dtype_of

PROBE = 48
"""Tokens of the probe."""
LIMIT, HALF_LIMIT = 1e-3, 5e-2
"""Of the largest logit, in fp32 and in half precision."""
STIR = 0.02
"""Deviation of the adapters' second factor while it is tested; it is 0 at the start."""


class Bypassed(Exception):
    """A patched model is not the model that was swapped; the words say where it shows."""


@torch.no_grad()
def probe_logits(model: PreTrainedModel, precision: str) -> Tensor:
    """`[1, T, V]` fp32 logits of the probe, at rest."""
    with at_rest(model), autocast(precision, model.device):
        return model(input_ids=probe_ids(model, PROBE), use_cache=False).logits.float()


def prove(model: PreTrainedModel, before: Tensor, precision: str) -> None:
    """Check a model whose LoRA adapters are new, and so change nothing yet.

    1. its logits are those from before it was patched;
    2. each replaced layer was called, and once;
    3. with adapters that do something, its logits are those of the weights with these adapters added (where
       the weights are full ones; to quantised ones nothing can be added exactly). Both in fp32: what bf16
       rounds in a deep model is more than a mistake may be;
    4. a backward gives every adapter of a replaced layer a gradient.

    Args:
        model: its weights as they are, not under `cast_once`.
        before: of `probe_logits`, without adapters.

    Raises:
        Bypassed: one of them does not hold.
    """
    new = mixers(model)
    calls = {index: getattr(mixer, "calls", 0) for index, mixer in new.items()}
    limit = LIMIT if dtype_of(precision, model.device) == torch.float32 else HALF_LIMIT
    _same(probe_logits(model, precision), before, limit, "the logits differ from those without it")
    silent = [i for i, mixer in new.items() if getattr(mixer, "calls", 0) - calls[i] != 1]
    if silent:
        raise Bypassed(f"layers {', '.join(map(str, silent))} were not called once in a forward")
    with _stirred(model):
        lacking = _without_gradient(model, precision)
        if all(module.base_layer.weight.is_floating_point() for module, *_ in _pairs(model)):
            patched = probe_logits(model, "fp32")
            with _added(model):
                reference = probe_logits(model, "fp32")
            _same(patched, reference, LIMIT, "the adapters do something else than their weights say")
    if lacking:
        raise Bypassed(
            f"no gradient reaches {len(lacking)} adapters of replaced layers, such as {lacking[0]}"
        )


def _same(got: Tensor, want: Tensor, limit: float, words: str) -> None:
    error = float((got - want).abs().max() / want.abs().max().clamp_min(1e-6))
    if not error < limit:
        raise Bypassed(f"{words}, by {error:.1e} of their size (limit {limit:.0e})")


def _pairs(model: nn.Module) -> Iterator[tuple[Any, nn.Parameter, nn.Parameter, float]]:
    """Each adapted module, its factors A `[r, in]` and B `[out, r]`, and what scales their product."""
    module: Any
    for module in model.modules():
        if isinstance(getattr(module, "lora_A", None), nn.ModuleDict):
            for name, a in module.lora_A.items():
                yield module, a.weight, module.lora_B[name].weight, module.scaling[name]


@contextmanager
def _stirred(model: nn.Module) -> Iterator[None]:
    """Within the block the adapters are not nothing; afterwards they are as they were, without a gradient."""
    kept = [(b, b.detach().clone()) for _, _, b, _ in _pairs(model)]
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.no_grad():
            for b, _ in kept:
                b.add_(STIR * torch.randn(b.shape, generator=generator).to(b))
        yield
    finally:
        with torch.no_grad():
            for b, value in kept:
                b.copy_(value)
        for parameter in model.parameters():
            parameter.grad = None


@contextmanager
def _added(model: nn.Module) -> Iterator[None]:
    """Within the block the adapters' products are in the weights, and the adapters are nothing."""
    kept = []
    with torch.no_grad():
        for module, a, b, scaling in _pairs(model):
            weight = module.base_layer.weight
            kept.append((weight, weight.detach().clone(), b, b.detach().clone()))
            change = scaling * (b @ a)
            weight.add_((change if change.shape == weight.shape else change.T).to(weight))
            b.zero_()
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, old, b, value in kept:
                weight.copy_(old)
                b.copy_(value)


def _without_gradient(model: PreTrainedModel, precision: str) -> list[str]:
    """The adapters' parameters inside replaced layers that a backward leaves without a gradient."""
    ids = probe_ids(model, PROBE)
    labels = ids.clone()
    labels[:, 0] = IGNORED
    positions = torch.arange(PROBE, device=ids.device).unsqueeze(0)
    with autocast(precision, model.device):
        loss = loss_of(model, Packed(ids, labels, positions, PROBE - 1))
    if not loss.requires_grad:
        return ["all of them: the loss has none"]
    loss.backward()
    return [
        f"layer {index}, {name}"
        for index, layer in replaced_layers(model).items()
        for name, parameter in layer.named_parameters()
        if "lora_" in name and (parameter.grad is None or not bool(parameter.grad.any()))
    ]
