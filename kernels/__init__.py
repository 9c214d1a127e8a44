"""The attention operators: for each a token-by-token reference and a chunked form that must equal it.

    from kernels import linear_attention

    out, state = linear_attention(phi_q, phi_k, v)

An operator's folder holds `reference.py` (token by token), `chunk.py` (plain PyTorch), `fused.py` (Triton),
`library.py` (the fused one as a torch.library operator) and `op.py` (what is public). Importing this package
imports none of them, nor torch: transformers probes the name `kernels` while it is being imported.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kernels.gated_delta_rule.op import gated_delta_rule, gated_delta_rule_step
    from kernels.infini_memory.op import infini_memory, infini_memory_step
    from kernels.infini_memory.state import InfiniCounters, InfiniState
    from kernels.linear_attention.op import linear_attention, linear_attention_step
    from kernels.linear_attention.state import LinearState
    from kernels.window_linear_attention.op import window_linear_attention, window_linear_attention_step
    from kernels.window_linear_attention.state import WindowLinearState

__all__ = [
    "InfiniCounters",
    "InfiniState",
    "LinearState",
    "WindowLinearState",
    "gated_delta_rule",
    "gated_delta_rule_step",
    "infini_memory",
    "infini_memory_step",
    "linear_attention",
    "linear_attention_step",
    "window_linear_attention",
    "window_linear_attention_step",
]

_PLACES = {
    "InfiniCounters": "kernels.infini_memory.state",
    "InfiniState": "kernels.infini_memory.state",
    "infini_memory": "kernels.infini_memory.op",
    "infini_memory_step": "kernels.infini_memory.op",
    "LinearState": "kernels.linear_attention.state",
    "gated_delta_rule": "kernels.gated_delta_rule.op",
    "gated_delta_rule_step": "kernels.gated_delta_rule.op",
    "linear_attention": "kernels.linear_attention.op",
    "linear_attention_step": "kernels.linear_attention.op",
    "WindowLinearState": "kernels.window_linear_attention.state",
    "window_linear_attention": "kernels.window_linear_attention.op",
    "window_linear_attention_step": "kernels.window_linear_attention.op",
}

# An operator and its folder share a name. The first import of a folder binds that name to the folder, so it
# is done here, once, and the name is freed for the operator; `from kernels.linear_attention import chunk`
# still finds the folder.
for _folder in ("gated_delta_rule", "infini_memory", "linear_attention", "window_linear_attention"):
    importlib.import_module(f"{__name__}.{_folder}")
    globals().pop(_folder, None)


def __getattr__(name: str) -> object:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(_PLACES[name]), name)
    globals()[name] = found
    return found
