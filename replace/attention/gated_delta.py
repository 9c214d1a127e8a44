"""Gated DeltaNet (Yang et al. 2024) behind the exact part, with a scaled step instead of unit-norm keys.

The memory S `[D, Dv]` of a key-value head takes the tokens that have left the window one by one, sinks left
out and retained pairs included, once their block has left:

    S <- alpha_t S;   S <- S + b_t k_t (v_t - k_t S)^T,   b_t = beta_t / (|k_t|^2 + eps),
    beta_t = sigmoid(w.x_t + b),   alpha_t = exp(-softplus(u.x_t + c)).

It answers A_mem = e^a q S, a one number per query head, and is joined as in Infini-attention:

    out = g A_mem + (1 - g) A_exact,   g = 0 where nothing has been written.

Queries and keys have neither position nor scale here: b_t undoes the size of the keys, e^a that of the
queries. At the start w = u = a = 0, beta = `step_init` and alpha = `decay_init`.
"""

import math
from dataclasses import replace
from types import ModuleType
from typing import ClassVar

import torch
from torch import Tensor, nn

from kernels.gated_delta_rule.chunk import Written, sound, write_gated_delta
from kernels.numerics import count_dtype, wide
from replace.blocks import Blocks, Call, Heads, grouped
from replace.cache import State
from replace.config import AttentionConfig
from replace.errors import bad_value
from replace.gates import ReadGate, TokenMap
from replace.mixer import VARIANTS, BlockMixer
from replace.operators import operand_dtype, operators
from replace.rotary import RotarySpec

UNREACHED = 1e30
"""A clamp from here on limits nothing that fp32 holds: what is written is below 1e15."""


