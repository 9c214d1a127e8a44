"""Replace softmax attention in a pretrained decoder LLM, and know what was kept and what was lost.

Names to import:

    from replace import AttentionConfig, SwapSpec, export_model, load, restore, swap
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from replace.config import AttentionConfig
    from replace.convert import SwapSpec, restore, swap
    from replace.errors import UserError
    from replace.export.load import load
    from replace.export.write import export as export_model

__all__ = ["AttentionConfig", "SwapSpec", "UserError", "export_model", "load", "restore", "swap"]

# Imported on first use, because `import replace` must not cost what torch and transformers cost.
_PLACES = {
    "AttentionConfig": ("replace.config", "AttentionConfig"),
    "SwapSpec": ("replace.convert", "SwapSpec"),
    "UserError": ("replace.errors", "UserError"),
    "export_model": ("replace.export.write", "export"),
    "load": ("replace.export.load", "load"),
    "restore": ("replace.convert", "restore"),
    "swap": ("replace.convert", "swap"),
}


def __getattr__(name: str) -> object:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _PLACES[name]
    return getattr(importlib.import_module(module), attribute)
