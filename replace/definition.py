"""Every variant token by token: what its blocks must equal, written from the references in `kernels`.

For each query position and head by itself: softmax over what is exact, the memory of what is older, and how
the two are joined. Quadratic and slow, for one row without pads; nothing of the block-wise code takes part in
it but the learned maps, gates and scores, which are what they are.

A variant of one's own brings its join as `definition(whole, t, h)`, a static method that returns `[D]`; see
`infini` below for what `whole` has to offer.
"""

from collections.abc import Callable, Sequence
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor, nn

from kernels.exact_attention.reference import exact_keys
from kernels.gated_delta_rule.reference import gated_delta_rule
from kernels.linear_memory.reference import delta, delta_bounded
from replace.blocks import Call
from replace.mixer import FADE_TOKENS
from replace.rotary import RotarySpec


class Definition:
    """One variant on one row.

    Args:
        mixer: any `BlockMixer`.
        q: `[1, H, T, D]`; k, v: `[1, G, T, D]`, without position, in the dtype to compute in.
        call: the rest; neither pads, nor documents, nor a cache.
        absent: pairs (key-value head, position) that do not exist: what a non-finite token has to become.
    """

    def __init__(
        self, mixer: Any, q: Tensor, k: Tensor, v: Tensor, call: Call, absent: Sequence[tuple[int, int]] = ()
    ) -> None:
        self.mixer, self.options, self.call, self.absent = mixer, mixer.options, call, frozenset(absent)
        self.q, self.k, self.v, self.hidden = q[0], k[0], v[0], call.hidden
        self.size, self.lookback, self.length = self.options.block, mixer.lookback, q.shape[2]
        self.repeat = q.shape[1] // k.shape[1]
        self.spec: RotarySpec | None = None if mixer.rotary is None else mixer.rotary.spec
        self.written, self.delta = cache(self._written), cache(self._delta)

    def outputs(self, positions: Sequence[int] | None = None, heads: int | None = None) -> Tensor:
        """`[1, H, P, D]` at these positions and of the first heads, by default all."""
        positions = range(self.length) if positions is None else positions
        heads = self.q.shape[0] if heads is None else heads
        join = join_of(self.mixer)
        return torch.stack([torch.stack([join(self, t, h) for t in positions]) for h in range(heads)])[None]

    def left(self, t: int) -> int:
        """The tokens before this one have left the window of the query at t."""
        return max(0, t // self.size - self.lookback) * self.size

    # What is exact

    def exact(self, t: int, h: int) -> tuple[Tensor, Tensor]:
        """Softmax over sinks, retained pairs and window `[D]`; its denominator, learned sinks included."""
        g, left, call = h // self.repeat, self.left(t), self.call
        keys = exact_keys(t, self.size, self.lookback, self.options.sinks, self.retained(g, left))
        near = self.length if call.sliding_window is None else call.sliding_window
        if self.options.local == "none":  # no window for the teacher's to narrow
            keys, near = [j for j in keys if j < self.options.sinks or j in self.retained(g, left)], t + 1
        keys = [j for j in keys if (g, j) not in self.absent and (j < left or t - j < near)]
        cap, end = self.options.distance_cap, (t // self.size + 1) * self.size - 1
        origin = 0 if cap is None else max(0, end - cap)
        place = torch.tensor([max(0, j - origin) for j in keys])
        query = turned(self.q[h, t][None], torch.tensor([t - origin]), self.spec)[0]
        logits = turned(self.k[g, keys], place, self.spec) @ query * call.scaling
        if call.softcap is not None:
            logits = call.softcap * torch.tanh(logits / call.softcap)
        weights = logits.exp()
        mass = weights.sum()
        if call.sink_logit is not None:
            mass = mass + call.sink_logit[h].to(mass.dtype).exp()
        return weights @ self.v[g, keys] / (mass if mass > 0 else 1), mass

    @cached_property
    def score(self) -> Tensor | None:
        """`[G, T]`: what decides about retention, or None."""
        mixer, call = self.mixer, self.call
        if mixer.score is None:
            return None
        key = self.k.clone()[None]
        for g, j in self.absent:
            key[0, g, j] = torch.nan
        given = (key, self.v[None], call)
        whole = mixer.score.final(mixer.scores(mixer.arrange(self.q[None], *given), *given))
        return whole[0, :, self.lookback * self.size :][:, : self.length]

    def leaves(self, g: int, left: int) -> list[int]:
        """What may be retained or written: the tokens before `left`, sinks left out."""
        return [j for j in range(self.options.sinks, left) if (g, j) not in self.absent]

    def retained(self, g: int, left: int) -> list[int]:
        """The best of what has left, and of the rest the best with what age takes; ties by position."""
        score = self.score
        if score is None:
            return []
        order = sorted(self.leaves(g, left), key=lambda j: (-float(score[g, j]), j))
        recent = self.options.recent_places
        lasting = self.options.pairs - recent
        late = (torch.arange(self.length).to(score.dtype) * self.options.pairs_fade).round() / FADE_TOKENS
        rank = score[g] + late
        rest = sorted(order[lasting:], key=lambda j: (-float(rank[j]), j))
        return sorted([*order[:lasting], *rest[:recent]])

    # What the memory holds

    def _written(self, g: int, left: int) -> list[list[int]]:
        """The positions that each block wrote, up to `left`.

        Where retained pairs are no part of the memory, a block writes what lost its place when it left.
        """
        blocks: list[list[int]] = []
        held: list[int] = []
        for end in range(self.size, left + 1, self.size):
            new = [j for j in self.leaves(g, end) if j >= end - self.size]
            # Under one denominator a pair may count once only; a memory with its own may hold all.
            kept = self.retained(g, end) if self.mixer.needs_mass else []
            blocks.append([j for j in sorted(held + new) if j not in kept])
            held = kept
        return blocks

    @cached_property
    def weight(self) -> Tensor:
        """`[G, T]`: the write gate."""
        if self.mixer.write_gate is None:
            return torch.ones(self.k.shape[:2], dtype=self.k.dtype)
        return self.mixer.write_gate(self.hidden)[0]

    @cached_property
    def phi_q(self) -> Tensor:
        """`[H, T, F]`."""
        return self.mixer.map_q(self._scaled(self.q)[None])[0]

    @cached_property
    def phi_k(self) -> Tensor:
        """`[G, T, F]`."""
        return self.mixer.map_k(self._scaled(self.k)[None])[0]

    def _scaled(self, x: Tensor) -> Tensor:
        if self.options.rotary:
            x = turned(x, torch.arange(self.length), self.spec)
        return x * (self.call.scaling**0.5 if self.options.scale is None else self.options.scale)

    def read(self, t: int, h: int) -> tuple[Tensor, Tensor]:
        """Numerator `[D]` and denominator of the memory's answer, in the sums of the papers."""
        g, left = h // self.repeat, self.left(t)
        phi = self.phi_q[h, t]
        if self.options.update != "linear":
            M, z = self.delta(g, left)
            return phi @ M, phi @ z
        held = [j for block in self.written(g, left) for j in block]
        if self.options.local == "none":  # the own block is read by its features
            held += [j for j in self.leaves(g, t + 1) if j >= left]
        far = self.weight[g, held] * (self.phi_k[g, held] @ phi)
        return far @ self.v[g, held], far.sum()

    def _delta(self, g: int, left: int) -> tuple[Tensor, Tensor]:
        """M `[F, D]` and z `[F]` of a delta update."""
        write = {"delta": delta, "delta_bounded": delta_bounded}[self.options.update]
        phi, value, weight = [], [], []
        for block in self.written(g, left):
            room = [*block, *[0] * (self.size - len(block))]
            phi.append(self.phi_k[g, room])
            value.append(self.v[g, room])
            weight.append(self.weight[g, room] * (torch.arange(self.size) < len(block)))
        if not phi:
            return self.v.new_zeros(self.phi_k.shape[-1], self.v.shape[-1]), self.phi_k[0, 0] * 0
        return write(torch.stack(phi), torch.stack(value), torch.stack(weight))[:2]

    @cached_property
    def gated_states(self) -> list[Tensor]:
        """The gated delta memory `[G, D, D]` after each whole number of blocks."""
        mixer, x = self.mixer, self.hidden
        k = turned(self.k, torch.arange(self.length), self.spec if self.options.rotary else None)
        step = (x @ mixer.step.weight.T + mixer.step.bias).sigmoid()
        log_decay = -torch.log1p(torch.exp(x @ mixer.decay.weight.T + mixer.decay.bias))
        seen = torch.zeros(1, self.length, self.k.shape[0], dtype=torch.bool)
        for g in range(self.k.shape[0]):
            seen[0, self.leaves(g, self.length), g] = True
        keys, values = (y.transpose(0, 1)[None] for y in (k, self.v))
        states = [self.v.new_zeros(1, self.k.shape[0], k.shape[-1], self.v.shape[-1])]
        for end in range(self.size, self.length + 1, self.size):
            given = (keys, keys, values, step, log_decay, seen)
            q, k, v, beta, decay, mask = (y[:, end - self.size : end] for y in given)
            states.append(gated_delta_rule(q, k, v, beta, decay, states[-1], mask)[1])
        return [state[0] for state in states]


# How exact part and memory are joined


def window_only(whole: Definition, t: int, h: int) -> Tensor:
    """The exact part alone."""
    return whole.exact(t, h)[0]


def infini(whole: Definition, t: int, h: int) -> Tensor:
    """g A_mem + (1 - g) A_exact, g = 0 where the memory is empty."""
    local, _ = whole.exact(t, h)
    numerator, denominator = whole.read(t, h)
    if not denominator > 0:
        return local
    gate = whole.mixer.gate(whole.hidden)[0, h, t]
    return gate * numerator / denominator + (1 - gate) * local


def linear(whole: Definition, t: int, h: int) -> Tensor:
    """One denominator for both."""
    local, mass = whole.exact(t, h)
    numerator, denominator = whole.read(t, h)
    amplitude = 1 if whole.mixer.log_amplitude is None else whole.mixer.log_amplitude[h].exp()
    total = mass + amplitude * denominator
    return (mass * local + amplitude * numerator) / (total if total > 0 else 1)


def gated_delta(whole: Definition, t: int, h: int) -> Tensor:
    """g e^a q S + (1 - g) A_exact, g = 0 where nothing has been written."""
    local, _ = whole.exact(t, h)
    g, left = h // whole.repeat, whole.left(t)
    if not whole.leaves(g, left):
        return local
    query = turned(whole.q[h, t][None], torch.tensor([t]), whole.spec if whole.options.rotary else None)[0]
    answer = whole.mixer.log_amplitude[h].exp() * (query @ whole.gated_states[left // whole.size][g])
    gate = whole.mixer.gate(whole.hidden)[0, h, t]
    return gate * answer + (1 - gate) * local


Join = Callable[[Definition, int, int], Tensor]
JOINS: dict[str, Join] = {
    "sliding_window": window_only,
    "infini": infini,
    "linear": linear,
    "gated_delta": gated_delta,
}
UPDATES = ("linear", "delta", "delta_bounded")


def missing(mixer: nn.Module) -> str | None:
    """Why there is no definition to hold this mixer against, or None where there is one."""
    if hasattr(mixer, "definition"):
        return None
    options = getattr(mixer, "options", None)
    if options is None or options.name not in JOINS:
        return f"{type(mixer).__name__} has no static method `definition` (see replace/definition.py)"
    if hasattr(mixer, "map_k") and options.update not in UPDATES:
        return f"attention.update={options.update} has no token-by-token definition"
    return None


def join_of(mixer: nn.Module) -> Join:
    """The mixer's own join, or that of its name.

    Raises:
        KeyError: there is none; ask `missing` first.
    """
    own: Any = getattr(mixer, "definition", None)
    return own if own is not None else JOINS[mixer.options.name]  # type: ignore[union-attr, index]


def turned(x: Tensor, positions: Tensor, spec: RotarySpec | None) -> Tensor:
    """`x [..., P, D]` rotated to `positions [P]`, pair by pair, as complex numbers."""
    if spec is None:
        return x
    width, x = 2 * len(spec.angles), x.clone()
    first = slice(0, width // 2) if spec.pairing == "half" else slice(0, width, 2)
    second = slice(width // 2, width) if spec.pairing == "half" else slice(1, width, 2)
    phase = positions.to(torch.float64)[:, None] * torch.tensor(spec.angles, dtype=torch.float64)
    pairs = torch.complex(x[..., first].double(), x[..., second].double())
    pairs = pairs * torch.polar(torch.full_like(phase, spec.scaling), phase)
    x[..., first], x[..., second] = pairs.real.to(x.dtype), pairs.imag.to(x.dtype)
    return x
