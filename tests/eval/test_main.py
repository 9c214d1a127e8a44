"""`python -m eval`: the same schema for any model; a mistake is one sentence and exit code 2."""

import dataclasses
import json
import os
import pickle
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import eval.measure as measure_module
from eval.__main__ import _new_folder, main
from eval.arguments import listed, parse, sets_of
from eval.measurements import MEASUREMENTS
from eval.metrics import read_metrics
from replace import loading, pipeline
from replace.compose import compose
from replace.errors import UserError

WORDS = ("the", "old", "house", "stood", "near", "a", "river", "nobody", "knew", "who", "lived", "there")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of the test's own."""
    monkeypatch.setenv("LAYER_REPLACE_CACHE", str(tmp_path / "cache"))


def write_texts(folder, seed=0):
    """Three files of sentences: a user's own data."""
    rng = random.Random(seed)
    folder.mkdir(exist_ok=True)
    for index in range(3):
        text = " ".join(" ".join(rng.choices(WORDS, k=9)).capitalize() + "." for _ in range(300))
        (folder / f"{index}.txt").write_text(text)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A tiny run through the pipeline, swapped and trained for one step, with data of its own."""
    folder = tmp_path_factory.mktemp("finished")
    write_texts(folder / "texts")
    write_texts(folder / "other", seed=1)
    options = ["+exp=infini", "budget=smoke", "model=tiny", "layers=all", "stages=[1]", "data=files"]
    options += [f"data.path={folder / 'texts'}", "budget.stage1.tokens=512", "budget.stage1.batch=1"]
    options += ["attention.window=128"]
    pipeline.run(compose(options), folder / "run")
    return folder


def evaluated(capsys, *arguments):
    """Run the command; return the metrics in the folder that it names."""
    code = main(list(arguments))
    printed = capsys.readouterr()
    assert code == 0, printed.err
    return read_metrics(Path(printed.out.strip()).parent)


def sentence(capsys):
    """The one sentence on stderr, progress bars aside."""
    lines = [line for line in capsys.readouterr().err.split("\n") if "error: " in line or "Traceback" in line]
    assert len(lines) == 1
    return lines[0]


def save_tiny(folder, more_tokens=0):
    """A folder with the tiny model."""
    given = loading.load_model(compose(["model=tiny"]).model)
    given.model.save_pretrained(folder)
    given.tokenizer.add_tokens([f"<more {index}>" for index in range(more_tokens)])
    given.tokenizer.save_pretrained(folder)
    return given.model


@pytest.fixture(scope="module")
def once(finished):
    """The run measured again, into a folder of its own, with a cache of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LAYER_REPLACE_CACHE", str(finished / "cache"))
        assert main([f"run={finished / 'run'}", f"out={finished / 'once'}"]) == 0
    return read_metrics(finished / "once")


def test_a_run_is_measured_again_with_the_same_figures(finished, once):
    before = read_metrics(finished / "run")
    assert set(once["phases"]) == {"teacher", "swapped", "stage1"}
    assert once["phases"]["swapped"] == before["phases"]["swapped"]
    old, new = before["phases"]["stage1"], once["phases"]["stage1"]
    assert new["training"] == old["training"]
    for book, entry in old["perplexity"].items():
        assert new["perplexity"][book]["ppl"] == pytest.approx(entry["ppl"], rel=1e-3)
    assert once["recovery"].keys() == before["recovery"].keys()


@pytest.mark.parametrize("name", ["recall", "perplexity", "probes"])
def test_a_narrow_set_leaves_the_other_figures_of_the_phase(finished, capsys, name):
    before = read_metrics(finished / "run")["phases"]["stage1"]
    out = finished / name
    after = evaluated(capsys, f"run={finished / 'run'}", f"eval={name}", f"out={out}")["phases"]["stage1"]
    assert after.keys() == before.keys()
    assert after["ablation"]["pairs_off"].keys() == before["ablation"]["pairs_off"].keys()
    assert after["dev"].keys() == before["dev"].keys()
    assert after["test_reads"] == before["test_reads"] + (name != "probes")
    if name != "perplexity":
        assert after["perplexity"] == before["perplexity"]


