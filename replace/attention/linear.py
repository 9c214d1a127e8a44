"""Linear attention with an exact part under one denominator (Zhang et al. 2024, LoLCATs), or without one.

out = (sum_E e^{s_i - m} v_i + n a e^{-m} phi(q) M) / (sum_E e^{s_i - m} + n a e^{-m} phi(q).z), m the largest
exponent, E the sinks, the window and the retained pairs; every token is in E or in the memory, never in both.
a is a learned amplitude per head, 1 at the start: features are of the size of a probability, softmax weights
are not, and the mix must be able to find their ratio.

With `local: none` there is no softmax over the query's own block either: its tokens up to the query enter by
a w_j phi(q).phi(k_j), as the memory will count them once the block has left, w_j their write gates. E is then
the sinks, from the first query on, and the retained pairs, and may be empty.
"""

from functools import reduce
from types import ModuleType

import torch
from torch import Tensor, nn

from kernels.exact_attention.chunk import exact_attention_with_mass
from kernels.linear_memory.chunk import Memory
from kernels.numerics import wide
from replace.blocks import Blocks, Call, Heads, Part, grouped
from replace.config import AttentionConfig
from replace.memory import MemoryMixer
from replace.mixer import VARIANTS, BlockMixer
from replace.operators import operand_dtype, operators
from replace.rotary import RotarySpec


