"""Which form of an operator runs: chosen by device, dtype and architecture, or forced; and said, with why."""

import importlib
import importlib.util
import logging
import os
import sys

import torch

from kernels.arguments import check_choice

BACKENDS = ("auto", "triton", "chunk", "reference", "fla")

FORCED = ("auto", "triton", "chunk", "reference")
"""What all operators of a process can be told to run as: the forms that every one of them has."""

LOG = logging.getLogger(__name__)

TURING = (7, 5)
AMPERE = (8, 0)

_said: set[tuple[str, ...]] = set()

_forced = "auto"


def interpreted() -> bool:
    """Whether Triton runs its kernels on the CPU, in Python (`TRITON_INTERPRET=1`)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in {"1", "true", "yes", "on", "y"}


def force(backend: str) -> None:
    """What "auto" stands for from now on in this process: one of `FORCED`.

    Raises:
        ValueError: another word.
    """
    global _forced
    check_choice("backend", backend, FORCED)
    _forced = backend


def forced() -> str:
    """What `force` was last told; "auto" where it never was."""
    return _forced


def triton_refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why no Triton kernel can run here, or None where one can."""
    if "triton" not in sys.modules and importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if dtype == torch.float64:
        return "fp64 has no Triton kernel"
    if interpreted():
        if dtype == torch.bfloat16:
            return "Triton's interpreter computes bf16 wrongly"
        return None if device.type == "cpu" else "TRITON_INTERPRET=1 is for tensors on the CPU"
    if device.type != "cuda":
        return f"Triton needs a GPU, and the tensors are on {device.type}"
    if torch.version.hip is not None:
        return None
    capability = torch.cuda.get_device_capability(device)
    if capability < TURING:
        return f"sm_{capability[0]}{capability[1]} is older than Turing (sm_75)"
    if capability < AMPERE and dtype != torch.float16:
        return f"on Turing only fp16 has matrix units, not {dtype}"
    return None


def fla_refusal(module: str, name: str, device: torch.device) -> str | None:
    """Why flash-linear-attention's function `name` of `module` cannot be used, or None where it can."""
    if "fla" not in sys.modules and importlib.util.find_spec("fla") is None:
        return "flash-linear-attention (fla-core) is not installed"
    if not hasattr(importlib.import_module(module), name):
        return f"the installed flash-linear-attention has no {module}.{name}"
    return None if device.type == "cuda" else f"it needs a GPU, and the tensors are on {device.type}"


def choose(
    op: str, backend: str, device: torch.device, dtype: torch.dtype, refusal: str | None = None
) -> str:
    """The form of operator `op` to run: "triton", "chunk", "reference" or "fla".

    Args:
        backend: one of `BACKENDS`; "auto" takes what was forced, or else the fastest that can run.
        refusal: why this call in particular has no Triton kernel, if it has none.

    Raises:
        ValueError: an unknown backend, or "triton" forced where it cannot run.
    """
    check_choice("backend", backend, BACKENDS)
    return _choose(op, _forced if backend == "auto" else backend, str(device), dtype, refusal)


def _choose(op: str, backend: str, place: str, dtype: torch.dtype, refusal: str | None) -> str:
    if backend in {"chunk", "reference", "fla"}:
        return _say(op, backend, f"backend={backend} asks for it")
    device = torch.device(place)
    if backend == "auto" and device.type == "cpu":  # at once: a search for packages would slow decoding
        return _say(op, "chunk", "on a CPU Triton would be interpreted, which is for tests")
    refusal = refusal or triton_refusal(device, dtype)
    if backend == "triton":
        if refusal is not None:
            raise ValueError(f"backend='triton' is not possible for {op}: {refusal}.")
        return _say(op, "triton", "backend=triton asks for it")
    if refusal is not None:
        return _say(op, "chunk", refusal)
    return _say(op, "triton", f"{dtype} on {torch.cuda.get_device_name(device)}")


# torch.compile is to call this while it traces and keep the answer, instead of tracing the search for
# packages and the log. torch.compiler.assume_constant_result does no more, but imports torch._dynamo (1.4 s).
_choose._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _say(op: str, choice: str, reason: str) -> str:
    if (op, choice) not in _said:
        _said.add((op, choice))
        LOG.info("%s runs as %s: %s", op, choice, reason)
    return choice