def test_figures_of_other_text_are_not_paired_with_a_run_s(finished, capsys, caplog):
    given = [f"run={finished / 'run'}", "eval=perplexity", f"out={finished / 'elsewhere'}"]
    other = evaluated(capsys, *given, f"data={finished / 'other'}")
    assert set(other["phases"]) == {"stage1"}
    assert "passkey" not in other["phases"]["stage1"]
    assert other["phases"]["stage1"]["training"]["tokens"] == 512
    assert other["recovery"]["all"]["value"] is None
    assert "other text" in caplog.text
    same = evaluated(capsys, *given, f"data={finished / 'texts'}")
    assert set(same["phases"]) == {"teacher", "swapped", "stage1"}


def test_an_export_is_measured_clear_of_its_own_window(finished, capsys, monkeypatch):
    """By its own code; needles keep clear of the window of 128 tokens, which no default config has."""
    monkeypatch.chdir(finished)
    asked = []
    made = measure_module.make_episode

    def noted(*arguments, **keywords):
        asked.append(keywords["clear"])
        return made(*arguments, **keywords)

    monkeypatch.setattr(measure_module, "make_episode", noted)
    options = ["model=run/model", "trust_remote_code=true", "budget=smoke", "eval=recall", "data=texts"]
    metrics = evaluated(capsys, *options)
    assert metrics["parts"]["replaced"] == 4
    assert set(asked) == {160}
    assert [folder.name for folder in (finished / "outputs" / "eval").iterdir()] == ["run-model"]


def test_every_evaluation_of_a_model_has_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run" / "model").mkdir(parents=True)
    parents = {_new_folder(name).parent.name for name in ("run/model", str(tmp_path / "run" / "model"))}
    assert parents == {"run-model"}
    assert _new_folder("HuggingFaceTB/SmolLM2-135M").parent.name == "HuggingFaceTB-SmolLM2-135M"
    assert _new_folder("tiny").parent.name == "tiny"
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d", _new_folder("tiny").name)


SMALL = ["budget=smoke", "eval=probes,perplexity"]


def test_several_sets_are_one(monkeypatch):
    both = sets_of(["recall", "perplexity"])
    assert set(both.base.split("+")) == {"recall", "perplexity"}
    assert both.name == "recall,perplexity"
    assert sets_of(["probes", "quick"]).base == "quick"
    more = {"a": ["x", "y"], "b": ["y", "z"]}

    def composed(overrides):
        config = compose([])
        name = overrides[0].removeprefix("eval=")
        config.eval.name, config.eval.base, config.eval.more = name, "none", list(more[name])
        return config

    monkeypatch.setattr("eval.arguments.choices", lambda group: list(more))
    monkeypatch.setattr("eval.arguments.compose", composed)
    assert sets_of(["a", "b"]).more == ["x", "y", "z"]
    assert sets_of(["a", "b"]).base == "none"


