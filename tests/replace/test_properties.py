"""What must hold for every variant (design 02, "What must hold"), on small random models in fp64.

There a leak has no noise to hide in. The numbers in the names of the tests are those of the design's list.
"""

import copy
import functools
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel

from kernels.exact_attention.reference import exact_keys
from kernels.linear_memory.reference import delta_bounded
from replace.cache import ReplacedCacheLayer, state_bytes
from replace.config import AttentionConfig
from replace.convert import SwapSpec, mixers, swap
from replace.definition import Definition
from replace.errors import UserError
from replace.feature_maps import FEATURE_MAPS
from replace.mixer import VARIANTS, BlockMixer, Call, Heads
from replace.rotary import RotarySpec

LAYERS = 2
VOCABULARY = 61
PAD = 0

FAMILIES = {
    "llama": {"num_key_value_heads": 2, "head_dim": 8},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 12},  # q/k norms, heads wider than hidden / heads
    "phi3": {"num_key_value_heads": 1, "partial_rotary_factor": 0.5},  # fused q, k, v
    "gpt_neox": {"rotary_pct": 0.25},  # fused, partial rotary, no GQA, another name for the cache
}

SMALL = {"block": 4, "window": 4, "sinks": 2, "pairs": 3, "pairs_score": "key_norm", "distance_cap": None}
ALONE = {"local": "none", "window": 0, "write_gate": "none"}
SEGMENT = {"local": "segment", "sinks": 0, "pairs": 0}
CASES: dict[str, tuple[str, dict]] = {
    "window": ("llama", {"name": "sliding_window", "pairs": 0}),
    "window-pairs": ("qwen3", {"name": "sliding_window", "pairs_score": "learned", "distance_cap": 16}),
    "window-recent": ("llama", {"name": "sliding_window", "pairs_recent": 0.4, "pairs_fade": 40.0}),
    "infini-recent": (
        "qwen3",
        {
            "name": "infini",
            "pairs_score": "learned",
            "pairs_recent": 1.0,
            "pairs_fade": 1e4,
            "distance_cap": 16,
        },
    ),
    "linear-recent": (
        "phi3",
        {"name": "linear", "pairs": 4, "pairs_score": "learned", "pairs_recent": 0.5, "pairs_fade": 40.0},
    ),
    "window-wide": ("phi3", {"name": "sliding_window", "window": 8, "sinks": 0, "pairs_score": "random"}),
    "infini-paper": ("llama", {"name": "infini", **SEGMENT, "feature_map": "elu", "write_gate": "none"}),
    "infini": ("llama", {"name": "infini", "pairs_score": "learned", "distance_cap": 12}),
    "infini-token": ("qwen3", {"name": "infini", "gate": "token", "pairs": 0, "feature_map": "elu"}),
    "infini-t2r": ("gpt_neox", {"name": "infini", "feature_map": "t2r", "pairs": 0}),
    "infini-rotary": ("phi3", {"name": "infini", "rotary": True, "local": "segment", "sinks": 1}),
    "infini-neox": ("gpt_neox", {"name": "infini", "window": 8, "block": 8, "write_gate": "none"}),
    "delta": ("llama", {"name": "infini", "update": "delta_bounded", "gate": "token"}),
    "delta-published": ("llama", {"name": "infini", "update": "delta", "pairs": 0, "feature_map": "elu"}),
    "delta-paper": ("qwen3", {"name": "infini", "update": "delta_bounded", **SEGMENT, "feature_map": "elu"}),
    "linear": ("llama", {"name": "linear", "pairs_score": "learned", "distance_cap": 16}),
    "linear-plain": ("phi3", {"name": "linear", "pairs": 0, "feature_map": "elu", "write_gate": "none"}),
    "linear-taylor": ("llama", {"name": "linear", "feature_map": "taylor", "pairs_score": "key_norm"}),
    "linear-alone": ("llama", {"name": "linear", **ALONE, "pairs": 0, "sinks": 0}),
    "linear-alone-sinks": (
        "qwen3",
        {"name": "linear", **ALONE, "pairs_score": "learned", "write_gate": "token", "distance_cap": 16},
    ),
    "linear-segment": ("qwen3", {"name": "linear", "local": "segment", "sinks": 0, "feature_map": "elu"}),
    "window-attention": ("qwen3", {"name": "sliding_window", "pairs_score": "attention", "distance_cap": 16}),
    "infini-attention": ("phi3", {"name": "infini", "local": "segment", "pairs_score": "attention"}),
    "delta-recall": ("llama", {"name": "infini", "update": "delta_bounded", "pairs_score": "self_recall"}),
    "linear-recall": (
        "qwen3",
        {"name": "linear", "feature_map": "elu", "pairs_score": "self_recall", "window": 8},
    ),
    "linear-delta": ("gpt_neox", {"name": "linear", "update": "delta_bounded", "pairs_score": "random"}),
    "gated-delta": ("qwen3", {"name": "gated_delta", "pairs_score": "learned", "distance_cap": 16}),
    "gated-delta-plain": ("llama", {"name": "gated_delta", **SEGMENT, "gate": "token"}),
}
HAS_MEMORY = [name for name, (_, options) in CASES.items() if options["name"] != "sliding_window"]
EVERY = pytest.mark.parametrize("name", CASES)
WITH_MEMORY = pytest.mark.parametrize("name", HAS_MEMORY)


def options_of(case: str, **changes) -> AttentionConfig:
    """The options of a case."""
    return AttentionConfig(**(SMALL | CASES[case][1] | changes))


@functools.cache
def _teacher(family: str) -> PreTrainedModel:
    config = AutoConfig.for_model(
        family,
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        max_position_embeddings=512,
        initializer_range=0.25,  # large enough that attention is not uniform
        pad_token_id=PAD,
        bos_token_id=1,
        eos_token_id=2,
        **FAMILIES[family],
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).double().eval()


