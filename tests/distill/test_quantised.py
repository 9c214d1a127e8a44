"""QLoRA by the real bitsandbytes, where it is installed: gradients, the tuning, an export read in 4 bit."""

import importlib.util
import json

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from distill.lora.quantised import quantise, restore_full
from distill.lora.targets import linear_modules
from distill.lora.tune import tune
from replace import AttentionConfig, SwapSpec, export_model, swap
from replace.config import Config, LoraConfig, StageBudget
from replace.convert import probe_ids
from replace.logger import NoLogger
from replace.precision import DTYPES
from replace.tiny import tiny_model, tiny_tokenizer

pytestmark = [
    pytest.mark.unsloth,
    pytest.mark.skipif(
        importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
    ),
]
SMALL = {"block": 8, "window": 8, "sinks": 2, "distance_cap": 32, "pairs": 4}
ROUNDED = 0.3
"""Of the logits' norm: NF4 rounds a weight by up to 0.15 of the largest in its block of 64."""


def student():
    model = tiny_model("llama")
    swap(model, SwapSpec({0: AttentionConfig(**SMALL), 2: AttentionConfig(**SMALL)}))
    return model


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(probe_ids(model, 60), use_cache=False).logits.float()


def distance(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).norm() / want.norm())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_backward_goes_through_the_very_weights_of_the_forward(precision):
    """Also after a forward without gradient, in which bitsandbytes may pack the weights in another way."""
    import bitsandbytes

    model = student().requires_grad_(False)
    whole = dict(model.named_parameters())
    before = logits(model)
    kept = quantise(model, precision)
    assert set(kept) == set(linear_modules(model))
    assert 0 < distance(logits(model), before) < ROUNDED
    layer = model.model.layers[0].mlp.up_proj
    assert isinstance(layer, bitsandbytes.nn.Linear4bit)
    weight = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    x = torch.randn(8, weight.shape[1], generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    out = layer(x.to(DTYPES[precision]))
    out.float().sum().backward()
    near = {"rtol": 1e-5, "atol": 1e-5} if precision == "fp32" else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(out.detach().float(), x.detach() @ weight.T, **near)
    torch.testing.assert_close(x.grad, weight.sum(0).expand_as(x), **near)
    restore_full(model, kept)
    assert all(parameter is whole[name] for name, parameter in model.named_parameters())
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_adapters_learn_on_rounded_weights_and_join_the_full_ones(precision, tmp_path):
    chats = [{"instruction": f"Say {n}.", "output": f"It is {n}, and the sky is blue."} for n in range(60)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    config = Config(precision=precision)
    config.lora = LoraConfig(
        kind="peft", path=str(tmp_path / "chats.jsonl"), template="plain", rank=4, lr=1e-2, qlora=True
    )
    config.budget.lora = StageBudget(tokens=8 * 2 * 128, batch=2, length=128)
    config.budget.eval.perplexity_tokens = 128
    model, tokenizer = student(), tiny_tokenizer()
    result = tune(model, tokenizer, config, tmp_path, [], NoLogger())
    assert result["tuning"]["backend"] == "peft"
    assert result["training"]["loss_last"] < result["training"]["loss_first"]
    assert result["tuning"]["merge_difference"] < 1e-4
    assert {type(module) for module in model.modules() if "Linear" in type(module).__name__} == {nn.Linear}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}

    export_model(model, tokenizer, tmp_path / "model", {"kind": "tiny"})
    small = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model",
        trust_remote_code=True,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=DTYPES[precision]
        ),
    )
    four = {name for name, module in small.named_modules() if type(module).__name__ == "Linear4bit"}
    assert four == set(linear_modules(model))
    assert {p.dtype for name, p in small.named_parameters() if ".mixer." in name} == {torch.float32}
    assert 0 < distance(logits(small), logits(model)) < ROUNDED
