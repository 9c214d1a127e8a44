"""What all block-wise variants share: what stays exact, is retained or leaves, and the state between calls.

Positions count the real tokens of a sequence; blocks of S tokens start at multiples of S. For a query in
block i the exact keys are its own block up to itself, the L = window / S blocks before it, the first `sinks`
tokens, and up to K retained pairs per key-value head. Everything else older than the window is offered to the
memory, if the variant has one.

All keys are kept without their position. For each block they are rotated inside the block's own frame, whose
origin moves so that no distance exceeds `distance_cap`; while everything lies inside the cap the distances
are the true ones.

The exact part attends as the teacher does: with its scaling, soft cap, learned sinks, dropout in training,
and its own sliding window. A key of the window that lies beyond the teacher's is not seen there. Sinks,
retained pairs and memory reach further than the teacher's window on purpose: that is what they are for.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from kernels.exact_attention.chunk import exact_attention, exact_attention_with_mass, exact_weights
from kernels.numerics import wide
from kernels.retained_pairs.chunk import gather_pool, select_pairs
from replace.blocks import Blocks, Call, Heads, Part, grouped
from replace.cache import State
from replace.config import AttentionConfig
from replace.errors import bad_value
from replace.layout import Layout, decode_layout, general_layout, plain_layout
from replace.one_token import can_step, knows_steps, one_token
from replace.registry import Registry
from replace.rotary import Rotary, RotarySpec
from replace.scores import SCORES, LearnedScore

VARIANTS: Registry[type[nn.Module]] = Registry("attention.name", "replace.attention", base=lambda: nn.Module)


FADE_TOKENS = 1024
"""In so many tokens a pair in a recent place loses `pairs_fade` of its score."""


class BlockMixer(nn.Module):
    """Exact attention over window, sinks and retained pairs; a base for the variants that add a memory.

    An untrained swap is the teacher with everything outside the exact part forgotten.
    """

    needs_mass = False
    """Whether `mix` needs the exact part's log-denominator."""

    has_memory: ClassVar[bool] = False
    """Whether there is a memory behind the exact part."""

    holds_retained: ClassVar[bool] = True
    """Whether a memory also holds the retained pairs, as one with a read of its own may.

    Under a shared denominator it must not: there each pair has to be in exactly one place.
    """

    own_options: ClassVar[dict[str, object]] = {}
    """Options that only this variant has, `attention.own.<name>`, with their defaults; the default says the
    type, and None stands for any plain value.
    """

    local_parts: ClassVar[tuple[str, ...]] = ("segment", "sliding_window")
    """The values of `attention.local` that make sense here."""

    @classmethod
    def check(cls, options: AttentionConfig) -> None:
        """Refuse options that do not go together in this variant.

        Raises:
            UserError: the variant has no such local part, the score of the retained pairs asks for a memory
                or a window that it has not, or an option of `own_options` is unknown or of another type.
        """
        check_own(options.own, cls.own_options)
        if options.local not in cls.local_parts:
            allowed = f"{', '.join(cls.local_parts)}, where attention.name={options.name}"
            raise bad_value("attention.local", options.local, allowed)
        if options.pairs and options.local == "none" and SCORES.get(options.pairs_score).needs == "window":
            others = [name for name in SCORES.names() if SCORES.get(name).needs != "window"]
            allowed = f"{', '.join(others)}, where attention.local=none"
            raise bad_value("attention.pairs_score", options.pairs_score, allowed)
        if options.pairs and SCORES.get(options.pairs_score).needs == "memory" and not cls.has_memory:
            others = [name for name in SCORES.names() if SCORES.get(name).needs != "memory"]
            raise bad_value(
                "attention.pairs_score",
                options.pairs_score,
                f"{', '.join(others)}, where a variant has no memory",
            )

    @classmethod
    def check_heads(cls, options: AttentionConfig, head_dim: int) -> None:
        """Refuse options that heads of this width rule out; here there are none."""

    @classmethod
    def learns_map(cls, options: AttentionConfig) -> bool:
        """Whether there are feature maps that can be taught the teacher's attention weights."""
        return False

    def __init__(self, options: AttentionConfig, heads: Heads, rotary: RotarySpec | None) -> None:
        super().__init__()
        self.check(options)
        self.check_heads(options, heads.dim)
        self.options = options
        self.heads = heads
        self.block = options.block
        self.lookback = options.window // options.block if options.local == "sliding_window" else 0
        cap = options.distance_cap
        self.rotary = None if rotary is None else Rotary(rotary, 0 if cap is None else cap + 1)
        self.off: frozenset[str] = frozenset()
        self.calls = 0
        self.knows_steps = knows_steps(type(self))
        self.clamped: Tensor | int = 0
        self.nonfinite: Tensor | int = 0
        self.score = SCORES.get(options.pairs_score)(heads) if options.pairs else None

    @classmethod
    def own_option(cls, options: AttentionConfig, name: str) -> Any:
        """The value of `attention.own.<name>`, or its default."""
        default = cls.own_options[name]
        value = options.own.get(name, default)
        return float(value) if isinstance(default, float) else value

    @property
    def learns_score(self) -> bool:
        """Whether a map decides about retention that stage 1 can teach."""
        return isinstance(self.score, LearnedScore)

    # The call

    def forward(self, query: Tensor, key: Tensor, value: Tensor, call: Call) -> Tensor:
        """Attend.

        Args:
            query: `[B, H, T, D]`; key, value: `[B, G, T, D]`, all without position.
            call: the rest.

        Returns:
            `[B, H, T, D]` in the dtype of `value`.
        """
        if not torch.compiler.is_compiling():  # a number that changes would have each step compiled anew
            self.calls += 1
        with torch.autocast(value.device.type, enabled=False):
            if can_step(self, query, call):
                return one_token(self, query, key, value, call)
            blocks = self.arrange(query, key, value, call)
            if self.score is not None and not (self.holds_retained and self.unread("pairs", call)):
                blocks.score = self.scores(blocks, key, value, call)
                self._select(blocks)
            exact, mass = self.attend_exactly(blocks, call)
            out = self.mix(blocks, exact, mass, call)
            out = self._poison(blocks, out)
            out = blocks.layout.back(self._to_slots(out)).to(value.dtype)
            if call.slot is not None:
                call.slot.store(self._rows(blocks.layout, self.next_state(blocks)), query.shape[2])
                call.slot.until_full = None
        return out

    def unread(self, part: str, call: Call) -> bool:
        """Whether a part is switched off in a call without a cache: then it need not even be computed."""
        return part in self.off and call.slot is None

    def mix(self, blocks: Blocks, exact: Tensor, mass: Tensor | None, call: Call) -> Tensor:
        """Join the exact part `[Q, G, N, R S, D]` with whatever else the variant has."""
        return exact

    def write_weights(self, hidden: Tensor) -> Tensor | None:
        """`[B, G, T]` in 0..1: how strongly each token is written, None where all weigh alike.

        Args:
            hidden: `[B, T, C]`, the attention layer's input.
        """
        return None

    # From tokens to blocks

    def arrange(self, query: Tensor, key: Tensor, value: Tensor, call: Call) -> Blocks:
        """Tokens to block-aligned slots, with the local part of the cache in front."""
        state = call.slot.state if call.slot is not None else None
        batch, _, tokens, _ = query.shape
        real = call.real
        if real is not None and state is None and call.document is None and bool(real.all()):
            real = None
        if real is None and state is None and call.document is None:
            layout = plain_layout(batch, tokens, self.block, self.lookback, query.device)
        elif state is not None and tokens == 1:
            layout = decode_layout(real, state.length, self.block, self.lookback)
        else:
            if real is None:
                real = torch.ones(batch, tokens, dtype=torch.bool, device=query.device)
            if state is not None and call.document is not None:
                raise RuntimeError(
                    "position_ids begin a new document inside a call that continues a cache, whose state "
                    "belongs to one document; start from a fresh cache, or pack all documents into the first "
                    "call."
                )
            before = None if state is None else state.length
            layout = general_layout(real, call.document, before, self.block, self.lookback)
        k = self._with_past(layout, layout.new(key), None if state is None else state.keys)
        v = self._with_past(layout, layout.new(value), None if state is None else state.values)
        position = layout.positions()
        valid = (position >= 0) & (position < layout.length.unsqueeze(1))
        # One pass instead of four: a sum is finite if its terms are and stay inside fp32's range.
        bad = ~(k.sum(-1, dtype=sum_dtype(k)) + v.sum(-1, dtype=sum_dtype(v))).isfinite()
        if not none_of(bad):
            zero, where = torch.zeros((), dtype=k.dtype, device=k.device), bad.unsqueeze(-1)
            k, v = torch.where(where, zero, k), torch.where(where, zero.to(v.dtype), v)
        return Blocks(layout, layout.new(query), k, v, valid, bad, state)

    def _with_past(self, layout: Layout, new: Tensor, past: Tensor | None) -> Tensor:
        """Put the lookback (and the first block's cached part) before the new slots: dim 2 grows by L S."""
        held = self.lookback * self.block
        if past is None:
            return (
                torch.cat([new.new_zeros(*new.shape[:2], held, *new.shape[3:]), new], dim=2) if held else new
            )
        phase = (layout.before % self.block).view(-1, 1, 1, *[1] * (new.ndim - 3))
        slots = torch.arange(self.block, device=new.device).view(1, 1, -1, *[1] * (new.ndim - 3))
        first = torch.where(slots < phase, past[:, :, held:].to(new.dtype), new[:, :, : self.block])
        return torch.cat([past[:, :, :held].to(new.dtype), first, new[:, :, self.block :]], dim=2)

    def may_leave(self, blocks: Blocks) -> Tensor:
        """`[Q, G, N, S]` bool: the leaving tokens that may be retained or written: real, finite, no sinks."""
        position = blocks.layout.positions()
        keep = (blocks.valid & (position >= self.options.sinks)).unsqueeze(1) & ~blocks.bad
        return self._by_block(keep[:, :, blocks.leaving])

    def _by_block(self, x: Tensor) -> Tensor:
        """`[Q, X, N S, ...]` -> `[Q, X, N, S, ...]`."""
        return x.unflatten(2, (-1, self.block))

    @torch.no_grad()
    def scores(self, blocks: Blocks, key: Tensor, value: Tensor, call: Call) -> Tensor:
        """`[Q, G, W]` fp32: what decides about retention, settled for leaving blocks (`replace.scores`)."""
        assert self.score is not None
        layout, needs = blocks.layout, self.score.needs
        past = None if blocks.state is None else blocks.state.score
        if needs == "position":
            return self.score(layout.positions())
        if needs == "window":
            new = wide(layout.new(key)[..., 0]) * 0
            return self._with_past(layout, new, past) + self._received(blocks, call)
        new = layout.new(self.score(call.hidden, key, value).unsqueeze(-1)).squeeze(-1)
        return self._with_past(layout, new, past)

    def _received(self, blocks: Blocks, call: Call) -> Tensor:
        """`[Q, G, W]`: the score's sum of what each slot gets of this call's attention over sinks and window.

        Retained pairs stay out of it: which they are depends on these very scores.
        """
        assert self.score is not None
        size, span, count = self.block, (self.lookback + 1) * self.block, blocks.layout.blocks
        q, k, _, mask = self._in_frame(blocks, [*self._sink_part(blocks), self._window_part(blocks, call)])
        weights, _ = exact_weights(q, k, mask, call.scaling, call.softcap, self._sink_logit(call))
        weights = weights[..., -span:].unflatten(3, (self.heads.repeat, size))
        # Queries of earlier calls were counted then; one that is not finite tells nothing.
        fresh = blocks.valid & (blocks.layout.positions() >= blocks.layout.before.unsqueeze(1))
        fresh = fresh[:, self.lookback * size :].unflatten(1, (count, size))[:, None, :, None, :, None]
        given = self.score(torch.where(weights.isfinite() & fresh, weights, 0))
        total = given.new_zeros(*given.shape[:2], blocks.k.shape[2])
        for start in range(0, span, size):
            total[:, :, start : start + count * size] += given[..., start : start + size].flatten(2)
        return total

    def _select(self, blocks: Blocks) -> None:
        """Choose the retained pairs before each block; see `kernels.retained_pairs`."""
        assert blocks.score is not None
        assert self.score is not None
        state, keep = blocks.state, self.options.pairs
        sequences, groups = blocks.k.shape[:2]
        score = self._by_block(self.score.final(blocks.score[:, :, blocks.leaving]))
        score = score.masked_fill(~self.may_leave(blocks), -torch.inf)
        if state is not None and state.pair_score is not None:
            assert state.pair_keys is not None
            assert state.pair_values is not None
            initial, past_k, past_v = state.pair_score, state.pair_keys, state.pair_values
        else:
            initial = score.new_full((sequences, groups, keep), -torch.inf)
            past_k = blocks.k.new_zeros(sequences, groups, keep, blocks.k.shape[-1])
            past_v = blocks.v.new_zeros(sequences, groups, keep, blocks.v.shape[-1])
        recent, rank = self.options.recent_places, None
        if recent:
            # All fade alike, so a later pair is as far ahead of an earlier one at any time: it is given once
            # and for all what age takes of the other, and no rank ever changes.
            rank = torch.cat([initial, score.flatten(2)], dim=2)
            position = self._pool_positions(blocks).to(rank.dtype)
            late = (
                position * self.options.pairs_fade
            ).round() / FADE_TOKENS  # on the scores' grid: true ties
            rank = rank + late
        blocks.selection = select_pairs(score, initial, rank, recent)
        blocks.pool_k = torch.cat([past_k.to(blocks.k.dtype), blocks.k[:, :, blocks.leaving]], dim=2)
        blocks.pool_v = torch.cat([past_v.to(blocks.v.dtype), blocks.v[:, :, blocks.leaving]], dim=2)

    # The exact part

    def attend_exactly(self, blocks: Blocks, call: Call) -> tuple[Tensor, Tensor | None]:
        """Softmax over sinks, pairs and window `[Q, G, N, R S, D]`, and its log-denominator or None."""
        q, k, v, mask = self._in_frame(blocks, self.exact_parts(blocks, call))
        if not (self.needs_mass or call.softcap is not None or call.sink_logit is not None):
            return exact_attention(q, k, v, mask, call.scaling, call.dropout), None
        sink_logit = self._sink_logit(call)
        return exact_attention_with_mass(q, k, v, mask, call.scaling, call.dropout, call.softcap, sink_logit)

    def exact_parts(self, blocks: Blocks, call: Call) -> list[Part]:
        """What softmax runs over; at least one part, though a query may see nothing of it."""
        return [*self._sink_part(blocks), *self._pair_part(blocks), self._window_part(blocks, call)]

    def _sink_part(self, blocks: Blocks) -> list[Part]:
        """The first tokens, once they are older than a block's window."""
        if not self.options.sinks or "sinks" in self.off:
            return []
        k, v, bad = (x.unsqueeze(2) for x in self._sinks(blocks))
        count, place = blocks.layout.blocks, torch.arange(self.options.sinks, device=k.device)
        start = self._window_start(blocks)
        position = place.expand(*start.shape, -1).unsqueeze(1)
        k, v = k.expand(-1, -1, count, -1, -1), v.expand(-1, -1, count, -1, -1)
        return [Part(k, v, position, self._sinks_seen(blocks, place) & ~bad.unsqueeze(3))]

    def _sinks_seen(self, blocks: Blocks, place: Tensor) -> Tensor:
        """`[Q, 1, N, 1 or S, n]` bool: which of the sinks at positions `place [n]` are in the sink part."""
        return (place < self._window_start(blocks).unsqueeze(-1))[:, None, :, None]

    def _pair_part(self, blocks: Blocks) -> list[Part]:
        """The pairs that are held before each block."""
        if blocks.selection is None or "pairs" in self.off:
            return []
        assert blocks.pool_k is not None
        assert blocks.pool_v is not None
        count = blocks.layout.blocks
        index, alive = blocks.selection.index[:, :, :count], blocks.selection.alive[:, :, :count]
        position = self._pool_positions(blocks).gather(2, index.flatten(2)).view(index.shape)
        k, v = gather_pool(blocks.pool_k, index), gather_pool(blocks.pool_v, index)
        return [Part(k, v, position, alive.unsqueeze(3))]

    def _window_part(self, blocks: Blocks, call: Call) -> Part:
        """Each block and the L before it."""
        size, span = self.block, (self.lookback + 1) * self.block
        slots = self._window_start(blocks).unsqueeze(-1) + torch.arange(
            span, device=blocks.k.device
        )  # [Q, N, span]
        k, v = (x.unfold(2, span, size).transpose(-1, -2) for x in (blocks.k, blocks.v))
        return Part(k, v, slots.unsqueeze(1), self._window_mask(blocks, call, slots).unsqueeze(1))

    def _window_start(self, blocks: Blocks) -> Tensor:
        """`[Q, N]`: the position of the first slot of each block's window."""
        layout = blocks.layout
        return layout.start.unsqueeze(1) + torch.arange(layout.blocks, device=blocks.k.device) * self.block

    def _in_frame(self, blocks: Blocks, parts: list[Part]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What softmax is given, queries and keys rotated in each block's frame.

        Returns:
            queries `[Q, G, N, R S, D]`, keys and values `[Q, G, N, P, D]`, and the mask `[Q, G, N, S, P]`,
            which all R heads share.
        """
        size, groups = self.block, self.heads.key_value
        k = torch.cat([part.k for part in parts], dim=3)
        v = torch.cat([part.v for part in parts], dim=3)
        mask = torch.cat([part.seen.expand(-1, groups, -1, size, -1) for part in parts], dim=-1)
        q = self._by_block(blocks.q)  # [Q, H, N, S, D]
        if self.rotary is not None:
            window_start, span = self._window_start(blocks), (self.lookback + 1) * size
            origin = self.origin(window_start)  # [Q, N]
            own = window_start.unsqueeze(-1) + torch.arange(span - size, span, device=q.device)
            q = self.rotary(q, (own - origin.unsqueeze(-1)).clamp_min(0).unsqueeze(1))
            frame = [(part.position - origin[:, None, :, None]).clamp_min(0) for part in parts]
            k = self.rotary(k, torch.cat([f.expand(-1, groups, -1, -1) for f in frame], dim=-1))
        return grouped(q.flatten(2, 3), self.heads, size), k, v, mask

    def _sink_logit(self, call: Call) -> Tensor | None:
        """The teacher's learned sinks `[1, G, 1, R S, 1]`."""
        if call.sink_logit is None:
            return None
        per_head = call.sink_logit.view(1, self.heads.key_value, 1, self.heads.repeat, 1, 1)
        return per_head.expand(-1, -1, -1, -1, self.block, -1).flatten(3, 4)

    def origin(self, window_start: Tensor) -> Tensor:
        """`[Q, N]`: where each block's frame begins, so that its last query is at most at `distance_cap`."""
        cap = self.options.distance_cap
        if cap is None:
            return torch.zeros_like(window_start)
        return (window_start + (self.lookback + 1) * self.block - 1 - cap).clamp_min(0)

    def _window_mask(self, blocks: Blocks, call: Call, slots: Tensor) -> Tensor:
        """`[Q, N, S, span]`: the window slots each query sees, none beyond the teacher's own sliding window.

        Always itself, so that no softmax is empty.
        """
        size, span = self.block, slots.shape[-1]
        own = torch.arange(span - size, span, device=slots.device).unsqueeze(-1)
        key = torch.arange(span, device=slots.device)
        mask = blocks.valid.unfold(1, span, size).unsqueeze(2) & (key <= own)
        if call.sliding_window is not None:
            mask = mask & (own - key < call.sliding_window)
        if "window" in self.off:
            mask = mask & (key == own)
        return mask | (key == own)

    def _sinks(self, blocks: Blocks) -> tuple[Tensor, Tensor, Tensor]:
        """The first tokens of each sequence: local while block 0 is, from the state afterwards.

        Returns:
            keys and values `[Q, G, n, D]`, and `[Q, G, n]` bool, which of them are not finite.
        """
        count = self.options.sinks
        slot = (-blocks.layout.start).clamp_min(0)[:, None] + torch.arange(count, device=blocks.k.device)
        index = slot[:, None, :, None].expand(-1, blocks.k.shape[1], -1, -1)
        local_k = blocks.k.gather(2, index.expand(-1, -1, -1, blocks.k.shape[-1]))
        local_v = blocks.v.gather(2, index.expand(-1, -1, -1, blocks.v.shape[-1]))
        local_bad = blocks.bad.gather(2, index[..., 0])
        if blocks.state is None:
            return local_k, local_v, local_bad
        past_k = blocks.state.sink_keys.to(local_k.dtype)
        past_bad = past_k[..., 0].isnan()
        local = (blocks.layout.start <= 0)[:, None, None]
        return (
            torch.where(local.unsqueeze(-1), local_k, past_k.masked_fill(past_bad.unsqueeze(-1), 0)),
            torch.where(local.unsqueeze(-1), local_v, blocks.state.sink_values.to(local_v.dtype)),
            torch.where(local, local_bad, past_bad),
        )

    def _pool_positions(self, blocks: Blocks) -> Tensor:
        """`[Q, G, K + N S]` int64: the position of each pair in the pool."""
        local = blocks.layout.positions()[:, None, blocks.leaving].expand(-1, self.heads.key_value, -1)
        if blocks.state is not None and blocks.state.pair_position is not None:
            past = blocks.state.pair_position
        else:
            past = local.new_zeros(*local.shape[:2], self.options.pairs)
        return torch.cat([past, local], dim=2)

    def _poison(self, blocks: Blocks, out: Tensor) -> Tensor:
        """A query whose window holds a non-finite key or value gets NaN, as the teacher's would.

        The memory skips such tokens.
        """
        if none_of(blocks.bad):
            return out
        size, span = self.block, (self.lookback + 1) * self.block
        fresh = blocks.valid & (blocks.layout.positions() >= blocks.layout.before.unsqueeze(1))
        self.nonfinite = self.nonfinite + (blocks.bad & fresh.unsqueeze(1)).sum()
        count = torch.nn.functional.pad(blocks.bad.long().cumsum(-1), (1, 0))
        upto = self._by_block(count[:, :, span - size + 1 :])  # [Q, G, N, S], own slot included
        before = count[:, :, :-1][:, :, : blocks.leaving.stop : size].unsqueeze(-1)
        seen = (upto > before).repeat(1, 1, 1, self.heads.repeat).unsqueeze(-1)
        return torch.where(seen, torch.full((), torch.nan, dtype=out.dtype, device=out.device), out)

    def _to_slots(self, out: Tensor) -> Tensor:
        """`[Q, G, N, R S, D]` -> `[Q, H, N S, D]`."""
        out = out.unflatten(3, (self.heads.repeat, self.block))
        return out.transpose(2, 3).flatten(3, 4).flatten(1, 2)

    # The state

    def next_state(self, blocks: Blocks) -> State:
        """The state of each sequence after this call."""
        layout = blocks.layout
        evicted = layout.evicted()
        sink_k, sink_v, sink_bad = self._sinks(blocks)
        # A bad token goes back as NaN, so that the next call knows it as bad.
        nan = torch.full((), torch.nan, dtype=blocks.k.dtype, device=blocks.k.device)
        bad = blocks.bad.unsqueeze(-1)
        state = State(
            length=layout.length,
            keys=self._local(torch.where(bad, nan, blocks.k), evicted),
            values=self._local(blocks.v, evicted),
            sink_keys=torch.where(sink_bad.unsqueeze(-1), nan, sink_k),
            sink_values=sink_v,
        )
        if self.score is not None and blocks.selection is not None:
            assert blocks.score is not None
            assert blocks.pool_k is not None
            assert blocks.pool_v is not None
            index = self._at(blocks.selection.index, evicted)
            alive = self._at(blocks.selection.alive, evicted)
            past = None if blocks.state is None else blocks.state.pair_score
            pool_score = self._pool(blocks, self.score.final(blocks.score), past)
            state = replace(
                state,
                # Positions need no memory, and self recall asks anew when a block leaves.
                score=self._local(blocks.score, evicted) if self.score.needs in ("token", "window") else None,
                pair_keys=gather_pool(blocks.pool_k, index),
                pair_values=gather_pool(blocks.pool_v, index),
                pair_score=torch.where(alive, pool_score.gather(2, index), -torch.inf),
                pair_position=self._pool_positions(blocks).gather(2, index),
            )
        return state

    def step_state(self, blocks: Blocks, key: Tensor, value: Tensor, call: Call) -> State:
        """The state after one token that completes no block; see `replace.one_token`.

        A variant that keeps figures of local tokens puts the new token's in; `blocks.valid` is its slot.
        """
        assert blocks.state is not None
        state = replace(blocks.state, length=blocks.layout.length, keys=blocks.k, values=blocks.v)
        if self.score is not None and self.score.needs == "token":
            assert state.score is not None
            score = self.score(call.hidden, key, value)
            state = replace(state, score=torch.where(blocks.valid.unsqueeze(1), score, state.score))
        return state

    def _pool(self, blocks: Blocks, x: Tensor, past: Tensor | None) -> Tensor:
        """`[Q, G, K + N S]`: a per-token figure in the order of the pool."""
        if past is None:
            past = x.new_zeros(*x.shape[:2], self.options.pairs)
        return torch.cat([past, x[:, :, blocks.leaving]], dim=2)

    def _local(self, x: Tensor, evicted: Tensor) -> Tensor:
        """The slots `[Q, G, (L + 1) S, ...]` that stay local after `evicted` blocks have left."""
        span = (self.lookback + 1) * self.block
        pad = [0, 0] * (x.ndim - 3) + [0, self.block]
        x = torch.nn.functional.pad(x, pad)
        slot = evicted[:, None] * self.block + torch.arange(span, device=x.device)
        index = slot.view(x.shape[0], 1, span, *[1] * (x.ndim - 3))
        return x.gather(2, index.expand(-1, x.shape[1], -1, *x.shape[3:]))

    @staticmethod
    def _at(x: Tensor, evicted: Tensor) -> Tensor:
        """Entry `evicted` of each sequence: `[Q, G, N + 1, ...]` -> `[Q, G, ...]`."""
        index = evicted.view(-1, 1, 1, *[1] * (x.ndim - 3)).expand(-1, x.shape[1], 1, *x.shape[3:])
        return x.gather(2, index).squeeze(2)

    @staticmethod
    def _rows(layout: Layout, state: State) -> State:
        """From sequences to rows: each row goes on with its last document."""
        return state if layout.last is None else state.map(lambda x: x[layout.last])


def check_own(given: Mapping[str, object], known: Mapping[str, object]) -> None:
    """Refuse options of a variant's own that it does not know, or that are not of their default's type.

    Raises:
        UserError: the first of them.
    """
    for name, value in given.items():
        field = f"attention.own.{name}"
        if name not in known:
            allowed = ", ".join(f"attention.own.{one}" for one in known)
            raise bad_value(field, value, allowed or "nothing, since this variant has no options of its own")
        kind: type = type(known[name])
        fits = type(value) is kind or known[name] is None
        if kind is float:
            fits = type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]
        if not fits:
            raise bad_value(field, value, OWN_TYPES.get(kind, f"a {kind.__name__}"))


OWN_TYPES = {int: "a whole number", float: "a finite number", bool: "true or false", str: "a word"}


def none_of(mask: Tensor) -> bool:
    """Whether nothing in a mask is True, as far as it costs nothing to know: on a CPU, and not in a graph."""
    return mask.device.type == "cpu" and not torch.compiler.is_compiling() and not bool(mask.any())


def sum_dtype(x: Tensor) -> torch.dtype:
    """fp32, or fp64 for fp64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