def teacher(family: str) -> PreTrainedModel:
    """A random fp64 model that the caller may change."""
    return copy.deepcopy(_teacher(family))


@torch.no_grad()
def scatter(module: torch.nn.Module) -> None:
    """Move all parameters of mixers away from their neutral start."""
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * 0.5)


@functools.cache
def _student(name: str) -> PreTrainedModel:
    model = teacher(CASES[name][0])
    swap(model, SwapSpec({i: options_of(name) for i in range(LAYERS)}))
    for mixer in mixers(model).values():
        scatter(mixer.double())
    return model


def student(name: str) -> PreTrainedModel:
    """A model with all layers replaced and scattered parameters; shared, so tests leave its weights alone."""
    return _student(name)


def text(rows: int, length: int, seed: int = 0) -> Tensor:
    """Random token ids, no special ones, `[rows, length]`."""
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def logits(model: PreTrainedModel, ids: Tensor, **kwargs) -> Tensor:
    """`[B, T, V]` without a cache."""
    with torch.no_grad():
        return model(ids, use_cache=False, **kwargs).logits


def close(got: Tensor, want: Tensor, limit: float = 1e-8) -> None:
    """The largest difference within `limit` of the largest entry."""
    assert got.shape == want.shape
    assert got.isfinite().all()
    error = float((got - want).abs().max() / want.abs().max().clamp_min(1e-9))
    assert error < limit, f"{error:.1e} is not below {limit:.0e}"


# Layer level: a mixer by itself ----------------------------------------------------------------------------

HEADS = Heads(4, 2, 8, 16)
ROTARY = RotarySpec([1.0, 0.3, 0.1], "half")  # six of eight dimensions


def mixer_of(case: str, heads: Heads = HEADS, **changes) -> BlockMixer:
    """An fp64 mixer of the case with scattered parameters."""
    options = options_of(case, **changes)
    mixer = VARIANTS.get(options.name)(options, heads, ROTARY).double()
    scatter(mixer)
    return mixer


