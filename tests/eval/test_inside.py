"""Gates, shares and reads: what is found from outside is what the variants compute inside."""

import random

import pytest
import torch

from eval.ablation import mixers
from eval.measure import yardstick
from eval.measurements import MEASUREMENTS
from eval.measurements.inside import listening, look_inside
from eval.sections.inside import heatmaps
from eval.sections.inside import inside as section
from replace.config import AttentionConfig, Config, ModelConfig
from replace.convert import SwapSpec, swap
from replace.corpora import Document
from replace.loading import load_model

BLOCK, WINDOW, SINKS, TOKENS = 8, 8, 2, 48


def options(**changes) -> AttentionConfig:
    return AttentionConfig(
        **{"block": BLOCK, "window": WINDOW, "pairs": 0, "sinks": SINKS, "distance_cap": None} | changes
    )


def given(attention: AttentionConfig):
    """What the mixer of layer 0 was given, with parameters that are not at their start."""
    model = load_model(ModelConfig(kind="tiny")).model.eval()
    swap(model, SwapSpec({0: attention}))
    torch.manual_seed(0)
    (mixer,) = mixers(model)
    with torch.no_grad():
        for name, parameter in mixer.named_parameters():
            if not name.startswith("map_"):
                parameter.add_(torch.randn(parameter.shape))
    rows = torch.randint(3, 400, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    with listening(model) as found, torch.no_grad():
        model(input_ids=rows, use_cache=False)
    return found[0]


def first_held() -> int:
    return BLOCK * (SINKS // BLOCK + 1) + WINDOW


@torch.no_grad()
@pytest.mark.parametrize("kind", ["head", "token"])
@pytest.mark.parametrize("name", ["infini", "gated_delta"])
def test_the_read_gate_is_the_variant_s_own(name, kind):
    found = given(options(name=name, gate=kind))
    want = found.mixer.gate(found.call.hidden)[..., 0]
    got = look_inside(found)
    held = want[:, :, first_held() :]
    assert got["read_gate"]["mean"] == pytest.approx(held.mean((0, 2)).tolist(), abs=2e-3)
    for head, shares in enumerate(got["read_gate"]["histogram"]):
        counts = torch.histc(held[:, head], bins=10, min=0, max=1) / held[:, head].numel()
        assert sum(abs(a - float(b)) for a, b in zip(shares, counts, strict=True)) < 0.1
        assert sum(shares) == pytest.approx(1, abs=1e-3)


@torch.no_grad()
def test_the_share_is_that_of_what_was_joined():
    found = given(options(name="infini"))
    gate = found.mixer.gate(found.call.hidden)
    answer, out = (found.ask(*off)[:, :, first_held() :] for off in (("window",), ()))
    part = gate[:, :, first_held() :] * answer
    want = [float(part[:, head].norm() / out[:, head].norm()) for head in range(4)]
    assert look_inside(found)["share"] == pytest.approx(want, rel=1e-3)


@torch.no_grad()
def test_the_write_gate_is_the_variant_s_own():
    found = given(options(name="infini"))
    want = found.mixer.write_gate(found.call.hidden).mean((0, 2)).tolist()
    assert look_inside(found)["write_gate"]["mean"] == pytest.approx(want)
    assert look_inside(given(options(name="infini", write_gate="none")))["write_gate"] is None


@torch.no_grad()
def test_the_effective_tokens_are_those_of_the_read_weights():
    """Against the weights phi(q).phi(k) themselves, over what is older than the window and no sink."""
    found = given(options(name="infini"))
    place = torch.arange(TOKENS)
    q, k = found.mixer.features_of(found.query, found.key, place.unsqueeze(0), found.call.scaling)
    k = k * found.mixer.write_gate(found.call.hidden).unsqueeze(-1)
    weights = q @ k.repeat_interleave(q.shape[1] // k.shape[1], dim=1).transpose(-1, -2)
    stored = (place < BLOCK * (place.unsqueeze(-1) // BLOCK - WINDOW // BLOCK)) & (place >= SINKS)
    weights = (weights * stored)[:, :, first_held() :]
    effective = weights.sum(-1).square() / weights.square().sum(-1)
    want = effective.log().mean((0, 2)).exp().tolist()
    got = look_inside(found)
    assert got["effective_tokens"] == pytest.approx(want, rel=0.35)  # 15 random signs
    assert got["stored_tokens"] == pytest.approx(
        float(stored.sum(-1)[first_held() :].float().log().mean().exp()), rel=1e-4
    )


@torch.no_grad()
def test_one_token_stored_is_one_effective_token():
    """Exactly, whatever the signs: the square of one weight over itself."""
    found = given(options(name="infini", sinks=BLOCK - 1, window=BLOCK))
    found.query, found.key, found.value = (
        x[:, :, : 3 * BLOCK] for x in (found.query, found.key, found.value)
    )
    found.call.hidden = found.call.hidden[:, : 3 * BLOCK]
    assert look_inside(found)["effective_tokens"] == pytest.approx([1.0] * 4, rel=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("pairs", [0, 4])
def test_under_a_shared_denominator_the_gate_is_the_memory_s_share(pairs):
    found = given(options(name="linear", pairs=pairs))
    got = look_inside(found)
    assert all(0 < mean < 1 for mean in got["read_gate"]["mean"])
    with torch.no_grad():
        found.mixer.log_amplitude.add_(20)  # nothing weighs beside it
    assert look_inside(found)["read_gate"]["mean"] == pytest.approx([1.0] * 4, abs=1e-3)


@torch.no_grad()
def test_a_variant_that_adds_has_no_gate():
    found = given(options(name="infini"))
    mix = found.mixer.mix

    def added(blocks, exact, mass, call):
        joined = mix(blocks, exact, mass, call)
        return joined if found.mixer.off else joined + exact.roll(1, -1)

    found.mixer.mix = added
    got = look_inside(found)
    assert got["read_gate"] is None
    assert "gate" in got["why"]
    assert all(1 - 1e-4 <= tokens <= TOKENS for tokens in got["effective_tokens"])


@torch.no_grad()
def test_looking_changes_nothing():
    found = given(options(name="infini"))
    before = {name: getattr(found.mixer, name) for name in ("off", "calls", "clamped", "nonfinite")}
    look_inside(found)
    assert {name: getattr(found.mixer, name) for name in before} == before


def test_layers_without_the_parts_say_why(tiny, tmp_path):
    model = load_model(ModelConfig(kind="tiny")).model.eval()
    kinds = {0: "infini", 1: "sliding_window", 2: "identity"}
    swap(model, SwapSpec({index: options(name=name) for index, name in kinds.items()}))
    config = Config(model=ModelConfig(kind="tiny"), attention=options(), precision="fp32")
    config.budget.eval.perplexity_length = 64
    rng = random.Random(0)
    text = " ".join(rng.choices(("the", "city", "is", "known", "green", "sky"), k=200))
    using = yardstick(tiny.tokenizer, config, [Document("book", text, "x", "test")])
    measure = MEASUREMENTS.get("inside")
    found = measure(model, tiny.tokenizer, config, using)
    layers = {row["layer"]: row for row in found["inside"]["layers"]}
    assert layers[0]["effective_tokens"]
    assert layers[1]["why"] == "this layer has no linear memory"
    assert layers[2]["why"] == "the teacher's own attention stands here"
    heatmaps(found).savefig(tmp_path / "inside.png")
    assert "not measured in layers 1: this layer has no linear memory" in section(found)
    assert not any(mixer._forward_pre_hooks for mixer in mixers(model))
    plain = measure(tiny.model, tiny.tokenizer, config, using)
    assert plain["inside"]["why"] == "no layer was replaced"
    assert heatmaps(plain) is None
