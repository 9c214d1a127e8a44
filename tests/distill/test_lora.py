"""The tuning with adapters: what learns, what is refused, and that merged, saved and resumed are the same."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel

import distill.lora.tune as tune_module
import replace
from distill.lora.choice import Choice, Machine, choose, this_machine
from distill.lora.peft import adapted, trainable
from distill.lora.proof import Bypassed, probe_logits, prove
from distill.lora.quantised import check_bitsandbytes
from distill.lora.stage import lora_stage
from distill.lora.targets import targets_of
from distill.lora.tune import tune
from distill.lora.unsloth import adapted_by_unsloth
from replace import AttentionConfig, SwapSpec, export_model, swap
from replace.config import Config, LoraConfig, StageBudget
from replace.convert import probe_ids, replaced_layers
from replace.errors import UserError
from replace.logger import NoLogger
from replace.tiny import tiny_model, tiny_tokenizer

SMALL = {"block": 8, "window": 8, "sinks": 2, "distance_cap": 32, "pairs": 4}
CHATS = [
    [
        {"role": "user", "content": f"What is the secret number of city {n}?"},
        {"role": "assistant", "content": f"It is {n}, and the sky is blue."},
    ]
    for n in range(60)
]


def student(family="llama"):
    """Layers 0 and 2 are replaced, 1 and 3 keep full attention."""
    model = tiny_model(family)
    swap(model, SwapSpec({0: AttentionConfig(**SMALL), 2: AttentionConfig(name="sliding_window", **SMALL)}))
    return model


def config_for(folder: Path, **lora) -> Config:
    chats = folder / "chats.jsonl"
    chats.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in CHATS))
    config = Config(precision="fp32")
    config.lora = LoraConfig(kind="peft", path=str(chats), template="plain", rank=4, lr=1e-2, **lora)
    config.budget.lora = StageBudget(tokens=8 * 2 * 128, batch=2, length=128)
    config.budget.eval.perplexity_tokens = 128
    config.stage.checkpoint_every = 2
    config.experiment = "test"
    return config


def tuned(folder: Path, model=None, **lora):
    model = model or student()
    tokenizer = tiny_tokenizer()
    export_model(model, tokenizer, folder / "base", {"kind": "tiny"})
    config = config_for(folder, **lora)
    result = tune(model, tokenizer, config, folder, [], NoLogger())
    return model, tokenizer, result


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    return folder, *tuned(folder)


@torch.no_grad()
def logits(model):
    return model.eval()(probe_ids(model, 60)).logits


def test_the_chats_are_learnt_and_the_adapter_is_merged(whole):
    _, model, _, result = whole
    assert result["training"]["loss_last"] < result["training"]["loss_first"]
    held_out = result["tuning"]["held_out"]
    assert held_out["after"] < held_out["before"]
    assert held_out["tokens"] > 0
    assert result["tuning"]["merge_difference"] < 1e-5
    assert not [name for name, _ in model.named_modules() if "lora" in name]
    assert not hasattr(model, "peft_config")
    assert result["tuning"]["backend"] == "peft"


def test_the_adapter_on_the_base_is_the_merged_model(whole):
    folder, model, tokenizer, _ = whole
    base, _ = replace.load(folder / "base")
    untuned = logits(base)
    beside = PeftModel.from_pretrained(base, str(folder / "adapter"))
    assert (logits(beside) - logits(model)).abs().max() < 1e-4
    assert (logits(model) - untuned).abs().max() > 1e-2
    export_model(model, tokenizer, folder / "model", {"kind": "tiny"})
    assert torch.equal(logits(replace.load(folder / "model")[0]), logits(model))
    assert (
        json.loads((folder / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
        is None
    )
    assert "../base" in (folder / "adapter" / "README.md").read_text()


def test_two_adapters_are_loaded_and_switched(whole, tmp_path):
    folder, model, *_ = whole
    other, *_ = tuned(tmp_path, targets=["q_proj", "v_proj"], rslora=True)
    base, _ = replace.load(folder / "base")
    both = PeftModel.from_pretrained(base, str(folder / "adapter"), adapter_name="one")
    both.load_adapter(str(tmp_path / "adapter"), "two")
    for name, want in (("one", model), ("two", other), ("one", model)):
        both.set_adapter(name)
        assert (logits(both) - logits(want)).abs().max() < 1e-4
    assert (logits(model) - logits(other)).abs().max() > 1e-2


@pytest.mark.parametrize("more", [{"dora": True}, {"dropout": 0.1}, {"data": "text", "path": None}])
def test_other_adapters_and_text_are_tuned_too(tmp_path, more):
    from replace.corpora import Document

    config = config_for(tmp_path)
    for name, value in more.items():
        setattr(config.lora, name, value)
    if more.get("data"):
        config.lora.template = None
    config.budget.lora.tokens = 512
    model = student()
    text = Document("t", "The pass key is 7 and the grass is green. " * 200, "here", "train")
    result = tune(model, tiny_tokenizer(), config, tmp_path, [text], NoLogger())
    assert result["tuning"]["merge_difference"] < 1e-4
    assert (result["tuning"]["held_out"] is None) == ("data" in more)
    base = student()
    beside = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    assert (logits(beside) - logits(model)).abs().max() < 1e-3


def test_one_step_changes_every_adapter_of_a_replaced_layer(tmp_path):
    config, model = config_for(tmp_path), student()
    adapted(model, config.lora, targets_of(model, config.lora.targets), seed=0)
    stage = lora_stage(model, config)
    inside = {
        f"{index}.{name}": parameter
        for index, layer in replaced_layers(model).items()
        for name, parameter in layer.named_parameters()
        if "lora_" in name
    }
    assert len(inside) == 2 * 2 * 4
    # The second factor is 0 at the start and leaves the first without a gradient: a step on stirred ones.
    with torch.no_grad():
        for name, parameter in inside.items():
            if "lora_B" in name:
                parameter.normal_(std=0.02, generator=torch.Generator().manual_seed(1))
    before = {name: parameter.detach().clone() for name, parameter in inside.items()}
    optimizer = torch.optim.AdamW(stage.groups)
    data = tune_module.tuning_data(tiny_tokenizer(), [], config)
    stage.step(data.rows.batch(0), 1.0)
    optimizer.step()
    assert not [name for name, parameter in inside.items() if torch.equal(parameter, before[name])]
    frozen = [name for name, p in model.named_parameters() if p.grad is not None and "lora_" not in name]
    assert not frozen


def test_an_interrupted_tuning_ends_with_the_very_same_weights(whole, tmp_path, monkeypatch):
    _, want, *_ = whole
    made = tune_module.lora_stage
    seen = []

    def dying(model, config):
        stage = made(model, config)
        step = stage.step

        def until_the_fifth(batch, scale):
            seen.append(1)
            if len(seen) == 5:
                raise KeyboardInterrupt
            return step(batch, scale)

        stage.step = until_the_fifth
        return stage

    monkeypatch.setattr(tune_module, "lora_stage", dying)
    with pytest.raises(KeyboardInterrupt):
        tuned(tmp_path)
    monkeypatch.setattr(tune_module, "lora_stage", made)
    torch.manual_seed(7)  # what other phases drew must not matter
    got, *_ = tuned(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(got.parameters(), want.parameters(), strict=True))
    lines = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert {line["stage"] for line in lines} == {"lora"}
    assert [line["step"] for line in lines] == sorted({line["step"] for line in lines})


def test_new_adapters_depend_on_the_seed_alone():
    found = []
    for drawn, seed in ((1, 0), (2, 0), (1, 5)):
        torch.manual_seed(drawn)  # what was drawn before them
        model, state = student(), torch.get_rng_state()
        adapted(model, LoraConfig(rank=4), ["q_proj"], seed)
        assert torch.equal(torch.get_rng_state(), state)
        found.append(model.model.layers[0].self_attn.q_proj.lora_A["default"].weight)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


# Refusals


def test_targets_that_match_nothing_list_what_there_is():
    with pytest.raises(UserError, match=r"lora.targets='query'.*down_proj, gate_proj, k_proj"):
        targets_of(student(), ["q_proj", "query"])


def test_no_target_is_inside_a_mixer_or_the_output_embedding():
    model = student()
    leaves = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert targets_of(model, ["all-linear"]) == leaves
    model.model.layers[0].self_attn.mixer.q_proj = torch.nn.Linear(4, 4)  # as a variant may call its own
    chosen = targets_of(model, ["q_proj"])
    assert chosen == [f"model.layers.{i}.self_attn.q_proj" for i in range(4)]
    with pytest.raises(UserError, match="lm_head"):
        targets_of(model, ["lm_head"])


def test_other_families_have_their_own_linear_modules():
    assert targets_of(tiny_model("gpt2"), ["all-linear"]) == ["c_attn", "c_fc", "c_proj"]


def test_nothing_trainable_is_an_error():
    model = student().requires_grad_(False)
    with pytest.raises(UserError, match="nothing to train"):
        lora_stage(model, Config())


def test_a_loss_without_gradient_is_an_error_before_the_first_backward(tmp_path):
    config, model = config_for(tmp_path), student().requires_grad_(False)
    model.unreached = torch.nn.Linear(2, 2)
    stage = lora_stage(model, config)
    assert trainable(model) == ["unreached.weight", "unreached.bias"]
    data = tune_module.tuning_data(tiny_tokenizer(), [], config)
    with pytest.raises(UserError, match="no gradient"):
        stage.step(data.rows.batch(0), 1.0)


def test_qlora_without_bitsandbytes_is_refused(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"lora.qlora=True.*bitsandbytes is not installed"):
        check_bitsandbytes()


# The choice

ONE_GPU = Machine(1, None, "2026.10.9")


@pytest.mark.parametrize(
    ("options", "machine", "kind", "words"),
    [
        ({"kind": "auto"}, ONE_GPU, "unsloth", "one NVIDIA GPU"),
        ({"kind": "auto"}, Machine(0, None, "2026.10.9"), "peft", "no NVIDIA GPU"),
        ({"kind": "auto"}, Machine(2, None, "2026.10.9"), "peft", "2 NVIDIA GPUs"),
        ({"kind": "auto"}, Machine(1, "FSDP", "2026.10.9"), "peft", "FSDP"),
        ({"kind": "auto"}, Machine(1, None, None), "peft", "not installed"),
        ({"kind": "auto", "dropout": 0.1}, ONE_GPU, "peft", "lora.dropout=0 and it is 0.1"),
        ({"kind": "auto", "dora": True}, ONE_GPU, "peft", "lora.dora"),
        ({"kind": "auto", "bias": "all"}, ONE_GPU, "peft", "lora.bias=none and it is all"),
        ({"kind": "peft"}, ONE_GPU, "peft", "lora=peft"),
        ({"kind": "unsloth"}, Machine(0, None, "2026.10.9"), "unsloth", "lora=unsloth"),
        ({"kind": "unsloth"}, Machine(0, None, "2026.10.7"), "peft", "2026.10.7 needs a GPU"),
    ],
)
def test_the_choice_and_its_reason(options, machine, kind, words):
    choice = choose(LoraConfig(**options), machine)
    assert choice.kind == kind
    assert words in choice.why


@pytest.mark.parametrize(
    ("said", "sharded"),
    [
        ({}, None),
        ({"WORLD_SIZE": "1", "LOCAL_RANK": "0"}, None),
        ({"WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "DDP"),
        ({"WORLD_SIZE": "2", "ACCELERATE_USE_FSDP": "true"}, "FSDP"),
        ({"ACCELERATE_USE_DEEPSPEED": "1"}, "DEEPSPEED"),
    ],
)
def test_a_launcher_is_seen_by_what_it_sets(said, sharded, monkeypatch):
    for name in ("WORLD_SIZE", "LOCAL_RANK", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"):
        monkeypatch.delenv(name, raising=False)
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    assert this_machine().sharded == sharded


def test_a_number_of_processes_that_is_none_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "many")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(UserError, match=r"WORLD_SIZE='many' is not possible; allowed: a whole number"):
        this_machine()


# Unsloth's place, taken by what would go wrong


class PatchesPast:
    """As a library that puts a fast forward of its own in front of every attention layer."""

    @staticmethod
    def get_peft_model(model, r, target_modules, lora_alpha, random_state, **_):
        wrapped = adapted(model, LoraConfig(rank=r, alpha=lora_alpha), target_modules, random_state)
        for layer in model.model.layers:
            attention = layer.self_attn

            def fast(hidden_states, attention=attention, **_):
                return attention.o_proj(attention.q_proj(hidden_states)), None

            attention.forward = fast
        model.config.use_cache = False
        return wrapped


class PatchesNothing:
    """As a library that only makes the adapters."""

    @staticmethod
    def get_peft_model(model, r, target_modules, lora_alpha, random_state, **_):
        return adapted(model, LoraConfig(rank=r, alpha=lora_alpha), target_modules, random_state)


class Library:
    def __init__(self, fast):
        self.FastLanguageModel = fast


def by(fast, monkeypatch, config):
    monkeypatch.setattr("distill.lora.unsloth.import_unsloth", lambda: Library(fast))
    monkeypatch.setattr(tune_module, "choose", lambda options, machine: Choice("unsloth", "lora=unsloth"))
    config.lora.kind = "unsloth"
    return config


def test_a_bypassed_layer_leaves_the_model_as_it_was_and_peft_takes_over(whole, tmp_path, monkeypatch):
    config, model = by(PatchesPast, monkeypatch, config_for(tmp_path)), student()
    before, use_cache = logits(model), model.config.use_cache
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(Bypassed, match="logits differ"):
        adapted_by_unsloth(model, tiny_tokenizer(), config, ["q_proj", "o_proj"])
    assert [name for name, _ in model.named_modules()] == names
    assert torch.equal(logits(model), before)
    assert model.config.use_cache == use_cache
    result = tune(model, tiny_tokenizer(), config, tmp_path, [], NoLogger())
    assert result["tuning"]["backend"] == "peft"
    assert "logits differ" in result["tuning"]["why"]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), whole[1].parameters(), strict=True))


def test_a_library_that_bypasses_nothing_gives_what_peft_gives(whole, tmp_path, monkeypatch):
    config, model = by(PatchesNothing, monkeypatch, config_for(tmp_path)), student()
    result = tune(model, tiny_tokenizer(), config, tmp_path, [], NoLogger())
    assert result["tuning"]["backend"] == "unsloth"
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), whole[1].parameters(), strict=True))
    assert not hasattr(model, "_saved_temp_tokenizer")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("mistake", ["detached", "twice", "scaled"])
def test_the_proof_finds_each_mistake(mistake, precision):
    model = student()
    before = probe_logits(model, precision)
    adapted(model, LoraConfig(rank=4), ["q_proj", "v_proj"], seed=0)
    kept = {name: p.detach().clone() for name, p in model.named_parameters()}
    prove(model, before, precision)
    assert all(torch.equal(p, kept[name]) for name, p in model.named_parameters())
    assert all(p.grad is None for p in model.parameters())
    layer = model.model.layers[0].self_attn
    if mistake == "detached":
        layer.v_proj.lora_B["default"].weight.requires_grad_(False)
        words = "no gradient"
    elif mistake == "twice":
        forward = model.model.layers[0].self_attn.mixer.forward
        layer.mixer.forward = lambda *args: (forward(*args), forward(*args))[0]
        words = "not called once"
    else:
        inner = layer.v_proj.lora_B["default"].forward
        layer.v_proj.lora_B["default"].forward = lambda x: 1.02 * inner(x)
        words = "something else"
    with pytest.raises(Bypassed, match=words):
        prove(model, before, precision)