def inputs(length: int, batch: int = 1, heads: Heads = HEADS, seed: int = 0) -> list[Tensor]:
    """q, k, v `[B, H or G, T, D]` and the layer's input `[B, T, C]`, fp64."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, h, length, heads.dim) for h in (heads.query, heads.key_value, heads.key_value)]
    return [torch.randn(s, generator=generator).double() for s in [*shapes, (batch, length, heads.hidden)]]


def attend(mixer: BlockMixer, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, slot=None, **call) -> Tensor:
    """`[B, H, T, D]`."""
    return mixer(q, k, v, Call(hidden, 0.4, slot=slot, **call))


def in_pieces(mixer: BlockMixer, cuts: list[int], *tensors: Tensor) -> tuple[Tensor, ReplacedCacheLayer]:
    """The outputs of consecutive calls with a cache, and the cache."""
    slot, outputs, start = ReplacedCacheLayer(), [], 0
    for cut in cuts:
        q, k, v = (x[:, :, start : start + cut] for x in tensors[:3])
        outputs.append(attend(mixer, q, k, v, tensors[3][:, start : start + cut], slot))
        start += cut
    return torch.cat(outputs, 2), slot


def rotated(x: Tensor, position: int) -> Tensor:
    """One vector `[D]` at a position, by `ROTARY`, written out."""
    x, half = x.clone(), len(ROTARY.angles)
    for i, angle in enumerate(ROTARY.angles):
        a, b = x[i].clone(), x[i + half].clone()
        c, s = math.cos(position * angle), math.sin(position * angle)
        x[i], x[i + half] = a * c - b * s, b * c + a * s
    return x


def oracle(
    mixer: BlockMixer, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, absent: tuple[int, int] = (-1, -1)
) -> Tensor:
    """The definition of a variant, token by token: `[1, H, T, D]`.

    Args:
        absent: (key-value head, position) of a pair that does not exist.
    """
    return Definition(mixer, q, k, v, Call(hidden, 0.4), [absent]).outputs()


@EVERY
@torch.no_grad()
def test_4_mixer_equals_the_token_by_token_definition(name: str) -> None:
    mixer, tensors = mixer_of(name), inputs(27)
    close(attend(mixer, *tensors), oracle(mixer, *tensors))


@torch.no_grad()
def test_4_gated_delta_with_rotated_queries_and_keys() -> None:
    mixer, tensors = mixer_of("gated-delta", rotary=True), inputs(27)
    close(attend(mixer, *tensors), oracle(mixer, *tensors))


@pytest.mark.parametrize("fade", [0.1, 0.7, 3.0])
@torch.no_grad()
def test_4_ties_in_recent_places_are_decided_by_position_not_by_rounding(fade: float) -> None:
    """Equal keys, so that age alone ranks the recent places; a slow one leaves whole stretches equal."""
    mixer = mixer_of("window-recent", pairs=8, pairs_recent=0.5, pairs_fade=fade)
    q, k, v, hidden = inputs(300)
    k = k[:, :, :1].expand_as(k)
    late = [round(j * fade) for j in range(300 - mixer.lookback * mixer.block)]
    rest = sorted(range(mixer.options.sinks + 4, len(late)), key=lambda j: (-late[j], j))
    want = sorted([*range(mixer.options.sinks, mixer.options.sinks + 4), *rest[:4]])
    for cuts in ([300], [7, 293], [150, *[1] * 150]):
        _, slot = in_pieces(mixer, cuts, q, k, v, hidden)
        assert slot.state.pair_position[0].sort(-1).values.tolist() == [want] * 2


@EVERY
@torch.no_grad()
def test_4_the_teachers_own_attention_is_honoured(name: str) -> None:
    """Its scaling, soft cap, learned sinks and sliding window, in the full forward and in decoding."""
    mixer, (q, k, v, hidden) = mixer_of(name), inputs(27)
    own = {"softcap": 1.5, "sliding_window": 3, "sink_logit": torch.tensor([-1.0, 0.5, 1.0, 2.0]).double()}
    want = Definition(mixer, q, k, v, Call(hidden, 0.3, **own)).outputs()
    close(mixer(q, k, v, Call(hidden, 0.3, **own)), want)
    slot, decoded = ReplacedCacheLayer(), []
    for t in range(27):
        now = slice(t, t + 1)
        call = Call(hidden[:, now], 0.3, slot=slot, **own)
        decoded.append(mixer(q[:, :, now], k[:, :, now], v[:, :, now], call))
    close(torch.cat(decoded, 2), want)


@EVERY
@torch.no_grad()
def test_4_and_5_any_cut_gives_the_same_outputs_and_state(name: str) -> None:
    mixer, tensors, length = mixer_of(name), inputs(43, batch=2), 43
    whole, slot = in_pieces(mixer, [length], *tensors)
    close(attend(mixer, *tensors), whole)
    for cuts in ([1] * length, [7, 8, 9, 19], [16, 1, 1, 25], [4, 4, 35], [42, 1]):
        got, state = in_pieces(mixer, cuts, *tensors)
        close(got, whole)
        for field, want in slot.state.tensors().items():
            found = state.state.tensors()[field]
            torch.testing.assert_close(found, want, rtol=1e-8, atol=1e-9, msg=lambda m, f=field: f"{f}: {m}")


@EVERY
def test_4_gradients_are_the_same_in_pieces(name: str) -> None:
    mixer, gradients = mixer_of(name), []
    for cuts in ([23], [9, 1, 13], [8, 15]):
        tensors = [x.requires_grad_() for x in inputs(23)]
        mixer.zero_grad()
        out, _ = in_pieces(mixer, cuts, *tensors)
        out.square().sum().backward()
        leaves = [*tensors, *mixer.parameters()]
        gradients.append([torch.zeros_like(x) if x.grad is None else x.grad.clone() for x in leaves])
    for other in gradients[1:]:
        for got, want in zip(other, gradients[0], strict=True):
            close(got, want)


GRADCHECKED = ["window-pairs", "infini", "infini-token", "linear", "linear-plain", "gated-delta"]
ALONE_CASES = ["linear-alone", "linear-alone-sinks"]


@pytest.mark.parametrize("name", [*GRADCHECKED, *ALONE_CASES])
def test_4_gradcheck(name: str) -> None:
    small = Heads(2, 1, 2, 3)
    options = options_of(name)
    sizes = {"window": min(2, options.window), "sinks": min(1, options.sinks), "pairs": min(1, options.pairs)}
    options = options_of(name, block=2, **sizes, distance_cap=None)
    mixer = VARIANTS.get(options.name)(options, small, None).double()
    scatter(mixer)
    tensors = [x.requires_grad_() for x in inputs(9, heads=small)]
    assert torch.autograd.gradcheck(lambda *x: attend(mixer, *x), tensors)


@pytest.mark.parametrize("name", ALONE_CASES)
@torch.no_grad()
def test_4_without_a_window_blocks_are_a_matter_of_speed(name: str) -> None:
    tensors = inputs(27)
    want = attend(mixer_of(name, pairs=0, distance_cap=None), *tensors)
    for block in (2, 9, 32):
        close(attend(mixer_of(name, pairs=0, distance_cap=None, block=block), *tensors), want)


@pytest.mark.parametrize("name", ALONE_CASES)
def test_4_an_empty_exact_part_gives_no_nan(name: str) -> None:
    """Neither without sinks and pairs, nor at a sink that is left out, nor under the teacher's own sinks."""
    sink_logit = torch.tensor([0.5, -1.0, 2.0, 0.0]).double()
    for off, call in (((), {}), (("sinks", "pairs"), {}), ((), {"sink_logit": sink_logit})):
        mixer = mixer_of(name)
        mixer.off = frozenset(off)
        tensors = [x.requires_grad_() for x in inputs(11)]
        out = attend(mixer, *tensors, **call)
        out.square().sum().backward()
        assert out.isfinite().all()
        leaves = [*tensors, *mixer.parameters()]
        assert all(x.grad.isfinite().all() for x in leaves if x.grad is not None)
    plain, learned = (attend(mixer_of(name), *tensors, **c) for c in ({}, {"sink_logit": sink_logit}))
    assert (learned.norm(dim=-1) < plain.norm(dim=-1)).all(), "the teacher's sinks take their share"


@EVERY
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf, 3.0])
@torch.no_grad()
def test_2_a_token_changes_nothing_before_it(name: str, poison: float) -> None:
    mixer, tensors = mixer_of(name), inputs(30)
    want = attend(mixer, *tensors)
    for place in (0, 9, 12, 18):
        for which in range(4):
            changed = [x.clone() for x in tensors]
            changed[which].select(-2, place).fill_(poison)
            got = attend(mixer, *changed)
            assert torch.equal(got[:, :, :place], want[:, :, :place])


