"""The loop: skips what is not finite, goes on where it stopped, and does not believe a damaged checkpoint."""

import dataclasses
import hashlib
import json
import os
import resource
import signal

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from distill.checkpoint import KEEP, Progress, load_last, load_stage, load_step, save_step, stages_of
from distill.data import Batch, Mixture
from distill.stages import Stage
from distill.trainer import forget_steps, learning_rate, train
from replace.config import Config, StageBudget
from replace.corpora import Document
from replace.errors import UserError
from replace.interrupt import Stopped, stoppable
from replace.logger import NoLogger
from replace.tiny import tiny_tokenizer


class Model(nn.Module):
    """One parameter that the stage pulls towards the mean token id."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4))


class Rows:
    """Ten steps of rows that depend on the step alone."""

    steps = 10

    def batch(self, step, accumulate=1, part=0):
        generator = torch.Generator().manual_seed(step * accumulate + part)
        ids = torch.randint(0, 9, (2, 4), generator=generator)
        return Batch(ids, torch.zeros_like(ids, dtype=torch.bool))


def stage_of(model, poison=(), stop_at=None):
    seen = []

    def step(batch, scale):
        seen.append(1)
        if stop_at is not None and len(seen) > stop_at:
            raise KeyboardInterrupt
        target = batch.input_ids.float().mean(0)
        loss = ((model.weight - target) ** 2).mean() + 0.01 * torch.rand(())
        if len(seen) - 1 in poison:
            loss = loss * torch.inf
        (loss * scale).backward()
        return {"loss": float(loss.detach())}

    group = {"params": [model.weight], "lr": 0.1, "name": "all", "weight_decay": 0.0}
    return Stage(2, [group], step, ["weight"])


@pytest.fixture
def config(monkeypatch):
    monkeypatch.setattr("distill.trainer.mixers", lambda model: {})
    config = Config(precision="fp32")
    config.stage.checkpoint_every = 2
    return config


def test_an_interrupted_stage_goes_on_to_the_very_same_weights(tmp_path, config):
    config.stage.checkpoint_every = 4  # so that step 5 is logged, lost, and done again
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    torch.manual_seed(0)
    whole = Model()
    train(whole, stage_of(whole), Rows(), config, tmp_path / "whole", NoLogger())
    torch.manual_seed(0)
    first = Model()
    with pytest.raises(KeyboardInterrupt):
        train(first, stage_of(first, stop_at=7), Rows(), config, tmp_path / "cut", NoLogger())
    second = Model()
    train(second, stage_of(second), Rows(), config, tmp_path / "cut", NoLogger())
    assert torch.equal(whole.weight, second.weight)
    steps = [json.loads(line)["step"] for line in (tmp_path / "cut" / "train.jsonl").read_text().splitlines()]
    assert steps[-1] == 9
    assert steps == sorted(set(steps)), "a step that was done twice is logged once"


def test_a_finished_stage_is_taken_from_its_checkpoint(tmp_path, config):
    model = Model()
    first = train(model, stage_of(model), Rows(), config, tmp_path, NoLogger())
    again = Model()
    assert train(again, stage_of(again, stop_at=0), Rows(), config, tmp_path, NoLogger()) == first
    assert torch.equal(model.weight, again.weight)
    assert not list((tmp_path / "checkpoints" / "stage2").glob("step-*"))


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path, config):
    model = Model()
    with pytest.raises(KeyboardInterrupt):
        train(model, stage_of(model, stop_at=9), Rows(), config, tmp_path, NoLogger())
    folder = tmp_path / "checkpoints" / "stage2"
    kept = sorted(folder.glob("step-*"))
    assert len(kept) == KEEP
    newest = kept[-1] / "state.safetensors"
    data = bytearray(newest.read_bytes())
    data[-3] ^= 1
    newest.write_bytes(bytes(data))
    optimizer = torch.optim.AdamW(stage_of(model).groups)
    progress = load_step(folder, ["weight"], model, optimizer)
    assert progress is not None
    assert kept[-2].name == f"step-{progress.step:07d}"


def cut(folder, config, stop_at=9):
    """A stage that was interrupted, with two checkpoints inside; returns them, the newest last."""
    model = Model()
    with pytest.raises(KeyboardInterrupt):
        train(model, stage_of(model, stop_at=stop_at), Rows(), config, folder, NoLogger())
    return sorted((folder / "checkpoints" / "stage2").glob("step-*"))


@pytest.mark.parametrize("name", ["about.json", "state.safetensors"])
def test_any_flipped_bit_is_noticed_or_changes_nothing(tmp_path, config, name):
    *_, newest = cut(tmp_path, config)
    model = Model()
    optimizer = torch.optim.AdamW(stage_of(model).groups)
    whole = load_step(newest.parent, ["weight"], model, optimizer)
    weight, file = model.weight.detach().clone(), newest / name
    data, damaged = file.read_bytes(), 0
    for place in range(0, len(data), 3):
        file.write_bytes(data[:place] + bytes([data[place] ^ (1 << place % 8)]) + data[place + 1 :])
        progress = load_step(newest.parent, ["weight"], model, optimizer)
        if progress.step == whole.step:
            assert progress == whole
            assert torch.equal(model.weight, weight)
        else:
            assert progress.step == whole.step - 2
            damaged += 1
    assert damaged > 20 if name == "about.json" else damaged == len(range(0, len(data), 3))


@pytest.mark.parametrize("name", ["about.json", "state.safetensors"])
@pytest.mark.parametrize("length", [0, 1, -1])
def test_a_truncated_checkpoint_is_passed_over(tmp_path, config, name, length):
    before, newest = cut(tmp_path, config)
    file = newest / name
    file.write_bytes(file.read_bytes()[:length])
    model = Model()
    progress = load_step(newest.parent, ["weight"], model, torch.optim.AdamW(stage_of(model).groups))
    assert before.name == f"step-{progress.step:07d}"


def test_a_checkpoint_of_an_earlier_version_is_read(tmp_path, config):
    """Its counters stand in about.json, under a checksum of the tensors alone."""
    *_, newest = cut(tmp_path, config)
    tensors = load_file(newest / "state.safetensors")
    save_file(tensors | {"random": torch.get_rng_state()}, newest / "state.safetensors")
    sha256 = hashlib.sha256((newest / "state.safetensors").read_bytes()).hexdigest()
    about = {"step": 8, "counters": {"tokens": 64, "loss_first": 1.0}, "sha256": sha256}
    (newest / "about.json").write_text(json.dumps(about))
    model = Model()
    progress = load_step(newest.parent, ["weight"], model, torch.optim.AdamW(stage_of(model).groups))
    assert progress == Progress(8, {"tokens": 64, "loss_first": 1.0})


def test_damaged_checkpoints_do_not_push_out_whole_ones(tmp_path, config):
    """Begun again from step 6, the stage has two whole checkpoints once it has written one."""
    before, newest = cut(tmp_path, config)
    (newest / "state.safetensors").write_bytes(b"")
    newest = newest.rename(newest.with_name("step-0000009"))
    model = Model()
    optimizer = torch.optim.AdamW(stage_of(model).groups)
    model.weight.sum().backward()
    optimizer.step()
    save_step(before.parent, ["weight"], model, optimizer, Progress(7, {}))
    assert [path.name for path in sorted(before.parent.iterdir())] == ["step-0000006", "step-0000007"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_answered_with_a_checkpoint_of_the_step_it_came_in(tmp_path, config, number):
    config.stage.checkpoint_every = 100
    whole, first = Model(), Model()
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    figures = train(whole, stage_of(whole), Rows(), config, tmp_path / "whole", NoLogger())
    stage, seen = stage_of(first), []
    plain = stage.step

    def step(batch, scale):
        seen.append(1)
        if len(seen) == 4:
            os.kill(os.getpid(), number)
        return plain(batch, scale)

    stage.step = step
    with stoppable(), pytest.raises(Stopped) as stopped:
        train(first, stage, Rows(), config, tmp_path / "cut", NoLogger())
    assert stopped.value.code == 128 + number
    assert len(seen) == 4
    second = Model()
    again = stage_of(second)
    assert train(second, again, Rows(), config, tmp_path / "cut", NoLogger()) == figures
    assert torch.equal(whole.weight, second.weight)


def test_a_signal_in_the_last_step_keeps_the_finished_stage(tmp_path, config):
    model = Model()
    stage = stage_of(model)
    plain, seen = stage.step, []

    def step(batch, scale):
        seen.append(1)
        if len(seen) == Rows.steps:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(batch, scale)

    stage.step = step
    with stoppable(), pytest.raises(Stopped):
        train(model, stage, Rows(), config, tmp_path, NoLogger())
    finished = load_stage(tmp_path / "checkpoints" / "stage2", Model())
    assert finished is not None
    assert finished["training"]["tokens"] == Rows.steps * Rows().batch(0).input_ids.numel()


def test_a_disk_that_is_full_loses_no_earlier_checkpoint(tmp_path, config):
    """A file may not grow beyond what the checkpoint needs: the system itself refuses in the middle of it."""

    class Large(Model):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(20_000, 4))

    def full(folder, stop):
        model = Large()
        stage = stage_of(model)
        plain = stage.step

        def step(batch, scale):
            if stop and (folder / "checkpoints" / "stage2" / "step-0000004").exists():
                resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, limits[1]))
            return plain(batch, scale)

        stage.step = step
        return model, train(model, stage, Rows(), config, folder, NoLogger())

    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    whole, figures = full(tmp_path / "whole", stop=False)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(OSError, match="File too large") as error:
            full(tmp_path / "cut", stop=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error.value.filename.endswith("step-0000006")
    kept = [path.name for path in sorted((tmp_path / "cut" / "checkpoints" / "stage2").iterdir())]
    assert kept == ["step-0000002", "step-0000004"]
    again, later = full(tmp_path / "cut", stop=False)
    assert later == figures
    assert torch.equal(again.weight, whole.weight)


def test_a_stage_that_goes_on_knows_the_losses_of_before(tmp_path, config):
    """A loss that never falls is seen in a stage that was cut in its last quarter as in one that was not."""

    class Long(Rows):
        steps = 40

    def flat(model, stop_at=None):
        stage, seen = stage_of(model), []

        def step(batch, scale):
            seen.append(1)
            if len(seen) - 1 == stop_at:
                raise KeyboardInterrupt
            (model.weight.sum() * 0 * scale + model.weight[0] * scale).backward()
            return {"loss": 3.0, "ce": 3.0}

        stage.step = step
        return stage

    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    model = Model()
    whole = train(model, flat(model), Long(), config, tmp_path / "whole", NoLogger())
    assert whole["patterns"] == {"no_progress": 20}
    for stop_at in (19, 15):  # steps of this try
        with pytest.raises(KeyboardInterrupt):
            train(model, flat(model, stop_at), Long(), config, tmp_path / "cut", NoLogger())
    assert train(model, flat(model), Long(), config, tmp_path / "cut", NoLogger()) == whole


def test_random_numbers_of_a_step_do_not_depend_on_what_was_done_before(tmp_path, config):
    """As dropout draws them: a stage that was killed before its first checkpoint begins with them again."""
    weights = []
    for name, seed in (("one", 1), ("other", 2)):
        (tmp_path / name).mkdir()
        torch.manual_seed(seed)
        model = Model()
        train(model, stage_of(model), Rows(), config, tmp_path / name, NoLogger())
        weights.append((tmp_path / name / "train.jsonl").read_text().splitlines()[0].partition("lr")[0])
    assert weights[0] == weights[1]


def test_a_stage_that_is_done_again_keeps_the_log_of_the_others(tmp_path, config):
    lines = [{"stage": 1, "step": 0}, {"stage": 3, "step": 0}, {"stage": 3, "step": 5}]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"sta')
    model = Model()
    train(model, stage_of(model), Rows(), config, tmp_path, NoLogger())
    forget_steps(tmp_path, 3, 5)
    kept = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["step"]) for line in kept] == [(1, 0), (2, 0), (2, 5), (2, 9), (3, 0)]


def test_a_damaged_final_checkpoint_is_not_taken_for_a_finished_stage(tmp_path, config):
    model = Model()
    train(model, stage_of(model), Rows(), config, tmp_path, NoLogger())
    final = tmp_path / "checkpoints" / "stage2" / "final"
    (final / "state.safetensors").write_bytes((final / "state.safetensors").read_bytes()[:-4])
    assert load_stage(tmp_path / "checkpoints" / "stage2", model) is None


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(tmp_path, config):
    model = Model()
    config.stage.checkpoint_every = 100
    result = train(model, stage_of(model, poison=(3, 4)), Rows(), config, tmp_path, NoLogger())
    assert result["skipped_steps"] == 2
    assert model.weight.isfinite().all()


def test_too_many_bad_steps_in_a_row_end_with_a_sentence(tmp_path, config):
    model = Model()
    config.stage.max_skipped = 3
    with pytest.raises(UserError, match="3 steps in a row"):
        train(model, stage_of(model, poison=range(10)), Rows(), config, tmp_path, NoLogger())


def test_the_rate_rises_then_falls_to_a_tenth():
    rates = [learning_rate(step, 100, 0.1) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == pytest.approx(1.0)
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[-1] == pytest.approx(0.1, abs=0.01)


def test_half_precision_may_look_for_its_scale_and_remembers_it(tmp_path, config):
    """A gradient that overflows until the scale is 2^6: ten halvings are no reason to give up, nor to begin
    again on resume.
    """
    scales = []

    def stage(model, stop_at=99):
        def step(batch, scale):
            scales.append(scale)
            if len(scales) > stop_at:
                raise KeyboardInterrupt
            loss = (model.weight - 1).square().mean()
            (loss * (scale if scale <= 64 else torch.inf)).backward()
            return {"loss": float(loss.detach())}

        group = {"params": [model.weight], "lr": 0.1, "name": "all", "weight_decay": 0.0}
        return Stage(2, [group], step, ["weight"])

    class Long(Rows):
        steps = 16

    config.precision, config.stage.max_skipped = "fp16", 3
    model = Model()
    with pytest.raises(KeyboardInterrupt):
        train(model, stage(model, stop_at=14), Long(), config, tmp_path, NoLogger())
    result = train(model, stage(model), Long(), config, tmp_path, NoLogger())
    assert scales[0] == 2**16
    assert set(scales[10:]) == {64}
    assert result["skipped_steps"] == 10
    assert "scale" not in result
    assert model.weight.isfinite().all()
    assert (model.weight > 0).all()


def test_optimizer_moments_come_back_to_where_the_parameters_are(tmp_path):
    model = Model()
    optimizer = torch.optim.AdamW(stage_of(model).groups)
    model.weight.sum().backward()
    optimizer.step()
    save_step(tmp_path, ["weight"], model, optimizer, Progress(1, {}))
    elsewhere = Model().to("meta")
    optimizer = torch.optim.AdamW(stage_of(elsewhere).groups)
    load_step(tmp_path, ["weight"], elsewhere, optimizer)
    devices = {key: value.device.type for key, value in optimizer.state[elsewhere.weight].items()}
    assert devices == {"step": "cpu", "exp_avg": "meta", "exp_avg_sq": "meta"}


def documents():
    text = "The wind was cold that night. We went home along the river. Nobody spoke for a while. " * 200
    splits = ("train", "train", "dev", "test")
    return [Document(f"d{i}", f"Part {i}. {text}", "files", split) for i, split in enumerate(splits)]


def test_rows_depend_on_seed_stage_and_number_alone():
    config = Config()
    config.attention.block = config.attention.window = 8
    budget = StageBudget(tokens=4096, batch=2, length=256)

    def rows(stage, seed=0):
        config.seed = seed
        mixture = Mixture(tiny_tokenizer(), documents(), config, budget, stage=stage, share=0.5)
        return [mixture.batch(step) for step in range(mixture.steps)]

    first, again, other, seeded = rows(2), rows(2), rows(3), rows(2, seed=1)
    assert len(first) == 8
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a.input_ids, b.input_ids)
        assert torch.equal(a.answers, b.answers)
    assert any(not torch.equal(a.input_ids, b.input_ids) for a, b in zip(first, other, strict=True))
    assert any(not torch.equal(a.input_ids, b.input_ids) for a, b in zip(first, seeded, strict=True))
    with_answers = sum(int(b.answers.any(1).sum()) for b in first)
    assert with_answers == 8  # half of the 16 rows


def test_training_rows_never_come_from_held_out_documents():
    config = Config()
    config.attention.block = config.attention.window = 8
    budget = StageBudget(tokens=4096, batch=2, length=256)
    mixture = Mixture(tiny_tokenizer(), documents(), config, budget, stage=2, share=0.0)
    train_only = [d for d in documents() if d.split == "train"]
    alone = Mixture(tiny_tokenizer(), train_only, config, budget, stage=2, share=0.0)
    assert torch.equal(mixture.rows, alone.rows)


@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_a_budget_is_in_tokens_however_they_are_accumulated(accumulate):
    config = Config()
    config.attention.block = config.attention.window = 8
    config.stage.accumulate = accumulate
    budget = StageBudget(tokens=4096, batch=2, length=256)
    mixture = Mixture(tiny_tokenizer(), documents(), config, budget, stage=2, share=0.0)
    assert mixture.steps == -(-8 // accumulate)


def test_failure_patterns_are_watched_for_and_remembered(tmp_path, config, caplog):
    model = Model()
    training = train(model, stage_of(model, poison=(3, 4)), Rows(), config, tmp_path, NoLogger())
    assert training["patterns"] == {"nonfinite": 3}
    assert sum("likely cause" in record.getMessage() for record in caplog.records) == 1
    again = train(model, stage_of(model), Rows(), config, tmp_path, NoLogger())
    assert again["patterns"] == {"nonfinite": 3}


def run_of(folder, stages, source=None, **tokens):
    """A run's folder with its config."""
    config = Config(stages=stages, source=None if source is None else str(source))
    for name in ("stage1", "stage2", "stage3"):
        getattr(config.budget, name).tokens = tokens.get(name, 64)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    return folder


