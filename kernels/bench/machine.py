"""On what, with what and of which commit figures were measured."""

import importlib.metadata
import platform
import re
import subprocess
from pathlib import Path

import torch

PACKAGES = ("torch", "triton", "fla-core")


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's with the threads that torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_processor()} ({torch.get_num_threads()} threads)"


def file_name(device: torch.device) -> str:
    """What a device's results are called: `cpu`, or the GPU's name in small letters."""
    if device.type == "cpu":
        return "cpu"
    return "-".join(re.findall(r"[a-z0-9]+", device_name(device).lower()))


def versions() -> str:
    """Python and what the operators run on."""
    found = [f"python {platform.python_version()}"]
    for package in PACKAGES:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def commit() -> str:
    """The commit of this checkout, `+` behind it where a kernel was changed since; "" outside a checkout."""
    folder = Path(__file__).parents[1]
    head = _git(folder, "rev-parse", "--short", "HEAD")
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no", "--", "*.py")
    return head + ("+" if changed else "")


def _git(folder: Path, *arguments: str) -> str:
    try:
        ended = subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, check=False, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return ended.stdout.strip() if ended.returncode == 0 else ""


def _processor() -> str:
    places = Path("/proc/cpuinfo")
    if places.is_file():
        for line in places.read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()
