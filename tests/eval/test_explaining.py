"""What explains a result: another text's state, the window alone off, the control, and what it is called."""

import copy
import json
import random
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch

from eval.ablation import ablate, mixers, parts_of
from eval.control import control_of
from eval.explaining import explaining, what_it_is, who_carries
from eval.measure import conclude, measure, yardstick
from eval.metrics import FILE, new_metrics
from eval.niah import Cell, recall_grid
from eval.other_text import Exchanged, OtherText, another, left_the_window, recall_with_other_state
from replace.config import AttentionConfig, Config, EvalBudget, ModelConfig
from replace.convert import SwapSpec, swap
from replace.corpora import Document
from replace.loading import load_model

OPTIONS = AttentionConfig(block=8, window=8, pairs=4, sinks=2, distance_cap=None)
WORDS = ("the", "old", "house", "stood", "near", "a", "river", "nobody", "knew", "who", "lived", "there")
VARIANTS = ("infini", "linear", "gated_delta")


def text(seed: int, sentences: int = 200) -> str:
    rng = random.Random(seed)
    return " ".join(" ".join(rng.choices(WORDS, k=9)).capitalize() + "." for _ in range(sentences))


def swapped(name: str = "infini", layers=range(4), depth: int = 4):
    """The tiny model, cut to `depth` layers, with `name` in some of them."""
    model = load_model(ModelConfig(kind="tiny")).model.double().eval()
    model.model.layers = model.model.layers[:depth]
    model.config.num_hidden_layers = depth
    torch.manual_seed(0)
    swap(model, SwapSpec({i: OPTIONS.shared_with(name) for i in layers if i < depth}))
    for mixer in mixers(model):  # else an untrained gate hides what the memory says
        if hasattr(mixer, "gate"):
            torch.nn.init.constant_(mixer.gate.beta, 1.0)
    return model


def rows(count: int, tokens: int, seed: int = 0):
    return torch.randint(3, 400, (count, tokens), generator=torch.Generator().manual_seed(seed))


def logits(model, ids):
    with torch.inference_mode():
        return model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("cut", [24, 29, None])
