"""The dev loss during a stage: the best step is taken, in whatever pieces the stage was trained."""

import dataclasses
import json
from contextlib import suppress

import pytest
import torch
from torch import nn

from distill.continued import continued_stage
from distill.data import Batch
from distill.dev import Dev, DevRows, dev_rows
from distill.stages import Stage, language_stage, transfer_stage
from distill.trainer import counts, train
from replace.config import AttentionConfig, Config, StageBudget
from replace.convert import SwapSpec, swap
from replace.corpora import Document
from replace.logger import NoLogger
from replace.tiny import tiny_model, tiny_tokenizer

SENTENCE = "The old house stood near a river and nobody knew who lived there. "
STEPS = 12


class Model(nn.Module):
    """One number."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))


class Rows:
    """Steps of rows that are not looked at."""

    steps = STEPS

    def batch(self, step, accumulate=1, part=0):
        return Batch(torch.zeros(1, 2, dtype=torch.long), torch.zeros(1, 2, dtype=torch.bool))


class Heard(NoLogger):
    """Keeps what it is told."""

    def __init__(self):
        self.lines = []

    def log(self, figures, step):
        self.lines.append((step, figures))


HELD_OUT = DevRows([Rows().batch(0)])


def stage_of(model, wanted=0.5, stop_at=None, seen=None):
    """Training draws the weight upwards, by about 0.1 a step; on dev `wanted` would be best."""
    trained = []

    def step(batch, scale):
        if scale is None:
            assert not torch.is_grad_enabled()
            return {"loss": abs(model.weight.item() - wanted)}
        trained.append(1)
        if stop_at is not None and len(trained) > stop_at:
            raise KeyboardInterrupt
        loss = ((model.weight - 5) ** 2).mean()
        (loss * scale).backward()
        if seen is not None:
            seen.append(model.weight.item())
        return {"loss": float(loss.detach())}

    group = {"params": [model.weight], "lr": 0.1, "name": "all", "weight_decay": 0.0}
    return Stage(2, [group], step, ["weight"])


@pytest.fixture
def config(monkeypatch):
    monkeypatch.setattr("distill.trainer.mixers", lambda model: {})
    config = Config(precision="fp32")
    config.stage.checkpoint_every, config.stage.validate_every, config.stage.warmup = 3, 2, 0.0
    return config


def trained(folder, config, held_out=HELD_OUT, log=None, **how):
    folder.mkdir(exist_ok=True)
    model = Model()
    figures = train(model, stage_of(model, **how), Rows(), config, folder, log or NoLogger(), held_out)
    return model.weight.item(), figures


def left(folder):
    return sorted(path.name for path in (folder / "checkpoints" / "stage2").iterdir())


def test_the_best_step_is_taken_and_told(tmp_path, config):
    heard, seen = Heard(), []
    weight, figures = trained(tmp_path, config, log=heard, seen=seen)
    dev = figures["dev"]
    steps, losses = zip(*dev["losses"], strict=True)
    assert steps == (0, 2, 4, 6, 8, 10, 12)
    best = steps[losses.index(min(losses))]
    assert 0 < best < STEPS
    assert dev["best_step"] == dev["taken_step"] == best
    assert dev["rows"] == 1
    assert not dev["stopped_early"]
    assert weight == seen[best], "as it was before the step after it"
    assert left(tmp_path) == ["final"]
    lines = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    logged = {line["step"] + 1: line["dev_loss"] for line in lines if "dev_loss" in line}
    assert logged == dict(dev["losses"][1:])
    told = [(step, line["stage2/dev_loss"]) for step, line in heard.lines if "stage2/dev_loss" in line]
    assert told == [(2 * step, loss) for step, loss in dev["losses"]]


def test_the_last_step_stays_where_it_is_the_best(tmp_path, config):
    weight, figures = trained(tmp_path, config, wanted=9.0)
    assert figures["dev"]["taken_step"] == figures["dev"]["best_step"] == STEPS
    config.stage.validate_every = 0
    assert weight == trained(tmp_path / "off", config, held_out=None)[0]


def test_a_stage_that_only_does_harm_is_undone(tmp_path, config):
    weight, figures = trained(tmp_path, config, wanted=-1.0)
    assert figures["dev"]["taken_step"] == 0
    assert weight == 0


def test_a_stage_ends_early_after_so_many_measurements_without_a_better_one(tmp_path, config):
    config.stage.patience = 2
    _, figures = trained(tmp_path, config, wanted=0.2)
    dev = figures["dev"]
    assert dev["stopped_early"]
    assert [step for step, _ in dev["losses"]] == [0, 2, 4, 6]
    assert dev["taken_step"] == 2
    assert figures["tokens"] == 6 * 2
    lines = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 5


def test_nothing_is_measured_unless_it_is_asked_for(tmp_path, config):
    config.stage.validate_every = 0
    _, figures = trained(tmp_path, config, held_out=None)
    assert "dev" not in figures
    why = DevRows(why="there is no such text")
    _, figures = trained(tmp_path / "why", config, held_out=why)
    assert figures["dev"] == {"losses": None, "why": "there is no such text"}


@pytest.mark.parametrize("patience", [0, 2])
def test_a_stage_in_pieces_ends_with_the_very_same_figures(tmp_path, config, patience):
    config.stage.patience = patience
    whole = trained(tmp_path / "whole", config)
    for stop_at in range(1, whole[1]["dev"]["losses"][-1][0]):
        folder = tmp_path / str(stop_at)
        with pytest.raises(KeyboardInterrupt):
            trained(folder, config, stop_at=stop_at)
        with suppress(KeyboardInterrupt):  # a second time, unless a single step is left
            trained(folder, config, stop_at=1)
        assert trained(folder, config) == whole, f"interrupted after step {stop_at}"
        assert left(folder) == ["final"]


def test_checkpoints_keep_the_best_steps_that_they_would_go_on_with(tmp_path, config):
    config.stage.validate_every = 1
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, config, wanted=0.58, stop_at=11)
    assert left(tmp_path) == ["best-0000006", "best-0000007", "step-0000006", "step-0000009"]
    newest = tmp_path / "checkpoints" / "stage2" / "step-0000009" / "state.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    whole = trained(tmp_path / "whole", config, wanted=0.58)
    assert trained(tmp_path, config, wanted=0.58) == whole


def test_a_damaged_best_step_is_not_taken(tmp_path, config, caplog):
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, config, stop_at=11)
    (best,) = (path for path in (tmp_path / "checkpoints" / "stage2").glob("best-*"))
    state = best / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-1])
    weight, figures = trained(tmp_path, config)
    assert figures["dev"]["best_step"] < figures["dev"]["taken_step"] == STEPS
    assert f"checkpoint {best.name} is damaged" in caplog.text
    config.stage.validate_every = 0
    assert weight == trained(tmp_path / "off", config, held_out=None)[0]


def test_a_loss_that_is_not_finite_is_never_the_best(tmp_path, config):
    _, figures = trained(tmp_path, config, wanted=float("nan"))
    assert {loss for _, loss in figures["dev"]["losses"]} == {None}
    assert figures["dev"]["best_step"] is None
    assert figures["dev"]["taken_step"] == STEPS


# The rows


def documents():
    """No word of the test text is in the dev text."""
    return [
        Document("a", SENTENCE * 60, "files", "train"),
        Document("b", SENTENCE.upper() * 60, "files", "dev"),
        Document("c", "zzz " * 900, "files", "test"),
    ]


def rows_of(share=0.0, length=256, **changes):
    config = Config(**changes)
    config.attention.block = config.attention.window = 8
    config.stage.validate_every, config.stage.validate_rows = 1, 4
    config.data.recall = share
    config.budget.stage2 = StageBudget(tokens=4 * length, batch=2, length=length)
    return dev_rows(tiny_tokenizer(), documents(), config, 2)


def test_rows_are_of_the_dev_text_whatever_the_seed():
    first, again = rows_of(), rows_of(seed=3)
    assert [row.input_ids.shape for row in first.rows] == [(1, 256)] * 4
    for a, b in zip(first.rows, again.rows, strict=True):
        assert torch.equal(a.input_ids, b.input_ids)
        text = tiny_tokenizer().decode(a.input_ids[0])
        assert text.strip() in SENTENCE.upper() * 60


def test_episodes_are_among_the_rows_and_worded_for_dev():
    answers = [bool(row.answers.any()) for row in rows_of(share=0.5).rows]
    assert answers == [False, True, False, True]


def test_rows_that_cannot_be_had_say_why():
    assert rows_of(length=8192).why.startswith("no dev document has the 8192 tokens of a row")
    assert "holds no dev episode" in rows_of(share=1.0, length=24).why


# The losses


def swapped():
    model = tiny_model("llama")
    options = AttentionConfig(block=8, window=8, sinks=2, pairs=4, distance_cap=64)
    swap(model, SwapSpec({0: options, 2: options}), keep_originals=True)
    return model.train()


def weights(model, config):
    config.stage.transfer_loss = "attention_weights"
    return transfer_stage(model, config)


STAGES = {
    "transfer": transfer_stage,
    "weights": weights,
    "new layers": lambda model, config: language_stage(model, config, 2),
    "full model": lambda model, config: language_stage(model, config, 3, tiny_model("llama")),
    "continued": lambda model, config: continued_stage(tiny_model("llama").train(), config, 3, [0]),
}


@pytest.mark.parametrize("name", STAGES)
def test_a_measurement_is_the_stage_s_own_loss_and_leaves_no_trace(name, tmp_path):
    config, model = Config(precision="fp32"), swapped()
    stage = STAGES[name](model, config)
    ids = torch.randint(3, 500, (1, 160), generator=torch.Generator().manual_seed(0))
    rows = DevRows([Batch(ids, torch.zeros_like(ids, dtype=torch.bool))])
    before = counts(model), [layer.mixer.calls for layer in layers_of(model)]
    dev = Dev(model, dataclasses.replace(stage, names=[]), rows, config, tmp_path, NoLogger())
    dev.begin(None, 0)
    assert (counts(model), [layer.mixer.calls for layer in layers_of(model)]) == before
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.training
    ((_, loss),) = dev.losses
    assert loss == pytest.approx(stage.step(rows.rows[0], 1.0)["loss"], rel=1e-4)  # softmax by other kernels


def layers_of(model):
    return [model.model.layers[index].self_attn for index in (0, 2)]


def test_the_report_says_which_step_was_taken():
    from eval.report import _dev_losses

    dev = {"rows": 8, "losses": [[0, 2.0], [50, 1.0], [100, 1.5]], "best_step": 50, "taken_step": 50}
    phases = {
        "stage2": {"training": {"dev": dev | {"stopped_early": True}}},
        "stage3": {"training": {"dev": {"losses": None, "why": "there is none"}}},
    }
    assert _dev_losses(phases) == [
        "stage 2: 2 after step 0, 1.5 after step 100; lowest after step 50: 1; "
        "the weights after step 50 are taken; it ended early",
        "stage 3: not measured, since there is none",
    ]
