"""The two main variants on the main families, at model level, and the teacher's own way of attending.

What must hold for every variant (design 02) where it could depend on the family: whose scaling, soft cap,
learned sinks and sliding window the exact branch has to follow. fp64, so that a leak has no noise to hide in.
"""

import copy
import functools

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedModel

from replace.config import AttentionConfig
from replace.convert import SwapSpec, attention_layers, mixers, restore, swap
from replace.errors import UserError
from replace.mixer import VARIANTS, BlockMixer, Call, Heads
from replace.tiny import tiny_model

LENGTH, PAD, WINDOW = 30, 0, 9
SLIDING = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
FAMILIES: dict[str, dict] = {
    "llama": {},
    "mistral": {"sliding_window": WINDOW},
    "qwen2": {},
    "qwen3": {"head_dim": 12},
    "qwen3_moe": {},
    "gemma2": {**SLIDING, "query_pre_attn_scalar": 5, "attn_logit_softcapping": 2.0},
    "phi3": {"partial_rotary_factor": 0.5},
    "gpt_neox": {"rotary_pct": 0.25, "head_dim": None},
    "olmo2": {},
    "cohere": {},
    "stablelm": {"head_dim": None},
    "gpt_oss": SLIDING,
    # Beyond the main ones: what else a teacher's attention can be.
    "granite": {"attention_multiplier": 0.9},
    "gemma3_text": {**SLIDING, "query_pre_attn_scalar": 5},
    "cohere2": SLIDING,
    "qwen2_moe": {**SLIDING, "use_sliding_window": True},
}
MIXTURES = ("qwen3_moe", "gpt_oss", "qwen2_moe")
COMMON = {"block": 4, "window": 4, "sinks": 2, "pairs": 3, "pairs_score": "key_norm", "distance_cap": 16}
VARIANT_OPTIONS = {"infini": COMMON | {"name": "infini"}, "linear": COMMON | {"name": "linear"}}
CASES = [(variant, family) for family in list(FAMILIES)[:12] for variant in VARIANT_OPTIONS]
EVERY = pytest.mark.parametrize(("variant", "family"), CASES)


@functools.cache
def _teacher(family: str) -> PreTrainedModel:
    """Two layers in fp64, norms and learned sinks moved from where they start."""
    changes = {"num_hidden_layers": 2, "initializer_range": 0.25, "vocab_size": 61, "hidden_size": 32}
    model = tiny_model(family, torch.float64, **(changes | FAMILIES[family]))
    if family in MIXTURES:
        model.set_experts_implementation("eager")  # the others know no fp64
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def swapped(family: str, **options) -> PreTrainedModel:
    """A copy of the teacher with both layers replaced."""
    model = copy.deepcopy(_teacher(family))
    swap(model, SwapSpec({i: AttentionConfig(**options) for i in range(2)}))
    for mixer in mixers(model).values():
        mixer.double()
    return model


@functools.cache
def student(variant: str, family: str) -> PreTrainedModel:
    """The variant with parameters away from their neutral start; shared, so tests leave it alone."""
    model = swapped(family, **VARIANT_OPTIONS[variant])
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for mixer in mixers(model).values():
            for parameter in mixer.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator).double() * 0.5)
    return model


def text(rows: int, length: int = LENGTH, seed: int = 0) -> Tensor:
    """Random token ids, no special ones, `[rows, length]`."""
    return torch.randint(3, 61, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Tensor, **kwargs) -> Tensor:
    """`[B, T, V]` without a cache."""
    return model(ids, use_cache=False, **kwargs).logits


def close(got: Tensor, want: Tensor, limit: float) -> None:
    """The largest difference within `limit` of the largest entry."""
    assert got.shape == want.shape
    error = float((got - want).abs().max() / want.abs().max())
    assert error < limit, f"{error:.1e} is not below {limit:.0e}"


SAME = 1e-5
"""Of two ways to the same figure in fp64 models, whose families compute tables and norms in fp32."""


@pytest.mark.parametrize(
    ("variant", "family"), [(variant, family) for family in FAMILIES for variant in VARIANT_OPTIONS]
)
def test_everything_exact_is_the_teacher(variant: str, family: str) -> None:
    """Its scaling, soft cap, learned sinks and sliding window included, with pads beside.

    They are on the right: on the left a teacher that runs eager in fp64 is NaN.
    """
    ids = text(2)
    exact = {"block": 32, "window": 32, "distance_cap": None}
    model = swapped(family, **(VARIANT_OPTIONS[variant] | exact))
    mask = torch.ones_like(ids)
    mask[1, 24:] = 0
    got, want = (logits(m, ids, attention_mask=mask) * mask.unsqueeze(-1) for m in (model, _teacher(family)))
    close(got, want, SAME)
    assert float((logits(student(variant, family), ids) - logits(_teacher(family), ids)).abs().max()) > 1e-3


