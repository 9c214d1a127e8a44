"""The capture on every family of the installed transformers that it is known to hold on, and who is refused.

All parameters that start as ones or zeros (norms, biases, learned sinks) are moved first, or a norm after the
rotation, which does not commute with it, would look harmless.
"""

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from replace.config import AttentionConfig
from replace.convert import SwapSpec, attention_layers, restore, swap
from replace.errors import UserError
from replace.families import NOT_CAPTURED
from replace.observe import observe
from replace.rotary import Rotary, family_rotation, unrotate
from replace.tiny import tiny_model

FAMILIES = [
    "apertus", "arcee", "bitnet", "cohere", "cohere2", "ernie4_5", "exaone4", "gemma", "gemma2",
    "gemma3_text", "glm", "glm4", "gpt2", "gpt_neox", "gpt_oss", "granite", "granitemoe", "helium",
    "hunyuan_v1_dense", "jais2", "lfm2", "llama", "ministral", "mistral", "mixtral", "nemotron", "olmo",
    "olmo2", "olmo3", "opt", "persimmon", "phi", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe",
    "seed_oss", "smollm3", "solar_open", "stablelm", "starcoder2", "vaultgemma",
]  # fmt: skip
WITHOUT_ROTARY = ("gpt2", "opt")
LAST_LAYER_WITHOUT_ROTARY = ("cohere2", "exaone4", "smollm3")
MIDDLE = 2
CHANGES = {"lfm2": {"layer_types": ["conv", "full_attention", "full_attention", "conv"]}}
"""Where the 4-layer default would hide what makes the family special."""
IDS = torch.randint(3, 500, (2, 13), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS).index_put((torch.tensor(1), torch.arange(4)), torch.tensor(0))  # left padding


def lively_model(family: str, **changes) -> PreTrainedModel:
    """A tiny random model whose norms, biases and learned sinks are not neutral."""
    model = tiny_model(family, initializer_range=0.2, **CHANGES.get(family, {}), **changes)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # After the rotation hunyuan's norms are refused unless they are neutral; see below.
            if parameter.ndim == 1 and "query_layernorm" not in name and "key_layernorm" not in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    """Of `IDS`, without a cache."""
    return model(IDS, use_cache=False).logits


@torch.no_grad()
def padded_logits(model: PreTrainedModel) -> Tensor:
    """Of the left-padded batch, a cached prefill and two further calls: `[B, T, V]`, 0 at pads."""
    cache, found = None, []
    for start, stop in ((0, 8), (8, 12), (12, 13)):
        out = model(IDS[:, start:stop], attention_mask=MASK[:, :stop], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        found.append(out.logits)
    return torch.cat(found, 1) * MASK.unsqueeze(-1)


def agree(got: Tensor, want: Tensor, limit: float = 1e-6) -> None:
    """The largest difference within `limit` of the largest entry."""
    error = float((got - want).abs().max() / want.abs().max())
    assert error < limit, f"{error:.1e} is not below {limit:.0e}"


@pytest.mark.parametrize("family", FAMILIES)
def test_capture(family: str) -> None:
    model = lively_model(family)
    want, padded, names = logits(model), padded_logits(model), list(model.state_dict())
    classes = [type(module) for module in model.modules()]
    identity = swap(model, SwapSpec({MIDDLE: AttentionConfig(name="identity")}))
    agree(logits(model), want)
    agree(padded_logits(model), padded)
    assert list(model.state_dict()) == names
    restore(model)
    options = AttentionConfig(block=4, window=4, sinks=2, pairs=2, pairs_score="key_norm")
    swap(model, SwapSpec({MIDDLE: options}))
    assert not torch.equal(logits(model), want)
    path = identity.replacements[0].path
    assert [key for key in model.state_dict() if f"{path}.mixer." not in key] == names
    restore(model)
    assert torch.equal(logits(model), want)
    assert list(model.state_dict()) == names
    assert [type(module) for module in model.modules()] == classes


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in WITHOUT_ROTARY])
@torch.no_grad()
def test_unrotation_is_exact(family: str) -> None:
    """The first layer's q and k where all tokens stand at position 0 are those that un-rotating gives."""
    model, seen, tables = lively_model(family), [], []
    layers = [module for _, module in attention_layers(model)]
    spec = swap(model, SwapSpec({m.layer_idx: AttentionConfig(name="identity") for m in layers})).spec
    restore(model)
    first, function = layers[0], family_rotation(layers[0])
    hook = first.register_forward_pre_hook(
        lambda module, args, kwargs: tables.append(kwargs["position_embeddings"]), with_kwargs=True
    )
    positions = torch.arange(5, 5 + IDS.shape[1])[None].expand_as(IDS)
    with observe([first], lambda module, attending: seen.append((attending.query, attending.key))):
        model(IDS, position_ids=positions, use_cache=False)
        model(IDS, position_ids=positions * 0, use_cache=False)
    hook.remove()
    measured = spec.rotary[first.layer_idx]
    (turned, plain), scale = seen, measured.scaling
    back = unrotate(function, *turned, *tables[0], measured.width)
    rotary = Rotary(measured, 0)
    for found, still, moved in zip(back, plain, turned, strict=True):
        still = torch.cat([still[..., : measured.width] / scale, still[..., measured.width :]], -1)
        agree(found, still, 1e-5)
        agree(rotary(found, positions[:, None], absolute=True), moved, 1e-5)
    assert (spec.rotary[layers[-1].layer_idx] is None) == (family in LAST_LAYER_WITHOUT_ROTARY)


