"""What each stage trains, and that stage 1 is local."""

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from distill.data import Batch
from distill.stages import kind_of, language_stage, local_groups, transfer_stage
from replace.config import AttentionConfig, Config
from replace.convert import (
    SwapSpec,
    attention_layers,
    conversion_of,
    replaced_layers,
    swap,
    teacher_attention,
)
from replace.errors import UserError


def small_model(seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).train()


def options(name="infini", **changes):
    return AttentionConfig(name=name, block=8, window=8, sinks=2, pairs=4, distance_cap=64, **changes)


def batch(rows=1, length=160):
    ids = torch.randint(1, 61, (rows, length), generator=torch.Generator().manual_seed(1))
    return Batch(ids, torch.zeros_like(ids, dtype=torch.bool))


def config_with(**stage):
    config = Config()
    for name, value in stage.items():
        setattr(config.stage, name, value)
    return config


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_an_identity_swap_has_nothing_to_learn():
    model = small_model()
    swap(model, SwapSpec({i: options("identity") for i in range(3)}), keep_originals=True)
    result = transfer_stage(model, config_with(lr_projection1=1e-3)).step(batch(), 1.0)
    assert result["loss"] < 1e-10
    assert all(g.abs().max() < 1e-5 for g in gradients(model).values())
    model.zero_grad()
    result = language_stage(model, config_with(), 2).step(batch(), 1.0)
    assert abs(result["kl"]) < 1e-6
    assert all(g.abs().max() < 1e-5 for g in gradients(model).values())