def test_a_list_may_be_written_in_any_way(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert listed("[a, 'b',a]") == listed("a,b") == ["a", "b"]
    (tmp_path / "a,b").mkdir()
    assert listed("a,b") == ["a,b"]


def test_several_models_and_single_options(tmp_path, capsys):
    write_texts(tmp_path / "texts")
    save_tiny(tmp_path / "copy")
    options = [f"model=tiny,{tmp_path / 'copy'}", f"data={tmp_path / 'texts'}", f"out={tmp_path / 'out'}"]
    assert main([*options, *SMALL, "budget.eval.perplexity_tokens=1024"]) == 0
    reports = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert [report.parent.parent for report in reports] == [tmp_path / "out"] * 2
    phases = [read_metrics(report.parent)["phases"]["model"] for report in reports]
    for phase in phases:
        assert set(phase) == {"perplexity", "probes", "seconds", "test_reads"}
        assert all("first 1024 tokens" in entry["protocol"] for entry in phase["perplexity"].values())
    assert phases[0]["perplexity"] == phases[1]["perplexity"]
    assert (reports[0].parent / "report.html").stat().st_size > 1000


def test_a_rerun_computes_only_what_is_missing(tmp_path, capsys, caplog, monkeypatch):
    write_texts(tmp_path / "texts")
    options = ["model=tiny", f"data={tmp_path / 'texts'}", f"out={tmp_path / 'out'}", "budget=smoke"]
    first = evaluated(capsys, *options, "eval=perplexity")
    forwards = []
    monkeypatch.setattr("eval.perplexity.token_losses", lambda *given: forwards.append(given))
    with caplog.at_level("INFO"):
        again = evaluated(capsys, *options, "eval=probes,perplexity")
    assert not forwards
    assert "results were in the cache, 1 were measured" in caplog.text
    assert again["phases"]["model"]["perplexity"] == first["phases"]["model"]["perplexity"]
    assert again["phases"]["model"]["probes"]
    with pytest.raises(AttributeError):  # token_losses gives None now
        main([*options, "eval=perplexity", "cache=false"])
    assert forwards


def test_a_run_measured_twice_is_measured_once(finished, once, tmp_path, capsys, caplog, monkeypatch):
    """Ablations, other text's state and all; and what was read from the cache was no new look at test."""
    monkeypatch.setenv("LAYER_REPLACE_CACHE", str(finished / "cache"))
    with caplog.at_level("INFO"):
        twice = evaluated(capsys, f"run={finished / 'run'}", f"out={tmp_path / 'twice'}")
    assert "results were in the cache, 0 were measured" in caplog.text
    phase = {name: figures for name, figures in once["phases"]["stage1"].items() if name != "seconds"}
    again = {name: figures for name, figures in twice["phases"]["stage1"].items() if name != "seconds"}
    assert phase["ablation"]["other_text_state"]["passkey"]
    assert again.pop("test_reads") == phase.pop("test_reads") - 1
    assert again == phase


def test_an_interruption_keeps_what_was_measured(tmp_path, capsys, monkeypatch):
    write_texts(tmp_path / "texts")
    options = ["model=tiny", f"data={tmp_path / 'texts'}", f"out={tmp_path / 'out'}", *SMALL]

    def interrupted(*given, **named):
        raise KeyboardInterrupt

    monkeypatch.setattr(measure_module, "probe", interrupted)
    assert main(options) == 130
    error = sentence(capsys)
    assert "interrupted" in error
    assert str(tmp_path / "out") in error
    phase = read_metrics(tmp_path / "out")["phases"]["model"]
    assert phase["perplexity"]
    assert "probes" not in phase
    assert "was interrupted" in (tmp_path / "out" / "report.md").read_text()
    monkeypatch.undo()
    monkeypatch.setenv("LAYER_REPLACE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("eval.perplexity.token_losses", interrupted)  # in the cache, so never called
    metrics = evaluated(capsys, *options)
    assert metrics["phases"]["model"]["probes"]
    assert metrics["notes"] == []


def test_an_interruption_before_anything_was_measured_loses_nothing(tmp_path, capsys, monkeypatch):
    write_texts(tmp_path / "texts")

    def interrupted(*given):
        raise KeyboardInterrupt

    monkeypatch.setattr("eval.__main__.load_model", interrupted)
    assert main(["model=tiny", f"data={tmp_path / 'texts'}", f"out={tmp_path / 'out'}", *SMALL]) == 130
    assert "nothing is lost" in capsys.readouterr().err


def test_sigterm_keeps_what_was_measured_and_has_its_own_code(tmp_path, capsys, monkeypatch):
    write_texts(tmp_path / "texts")
    monkeypatch.setattr(measure_module, "probe", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
    options = ["model=tiny", f"data={tmp_path / 'texts'}", f"out={tmp_path / 'out'}", *SMALL]
    assert main(options) == 143
    assert str(tmp_path / "out") in sentence(capsys)
    assert read_metrics(tmp_path / "out")["phases"]["model"]["perplexity"]


def test_what_is_asked_beyond_the_quick_set_is_measured_of_the_teacher_too(finished, capsys, monkeypatch):
    asked = []

    def extra(model, tokenizer, config, using):
        asked.append(type(model).__name__)
        return {"extra": {"value": 1.0 + len(asked)}}

    monkeypatch.setitem(MEASUREMENTS._entries, "extra", extra)
    out = finished / "extra"
    given = [f"run={finished / 'run'}", "eval=probes", f"out={out}"]
    metrics = evaluated(capsys, *given, "eval.more=[extra]", "eval.base=none")
    assert len(asked) == 2
    assert metrics["phases"]["teacher"]["extra"] == {"value": 2.0}
    assert metrics["phases"]["stage1"]["extra"] == {"value": 3.0}
    assert metrics["phases"]["teacher"]["perplexity"]
    later = evaluated(capsys, *given)
    assert later["phases"]["stage1"]["extra"] == {"value": 3.0}, "an earlier evaluation is added to"
    again = evaluated(capsys, *given, "eval.more=[extra]", "eval.base=none")
    assert again["phases"]["stage1"]["extra"] == {"value": 3.0}
    assert len(asked) == 2


@pytest.fixture
def unfinished(finished, tmp_path):
    """The run as it was when it was killed in stage 2."""
    run = tmp_path / "unfinished"
    shutil.copytree(finished / "run", run, ignore=shutil.ignore_patterns("model", "report*", "eval"))
    config = json.loads((run / "config.json").read_text())
    config["stages"] = [1, 2]
    (run / "config.json").write_text(json.dumps(config))
    return run


def test_of_an_unfinished_run_the_last_good_checkpoint_is_measured(unfinished, finished, capsys, caplog):
    metrics = evaluated(capsys, f"run={unfinished}", "eval=perplexity")
    assert "stage 1, finished" in caplog.text
    assert metrics["checkpoint"] == {"stage": 1, "step": None}
    whole = read_metrics(finished / "run")["phases"]["stage1"]["perplexity"]
    for book, entry in metrics["phases"]["stage1"]["perplexity"].items():
        assert entry["ppl"] == pytest.approx(whole[book]["ppl"], rel=1e-3)
    assert "did not finish" in (unfinished / "eval" / "report.md").read_text()


def test_of_an_unfinished_tuning_the_student_that_it_began_with_is_measured(finished, tmp_path, capsys):
    run = tmp_path / "tuning"
    run.mkdir()
    config = json.loads((finished / "run" / "config.json").read_text())
    config |= {"stages": [], "source": str(finished / "run")}
    config["lora"]["kind"] = "peft"
    (run / "config.json").write_text(json.dumps(config))
    metrics = evaluated(capsys, f"run={run}", "eval=perplexity")
    last = max(json.loads((finished / "run" / "config.json").read_text())["stages"])
    assert metrics["checkpoint"] == {"stage": last, "step": None}
    whole = read_metrics(finished / "run")["phases"][f"stage{last}"]["perplexity"]
    for book, entry in metrics["phases"][f"stage{last}"]["perplexity"].items():
        assert entry["ppl"] == pytest.approx(whole[book]["ppl"], rel=1e-3)


def test_a_run_without_a_checkpoint_is_refused(unfinished, capsys):
    shutil.rmtree(unfinished / "checkpoints")
    assert main([f"run={unfinished}"]) == 2
    error = sentence(capsys)
    assert "whole checkpoint" in error
    assert f"resume={unfinished}" in error


def test_a_tokenizer_that_is_not_the_teacher_s_is_refused(finished, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished / "run", run)
    file = run / "model" / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:-40]
    file.write_text(json.dumps(tokenizer))
    assert main([f"run={run}", "eval=probes"]) == 2
    error = sentence(capsys)
    assert "tokenizer" in error


def test_a_tokenizer_with_more_tokens_than_embeddings_is_refused(tmp_path, capsys):
    write_texts(tmp_path / "texts")
    save_tiny(tmp_path / "model", more_tokens=300)
    assert main([f"model={tmp_path / 'model'}", f"data={tmp_path / 'texts'}", *SMALL]) == 2
    assert "tokenizer matches" in sentence(capsys)


def test_a_model_larger_than_memory_is_refused_before_its_weights_are_read(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(loading, "free_memory", lambda: 100_000)
    monkeypatch.setattr("eval.__main__.load_model", lambda cfg: pytest.fail("weights were read"))
    assert main(["model=tiny", f"out={tmp_path / 'out'}", *SMALL]) == 2
    error = sentence(capsys)
    assert "fits into the 0.0 GiB of memory that are free" in error
    assert "GiB in float32" in error


def test_nothing_is_unpickled(tmp_path, capsys):
    """Weights in a pickle are refused, and what the pickle would run does not run."""
    write_texts(tmp_path / "texts")
    folder, ran = tmp_path / "model", tmp_path / "ran"
    model = save_tiny(folder)
    (folder / "model.safetensors").unlink()

    class Harm:
        def __reduce__(self):
            return Path.touch, (ran,)

    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Harm()))
    assert main([f"model={folder}", f"data={tmp_path / 'texts'}", *SMALL]) == 2
    assert not ran.exists()
    assert "safetensors" in sentence(capsys)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    assert main([f"model={folder}", f"data={tmp_path / 'texts'}", *SMALL]) == 2


def test_a_model_s_own_code_needs_leave(finished, capsys, monkeypatch):
    monkeypatch.chdir(finished)
    assert main(["model=run/model", "data=texts", *SMALL]) == 2
    error = sentence(capsys)
    assert "trust_remote_code=true" in error
    assert parse(["model=x", "model.trust_remote_code=true"])["trust_remote_code"] == "true"


def test_a_run_and_its_teacher_are_compared_without_measuring(finished, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("eval.__main__.load_model", lambda cfg: pytest.fail("something was measured"))
    assert main([f"compare=[tiny,{finished / 'run'}]"]) == 0
    path = Path(capsys.readouterr().out.strip())
    table = json.loads((path.parent / "compare.json").read_text())
    assert [column["phases"] for column in table["columns"]] == [["teacher"], ["stage1"]]
    cells = next(row["cells"] for row in table["rows"] if row["figure"].startswith("perplexity, "))
    assert cells[1]["difference"]["paired"]
    assert table["columns"][0]["missing"]
    assert f"run={finished / 'run'}" in path.read_text()


def test_a_model_is_measured_like_the_runs_that_it_is_compared_with(finished, capsys, tmp_path):
    copy = tmp_path / "copy"
    save_tiny(copy)
    out = tmp_path / "out"
    assert main([f"compare={finished / 'run'},{copy}", "eval=perplexity", f"out={out}"]) == 0
    assert Path(capsys.readouterr().out.strip()) == out / "compare.md"
    table = json.loads((out / "compare.json").read_text())
    teacher = read_metrics(finished / "run")["phases"]["teacher"]["perplexity"]
    for book, entry in teacher.items():
        (cells,) = [row["cells"] for row in table["rows"] if row["figure"] == f"perplexity, {book}"]
        assert cells[1]["value"] == pytest.approx(entry["ppl"], rel=1e-3)
        assert cells[1]["difference"]["paired"]


def test_lengths_beyond_a_model_s_positions_are_refused(tmp_path, capsys):
    write_texts(tmp_path)
    options = ["model=tiny", f"data={tmp_path}", f"out={tmp_path / 'out'}", "budget=paper"]
    assert main(options) == 2
    assert "error: budget.eval.final_lengths=8192" in capsys.readouterr().err


def test_any_model_is_measured_in_the_same_schema(tmp_path, capsys):
    write_texts(tmp_path)
    out = tmp_path / "out"
    code = main(["model=tiny", f"data={tmp_path}", f"out={out}", "budget=smoke", "eval=quick"])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    metrics = read_metrics(out)
    assert set(metrics["phases"]) == {"model"}
    assert metrics["parts"]["full_attention"] == 4
    assert metrics["phases"]["model"]["perplexity"]
    assert metrics["verdict"]["memory"] is None
    assert str(out / "report.md") in printed.out
    assert "no attention layer was replaced" in (out / "report.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run=none", "model=tiny"], ["run=", "either"]),
        (["out=x"], ["run=", "either"]),
        (["run=nowhere"], ["run='nowhere'", "config.json"]),
        (["run=~nobody_there"], ["run='~nobody_there'", "config.json"]),
        (["model=tiny", "eval=all"], ["eval='all'", "perplexity"]),
        (["model=tiny", "speed=3"], ["speed='3'", "trust_remote_code"]),
        (["model=tiny", "model=x"], ["model='x'", "one value"]),
        (["model=tiny", "budget=huge"], ["budget='huge'", "quick"]),
        (["model=tiny", "verbose=yes"], ["verbose='yes'", "true"]),
        (["model=tiny", "eval=quick,all"], ["eval='all'", "recall"]),
        (["model=tiny", "eval.bas=quick"], ["eval.bas='quick'", "did you mean base?"]),
        (["model=tiny", "eval.base=all"], ["eval.base='all'", "quick"]),
        (["model=tiny", "eval.more=[nothing]"], ["eval.more='nothing'"]),
        (["model=tiny", "eval=niah", "eval.niah_depths=[0,120]"], ["eval.niah_depths=120", "to 100"]),
        (["model=tiny", "eval=niah", "eval.niah_lengths=[20]"], ["eval.niah_lengths=20", "at least"]),
        (["model=tiny", "budget.eval.episodes=0"], ["budget.eval.episodes=0", "at least 1"]),
        (["model=tiny", "budget.eval.episodes=many"], ["budget.eval.episodes='many'", "a whole number"]),
        (["model=tiny", "budget.stage1.tokens=1"], ["budget.stage1.tokens='1'", "budget.eval.<key>"]),
        (["model=tiny", "cache=no"], ["cache='no'", "true"]),
        (["model=tiny", "compare=a"], ["compare='a'", "either"]),
        (["tiny"], ["argument='tiny'", "key=value"]),
        (["model="], ["argument='model='", "key=value"]),
        (["model=tiny", "data=nowhere.txt"], ["data.path='nowhere.txt'"]),
    ],
)
def test_a_mistake_is_one_sentence(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert "Traceback" not in error
    for word in words:
        assert word in error


def test_a_folder_that_cannot_be_written_is_named(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["model=tiny", f"out={tmp_path / 'file' / 'x'}"]) == 2
    assert "error: out=" in capsys.readouterr().err


def test_an_unfinished_run_says_how_it_is_continued(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(compose(["+exp=infini"]))))
    assert main([f"run={tmp_path}"]) == 2
    said = capsys.readouterr().err
    assert f"run={str(tmp_path)!r} is unfinished" in said
    assert f"`python -m replace resume={tmp_path}` continues it." in said
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_folder_with_its_own_code_names_this_command_s_key(finished, capsys, monkeypatch):
    monkeypatch.chdir(finished)
    assert main(["model=run/model", "out=refused"]) == 2
    said = capsys.readouterr().err
    assert "only if trust_remote_code=true" in said
    assert "error: model='run/model'" in said
    assert "model.trust" not in said
    assert not (finished / "refused").exists()


