"""Which tests of fused kernels can run here: `gpu` on a CUDA device, `interpret` in Triton's interpreter."""

import importlib.util

import pytest
import torch

from kernels.dispatch import interpreted


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine cannot run, with the reason."""
    installed = importlib.util.find_spec("triton") is not None
    for item in items:
        if item.get_closest_marker("gpu") and (interpreted() or not torch.cuda.is_available()):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and TRITON_INTERPRET unset"))
        if item.get_closest_marker("interpret") and not (interpreted() and installed):
            item.add_marker(pytest.mark.skip(reason="needs triton and TRITON_INTERPRET=1"))
