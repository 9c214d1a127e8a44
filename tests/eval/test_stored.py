"""A result is found again for the same model, code, options and text, and for nothing else."""

import copy
import json
import random
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from eval import stored
from eval.niah import recall
from eval.stored import Store, Unknown, content, keeping, kept
from replace.config import AttentionConfig, Config, ModelConfig
from replace.convert import SwapSpec, swap
from replace.episodes import Episode
from replace.loading import load_model


class Plain(nn.Module):
    """The least that has a config and weights."""

    class config:
        _attn_implementation = "eager"

        @staticmethod
        def to_dict():
            return {"layers": 1, "_name_or_path": random.random()}

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.arange(4.0))
        self.off = frozenset()


@pytest.fixture
def calls():
    return []


@pytest.fixture
def measurement(calls):
    @kept
    def total(model, text, *, power=1, label=""):
        calls.append(text)
        return {"sum": float((model.weight**power).sum().detach()), "length": len(text)}

    return total


def measured(measurement, model, folder, *arguments, about=None, **keywords):
    """The result through a store of its own, and how often it was taken from it."""
    store = Store(folder)
    with keeping(store, model, about or {}):
        result = measurement(model, *arguments, **keywords)
    return result, len(store.taken)


def test_a_rerun_computes_nothing(measurement, calls, tmp_path):
    first = measured(measurement, Plain(), tmp_path, "text", label="once")
    again = measured(measurement, Plain(), tmp_path, "text", label="again")
    assert first == ({"sum": 6.0, "length": 4}, 0)
    assert again == ({"sum": 6.0, "length": 4}, 1)
    assert calls == ["text"]


@pytest.mark.parametrize(
    "change", ["weights", "option", "text", "off", "config", "arithmetic", "code", "buffer"]
)
def test_whatever_a_figure_follows_from_is_in_its_key(measurement, calls, tmp_path, monkeypatch, change):
    model, options, text = Plain(), {"power": 1}, "text"
    measured(measurement, model, tmp_path, text, **options)
    if change == "weights":
        model.weight.data[0] = 1e-3
    elif change == "buffer":
        model.register_buffer("more", torch.zeros(()))
    elif change == "option":
        options["power"] = 2
    elif change == "text":
        text = "texts" * 100
        measured(measurement, model, tmp_path, text[:-1] + "x", **options)
    elif change == "off":
        model.off = frozenset({"memory"})
    elif change == "config":
        monkeypatch.setattr(Plain.config, "to_dict", lambda: {"layers": 2})
    elif change == "code":
        monkeypatch.setattr(stored, "code_hash", lambda module: "other")
    before = len(calls)
    if change == "arithmetic":
        with torch.autocast("cpu", dtype=torch.bfloat16):
            measured(measurement, model, tmp_path, text, **options)
    else:
        measured(measurement, model, tmp_path, text, **options)
    assert len(calls) == before + 1


def test_cache_false_measures_anew_and_keeps_it(measurement, calls, tmp_path):
    measured(measurement, Plain(), tmp_path, "text")
    store = Store(tmp_path, read=False)
    with keeping(store, model := Plain(), {}):
        measurement(model, "text")
    assert store.made == ["total"]
    assert len(calls) == 2
    assert measured(measurement, Plain(), tmp_path, "text")[1] == 1


def test_outside_and_for_another_model_nothing_is_kept(measurement, calls, tmp_path):
    measurement(Plain(), "text")
    store = Store(tmp_path)
    with keeping(store, Plain(), {}):
        measurement(Plain(), "text")
    assert calls == ["text", "text"]
    assert not list(tmp_path.iterdir())


def test_a_damaged_result_is_measured_again(measurement, calls, tmp_path):
    measured(measurement, Plain(), tmp_path, "text")
    (file,) = tmp_path.iterdir()
    file.write_text(file.read_text()[:-3])
    assert measured(measurement, Plain(), tmp_path, "text")[1] == 0
    assert json.loads(file.read_text())["value"]["sum"] == 6.0