def test_stage_1_gradients_are_those_of_each_layer_alone():
    model = small_model()
    swap(model, SwapSpec({0: options(), 2: options("sliding_window")}), keep_originals=True)
    rows = batch()
    transfer_stage(model, config_with(lr_projection1=1e-3)).step(rows, 1.0)
    got = gradients(model)
    model.zero_grad()
    inputs, outputs = {}, {}

    def keep(module, args, kwargs, output):
        inputs[module.layer_idx], outputs[module.layer_idx] = kwargs, output[0]

    originals = conversion_of(model).originals
    hooks = [o.register_forward_hook(keep, with_kwargs=True) for o in originals.values()]
    with torch.no_grad(), teacher_attention(model):
        model(rows.input_ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    for index, layer in replaced_layers(model).items():
        target = outputs[index]
        (((layer(**inputs[index])[0] - target) ** 2).mean() / target.var() / 2).backward()
    want = gradients(model)
    compared = [name for name in want if ".score." not in name]
    assert len(compared) > 8
    for name in compared:
        assert torch.allclose(got[name], want[name], atol=1e-6), name
    assert all(".score." in name for name in got.keys() - want.keys())


def test_stage_1_leaves_no_trace_and_stops_at_the_last_replaced_layer():
    model = small_model()
    swap(model, SwapSpec({1: options()}), keep_originals=True)
    calls = []
    hook = model.model.layers[2].register_forward_hook(lambda *a: calls.append(1))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    want = model(batch().input_ids, use_cache=False).logits
    calls.clear()
    stage = transfer_stage(model, config_with(lr_projection1=1e-3))
    stage.step(batch(), 1.0)
    hook.remove()
    assert not calls
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
    assert torch.equal(model(batch().input_ids, use_cache=False).logits, want)
    assert all("layers.1.self_attn" in name for name in stage.names)
    assert not any(m._forward_hooks for m in model.modules())


def test_scores_are_taught_by_the_teacher_and_frozen_afterwards():
    model = small_model()
    swap(model, SwapSpec({0: options("sliding_window")}), keep_originals=True)
    stage = transfer_stage(model, config_with(lr_projection1=0.0))
    result = stage.step(batch(), 1.0)
    assert result["score"] > 0
    assert sorted(gradients(model)) == sorted(stage.names)
    assert all(".score." in name for name in stage.names)
    assert not any(".score." in name for name in language_stage(model, config_with(), 2).names)
    assert not any(".score." in name for name in language_stage(model, config_with(), 3, small_model()).names)


@pytest.mark.parametrize("number", [2, 3])
def test_who_is_trained_in_place(number):
    model = small_model()
    swap(model, SwapSpec({1: options()}), keep_originals=True)
    stage = language_stage(model, config_with(), number, small_model() if number == 3 else None)
    stage.step(batch(), 1.0)
    touched = {name for name, g in gradients(model).items() if g.abs().sum() > 0}
    assert touched
    if number == 2:
        assert all("layers.1.self_attn" in name for name in touched)
    else:
        assert any("embed_tokens" in name for name in touched)
    moved = {n for n, p in model.named_parameters() if p.requires_grad}
    assert moved == set(stage.names)


def test_the_teacher_of_stage_2_is_the_unswapped_model_even_after_training():
    model = small_model()
    teacher = copy.deepcopy(model)
    swap(model, SwapSpec({1: options()}), keep_originals=True)
    with torch.no_grad():
        for layer in replaced_layers(model).values():
            for parameter in layer.parameters():
                parameter.add_(0.1)
        with teacher_attention(model):
            got = model(batch().input_ids, use_cache=False).logits
    assert torch.equal(got, teacher(batch().input_ids, use_cache=False).logits)


def test_groups_have_their_own_rates_and_gates_do_not_decay():
    model = small_model()
    swap(model, SwapSpec({0: options()}))
    rates = {"projection": 1e-4, "map": 1e-3, "gate": 1e-2, "score": 3e-2}
    groups, _ = local_groups(model, rates, decay=0.1)
    assert {g["name"]: (g["lr"], g["weight_decay"]) for g in groups} == {
        "projection": (1e-4, 0.1),
        "map": (1e-3, 0.1),
        "gate": (1e-2, 0.0),
        "score": (3e-2, 0.0),
    }
    assert kind_of("mixer.gate.beta") == "gate"
    assert kind_of("mixer.write_gate.weight") == "map"
    assert {kind_of(f"mixer.{name}.bias") for name in ("step", "decay")} == {"map"}
    assert kind_of("q_proj.weight") == "projection"


def test_a_stage_without_anything_to_train_says_what_is_frozen():
    model = small_model()
    swap(model, SwapSpec({0: options("sliding_window", pairs_score="key_norm")}), keep_originals=True)
    stage = transfer_stage(model, config_with(lr_projection1=0.0))
    assert stage.groups == stage.names == []
    assert stage.idle == (
        "stage 1 (transfer) has nothing to learn: stage.lr_projection1=0 freezes all that its layers have "
        "to train (projections), and a rate above 0 would train it"
    )
    model = small_model()
    swap(model, SwapSpec({0: options()}), keep_originals=True)
    frozen = config_with(lr_projection2=0.0, lr_map2=0.0, lr_gate=0.0)
    assert "stage.lr_projection2=0, stage.lr_map2=0, stage.lr_gate=0 freeze all" in str(
        language_stage(model, frozen, 2).idle
    )
    assert language_stage(model, config_with(), 2).idle is None


def test_a_model_in_which_nothing_is_replaced_is_refused():
    with pytest.raises(UserError, match="no layer is replaced"):
        language_stage(small_model(), config_with(), 2)


def test_gradients_reach_every_gate_at_initialisation():
    model = small_model()
    swap(model, SwapSpec({i: options(gate="token") for i in range(3)}), keep_originals=True)
    language_stage(model, config_with(), 2).step(batch(), 1.0)
    for name, gradient in gradients(model).items():
        if "gate" in name and "layers.0" in name:
            assert gradient.abs().max() > 0, name
    assert len(attention_layers(model)) == 3


def neox(**settings):
    """A family that gives its attention the hidden states by position, and has dropout outside of it."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "gpt_neox",
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        **settings,
    )
    model = AutoModelForCausalLM.from_config(config).train()
    swap(model, SwapSpec({0: options(), 1: options("sliding_window")}), keep_originals=True)
    return model


def test_stage_1_takes_hidden_states_by_position_too():
    model = neox()
    result = transfer_stage(model, config_with(lr_projection1=1e-3)).step(batch(), 1.0)
    assert result["loss"] > 0
    assert len(gradients(model)) > 8


def test_the_teacher_has_no_dropout():
    model = neox(hidden_dropout=0.5)
    model.gpt_neox.layers[1].mlp.eval()  # what a caller has set stays
    before = {name: module.training for name, module in model.named_modules()}
    stage = transfer_stage(model, config_with(lr_projection1=1e-3))
    assert stage.step(batch(), 1.0)["loss"] == stage.step(batch(), 1.0)["loss"]
    seen = []
    hook = model.gpt_neox.register_forward_hook(
        lambda module, *_: seen.append((torch.is_grad_enabled(), module.training))
    )
    language_stage(model, config_with(), 2).step(batch(), 1.0)
    hook.remove()
    assert seen == [(False, False), (True, True)]
    assert {name: module.training for name, module in model.named_modules()} == before


@pytest.mark.parametrize("number", [2, 3])
def test_gradient_checkpointing_is_switched_on_and_changes_no_gradient(number):
    found = []
    for wanted in (False, True):
        model = small_model()
        swap(model, SwapSpec({0: options(), 2: options("linear")}), keep_originals=True)
        config = config_with(gradient_checkpointing=wanted)
        teacher = small_model() if number == 3 else None
        language_stage(model, config, number, teacher).step(batch(), 1.0)
        assert model.is_gradient_checkpointing == wanted
        found.append(gradients(model))
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        assert torch.allclose(gradient, found[1][name], atol=1e-6), name


def sharpen(model):
    """Attention that is far from uniform, so that there is something to learn."""
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data *= 12
        layer.self_attn.k_proj.weight.data *= 12


def weights_config(**stage):
    return config_with(transfer_loss="attention_weights", lr_projection1=1e-3, **stage)


@pytest.mark.parametrize("feature_map", ["hedgehog", "t2r"])
def test_attention_weights_teach_feature_maps_only_and_the_loss_falls(feature_map):
    model = small_model()
    sharpen(model)
    learner = options(feature_map=feature_map, gate="token", rotary=feature_map == "t2r")
    swap(
        model, SwapSpec({0: learner, 1: options("sliding_window"), 2: options("linear")}), keep_originals=True
    )
    stage = transfer_stage(model, weights_config())
    rows = batch(rows=2, length=160)
    rows.padding = torch.ones_like(rows.input_ids, dtype=torch.bool)
    rows.padding[1, 130:] = False
    first = stage.step(rows, 1.0)
    touched = {name for name, g in gradients(model).items() if ".score." not in name}
    wanted = [n for n, _ in model.named_parameters() if ".map_q." in n or ".map_k." in n]
    assert touched == set(wanted)
    assert {g["name"] for g in stage.groups} == {"map", "score"}
    assert first["score"] > 0
    assert first["transfer"] == pytest.approx((first["layer_0"] + first["layer_2"]) / 2)
    optimizer = torch.optim.Adam([p for g in stage.groups for p in g["params"]], lr=3e-2)
    for _ in range(12):
        optimizer.step()
        optimizer.zero_grad()
        last = stage.step(rows, 1.0)
    assert last["layer_0"] < first["layer_0"] - 0.02
    assert last["layer_2"] < first["layer_2"] - 0.02


def test_attention_weights_are_the_teachers_on_its_own_position_free_queries_and_keys():
    """The loss of a layer, written out from the weights that the teacher itself returns."""
    model = small_model().double()
    sharpen(model)
    swap(model, SwapSpec({1: options("linear")}), keep_originals=True)
    layer = replaced_layers(model)[1]
    layer.mixer.double()
    rows = batch(length=40)
    got = transfer_stage(model, weights_config()).step(rows, 1.0)["transfer"]
    model.set_attn_implementation("eager")
    kept = {}
    hook = (
        conversion_of(model)
        .originals[1]
        .register_forward_pre_hook(lambda module, args, kwargs: kept.update(kwargs), with_kwargs=True)
    )
    with torch.no_grad(), teacher_attention(model):
        target = model(rows.input_ids, use_cache=False, output_attentions=True).attentions[1]
    hook.remove()
    x = kept["hidden_states"]
    q, k = (f(x).unflatten(-1, (-1, 8)).transpose(1, 2) * 8**-0.25 for f in (layer.q_proj, layer.k_proj))
    weights = layer.mixer.map_q(q) @ layer.mixer.map_k(k).repeat_interleave(2, 1).transpose(-1, -2)
    weights = weights.tril()
    share = weights / weights.sum(-1, keepdim=True)
    want = -(target * share.clamp_min(1e-20).log()).sum(-1).mean()
    assert got == pytest.approx(float(want.detach()), rel=1e-5)


@pytest.mark.parametrize("change", [{"name": "sliding_window"}, {"feature_map": "elu"}, {"name": "identity"}])
def test_attention_weights_need_a_map_that_learns(change):
    model = small_model()
    swap(model, SwapSpec({0: options(**change)}), keep_originals=True)
    with pytest.raises(UserError, match=r"attention_weights|nothing is trainable"):
        transfer_stage(model, weights_config())
