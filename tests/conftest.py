"""What holds for all tests."""

import logging
import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

from kernels.dispatch import force
from replace.console import Console

# How long an example takes says how busy the machine is, not whether the property holds.
settings.register_profile("patient", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("patient")

# Without a GPU the Triton kernels run in its interpreter. Triton reads this when it is first imported, so it
# is set here, before any test is.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    """A command that a test runs in this process leaves its console and its form of operators to none."""
    yield
    force("auto")
    for name in (None, "replace", "distill", "eval", "kernels"):
        log = logging.getLogger(name)
        log.handlers[:] = [handler for handler in log.handlers if not isinstance(handler, Console)]