def test_the_state_of_the_same_text_changes_nothing(tiny, name, cut):
    model, ids = swapped(name, layers=(0, 1, 3)), rows(1, 60)
    other = OtherText(model, tiny.tokenizer, text(0), 60)
    other.row = ids
    same = logits(Exchanged(model, other, cut), ids)
    torch.testing.assert_close(same, logits(model, ids), rtol=0, atol=1e-9)
    with torch.inference_mode():
        late = Exchanged(model, other, cut)(input_ids=ids, logits_to_keep=3).logits
    torch.testing.assert_close(late, same[:, -3:], rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_needle_that_left_the_window_is_gone_with_the_state(tiny, name):
    """In a model of one layer the window's states cannot hand it on, so nothing of it is left at all."""
    model, ids = swapped(name, depth=1), rows(2, 64)
    changed = ids.clone()
    changed[:, 10:14] += 5
    other = OtherText(model, tiny.tokenizer, text(0), 40)
    own = [logits(model, x)[:, 40:] for x in (ids, changed)]
    assert (own[0] - own[1]).abs().max() > 1e-4
    exchanged = [logits(Exchanged(model, other, 40), x)[:, 40:] for x in (ids, changed)]
    assert torch.equal(*exchanged)
    near = ids.clone()
    near[:, 38:40] += 5  # the window stays the text's own
    assert not torch.equal(exchanged[0], logits(Exchanged(model, other, 40), near)[:, 40:])


def test_full_attention_keeps_the_needle(tiny):
    """A layer that was not replaced keeps what it read, whatever the replaced ones are given."""
    model, ids = swapped(layers=(0,), depth=2), rows(1, 64)
    changed = ids.clone()
    changed[:, 10:14] += 5
    other = OtherText(model, tiny.tokenizer, text(0), 40)
    one, two = (logits(Exchanged(model, other, 40), x)[:, 40:] for x in (ids, changed))
    assert (one - two).abs().max() > 1e-4


@pytest.mark.parametrize(("stop", "gone"), [(24, True), (25, True), (26, False)])
def test_a_needle_in_the_window_is_left_out(stop, gone):
    """Cut at 40 with block and window of 8: block 5 is new, 4 local, so the needle ends by 32 = 40 - 8."""
    asked = SimpleNamespace(needles=[slice(20, stop)], question=slice(40, 44))
    assert left_the_window(asked, 16) is gone


def test_cells_whose_needle_is_local_are_left_out(tiny):
    config = Config(model=ModelConfig(kind="tiny"), attention=OPTIONS, precision="fp32")
    documents = [Document(f"book {i}", text(i), "x", "test") for i in range(3)]
    using = yardstick(tiny.tokenizer, config, documents)
    model = swapped().float()
    cells = [Cell(192, depth, "passkey", "train", "novel") for depth in (0.1, 1.0)]
    other = OtherText(model, tiny.tokenizer, text(9), 192)
    found = recall_with_other_state(model, cells, using.make, other, episodes=2, clear=using.clear)
    assert [cell["depth"] for cell in found["cells"]] == [0.1]
    plain = recall_grid(model, cells[:1], using.make, episodes=2)["cells"][0]
    assert found["cells"][0].keys() == plain.keys()
    assert found["cells"][0]["answer_loss"] != plain["answer_loss"]


def test_another_text_is_another():
    books = {"a": "one", "b": "two", "c": "three"}
    assert all(another(books, name) != books[name] for name in books)
    assert another({"a": "one two"}, "a") == " two"


def test_the_window_goes_off_only_where_a_memory_answers():
    model = load_model(ModelConfig(kind="tiny")).model
    swap(model, SwapSpec({0: OPTIONS.shared_with("sliding_window"), 1: OPTIONS}))
    with ablate(model, window=True, beside_memory=True):
        assert [mixer.off for mixer in mixers(model)] == [frozenset(), {"window"}]
    assert [mixer.off for mixer in mixers(model)] == [frozenset()] * 2


# The verdict on real, if tiny, models


@pytest.fixture(scope="module")
def setting(tiny):
    config = Config(model=ModelConfig(kind="tiny"), attention=OPTIONS, precision="fp32")
    config.budget.eval = EvalBudget(
        perplexity_tokens=256, perplexity_length=64, episodes=4, phase_lengths=[192], final_lengths=[192],
        speed_lengths=[],
    )  # fmt: skip
    documents = [Document(f"book {i}", text(i), "x", s) for i, s in enumerate(["dev", "test", "test"])]
    return config, yardstick(tiny.tokenizer, config, documents)


def judged(tiny, setting, model) -> dict:
    config, using = setting
    metrics = new_metrics(model="tiny", attention="infini", layers=[], seed=0, device="cpu")
    metrics["phases"]["swapped"] = measure(
        model, tiny.tokenizer, config, phase="swapped", final=True, using=using
    )
    conclude(metrics, parts_of(model))
    return metrics


def test_an_untrained_swap_with_the_memory_off_is_called_window_only(tiny, setting):
    model = swapped().float()
    with ablate(model, memory=True, pairs=True):
        found = judged(tiny, setting, model)
    assert found["verdict"]["called"] == ["window-only"]
    assert found["verdict"]["memory"] == found["verdict"]["pairs"] == "window-only"
    assert found["verdict"]["carriers"] == {}
    assert what_it_is(found) == "The rule calls it **window-only**."
    assert who_carries(found) == ""


def test_a_layer_with_full_attention_is_named_beside_it(tiny, setting):
    model = swapped(layers=(0, 1, 3)).float()
    with ablate(model, memory=True, pairs=True):
        found = judged(tiny, setting, model)
    assert found["verdict"]["called"] == ["window-only", "carried-by-full-attention"]
    assert found["verdict"]["carriers"] == {"full_attention": [2]}
    assert "full attention in 2." in who_carries(found)


def test_a_model_without_anything_stored_says_why_the_rest_is_missing(tiny, setting):
    model = load_model(ModelConfig(kind="tiny")).model
    plain = copy.copy(OPTIONS.shared_with("sliding_window"))
    plain.pairs = 0
    swap(model, SwapSpec(dict.fromkeys(range(4), plain)))
    found = judged(tiny, setting, model)
    assert found["verdict"]["called"] == ["window-only"]
    ablation = found["phases"]["swapped"]["ablation"]
    assert ablation["window_off"]["why"] == "no layer has a linear memory"
    assert ablation["other_text_state"]["why"] == "no layer has a linear memory or retained pairs"
    table = explaining(found["phases"]["swapped"])
    assert "sinks off" in table
    assert "window off" not in table


# The control


@pytest.fixture
def control(tmp_path):
    """A finished run of windows alone, and a config and parts that it is a control of."""
    theirs = Config(attention=AttentionConfig(name="sliding_window", pairs=0))
    metrics = new_metrics(model="m", attention="sliding_window", layers=[], seed=0, device="cpu")
    metrics["parts"] = {"replaced": 30, "memory": 0, "pairs": 0, "full_attention": 0}
    metrics["phases"] = {"swapped": {}, "stage2": {"niah": {"cells": [], "means": []}, "test_reads": 1}}
    mine = Config()
    mine.eval.control = str(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(asdict(theirs)))
    (tmp_path / FILE).write_text(json.dumps(metrics))
    return tmp_path, theirs, metrics, mine, {"replaced": 30, "full_attention": 0}


def test_a_control_s_figures_are_its_last_phase_s(control):
    folder, _, _, mine, parts = control
    found = control_of(mine, parts)
    assert found == {"run": str(folder), "phase": "stage2", "niah": {"cells": [], "means": []}}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda theirs, metrics: setattr(theirs, "seed", 3), "there seed is 3, here 0"),
        (lambda theirs, metrics: setattr(theirs.model, "kind", "tiny"), "there model.kind is 'tiny'"),
        (lambda theirs, metrics: setattr(theirs.data, "recall", 0.0), "there data.recall is 0.0"),
        (
            lambda theirs, metrics: setattr(theirs.budget.stage2, "tokens", 9),
            "there budget.stage2.tokens is 9",
        ),
        (lambda theirs, metrics: setattr(theirs.attention, "window", 64), "there attention.window is 64"),
        (lambda theirs, metrics: metrics["parts"].update(pairs=30), "its layers have pairs"),
        (
            lambda theirs, metrics: metrics["parts"].update(replaced=10),
            "there 10 layers are replaced, here 30",
        ),
        (lambda theirs, metrics: metrics["phases"].pop("stage2"), "has not finished"),
    ],
)
def test_a_control_that_differs_is_none(control, change, words):
    folder, theirs, metrics, mine, parts = control
    change(theirs, metrics)
    (folder / "config.json").write_text(json.dumps(asdict(theirs)))
    (folder / FILE).write_text(json.dumps(metrics))
    assert words in control_of(mine, parts)["why"]


def test_a_control_that_is_not_there_is_named(tmp_path):
    mine = Config()
    assert "exp=window" in control_of(mine, {})["why"]
    mine.eval.control = str(tmp_path / "nowhere")
    assert "nowhere" in control_of(mine, {})["why"]
