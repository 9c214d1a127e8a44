"""A linear memory behind the exact part: what it is given, how it is written, and what it answers."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from kernels.linear_memory.chunk import (
    EMPTY,
    LARGEST,
    Memory,
    count_dtype,
    read,
    write_delta,
    write_delta_bounded,
    write_linear,
)
from kernels.numerics import wide
from kernels.retained_pairs.chunk import gather_pool
from replace.blocks import Blocks, Call, Heads, grouped
from replace.cache import State
from replace.config import AttentionConfig
from replace.errors import bad_value
from replace.feature_maps import FEATURE_MAPS, check_feature_map
from replace.mixer import BlockMixer
from replace.registry import Registry
from replace.rotary import RotarySpec
from replace.scores import SCORES

UPDATES: Registry = Registry("attention.update")
UPDATES.register("linear")(write_linear)
UPDATES.register("delta")(write_delta)
UPDATES.register("delta_bounded")(write_delta_bounded)


class WriteGate(nn.Module):
    """w_t = sigmoid(a.x_t + b) per key-value head: what is worth storing.

    a = b = 0 at the start, so all tokens weigh alike.
    """

    def __init__(self, heads: Heads) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(heads.key_value, heads.hidden))
        self.bias = nn.Parameter(torch.zeros(heads.key_value))

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden `[B, T, C]` -> `[B, G, T]` fp32 in (0, 1)."""
        x = wide(hidden)
        return (
            torch.nn.functional.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))
            .sigmoid()
            .transpose(1, 2)
        )