@EVERY
def test_tokens_do_not_see_the_future(variant: str, family: str) -> None:
    """Bit for bit, but for mixtures of experts, which multiply other tokens beside ours."""
    model, ids = student(variant, family), text(1)
    want = logits(model, ids)
    for place in (7, 12, 21):
        other = ids.clone()
        other[:, place] = (other[:, place] + 1) % 61
        got = logits(model, other)
        if family in MIXTURES:
            close(got[:, :place], want[:, :place], 1e-12)
        else:
            assert torch.equal(got[:, :place], want[:, :place])
        assert not torch.equal(got[:, place], want[:, place])


@EVERY
def test_padding_changes_nothing(variant: str, family: str) -> None:
    """Left, right and both, beside a row without pads."""
    model, ids = student(variant, family), text(4)
    want = logits(model, ids)
    padded, mask = [ids[:1]], [torch.ones_like(ids[:1])]
    sides = [(0, 0), (11, 0), (0, 11), (5, 6)]
    padded = torch.cat([F.pad(ids[i : i + 1], sides[i], value=PAD) for i in (1, 2, 3)])
    mask = torch.cat([F.pad(torch.ones_like(ids[:1]), sides[i]) for i in (1, 2, 3)])
    full, mask = torch.cat([padded, text(1, 41, 4)]), torch.cat([mask, torch.ones(1, 41, dtype=torch.long)])
    got = logits(model, full, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0))
    for row, (left, _) in enumerate(sides[1:]):
        close(got[row, left : left + LENGTH], want[row + 1], SAME)
    close(got[3:], logits(model, full[3:]), SAME)


@EVERY
@torch.no_grad()
def test_any_split_is_the_full_forward(variant: str, family: str) -> None:
    model, ids = student(variant, family), text(2)
    want = logits(model, ids)
    for cuts in ([22] + [1] * 8, [3, 1, 5, 16, 5]):
        cache, found = DynamicCache(config=model.config), []
        for piece in ids.split(cuts, dim=1):
            found.append(model(piece, past_key_values=cache, use_cache=True).logits)
        close(torch.cat(found, 1), want, SAME)


@EVERY
def test_generate_with_and_without_a_cache(variant: str, family: str) -> None:
    model, ids = student(variant, family), text(2, 13)
    mask = torch.ones_like(ids)
    mask[1, :5], ids[1, :5] = 0, PAD
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "attention_mask": mask}
    cached = model.generate(ids, use_cache=True, **settings)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **settings))


# The exact branch honours the teacher --------------------------------------------------------------------

HEADS = Heads(4, 2, 8, 16)


def inputs(length: int) -> list[Tensor]:
    """q, k, v `[1, H or G, T, D]` and the layer's input `[1, T, C]`, fp64."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, h, length, 8) for h in (4, 2, 2)]
    return [torch.randn(s, generator=generator).double() for s in [*shapes, (1, length, 16)]]


def mixer_of(**options) -> BlockMixer:
    """An fp64 mixer without rotary encoding."""
    options = AttentionConfig(**(COMMON | {"distance_cap": None} | options))
    return VARIANTS.get(options.name)(options, HEADS, None).double()


@torch.no_grad()
def test_a_key_beyond_the_teachers_window_gets_nothing_from_the_exact_window() -> None:
    """Window 8 + block, teacher's window 5: only sinks, pairs and memory reach further."""
    q, k, v, hidden = inputs(24)
    alone = mixer_of(name="sliding_window", window=8, sinks=0, pairs=0)
    call = Call(hidden, 0.4, sliding_window=5)
    want = alone(q, k, v, call)
    for t in (11, 17, 23):
        changed = v.clone()
        changed[:, :, : t - 4] += 1
        assert torch.equal(alone(q, k, changed, call)[:, :, t], want[:, :, t])
        changed[:, :, t - 4] += 1
        assert not torch.equal(alone(q, k, changed, call)[:, :, t], want[:, :, t])
    for further in ({"sinks": 2}, {"pairs": 3}, {"name": "linear"}, {"name": "infini"}):
        mixer = mixer_of(**({"name": "sliding_window", "window": 8, "sinks": 0, "pairs": 0} | further))
        changed = v.clone()
        changed[:, :, :4] += 1
        assert not torch.equal(mixer(q, k, changed, call)[:, :, 23], mixer(q, k, v, call)[:, :, 23])