@EVERY
@pytest.mark.parametrize(("which", "place"), [(1, 1), (1, 9), (2, 1), (2, 9)])
@torch.no_grad()
def test_2_later_blocks_forget_a_poisoned_token(name: str, which: int, place: int) -> None:
    """Once its block has left the window, a non-finite key or value is as if it had never been, sinks too."""
    mixer, tensors = mixer_of(name), inputs(27)
    gone = (place // mixer.block + mixer.lookback + 1) * mixer.block
    want = oracle(mixer, *tensors, absent=(0, place))
    tensors[which][:, 0, place, 0] = torch.inf if place == 1 else torch.nan
    for cuts in ([27], [11, 1, 1, 14], [1] * 27):
        got, slot = in_pieces(mixer, cuts, *tensors)
        assert got[:, : HEADS.repeat, place].isnan().all(), "a poisoned window must not look healthy"
        close(got[:, :, gone:], want[:, :, gone:])
        assert got[:, HEADS.repeat :].isfinite().all(), "the other head does not know"
        kept = [x for f, x in slot.state.tensors().items() if f.startswith(("memory", "pair_k", "pair_v"))]
        assert all(x.isfinite().all() for x in kept)


@EVERY
@torch.no_grad()
def test_3_rows_do_not_know_each_other(name: str) -> None:
    mixer, tensors = mixer_of(name), inputs(30, batch=3)
    want, _ = in_pieces(mixer, [13, 17], *tensors)
    alone, _ = in_pieces(mixer, [13, 17], *(x[1:2] for x in tensors))
    close(want[1:2], alone)
    for which in range(4):
        changed = [x.clone() for x in tensors]
        changed[which][1] = torch.nan
        got, _ = in_pieces(mixer, [13, 17], *changed)
        assert torch.equal(got[[0, 2]], want[[0, 2]])


@EVERY
@torch.no_grad()
def test_6_state_bytes_do_not_grow(name: str) -> None:
    mixer, sizes = mixer_of(name), []
    for length in (1, 37, 1000):
        _, slot = in_pieces(mixer, [length], *inputs(length))
        sizes.append({f: x.numel() * x.element_size() for f, x in slot.state.tensors().items()})
    assert sizes[0] == sizes[1] == sizes[2]


@EVERY
@torch.no_grad()
def test_9c_outputs_scale_with_the_values(name: str) -> None:
    mixer, (q, k, v, hidden) = mixer_of(name), inputs(30)
    close(attend(mixer, q, k, 37 * v, hidden), 37 * attend(mixer, q, k, v, hidden))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@EVERY
@torch.no_grad()
def test_11_half_precision_stays_finite(name: str, dtype: torch.dtype) -> None:
    mixer = mixer_of(name).float()
    q, k, v, hidden = (x.to(dtype) for x in inputs(100))
    out, slot = in_pieces(mixer, [61, 39], q * 1e3, k * 1e3, v * 1e3, hidden)
    assert out.dtype == dtype
    assert out.isfinite().all()
    out = attend(mixer, q, torch.full_like(k, -20.0), v, hidden)
    assert out.isfinite().all()
    assert slot.state.memory_M is None or slot.state.memory_M.dtype == torch.float32


@EVERY
@torch.no_grad()
def test_12_grouped_heads_equal_expanded_ones(name: str) -> None:
    """GQA = multi-head attention with the key-value head of head h at h // R."""
    mixer, (q, k, v, hidden) = mixer_of(name), inputs(30)
    full = mixer_of(name, Heads(4, 4, 8, 16))
    own, repeat = dict(mixer.named_parameters()), HEADS.repeat
    for key, parameter in full.named_parameters():
        small = own[key]
        parameter.copy_(small if small.shape == parameter.shape else small.repeat_interleave(repeat, dim=0))
    wide = [x.repeat_interleave(repeat, dim=1) for x in (k, v)]
    if options_of(name).pairs_score in ("random", "attention") and options_of(name).pairs:
        pytest.skip("these scores differ by key-value head, or look at all heads of a group")
    close(attend(full, q, *wide, hidden), attend(mixer, q, k, v, hidden))


@WITH_MEMORY
def test_13_gradients_reach_the_first_block_through_the_memory(name: str) -> None:
    mixer = mixer_of(name)
    tensors = [x.requires_grad_() for x in inputs(40)]
    attend(mixer, *tensors)[:, :, 36:].square().sum().backward()
    first = slice(options_of(name).sinks, 4)
    for x in tensors[1:3]:
        assert (x.grad[:, :, first].abs().amax(-1) > 0).all()
    assert not tensors[0].grad[:, :, :36].any(), "old queries do not matter to later outputs"


@pytest.mark.parametrize("name", FEATURE_MAPS.names())
@torch.no_grad()
def test_11_features_keep_their_precision(name: str) -> None:
    """A weight of far negative keys is small, not 0: elu(x) + 1 as written rounds to 0 at -20."""
    feature_map = FEATURE_MAPS.get(name)(1, 8)
    for level in (-20.0, -12.0, -8.0, 0.0, 8.0):
        single, double = (
            feature_map(torch.full((1, 1, 1, 8), level, dtype=d)) for d in (torch.float32, torch.float64)
        )
        weights = [x.double().square().sum() for x in (single, double)]
        torch.testing.assert_close(*weights, rtol=1e-3, atol=1e-35)


@WITH_MEMORY
@pytest.mark.parametrize("gate_init", [-1.0, -4.0])
def test_14_gates_and_maps_learn_from_the_start(name: str, gate_init: float) -> None:
    options = options_of(name, gate_init=gate_init)
    mixer = VARIANTS.get(options.name)(options, HEADS, ROTARY)
    q, k, v, hidden = (x.float() for x in inputs(40))
    attend(mixer, q, k, v, hidden).square().sum().backward()
    silent = [
        n for n, p in mixer.named_parameters() if not n.startswith("score.") and not p.grad.abs().sum() > 0
    ]
    assert not silent


@EVERY
@torch.no_grad()
def test_15_calls_leave_nothing_behind(name: str) -> None:
    mixer, tensors = mixer_of(name), inputs(30)
    first = attend(mixer, *tensors)
    attend(mixer, *inputs(50, seed=5))
    assert torch.equal(attend(mixer, *tensors), first)


@EVERY
def test_15_no_graph_is_kept_after_a_training_forward(name: str) -> None:
    mixer = mixer_of(name)
    attend(mixer, *(x.requires_grad_() for x in inputs(30))).sum().backward()
    copy.deepcopy(mixer)  # fails for tensors that hang on a graph


@WITH_MEMORY
@pytest.mark.parametrize("bad", ["key", "value", "overflow"])
@torch.no_grad()
def test_16_a_bad_token_is_skipped_for_its_row_and_head_only(name: str, bad: str) -> None:
    mixer = mixer_of(name).float()
    tensors = [x.float() for x in inputs(40, batch=2)]
    _, clean = in_pieces(mixer, [40], *tensors)
    assert int(mixer.nonfinite) == 0
    assert int(mixer.clamped) == 0
    changed = [x.clone() for x in tensors]
    if bad == "overflow":  # each is finite, their product is not
        changed[1][1, 0, 9], changed[2][1, 0, 9] = 1e25, 1e25
    else:
        changed[1 if bad == "key" else 2][1, 0, 9, 3] = torch.inf
    for cuts in ([40], [9, 1, 1, 29], [1] * 40):
        mixer.nonfinite, mixer.clamped = 0, 0
        out, slot = in_pieces(mixer, cuts, *changed)
        fields = [f for f in slot.state.tensors() if f.startswith("memory")]
        assert {"memory_M", "memory_n"} <= set(fields)
        for field in fields:
            got, want = getattr(slot.state, field), getattr(clean.state, field)
            assert got.isfinite().all()
            torch.testing.assert_close(got[0], want[0])
            torch.testing.assert_close(got[1, 1], want[1, 1])
        assert out[:, :, 24:].isfinite().all()
        if bad == "overflow" and hasattr(mixer, "map_k") and options_of(name).feature_map == "hedgehog":
            continue  # its features are probabilities, so the product fits and the clamp is what acts
        assert int(mixer.nonfinite) == 1
        assert int(mixer.clamped) == 0
        if not (options_of(name).pairs and options_of(name).name == "linear"):
            # In step: the state is that of a text whose token 9 weighs nothing, and n says so.
            lost = clean.state.memory_n[1, 0] - slot.state.memory_n[1, 0]
            assert 0 <= float(lost) <= 1 + 1e-6


@WITH_MEMORY
@torch.no_grad()
def test_16_limited_updates_are_counted_once(name: str) -> None:
    tensors, counts = inputs(40, batch=2), []
    tensors[2][1, 0, 9] = 1e3
    for cuts in ([40], [9, 1, 1, 29], [1] * 40):
        mixer = mixer_of(name, clamp=20.0, pairs=0)
        _, slot = in_pieces(mixer, cuts, *tensors)
        assert float(slot.state.memory_M.abs().max()) <= 20.0 + 1e-6
        counts.append(int(mixer.clamped))
    assert counts[0] == counts[1] == counts[2] >= 1


@pytest.mark.parametrize("name", ["infini-paper", "infini", "linear"])
@torch.no_grad()
def test_16_a_limited_update_keeps_what_is_read(name: str) -> None:
    """M and z are limited together: the answer is still a mean of the values, all of them above 0."""
    mixer, (q, k, v, hidden) = mixer_of(name, clamp=1e-3, pairs=0), inputs(40)
    mixer.off, v = frozenset({"window", "sinks"}), v.abs() + 0.5
    out = attend(mixer, q, k, v, hidden)[:, :, 36:]
    assert int(mixer.clamped) > 0
    low, high = (x.repeat_interleave(2, 1) for x in (v.amin(2, keepdim=True), v.amax(2, keepdim=True)))
    assert ((out >= low - 1e-9) & (out <= high + 1e-9)).all()


@pytest.mark.parametrize("name", [n for n in CASES if options_of(n).pairs])
@torch.no_grad()
def test_18_each_pair_is_in_exactly_one_place(name: str) -> None:
    """The places of a text of 40 tokens: sinks, window, pairs, and what the memory counts."""
    mixer = mixer_of(name, write_gate="none", update="linear")
    _, slot = in_pieces(mixer, [33, 7], *inputs(40))
    options, state = mixer.options, slot.state
    held = state.pair_position[state.pair_score != -torch.inf]
    left = 40 - mixer.lookback * options.block  # 40 is a multiple of all blocks used here
    assert int(state.length) == 40
    assert held.numel() == 2 * options.pairs
    assert ((held >= options.sinks) & (held < left)).all()
    for g in range(2):
        assert len(set(state.pair_position[0, g].tolist())) == options.pairs
    if state.memory_n is not None:
        retained = options.pairs if options.name == "linear" else 0
        assert state.memory_n.tolist() == [[left - options.sinks - retained] * 2]


@pytest.mark.parametrize("name", ["window-attention", "infini-attention"])
@torch.no_grad()
def test_18_attention_score_is_what_a_token_received_in_the_window(name: str) -> None:
    mixer, (q, k, v, hidden) = mixer_of(name), inputs(27)
    call, options, size = Call(hidden, 0.4), mixer.options, mixer.block
    got = mixer.scores(mixer.arrange(q, k, v, call), k, v, call)[0, :, mixer.lookback * size :]
    want = torch.zeros(2, 27).double()
    for t in range(27):
        start = max(0, t // size - mixer.lookback) * size
        seen = exact_keys(t, size, mixer.lookback, options.sinks, [])
        origin = (
            0 if options.distance_cap is None else max(0, (t // size + 1) * size - 1 - options.distance_cap)
        )
        for g in range(2):
            turned = torch.stack([rotated(k[0, g, j], max(0, j - origin)) for j in seen])
            heads = [rotated(q[0, h, t], t - origin) for h in range(2 * g, 2 * g + 2)]
            most = torch.stack([(0.4 * turned @ x).softmax(0) for x in heads]).amax(0)
            for weight, j in zip(most, seen, strict=True):
                want[g, j] += weight if j >= start else 0
    close(got[:, :27], want)


@pytest.mark.parametrize("name", ["delta-recall", "linear-recall"])
@torch.no_grad()
def test_18_self_recall_is_the_residual_of_the_memory_of_all_older_tokens(name: str) -> None:
    mixer, (q, k, v, hidden) = mixer_of(name), inputs(27)
    call, sinks, size = Call(hidden, 0.4), mixer.options.sinks, mixer.block
    got = mixer.scores(mixer.arrange(q, k, v, call), k, v, call)[0, :, mixer.lookback * size :]
    phi, weight = mixer.map_k(0.4**0.5 * k)[0], mixer.write_gate(hidden)[0]
    weight[:, :sinks] = 0
    for j in range(27 - 27 % size - mixer.lookback * size):
        end = j // size * size  # what stood in the memory when the block of j left
        for g in range(2):
            answer = torch.zeros_like(v[0, g, j])
            if mixer.options.update == "delta_bounded" and end:
                M, z, n = delta_bounded(*(x[g, :end].unflatten(0, (-1, size)) for x in (phi, v[0], weight)))
                answer = phi[g, j] @ M / (phi[g, j] @ z) if n else answer
            elif end > sinks:
                far = weight[g, :end] * (phi[g, :end] @ phi[g, j])
                answer = far @ v[0, g, :end] / far.sum()
            close(got[g, j], (v[0, g, j] - answer).norm())


@torch.no_grad()
def test_18_self_recall_is_the_residual_of_the_gated_delta_memory() -> None:
    mixer, (q, k, v, hidden) = mixer_of("gated-delta", pairs_score="self_recall"), inputs(27)
    call, size = Call(hidden, 0.4), mixer.block
    got = mixer.scores(mixer.arrange(q, k, v, call), k, v, call)[0, :, mixer.lookback * size :]
    before = Definition(mixer, q, k, v, call).gated_states
    for j in range(27 - 27 % size - mixer.lookback * size):
        for g in range(2):
            close(got[g, j], (v[0, g, j] - k[0, g, j] @ before[j // size][g]).norm())
    whole, slot = in_pieces(mixer, [27], q, k, v, hidden)
    pieces, other = in_pieces(mixer, [9, 1, 17], q, k, v, hidden)
    close(pieces, whole)
    assert torch.equal(slot.state.pair_position, other.state.pair_position)


@torch.no_grad()
def test_gated_delta_parts_can_be_switched_off() -> None:
    mixer, tensors = mixer_of("gated-delta-plain", sinks=1), inputs(27)
    window = mixer_of("gated-delta-plain", name="sliding_window", sinks=1)
    whole, slot = in_pieces(mixer, [9, 18], *tensors)
    mixer.off = frozenset({"memory"})
    without, same = in_pieces(mixer, [9, 18], *tensors)
    close(without, attend(window, *tensors))
    torch.testing.assert_close(same.state.memory_M, slot.state.memory_M)  # it is not read, but still written
    mixer.off = frozenset({"window", "sinks"})
    alone = attend(mixer, *tensors)
    assert not torch.allclose(alone[:, :, 8:], whole[:, :, 8:])
    other = [*tensors[:2], tensors[2].clone(), tensors[3]]
    other[2][:, :, 20:] += 1  # what has not left the window
    assert torch.equal(attend(mixer, *other)[:, :, 20:24], alone[:, :, 20:24])


def test_options_of_a_variant_s_own_are_read_and_refused() -> None:
    x = inputs(5)[3]
    mixer = VARIANTS.get("gated_delta")(
        options_of("gated-delta", own={"decay_init": 0.9, "step_init": 0.25}), HEADS, None
    ).double()
    torch.testing.assert_close(torch.exp(-F.softplus(mixer.decay(x))), torch.full((1, 2, 5), 0.9).double())
    torch.testing.assert_close(mixer.step(x).sigmoid(), torch.full((1, 2, 5), 0.25).double())
    default = VARIANTS.get("gated_delta")(options_of("gated-delta"), HEADS, None).double()
    torch.testing.assert_close(
        torch.exp(-F.softplus(default.decay(x))), torch.full((1, 2, 5), 0.999).double()
    )
    for own in (
        {"decay": 0.9},
        {"decay_init": "x"},
        {"decay_init": True},
        {"step_init": 1},
        {"decay_init": 0.0},
    ):
        (name,) = own
        with pytest.raises(UserError, match=rf"attention\.own\.{name}="):
            mixer_of("gated-delta", own=own)
    with pytest.raises(UserError, match=r"attention\.own\.decay_init, attention\.own\.step_init"):
        mixer_of("gated-delta", own={"decay": 0.9})
    with pytest.raises(UserError, match="no options of its own"):
        mixer_of("infini", own={"decay_init": 0.9})


@pytest.mark.parametrize(
    "change", [{"name": "sliding_window"}, {"name": "linear", "update": "delta_bounded"}]
)
def test_18_self_recall_is_refused_where_it_has_no_meaning(change: dict) -> None:
    with pytest.raises(UserError, match="self_recall"):
        mixer_of("linear-recall", **change)
    mixer_of("linear-recall", **change, pairs=0)


# Model level: the whole capture, on four families ----------------------------------------------------------


@EVERY
def test_1_everything_exact_is_the_teacher(name: str) -> None:
    """Window (or segment) as long as the text: the teacher's logits up to the fp32 of its tables."""
    if options_of(name).local == "none":
        pytest.skip("no softmax is left that could be the teacher's")
    family, ids = CASES[name][0], text(2, 30)
    changes = {"block": 32, "window": 0 if options_of(name).local == "segment" else 32, "distance_cap": None}
    model = teacher(family)
    swap(model, SwapSpec({i: options_of(name, **changes) for i in range(LAYERS)}))
    close(logits(model, ids), logits(teacher(family), ids), 1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_1_identity_has_no_loss_and_no_gradient(family: str) -> None:
    model, ids = teacher(family), text(2, 30)
    want = logits(model, ids)
    swap(model, SwapSpec({i: AttentionConfig(name="identity") for i in range(LAYERS)}))
    loss = F.mse_loss(model(ids, use_cache=False).logits, want)
    loss.backward()
    assert float(loss) < 1e-20
    assert max(float(p.grad.abs().max()) for p in model.parameters() if p.grad is not None) < 1e-9


@EVERY
def test_2_tokens_do_not_see_the_future(name: str) -> None:
    model, ids = student(name), text(1, 40)
    want = logits(model, ids)
    for place in (1, 7, 8, 21, 39):
        other = ids.clone()
        other[:, place] = (other[:, place] + 1) % VOCABULARY
        got = logits(model, other)
        assert torch.equal(got[:, :place], want[:, :place])
        assert not torch.equal(got[:, place], want[:, place])


@EVERY
def test_3_a_row_alone_is_the_row_in_a_batch(name: str) -> None:
    model, ids = student(name), text(3, 33)
    close(logits(model, ids)[1:2], logits(model, ids[1:2]))


@EVERY
@pytest.mark.parametrize(
    "cuts", [[1] * 12 + [28], [28] + [1] * 12, [3, 5, 16, 16]], ids=["decode", "prefill", "chunks"]
)
@torch.no_grad()
def test_5_any_split_is_the_full_forward(name: str, cuts: list[int]) -> None:
    model, ids = student(name), text(2, 40)
    cache, outputs = DynamicCache(config=model.config), []
    for piece in ids.split(cuts, dim=1):
        outputs.append(model(piece, past_key_values=cache, use_cache=True).logits)
    close(torch.cat(outputs, 1), logits(model, ids))


@EVERY
def test_5_generate_with_and_without_a_cache(name: str) -> None:
    model, ids = student(name), text(2, 13)
    mask = torch.ones_like(ids)
    mask[1, :5], ids[1, :5] = 0, PAD  # left padding
    settings = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "attention_mask": mask}
    cached = model.generate(ids, use_cache=True, **settings)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **settings))
    alone = model.generate(ids[1:, 5:], use_cache=True, **(settings | {"attention_mask": mask[1:, 5:]}))
    assert torch.equal(cached[1:, 5:], alone)


@pytest.mark.parametrize("layers", [(0, 1, 2, 3), (0, 2), (1, 3), (0,)])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_5_generate_with_a_static_cache(family: str, layers: tuple[int, ...]) -> None:
    """Its masks are longer than the text, and one layer sizes them for all; used twice, with pads."""
    kinds = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"] * 2}
    config = AutoConfig.for_model(
        family,
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.25,
        pad_token_id=PAD,
        **(kinds if family == "gemma3_text" else {}),
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).double().eval()
    swap(model, SwapSpec({i: options_of("infini") for i in layers}))
    ids = text(2, 13)
    mask = torch.ones_like(ids)
    mask[1, :5], ids[1, :5] = 0, PAD
    settings = {"max_new_tokens": 9, "min_new_tokens": 9, "do_sample": False, "attention_mask": mask}
    want = model.generate(ids, use_cache=False, **settings)
    for _ in range(2):
        assert torch.equal(model.generate(ids, cache_implementation="static", **settings), want)


@EVERY
def test_5_beam_search_and_several_answers(name: str) -> None:
    model, ids = student(name), text(2, 13)
    settings = {"max_new_tokens": 8, "do_sample": False, "num_beams": 3, "num_return_sequences": 2}
    settings |= {"attention_mask": torch.ones_like(ids)}
    assert torch.equal(
        model.generate(ids, use_cache=True, **settings), model.generate(ids, use_cache=False, **settings)
    )


@pytest.mark.parametrize("name", ["window-pairs", "infini", "linear-delta"])
@torch.no_grad()
def test_5_rows_of_a_cache_can_be_repeated_taken_and_reset_but_not_cropped(name: str) -> None:
    model, ids = student(name), text(2, 30)
    cache = DynamicCache(config=model.config)
    model(ids[:, :20], past_key_values=cache, use_cache=True)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([3, 0]))
    with pytest.raises(RuntimeError, match="cannot be cropped"):
        cache.crop(10)
    rest = model(ids[[1, 0], 20:], past_key_values=cache, use_cache=True).logits
    close(rest, logits(model, ids)[[1, 0], 20:])
    cache.reset()
    close(model(ids, past_key_values=cache, use_cache=True).logits, logits(model, ids))


@pytest.mark.parametrize("name", ["infini", "linear"])
def test_5_assisted_generation_is_refused(name: str) -> None:
    model, ids = student(name), text(1, 10)
    with pytest.raises(RuntimeError, match="cannot be cropped"):
        model.generate(ids, assistant_model=teacher(CASES[name][0]), max_new_tokens=12, do_sample=False)


@pytest.mark.parametrize("name", ["window", "infini", "linear", "infini-neox"])
@torch.no_grad()
def test_6_cache_bytes_of_a_model_are_constant(name: str) -> None:
    model, sizes = student(name), set()
    for length in (1, 64, 400):
        cache = DynamicCache(config=model.config)
        model(text(1, length), past_key_values=cache, use_cache=True)
        sizes.add(state_bytes(cache))
    assert len(sizes) == 1


PADDINGS = {"left": (11, 0), "right": (0, 9), "both": (5, 6)}


@EVERY
@pytest.mark.parametrize("padding", PADDINGS)
def test_7_padding_changes_nothing(name: str, padding: str) -> None:
    model, ids = student(name), text(2, 30)
    left, right = PADDINGS[padding]
    want = logits(model, ids)
    padded = F.pad(ids[:1], (left, right), value=PAD)
    mask = F.pad(torch.ones_like(ids[:1]), (left, right))
    full = torch.cat([padded, text(1, padded.shape[1], seed=4)])  # beside a row without pads
    mask = torch.cat([mask, torch.ones_like(padded)])
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    got = logits(model, full, attention_mask=mask, position_ids=positions)
    close(got[:1, left : left + 30], want[:1])
    close(got[1:], logits(model, full[1:]))


@EVERY
@torch.no_grad()
def test_7_padding_on_continued_forwards(name: str) -> None:
    """Pads never leak into the state, and several tokens go on from it (upstream #47086, #45513)."""
    model, ids = student(name), text(2, 40)
    want = logits(model, ids)
    cache = DynamicCache(config=model.config)
    lengths = [0, 0]
    seen_mask = torch.zeros(2, 0, dtype=torch.long)
    # Per call: how many real tokens each row gets, and on which side its pads lie.
    for (first, second), side in (
        ((9, 13), "left"),
        ((7, 2), "right"),
        ((1, 1), "left"),
        ((0, 1), "left"),
        ((0, 5), "left"),
        ((23, 18), "left"),
    ):
        width = max(first, second)
        piece = torch.full((2, width), PAD)
        mask = torch.zeros(2, width, dtype=torch.long)
        for row, count in enumerate((first, second)):
            place = slice(width - count, width) if side == "left" else slice(0, count)
            piece[row, place] = ids[row, lengths[row] : lengths[row] + count]
            mask[row, place] = 1
        seen_mask = torch.cat([seen_mask, mask], 1)
        positions = (seen_mask.cumsum(1) - 1).clamp_min(0)[:, -width:]
        got = model(
            piece, attention_mask=seen_mask, position_ids=positions, past_key_values=cache, use_cache=True
        ).logits
        for row, count in enumerate((first, second)):
            if count:
                real = got[row : row + 1, mask[row].bool()]
                close(real, want[row : row + 1, lengths[row] : lengths[row] + count])
            lengths[row] += count


@pytest.mark.parametrize("name", [n for n in CASES if not options_of(n).rotary])
def test_8_absolute_positions_do_not_matter(name: str) -> None:
    model, ids = student(name), text(1, 40)
    shifted = torch.arange(40)[None] + 100
    close(logits(model, ids, position_ids=shifted), logits(model, ids), 1e-4)


@EVERY
def test_13_gradient_checkpointing_gives_the_same_gradients(name: str) -> None:
    ids, gradients = text(2, 24), []
    for checkpointing in (False, True):
        model = copy.deepcopy(student(name)).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    for got, want in zip(*gradients, strict=True):
        assert (got is None) == (want is None)
        if got is not None and want.abs().max() > 1e-12:
            close(got, want)


@EVERY
def test_17_packed_documents_do_not_see_each_other(name: str) -> None:
    model, ids = student(name), text(3, 30)
    lengths = [17, 9, 26]
    documents = [row[None, :n] for row, n in zip(ids, lengths, strict=True)]
    packed = torch.cat(documents, 1)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    got = logits(model, packed, position_ids=positions).split(lengths, 1)
    for own, document in zip(got, documents, strict=True):
        close(own, logits(model, document))


@pytest.mark.parametrize("name", ["window-pairs", "infini", "linear"])
def test_17_documents_apart_by_pads(name: str) -> None:
    """Packed rows with pads between the documents, before them and after them."""
    model, ids = student(name), text(2, 20)
    first, second = ids[:1, :14], ids[1:, :11]
    pad = torch.full((1, 3), PAD)
    packed = torch.cat([pad, first, pad, second, pad], 1)
    mask = (packed != PAD).long()
    zero = torch.zeros(1, 3, dtype=torch.long)
    positions = torch.cat([zero, torch.arange(14)[None], zero, torch.arange(11)[None], zero], 1)
    got = logits(model, packed, attention_mask=mask, position_ids=positions)
    close(got[:, 3:17], logits(model, first))
    close(got[:, 20:31], logits(model, second))


@pytest.mark.parametrize("name", ["window-pairs", "infini", "linear"])
@torch.no_grad()
def test_17_a_cache_goes_on_with_the_last_document(name: str) -> None:
    model, ids = student(name), text(2, 40)
    packed = torch.cat([ids[:1, :19], ids[1:, :22]], 1)
    positions = torch.cat([torch.arange(19), torch.arange(22)])[None]
    cache = DynamicCache(config=model.config)
    model(packed, position_ids=positions, past_key_values=cache, use_cache=True)
    got = model(
        ids[1:, 22:], position_ids=torch.arange(22, 40)[None], past_key_values=cache, use_cache=True
    ).logits
    close(got, logits(model, ids[1:])[:, 22:])


def test_17_documents_cannot_begin_inside_a_continued_call() -> None:
    """The state of a row is one document's, so another in the same call would read it: an error, not a
    leak.
    """
    model, ids = student("infini"), text(1, 30)
    cache = DynamicCache(config=model.config)
    positions = torch.cat([torch.arange(10, 20), torch.arange(10)])[None]
    with torch.no_grad():
        model(ids[:, :10], past_key_values=cache, use_cache=True)
        with pytest.raises(RuntimeError, match="document"):
            model(ids[:, 10:], position_ids=positions, past_key_values=cache, use_cache=True)


@pytest.mark.parametrize("name", ["window-pairs", "infini", "delta", "linear", "gated-delta"])
def test_single_precision_agrees(name: str) -> None:
    """What is exact in fp64 holds in the fp32 that users run."""
    model, ids = copy.deepcopy(student(name)).float(), text(2, 40)
    whole = logits(model, ids)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        pieces = [model(x, past_key_values=cache, use_cache=True).logits for x in ids.split([9, 1, 30], 1)]
    close(torch.cat(pieces, 1), whole, 1e-4)
    close(whole.double(), logits(student(name), ids), 1e-3)
