"""Which library makes the adapters, and why."""

from dataclasses import dataclass
from importlib import metadata

import torch
from packaging.version import Version

from replace.config import LoraConfig
from replace.launch import asked_for, check, world

ON_CPU = Version("2026.10.9")
"""The first Unsloth that runs without a GPU."""


@dataclass(frozen=True)
class Machine:
    """What the choice depends on.

    Attributes:
        gpus: NVIDIA GPUs that this process sees.
        sharded: how several processes share a model, as their launcher says: accelerate's name of it, or DDP;
            None where there is one.
        unsloth: the installed version, or None.
    """

    gpus: int
    sharded: str | None
    unsloth: str | None


@dataclass(frozen=True)
class Choice:
    """`kind` is peft or unsloth; `why` is a sentence for the log and the metrics."""

    kind: str
    why: str


def this_machine() -> Machine:
    """The machine that this process runs on.

    Raises:
        UserError: what a launcher says of its processes cannot be (`replace.launch.check`).
    """
    gpus = torch.cuda.device_count() if torch.version.cuda is not None else 0
    check()
    sharded = asked_for() or ("DDP" if world() > 1 else None)
    return Machine(gpus, sharded, unsloth_version())


def unsloth_version() -> str | None:
    """The installed version of Unsloth; nothing is imported."""
    try:
        return metadata.version("unsloth")
    except metadata.PackageNotFoundError:
        return None


def choose(options: LoraConfig, machine: Machine) -> Choice:
    """Peft or unsloth; for `auto` Unsloth where all that it is fast with is given."""
    if options.kind == "peft":
        return Choice("peft", "lora=peft")
    refusal = why_not_unsloth(options, machine)
    if refusal is not None:
        return Choice("peft", f"{refusal}, so the adapters are PEFT's")
    if options.kind == "unsloth":
        return Choice("unsloth", "lora=unsloth")
    if machine.gpus != 1:
        seen = f"{machine.gpus} NVIDIA GPUs are" if machine.gpus else "no NVIDIA GPU is"
        return Choice("peft", f"{seen} seen and Unsloth gains on one, so the adapters are PEFT's")
    return Choice("unsloth", "one NVIDIA GPU, dropout 0, no bias")


def why_not_unsloth(options: LoraConfig, machine: Machine) -> str | None:
    """The beginning of a sentence that says what stands against Unsloth, or None."""
    if options.dropout:
        return f"Unsloth's fast patches need lora.dropout=0 and it is {options.dropout}"
    if options.bias != "none":
        return f"Unsloth's fast patches need lora.bias=none and it is {options.bias}"
    if options.dora:
        return "lora.dora is an adapter that Unsloth's patches do not know"
    if machine.sharded is not None:
        return f"{machine.sharded} shards the model, which Unsloth's patches read past"
    if machine.unsloth is None:
        return "Unsloth is not installed here (README, `Tuning`, has the commands)"
    if not machine.gpus and Version(machine.unsloth) < ON_CPU:
        return f"Unsloth {machine.unsloth} needs a GPU (from {ON_CPU} on it runs without one)"
    return None