@pytest.mark.parametrize("options", [{"name": "sliding_window"}, {"name": "infini"}, {"name": "linear"}])
@torch.no_grad()
def test_a_learned_sink_takes_its_share(options: dict) -> None:
    """A sink so large that it takes everything leaves nothing of the exact part; at -1e4 it takes nothing."""
    mixer, (q, k, v, hidden) = mixer_of(**options), inputs(24)
    free = mixer(q, k, v, Call(hidden, 0.4))
    none = mixer(q, k, v, Call(hidden, 0.4, sink_logit=torch.full((4,), -1e4).double()))
    torch.testing.assert_close(none, free)
    logit = torch.tensor([1e4, -1e4, -1e4, -1e4]).double()
    taken = mixer(q, k, v, Call(hidden, 0.4, sink_logit=logit))
    torch.testing.assert_close(taken[:, 1:], free[:, 1:])
    assert float(taken[:, 0, :8].abs().max()) < 1e-12, "the memory is empty there"


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", ["sliding_window", "infini", "linear"])
@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_dropout_of_the_teacher_acts_in_training_only(family: str, name: str, grad: bool) -> None:
    model = swapped(family, **(COMMON | {"name": name}))
    for _, module in attention_layers(model):
        module.attention_dropout = 0.5
    ids, found = text(1), []
    with torch.set_grad_enabled(grad):
        for training, seed in ((False, 0), (False, 1), (True, 0), (True, 0), (True, 1)):
            torch.manual_seed(seed)
            found.append(model.train(training)(ids, use_cache=False).logits.detach())
    calm, same, first, again, other = found
    assert torch.equal(calm, same)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first, calm)


@pytest.mark.parametrize("softcap", [None, 3.0])
@torch.no_grad()
def test_dropout_leaves_the_shared_denominator_alone(softcap: float | None) -> None:
    """Values of one: without dropout every output is one; with it the exact part is thinned, unbiased."""
    mixer, (q, k, v, hidden) = mixer_of(name="linear", pairs=0), inputs(24)
    ones = torch.ones_like(v)
    torch.testing.assert_close(mixer(q, k, ones, Call(hidden, 0.4, softcap=softcap)), torch.ones_like(q))
    torch.manual_seed(0)
    runs = [mixer(q, k, ones, Call(hidden, 0.4, dropout=0.3, softcap=softcap)) for _ in range(20)]
    # The first query has one key, of weight 1: it is dropped, or what is left is not made whole again.
    first = torch.stack(runs)[:, 0, :, 0]
    assert {round(float(x), 6) for x in first.flatten()} == {0.0, round(1 / 0.7, 6)}
    alone = mixer(q, k, ones, Call(hidden, 0.4, dropout=1.0, softcap=softcap))
    share = alone[0, :, 16:, 0]
    assert (share > 0).all(), "what is left is the memory's share"
    assert (share < 1).all()
    assert not alone[:, :, :8].any(), "nothing is in the memory yet"


# Masks and flags of the caller ---------------------------------------------------------------------------


def block_diagonal(kind: torch.dtype) -> Tensor:
    """Two documents of 18 and 12 tokens, told apart by a mask only: `[1, 1, 30, 30]`."""
    document = torch.arange(30) >= 18
    mask = (document == document.unsqueeze(-1)) & torch.ones(30, 30).tril().bool()
    mask = mask[None, None]
    return mask if kind == torch.bool else torch.zeros_like(mask, dtype=kind).masked_fill(~mask, -1e30)


@pytest.mark.parametrize("kind", [torch.bool, torch.float64])
def test_a_mask_of_the_callers_own_is_refused(kind: torch.dtype) -> None:
    model, ids = student("infini", "llama"), text(1)
    positions = torch.arange(30)[None]
    with pytest.raises(UserError, match="position_ids begin anew"):
        logits(model, ids, attention_mask=block_diagonal(kind), position_ids=positions)
    packed = torch.cat([torch.arange(18), torch.arange(12)])[None]
    got = logits(model, ids, attention_mask=block_diagonal(kind), position_ids=packed)
    close(got[:, 18:], logits(model, ids[:, 18:]), SAME)
    causal = torch.ones(1, 1, 30, 30).tril().bool()
    close(logits(model, ids, attention_mask=causal, position_ids=positions), logits(model, ids), SAME)


@pytest.mark.parametrize("keep", [True, False])
def test_restore_leaves_frozen_what_was_frozen(keep: bool) -> None:
    model = copy.deepcopy(_teacher("qwen2"))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("q_proj" not in name and "layers.0" not in name)
    want = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert 0 < sum(want.values()) < len(want)
    swap(
        model,
        SwapSpec({i: AttentionConfig(**VARIANT_OPTIONS["linear"]) for i in range(2)}),
        keep_originals=keep,
    )
    restore(model)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == want


@pytest.mark.parametrize("family", ["cohere2", "smollm3", "exaone4"])
def test_the_memory_of_a_layer_without_positions_knows_none(family: str) -> None:
    """Layers that are given rotary tables and do not use them: un-rotating would put positions in."""
    kinds = {"no_rope_layers": [0, 0]} if family == "smollm3" else {"layer_types": ["full_attention"] * 2}
    changes = {"num_hidden_layers": 2, "initializer_range": 0.25, "sliding_window": WINDOW}
    model = tiny_model(family, torch.float64, **(changes | kinds))
    swap(model, SwapSpec({i: AttentionConfig(**VARIANT_OPTIONS["infini"]) for i in range(2)}))
    assert all(mixer.double().rotary is None for mixer in mixers(model).values())
    ids = text(1)
    shifted = logits(model, ids, position_ids=torch.arange(30)[None] + 50)
    assert torch.equal(shifted, logits(model, ids))
