"""From facts to problems, each with the command that mends it; and what to compute in."""

import re
from dataclasses import dataclass
from typing import Any

from replace.doctor.packages import LIBRARIES

PYTHON = (3, 11)
MEMORY = 8 * 10**9
"""Bytes of memory that a run of the default model needs."""
CACHE_SPACE = 10**9
"""Free bytes for the default model and texts, and their conversion."""
RUN_SPACE = 4 * 10**9
"""Free bytes for the checkpoints and the export of a run of the default model."""
UNSLOTH_ON_CPU = (2026, 10, 9)
"""The first version of Unsloth that runs without a GPU."""
UNKNOWN = {"what is required": "pip install -c constraints.txt -e ."}
"""What mends that something could not be found out: requirements are read with a package of their own."""
MODES = ("online", "offline", "disabled", "shared")
"""What WANDB_MODE may be."""

SUPPORT = {
    "train, measure": ("yes", "yes", "untested"),
    "precision=auto": ("bf16, fp16 before Ampere", "bf16 where native, fp32", "fp32"),
    "kernels.backend": ("chunk, triton", "chunk", "chunk"),
    "softmax_backend": ("flash, efficient, math, xformers", "flash, math", "torch's own"),
    "lora": ("unsloth, peft", "peft, unsloth 2026.10.9", "peft"),
    "4-bit weights": ("bitsandbytes", "bitsandbytes", "untested"),
}
"""What there is for CUDA, CPU and macOS."""


@dataclass(frozen=True)
class Problem:
    """Something that is wrong, the command that mends it, and whether it keeps a run from beginning."""

    what: str
    mend: str
    hinders: bool


def precision_advice(facts: dict[str, Any]) -> str:
    """What to compute in on this machine, and why."""
    torch = facts.get("torch", {})
    gpus = torch.get("gpus") or []
    if gpus and gpus[0].get("bf16"):
        return "bf16: this GPU has it natively, and it needs no loss scaling"
    if gpus:
        return "fp16 with loss scaling: this GPU has no fast bf16"
    if torch.get("mps"):
        return "fp32"
    if torch.get("cpu_bf16"):
        return "bf16: this CPU multiplies it natively"
    return "fp32: on this CPU half precision is emulated and slower"


def problems(facts: dict[str, Any]) -> list[Problem]:
    """Everything that is wrong, what hinders a run first."""
    found = [
        *_python(facts),
        *_requirements(facts),
        *_torch(facts),
        *_kernels(facts),
        *_libraries(facts),
        *_places(facts),
        *_wandb(facts),
    ]
    run = facts.get("run", {})
    if run.get("why") and not run.get("imports") and not any(problem.hinders for problem in found):
        found.append(
            Problem(
                f"a run's code cannot be imported: {run['why']}",
                "pip install --force-reinstall -c constraints.txt -e .",
                True,
            )
        )
    elif run.get("why") and run.get("imports"):
        found.append(Problem(f"it could not be found out what auto takes: {run['why']}", "see above", False))
    found += [
        Problem(
            f"it could not be found out: {what} ({why})",
            UNKNOWN.get(what, "report it with this screen"),
            False,
        )
        for what, why in facts.get("failed", {}).items()
    ]
    return sorted(found, key=lambda problem: not problem.hinders)


def _python(facts: dict[str, Any]) -> list[Problem]:
    version = facts.get("python", {}).get("version")
    if version and _numbers(version)[:2] < PYTHON:
        mend = "python3.12 -m venv .venv && source .venv/bin/activate"
        return [Problem(f"Python {version} is older than 3.11", mend, True)]
    return []


def _requirements(facts: dict[str, Any]) -> list[Problem]:
    found = []
    for unmet in facts.get("unmet", []):
        wanted, version = unmet["requirement"], unmet["version"]
        state = f"{version} is installed" if version else "it is not installed"
        found.append(Problem(f"a run needs {wanted}, and {state}", f'pip install "{wanted}"', True))
    return found


