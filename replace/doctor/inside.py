"""What is asked in a process of its own: importing a package, torch's devices, what `auto` takes."""

import importlib
import logging
from collections.abc import Callable
from typing import Any

Tell = Callable[[dict[str, Any]], object]

HEADS, KV_HEADS, HEAD_DIM = 9, 3, 64
"""Those of the default model, SmolLM2-135M."""


def imports(tell: Tell, name: str) -> None:
    """Import a package; its own word on its version stands in where it has no metadata."""
    version = getattr(importlib.import_module(name), "__version__", None)
    tell({"version": version if isinstance(version, str) else None})


def torch_facts(tell: Tell) -> None:
    """Torch, its build, and the devices that it sees."""
    import torch

    tell({"version": torch.__version__, "cuda": torch.version.cuda, "rocm": torch.version.hip})
    tell({"threads": torch.get_num_threads(), "mps": torch.backends.mps.is_available()})
    tell({"cpu_bf16": torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()})
    tell({"cuda_available": torch.cuda.is_available()})
    gpus = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        major, minor = torch.cuda.get_device_capability(index)
        free, total = torch.cuda.mem_get_info(index)
        gpus.append(
            {
                "name": torch.cuda.get_device_name(index),
                "architecture": f"sm_{major}{minor}",
                "total_bytes": total,
                "free_bytes": free,
                "bf16": torch.cuda.is_bf16_supported(including_emulation=False),
                "in_this_build": in_build((major, minor), torch.cuda.get_arch_list()),
            }
        )
        tell({"gpus": gpus})


def in_build(capability: tuple[int, int], built_for: list[str]) -> bool:
    """Whether a build has code for a GPU: machine code of its generation, or PTX of it or an older one."""
    for name in built_for:
        kind, _, digits = name.partition("_")
        digits = digits.rstrip("af")  # sm_90a and sm_100f are for special instructions
        if not digits.isdigit():
            continue
        major, minor = int(digits[:-1]), int(digits[-1])
        if kind == "sm" and major == capability[0] and minor <= capability[1]:
            return True
        if kind == "compute" and (major, minor) <= capability:
            return True
    return False


def run_facts(tell: Tell) -> None:
    """Whether a run's code can be imported, and what `auto` stands for here."""
    importlib.import_module("replace.pipeline")  # not by a statement: it is an entry point
    tell({"imports": True})

    from kernels.dispatch import LOG, choose
    from replace.machine import device_of_choice
    from replace.precision import dtype_of

    device = device_of_choice()
    dtype = dtype_of("auto", device)
    tell({"device": device.type, "dtype": str(dtype).removeprefix("torch.")})

    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    LOG.addHandler(handler)
    LOG.setLevel(logging.INFO)
    form = choose("linear_attention", "auto", device, dtype)
    tell({"kernels": {"choice": form, "why": said[-1].partition(": ")[2] if said else None}})

    from replace.softmax_backend import ORDER, trials_of

    # The rule is of the tuning's room, which this one does not import from.
    lora, config = importlib.import_module("distill.lora.choice"), importlib.import_module("replace.config")
    chosen = lora.choose(config.LoraConfig(kind="auto"), lora.this_machine())
    tell({"lora": {"choice": chosen.kind, "why": chosen.why}})

    trials = trials_of(device, dtype, HEADS, KV_HEADS, HEAD_DIM)
    able = [name for name in ORDER["auto"] if trials[name].refusal is None]
    refused = {name: trial.refusal for name, trial in trials.items() if trial.refusal}
    tell({"softmax": {"choice": able[0] if able else None, "refused": refused}})
