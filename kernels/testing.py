"""What tests and the benchmark compare with: one table of tolerances, by RMS ratio, and poisoned memory."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# (outputs and states, gradients), from design 04; never loosened.
_TOLERANCES = {
    torch.float64: (1e-10, 1e-10),
    torch.float32: (1e-5, 1e-5),
    torch.float16: (2e-3, 5e-3),
    torch.bfloat16: (6e-3, 1e-2),
}
_FP32_ON_A_GPU = 1e-3


def tolerance(dtype: torch.dtype, device: str = "cpu", gradient: bool = False) -> float:
    """The largest RMS ratio at which results of inputs in `dtype` count as equal.

    Args:
        device: "cpu" or "cuda", where they were computed.
        gradient: whether they are gradients.
    """
    if dtype == torch.float32 and device != "cpu":
        return _FP32_ON_A_GPU
    return _TOLERANCES[dtype][gradient]


def rms_ratio(got: Tensor, want: Tensor) -> float:
    """RMS of the difference over the RMS of `want`, in fp64; of a `want` of zeros, the RMS of `got`."""
    have, truth = (x.detach().cpu().double() for x in (got, want))
    error, scale = (x.square().mean().sqrt() for x in (have - truth, truth))
    return float(error / scale) if float(scale) > 0 else float(error)


def assert_close(name: str, got: Tensor, want: Tensor, ratio: float) -> None:
    """`got` equals `want` within an RMS ratio; a NaN equals nothing.

    Raises:
        AssertionError: naming what differs and by how much.
    """
    assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    error = rms_ratio(got, want)
    assert error <= ratio, f"{name}: relative RMS error {error:.1e} above {ratio:.0e}"


@contextmanager
def poisoned() -> Iterator[None]:
    """Inside, `torch.empty` and its kin hold NaN: what a kernel leaves unwritten shows.

    It is torch's own filling of new memory under deterministic algorithms.
    """
    enabled = torch.are_deterministic_algorithms_enabled()
    warned = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warned)
