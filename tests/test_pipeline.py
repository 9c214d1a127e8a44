"""The whole run on the tiny model: complete, repeatable, resumable; and once on the real model."""

import dataclasses
import json

import pytest
import torch

import replace.pipeline as pipeline
from eval.metrics import read_metrics
from eval.metrics import without_times as figures
from replace import load
from replace.compose import choices, compose
from replace.errors import UserError
from replace.validation import validate

pytestmark = pytest.mark.long
TINY = ["+exp=infini", "model=tiny", "budget=smoke"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    return folder, pipeline.run(compose(TINY), folder)


def test_a_run_leaves_everything_that_it_promises(whole):
    folder, metrics = whole
    assert list(metrics["phases"]) == ["teacher", "swapped", "stage1", "stage2", "stage3"]
    for name in (
        "config.json",
        "provenance.json",
        "metrics.json",
        "train.jsonl",
        "report.md",
        "ranking.json",
    ):
        assert (folder / name).stat().st_size > 0, name
    assert len(list((folder / "plots").glob("*.png"))) >= 4
    assert figures(read_metrics(folder)) == figures(json.loads(json.dumps(metrics)))
    assert len(metrics["replaced"]) == 4
    assert metrics["verdict"]["memory"] in ("used", "harmful", "window-only")
    for name in ("stage1", "stage2", "stage3"):
        training = metrics["phases"][name]["training"]
        assert training["tokens"] > 0
        assert training["skipped_steps"] == training["clamped"] == training["nonfinite"] == 0
    stages = {json.loads(line)["stage"] for line in (folder / "train.jsonl").read_text().splitlines()}
    assert stages == {1, 2, 3}


def test_the_export_is_the_student(whole):
    folder, _ = whole
    model, tokenizer = load(folder)
    output = model.generate(**tokenizer("The", return_tensors="pt"), max_new_tokens=3, do_sample=False)
    assert output.shape[1] > 3 - 1
    assert all(p.isfinite().all() for p in model.parameters())


def test_the_same_command_gives_the_same_figures_though_it_dies_in_every_stage(whole, tmp_path, monkeypatch):
    """Three deaths of one run, each in another stage, and each time it goes on from the one before."""
    _, metrics = whole
    steps = pipeline._stage
    for stage in (1, 2, 3):

        def dying(model, config, number, last=stage):
            made = steps(model, config, number)
            if number == last:
                monkeypatch.setattr(made, "step", _interrupt)
            return made

        monkeypatch.setattr(pipeline, "_stage", dying)
        with pytest.raises(KeyboardInterrupt):
            pipeline.run(compose(TINY), tmp_path / "run")
        assert not (tmp_path / "run" / "report.md").exists()
        reached = read_metrics(tmp_path / "run")["phases"]
        assert list(reached) == ["teacher", "swapped", "stage1", "stage2"][: stage + 1]
    monkeypatch.setattr(pipeline, "_stage", steps)
    again = pipeline.run(compose(TINY), tmp_path / "run")
    assert figures(again) == figures(metrics)
    assert (tmp_path / "run" / "report.md").exists()


def test_the_continued_teacher_is_trained_on_the_same_tokens(tmp_path):
    """One row of its own, on the tokens of stages 2 and 3, beside the teacher and never the student."""
    small = ["budget.stage1.tokens=0", "budget.stage2.tokens=1024", "budget.continued_teacher=true"]
    metrics = pipeline.run(compose([*TINY, *small, "stage.lr_projection2=1e-3"]), tmp_path / "run")
    teacher, continued, last = (metrics["phases"][n] for n in ("teacher", "continued_teacher", "stage3"))
    both = [metrics["phases"][name]["training"]["tokens"] for name in ("stage2", "stage3")]
    assert continued["training"]["tokens"] == sum(both)
    assert "ablation" not in continued
    for book, entry in continued["perplexity"].items():
        assert entry["ppl"] != teacher["perplexity"][book]["ppl"]
        assert len(entry["windows"]) == len(last["perplexity"][book]["windows"])
    assert continued["layer_outputs"][0]["error"] > 0
    assert metrics["test_reads"] == 3
    assert "ablation" in last
    assert "| continued teacher |" in (tmp_path / "run" / "report.md").read_text()
    lines = (tmp_path / "run" / "train.jsonl").read_text().splitlines()
    assert {json.loads(line)["stage"] for line in lines} == {2, 3}


def test_a_stage_with_nothing_to_learn_is_left_out_and_says_so(tmp_path, caplog):
    """Window and sinks alone have no parameters of their own, and the projections are frozen."""
    words = ["attention=sliding_window", "attention.pairs=0", "layers=all", "eval=perplexity"]
    metrics = pipeline.run(compose([*TINY, *words]), tmp_path / "run")
    assert list(metrics["phases"]) == ["teacher", "swapped", "stage1", "stage2", "stage3"]
    idle, reason = metrics["phases"]["stage1"], "has nothing to learn: stage.lr_projection1=0"
    assert idle["training"]["why"].startswith(f"stage 1 (transfer) {reason}")
    assert idle["training"]["tokens"] == 0
    assert idle["training"]["loss_first"] is idle["training"]["loss_last"] is None
    assert "perplexity" not in idle.get("dev", idle), "the model is as it was"
    assert f"stage 1 (transfer) {reason}" in caplog.text
    assert metrics["phases"]["stage2"]["training"]["tokens"] > 0
    report = (tmp_path / "run" / "report.md").read_text()
    assert reason in report
    boxes = {box["box"]: box for box in metrics["checklist"]}
    assert boxes["training is logged"]["passed"]
    assert boxes["training is logged"]["value"].endswith("of 2 stages")
    later = compose([*TINY, *words, f"source={tmp_path / 'run'}", "stages=[2]"])
    again = pipeline.run(later, tmp_path / "later")
    assert again["phases"]["stage2"]["training"] == metrics["phases"]["stage2"]["training"]


def test_a_last_stage_with_nothing_to_learn_is_measured(tmp_path):
    words = ["attention=sliding_window", "attention.pairs=0", "layers=all", "eval=perplexity", "stages=[1]"]
    metrics = pipeline.run(compose([*TINY, *words]), tmp_path / "run")
    assert metrics["phases"]["stage1"]["perplexity"]
    assert metrics["phases"]["stage1"]["training"]["why"]


def _interrupt(batch, scale):
    raise KeyboardInterrupt


def test_a_later_run_takes_stage_1_from_an_earlier_one(whole, tmp_path):
    folder, metrics = whole
    config = compose([*TINY, f"source={folder}", "stages=[2,3]"])
    again = pipeline.run(config, tmp_path / "run")
    assert "stage1" not in again["phases"]
    assert figures(again["phases"]["stage2"]) == figures(metrics["phases"]["stage2"])


def test_a_run_without_stage_1_cannot_be_taken_from_one_that_has_none(tmp_path):
    (tmp_path / "empty").mkdir()
    config = compose(TINY)
    (tmp_path / "empty" / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    config.source, config.stages = str(tmp_path / "empty"), [2]
    with pytest.raises(UserError, match="finished stage 1"):
        pipeline.adopt(torch.nn.Linear(1, 1), config)


def test_nothing_is_taken_over_where_nothing_is_left_to_do(tmp_path):
    """It would export another run's student beside figures of the untrained swap."""
    config = compose(TINY)
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    for words in (
        ["stages=[3]", "budget.stage3.tokens=0"],
        ["stages=[]", "lora=peft", "budget.lora.tokens=0"],
    ):
        with pytest.raises(UserError, match=r"from=.* allowed: nothing, where neither a stage nor a tuning"):
            validate(compose([*TINY, *words, f"source={tmp_path}"]))


@pytest.mark.parametrize("experiment", [name for name in choices("exp") if name != "infini"])
def test_every_experiment_runs(experiment, tmp_path):
    metrics = pipeline.run(compose([f"+exp={experiment}", *TINY[1:]]), tmp_path / "run")
    assert "stage3" in metrics["phases"]
    assert metrics["verdict"]["memory"] in ("used", "harmful", "window-only", None)


def test_the_real_model_in_a_minute(tmp_path):
    """SmolLM2 from the package index, all of the pipeline, `budget=smoke`."""
    metrics = pipeline.run(compose(["+exp=infini", "budget=smoke"]), tmp_path / "run")
    teacher, student = metrics["phases"]["teacher"], metrics["phases"]["stage3"]
    assert any(probe["hit"] for probe in teacher["probes"])
    for book, figure in student["perplexity"].items():
        assert figure["ppl"] < 1.5 * teacher["perplexity"][book]["ppl"]
    assert len(metrics["replaced"]) == 30
