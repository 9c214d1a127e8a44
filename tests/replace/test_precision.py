"""Casting frozen weights once is what autocast does, and leaves nothing behind."""

import pytest
import torch

from replace.config import AttentionConfig, ModelConfig
from replace.convert import SwapSpec, restore, swap, teacher_attention
from replace.loading import load_model
from replace.precision import autocast, cast_once


@pytest.mark.parametrize("frozen", [True, False])
def test_the_result_is_autocasts_bit_for_bit(frozen):
    model = load_model(ModelConfig(kind="tiny")).model.eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not frozen and "q_proj" in name)
    before = dict(model.named_parameters())
    ids = torch.randint(0, 100, (2, 30))
    with autocast("bf16", model.device):
        want = model(ids).logits
        with cast_once(model, "bf16"):
            got = model(ids).logits
            weights = dict(model.named_parameters())
    assert torch.equal(got, want)
    half = {name for name, weight in weights.items() if weight.dtype == torch.bfloat16}
    assert any("mlp" in name for name in half)
    assert any("q_proj" in name for name in half) == frozen
    assert not any("embed" in name for name in half)
    assert all(weight is before[name] for name, weight in model.named_parameters())


def test_gradients_pass_through_a_cast_weight_as_through_autocast():
    model = load_model(ModelConfig(kind="tiny")).model
    model.requires_grad_(False)
    trained = model.model.layers[0].self_attn.q_proj.weight.requires_grad_(True)
    ids = torch.randint(0, 100, (1, 30))
    gradients = []
    for once in (False, True):
        trained.grad = None
        with autocast("bf16", model.device):
            if once:
                with cast_once(model, "bf16"):
                    model(ids).logits.float().square().mean().backward()
            else:
                model(ids).logits.float().square().mean().backward()
        gradients.append(trained.grad.clone())
    assert torch.equal(*gradients)


def test_fp32_changes_nothing():
    model = load_model(ModelConfig(kind="tiny")).model.requires_grad_(False)
    with cast_once(model, "fp32"):
        assert all(weight.dtype == torch.float32 for weight in model.parameters())


def test_quantised_weights_are_not_cast():
    """Four-bit weights are packed into bytes, two in one, which as numbers mean nothing."""
    model = load_model(ModelConfig(kind="tiny")).model.requires_grad_(False)
    layer = model.model.layers[0].mlp.up_proj
    packed = torch.nn.Parameter(torch.arange(256, dtype=torch.uint8).view(128, 2), requires_grad=False)
    layer.weight = packed
    with cast_once(model, "bf16"):
        assert layer.weight is packed
        assert model.model.layers[0].mlp.down_proj.weight.dtype == torch.bfloat16
    assert layer.weight is packed


def test_the_kept_originals_are_not_rounded_by_half_precision():
    """`cast_once` shows the student's frozen weights in bf16; the teacher's own stay as they are."""
    model = load_model(ModelConfig(kind="tiny")).model.eval()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    ids = torch.arange(3, 43).unsqueeze(0)
    with torch.no_grad(), autocast("bf16", model.device):
        want = model(ids).logits
    swap(model, SwapSpec({1: AttentionConfig()}), keep_originals=True)
    model.requires_grad_(False)
    with cast_once(model, "bf16"), autocast("bf16", model.device), torch.no_grad(), teacher_attention(model):
        assert torch.equal(model(ids).logits, want)
    restore(model)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
