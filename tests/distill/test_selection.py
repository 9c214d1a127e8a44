"""Which layers to replace: planted layers, what is read, what is left alone, and rankings that are reused."""

import dataclasses
import itertools
import json
import math
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import distill.selection as selection
import replace.pipeline as pipeline
from distill.selection import Figures, Trial, greedy, in_place, rank
from eval.sections import pictures, written
from replace.compose import compose
from replace.config import Config, LayersConfig
from replace.convert import SwapSpec, attention_layers
from replace.corpora import Document
from replace.errors import UserError
from replace.loading import Loaded, load_model
from replace.ranking import FILE, baselines, check_ranking, measurements, read_ranking, taken

SMALL = ["+exp=infini", "model=tiny", "budget=smoke", "budget.choice.length=192", "budget.choice.tokens=384"]
AUTO = [*SMALL, "layers=auto", "layers.k=2", "budget.choice.rows=2"]


def document(split: str, seed: int) -> Document:
    words = [
        "the",
        "king",
        "road",
        "house",
        "rain",
        "bread",
        "with",
        "under",
        "said",
        "went",
        "cold",
        "she",
        "it",
    ]
    rng = random.Random(seed)
    lines = (" ".join(rng.choices(words, k=9)).capitalize() + "." for _ in range(150))
    return Document(f"{split} {seed}", " ".join(lines), "own", split)


class Untouchable:
    """A document of which only the split may be asked."""

    def __init__(self, split: str) -> None:
        self.split = split


TEXTS = [document("train", 1), document("dev", 2), Untouchable("test")]


@pytest.fixture
def loaded() -> Loaded:
    return load_model(compose(SMALL).model)


def ranked(loaded: Loaded, *options: str, texts: list = TEXTS) -> dict:
    return rank(loaded.model, loaded.tokenizer, texts, compose([*AUTO, *options]))


def figures(ranking: dict) -> dict:
    return {key: value for key, value in ranking.items() if key != "seconds"}


@pytest.mark.parametrize("search", ["independent", "greedy"])
def test_a_layer_that_does_nothing_is_first_and_one_that_bears_all_is_last(loaded, search):
    by_layer = {module.layer_idx: module for _, module in attention_layers(loaded.model)}
    by_layer[2].o_proj.weight.data.zero_()
    by_layer[1].o_proj.weight.data.mul_(30)
    ranking = ranked(loaded, f"layers.search={search}", "layers.k=3")
    assert ranking["orders"]["independent"][0] == 2
    assert ranking["orders"]["independent"][-1] == 1
    rows = {row["layer"]: row for row in ranking["layers"]}
    assert rows[2]["kl"] == pytest.approx(0, abs=1e-6)
    assert rows[1]["cost"] > 10 * rows[2]["cost"]
    order = ranking["orders"][search]
    assert (order[0], 1 in order[:3]) == (2, False)
    assert set(ranking["orders"]) == {"independent", search}
    sets = {one["name"]: one for one in ranking["sets"]}
    assert set(sets) == {"independent", search, "uniform", "random 1", "random 2", "random 3"}
    assert sets[search]["layers"] == taken(
        ranking, compose([*AUTO, "layers.k=3", f"layers.search={search}"]).layers
    )
    with_one = [one["kl"] for one in sets.values() if 1 in one["layers"]]
    assert all(kl > sets[search]["kl"] for kl in with_one)


def test_nothing_but_the_dev_text_is_measured_on(loaded):
    """Without a transfer not even training text is touched; with another dev text the figures are others."""
    options = ("budget.choice.tokens=0", "layers.compare=false")
    texts = [Untouchable("train"), document("dev", 2), Untouchable("test")]
    ranking = ranked(loaded, *options, texts=texts)
    assert ranking["protocol"]["text"] == "dev"
    assert ranking["sets"] == {"why": "layers.compare=false"}
    other = ranked(loaded, *options, texts=[Untouchable("train"), document("dev", 3), Untouchable("test")])
    assert other["layers"] != ranking["layers"]


def test_retrieval_layers_are_found_on_dev_text_too(loaded):
    texts = [Untouchable("train"), document("dev", 2), Untouchable("test")]
    config = compose([*SMALL, "layers=retrieval"])
    ranking = rank(loaded.model, loaded.tokenizer, texts, config)
    shares = {row["layer"]: row["share"] for row in ranking["layers"]}
    assert ranking["orders"] == {"retrieval": sorted(shares, key=lambda i: -shares[i])}
    assert ranking["protocol"] == {"text": "dev", "episodes": 8, "length": 512}
    without_dev = rank(loaded.model, loaded.tokenizer, [document("train", 2), Untouchable("test")], config)
    assert without_dev["protocol"]["text"] == "train"


