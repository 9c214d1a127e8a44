"""The operators of `kernels`, as layers ask for them."""

import importlib
from types import ModuleType

import torch


def operators(name: str) -> ModuleType | None:
    """The module of operator `name`; None unless its form was asked for, and in an export (PyTorch alone)."""
    if __name__.partition(".")[0] != "replace":
        return None
    if importlib.import_module("kernels.dispatch").forced() in ("auto", "chunk"):
        return None
    return importlib.import_module(f"kernels.{name}.op")


def operand_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """In which dtype an operator is given what it reads, where values are in `dtype`.

    fp16 is too narrow for features, and Triton's interpreter, on the CPU, does not know bf16.
    """
    kept = dtype == torch.float64 or (dtype == torch.bfloat16 and device.type == "cuda")
    return dtype if kept else torch.float32
