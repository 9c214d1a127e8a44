"""What a run asks of the machine it is on."""

import logging
from pathlib import Path

import psutil
import torch

from replace.launch import asks_for_cpu

logger = logging.getLogger(__name__)

CGROUP = Path("/sys/fs/cgroup")


def device_of_choice() -> torch.device:
    """CUDA (a rank has a GPU of its own), else Apple's GPU, else the CPU, which a launcher may ask for."""
    if asks_for_cpu():
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def total_memory() -> int:
    """Bytes of this machine, or of what a container may have of it (cgroup v2)."""
    limit = CGROUP / "memory.max"
    total = psutil.virtual_memory().total
    if limit.is_file() and (most := limit.read_text().strip()).isdigit():
        return min(total, int(most))
    return total


def free_memory() -> int:
    """Bytes that can be taken without pushing anything out; a container's own limit (cgroup v2) counts."""
    free = psutil.virtual_memory().available
    limit, used = (CGROUP / name for name in ("memory.max", "memory.current"))
    if limit.is_file() and used.is_file() and (most := limit.read_text().strip()).isdigit():
        free = min(free, max(0, int(most) - int(used.read_text())))
    return free
