"""Linear attention with an exact part under one denominator (Zhang et al. 2024, LoLCATs).

out = (sum_E e^{s_i - m} v_i + n a e^{-m} phi(q) M) / (sum_E e^{s_i - m} + n a e^{-m} phi(q).z), m the largest
exponent, E the sinks, the window and the retained pairs; every token is in E or in the memory, never in both.
a is a learned amplitude per head, 1 at the start: features are of the size of a probability, softmax weights
are not, and the mix must be able to find their ratio.
"""

import torch
from torch import Tensor, nn

from kernels.numerics import wide
from replace.blocks import Blocks, Call, Heads
from replace.config import AttentionConfig
from replace.memory import MemoryMixer
from replace.mixer import VARIANTS
from replace.rotary import RotarySpec


@VARIANTS.register("linear")
class Linear(MemoryMixer):
    """The linear hybrid: exact softmax while nothing is older; untrained, close to the window alone."""

    needs_mass = True
    holds_retained = False

    def __init__(self, options: AttentionConfig, heads: Heads, rotary: RotarySpec | None) -> None:
        super().__init__(options, heads, rotary)
        self.log_amplitude = nn.Parameter(torch.zeros(heads.query))

    def mix(self, blocks: Blocks, exact: Tensor, mass: Tensor | None, call: Call) -> Tensor:
        """Join under the shared denominator; see the module."""
        assert mass is not None
        numerator, denominator, n = self.remember(blocks, call)
        if "memory" in self.off:
            return wide(exact)
        tiny = torch.finfo(denominator.dtype).tiny
        amplitude = self.log_amplitude.to(mass.dtype).view(1, self.heads.key_value, 1, self.heads.repeat, 1)
        amplitude = amplitude.expand(-1, -1, -1, -1, blocks.layout.block).flatten(3, 4).unsqueeze(-1)
        log_memory = (n * denominator).clamp_min(tiny).log() + amplitude
        empty = n * denominator <= tiny
        log_memory = torch.where(empty, -torch.inf, log_memory)
        log_exact = torch.where(empty, mass, -torch.inf) if "window" in self.off else mass
        top = torch.maximum(log_exact, log_memory).detach()
        exact_weight, memory_weight = (log_exact - top).exp(), (log_memory - top).exp()
        answer = numerator / torch.where(empty, 1, denominator)
        return (exact_weight * wide(exact) + memory_weight * answer) / (exact_weight + memory_weight)