def test_the_last_good_checkpoint_of_an_unfinished_run_is_found(tmp_path, config):
    """A finished stage, and inside the next one the newest whole checkpoint, not a damaged one."""
    model, run = Model(), run_of(tmp_path / "run", [1, 2])
    assert load_last(run, model) is None
    one = stage_of(model)
    one.number = 1
    train(model, one, Rows(), config, run, NoLogger())
    assert load_last(run, Model()) == (1, None)
    finished = model.weight.detach().clone()
    with pytest.raises(KeyboardInterrupt):
        train(model, stage_of(model, stop_at=9), Rows(), config, run, NoLogger())
    other = Model()
    assert load_last(run, other) == (2, 8)
    assert not torch.equal(other.weight, finished)
    newest = run / "checkpoints" / "stage2" / "step-0000008" / "state.safetensors"
    newest.write_bytes(newest.read_bytes()[:-4])
    assert load_last(run, Model()) == (2, 6)


def test_the_stages_of_the_run_that_was_taken_over_count(tmp_path, config):
    model = Model()
    first = run_of(tmp_path / "first", [1, 2])
    train(model, stage_of(model), Rows(), config, first, NoLogger())
    other = Model()
    assert load_last(run_of(tmp_path / "second", [3], first), other) == (2, None)
    assert torch.equal(other.weight, model.weight)


