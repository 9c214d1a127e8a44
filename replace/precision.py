"""The arithmetic of a run, chosen from the hardware."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def dtype_of(precision: str, device: torch.device) -> torch.dtype:
    """The dtype that `precision` (auto, bf16, fp16, fp32) means on `device`.

    auto is bf16 where the hardware has it natively, fp16 on older GPUs, and fp32 on other CPUs, where bf16 is
    emulated and slower.
    """
    if precision != "auto":
        return DTYPES[precision]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if device.type == "cpu" and native else torch.float32


def autocast(precision: str, device: torch.device) -> AbstractContextManager:
    """A context in which matrix products run in that dtype, while weights stay as they are."""
    dtype = dtype_of(precision, device)
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype=dtype)


@contextmanager
def cast_once(model: nn.Module, precision: str) -> Iterator[None]:
    """Within the block frozen linear weights are held in the dtype that autocast would give them.

    Autocast converts a frozen weight anew in every forward, a tenth of the time of a short one on a CPU. What
    comes out is the same, bit for bit; weights that are trained stay as they are.
    """
    device = next(model.parameters()).device
    dtype = dtype_of(precision, device)
    held: list[tuple[nn.Linear, torch.Tensor]] = []  # their parameters
    try:
        if dtype != torch.float32:
            for module in model.modules():
                if isinstance(module, nn.Linear) and _is_cast(module.weight):
                    held.append((module, module.weight))
                    module.weight = nn.Parameter(module.weight.detach().to(dtype), requires_grad=False)
        yield
    finally:
        for module, weight in held:
            module.weight = weight


def _is_cast(weight: torch.Tensor) -> bool:
    """Frozen, and numbers: four-bit weights are packed into bytes, and computed in what their layer says."""
    return not weight.requires_grad and weight.is_floating_point()
