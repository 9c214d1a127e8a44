"""What holds for all tests."""

import os

import torch
from hypothesis import settings

# How long an example takes says how busy the machine is, not whether the property holds.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

# Without a GPU the Triton kernels run in its interpreter. Triton reads this when it is first imported, so it
# is set here, before any test is.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
