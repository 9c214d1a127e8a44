"""The most bytes that tensors take at once while something runs."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def peak_bytes(device: torch.device, work: Callable[[], Any]) -> int:
    """Bytes that `work` needs at once on top of what is there already.

    A GPU's allocator counts them. Elsewhere each new storage is counted as operators make it and until it is
    freed; what an operator takes and frees inside itself is not seen.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    with _Counter() as counter:
        work()
    return counter.most


class _Counter(TorchDispatchMode):
    """Counts the bytes of storages that are made under it."""

    def __init__(self) -> None:
        super().__init__()
        self.held = self.most = 0
        self.known: weakref.WeakSet = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = {id(_storage(x)) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = _storage(tensor)
                if id(storage) not in before and storage not in self.known:
                    self.known.add(storage)
                    self._change(storage.nbytes())
                    weakref.finalize(storage, self._change, -storage.nbytes())
        return out

    def _change(self, size: int) -> None:
        self.held += size
        self.most = max(self.most, self.held)


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    return tensor.untyped_storage()