def test_the_model_and_the_random_numbers_are_left_as_they_were(loaded):
    model, ids = loaded.model, torch.arange(40).unsqueeze(0)
    next(model.parameters()).requires_grad_(False)
    trained = {name: p.requires_grad for name, p in model.named_parameters()}
    before, weights = model(ids).logits, {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    first = ranked(loaded)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(model(ids).logits, before)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trained
    assert all(p.grad is None for p in model.parameters())
    torch.manual_seed(99)  # what was drawn before plays no part
    assert figures(ranked(loaded)) == figures(first)


def test_a_variant_s_random_start_depends_on_the_seed_alone(loaded):
    drawn = []
    for seed in (3, 3, 4):
        torch.rand(len(drawn) + 1)
        with selection._left_alone(loaded.model, seed):
            drawn.append(torch.rand(3).tolist())
    assert drawn[0] == drawn[1] != drawn[2]


def test_the_divergence_is_that_of_the_whole_logits(loaded):
    config = compose(AUTO)
    trial = Trial(loaded.model, loaded.tokenizer, TEXTS[:2], config)
    assert trial.teacher.kl == pytest.approx(0, abs=1e-7)
    layers = trial.transferred(SwapSpec({1: config.attention, 3: config.attention}))
    assert any(not torch.equal(p, torch.zeros_like(p)) for p in layers[1].mixer.score.parameters())
    found = trial.measure(layers)
    wanted = []
    for row in trial.rows:
        with torch.no_grad():
            p = loaded.model(row[None]).logits[0, :-1].log_softmax(-1)
            with in_place(loaded.model, layers):
                q = loaded.model(row[None]).logits[0, :-1].log_softmax(-1)
        wanted.append(float((p.exp() * (p - q)).sum(-1).mean()))
    assert found.kl == pytest.approx(sum(wanted) / 2, rel=1e-3)
    assert found.kl_error == pytest.approx(abs(wanted[0] - wanted[1]) / 2, rel=1e-3)


def test_lost_needles_count_and_won_ones_do_not(loaded, monkeypatch):
    """Layer 0 has the smallest KL and loses all needles, layer 1 wins some, layer 2 diverges."""
    told = {(): (0.0, 0.5), (0,): (0.1, 0.0), (1,): (0.3, 1.0), (2,): (math.nan, 0.5), (3,): (0.2, 0.5)}
    monkeypatch.setattr(Trial, "measure", lambda self, layers: Figures(*_with_error(told[tuple(layers)])))
    options = ("layers.compare=false", "budget.choice.tokens=0")
    assert ranked(loaded, *options)["orders"]["independent"] == [3, 1, 0, 2]
    ranking = ranked(loaded, *options, "layers.recall_weight=0")
    assert ranking["orders"]["independent"] == [0, 3, 1, 2]
    assert [row["cost"] for row in ranking["layers"]] == [0.1, 0.3, math.inf, 0.2]


def _with_error(pair: tuple[float, float]) -> tuple[float, None, float]:
    return pair[0], None, pair[1]


# The search


def test_greedy_sees_what_two_layers_cost_together():
    """0 and 1 each stand in for the other: alone both are cheap, together they are not."""
    alone = {0: 1.0, 1: 1.1, 2: 1.5, 3: 4.0}

    def cost(chosen):
        return sum(alone[i] for i in chosen) + 10 * ({0, 1} <= set(chosen))

    order = greedy(cost, list(alone), 2)
    assert order == [0, 2]
    assert cost(order) < cost([0, 1])  # the independent choice


@given(st.data())
def test_greedy_picks_no_layer_twice(data):
    count = data.draw(st.integers(1, 7))
    k = data.draw(st.integers(1, count))
    rng = random.Random(data.draw(st.integers(0, 99)))
    order = greedy(lambda chosen: rng.choice([0.0, 1.0]), range(count), k)
    assert len(set(order)) == len(order) == k


def test_baselines_depend_on_the_seed_alone():
    indices = list(range(30))
    assert baselines(indices, 3, 0)["uniform"] == [5, 15, 25]
    assert baselines(indices, 8, 1) == baselines(indices, 8, 1) != baselines(indices, 8, 2)
    drawn = [tuple(chosen) for chosen in baselines(indices, 8, 0).values()]
    assert len(set(drawn)) == 4
    for k in (1, 7, 30):
        assert all(len(set(chosen)) == k for chosen in baselines(indices, k, 0).values())


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["layers=auto", "layers.k=8"], (30 + 5, 1)),
        (["layers=auto", "layers.k=8", "layers.compare=false"], (30, 1)),
        (["layers=auto", "layers.k=3", "layers.search=greedy"], (30 + 29 + 28 + 5, 1)),
        (["layers=retrieval"], (0, 0)),
        (["layers=retrieval", "layers.compare=true"], (5, 5)),
        (["layers=all"], (0, 0)),
        (["layers=auto", "layers.ranking=run"], (0, 0)),
    ],
)
def test_the_number_of_measurements_is_known_beforehand(options, expected):
    assert measurements(compose(options).layers, 30) == expected


