"""Properties of one replaced layer, given the queries, keys and values that the model gives it."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kernels.linear_memory.chunk import EMPTY
from replace.blocks import Call, Heads
from replace.cache import ReplacedCacheLayer, State
from replace.definition import Definition, missing
from replace.memory import MemoryMixer
from replace.mixer import VARIANTS, BlockMixer
from replace.properties import Property, distance, register, scatter

PROPERTIES: list[Property] = []
LIMIT = 1e-8
"""Of figures that differ by the rounding of fp64 alone."""

LONG = 4096


@dataclass
class Layer:
    """A replaced layer by itself.

    Attributes:
        index: its number in the model.
        mixer: a copy of its mixer, in fp64 on the CPU.
        tensors: q `[2, H, T, D]`, k, v `[2, G, T, D]` and the layer's input `[2, T, C]`, fp64.
        call: scaling, soft cap, learned sinks and window of the teacher.
    """

    index: int
    mixer: Any
    tensors: list[Tensor]
    call: Call

    @property
    def length(self) -> int:
        """T."""
        return self.tensors[0].shape[2]

    @property
    def block(self) -> int:
        """S; for a variant without blocks a quarter of the text."""
        return self.mixer.block if self.blockwise else max(1, self.length // 4)

    @property
    def exact(self) -> int:
        """The longest exact part of a query, sinks and pairs aside."""
        return (self.mixer.lookback + 1) * self.block if self.blockwise else self.block

    @property
    def blockwise(self) -> bool:
        """Whether the mixer is built on our base, whose state and options are known."""
        return isinstance(self.mixer, BlockMixer)

    def attend(self, *tensors: Tensor, mixer: Any = None, **changes) -> Tensor:
        """`[B, H, T, D]`; tensors: q, k, v and the layer's input, by default the layer's own."""
        q, k, v, hidden = tensors or self.tensors
        sinks = self.call.sink_logit
        call = replace(self.call, hidden=hidden, sink_logit=None if sinks is None else sinks.to(q.dtype))
        return (mixer or self.mixer)(q, k, v, replace(call, **changes))

    def row(self, row: int) -> tuple[Tensor, ...]:
        """q, k, v and input of one row."""
        return tuple(x[row : row + 1] for x in self.tensors)

    def pieces(
        self, cuts: Sequence[int], *tensors: Tensor, mixer: Any = None, real: Tensor | None = None
    ) -> tuple[Tensor, State | None]:
        """The outputs of consecutive calls with a cache, and the state after the last if one is kept."""
        slot, outputs, start = ReplacedCacheLayer(), [], 0
        for cut in cuts:
            piece = slice(start, start + cut)
            own = [x[..., piece, :] for x in tensors or self.tensors]
            mask = None if real is None else real[:, piece]
            outputs.append(self.attend(*own, mixer=mixer, slot=slot, real=mask))
            start += cut
        return torch.cat(outputs, 2), slot.state

    def define(self, mixer: Any, row: int, absent: Sequence[tuple[int, int]] = (), **changes) -> Definition:
        """The definition of one row."""
        q, k, v, hidden = self.row(row)
        return Definition(mixer, q, k, v, replace(self.call, hidden=hidden, **changes), absent)

    def build(self, neutral: bool = False, heads: Heads | None = None, **options) -> Any:
        """A mixer with other options, in fp64, with this one's parameters unless `neutral`.

        Args:
            heads: other heads; parameters of a key-value head are then repeated for its query heads.
        """
        own = self.mixer
        changed = replace(own.options, **options)
        spec = None if own.rotary is None else own.rotary.spec
        mixer: Any = VARIANTS.get(changed.name)(changed, heads or own.heads, spec).double()
        there = dict(own.named_parameters())
        with torch.no_grad():
            for name, parameter in mixer.named_parameters():
                if not neutral and name in there:
                    small, times = there[name], own.heads.repeat
                    parameter.copy_(
                        small if small.shape == parameter.shape else small.repeat_interleave(times, 0)
                    )
        return mixer.eval()

    def sampled(self, start: int = 0) -> list[int]:
        """Some positions from `start` on: the border of each block, and two inside of it."""
        size = self.block
        near = {p + d for p in range(0, self.length, size) for d in (0, size // 3, 2 * size // 3, size - 1)}
        inside = sorted(p for p in near if start <= p < self.length)
        step = max(1, len(inside) // 24)
        return sorted({*inside[::step], *inside[-2:], self.length - 1})


def holds(name: str, meaning: str):
    """Enter a property of layers."""
    return register(PROPERTIES, name, meaning)


@holds(
    "chunked = token by token",
    "the fast form computes something else than the variant's equations: no result can be attributed to them",
)
def chunked_is_the_definition(layer: Layer) -> tuple[float, float] | str:
    why = missing(layer.mixer) if layer.blockwise else "the variant is not built on BlockMixer"
    if why:
        return f"left out: {why}"
    places = layer.sampled()
    want = layer.define(layer.mixer, 0).outputs(places)
    got = layer.attend(*layer.row(0))[:, :, places]
    with torch.enable_grad():  # which takes another way through the exact part
        other = layer.attend(*layer.row(0))[:, :, places].detach()
    return max(distance(got, want), distance(other, want)), LIMIT


@holds(
    "the teacher's soft cap, learned sinks, window and scaling count",
    "on a family that has them the swapped layer ignores them and drifts from its teacher",
)
def honours_the_teacher(layer: Layer) -> tuple[float, float] | str:
    why = missing(layer.mixer) if layer.blockwise else "the variant is not built on BlockMixer"
    if why:
        return f"left out: {why}"
    heads = layer.tensors[0].shape[1]
    changes: dict[str, Any] = {
        "scaling": 0.7 * layer.call.scaling,
        "softcap": 3.0,
        "sliding_window": max(1, layer.block // 2 + 1),
        "sink_logit": torch.linspace(-1, 2, heads).double(),
    }
    places = layer.sampled()
    want = layer.define(layer.mixer, 0, **changes).outputs(places)
    got = layer.attend(*layer.row(0), **changes)[:, :, places]
    # A decoding step takes another way.
    slot, cut = ReplacedCacheLayer(), layer.length - min(3, layer.length - 1)
    last = []
    for piece in (slice(0, cut), *(slice(t, t + 1) for t in range(cut, layer.length))):
        last.append(layer.attend(*(x[..., piece, :] for x in layer.row(0)), slot=slot, **changes))
    stepped = torch.cat(last, 2)[:, :, places]
    return max(distance(got, want), distance(stepped, want)), LIMIT


@holds(
    "no token sees the future",
    "outputs depend on later tokens: losses and perplexities are too good and generation cannot reach them",
)
def strictly_causal(layer: Layer) -> tuple[float, float]:
    size, length = layer.block, layer.length
    want, changed = layer.attend(), 0
    poison = [(1, torch.nan), (2, torch.nan), (2, torch.inf), (3, 3.0), (None, 3.0)]  # k, v, v, input, all
    for place in sorted({min(length - 1, p) for p in (1, size // 2, layer.exact + size // 3, length - size)}):
        for which, value in poison:
            tensors = [x.clone() for x in layer.tensors]
            for i, x in enumerate(tensors):
                if which in (None, i):
                    x.select(-2, place).fill_(value)
            got = layer.attend(*tensors)
            changed += int((got[:, :, :place] != want[:, :, :place]).any(-1).any(1).sum())
    return changed, 0


@holds(
    "rows do not know each other, not even a NaN in another row",
    "a sequence reads or poisons others of its batch: results depend on what they were batched with",
)
def rows_are_apart(layer: Layer) -> tuple[float, float]:
    cut = [layer.length // 2, layer.length - layer.length // 2]
    want, _ = layer.pieces(cut)
    alone, _ = layer.pieces(cut, *layer.row(0))
    figure = distance(alone, want[:1])
    for which in range(4):
        tensors = [x.clone() for x in layer.tensors]
        tensors[which][1] = torch.nan
        got, _ = layer.pieces(cut, *tensors)
        if not torch.equal(got[0], want[0]):
            return float("inf"), LIMIT
    return figure, LIMIT


@holds(
    "any cut into calls gives the same outputs and state",
    "prefill, chunked prefill and decoding disagree: what was trained is not what generates",
)
def any_cut_is_the_same(layer: Layer) -> tuple[float, float]:
    length, size = layer.length, layer.block
    want, state = layer.pieces([length])
    figure = distance(layer.attend(), want)
    first = min(length - 1, layer.exact + size // 2)
    ragged = [*[size + 1] * ((length - 1) // (size + 1)), 1 + (length - 1) % (size + 1)]
    for cuts in ([1] * length, ragged, [first, *[1] * min(2, length - first)]):
        cuts = [*cuts, length - sum(cuts)] if sum(cuts) < length else cuts
        got, other = layer.pieces(cuts)
        figure = max(figure, distance(got, want), state_distance(other, state))
    return figure, LIMIT


def state_distance(got: State | None, want: State | None) -> float:
    """The largest distance of any tensor; empty places of pairs must be empty in both."""
    if got is None or want is None:
        return 0.0  # a variant without our state; its outputs tell
    figure, found = 0.0, got.tensors()
    for name, wanted in want.tensors().items():
        finite = wanted.isfinite()
        if not torch.equal(found[name].isfinite(), finite):
            return float("inf")
        x, y = (torch.where(finite, z, 0).double() for z in (found[name], wanted))
        figure = max(figure, distance(x, y))
    return figure


@holds(
    "pads change nothing, on neither side and in no later call",
    "padded batches train and generate something else than single texts; pads enter memory or positions",
)
def pads_do_not_matter(layer: Layer) -> tuple[float, float]:
    length = layer.length
    middle = min(length - 3, layer.exact + layer.block // 2)
    # For each call and row: pads before, tokens, pads after.
    calls = [
        [(3, middle, 0), (0, middle + 1, 2)],
        [(0, length - middle - 1, 2), (2, length - middle - 2, 1)],
        [(1, 0, 0), (0, 1, 0)],
        [(0, 1, 0), (1, 0, 0)],
    ]
    done, padded, real = [0, 0], [], []
    for call in calls:
        width = sum(call[0])
        mask = torch.zeros(2, width, dtype=torch.bool)
        piece = [x.new_full((*x.shape[:-2], width, x.shape[-1]), 7.0) for x in layer.tensors]
        for row, (before, count, _) in enumerate(call):
            mask[row, before : before + count] = True
            for whole, part in zip(layer.tensors, piece, strict=True):
                part[row, ..., before : before + count, :] = whole[row, ..., done[row] : done[row] + count, :]
            done[row] += count
        padded.append(piece)
        real.append(mask)
    tensors = [torch.cat(parts, -2) for parts in zip(*padded, strict=True)]
    mask = torch.cat(real, 1)
    want, state = layer.pieces([length])
    got, other = layer.pieces([sum(call[0]) for call in calls], *tensors, real=mask)
    figure = state_distance(other, state)
    for row in range(2):
        figure = max(figure, distance(got[row][:, mask[row]], want[row]))
    return figure, LIMIT


@holds(
    "packed documents do not see each other",
    "training on packed rows mixes texts that have nothing to do with each other",
)
def documents_are_apart(layer: Layer) -> tuple[float, float]:
    first, second = layer.length - 1, layer.length // 2 + 1
    tensors = [torch.cat([x[:1, ..., :first, :], x[1:, ..., :second, :]], -2) for x in layer.tensors]
    document = torch.cat([torch.zeros(1, first), torch.ones(1, second)], 1).long()
    got = layer.attend(*tensors, document=document)
    want = layer.attend()
    apart = distance(got[0, :, :first], want[0, :, :first])
    return max(apart, distance(got[0, :, first:], want[1, :, :second])), LIMIT


@holds(
    "outputs scale with the values", "the variant is not an average of values: magnitudes drift with the text"
)
def scales_with_the_values(layer: Layer) -> tuple[float, float]:
    q, k, v, hidden = layer.tensors
    return distance(layer.attend(q, k, 8 * v, hidden) / 8, layer.attend()), LIMIT


@holds(
    "what the memory answers lies within the values it holds",
    "the memory's answer leaves the range of the values, so the following layers see what they never saw",
)
def answers_within_the_values(layer: Layer) -> tuple[float, float] | str:
    if not isinstance(layer.mixer, MemoryMixer):
        return "the variant has no linear memory"
    q, k, v, hidden = layer.tensors
    v = v.abs() + 0.1 * v.abs().mean()  # above 0, so that an answer that shrinks falls out
    if layer.mixer.options.update == "delta_bounded":
        # One pair again and again is read back as it is.
        k, v = k[:, :, :1].expand_as(k), v[:, :, :1].expand_as(v)
        mixers = [layer.build(write_gate="none", pairs=0, clamp=1e30)]
    elif layer.mixer.options.update == "linear":
        mixers = [layer.mixer, layer.build(clamp=1e-3), layer.build(clamp=1e-3, pairs=0)]
    else:
        return f"attention.update={layer.mixer.options.update} corrects what is held, it does not average"
    low, high = (x.unsqueeze(2) for x in (v.amin(2, keepdim=True), v.amax(2, keepdim=True)))
    figure, seen = 0.0, False
    for mixer in mixers:
        for numerator, denominator in asked(layer, mixer, q, k, v, hidden):
            held = denominator > EMPTY
            answer = numerator / torch.where(held, denominator, 1)
            beyond = torch.maximum(low - answer, answer - high) / v.abs().max()
            figure = max(figure, float(torch.where(held, beyond, 0).max()))
            seen = seen or bool(held.any())
    return (figure, LIMIT) if seen else (float("inf"), LIMIT)


def asked(layer: Layer, mixer: Any, *tensors: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Numerators and denominators of all that the memory is asked in one call."""
    answers, ask = [], mixer.remember

    def listen(*arguments) -> tuple[Tensor, Tensor, Tensor]:
        answer = ask(*arguments)
        answers.append(answer[:2])
        return answer

    mixer.remember = listen
    try:
        layer.attend(*tensors, mixer=mixer)
    finally:
        del mixer.remember
    return answers