def test_a_norm_after_the_rotation_is_refused_unless_it_is_neutral() -> None:
    model = lively_model("hunyuan_v1_dense")
    with torch.no_grad():
        model.model.layers[MIDDLE].self_attn.query_layernorm.weight[:4] = 3.0
    want = logits(model)
    with pytest.raises(UserError, match="un-rotating the queries of HunYuanDenseV1Attention is off by"):
        swap(model, SwapSpec({MIDDLE: AttentionConfig(name="sliding_window")}))
    assert torch.equal(logits(model), want)


@pytest.mark.parametrize("family", NOT_CAPTURED)
def test_refused_by_name(family: str) -> None:
    model = tiny_model(family)
    classes, want = [type(module) for module in model.modules()], logits(model)
    with pytest.raises(UserError, match=f"(?i){family.replace('_', '_?')}"):
        swap(model, SwapSpec({0: AttentionConfig(name="identity")}))
    assert [type(module) for module in model.modules()] == classes
    assert torch.equal(logits(model), want)


@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("deepseek_v3", "all of one width"),
        ("youtu", "all of one width"),
        ("doge", "makes an attention mask of its own"),
    ],
)
def test_what_is_refused_by_name_is_refused_without_it(
    family: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guard finds why by itself, for families that no list knows."""
    monkeypatch.setattr("replace.convert.NOT_CAPTURED", ())
    with pytest.raises(UserError, match=words):
        swap(tiny_model(family), SwapSpec({1: AttentionConfig(name="sliding_window")}))


def test_a_dropped_soft_cap_is_refused() -> None:
    model = lively_model("gemma2")
    model.set_attn_implementation("sdpa")
    with pytest.raises(UserError, match="attn_implementation='sdpa' is not possible"):
        swap(model, SwapSpec({MIDDLE: AttentionConfig(name="sliding_window")}))


def test_chunked_attention_is_refused() -> None:
    changes = {"moe_layers": [], "intermediate_size_mlp": 64, "attention_chunk_size": 8}
    kinds = ["chunked_attention", "full_attention"] * 2
    model = tiny_model("llama4_text", layer_types=kinds, **changes)
    with pytest.raises(UserError, match="layer_types='chunked_attention'"):
        swap(model, SwapSpec({0: AttentionConfig(name="sliding_window")}))


@pytest.mark.parametrize("family", ["nanochat", "dots1", "ernie4_5_moe"])
def test_a_family_that_no_list_names_on_a_folder(family: str, tmp_path) -> None:
    """Swapped, or refused in one sentence; here they are swapped, and a window that is all is the teacher."""
    assert family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    assert family not in (*FAMILIES, *NOT_CAPTURED)
    sizes = {"num_experts_per_tok": 2, "moe_k": 2, "moe_num_experts": 4, "n_routed_experts": 4}
    sizes |= {"n_shared_experts": 1, "n_group": 1, "topk_group": 1}
    lively_model(family, **sizes, moe_intermediate_size=32).save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, config=config).eval()
    want = logits(model)
    options = AttentionConfig(name="linear", block=16, window=0, sinks=2, pairs=2, pairs_score="key_norm")
    swap(model, SwapSpec(dict.fromkeys(range(4), options)))
    agree(logits(model), want, 1e-4)