# Rankings that are kept


@pytest.fixture
def kept(loaded, monkeypatch, tmp_path):
    """`choose` of a run, with a cache of its own; returns a function of folder and options."""
    monkeypatch.setenv("LAYER_REPLACE_CACHE", str(tmp_path / "cache"))

    def choose(folder: str, *options: str) -> tuple[list[int], dict]:
        config = compose([*AUTO, *options])
        spec = pipeline.choose(config, loaded, TEXTS, tmp_path / folder)
        return list(spec.layers), json.loads((tmp_path / folder / FILE).read_text())

    return choose


class Killed(BaseException):
    """Nothing may catch it."""


def _never(*_: object) -> None:
    raise Killed


def test_a_ranking_is_made_once(kept, monkeypatch, tmp_path):
    measure = Trial.measure
    monkeypatch.setattr(
        Trial, "measure", lambda self, layers: measure(self, layers) if not layers else _never()
    )
    with pytest.raises(Killed):
        kept("killed")
    assert not (tmp_path / "killed" / FILE).exists()
    monkeypatch.setattr(Trial, "measure", measure)
    layers, ranking = kept("killed")
    assert layers == sorted(ranking["orders"]["independent"][:2])
    monkeypatch.setattr(pipeline, "rank", _never)
    # What the run's own file says is taken, whatever a new measurement would say.
    turned = ranking | {"orders": {"independent": ranking["orders"]["independent"][::-1]}}
    (tmp_path / "killed" / FILE).write_text(json.dumps(turned))
    assert kept("killed")[0] == sorted(turned["orders"]["independent"][:2])
    # Another run takes what it is told to, or what was measured of the same model, text and options.
    for option in (f"layers.ranking={tmp_path}/killed", f"layers.ranking={tmp_path}/killed/{FILE}"):
        assert kept(f"{len(option)}", option)[1] == turned
    assert kept("from", f"source={tmp_path}/killed")[1] == turned
    assert kept("another") == (layers, ranking)
    for option in ("seed=1", "attention.sinks=2", "budget.choice.rows=1", "layers.recall_weight=2"):
        with pytest.raises(Killed):
            kept("fresh", option)


def test_a_run_goes_on_with_its_own_random_numbers(kept):
    torch.manual_seed(5)
    kept("measured")
    after = torch.rand(3)
    torch.manual_seed(5)
    kept("cached")
    assert torch.equal(torch.rand(3), after)


RANKING = {
    "version": 1, "select": "auto", "k": 2,
    "orders": {"independent": [3, 0, 1, 2], "greedy": [3, 1]},
    "layers": [{"layer": i} for i in range(4)],
}  # fmt: skip


@pytest.mark.parametrize(
    ("options", "count", "said"),
    [
        ({"select": "retrieval"}, 4, "layers.ranking='run' .*allowed: a ranking of layers=retrieval"),
        ({"k": 3, "search": "greedy"}, 4, "layers.k=3 .*allowed: 1 to 2"),
        ({}, 3, "layers.ranking='run' .*a model with 3 layers"),
        ({"search": "other"}, 4, "layers.search='other' .*independent, greedy"),
    ],
)
def test_a_ranking_that_does_not_fit_is_refused(options, count, said):
    layers = dataclasses.replace(LayersConfig("auto", k=2, ranking="run"), **options)
    with pytest.raises(UserError, match=said):
        check_ranking(RANKING, layers, count)