@holds(
    "memory reads do not depend on where a token stood",
    "positions are left on the memory's keys: what was read at one length is lost at another",
)
def reads_without_positions(layer: Layer) -> tuple[float, float] | str:
    if not isinstance(layer.mixer, MemoryMixer):
        return "the variant has no linear memory"
    options = layer.mixer.options
    if options.rotary:
        return "attention.rotary=true asks for positions"
    if options.update != "linear":
        return f"attention.update={options.update} depends on the order by design"
    mixer = layer.build(pairs=0)
    begin = (layer.length - 1) // layer.block * layer.block  # of the last block
    gone = begin - mixer.lookback * layer.block
    order = torch.arange(layer.length)
    order[options.sinks : gone] = order[options.sinks : gone].flip(0)
    swapped = [x[..., order, :] for x in layer.tensors]
    got, want = (layer.attend(*x, mixer=mixer)[:, :, begin:] for x in (swapped, layer.tensors))
    return distance(got, want), LIMIT


@holds(
    "grouped heads equal expanded ones",
    "query heads read the memory or the keys of another head: the capture is right for one head only",
)
def grouped_is_expanded(layer: Layer) -> tuple[float, float] | str:
    if not layer.blockwise:
        return "the variant is not built on BlockMixer"
    heads = layer.mixer.heads
    if heads.repeat == 1:
        return "every query head has a key-value head of its own"
    small = layer.build(pairs=0)
    full = layer.build(neutral=True, heads=replace(heads, key_value=heads.query), pairs=0)
    there = dict(small.named_parameters())
    with torch.no_grad():
        for name, parameter in full.named_parameters():
            own = there[name]
            own = own if own.shape == parameter.shape else own.repeat_interleave(heads.repeat, 0)
            if own.shape != parameter.shape:
                return f"{name} cannot be expanded to a key-value head for each query head"
            parameter.copy_(own)
    q, k, v, hidden = layer.tensors
    wide = [x.repeat_interleave(heads.repeat, 1) for x in (k, v)]
    return distance(layer.attend(q, *wide, hidden, mixer=full), layer.attend(mixer=small)), LIMIT


