"""Phases measured on a tiny swapped model: all is there, pairs with its twins, and nothing is changed."""

import copy
import random
from dataclasses import replace

import pytest
import torch

from eval.ablation import ablate, mixers, parts_of
from eval.layer_outputs import capture, layer_outputs
from eval.measure import conclude, measure, probe_rows, yardstick
from eval.metrics import new_metrics, problems
from eval.niah import Cell
from eval.plan import ABLATIONS, DEPTHS, OTHER_TEXT, clear_tokens, clear_tokens_of, only, plan_for
from eval.probes import Probe, probe
from eval.speed import decode_speed, kept_bytes, prefill
from replace.config import AttentionConfig, Config, EvalBudget, ModelConfig
from replace.convert import SwapSpec, swap
from replace.corpora import Document
from replace.loading import load_model

OPTIONS = AttentionConfig(block=16, window=16, pairs=8, sinks=2, distance_cap=64)
WORDS = ("the", "old", "house", "stood", "near", "a", "river", "nobody", "knew", "who", "lived", "there")


@pytest.fixture(scope="module")
def config() -> Config:
    config = Config(model=ModelConfig(kind="tiny"), attention=OPTIONS, precision="fp32")
    config.budget.eval = EvalBudget(
        perplexity_tokens=256,
        perplexity_length=64,
        episodes=4,
        phase_lengths=[256],
        final_lengths=[256, 384],
        speed_lengths=[64, 2048],
    )
    return config


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    def text(seed: int) -> str:
        rng = random.Random(seed)
        return " ".join(" ".join(rng.choices(WORDS, k=9)).capitalize() + "." for _ in range(300))

    return [
        Document(f"book {i}", text(i), "x", split) for i, split in enumerate(["train", "dev", "test", "test"])
    ]


@pytest.fixture(scope="module")
def swapped():
    """The tiny model with linear memory and pairs in two layers, pairs alone in one, and one layer kept."""
    model = load_model(ModelConfig(kind="tiny")).model
    pairs = copy.copy(OPTIONS)
    pairs.name = "sliding_window"
    swap(model, SwapSpec({0: pairs, 1: OPTIONS, 3: OPTIONS}))
    return model


@pytest.fixture(scope="module")
def measured(tiny, swapped, config, documents) -> dict:
    using = yardstick(tiny.tokenizer, config, documents)
    metrics = new_metrics(model="tiny", attention="infini", layers=[0, 1, 3], seed=0, device="cpu")
    phases = metrics["phases"]
    phases["teacher"] = measure(tiny.model, tiny.tokenizer, config, phase="teacher", final=False, using=using)
    phases["swapped"] = measure(swapped, tiny.tokenizer, config, phase="swapped", final=False, using=using)
    phases["stage1"] = measure(swapped, tiny.tokenizer, config, phase="stage1", final=True, using=using)
    conclude(metrics, parts_of(swapped))
    return metrics


def test_phases_follow_the_schema_and_their_plan(measured):
    assert problems(measured) == []
    teacher, between, last = (measured["phases"][name] for name in ("teacher", "swapped", "stage1"))
    assert "ablation" not in teacher
    assert "ablation" not in between["dev"]
    twins = {name: twin for name, twin in last["ablation"].items() if "why" not in twin}
    assert set(twins) == {*ABLATIONS, OTHER_TEXT}
    assert all("perplexity" in twin for twin in twins.values())
    assert "exp=window" in last["ablation"]["sliding_window_control"]["why"]
    assert set(last["perplexity"]) == {"book 2", "book 3"}
    assert {cell["length"] for cell in last["passkey"]["cells"]} == {256, 384}
    assert any(cell["distractors"] for cell in last["passkey"]["cells"])
    assert {"state", "decode"} == set(last["speed"])
    assert last["generation"]["agrees"] == 1.0
    assert all(seconds >= 0 for seconds in last["seconds"].values())
    counts = {"replaced": 3, "memory": 2, "pairs": 3, "sinks": 3, "full_attention": 1}
    kept = {"full_attention": [2], "sliding_window": [], "recurrent": []}
    assert measured["parts"] == counts | {"unreplaced": kept}
    assert measured["verdict"]["carried_by_full_attention"]
    assert measured["verdict"]["called"][1:] == ["carried-by-full-attention"]
    assert measured["verdict"]["carriers"] == {"full_attention": [2]}


