"""Long texts and large activations: the running mean, the guard, fp32 states (properties 6 and 11)."""

import pytest
import torch
from torch import Tensor

from kernels.linear_memory.chunk import Memory, write_linear
from replace.blocks import Call, Heads
from replace.cache import ReplacedCacheLayer
from replace.config import AttentionConfig
from replace.mixer import VARIANTS, BlockMixer

HEADS = Heads(1, 1, 8, 8)
SMALL = {"block": 64, "window": 64, "sinks": 4, "pairs": 8, "pairs_score": "key_norm", "distance_cap": 256}
VARIATIONS = {
    "window-pairs": {"name": "sliding_window"},
    "infini": {"name": "infini", "pairs": 0},
    "infini-elu": {"name": "infini", "feature_map": "elu"},
    "linear": {"name": "linear"},
    "delta": {"name": "infini", "update": "delta_bounded", "pairs": 0},
}


def mixer_of(name: str) -> BlockMixer:
    """One head in fp32."""
    options = AttentionConfig(**(SMALL | VARIATIONS[name]))
    return VARIANTS.get(options.name)(options, HEADS, None)


def tokens(length: int, seed: int) -> tuple[Tensor, ...]:
    """q, k, v `[1, 1, T, 8]` and the layer's input `[1, T, 8]`."""
    generator = torch.Generator().manual_seed(seed)
    return (
        *(torch.randn(1, 1, length, 8, generator=generator) for _ in range(3)),
        torch.randn(1, length, 8, generator=generator),
    )


@torch.no_grad()
def test_11_a_million_tokens_stay_near_double_precision() -> None:
    """2^20 tokens, block by block: the relative RMS of M and z against fp64 is below 1e-4."""
    generator = torch.Generator().manual_seed(0)
    single = Memory.empty(1, 1, 16, 8, torch.device("cpu"))
    double = Memory(single.M.double(), single.z.double(), single.n)
    for _ in range(256):
        features = torch.rand(1, 1, 64, 64, 16, generator=generator)
        values = torch.randn(1, 1, 64, 64, 8, generator=generator) + 0.1
        weight = torch.rand(1, 1, 64, 64, generator=generator)
        states, _ = write_linear(features, values, weight, single, 1e4)
        exact, _ = write_linear(features.double(), values.double(), weight.double(), double, 1e4)
        single = Memory(states.M[:, :, -1], states.z[:, :, -1], states.n[:, :, -1])
        double = Memory(exact.M[:, :, -1], exact.z[:, :, -1], exact.n[:, :, -1])
    for got, want in ((single.M, double.M), (single.z, double.z), (single.n, double.n)):
        error = (got.double() - want.double()).square().mean().sqrt() / want.double().square().mean().sqrt()
        assert float(error) < 1e-4


@pytest.mark.parametrize("name", ["infini-elu", "linear"])
@torch.no_grad()
def test_6_state_bytes_at_a_million_tokens(name: str) -> None:
    mixer, slot, sizes = mixer_of(name), ReplacedCacheLayer(), []
    piece = tokens(16384, 0)
    for _ in range(64):
        out = mixer(*piece[:3], Call(piece[3], 0.4, slot=slot))
        assert slot.state is not None
        sizes.append(sum(x.numel() * x.element_size() for x in slot.state.tensors().values()))
    assert int(slot.state.length) == 2**20
    assert out.isfinite().all()
    assert slot.state.memory_n is not None
    lost = SMALL["sinks"] + SMALL["window"] + (SMALL["pairs"] if name == "linear" else 0)
    if mixer.options.write_gate == "none":
        assert float(slot.state.memory_n) == 2**20 - lost
    assert len(set(sizes)) == 1


@pytest.mark.parametrize("name", VARIATIONS)
@torch.no_grad()
def test_11_half_precision_over_a_long_text(name: str) -> None:
    """131,072 tokens in fp16, activations at 1e3: finite, and nothing is skipped.

    Only ELU's features grow with the keys: there a mean update, 1e5 and more, is beyond the guard of 1e4.
    """
    mixer, slot = mixer_of(name), ReplacedCacheLayer()
    q, k, v, hidden = tokens(16384, 1)
    q, k, v = ((1e3 * x).half() for x in (q, k, v))
    for _ in range(8):
        out = mixer(q, k, v, Call(hidden.half(), 0.4, slot=slot))
        assert out.isfinite().all()
    assert int(mixer.nonfinite) == 0
    assert (int(mixer.clamped) > 0) == (name == "infini-elu")
    assert slot.state is not None
    assert all(x.isfinite().all() for x in slot.state.tensors().values() if x.is_floating_point())


@pytest.mark.parametrize("scale", [1.0, 1e3])
@pytest.mark.parametrize("name", VARIATIONS)
def test_11_gradients_are_finite_wherever_fp16_can_hold_them(name: str, scale: float) -> None:
    """The gradients of fp16 inputs against those of an fp64 copy of everything."""
    found = []
    for dtype in (torch.float64, torch.float16):
        mixer = mixer_of(name)
        mixer = mixer.double() if dtype == torch.float64 else mixer
        q, k, v, hidden = (x.half() for x in tokens(320, 2))
        leaves = [(scale * x).half().to(dtype).requires_grad_() for x in (q, k, v)]
        out = mixer(*leaves, Call(hidden.to(dtype), 0.4))
        # A mean keeps the incoming gradient of the size that a loss gives it.
        out.to(torch.float64 if dtype == torch.float64 else torch.float32).mean().backward()
        found.append([x.grad for x in leaves])
    compared = 0
    for exact, got in zip(*found, strict=True):
        fits = exact.abs() < torch.finfo(torch.float16).max
        assert got[fits].isfinite().all()
        compared += int(fits.sum())
    assert compared > 3 * 300 * 8