@holds(
    "gradients reach the first block through the memory",
    "the memory is cut off from training: it never learns what to keep",
)
def gradients_reach_the_first_block(layer: Layer) -> tuple[float, float] | str:
    if not getattr(layer.mixer, "has_memory", False):
        return "the variant has no memory"
    mixer = layer.build(pairs=0)
    start = mixer.options.sinks if mixer.options.sinks < layer.block else layer.block
    first = slice(start, start + max(1, layer.block - start))
    tensors = [x.clone().requires_grad_() for x in layer.tensors]
    with torch.enable_grad():
        out = layer.attend(*tensors, mixer=mixer)
        gradients = torch.autograd.grad(out[:, :, layer.length - 1 :].square().sum(), tensors[1:3])
    silent = sum(int((~(g[:, :, first].abs().sum((-1, -2)) > 0)).sum()) for g in gradients)
    return silent, 0


@holds(
    "gates and maps have a gradient near their start",
    "a gate starts so far shut that its gradient is 0: it stays where it is however long one trains",
)
def gates_learn(layer: Layer) -> tuple[float, float] | str:
    if not layer.blockwise:
        return "the variant is not built on BlockMixer"
    mixer = layer.build(neutral=True, pairs=0).float()
    scatter(mixer)  # a part that starts at 0 may hide another for one step
    parameters = list(mixer.parameters())
    if not parameters:
        return "the variant has no parameters but those of its score"
    tensors = [x.float() for x in layer.tensors]
    with torch.enable_grad():
        loss = layer.attend(*tensors, mixer=mixer).square().sum()
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    return sum(1 for g in gradients if g is None or not bool(g.abs().sum() > 0)), 0