def test_between_the_phases_nobody_reads_the_test_text(measured, tiny, config, documents):
    """The swap has figures on dev alone, the last phase and the teacher on both; recovery is on dev."""
    teacher, between, last = (measured["phases"][name] for name in ("teacher", "swapped", "stage1"))
    assert not {"perplexity", "passkey", "niah", "ablation"} & set(between)
    for phase in (teacher, between, last):
        assert set(phase["dev"]["perplexity"]) == {"book 1"}
        assert {cell["phrasing"] for cell in phase["dev"]["niah"]["cells"]} == {"dev"}
    assert {cell["phrasing"] for cell in last["niah"]["cells"]} == {"test"}
    assert [phase["test_reads"] for phase in (teacher, between, last)] == [1, 0, 1]
    assert measured["test_reads"] == 2
    assert set(measured["recovery"]) == {"perplexity/book 1", "recall"}
    using = yardstick(tiny.tokenizer, config, documents)
    assert torch.equal(
        probe_rows(tiny.tokenizer, using)[0, :20],
        torch.tensor(tiny.tokenizer(documents[1].text)["input_ids"][:20]),
    )


def test_without_a_dev_split_every_phase_reads_test(tiny, swapped, config, documents):
    using = yardstick(tiny.tokenizer, config, [d for d in documents if d.split != "dev"])
    found = measure(swapped, tiny.tokenizer, config, phase="swapped", final=False, using=using)
    assert "dev" not in found
    assert set(found["perplexity"]) == {"book 2", "book 3"}
    assert found["test_reads"] == 1


def test_phases_and_twins_are_measured_on_the_same_windows_and_episodes(measured):
    """The same model measured twice gives the same figures, so that differences come from the model."""
    between, last = measured["phases"]["swapped"], measured["phases"]["stage1"]
    assert between["dev"]["perplexity"] == last["dev"]["perplexity"]
    assert between["layer_outputs"] == last["layer_outputs"]
    losses = [cell["answer_loss"] for cell in between["dev"]["niah"]["cells"]]
    assert losses == [cell["answer_loss"] for cell in last["dev"]["niah"]["cells"]]
    losses = [cell["answer_loss"] for cell in last["niah"]["cells"] if cell["length"] == 256]
    off = [cell["answer_loss"] for cell in last["ablation"]["memory_off"]["niah"]["cells"][: len(losses)]]
    assert off != losses


def test_layer_outputs_are_those_of_the_teacher_where_nothing_was_swapped(tiny, measured):
    for row in measured["phases"]["teacher"]["layer_outputs"]:
        assert row["max_difference"] == 0
        assert row["error"] == 0
        assert row["transfer_error"] == 0
        assert row["mean"] == row["teacher_mean"]
    kept = measured["phases"]["swapped"]["layer_outputs"][2]
    assert kept["transfer_error"] == pytest.approx(0, abs=1e-9)  # layer 2 was not replaced
    assert kept["error"] > 1e-6  # but its input has changed


def test_layer_outputs_match_a_computation_by_hand(tiny, swapped):
    rows = torch.arange(40).view(1, 40) + 5
    reference = capture(tiny.model, rows)
    found = layer_outputs(swapped, reference)
    want = reference.outputs[0]
    with torch.inference_mode():
        hidden = tiny.model.model.layers[0].input_layernorm(tiny.model.model.embed_tokens(rows))
        tables = tiny.model.model.rotary_emb(hidden, torch.arange(40).unsqueeze(0))
        got = swapped.model.layers[0].self_attn(
            hidden_states=hidden, position_embeddings=tables, attention_mask=None
        )[0]
    assert found[0]["max_difference"] == pytest.approx(float((got - want).abs().max()), rel=1e-4)
    assert found[0]["std"] == pytest.approx(float(got.std()), rel=1e-4)
    assert found[0]["transfer_error"] == pytest.approx(found[0]["error"], rel=1e-4)


def test_ablation_changes_what_is_read_and_is_undone(swapped):
    rows = torch.randint(3, 400, (1, 200), generator=torch.Generator().manual_seed(0))

    def logits():
        with torch.inference_mode():
            return swapped(rows, use_cache=False).logits

    whole = logits()
    different = [whole]
    for part in ("memory", "pairs", "sinks", "window"):
        with ablate(swapped, **{part: True}):
            assert all(part in mixer.off for mixer in mixers(swapped))
            different.append(logits())
    for index, one in enumerate(different):
        assert all((one - other).abs().max() > 1e-5 for other in different[:index])
    assert torch.equal(logits(), whole)