def test_a_stage_that_a_run_trains_anew_is_not_the_earlier_run_s(tmp_path, config):
    """What the earlier run did after the stage at which the later one began is no part of the later one."""
    model = Model()
    first = run_of(tmp_path / "first", [1, 2])
    for number in (1, 2):
        stage = stage_of(model)
        stage.number = number
        train(model, stage, Rows(), config, first, NoLogger())
    assert load_last(run_of(tmp_path / "second", [2], first), Model()) == (1, None)


def test_what_a_run_s_weights_are_made_of(tmp_path):
    def names(run):
        return {number: folder.parent.parent.name for number, folder in stages_of(run).items()}

    first = run_of(tmp_path / "first", [1, 2, 3])
    second = run_of(tmp_path / "second", [2], first)
    assert names(second) == {1: "first", 2: "second"}, "its own stage 2 makes the earlier stage 3 void"
    assert names(run_of(tmp_path / "tuned", [], second)) == {1: "first", 2: "second"}
    assert names(run_of(tmp_path / "idle", [3], first, stage3=0)) == {1: "first", 2: "first", 3: "first"}
    later = run_of(tmp_path / "later", [3], tmp_path / "moved")
    for run in (tmp_path / "nothing", later):
        with pytest.raises(UserError, match=r"from=.* is not possible; allowed: the folder of a run"):
            stages_of(run)
