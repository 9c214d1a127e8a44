"""The comparison reads what was measured, pairs what is the same, and names what is missing."""

import copy
import dataclasses
import json
import math

import pytest

from eval.compare import Item, compare, figures_of, find_items, render, write_comparison
from eval.intervals import clopper_pearson, paired_difference
from eval.metrics import write_metrics
from replace.config import AttentionConfig, Config
from replace.errors import UserError

ITEMS = {"data": "d", "vocabulary": "v", "clear": 64}


def item(metrics, name="run", config=None, items=ITEMS):
    metrics = copy.deepcopy(metrics)
    if items is not None:
        metrics["items"] = items
    return Item(name, None, metrics, config)


def worse(run, factor=1.1, misses=8):
    """The run with a higher perplexity and some hits turned into misses."""
    other = copy.deepcopy(run)
    phase = other["phases"]["stage3"]
    for entry in phase["perplexity"].values():
        entry["ppl"] *= factor
        for window in entry["windows"]:
            window["nll"] += window["tokens"] * math.log(factor)
    hits = [(cell, index) for cell in phase["passkey"]["cells"] for index in range(cell["episodes"])]
    for cell, index in hits[:misses]:
        cell["hits"][index] = 0
    return other


def row(table, name):
    (found,) = [row for row in table["rows"] if row["figure"] == name]
    return found["cells"]


BOOK = "perplexity, The Voyage Out"
KEYS = "recall, pass key, 1,024 tokens"


def test_the_same_run_twice_differs_in_nothing(run):
    table = compare([item(run), item(run)])
    for line in table["rows"]:
        difference = line["cells"][1]["difference"]
        assert difference["value"] == pytest.approx(0), line["figure"]
        assert not difference["clear"]


def test_perplexities_are_paired_by_window(run):
    first, other = row(compare([item(run), item(worse(run))]), BOOK)
    assert first["difference"] is None
    assert first["interval"] == run["phases"]["stage3"]["perplexity"]["The Voyage Out"]["interval"]
    gap = other["difference"]
    assert gap["paired"]
    assert gap["relative"]
    assert gap["value"] == pytest.approx(0.1)
    assert gap["interval"] == pytest.approx([0.1, 0.1])  # each window lost the same
    assert gap["clear"]


def test_rates_have_exact_intervals_and_pair_by_episode(run):
    first, other = row(compare([item(run), item(worse(run))]), KEYS)
    hits = [
        hit
        for cell in run["phases"]["stage3"]["passkey"]["cells"]
        if cell["length"] == 1024 and not cell["distractors"]
        for hit in cell["hits"]
    ]
    assert first["value"] == pytest.approx(sum(hits) / len(hits))
    assert first["interval"] == clopper_pearson(sum(hits), len(hits))
    lost = round((first["value"] - other["value"]) * len(hits))
    changed = [1] * len(hits), [0] * lost + [1] * (len(hits) - lost)
    want = paired_difference(changed[1], changed[0])
    assert other["difference"]["interval"] == pytest.approx(want["interval"])
    assert other["difference"]["p"] == pytest.approx(want["p"])


@pytest.mark.parametrize(
    ("change", "perplexity", "rate"),
    [
        ({"data": "other"}, False, False),
        ({"vocabulary": "other"}, False, False),
        ({"clear": 160}, True, False),  # other episodes, but the same windows
    ],
)
def test_other_items_are_not_paired(run, change, perplexity, rate):
    table = compare([item(run), item(worse(run), items=ITEMS | change)])
    assert row(table, BOOK)[1]["difference"]["paired"] is perplexity
    assert row(table, KEYS)[1]["difference"]["paired"] is rate
    wide, narrow = (
        row(compare([item(run), item(worse(run), items=items)]), KEYS)[1]["difference"]["interval"]
        for items in (ITEMS | {"clear": 160}, ITEMS)
    )
    assert wide[0] < narrow[0]
    wide, narrow = (
        row(compare([item(run), item(worse(run), items=items)]), BOOK)[1]["difference"]["interval"]
        for items in (ITEMS | {"data": "other"}, ITEMS)
    )
    assert wide[1] - wide[0] > 0.05 > narrow[1] - narrow[0]
    assert row(table, "language probes")[1]["difference"]["paired"]
    assert "†" in render(table, "x")


def test_an_older_run_is_known_by_its_config(run):
    one, other = Config(), Config()
    other.attention.window = 128
    table = compare([item(run, "a", one, None), item(run, "b", other, None)])
    assert row(table, BOOK)[1]["difference"]["paired"]
    assert not row(table, KEYS)[1]["difference"]["paired"]
    table = compare([item(run, "a", one, None), item(run, "b", None, None)])
    assert not row(table, BOOK)[1]["difference"]["paired"]


def seeded(run, seed, factor):
    metrics = worse(run, factor, misses=0)
    metrics["seed"] = seed
    config = Config(seed=seed, source=f"run {seed}")
    return item(metrics, f"seed {seed}", config)


