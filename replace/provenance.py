"""provenance.json: versions, commit, command, data, model and machine, so that every figure can be traced."""

import hashlib
import json
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from replace.config import Config
from replace.corpora import Document, provenance_of
from replace.errors import resume_argument
from replace.files import atomic_write
from replace.loading import Loaded
from replace.secrets import blot

FILE = "provenance.json"
CODE = ("conf", "replace", "distill", "eval", "kernels", "pyproject.toml")
"""What makes a working tree dirty; a run's own folder beside it does not."""

PACKAGES = (
    "torch",
    "numpy",
    "triton",
    "transformers",
    "tokenizers",
    "safetensors",
    "accelerate",
    "peft",
    "datasets",
)
OTHERS = ("hydra-core", "wandb", "lm-eval", "layer-replace")

COMPARED = ("python", "machine", "device", "threads", "cuda", "versions", "commit", "dirty")
"""What of `environment` can change a figure."""


def environment(device: torch.device | str) -> dict[str, Any]:
    """The code and the machine that a figure is made by; `dirty` and `commit` are null without git."""
    changes = _git("status", "--porcelain", "--", *CODE)
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else None,
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "versions": {name: _version(name) for name in (*PACKAGES, *OTHERS)},
        "commit": _git("rev-parse", "HEAD"),
        "dirty": None if changes is None else bool(changes),
    }


def write_provenance(
    run_dir: Path, config: Config, loaded: Loaded, documents: Sequence[Document]
) -> list[str]:
    """Write provenance.json at a run's start; when the run is resumed, add by what it is.

    Returns:
        how the environment of a resumed run differs from that of its start, as `differing` has it.
    """
    path, here = run_dir / FILE, environment(loaded.model.device)
    now = {"command": command(config), "started": _now()}
    if path.exists():
        about = json.loads(path.read_text(encoding="utf-8"))
        about["resumed"] = [*about.get("resumed", []), now | here]
        _write(path, about)
        return differing(about, here)
    about = now | {"seed": config.seed} | here
    about |= {
        "config_sha256": hashlib.sha256((run_dir / "config.json").read_bytes()).hexdigest(),
        "model": loaded.provenance | {"weights_sha256": weights_sha256(loaded.model)},
        "data": provenance_of(documents),
    }
    _write(path, about)
    return []


def end_provenance(run_dir: Path, began: float) -> None:
    """Add when a run ended, and how long its last try took.

    Args:
        began: `time.perf_counter()` at its start.
    """
    about = json.loads((run_dir / FILE).read_text(encoding="utf-8"))
    took = round(time.perf_counter() - began, 1)
    _write(run_dir / FILE, about | {"ended": _now(), "wall_seconds": took})


def for_export(run_dir: Path) -> dict[str, Any]:
    """What an exported model says of itself: the teacher, and how and of what it was made, not where."""
    about = json.loads((run_dir / FILE).read_text(encoding="utf-8"))
    told = ("seed", "python", "versions", "commit", "dirty", "config_sha256", "data")
    return about["model"] | {name: about[name] for name in told}


def differing(before: dict, after: dict) -> list[str]:
    """How two environments differ, as `torch 2.11.0, now 2.12.0`; only what both record is compared."""
    found = []
    for name in COMPARED:
        if name not in before or name not in after:
            continue
        old, new = before[name], after[name]
        if name == "versions":
            found += [f"{p} {old[p]}, now {new[p]}" for p in old if p in new and old[p] != new[p]]
        elif old != new:
            found.append(f"{name} {old}, now {new}")
    return found


def command(config: Config) -> str:
    """The command line of this process, as a shell takes it, without keys."""
    if config.resume is not None:  # Hydra was given other words
        return f"python -m replace {resume_argument(Path(config.resume))}"
    return blot(shlex.join(["python", "-m", "replace", *sys.argv[1:]]))


def weights_sha256(model: nn.Module) -> str:
    """SHA-256 over the names and bytes of parameters and buffers; the same on every device."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _write(path: Path, about: dict) -> None:
    atomic_write(path, json.dumps(about, indent=1))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _version(name: str) -> str | None:
    """The installed version; None for a package that is only importable, such as a checkout on the path."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    """What git says of the project's folder; None where there is no git or no repository."""
    try:
        done = subprocess.run(
            ["git", *arguments],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=False,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