@VARIANTS.register("linear")
class Linear(MemoryMixer):
    """The linear hybrid: exact softmax while nothing is older; untrained, close to the window alone.

    With `local: none`, linear attention alone: untrained, a mean of all values that hardly selects, far from
    the teacher in every layer. The size of a block is then a matter of speed only.

    Where `kernels.backend` asks for it, window, memory and joining are one operator,
    `kernels.window_linear_attention`. It knows the linear update and no retained pairs. Sinks come to it as
    an answer of their own, since their distances are capped; a token of decoding that completes no block goes
    the general way.
    """

    needs_mass = True
    holds_retained = False
    local_parts = (*BlockMixer.local_parts, "none")

    def __init__(self, options: AttentionConfig, heads: Heads, rotary: RotarySpec | None) -> None:
        super().__init__(options, heads, rotary)
        self.alone = options.local == "none"
        self.knows_steps = self.knows_steps and not self.alone  # its own block is read by features
        # With nothing exact beside them the amplitude of features cancels, and could not be learned.
        mixed = not self.alone or options.sinks > 0 or options.pairs > 0
        self.log_amplitude = nn.Parameter(torch.zeros(heads.query)) if mixed else None

    def exact_parts(self, blocks: Blocks, call: Call) -> list[Part]:
        """As the base does; without the window where there is none."""
        if not self.alone:
            return super().exact_parts(blocks, call)
        parts = [*self._sink_part(blocks), *self._pair_part(blocks)]
        if not parts:  # one slot that nobody sees: the teacher's learned sinks may be all of the softmax
            place = self._window_start(blocks)[:, None, :, None]
            k, v = (self._by_block(x)[:, :, :, :1] * 0 for x in (blocks.k, blocks.v))
            parts = [Part(k, v, place, torch.zeros_like(place, dtype=torch.bool).unsqueeze(-1))]
        return parts

    def _sinks_seen(self, blocks: Blocks, place: Tensor) -> Tensor:
        """As the base does; without a window, sinks are exact from the first query on."""
        if not self.alone:
            return super()._sinks_seen(blocks, place)
        own = blocks.layout.positions().unflatten(1, (-1, self.block))  # [Q, N, S], since L = 0
        return (place <= own.unsqueeze(-1)).unsqueeze(1)

    def attend_exactly(self, blocks: Blocks, call: Call) -> tuple[Tensor, Tensor | None]:
        """As the base does; what the operator computes stays out of it."""
        if self._operator(blocks, call) is None:
            return super().attend_exactly(blocks, call)
        parts = self._sink_part(blocks)
        if not parts:
            return blocks.v.new_zeros(()), None
        q, k, v, mask = self._in_frame(blocks, parts)
        sink_logit = self._sink_logit(call)
        return exact_attention_with_mass(q, k, v, mask, call.scaling, sink_logit=sink_logit)

    def _operator(self, blocks: Blocks, call: Call) -> tuple[ModuleType, str, torch.dtype] | None:
        """The operator, what it is to run as and in which dtype; None where it does not know this call."""
        # A compiler fuses the plain form by itself.
        plain = self.alone or self.off or blocks.step or blocks.selection is not None
        plain = plain or self.options.update != "linear" or torch.compiler.is_compiling()
        far = (self.lookback + 1) * self.block
        narrow = call.sliding_window is not None and call.sliding_window < far
        unknown = call.softcap is not None or call.dropout or narrow
        lone_logit = call.sink_logit is not None and not self.options.sinks
        if plain or unknown or lone_logit:
            return None
        operator = operators("window_linear_attention")
        if operator is None:
            return None
        dtype = operand_dtype(blocks.v.dtype, blocks.v.device)
        refusal = operator.refusal(self.heads.dim, self.features, self.heads.dim)
        form = operator.choose("window_linear_attention", "auto", blocks.v.device, dtype, refusal)
        return None if form == "chunk" else (operator, form, dtype)

    def _attend_by(
        self,
        operator: ModuleType,
        form: str,
        dtype: torch.dtype,
        blocks: Blocks,
        sinks: tuple[Tensor, Tensor] | None,
        call: Call,
    ) -> Tensor:
        """As `mix`, of the sinks' answer and its log-denominator; the state goes to `blocks.after`.

        The operator is given the L blocks before the first query too, with queries of 0 whose answers are
        dropped. No query reads a block that has not left for good by the end of the call.
        """
        layout, held, before = blocks.layout, self._initial(blocks), self.lookback * self.block
        positions = layout.positions()
        query = wide(blocks.q)
        phi_q = self.map_q(self._scaled(blocks.q, positions[:, None, before:], call.scaling))
        phi_k = self.map_k(self._scaled(blocks.k, positions.unsqueeze(1), call.scaling))
        if self.log_amplitude is not None:
            phi_q = phi_q * self.log_amplitude.to(phi_q.dtype).exp().view(1, -1, 1, 1)
        key = wide(blocks.k)
        if self.rotary is not None:  # distances inside a window are true ones, wherever it is
            place = torch.arange(key.shape[2], device=key.device)
            query = self.rotary(query, place[before:], absolute=True)
            key = self.rotary(key, place, absolute=True)
        assert blocks.weight is not None
        keep = (blocks.valid & (positions >= self.options.sinks)).unsqueeze(1) & ~blocks.bad
        left = torch.arange(key.shape[2], device=key.device) < layout.evicted().view(-1, 1, 1) * layout.block
        weight = torch.where(keep & left & blocks.weight.isfinite(), blocks.weight, 0)

        def tokens(x: Tensor) -> Tensor:
            """`[Q, X, W or N S, ...]` -> `[Q, W, X, ...]`, 0 before the first query."""
            x = x.transpose(1, 2)
            return torch.nn.functional.pad(x, [0, 0] * (x.dim() - 2) + [key.shape[2] - x.shape[1], 0])

        extra = None
        if sinks is not None:
            answer, mass = (tokens(self._to_slots(wide(x))) for x in sinks)
            extra = (answer, mass.squeeze(-1))
        nothing = torch.zeros(len(positions), dtype=torch.int64, device=key.device)
        out, state, counters = operator.window_linear_attention(
            *(tokens(x).to(dtype) for x in (query, key, blocks.v, phi_q, phi_k)),
            block=layout.block,
            window=before,
            scale=call.scaling,
            write_gate=weight.transpose(1, 2),
            extra=extra,
            mask=blocks.valid,
            initial_state=(held.M, held.z, held.n, nothing),
            clamp=self.options.clamp,
            backend=form,
        )
        self.clamped = self.clamped + counters.clamped.sum()
        self.nonfinite = self.nonfinite + counters.nonfinite.sum()
        blocks.after = Memory(state.M, state.z, state.n)
        return grouped(wide(out[:, before:]).transpose(1, 2), self.heads, layout.block)

    def mix(self, blocks: Blocks, exact: Tensor, mass: Tensor | None, call: Call) -> Tensor:
        """Join under the shared denominator; see the module."""
        found = self._operator(blocks, call)
        if found is not None:
            return self._attend_by(*found, blocks, None if mass is None else (exact, mass), call)
        assert mass is not None
        if self.unread("memory", call) and not self.alone:
            return joined([(mass, wide(exact))])
        numerator, denominator, n = self.remember(blocks, call)
        log_memory = self._log_weight(n * denominator)
        empty = log_memory == -torch.inf
        memory = (log_memory, numerator / torch.where(empty, 1, denominator))
        near = [(mass, wide(exact))]
        if self.alone:
            near.append(self._own_block(blocks, call))
        if "memory" in self.off:
            return joined(near)
        if "window" in self.off:
            near = [(torch.where(empty, log, -torch.inf), answer) for log, answer in near]
        return joined([*near, memory])

    def _own_block(self, blocks: Blocks, call: Call) -> tuple[Tensor, Tensor]:
        """The own block by its features: the logarithm of its weight `[Q, G, N, R S, 1]`, and its answer."""
        assert blocks.phi_q is not None
        k, v, weight, positions = self._all_leaving(blocks)  # with L = 0 they are the queries' own blocks
        phi_k, fits = self._key_features(k, v, positions, call)
        seen = torch.ones(self.block, self.block, dtype=torch.bool, device=k.device).tril()
        if "window" in self.off:
            seen = seen & seen.T
        weights = (blocks.phi_q @ phi_k.transpose(-1, -2)).unflatten(3, (self.heads.repeat, self.block))
        weights = weights * torch.where(fits, weight, 0)[:, :, :, None, None]
        weights = torch.where(seen, weights, 0).flatten(3, 4)
        total = weights.sum(-1, keepdim=True)
        log = self._log_weight(total)
        return log, (weights / torch.where(log == -torch.inf, 1, total)) @ wide(v)

    def _log_weight(self, weight: Tensor) -> Tensor:
        """log(amplitude weight) for `weight [Q, G, N, R S, 1]`, -inf where that is 0 or, rounded, below."""
        tiny = torch.finfo(weight.dtype).tiny
        log = weight.clamp_min(tiny).log()
        if self.log_amplitude is not None:
            amplitude = self.log_amplitude.to(log.dtype).view(1, self.heads.key_value, 1, -1, 1)
            queries = weight.shape[3] // self.heads.repeat
            log = log + amplitude.expand(-1, -1, -1, -1, queries).flatten(3, 4).unsqueeze(-1)
        return torch.where(weight <= tiny, -torch.inf, log)


def joined(parts: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The mean of answers `[..., D]`, each after its log weight `[..., 1]`; 0 where all weights are."""
    top = reduce(torch.maximum, (log for log, _ in parts)).detach()
    top = torch.where(top == -torch.inf, 0, top)
    weights = torch.stack([(log - top).exp() for log, _ in parts])
    total = weights.sum(0)
    answers = (weights * torch.stack([answer for _, answer in parts])).sum(0)
    return answers / torch.where(total == 0, 1, total)
