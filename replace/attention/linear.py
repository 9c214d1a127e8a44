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

import torch
from torch import Tensor, nn

from kernels.numerics import wide
from replace.blocks import Blocks, Call, Heads, Part
from replace.config import AttentionConfig
from replace.memory import MemoryMixer
from replace.mixer import VARIANTS, BlockMixer
from replace.rotary import RotarySpec


@VARIANTS.register("linear")
class Linear(MemoryMixer):
    """The linear hybrid: exact softmax while nothing is older; untrained, close to the window alone.

    With `local: none`, linear attention alone: untrained, a mean of all values that hardly selects, far from
    the teacher in every layer. The size of a block is then a matter of speed only.
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

    def mix(self, blocks: Blocks, exact: Tensor, mass: Tensor | None, call: Call) -> Tensor:
        """Join under the shared denominator; see the module."""
        assert mass is not None
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
