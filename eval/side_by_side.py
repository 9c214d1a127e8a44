"""Independent forwards on a CPU: one beside the other, each on a core of its own.

A forward on all cores waits at each of its thousands of small operations until the slowest core is done, and
where another program has one of them, that is long. Forwards that have nothing to do with each other need
not wait, and give the same figures.
"""

import contextvars
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import nn

Given = TypeVar("Given")
Made = TypeVar("Made")

MOST = 4
"""Forwards at a time, since each holds its own activations and logits."""


def side_by_side(
    function: Callable[[Given], Made], items: Sequence[Given], model: nn.Module
) -> Iterator[Made]:
    """`function` of each item, in their order; it must not draw random numbers or change the model.

    Where a forward of `model` changes it all the same (`_follows_length`), one runs after the other.

    The threads see what is switched on where this is called: autocast, and the store of `eval.stored`. Within
    one of them all runs one after the other, as it does on an accelerator or with a single core.
    """
    cores = torch.get_num_threads()
    workers = min(cores, len(items), MOST)
    if workers < 2 or next(model.parameters()).device.type != "cpu" or _follows_length(model):
        yield from map(function, items)
        return
    own, dtype = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")

    def one(item: Given) -> Made:
        torch.set_num_threads(cores // workers)
        with torch.inference_mode(), torch.autocast("cpu", dtype=dtype, enabled=own):
            return function(item)

    pool = ThreadPoolExecutor(workers, thread_name_prefix="side by side")
    try:
        waiting = [pool.submit(contextvars.copy_context().run, one, item) for item in items]
        for future in waiting:
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)  # waits for what has begun
        torch.set_num_threads(cores)  # it also says with how many a later thread begins


def _follows_length(model: nn.Module) -> bool:
    """Whether the rotary tables are set anew for the length of each text, as transformers does by type.

    Beside each other a long and a short text would take these tables from one another.
    """
    kinds: list[str] = []
    for module in model.modules():
        kind = getattr(module, "rope_type", "")
        kinds += kind.values() if isinstance(kind, dict) else [kind]  # by layer type in some families
    return any("dynamic" in kind or kind == "longrope" for kind in kinds)