def test_a_refused_evaluation_leaves_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["model=tiny", "data=nowhere.txt"]) == 2
    assert main(["model=nowhere/at/all", "out=there/it/is"]) == 2
    assert not list(tmp_path.iterdir())


def test_an_interrupt_is_one_sentence(tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("eval.__main__.load_model", interrupted)
    assert main(["model=tiny", f"out={tmp_path / 'out'}"]) == 130
    said = capsys.readouterr().err
    assert said.startswith("error: interrupted")
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("module", ["eval", "replace", "replace.verify"])
def test_an_interrupt_while_modules_are_imported_is_one_sentence(module, tmp_path):
    """As if Ctrl-C came while hydra or torch is imported."""
    for name in ("torch", "hydra"):
        (tmp_path / f"{name}.py").write_text("raise KeyboardInterrupt\n")
    paths = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    ended = subprocess.run(
        [sys.executable, "-m", module, "model=tiny"],
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": paths},
    )  # fmt: skip
    assert (ended.returncode, ended.stdout) == (130, "")
    assert ended.stderr == "error: interrupted before anything was begun.\n"


def test_verbose_shows_the_traceback():
    with pytest.raises(UserError):
        main(["model=tiny", "eval=all", "verbose=true"])


def test_values_may_hold_an_equals_sign():
    assert parse(["model=a=b"]) == {"model": "a=b"}


def test_without_arguments_it_says_how_to_start(monkeypatch, capsys):
    """As `python -m eval` does it, in this process, which has torch and transformers."""
    monkeypatch.setattr("sys.argv", ["eval"])
    monkeypatch.setattr("sys.excepthook", sys.excepthook)  # what the command puts there goes with the test
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("eval", run_name="__main__")
    assert ended.value.code == 2
    assert "python -m eval run=<run folder>" in capsys.readouterr().err
