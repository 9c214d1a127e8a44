"""Infini-attention (Munkhdalai et al. 2024): a gate per head (and token) between exact part and memory."""

from types import ModuleType

import torch
from torch import Tensor

from kernels.linear_memory.chunk import EMPTY, Memory
from kernels.numerics import wide
from replace.blocks import Blocks, Call, Heads, grouped
from replace.config import AttentionConfig
from replace.gates import ReadGate
from replace.memory import MemoryMixer
from replace.mixer import VARIANTS
from replace.operators import operand_dtype, operators
from replace.rotary import RotarySpec


@VARIANTS.register("infini")
class Infini(MemoryMixer):
    """out = g A_mem + (1 - g) A_exact with A_mem = phi(q) M / (phi(q).z); g = 0 where the memory is empty.

    Untrained, the memory answers with a blurred mean of all that is older, so the swap is as far from the
    teacher as sigmoid of `gate_init` allows.

    Where `kernels.backend` asks for it, reading, joining and writing are one operator,
    `kernels.infini_memory`. It knows the linear update only, of a memory that holds the retained pairs too.
    """

    def __init__(self, options: AttentionConfig, heads: Heads, rotary: RotarySpec | None) -> None:
        super().__init__(options, heads, rotary)
        self.gate = ReadGate(heads, options.gate, options.gate_init)

    def mix(self, blocks: Blocks, exact: Tensor, mass: Tensor | None, call: Call) -> Tensor:
        """Join by the gate; see the class."""
        if self.unread("memory", call):
            return wide(exact)
        gate = blocks.layout.new(self.gate(call.hidden))
        if "window" in self.off:
            gate = torch.ones_like(gate)
        if "memory" in self.off:
            gate = torch.zeros_like(gate)
        # A compiler fuses the plain form by itself.
        plain = self.options.update != "linear" or torch.compiler.is_compiling()
        operator = None if plain else operators("infini_memory")
        if operator is not None:
            form, dtype = self._form(blocks, operator)
            if form != "chunk" and blocks.step:
                return self._read_by(operator, form, dtype, blocks, exact, gate, call)
            if form != "chunk":
                return self._remember_by(operator, form, dtype, blocks, exact, gate, call)
        numerator, denominator, _ = self.remember(blocks, call)
        held = denominator > EMPTY
        gate = torch.where(held, grouped(gate, self.heads, blocks.layout.block), 0)
        answer = numerator / torch.where(held, denominator, 1)
        return gate * answer + (1 - gate) * wide(exact)

    def _form(self, blocks: Blocks, operator: ModuleType) -> tuple[str, torch.dtype]:
        """What the operator is to run as, and in which dtype it is given features, values and exact part."""
        v, name = blocks.v, "infini_memory_step" if blocks.step else "infini_memory"
        dtype = operand_dtype(v.dtype, v.device)
        if blocks.step and torch.is_grad_enabled():
            return "chunk", dtype  # one token of a text that is trained on: no case for speed
        refusal = operator.refusal(self.features, self.heads.dim)
        return operator.choose(name, "auto", v.device, dtype, refusal), dtype

    def _read_by(
        self,
        operator: ModuleType,
        form: str,
        dtype: torch.dtype,
        blocks: Blocks,
        exact: Tensor,
        gate: Tensor,
        call: Call,
    ) -> Tensor:
        """One token that writes nothing; exact and what is returned are `[B, G, 1, R, D]`."""
        held, own = self._initial(blocks), blocks.layout.positions()[:, None, -1:]
        phi_q = self.map_q(self._scaled(blocks.q, own, call.scaling))
        given = (phi_q.squeeze(2).to(dtype), exact.flatten(1, 3).to(dtype), gate[..., 0, 0])
        out = operator.infini_memory_step(*given, (held.M, held.z, held.n), backend=form)
        return wide(out).view(exact.shape)

    def _remember_by(
        self,
        operator: ModuleType,
        form: str,
        dtype: torch.dtype,
        blocks: Blocks,
        exact: Tensor,
        gate: Tensor,
        call: Call,
    ) -> Tensor:
        """As `mix`; the state after the call goes to `blocks.after`.

        The keys that leave are those of the L blocks before the queries' own, so that to the operator nothing
        is in between. No query reads a block that has not left for good by the end of the call.
        """
        layout = blocks.layout
        own = layout.positions()[:, None, -blocks.q.shape[2] :]
        phi_q = self.map_q(self._scaled(blocks.q, own, call.scaling))
        k, v, weight, positions = (x.flatten(2, 3) for x in self._leaving(blocks))
        phi_k = self.map_k(self._scaled(k, positions, call.scaling))
        place = torch.arange(weight.shape[2], device=weight.device)
        weight = torch.where(place < layout.evicted().view(-1, 1, 1) * layout.block, weight, 0)
        given = (x.to(dtype).transpose(1, 2) for x in (phi_q, phi_k, v, self._to_slots(exact)))
        initial = None
        if blocks.state is not None:
            held = self._initial(blocks)
            initial = (held.M, held.z, held.n)
        out, state, counters = operator.infini_memory(
            *given,
            gate.squeeze(-1).transpose(1, 2),
            block=layout.block,
            write_gate=weight.transpose(1, 2),
            initial_state=initial,
            clamp=self.options.clamp,
            backend=form,
        )
        self.clamped = self.clamped + counters.clamped.sum()
        self.nonfinite = self.nonfinite + counters.nonfinite.sum()
        blocks.after = Memory(*state)
        return grouped(wide(out).transpose(1, 2), self.heads, layout.block)