class MemoryMixer(BlockMixer):
    """The exact part plus a memory of all that is older; subclasses say how the two are joined."""

    has_memory = True

    @classmethod
    def check(cls, options: AttentionConfig) -> None:
        """As the base does; and self recall must be able to add the retained pairs to a memory without them.

        Raises:
            UserError: a score by self recall with an update whose order matters.
        """
        super().check(options)
        by_recall = options.pairs and SCORES.get(options.pairs_score).needs == "memory"
        if by_recall and not cls.holds_retained and options.update != "linear":
            allowed = f"linear, where attention.pairs_score={options.pairs_score} under a shared denominator"
            raise bad_value("attention.update", options.update, allowed)

    @classmethod
    def check_heads(cls, options: AttentionConfig, head_dim: int) -> None:
        """The feature map must be of use for heads of this width.

        Raises:
            UserError: it is not.
        """
        check_feature_map(options.feature_map, head_dim)

    @classmethod
    def learns_map(cls, options: AttentionConfig) -> bool:
        """Whether the feature map has weights."""
        return FEATURE_MAPS.get(options.feature_map).learned

    def __init__(self, options: AttentionConfig, heads: Heads, rotary: RotarySpec | None) -> None:
        super().__init__(options, heads, rotary)
        feature_map = FEATURE_MAPS.get(options.feature_map)
        self.map_q = feature_map(heads.query, heads.dim)
        self.map_k = feature_map(heads.key_value, heads.dim)
        self.features = feature_map.features(heads.dim)
        self.write_gate = WriteGate(heads) if options.write_gate == "token" else None
        self.write = UPDATES.get(options.update)

    def arrange(self, query: Tensor, key: Tensor, value: Tensor, call: Call) -> Blocks:
        """As the base does, with the write gates put into slots as well."""
        blocks = super().arrange(query, key, value, call)
        if self.write_gate is None:
            blocks.weight = wide(blocks.k[..., 0]).detach() * 0 + 1
        else:
            weight = blocks.layout.new(self.write_gate(call.hidden).unsqueeze(-1)).squeeze(-1)
            past = None if blocks.state is None else blocks.state.weight
            blocks.weight = self._with_past(blocks.layout, weight, past)
        return blocks

    def write_weights(self, hidden: Tensor) -> Tensor | None:
        """The write gates."""
        return None if self.write_gate is None else self.write_gate(hidden)

    def features_of(
        self, query: Tensor, key: Tensor, positions: Tensor, scaling: float
    ) -> tuple[Tensor, Tensor]:
        """phi(q) `[B, H, T, F]` and phi(k) `[B, G, T, F]`, as the memory has them.

        Args:
            query: `[B, H, T, D]`; key: `[B, G, T, D]`, without position.
            positions: `[B, T]` int64.
            scaling: the teacher's softmax scale.
        """
        place = positions.unsqueeze(1)
        return self.map_q(self._scaled(query, place, scaling)), self.map_k(self._scaled(key, place, scaling))

    def _scaled(self, x: Tensor, positions: Tensor, scaling: float) -> Tensor:
        """What a feature map is given: `x [Q, X, P, D]` scaled, and rotated where the recipe asks for it."""
        if self.options.rotary and self.rotary is not None:
            x = self.rotary(x, positions, absolute=True)
        scale = self.options.scale if self.options.scale is not None else scaling**0.5
        return wide(x) * scale

    def remember(self, blocks: Blocks, call: Call) -> tuple[Tensor, Tensor, Tensor]:
        """Read, for every query, the memory before its block; what was written goes to `blocks.written`.

        Returns:
            phi(q) M `[Q, G, N, R S, D]`, phi(q).z `[Q, G, N, R S, 1]` and n `[Q, G, N, 1, 1]`.
        """
        if blocks.step:
            held = self._initial(blocks)
            before = Memory(held.M.unsqueeze(2), held.z.unsqueeze(2), held.n.unsqueeze(2))
        else:
            before = self._write_all(blocks, call)
        own = blocks.layout.positions()[:, None, -blocks.q.shape[2] :]
        phi_q = grouped(
            self.map_q(self._scaled(blocks.q, own, call.scaling)), self.heads, blocks.layout.block
        )
        blocks.phi_q = phi_q
        numerator, denominator = read(phi_q, before)
        return numerator, denominator, before.n.to(numerator.dtype).detach()[..., None, None]

    def _write_all(self, blocks: Blocks, call: Call) -> Memory:
        """Write what leaves, and count; the memory before each block."""
        written = self._leaving(blocks)
        _, fits, states, clamped = self._write(*written, self._initial(blocks), call)
        weight = written[2]
        # What is written now but has not left for good is written again by the next call: count it then.
        final = torch.arange(weight.shape[2], device=weight.device) < blocks.layout.evicted()[:, None]
        final = final.unsqueeze(1)
        self.clamped = self.clamped + (clamped & final).sum()
        self.nonfinite = self.nonfinite + (~fits & (weight > 0) & final.unsqueeze(-1)).sum()
        blocks.written = states
        return Memory(states.M[:, :, :-1], states.z[:, :, :-1], states.n[:, :, :-1])

    def _write(
        self, k: Tensor, v: Tensor, weight: Tensor, positions: Tensor, initial: Memory, call: Call
    ) -> tuple[Tensor, Tensor, Memory, Tensor]:
        """Write blocks on top of `initial`.

        Args:
            k, v: `[Q, G, N, S, D]`.
            weight, positions: `[Q, G, N, S]`.

        Returns:
            phi(k) `[Q, G, N, S, F]`; `[Q, G, N, S]` bool, False where a token was too large to be written;
            the state before each block and after the last; `[Q, G, N]` bool, the limited updates.
        """
        phi_k, fits = self._key_features(k, v, positions, call)
        weight = torch.where(fits, weight, 0)
        states, clamped = self.write(phi_k, wide(v), weight, initial, self.options.clamp)
        return phi_k, fits, states, clamped

    def _key_features(self, k: Tensor, v: Tensor, positions: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        """phi(k) `[Q, G, N, S, F]`, 0 for tokens too large to be written; bool `[Q, G, N, S]`, the others."""
        phi_k = self.map_k(self._scaled(k.flatten(2, 3), positions.flatten(2, 3), call.scaling))
        phi_k = phi_k.unflatten(2, k.shape[2:4])
        fits = torch.maximum(phi_k.detach().abs().amax(-1), wide(v).detach().abs().amax(-1)) < LARGEST
        return torch.where(fits.unsqueeze(-1), phi_k, 0), fits

    @torch.no_grad()
    def scores(self, blocks: Blocks, key: Tensor, value: Tensor, call: Call) -> Tensor:
        """As the base does; self recall asks a memory of all older tokens, the retained ones included."""
        assert self.score is not None
        if self.score.needs != "memory":
            return super().scores(blocks, key, value, call)
        initial, state = self._initial(blocks), blocks.state
        if state is not None and not self.holds_retained:
            assert state.pair_keys is not None
            assert state.pair_values is not None
            assert state.pair_weight is not None
            assert state.pair_score is not None
            assert state.pair_position is not None
            weight = torch.where(state.pair_score != -torch.inf, state.pair_weight, 0)
            pairs = (state.pair_keys, state.pair_values, weight, state.pair_position)
            k, v, weight, positions = (x.unsqueeze(2) for x in pairs)  # one more block
            _, _, held, _ = self._write(k, v, weight, positions, initial, call)
            initial = Memory(held.M[:, :, 1], held.z[:, :, 1], held.n[:, :, 1])
        k, v, weight, positions = self._all_leaving(blocks)
        phi_k, _, states, _ = self._write(k, v, weight, positions, initial, call)
        before = Memory(states.M[:, :, :-1], states.z[:, :, :-1], states.n[:, :, :-1])
        numerator, denominator = read(phi_k, before)
        answer = torch.where(denominator > EMPTY, numerator / denominator, 0)
        residual = self.score(wide(v), answer).flatten(2)
        return torch.nn.functional.pad(residual, (0, blocks.k.shape[2] - residual.shape[2]))

    def _leaving(self, blocks: Blocks) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What each block writes: keys and values `[Q, G, N, S, D]`, weights and positions `[Q, G, N, S]`."""
        if self.holds_retained or blocks.selection is None:
            return self._all_leaving(blocks)
        assert blocks.weight is not None
        assert blocks.pool_k is not None
        assert blocks.pool_v is not None
        past = None if blocks.state is None else blocks.state.pair_weight
        index = blocks.selection.dropped
        weight = self._pool(blocks, blocks.weight, past).gather(2, index.flatten(2)).view(index.shape)
        allowed = blocks.selection.dropped_alive & weight.isfinite()
        place = self._pool_positions(blocks).gather(2, index.flatten(2)).view(index.shape)
        k, v = gather_pool(blocks.pool_k, index), gather_pool(blocks.pool_v, index)
        return k, v, torch.where(allowed, weight, 0), place

    def _all_leaving(self, blocks: Blocks) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As `_leaving`, retained or not: every token of each block that leaves."""
        assert blocks.weight is not None
        weight = self._by_block(blocks.weight[:, :, blocks.leaving])
        weight = torch.where(self.may_leave(blocks) & weight.isfinite(), weight, 0)
        positions = blocks.layout.positions()[:, None, blocks.leaving].expand(-1, self.heads.key_value, -1)
        k, v = blocks.k[:, :, blocks.leaving], blocks.v[:, :, blocks.leaving]
        return self._by_block(k), self._by_block(v), weight, self._by_block(positions)

    def _initial(self, blocks: Blocks) -> Memory:
        """The memory before the call."""
        state = blocks.state
        if state is not None and state.memory_M is not None:
            assert state.memory_z is not None
            assert state.memory_n is not None
            return Memory(state.memory_M, state.memory_z, state.memory_n)
        sequences, groups, _, width = blocks.v.shape
        empty = Memory.empty(sequences, groups, self.features, width, blocks.v.device)
        if blocks.v.dtype == torch.float64:
            empty = Memory(empty.M.double(), empty.z.double(), empty.n)
        return empty

    def step_state(self, blocks: Blocks, key: Tensor, value: Tensor, call: Call) -> State:
        """The base's, with the new token's write gate."""
        state = super().step_state(blocks, key, value, call)
        if self.write_gate is None:
            return state
        assert state.weight is not None
        weight = self.write_gate(call.hidden)
        return replace(state, weight=torch.where(blocks.valid.unsqueeze(1), weight, state.weight))

    def next_state(self, blocks: Blocks) -> State:
        """The base's state with the memory."""
        state = super().next_state(blocks)
        assert blocks.weight is not None
        evicted = blocks.layout.evicted()
        after = blocks.after
        if after is None:
            assert blocks.written is not None
            written = blocks.written
            after = Memory(*(self._at(x, evicted) for x in (written.M, written.z, written.n)))
        state = replace(
            state,
            weight=None if self.write_gate is None else self._local(blocks.weight, evicted),
            memory_M=after.M,
            memory_z=after.z,
            memory_n=after.n.to(count_dtype(blocks.v.device)),
        )
        if blocks.selection is not None and not self.holds_retained:
            past = None if blocks.state is None else blocks.state.pair_weight
            index = self._at(blocks.selection.index, evicted)
            state = replace(state, pair_weight=self._pool(blocks, blocks.weight, past).gather(2, index))
        return state
