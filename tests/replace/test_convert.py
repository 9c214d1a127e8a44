"""Swap and restore: what changes, what must not, and what is refused."""

import copy
import json

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from replace.config import AttentionConfig
from replace.convert import SwapSpec, attention_layers, mixers, restore, swap, teacher_attention
from replace.errors import UserError
from replace.layer import ReplacedAttention
from replace.tiny import tiny_model

FAMILIES = ["llama", "qwen3", "phi3", "gpt_neox"]
OPTIONS = AttentionConfig(block=4, window=4, sinks=2, pairs=3, distance_cap=16)
IDS = torch.randint(3, 500, (2, 30), generator=torch.Generator().manual_seed(0))


def logits(model: PreTrainedModel) -> Tensor:
    """Of `IDS`, without a cache."""
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


def some(*layers: int, **changes) -> SwapSpec:
    """These layers with one set of options."""
    return SwapSpec({i: AttentionConfig(**(vars(OPTIONS) | changes)) for i in layers})


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_restore_is_the_teacher_bit_for_bit(family: str, keep: bool) -> None:
    model = tiny_model(family)
    want, names = logits(model), [(n, p.requires_grad) for n, p in model.named_parameters()]
    classes = [type(m) for m in model.modules()]
    swap(model, some(0, 2), keep_originals=keep)
    assert not torch.equal(logits(model), want)
    restore(model)
    assert torch.equal(logits(model), want)
    assert [(n, p.requires_grad) for n, p in model.named_parameters()] == names
    assert [type(m) for m in model.modules()] == classes
    swap(model, some(1))  # and it can be swapped again


@pytest.mark.parametrize("family", FAMILIES)
def test_old_parameters_keep_their_names(family: str) -> None:
    model = tiny_model(family)
    old = model.state_dict()
    swap(model, some(1, 3))
    new = model.state_dict()
    assert all(torch.equal(new[key], value) for key, value in old.items())
    added = set(new) - set(old)
    assert added
    paths = [path for path, module in attention_layers(model) if isinstance(module, ReplacedAttention)]
    assert all(any(key.startswith(f"{path}.mixer.") for path in paths) for key in added)


def test_training_does_not_touch_kept_originals() -> None:
    model = tiny_model("llama")
    want = logits(model)
    conversion = swap(model, some(0, 1, 2, 3), keep_originals=True)
    with torch.no_grad():
        for _, module in attention_layers(model):
            for parameter in module.parameters():
                parameter.add_(0.1)
    changed = logits(model)
    with teacher_attention(model):
        assert torch.equal(logits(model), want)
    assert torch.equal(logits(model), changed)
    assert not any(p.requires_grad for kept in conversion.originals.values() for p in kept.parameters())
    restore(model)
    assert torch.equal(logits(model), want)
    assert all(p.requires_grad for p in model.parameters())


def test_originals_are_no_part_of_the_model() -> None:
    model = tiny_model("llama")
    swap(model, some(0), keep_originals=True)
    assert not any("original" in key for key in model.state_dict())


def test_kept_originals_follow_the_model_to_another_dtype() -> None:
    model = tiny_model("llama")
    swap(model, some(0), keep_originals=True)
    model.to(torch.bfloat16)
    with teacher_attention(model):
        assert logits(model).dtype == torch.bfloat16
    restore(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_the_report_says_what_was_replaced() -> None:
    model = tiny_model("qwen3")
    before = sum(p.numel() for p in model.parameters())
    conversion = swap(model, some(1, 2))
    found = conversion.replacements
    assert [r.layer for r in found] == [1, 2]
    assert [r.path for r in found] == ["model.layers.1.self_attn", "model.layers.2.self_attn"]
    assert all(r.old_class == "Qwen3Attention" and r.variant == "infini" for r in found)
    assert sum(p.numel() for p in model.parameters()) - before == sum(r.new_parameters for r in found)


def test_layers_may_mix_variants() -> None:
    model = tiny_model("llama")
    swap(
        model,
        SwapSpec({**some(0).layers, **some(2, name="identity").layers, **some(3, name="linear").layers}),
    )
    assert [type(m).__name__ for m in mixers(model).values()] == ["Infini", "Identity", "Linear"]
    whole = logits(model)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        pieces = [model(x, past_key_values=cache, use_cache=True).logits for x in IDS.split([11, 1, 18], 1)]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, atol=1e-4, rtol=1e-4)


