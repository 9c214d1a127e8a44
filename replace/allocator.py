"""How CUDA's memory is handed out, which torch reads once, before the first tensor is there."""

import os
from collections.abc import MutableMapping

SETTINGS = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
"""The older and the newer name; a user's own setting under either stays."""


def grow_segments(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let segments grow in place, so that rows of different lengths do not leave holes that nothing fits."""
    if not any(environment.get(name) for name in SETTINGS):
        environment[SETTINGS[0]] = "expandable_segments:True"
