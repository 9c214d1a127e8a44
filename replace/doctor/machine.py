"""What the standard library knows of the machine: memory, disk, caches, the settings of W&B."""

import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from replace.files import expanded
from replace.wheels import cache_dir

WALK = 3.0
"""Seconds after which a cache is no longer counted."""
CGROUP = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSW", re.IGNORECASE)
LEAST_SECRET = 6
"""Characters of a secret; a shorter value would blot out ordinary words."""


def python_facts() -> dict[str, Any]:
    """The interpreter and the system."""
    environment = "virtual environment" if sys.prefix != sys.base_prefix else "no virtual environment"
    return {
        "version": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "environment": environment,
        "cores": os.cpu_count(),
    }


def memory_facts() -> dict[str, int | None]:
    """Bytes of memory in all, as far as this process may use it, and available now (None if not known)."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for place in CGROUP:
        if Path(place).is_file():
            limit = Path(place).read_text(encoding="ascii").strip()
            total = min(total, int(limit)) if limit.isdigit() else total
    available = None
    if Path("/proc/meminfo").is_file():
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(encoding="ascii"))
        available = min(total, int(found[1]) * 1024) if found else None
    return {"total_bytes": total, "available_bytes": available}


def nvidia_gpus() -> list[str]:
    """The GPUs that the driver lists, whatever torch thinks; none without the driver's own tool."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    query = [tool, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    said = subprocess.run(query, capture_output=True, text=True, check=False, timeout=20)
    return [line.strip() for line in said.stdout.splitlines() if line.strip()] if said.returncode == 0 else []


def place_facts(place: Path) -> dict[str, Any]:
    """A folder, there or not: whether it can be written, and the bytes that are free."""
    there = next(folder for folder in (place, *place.absolute().parents) if folder.exists())
    why = None
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        why = error.strerror or str(error)
    return {"place": tilde(str(place)), "free_bytes": shutil.disk_usage(there).free, "unwritable": why}


def cache_places() -> dict[str, Path]:
    """The caches that a run may fill, by what they hold."""
    hub = os.environ.get("HF_HUB_CACHE") or Path(os.environ.get("HF_HOME") or "~/.cache/huggingface") / "hub"
    triton = os.environ.get("TRITON_CACHE_DIR") or "~/.triton/cache"
    return {
        "models and texts": cache_dir(),
        "Hugging Face's hub": expanded(hub),
        "compiled Triton kernels": expanded(triton),
    }


def size_of(folder: Path) -> dict[str, Any]:
    """Bytes of the files below a folder, links not followed; `whole` is False if that took too long."""
    total, end = 0, time.monotonic() + WALK
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(parent, name)).st_size
            except OSError:  # gone since it was listed
                continue
        if time.monotonic() > end:
            return {"place": tilde(str(folder)), "bytes": total, "whole": False}
    return {"place": tilde(str(folder)), "bytes": total, "whole": True}


def wandb_facts() -> dict[str, Any]:
    """The mode that `logger=wandb` would take (`replace.logger`); whether there is a key, never the key."""
    mode, key = os.environ.get("WANDB_MODE"), bool(os.environ.get("WANDB_API_KEY"))
    chosen = mode or ("online" if key else "offline")
    why = f"WANDB_MODE={mode}" if mode else "WANDB_API_KEY is set" if key else "no key in WANDB_API_KEY"
    return {"mode": chosen, "key": key, "why": why}


def tilde(text: str) -> str:
    """A text with the home folder as ~."""
    home = str(Path.home())
    return text if len(home) < 2 else re.sub(rf"{re.escape(home)}(?=[/\\]|\b|$)", "~", text)


def without_secrets(value: Any) -> Any:
    """The value with ~ for the home folder and *** for whatever the environment calls a key or a password.

    An error of somebody else's package may quote both.
    """
    if isinstance(value, dict):
        return {without_secrets(name): without_secrets(item) for name, item in value.items()}
    if isinstance(value, list):
        return [without_secrets(item) for item in value]
    if not isinstance(value, str):
        return value
    for name, secret in os.environ.items():
        if SECRET.search(name) and len(secret) >= LEAST_SECRET:
            value = value.replace(secret, "***")
    return tilde(re.sub(r"://[^/\s@]+@", "://***@", value))