def test_ablation_is_undone_after_an_error_and_nests(swapped):
    with ablate(swapped, memory=True):
        with pytest.raises(KeyError, match="pairs"), ablate(swapped, pairs=True):
            raise KeyError(*mixers(swapped)[0].off)
        assert mixers(swapped)[0].off == {"memory"}
    assert all(mixer.off == frozenset() for mixer in mixers(swapped))


def test_a_model_that_was_not_swapped_has_no_parts(tiny):
    assert mixers(tiny.model) == []
    counts = dict.fromkeys(("replaced", "memory", "pairs", "sinks"), 0)
    kept = {"full_attention": [0, 1, 2, 3], "sliding_window": [], "recurrent": []}
    assert parts_of(tiny.model) == counts | {"full_attention": 4, "unreplaced": kept}


def test_parts_are_seen_in_a_model_that_trains_with_activation_checkpointing():
    """transformers then makes no cache, in which they are seen."""
    model = load_model(ModelConfig(kind="tiny")).model
    swap(model, SwapSpec({1: AttentionConfig(block=8, window=8, pairs=4)}))
    seen = parts_of(model)
    model.gradient_checkpointing_enable()
    assert parts_of(model.train()) == seen
    assert model.training


def test_kept_bytes_of_the_teacher_are_those_of_its_cache(tiny):
    for row in kept_bytes(tiny.model, [64, 500]):
        cache = prefill(tiny.model, row["length"])
        assert row["bytes"] == sum(
            2 * layer.keys.numel() * layer.keys.element_size() for layer in cache.layers
        )


def test_kept_bytes_of_a_swapped_model_are_measured_and_constant():
    model = load_model(ModelConfig(kind="tiny")).model
    swap(model, SwapSpec(dict.fromkeys(range(4), OPTIONS)))
    layers = model.model.layers
    short, long = kept_bytes(model, [256, 3000])
    assert short["bytes"] == long["bytes"]
    assert model.model.layers is layers
    cache = prefill(model, 300)
    total = sum(x.numel() * x.element_size() for slot in cache.layers for x in slot.state.tensors().values())
    assert short["bytes"] == total


def test_decode_speed_beyond_the_positions_is_null_with_a_why(tiny):
    inside, beyond = decode_speed(tiny.model, [32, 4096], steps=2)
    assert inside["tokens_per_second"] > 0
    assert beyond["tokens_per_second"] is None
    assert "4096 positions" in beyond["why"]


def test_probes_show_what_the_model_generates(tiny):
    prompt = "The pass key is"
    output = tiny.model.generate(
        **tiny.tokenizer(prompt, return_tensors="pt"), max_new_tokens=4, do_sample=False
    )
    text = tiny.tokenizer.decode(output[0], skip_special_tokens=True)[len(prompt) :]
    found = probe(tiny.model, tiny.tokenizer, tokens=4, probes=(Probe(prompt, "zebra"), Probe(prompt, None)))
    assert found[0]["continuation"] == text
    assert found[0]["hit"] is False
    assert found[1]["hit"] is None


