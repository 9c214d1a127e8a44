"""QLoRA: the frozen weights in 4 bit while the adapters are trained, and in full again afterwards.

The adapter learns on the rounded weights and is then added to the full ones, so nothing rounded is exported.
"""

import importlib.util
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from distill.lora.targets import linear_modules
from replace.convert import parent_of
from replace.errors import bad_value
from replace.precision import dtype_of


def quantise(model: PreTrainedModel, precision: str) -> dict[str, nn.Module]:
    """Put 4-bit layers (NF4, of bitsandbytes) in the place of the decoder layers' linear modules.

    Returns:
        the modules that stood there, on the CPU, for `restore_full`.

    Raises:
        UserError: bitsandbytes is not there or does not run here.
    """
    check_bitsandbytes()
    import bitsandbytes

    device = model.device
    kept: dict[str, nn.Module] = {}
    compute = dtype_of(precision, device)
    for path in linear_modules(model):
        parent, name = parent_of(model, path)
        full: Any = getattr(parent, name)
        if not isinstance(full, nn.Linear):
            continue
        small = bitsandbytes.nn.Linear4bit(
            full.in_features, full.out_features, full.bias is not None, compute, quant_type="nf4"
        )
        small.weight = bitsandbytes.nn.Params4bit(
            full.weight.detach().cpu(), requires_grad=False, quant_type="nf4"
        )
        if full.bias is not None:
            small.bias = nn.Parameter(full.bias.detach().clone(), requires_grad=False)
        setattr(parent, name, trained_through(small.to(device)))  # quantises
        kept[path] = full.cpu()
    model.is_loaded_in_4bit = True  # type: ignore[assignment]  # what PEFT looks at
    return kept


def trained_through(layer: Any) -> Any:
    """Keep a 4-bit layer in the form that a backward can read.

    On some CPUs bitsandbytes packs the weight anew in the first forward without gradient, and for good; a
    backward is then wrong, without an error.
    """
    if hasattr(layer, "support_avx512bf16_for_cpu"):
        setattr(layer, "support_avx512bf16_for_cpu", False)  # noqa: B010 (nn.Module types it as a module)
    return layer


def restore_full(model: PreTrainedModel, kept: dict[str, nn.Module]) -> None:
    """Put the full modules back."""
    device = model.device
    for path, full in kept.items():
        parent, name = parent_of(model, path)
        setattr(parent, name, full.to(device))
    del model.is_loaded_in_4bit


def check_bitsandbytes() -> None:
    """Refuse QLoRA where bitsandbytes cannot run.

    Raises:
        UserError: it is not installed, or a layer of it fails on this device.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise bad_value(
            "lora.qlora", True, "false, since bitsandbytes is not installed (pip install bitsandbytes)"
        )
    import bitsandbytes

    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        layer = bitsandbytes.nn.Linear4bit(128, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4")
        layer = layer.to(device)
        out = trained_through(layer)(torch.ones(4, 128, device=device, requires_grad=True))
        out.sum().backward()
    except (RuntimeError, NotImplementedError, OSError, AttributeError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__).rstrip(".")
        allowed = f"false, since bitsandbytes does not run on this {device} ({reason})"
        raise bad_value("lora.qlora", True, allowed) from error