def _torch(facts: dict[str, Any]) -> list[Problem]:
    torch, listed = facts.get("torch", {}), facts.get("nvidia_gpus") or []
    needed = 'pip install --force-reinstall "torch>=2.11,<2.15"'
    if torch.get("why") and "version" not in torch:
        if any(unmet["requirement"].startswith("torch") for unmet in facts.get("unmet", [])):
            return []
        return [Problem(f"torch cannot be imported: {torch['why']}", needed, True)]
    found = []
    if torch.get("why"):
        mend = "CUDA_VISIBLE_DEVICES= python -m replace +exp=infini runs on the CPU"
        found.append(Problem(f"torch cannot use its devices: {torch['why']}", mend, True))
    elif listed and not torch.get("cuda_available") and not torch.get("rocm"):
        build = (
            "is built without CUDA" if not torch.get("cuda") else "cannot use it: the driver may be too old"
        )
        mend = f"{needed}, from an index that has torch for CUDA"
        found.append(Problem(f"this machine has {listed[0]}, and torch {build}", mend, False))
    for gpu in torch.get("gpus") or []:
        if not gpu.get("in_this_build", True):
            what = f"torch {torch['version']} has no code for {gpu['name']} ({gpu['architecture']})"
            mend = "CUDA_VISIBLE_DEVICES= python -m replace +exp=infini runs on the CPU"
            found.append(Problem(what, mend, True))
    return found


def _kernels(facts: dict[str, Any]) -> list[Problem]:
    kernels = facts.get("kernels_package", {})
    if not kernels.get("other"):
        return []
    what = f"Hugging Face's package kernels {kernels['other']} has the name of this project's operators"
    again = "" if kernels.get("ours") else " && pip install --force-reinstall --no-deps -e ."
    return [Problem(what, f"pip uninstall -y kernels{again}", True)]


def _libraries(facts: dict[str, Any]) -> list[Problem]:
    found, hindered = [], not facts.get("run", {}).get("imports")
    on_gpu = bool(facts.get("torch", {}).get("gpus"))
    for library in LIBRARIES:
        one = facts.get("libraries", {}).get(library.module, {})
        name, version, why = library.distributions[0], one.get("version"), one.get("why")
        if library.module == "unsloth" and version and not on_gpu and _numbers(version) < UNSLOTH_ON_CPU:
            what = f"unsloth {version} needs a GPU; 2026.10.9 is the first that runs on a CPU"
            mend = "pip install --no-deps unsloth==2026.10.9 unsloth_zoo==2026.10.9"
            found.append(Problem(what, mend, False))
        elif one.get("state") != "broken":
            continue
        elif library.module == "torchvision":
            what = f"torchvision {version or ''} does not fit this torch: {why}"
            found.append(Problem(" ".join(what.split()), "pip uninstall -y torchvision", hindered))
        elif library.module in ("peft", "wandb"):  # required
            found.append(
                Problem(
                    f"{name} cannot be imported: {why}", f"pip install --force-reinstall {name}", hindered
                )
            )
        else:
            mend = f"pip uninstall -y {name}"
            found.append(
                Problem(
                    f"{name} ({library.purpose}) cannot be imported: {why}",
                    mend,
                    hindered and "triton" in name,
                )
            )
    return found


def _places(facts: dict[str, Any]) -> list[Problem]:
    found = []
    total = facts.get("memory", {}).get("total_bytes")
    if total and total < MEMORY:
        what = f"{total / 1e9:.1f} GB of memory, where the default model needs {MEMORY / 1e9:.0f}"
        found.append(Problem(what, "python -m replace +exp=infini budget=smoke needs less", False))
    elsewhere = {
        "cache": (CACHE_SPACE, "export LAYER_REPLACE_CACHE=<folder>"),
        "here": (RUN_SPACE, "python -m replace +exp=infini hydra.run.dir=<folder>"),
    }
    for name, (least, mend) in elsewhere.items():
        place = facts.get("places", {}).get(name, {})
        where = f"the cache {place.get('place')}" if name == "cache" else "this folder, where outputs/ goes,"
        if place.get("unwritable"):
            what = f"{where} cannot be written ({place['unwritable']})"
            found.append(Problem(what, f"{mend}, a folder that can be written", True))
        elif place.get("free_bytes", least) < least:
            what = f"{where} has {place['free_bytes'] / 1e9:.1f} GB free, and a run needs {least / 1e9:.0f}"
            found.append(Problem(what, f"{mend}, a folder with {least / 1e9:.0f} GB free", True))
    return found


def _wandb(facts: dict[str, Any]) -> list[Problem]:
    wandb = facts.get("wandb", {})
    mode = wandb.get("mode")
    if mode is None:
        return []
    if mode not in MODES:
        return [
            Problem(f"WANDB_MODE={mode} is none of {', '.join(MODES)}", "export WANDB_MODE=offline", False)
        ]
    if mode == "online" and not wandb.get("key"):
        return [Problem("WANDB_MODE=online without WANDB_API_KEY", "export WANDB_MODE=offline", False)]
    return []


def _numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])
