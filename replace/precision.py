"""The arithmetic of a run, chosen from the hardware."""

from contextlib import AbstractContextManager, nullcontext

import torch

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
