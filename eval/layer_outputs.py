"""What each decoder layer's attention puts out, beside the teacher's, on a batch of probe text.

Two comparisons: *in place*, where the student's layer gets the student's own input, so that the differences
of all layers below add up; and the *transfer error*, where it gets the teacher's input, which is what stage 1
minimises.
"""

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from eval.stored import kept
from replace.convert import attention_layers

LIMIT = 32768
"""Tokens of a probe batch at most: inputs and outputs of all layers are held at once, where the model is."""


@dataclass
class Reference:
    """The teacher's attention on the probe batch.

    Attributes:
        rows: the probe tokens [B, T].
        outputs: for each decoder layer the attention's output [B, T, C], fp32, on the model's device.
        calls: for each layer the arguments of that call, without cache, for a student's layer; there too.
    """

    rows: Tensor
    outputs: list[Tensor]
    calls: list[tuple[tuple, dict[str, Any]]]


def capture(model: nn.Module, rows: Tensor) -> Reference:
    """Run `model` on the probe tokens `rows` [B, T] and keep each attention's input and output."""
    if rows.numel() > LIMIT:
        raise ValueError(f"a probe batch of {rows.numel()} tokens is too large, at most {LIMIT}")
    layers = [module for _, module in attention_layers(model)]
    outputs: list[Tensor] = [torch.empty(0)] * len(layers)
    calls: list[tuple[tuple, dict[str, Any]]] = [((), {})] * len(layers)

    def hook_of(index: int) -> Callable:
        def hook(module: nn.Module, arguments: tuple, keywords: dict, output: Any) -> None:
            outputs[index] = _first(output).detach().float()
            without_cache = {
                name: None if name in ("past_key_values", "past_key_value", "layer_past") else value
                for name, value in keywords.items()
            }
            calls[index] = (arguments, without_cache)

        return hook

    with ExitStack() as stack, torch.inference_mode():
        for index, layer in enumerate(layers):
            handle = layer.register_forward_hook(hook_of(index), with_kwargs=True)
            stack.callback(handle.remove)
        model(input_ids=rows.to(next(model.parameters()).device), use_cache=False, logits_to_keep=1)
    return Reference(rows, outputs, calls)


@kept
def layer_outputs(model: nn.Module, reference: Reference) -> list[dict]:
    """Compare every decoder layer's attention output with the teacher's.

    Returns:
        [{"layer", "path", "mean", "std" (of this model's output in place), "teacher_mean", "teacher_std",
        "max_difference" (largest absolute difference in place), "error" (in place: mean squared difference
        divided by the variance of the teacher's output), "transfer_error" (the same, given the teacher's
        input)}].
    """
    layers = attention_layers(model)
    mine = capture(model, reference.rows)
    if len(mine.outputs) != len(reference.outputs):
        raise ValueError(f"{len(mine.outputs)} layers cannot be compared with {len(reference.outputs)}")
    result = []
    for index, (path, layer) in enumerate(layers):
        target, output = reference.outputs[index], mine.outputs[index]
        arguments, keywords = reference.calls[index]
        with torch.inference_mode():
            transferred = _first(layer(*arguments, **keywords)).float()
        result.append(
            {
                "layer": index,
                "path": path,
                "mean": _figure(output.mean()),
                "std": _figure(output.std()),
                "teacher_mean": _figure(target.mean()),
                "teacher_std": _figure(target.std()),
                "max_difference": _figure((output - target).abs().max()),
                "error": _relative(output, target),
                "transfer_error": _relative(transferred, target),
            }
        )
    return result


def _relative(output: Tensor, target: Tensor) -> float | None:
    return _figure(
        (output - target).square().mean() / target.var().clamp_min(torch.finfo(torch.float32).tiny)
    )


def _figure(value: Tensor) -> float | None:
    """A number that JSON can hold; None for NaN and infinity."""
    number = float(value)
    return number if math.isfinite(number) else None


def _first(output: Any) -> Tensor:
    """An attention module returns its output, or a tuple that begins with it."""
    return output[0] if isinstance(output, tuple) else output
