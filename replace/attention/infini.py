"""Infini-attention (Munkhdalai et al. 2024): a gate per head (and token) between exact part and memory."""

import torch
from torch import Tensor

from kernels.linear_memory.chunk import EMPTY
from kernels.numerics import wide
from replace.blocks import Blocks, Call, Heads, grouped
from replace.config import AttentionConfig
from replace.gates import ReadGate
from replace.memory import MemoryMixer
from replace.mixer import VARIANTS
from replace.rotary import RotarySpec


@VARIANTS.register("infini")
class Infini(MemoryMixer):
    """out = g A_mem + (1 - g) A_exact with A_mem = phi(q) M / (phi(q).z); g = 0 where the memory is empty.

    Untrained, the memory answers with a blurred mean of all that is older, so the swap is as far from the
    teacher as sigmoid of `gate_init` allows.
    """

    def __init__(self, options: AttentionConfig, heads: Heads, rotary: RotarySpec | None) -> None:
        super().__init__(options, heads, rotary)
        self.gate = ReadGate(heads, options.gate, options.gate_init)

    def mix(self, blocks: Blocks, exact: Tensor, mass: Tensor | None, call: Call) -> Tensor:
        """Join by the gate; see the class."""
        numerator, denominator, _ = self.remember(blocks, call)
        held = denominator > EMPTY
        gate = grouped(blocks.layout.new(self.gate(call.hidden)), self.heads, blocks.layout.block)
        if "window" in self.off:
            gate = torch.ones_like(gate)
        gate = torch.where(held, gate, 0) if "memory" not in self.off else torch.zeros_like(gate)
        answer = numerator / torch.where(held, denominator, 1)
        return gate * answer + (1 - gate) * wide(exact)