@VARIANTS.register("gated_delta")
class GatedDelta(BlockMixer):
    """The exact part and a gated delta memory, joined by a gate.

    Untrained, the memory answers with a blurred mixture of the values under the keys that point where the
    query does, the latest first, at about the size of the exact part: the swap is as far from the teacher
    as sigmoid of `gate_init` allows, and is the exact part where nothing has left the window.

    Where `kernels.backend` asks for it and `clamp` is `UNREACHED` or more, what the memory answers and
    becomes is one operator, `kernels.gated_delta_rule`, which has no such guard. A token of decoding that
    completes no block goes the general way.

    In the state, memory_M is S, memory_n the number of tokens written, memory_z None; `own` holds step (beta)
    and log_decay of the local tokens, each `[B, G, (L + 1) S]` fp32.
    """

    has_memory = True
    own_options: ClassVar[dict[str, object]] = {"decay_init": 0.999, "step_init": 0.5}

    @classmethod
    def check(cls, options: AttentionConfig) -> None:
        """As the base does, and both starting values must lie strictly between 0 and 1.

        Raises:
            UserError: they do not.
        """
        super().check(options)
        for name in cls.own_options:
            value = cls.own_option(options, name)
            if not 0 < value < 1:
                raise bad_value(f"attention.own.{name}", value, "a number between 0 and 1, both excluded")

    def __init__(self, options: AttentionConfig, heads: Heads, rotary: RotarySpec | None) -> None:
        super().__init__(options, heads, rotary)
        step, decay = (self.own_option(options, name) for name in ("step_init", "decay_init"))
        self.gate = ReadGate(heads, options.gate, options.gate_init)
        self.log_amplitude = nn.Parameter(torch.zeros(heads.query))
        self.step = TokenMap(heads, math.log(step / (1 - step)))
        self.decay = TokenMap(heads, math.log(1 / decay - 1))  # the inverse of exp(-softplus(c))

    def arrange(self, query: Tensor, key: Tensor, value: Tensor, call: Call) -> Blocks:
        """As the base does, with steps and decays put into slots as well."""
        blocks = super().arrange(query, key, value, call)
        for name, figure in self._figures(call.hidden).items():
            past = None if blocks.state is None else blocks.state.own[name]
            figure = blocks.layout.new(figure.unsqueeze(-1)).squeeze(-1)
            blocks.own[name] = self._with_past(blocks.layout, figure, past)
        return blocks

    def _figures(self, hidden: Tensor) -> dict[str, Tensor]:
        """Steps and decays of new tokens, each `[B, G, T]`."""
        decay = torch.nn.functional.softplus(self.decay(hidden))
        return {"step": self.step(hidden).sigmoid(), "log_decay": -decay}

    def write_weights(self, hidden: Tensor) -> Tensor | None:
        """The steps beta."""
        return self._figures(hidden)["step"]

    def mix(self, blocks: Blocks, exact: Tensor, mass: Tensor | None, call: Call) -> Tensor:
        """Join by the gate; see the module."""
        if self.unread("memory", call):
            return wide(exact)
        size = blocks.layout.block
        own = blocks.layout.positions()[:, None, -blocks.q.shape[2] :]
        amplitude = self.log_amplitude.exp().to(wide(blocks.q).dtype).view(1, -1, 1, 1)
        query = self._turned(blocks.q, own) * amplitude
        found = self._operator(blocks)
        if found is not None:
            answer, count = self._read_by(*found, blocks, query)
        else:
            memory, count = self._held(blocks) if blocks.step else self._write_all(blocks)
            answer = grouped(query, self.heads, size) @ memory
        gate = grouped(blocks.layout.new(self.gate(call.hidden)), self.heads, size)
        if "window" in self.off:
            gate = torch.ones_like(gate)
        held = (count > 0)[..., None, None]
        gate = torch.where(held, gate, 0) if "memory" not in self.off else torch.zeros_like(gate)
        return gate * answer + (1 - gate) * wide(exact)

    def _operator(self, blocks: Blocks) -> tuple[ModuleType, str, torch.dtype] | None:
        """The operator, what it is to run as and in which dtype; None where it does not know this call."""
        # A compiler fuses the plain form by itself.
        if blocks.step or self.options.clamp < UNREACHED or torch.compiler.is_compiling():
            return None
        operator = operators("gated_delta_rule")
        if operator is None or operator.refusal(self.heads.dim, self.heads.dim) is not None:
            return None
        dtype = operand_dtype(blocks.v.dtype, blocks.v.device)
        form = operator.choose("gated_delta_rule", "auto", blocks.v.device, dtype)
        return None if form == "chunk" else (operator, form, dtype)

    def _read_by(
        self, operator: ModuleType, form: str, dtype: torch.dtype, blocks: Blocks, query: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What the memory answers `[Q, G, N, R S, D]`, and the tokens written before each block.

        The operator is given the queries of each block, which write nothing, and after them what leaves with
        it. No query reads a block that has not left for good by the end of the call, so the others are not
        written here: the state is that after the call.
        """
        layout = blocks.layout
        k, v, step, log_decay, mask = self._leaving(blocks)
        *tokens, written = sound(wide(k), wide(v), wide(step), wide(log_decay), mask)
        final = torch.arange(layout.blocks, device=k.device) < layout.evicted()[:, None]  # [Q, N]
        final = final[:, None, :, None]
        self.nonfinite = self.nonfinite + (mask & ~written & final).sum()
        tokens = [torch.where(final.unsqueeze(-1) if x.dim() == 5 else final, x, 0) for x in tokens]

        def stream(x: Tensor, first: bool) -> Tensor:
            """`[Q, X, N, S, ...]` and as many zeros after or before each block: `[Q, 2 N S, X, ...]`."""
            rest = torch.zeros_like(x)
            return torch.cat([x, rest] if first else [rest, x], 3).flatten(2, 3).transpose(1, 2)

        q, (k, v, step, log_decay) = self._by_block(query), tokens
        state = blocks.state
        out, last = operator.gated_delta_rule(
            stream(q, True).to(dtype),
            stream(k, False).to(dtype),
            stream(v, False).to(dtype),
            stream(step, False),
            stream(log_decay, False),
            initial_state=None if state is None else state.memory_M,
            backend=form,
        )
        count = self._count(blocks, written)
        blocks.own |= {"last": last, "count": count}
        answer = wide(out).unflatten(1, (-1, 2 * layout.block))[:, :, : layout.block].flatten(1, 2)
        return grouped(answer.transpose(1, 2), self.heads, layout.block), count[:, :, :-1]

    @staticmethod
    def _held(blocks: Blocks) -> tuple[Tensor, Tensor]:
        """The memory `[B, G, 1, D, Dv]` before a step that writes nothing, and its count `[B, G, 1]`."""
        state = blocks.state
        assert state is not None
        assert state.memory_M is not None
        assert state.memory_n is not None
        return state.memory_M.unsqueeze(2), state.memory_n.unsqueeze(2)

    def _write_all(self, blocks: Blocks) -> tuple[Tensor, Tensor]:
        """Write what leaves, and count; the memory before each block `[Q, G, N, D, Dv]`, and its count."""
        written = self._write(blocks)
        count = self._count(blocks, written.written)
        final = torch.arange(count.shape[2] - 1, device=count.device) < blocks.layout.evicted()[:, None]
        final = final.unsqueeze(1)
        # What is written now but has not left for good is written again by the next call: count it then.
        lost = self.may_leave(blocks) & ~written.written & final.unsqueeze(-1)
        self.clamped = self.clamped + (written.clamped & final).sum()
        self.nonfinite = self.nonfinite + lost.sum()
        blocks.own |= {"states": written.states, "count": count}
        return written.states[:, :, :-1], count[:, :, :-1]

    def _leaving(self, blocks: Blocks) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Keys and values `[Q, G, N, S, D]` of each block that leaves during the call, and `[Q, G, N, S]`
        steps, decays and which tokens may be written.
        """
        k, v = blocks.k[:, :, blocks.leaving], blocks.v[:, :, blocks.leaving]
        k = self._turned(k, blocks.layout.positions()[:, None, blocks.leaving])
        step, log_decay = (self._by_block(blocks.own[x][:, :, blocks.leaving]) for x in ("step", "log_decay"))
        return self._by_block(k), self._by_block(v), step, log_decay, self.may_leave(blocks)

    def _write(self, blocks: Blocks) -> Written:
        """Write each block that leaves during the call on top of what was there."""
        k, v, step, log_decay, mask = self._leaving(blocks)
        state = blocks.state
        if state is not None and state.memory_M is not None:
            initial = state.memory_M
        else:
            initial = wide(k).new_zeros(*k.shape[:2], k.shape[-1], v.shape[-1])
        return write_gated_delta(k, v, step, log_decay, mask, initial, self.options.clamp)

    def _turned(self, x: Tensor, positions: Tensor) -> Tensor:
        """`x [Q, X, P, D]` in fp32, rotated where the recipe asks for it."""
        if self.options.rotary and self.rotary is not None:
            x = self.rotary(x, positions, absolute=True)
        return wide(x)

    def _count(self, blocks: Blocks, written: Tensor) -> Tensor:
        """`[Q, G, N + 1]`: the tokens `written [Q, G, N, S]` before each block and after the last."""
        new = written.sum(-1).to(count_dtype(blocks.v.device))
        past = None if blocks.state is None else blocks.state.memory_n
        past = torch.zeros_like(new[:, :, 0]) if past is None else past
        return torch.cat([past.unsqueeze(-1), new], dim=-1).cumsum(-1)

    @torch.no_grad()
    def scores(self, blocks: Blocks, key: Tensor, value: Tensor, call: Call) -> Tensor:
        """As the base does; self recall asks the memory of all older tokens for the leaving ones."""
        assert self.score is not None
        if self.score.needs != "memory":
            return super().scores(blocks, key, value, call)
        k, v = blocks.k[:, :, blocks.leaving], self._by_block(blocks.v[:, :, blocks.leaving])
        k = self._by_block(self._turned(k, blocks.layout.positions()[:, None, blocks.leaving]))
        residual = self.score(wide(v), k @ self._write(blocks).states[:, :, :-1]).flatten(2)
        return torch.nn.functional.pad(residual, (0, blocks.k.shape[2] - residual.shape[2]))

    def step_state(self, blocks: Blocks, key: Tensor, value: Tensor, call: Call) -> State:
        """The base's, with the new token's step and decay."""
        state, here = super().step_state(blocks, key, value, call), blocks.valid.unsqueeze(1)
        new = self._figures(call.hidden)
        own = {name: torch.where(here, new[name], past) for name, past in state.own.items()}
        return replace(state, own=own)

    def next_state(self, blocks: Blocks) -> State:
        """The base's state with the memory, and the steps and decays of what is local."""
        evicted, last = blocks.layout.evicted(), blocks.own.get("last")
        return replace(
            super().next_state(blocks),
            memory_M=self._at(blocks.own["states"], evicted) if last is None else last,
            memory_n=self._at(blocks.own["count"], evicted),
            own={name: self._local(blocks.own[name], evicted) for name in ("step", "log_decay")},
        )