def test_a_folder_that_cannot_be_written_costs_a_warning_only(measurement, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    result, _ = measured(measurement, Plain(), tmp_path / "file" / "x", "text")
    assert result["sum"] == 6.0
    assert "is not kept" in caplog.text


def test_the_same_result_comes_back_from_the_cache_as_at_first(tmp_path):
    @kept
    def odd(model):
        return {1: (1, 2), "not finite": float("nan")}

    results = [measured(odd, Plain(), tmp_path)[0] for _ in range(2)]
    assert results[0] == results[1] == {"1": [1, 2], "not finite": None}


def test_what_cannot_be_hashed_is_not_kept(calls, tmp_path):
    @kept
    def judged(model, judge):
        calls.append(judge)
        return judge()

    for _ in range(2):
        assert measured(judged, Plain(), tmp_path, lambda: 3) == (3, 0)
    assert len(calls) == 2
    with pytest.raises(Unknown, match="object"):
        content({"a": [object()]})


def test_a_measurement_of_its_own_items_depends_on_all_text(calls, tmp_path):
    @dataclass
    class Items:
        books: dict
        make: object = calls.append

    @kept
    def own(model, tokenizer, config, using):
        calls.append(1)
        return {"figure": 1}

    config = Config()
    for about in ({"data": "a"}, {"data": "b"}, {"data": "b"}):
        measured(own, Plain(), tmp_path, None, config, Items({"x": "y" * 300}), about=about)
    assert len(calls) == 2
    config = copy.deepcopy(config)
    config.budget.eval.episodes += 1
    measured(own, Plain(), tmp_path, None, config, Items({"x": "y" * 300}), about={"data": "b"})
    assert len(calls) == 3
    config.seed, config.eval.name, config.eval.more = 7, "other", ["a", "b"]
    measured(own, Plain(), tmp_path, None, config, Items({"x": "y" * 300}), about={"data": "b"})
    assert len(calls) == 3


def test_a_file_that_an_option_names_counts_by_what_is_in_it(tmp_path):
    items = tmp_path / "items.jsonl"
    hashes = []
    for text in ("one", "two"):
        items.write_text(text)
        paths = list(stored._paths({"tasks": ["word", str(items)], "folder": f"{tmp_path}/"}))
        assert paths == [items, tmp_path]
        hashes.append([content(path) for path in paths])
    assert hashes[0][0] != hashes[1][0]
    assert hashes[0][1] != hashes[1][1]


def test_a_vocabulary_and_tensors_count_by_content(tiny):
    changed = copy.deepcopy(tiny.tokenizer)
    changed.add_tokens(["<new>"])
    assert content(tiny.tokenizer) == content(copy.deepcopy(tiny.tokenizer))
    assert content(tiny.tokenizer) != content(changed)
    assert content(torch.zeros(2)) != content(torch.zeros(2, 1))
    assert content(torch.zeros(2)) != content(torch.zeros(2, dtype=torch.int32))


def test_episodes_are_told_apart_and_so_are_switched_off_parts(tmp_path):
    """The real thing: recall of a swapped model, by episode, with the memory on and off."""
    model = load_model(ModelConfig(kind="tiny")).model
    options = AttentionConfig(block=16, window=16, pairs=0, sinks=2, distance_cap=64)
    swap(model, SwapSpec({1: options}))
    fields = {"needle": slice(0, 4), "depth": 0.5, "kind": "passkey", "haystack": "novel", "phrasing": 0}
    names = Episode.__dataclass_fields__
    given = {name: fields.get(name, 0) for name in names}

    def episode(seed):
        ids = torch.randint(3, 500, (48,), generator=torch.Generator().manual_seed(seed))
        return Episode(**given | {"input_ids": ids, "answer": slice(44, 48)})

    store = Store(tmp_path)
    with keeping(store, model, {}):
        first = recall(model, [episode(0)])
        assert recall(model, [episode(0)]) == first
        assert len(store.taken) == 1
        recall(model, [episode(1)])
        for module in model.modules():
            if isinstance(getattr(module, "off", None), frozenset):
                module.off = frozenset({"memory"})
        recall(model, [episode(0)])
    assert len(store.made) == 3


def test_code_counts_with_all_that_it_imports():
    assert stored.code_hash("eval.perplexity") != stored.code_hash("eval.probes")
    assert stored.code_hash("eval.perplexity") == stored.code_hash("eval.perplexity")
    here = stored._file_of("eval.niah")
    assert here is not None
    assert "eval.intervals" in set(stored._imports(here))
    assert stored._file_of("eval.measurements").name == "__init__.py"
    assert stored._file_of("replace.mixer") is None  # counted with its whole room
