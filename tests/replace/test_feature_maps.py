"""Feature maps by themselves: their weights, how they start, and for which heads they are refused."""

import dataclasses

import pytest
import torch
from transformers import AutoModelForCausalLM

from replace.compose import compose
from replace.config import AttentionConfig, ModelConfig
from replace.convert import SwapSpec, conversion_of, swap
from replace.errors import UserError
from replace.feature_maps import FEATURE_MAPS
from replace.loading import check_model
from replace.tiny import tiny_config
from replace.validation import validate


def pair(width: int, size: float, tokens: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    """q and k `[1, 2, T, D]` in fp64."""
    generator = torch.Generator().manual_seed(width)
    q, k = (torch.randn(1, 2, tokens, width, generator=generator).double() * size for _ in range(2))
    return q, k


@pytest.mark.parametrize("name", FEATURE_MAPS.names())
@pytest.mark.parametrize("width", [1, 8, 64])
def test_features_are_as_many_as_announced_and_weights_are_not_negative(name: str, width: int) -> None:
    kind = FEATURE_MAPS.get(name)
    phi = kind(2, width).double()
    for size in (0.0, 0.1, 1.0, 30.0):
        q, k = pair(width, size)
        features = phi(q)
        assert features.shape == (1, 2, 9, kind.features(width))
        assert (features @ phi(k).transpose(-1, -2) >= 0).all()
        assert kind(2, width)(q.half()).dtype == torch.float32
    assert bool(list(phi.parameters())) == kind.learned


@pytest.mark.parametrize("width", [1, 3, 64])
@pytest.mark.parametrize("size", [0.1, 1.0, 20.0])
def test_taylor_is_the_second_order_of_exp(width: int, size: float) -> None:
    phi = FEATURE_MAPS.get("taylor")(2, width)
    q, k = pair(width, size)
    logit = q @ k.transpose(-1, -2)
    got = phi(q) @ phi(k).transpose(-1, -2)
    torch.testing.assert_close(got, 1 + logit + logit.square() / 2, rtol=1e-9, atol=1e-9 * size**4)
    assert (got >= 0.5 - 1e-9 * size**4).all()
    assert FEATURE_MAPS.get("taylor").features(width) == 1 + width + width * (width + 1) // 2


def test_the_learned_relu_starts_as_the_first_order_of_exp_and_alive() -> None:
    phi = FEATURE_MAPS.get("t2r")(2, 8).double()
    q, k = pair(8, 0.1)  # entries below 1 / sqrt(8): no feature is shut
    torch.testing.assert_close(
        phi(q) @ phi(k).transpose(-1, -2), 1 + q @ k.transpose(-1, -2), rtol=1e-6, atol=1e-6
    )
    for size in (1.0, 100.0):
        open_features = phi(pair(8, size)[0]) > 0
        assert (open_features[..., :8] | open_features[..., 8:]).all()


def test_a_map_too_wide_is_refused_by_name_with_what_is_possible() -> None:
    facts = check_model(ModelConfig(kind="tiny"))
    config = compose(["+exp=infini", "budget=smoke", "layers=all", "attention.feature_map=taylor"])
    for width in (16, 64):
        validate(config, dataclasses.replace(facts, head_dim=width))
    with pytest.raises(UserError, match=r"feature_map='taylor'.*elu, hedgehog, t2r for a head_dim of 65"):
        validate(config, dataclasses.replace(facts, head_dim=65))
    config.attention.name, config.attention.pairs = "sliding_window", 0
    validate(config, dataclasses.replace(facts, head_dim=65))  # it has no memory and so no map
    config.layers.rest = "infini"
    with pytest.raises(UserError, match="taylor takes at most 64"):
        validate(config, dataclasses.replace(facts, head_dim=65))


def test_swap_refuses_a_map_too_wide_and_leaves_the_model_as_it_was() -> None:
    config = tiny_config("llama")
    config.head_dim, config.num_hidden_layers = 66, 2
    model = AutoModelForCausalLM.from_config(config).eval()
    kinds = [type(layer.self_attn) for layer in model.model.layers]
    options = AttentionConfig(block=4, window=4, pairs=0)
    spec = {0: options, 1: AttentionConfig(block=4, window=4, pairs=0, feature_map="taylor")}
    with pytest.raises(UserError, match="feature_map='taylor'"):
        swap(model, SwapSpec(spec))
    assert [type(layer.self_attn) for layer in model.model.layers] == kinds
    with pytest.raises(UserError, match="no replaced layers"):
        conversion_of(model)