def test_runs_that_differ_in_the_seed_only_are_one_column(run):
    control = Config()
    control.attention.name = "linear"
    runs = [seeded(run, seed, factor) for seed, factor in ((1, 1.0), (2, 1.02), (3, 1.04))]
    table = compare([*runs, item(worse(run, 1.2), "other", control)])
    assert [len(column["runs"]) for column in table["columns"]] == [3, 1]
    assert table["columns"][0]["seeds"] == [1, 2, 3]
    assert "3 seeds: 1, 2, 3" in table["columns"][0]["name"]
    base = run["phases"]["stage3"]["perplexity"]["The Voyage Out"]["ppl"]
    first, other = row(table, BOOK)
    assert first["value"] == pytest.approx(base * (1.0 * 1.02 * 1.04) ** (1 / 3))
    assert first["std"] == pytest.approx(base * 0.02, rel=1e-6)
    assert first["runs"] == 3
    assert other["difference"]["paired"]
    assert other["difference"]["value"] == pytest.approx(1.2 / (1.0 * 1.02 * 1.04) ** (1 / 3) - 1)
    text = render(table, "x")
    assert f"{first['value']:.2f} ± {first['std']:.2f} [" in text
    assert "standard deviation over the runs" in text


def test_columns_of_one_experiment_are_told_apart_by_their_options(run):
    def of(pairs, seed):
        config = dataclasses.replace(Config(), seed=seed, attention=AttentionConfig(pairs=pairs))
        return item(seeded(run, seed, 1.0).metrics, config=config)

    table = compare([of(pairs, seed) for pairs in (0, 16) for seed in (1, 2)])
    first, other = (column["name"] for column in table["columns"])
    assert first == other.replace("attention.pairs=16", "attention.pairs=0")
    assert first.endswith("(2 seeds: 1, 2), attention.pairs=0")


def test_the_same_seed_twice_is_no_second_draw(run):
    table = compare([seeded(run, 1, 1.0), seeded(run, 1, 1.1)])
    assert [len(column["runs"]) for column in table["columns"]] == [1, 1]
    names = [column["name"] for column in table["columns"]]
    assert len(set(names)) == 2


def test_what_one_has_not_is_named(run):
    other = copy.deepcopy(run)
    del other["phases"]["stage3"]["perplexity"]["The Voyage Out"]
    table = compare([item(run), item(other)])
    cell = row(table, BOOK)[1]
    assert cell["value"] is None
    assert cell["why"]
    assert BOOK in table["columns"][1]["missing"]
    text = render(table, "python -m eval compare=x")
    assert f"not in its metrics.json: {BOOK}" in text
    assert "not measured: not in its metrics.json" in text
    assert "`python -m eval compare=x`" in text


def test_results_of_any_measurement_are_compared_by_their_shape(run):
    phase = run["phases"]["stage3"]
    phase["lm_eval"] = {
        "piqa": {"accuracy": 0.6, "stderr": 0.01, "episodes": 100},
        "boolq": [{"task": "a", "hits": [1, 0, 1]}, {"task": "b", "hits": [1, 1, 1]}],
    }
    phase["streaming"] = {"ppl": 20.0, "windows": [{"nll": 3.0, "tokens": 1}, {"nll": 2.9, "tokens": 1}]}
    phase["heat"] = {"gates": [[0.1, 0.2], [0.3, 0.4]], "why": "words"}
    found = dict(figures_of(phase))
    assert found["lm eval, piqa"].interval == pytest.approx([0.5804, 0.6196])
    assert found["lm eval, boolq, task a"].units == {0: 1, 1: 0, 2: 1}
    assert found["streaming"].kind == "perplexity"
    assert not [name for name in found if name.startswith("heat")]


def test_folders_are_told_apart(run, tmp_path):
    """A run, an evaluation, a folder of runs, a model; evaluations inside a run are not runs of their own."""
    for name in ("sweep/0", "sweep/1", "alone"):
        place = tmp_path / name
        write_metrics(place, run)
        (place / "config.json").write_text(json.dumps(dataclasses.asdict(Config(seed=len(name)))))
    extra = copy.deepcopy(run)
    extra["phases"]["stage3"]["more"] = {"value": 1.0}
    write_metrics(tmp_path / "alone" / "eval", extra)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
    items = find_items([str(tmp_path / name) for name in ("sweep", "alone", "model")])
    assert [one.name for one in items] == [
        str(tmp_path / name) for name in ("sweep/0", "sweep/1", "alone", "model")
    ]
    assert items[2].config == Config(seed=len("alone"))
    assert items[2].metrics["phases"]["stage3"]["more"] == {"value": 1.0}
    assert items[3].metrics is None
    assert find_items(["smollm2"])[0].metrics is None


def test_a_folder_without_runs_and_a_run_without_figures_are_refused(tmp_path):
    with pytest.raises(UserError, match="compare="):
        find_items([str(tmp_path)])
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(Config())))
    with pytest.raises(UserError, match=r"metrics\.json"):
        find_items([str(tmp_path)])
    with pytest.raises(UserError, match="one or more"):
        find_items([])


def test_both_files_are_written_and_whole(run, tmp_path):
    path = write_comparison(tmp_path, compare([item(run), item(worse(run))]), "python -m eval compare=[a,b]")
    table = json.loads((tmp_path / "compare.json").read_text())
    assert table["schema"] == 1
    lines = [line for line in path.read_text().splitlines() if line.startswith("|")]
    assert {line.count("|") for line in lines} == {4}
    assert any("verdict, retained pairs" in line for line in lines)
    assert any("**+10.0%" in line for line in lines)