def test_a_ranking_gives_its_best_layers():
    layers = LayersConfig("auto", k=3, ranking="run")
    check_ranking(RANKING, layers, 4)
    assert taken(RANKING, layers) == [0, 1, 3]
    assert taken(RANKING, dataclasses.replace(layers, k=2, search="greedy")) == [1, 3]
    with pytest.raises(UserError, match=r"layers\.k=4 .*1 to 3, fewer than"):
        taken(RANKING, dataclasses.replace(layers, k=4))
    best = {"select": "retrieval", "orders": {"retrieval": [2, 0, 1]}, "layers": RANKING["layers"][:3]}
    assert taken(best, LayersConfig("retrieval", k=9)) == [0, 1, 2]


@pytest.mark.parametrize(
    "content",
    ["{", "[]", '{"version": 2}', json.dumps(RANKING | {"orders": {"independent": [3, 3]}}),
     json.dumps(RANKING | {"orders": {"independent": [7]}}), json.dumps(RANKING | {"orders": {}})],
)  # fmt: skip
def test_a_file_that_is_no_ranking_is_refused(content, tmp_path):
    (tmp_path / FILE).write_text(content)
    with pytest.raises(UserError, match=r"layers\.ranking=.*allowed: a ranking\.json"):
        read_ranking(tmp_path)


# The report


def shown(ranking: dict, config: Config) -> str:
    phases = {"teacher": {"choice": ranking | {"taken": taken(ranking, config.layers)}}, "swapped": {}}
    for draw in pictures(phases).values():
        assert len(draw().axes) == (1 if isinstance(ranking["sets"], dict) else 2)
    (section,) = written(phases, {"choice.png": None})
    assert section.startswith("## Choice of layers\n")
    lines = section.splitlines()
    widths = [(a.count("|"), b.count("|")) for a, b in itertools.pairwise(lines)]
    assert all(a == b for a, b in widths if a and b)
    return section


def test_the_report_shows_ranking_and_baselines(loaded):
    config = compose([*AUTO, "layers.search=greedy"])
    ranking = ranked(loaded, "layers.search=greedy")
    section = shown(ranking, config)
    for name in ("independent", "greedy", "uniform", "random 1"):
        assert f"| {name} | " in section
    assert "needles of 192 tokens in dev text, after a transfer of 384 tokens" in section
    assert "no test text was read" in section
    first = ranking["orders"]["independent"][0]
    assert f"| {first} | " in section
    nothing = {"kl": None, "kl_error": None, "cost": None}
    rows = [row | nothing if row["layer"] == 1 else row for row in ranking["layers"]]
    assert "| – | – |" in shown(ranking | {"layers": rows}, config)


def test_retrieval_is_compared_in_the_same_form(loaded):
    """Each set is trained with the others' variant around it."""
    options = ["layers=retrieval", "layers.k=1", "layers.compare=true"]
    config = compose([*SMALL, *options])
    ranking = rank(loaded.model, loaded.tokenizer, TEXTS, config)
    assert [one["name"] for one in ranking["sets"]] == [
        "retrieval",
        "uniform",
        *(f"random {i}" for i in (1, 2, 3)),
    ]
    assert all(one["kl"] > 0 for one in ranking["sets"])
    section = shown(ranking, config)
    assert "| retrieval | " in section
    plain = ranking | {"sets": {"why": "layers.compare=false"}}
    assert "not measured: layers.compare=false" in shown(plain, config)


def test_the_cost_is_logged_beforehand(loaded, caplog):
    caplog.set_level("INFO")
    ranking = ranked(loaded)
    lines = [record.getMessage() for record in caplog.records if record.name == selection.__name__]
    assert "9 measurements of 576 tokens" in lines[0]
    assert "transfer of 384: about" in lines[0]
    assert ranking["seconds"]["foreseen"] > 0


def test_a_run_keeps_the_ranking_in_its_folder_and_report(loaded, tmp_path, monkeypatch):
    """Not a whole run: all that follows the choice ends it."""
    seen = {}
    monkeypatch.setattr(pipeline, "load_documents", lambda _: TEXTS[:2])
    monkeypatch.setattr(pipeline, "measure", lambda *_, **__: {})
    monkeypatch.setattr(pipeline, "keep_teacher", lambda *_: None)

    def swap(model, spec, **_: object) -> None:
        seen["layers"] = list(spec.layers)
        raise Killed

    monkeypatch.setattr(pipeline, "swap", swap)
    monkeypatch.setattr(pipeline, "write_metrics", lambda _, metrics: seen.update(metrics))
    with pytest.raises(Killed):
        pipeline.run(compose(AUTO), tmp_path)
    choice = seen["phases"]["teacher"]["choice"]
    assert choice["taken"] == seen["layers"] == taken(read_ranking(Path(tmp_path)), compose(AUTO).layers)
    assert "choice" in seen["wall_seconds"]
