"""Weights & Biases: what arrives there, offline, in the folder of the run."""

import json

import pytest

from replace import pipeline
from replace.__main__ import main
from replace.compose import compose
from replace.errors import UserError
from replace.logger import WandbLogger, continuations, gates, open_logger, report_refusal

TINY = ["+exp=infini", "model=tiny", "budget=smoke", "logger=wandb"]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """No key, no mode and no agent of whoever runs the tests."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_SWEEP_ID", "WANDB_RUN_ID", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(WandbLogger, "begun", False)


def test_a_run_arrives_whole(tmp_path, summaries):
    config = compose([*TINY, "stages=[1]", "budget.stage1.tokens=512", "eval.more=[inside]"])
    metrics = pipeline.run(config, tmp_path)
    (summary,) = summaries(tmp_path)
    assert summary["objective"] == pytest.approx(metrics["objective"])
    assert summary["verdict"] == metrics["verdict"]["called"]
    assert summary["continuations.nrows"] == len(continuations(metrics["phases"])) > 0
    assert {"report/recall.path", "report/perplexity.path"} <= set(summary)
    assert [key for key in summary if key.startswith("gates/")]
    assert any(key.startswith("swapped/perplexity/") for key in summary)
    assert (tmp_path / "train.jsonl").stat().st_size > 0
    (begun,) = tmp_path.glob("wandb/offline-run-*")
    assert begun.name.endswith(json.loads((tmp_path / "wandb.json").read_text())["id"])


def test_a_resumed_run_is_the_same_w_and_b_run(tmp_path):
    config = compose(TINY)
    names = []
    for _ in range(2):
        logger = open_logger(config, tmp_path)
        logger.finish()
        names.append(json.loads((tmp_path / "wandb.json").read_text())["id"])
    assert names[0] == names[1]


def test_a_damaged_identity_costs_a_new_run_and_nothing_else(tmp_path, caplog):
    (tmp_path / "wandb.json").write_text("{")
    open_logger(compose(TINY), tmp_path).finish()
    assert "wandb.json cannot be read" in caplog.text
    assert json.loads((tmp_path / "wandb.json").read_text())["id"]


def test_a_run_that_fails_says_why(tmp_path, monkeypatch, summaries):
    def diverge(*_):
        raise UserError("stage 1 skipped 5 steps in a row.")

    monkeypatch.setattr(pipeline, "_phases", diverge)
    with pytest.raises(UserError, match="skipped"):
        pipeline.run(compose(TINY), tmp_path)
    (summary,) = summaries(tmp_path)
    assert summary["failed"] == "stage 1 skipped 5 steps in a row."


def test_a_refused_trial_of_a_sweep_says_why(tmp_path, monkeypatch, capsys, summaries):
    monkeypatch.chdir(tmp_path)
    arguments = [*TINY, "attention.window=-1"]
    assert main(arguments) == 2
    assert summaries(tmp_path) == []  # no agent asked
    monkeypatch.setenv("WANDB_SWEEP_ID", "abc")
    assert main(arguments) == 2
    (summary,) = summaries(tmp_path)
    assert "attention.window=-1" in summary["failed"]
    assert capsys.readouterr().err.count("error: attention.window=-1") == 2


def test_a_run_that_began_is_not_reported_a_second_time(tmp_path, monkeypatch, summaries):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_SWEEP_ID", "abc")
    monkeypatch.setattr(WandbLogger, "begun", True)
    report_refusal("why")
    assert summaries(tmp_path) == []


def test_gates_are_the_mean_over_heads():
    layers = [{"layer": 3, "read_gate": {"histogram": [[1.0, 0.0], [0.0, 1.0]]}, "write_gate": None}]
    assert gates({"stage3": {"inside": {"layers": layers}}}) == {"layer 3, read gate": [0.5, 0.5]}
    assert gates({"teacher": {}}) == {}