@holds("two calls are alike: nothing stays in the module", "a forward depends on the one before it")
def nothing_stays(layer: Layer) -> tuple[float, float]:
    first = layer.attend()
    layer.attend(*(x.flip(0) for x in layer.tensors))
    layer.pieces([layer.length - 1, 1], *layer.row(1))
    return float((layer.attend() != first).sum()), 0


@holds(
    "an overflow is skipped and counted, for its row and head only",
    "one bad token poisons the memory for good, or vanishes without being counted",
)
def overflow_is_skipped(layer: Layer) -> tuple[float, float] | str:
    if not layer.blockwise:
        return "the variant is not built on BlockMixer"
    mixer, place = copy.deepcopy(layer.mixer), layer.mixer.options.sinks + 1
    gone = (place // layer.block + mixer.lookback + 1) * layer.block
    repeat, figure = mixer.heads.repeat, 0.0
    _, clean = layer.pieces([layer.length], mixer=mixer)
    assert clean is not None
    tensors = [x.clone() for x in layer.tensors]
    tensors[1][1, 0, place, 0] = torch.inf
    want = layer.attend()
    for cuts in ([layer.length], [place + 2, layer.length - place - 2]):
        mixer.nonfinite = 0
        got, state = layer.pieces(cuts, *tensors, mixer=mixer)
        figure = max(figure, distance(got[0], want[0]), distance(got[1, repeat:], want[1, repeat:]))
        assert state is not None
        if int(mixer.nonfinite) != 1 or not bool(got[1, :repeat, gone:].isfinite().all()):
            return float("inf"), LIMIT
        for name, x in state.tensors().items():
            if name.startswith("memory"):
                kept = clean.tensors()[name]
                figure = max(figure, distance(x[0], kept[0]), distance(x[1, 1:], kept[1, 1:]))
                figure = figure if bool(x.isfinite().all()) else float("inf")
        if missing(layer.mixer) is None:
            places = [t for t in layer.sampled() if t >= gone]
            whole = layer.define(layer.mixer, 1, absent=[(0, place)])
            wanted = whole.outputs(places, repeat)[0]
            figure = max(figure, distance(got[1, :repeat][:, places], wanted))
    return figure, LIMIT


@holds(
    "retained pairs are the best of what has left, each pair in one place, ties by position",
    "what is kept depends on how the text was cut, or a pair counts twice or not at all",
)
def pairs_in_one_place(layer: Layer) -> tuple[float, float] | str:
    if not layer.blockwise or not layer.mixer.options.pairs:
        return "attention.pairs is 0"
    options, length = layer.mixer.options, layer.length
    left = (length // layer.block - layer.mixer.lookback) * layer.block
    alike = [x[..., :1, :].expand_as(x) for x in layer.tensors]  # all scores that look at tokens tie
    wrong = 0
    for mixer, tensors in ((layer.mixer, layer.tensors), (layer.build(neutral=True), alike)):
        for cuts in ([length], [length // 2, *[1] * (length - length // 2)]):
            _, state = layer.pieces(cuts, *tensors, mixer=mixer)
            assert state is not None
            assert state.pair_score is not None
            assert state.pair_position is not None
            q, k, v, hidden = (x[:1] for x in tensors)
            whole = Definition(mixer, q, k, v, replace(layer.call, hidden=hidden))
            for g in range(layer.mixer.heads.key_value):
                alive = state.pair_score[0, g] != -torch.inf
                kept = state.pair_position[0, g][alive].tolist()
                wrong += len(set(kept) ^ set(whole.retained(g, left))) + len(kept) - len(set(kept))
    if isinstance(layer.mixer, MemoryMixer) and options.update == "linear":
        counting = layer.build(write_gate="none")
        _, state = layer.pieces([length - 1, 1], mixer=counting)
        assert state is not None
        assert state.pair_score is not None
        assert state.memory_n is not None
        retained = (state.pair_score != -torch.inf).sum(-1) if counting.needs_mass else 0
        wrong += int((state.memory_n - (left - options.sinks - retained)).abs().sum())
    return wrong, 0


@holds(
    f"the state has as many bytes after {LONG} tokens as after 1",
    "memory grows with the text, which a replaced layer is meant to end",
)
def state_is_constant(layer: Layer) -> tuple[float, float] | str:
    if not layer.blockwise:
        return "the variant is not built on BlockMixer"
    mixer = copy.deepcopy(layer.mixer).float()
    q, k, v, hidden = (x[:1].float() for x in layer.tensors)
    sizes = []
    for length in (1, LONG):
        index = torch.arange(length) % layer.length
        cuts = [1024] * (length // 1024) or [1]
        _, state = layer.pieces(cuts, *(x[..., index, :] for x in (q, k, v, hidden)), mixer=mixer)
        assert state is not None
        sizes.append(sum(x.numel() * x.element_size() for x in state.tensors().values()))
    return abs(sizes[1] - sizes[0]), 0


@holds(
    "fp16 and bf16 stay finite with activations at 1e3, the memory in fp32",
    "half precision overflows, or a memory kept in it drowns in rounding after some thousand tokens",
)
def half_precision_is_finite(layer: Layer) -> tuple[float, float]:
    mixer, wrong = copy.deepcopy(layer.mixer).float(), 0
    largest = torch.finfo(torch.float16).max
    for dtype in (torch.float16, torch.bfloat16):
        q, k, v = (
            (1e3 * x / x.square().mean().sqrt()).clamp(-largest, largest).to(dtype) for x in layer.tensors[:3]
        )
        hidden = layer.tensors[3].to(dtype)
        for keys in (k, torch.full_like(k, -20.0)):
            out, state = layer.pieces([layer.length - 1, 1], q, keys, v, hidden, mixer=mixer)
            wrong += int((~out.isfinite()).sum()) + (out.dtype != dtype)
            for name, x in (state.tensors() if state is not None else {}).items():
                lost = x.is_floating_point() and x.dtype not in (torch.float32, torch.float64)
                wrong += name.startswith("memory") and lost
    return wrong, 0


@holds(
    "features keep their precision in fp32",
    "small features round to 0 and read 0/0: the memory goes blind for some keys",
)
def features_keep_precision(layer: Layer) -> tuple[float, float] | str:
    if not isinstance(layer.mixer, MemoryMixer):
        return "the variant has no feature maps"
    mixer, worst = layer.mixer, 0.0
    single = copy.deepcopy(mixer).float()
    for level in (-20.0, -12.0, -8.0, -1.0, 0.0, 1.0, 8.0):
        found = []
        for own, dtype in ((mixer, torch.float64), (single, torch.float32)):
            q, k = (x[:1, :, :4].to(dtype) * 0 + level for x in layer.tensors[:2])
            phi_q, phi_k = own.map_q(q), own.map_k(k).repeat_interleave(mixer.heads.repeat, 1)
            found.append((phi_q.double() * phi_k.double()).sum(-1))
        want, got = found
        error = ((got - want).abs() / want.abs().clamp_min(1e-30)).masked_fill(want.abs() < 1e-30, 0)
        worst = max(worst, float(error.max()))
    return worst, 1e-2


QUICK: list[Property] = [
    p
    for p in PROPERTIES
    if p.measure in (strictly_causal, rows_are_apart, any_cut_is_the_same, pads_do_not_matter)
]
"""Those that a run checks at conversion."""
