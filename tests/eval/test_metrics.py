"""metrics.json keeps its schema, and never holds a number that is none."""

import json
import math
import shutil
from pathlib import Path

import pytest

from eval.metrics import MIGRATIONS, SCHEMA, clean, new_metrics, problems, read_metrics, write_metrics
from eval.report import write_report
from replace.errors import UserError


def test_round_trip(run, tmp_path):
    write_metrics(tmp_path, run)
    assert read_metrics(tmp_path) == json.loads(json.dumps(run))
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.json"]


def test_the_keys_of_the_schema_are_there(run):
    """Scripts and sweeps read these (design 01)."""
    for key in (
        "schema",
        "model",
        "attention",
        "layers",
        "seed",
        "device",
        "wall_seconds",
        "phases",
        "recovery",
    ):
        assert key in run
    last = run["phases"]["stage3"]
    assert {
        "perplexity",
        "probes",
        "niah",
        "passkey",
        "ablation",
        "speed",
        "layer_outputs",
        "training",
    } <= set(last)
    assert set(last["ablation"]) == {"memory_off", "pairs_off", "memory_and_pairs_off"}
    assert {"memory", "pairs", "memory_and_pairs"} <= set(run["verdict"])
    assert run["schema"] == SCHEMA


def test_what_is_not_finite_becomes_null(tmp_path):
    assert clean({"a": [math.nan, 1.0, (math.inf,)], 2: "x"}) == {"a": [None, 1.0, [None]], "2": "x"}
    metrics = new_metrics(model="m", attention=None, layers=[], seed=0, device="cpu")
    metrics["phases"]["teacher"] = {"layer_outputs": [{"layer": 0, "mean": math.nan}]}
    write_metrics(tmp_path, metrics)
    assert read_metrics(tmp_path)["phases"]["teacher"]["layer_outputs"][0]["mean"] is None


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda m: m.update(schema=7), "schema is 7"),
        (lambda m: m.pop("seed"), "seed is missing"),
        (lambda m: m["phases"].update(stage9={}), "phases.stage9"),
        (
            lambda m: m["phases"]["stage1"]["perplexity"]["The Voyage Out"].update(ppl=None),
            "neither a figure nor a why",
        ),
        (lambda m: m["phases"]["stage1"]["niah"]["cells"][0]["hits"].pop(), "hits of 2"),
        (
            lambda m: m["phases"]["stage3"]["ablation"]["pairs_off"]["passkey"]["cells"][0]["hits"].pop(),
            "pairs_off",
        ),
    ],
)
def test_what_does_not_follow_the_schema_is_not_written(run, tmp_path, change, word):
    change(run)
    assert any(word in problem for problem in problems(run))
    with pytest.raises(ValueError, match=word.split(".")[0]):
        write_metrics(tmp_path, run)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [None, "{", "[]", '{"schema": 1}', '{"schema": 2, "phases": {}}'])
def test_an_unreadable_file_is_one_sentence(tmp_path, content):
    if content is not None:
        (tmp_path / "metrics.json").write_text(content)
    with pytest.raises(UserError):
        read_metrics(tmp_path)


STORED = Path(__file__).with_name("schema_1.json")


def test_a_run_of_an_earlier_schema_is_read_and_reported(tmp_path):
    """Part of a run of schema 1, as it was written: its experiment stands where the variant does now."""
    shutil.copy(STORED, tmp_path / "metrics.json")
    old, new = json.loads(STORED.read_text()), read_metrics(tmp_path)
    assert (old["schema"], old["attention"], new["schema"]) == (1, "infini_paper", SCHEMA)
    assert (new["experiment"], new["attention"]) == ("infini_paper", "infini")
    assert new["phases"] == old["phases"]
    assert (tmp_path / "metrics.json").read_bytes() == STORED.read_bytes(), "the record stays as it is"
    write_report(tmp_path)
    assert "`infini_paper` / `infini`" in (tmp_path / "report.md").read_text()
    write_metrics(tmp_path, new)
    assert read_metrics(tmp_path) == new


@pytest.mark.parametrize(
    ("attention", "variants", "experiment", "now"),
    [
        ("infini", ["infini", "sliding_window", "sliding_window"], "infini", "infini"),
        ("linear_alone", ["linear"], "linear_alone", "linear"),
        ("custom", ["linear", "sliding_window", "sliding_window"], "custom", "sliding_window"),
        ("infini", [], "infini", "infini"),
        (None, [], None, None),
    ],
)
def test_the_variant_of_an_earlier_schema(tmp_path, attention, variants, experiment, now):
    metrics = new_metrics(model="m", attention=attention, layers=[], seed=0, device="cpu")
    metrics |= {"schema": 1, "replaced": [{"variant": variant} for variant in variants]}
    del metrics["experiment"]
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    read = read_metrics(tmp_path)
    assert (read["experiment"], read["attention"]) == (experiment, now)
    metrics |= {"experiment": "mine"}  # of the last runs of schema 1, which had both
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    assert read_metrics(tmp_path)["attention"] == attention


def test_every_earlier_schema_leads_to_this_one():
    assert set(MIGRATIONS) == set(range(1, SCHEMA))


def test_a_later_schema_is_refused_by_its_number(run, tmp_path):
    (tmp_path / "metrics.json").write_text(json.dumps(run | {"schema": SCHEMA + 1}))
    with pytest.raises(UserError, match=f"schema is {SCHEMA + 1} and should be {SCHEMA}"):
        read_metrics(tmp_path)