def test_needles_lie_outside_the_exact_part(tiny, config, documents):
    using = yardstick(tiny.tokenizer, config, documents)
    for depth in DEPTHS:
        for kind, phrasing in (("passkey", "train"), ("sentence", "test")):
            made = using.make(Cell(256, depth, kind, phrasing, "novel"), random.Random(3))
            first = made.answer.start - 1  # the query that predicts the answer's first token
            reach = OPTIONS.block * max(0, (first - OPTIONS.window + 1) // OPTIONS.block)
            assert made.needle.stop <= reach + 1
            assert made.needle.start >= OPTIONS.sinks
            assert len(made.input_ids) == 256


def test_clear_tokens_of_segments_and_windows():
    assert clear_tokens(AttentionConfig(block=32, window=64)) == 96
    assert clear_tokens(AttentionConfig(block=32, window=64, local="segment")) == 32


def test_clear_tokens_are_those_of_the_model_s_own_layers():
    model = load_model(ModelConfig(kind="tiny")).model
    assert clear_tokens_of(model, default=AttentionConfig(block=32, window=64)) == 96
    swap(model, SwapSpec({0: OPTIONS, 1: copy.copy(OPTIONS), 3: AttentionConfig(block=64, window=192)}))
    assert clear_tokens_of(model, default=AttentionConfig(block=32, window=64)) == 256


def test_a_yardstick_keeps_needles_clear_of_the_model_s_own_window(tiny, config, documents):
    using = yardstick(tiny.tokenizer, config, documents, clear=250)
    made = using.make(Cell(384, 0.9, "passkey", "train", "novel"), random.Random(3))
    assert made.answer.start - made.needle.stop >= 250


def test_episodes_are_those_of_a_length_and_depth():
    """They are spread over kinds and haystacks, so a mean over three depths has 3 / 4 of them."""
    budget = EvalBudget(episodes=8, phase_lengths=[1024], final_lengths=[1024, 4096])
    grids = plan_for(budget, {"pairs": 30}, phase="stage1", final=False).grids
    places = [(cell.length, cell.depth) for grid in grids for cell in grid.cells * grid.episodes]
    assert {places.count(place) for place in places} == {8}
    means = [cell.group() for grid in grids for cell in grid.cells * grid.episodes]
    assert {means.count(group) for group in means} == {6}
    few = plan_for(EvalBudget(episodes=1), {"memory": 1, "pairs": 1}, phase="stage3", final=True)
    assert {grid.episodes_of(name) for grid in few.grids for name in grid.ablations} == {1}


def test_plans_cost_what_they_say():
    budget = EvalBudget(episodes=8, phase_lengths=[1024], final_lengths=[1024, 4096])
    both = {"memory": 10, "pairs": 30}
    between = plan_for(budget, both, phase="stage1", final=False)
    assert sum(len(grid.cells) * grid.episodes for grid in between.grids) == 24
    assert {grid.ablations for grid in between.grids} == {("memory_and_pairs_off",)}
    final = plan_for(budget, both, phase="stage3", final=True)
    dev = plan_for(budget, both, phase="stage1", final=False, dev=True).dev
    assert sum(len(grid.cells) * grid.episodes for grid in dev.grids) == 12
    assert dev.halved
    assert {grid.ablations for grid in dev.grids} == {()}
    _, short_filler, long, filler = final.grids[:4]
    assert short_filler.ablations == ("memory_and_pairs_off", "memory_off", "pairs_off")
    three = ("memory_off", "pairs_off", "memory_and_pairs_off")
    assert long.ablations == ("memory_and_pairs_off",)
    assert filler.ablations == ()
    assert {cell.haystack for cell in long.cells} == {"novel"}
    assert {cell.length for grid in (long, filler) for cell in grid.cells} == {4096}
    assert [grid.episodes for grid in (long, filler)] == [1, 1]
    assert [final.grids[0].episodes_of(name) for name in three] == [2, 2, 2]
    assert {cell.length for grid in final.grids for cell in grid.cells} == {1024, 4096}
    assert plan_for(budget, {"pairs": 30}, phase="stage3", final=True).perplexity_ablations == (
        "memory_and_pairs_off",
        "other_text_state",
    )
    explaining = ("window_off", "sinks_off", "other_text_state")
    assert set(explaining) <= set(
        plan_for(budget, both | {"sinks": 30}, phase="stage3", final=True).grids[0].ablations
    )
    assert [final.grids[0].episodes_of(name) for name in explaining] == [1, 1, 1]
    assert not set(explaining) & set(long.ablations)
    assert plan_for(budget, {}, phase="teacher", final=False).grids[0].ablations == ()
    assert only(final, "recall").grids == final.grids
    assert not only(final, "recall").perplexity
    assert only(final, "perplexity").grids == ()
    assert only(final, "quick") == final
    both = only(final, "recall+perplexity")
    assert both.grids == final.grids
    assert both.perplexity_ablations == final.perplexity_ablations
    assert not both.probes
    assert not both.state_lengths
    assert only(final, "perplexity+recall+probes") == replace(final, state_lengths=(), decode_lengths=())


def test_training_mode_is_given_back(tiny, config, documents):
    using = yardstick(tiny.tokenizer, config, documents)
    model = load_model(ModelConfig(kind="tiny")).model.train()
    narrow = only(plan_for(config.budget.eval, {}, phase="teacher", final=False), "probes")
    found = measure(model, tiny.tokenizer, config, phase="teacher", final=False, using=using, plan=narrow)
    assert model.training
    assert set(found) == {"probes", "layer_outputs", "test_reads", "seconds"}
    assert found["test_reads"] == 0
    with pytest.raises(ValueError, match="stage9"):
        measure(model, tiny.tokenizer, config, phase="stage9", final=False, using=using)