def test_a_spec_survives_json_and_gives_the_same_model() -> None:
    model, again = tiny_model("llama"), tiny_model("llama")
    conversion = swap(model, some(0, 2))
    spec = SwapSpec.from_json(json.loads(json.dumps(conversion.spec.to_json())))
    assert spec == conversion.spec
    swap(again, spec, guard=False)
    again.load_state_dict(model.state_dict())
    assert torch.equal(logits(again), logits(model))


def test_every_replaced_layer_counts_its_calls() -> None:
    model = tiny_model("llama")
    swap(model, some(0, 1))
    logits(model)
    assert [m.calls for m in mixers(model).values()] == [1, 1]


def refused(model: PreTrainedModel, spec: SwapSpec, match: str) -> None:
    """The swap is refused with these words, and the model is as it was."""
    want, classes = logits(model), [type(m) for m in model.modules()]
    with pytest.raises(UserError, match=match):
        swap(model, spec)
    assert [type(m) for m in model.modules()] == classes
    assert torch.equal(logits(model), want)


def test_refusals_leave_the_model_as_it_was() -> None:
    model = tiny_model("llama")
    refused(model, some(0, 4), "layers=4 is not possible; allowed: 0 to 3")
    refused(model, some(-1), "layers=-1 is not possible")
    refused(model, SwapSpec({}), "no layer")
    refused(model, SwapSpec({0: OPTIONS, 1: some(1, name="nonsense").layers[1]}), "attention.name=.?nonsense")
    refused(model, SwapSpec({0: OPTIONS, 1: some(1, pairs_score="no").layers[1]}), "attention.pairs_score")
    swap(model, some(0))
    refused(model, some(0), "already swapped")
    refused(model, some(1), "already swapped")


def test_restore_and_teacher_need_a_swap() -> None:
    model = tiny_model("llama")
    with pytest.raises(UserError, match="no replaced layers"):
        restore(model)
    swap(model, some(0))
    with pytest.raises(UserError, match="not kept"), teacher_attention(model):
        pass


def test_a_family_outside_the_attention_interface_is_refused_by_name() -> None:
    with pytest.raises(UserError, match="Bloom"):
        swap(tiny_model("bloom"), some(0))


def test_a_swapped_model_can_be_copied_and_trained() -> None:
    model = tiny_model("llama")
    swap(model, some(0, 1), keep_originals=True)
    model.train()
    model(IDS, labels=IDS).loss.backward()
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin.eval()), logits(model.eval()))
    restore(twin)
    assert mixers(model)
    assert not mixers(twin)


def test_a_cache_of_unreplaced_layers_is_refused() -> None:
    model = tiny_model("llama")
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(IDS, past_key_values=cache, use_cache=True)
        swap(model, some(1))
        with pytest.raises(RuntimeError, match="fresh cache"):
            model(IDS, past_key_values=cache, use_cache=True)


def test_a_saved_state_dict_loads_into_another_swapped_model(tmp_path) -> None:
    model, other = tiny_model("llama"), tiny_model("llama", seed=1)
    for m in (model, other):
        swap(m, some(0, 2))
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    other.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    assert torch.equal(logits(other), logits(model))


def test_the_base_weights_load_with_plain_transformers(tmp_path) -> None:
    """Untouched names: a checkpoint of the swapped model still fits the base class, mixers apart."""
    model = tiny_model("llama")
    want = logits(model)
    swap(model, some(0, 2))
    kept = {k: v for k, v in model.state_dict().items() if ".mixer." not in k}
    plain = AutoModelForCausalLM.from_config(model.config).eval()
    plain.load_state_dict(kept)
    assert torch.equal(logits(plain), want)


def test_a_swap_leaves_every_module_in_its_mode() -> None:
    model = tiny_model("llama").train()
    attention_layers(model)[0][1].eval()
    before = {name: module.training for name, module in model.named_modules()}
    swap(model, some(0, 2))
    after = {name: module.training for name, module in model.named_modules()}
    assert {name: after[name] for name in before} == before


def test_kept_originals_follow_the_models_config() -> None:
    """A deep copy of it would keep the old attention implementation for good."""
    model = tiny_model("llama")
    swap(model, some(0), keep_originals=True)
    model.set_attn_implementation("eager")
    with teacher_attention(model):
        assert attention_layers(model)[0][1].config is model.config
    restore(model)
    assert attention_layers(model)[0][1].config is model.config
