"""`python -m eval`: the same schema for any model; a mistake is one sentence and exit code 2."""

import dataclasses
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

import eval.measure as measure_module
from eval.__main__ import _new_folder, main, parse
from eval.metrics import read_metrics
from replace import pipeline
from replace.compose import compose
from replace.errors import UserError

WORDS = ("the", "old", "house", "stood", "near", "a", "river", "nobody", "knew", "who", "lived", "there")


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
    options += [f"data.path={folder / 'texts'}", "budget.stage1.tokens=512", "attention.window=128"]
    pipeline.run(compose(options), folder / "run")
    return folder


def evaluated(capsys, *arguments):
    """Run the command; return the metrics in the folder that it names."""
    code = main(list(arguments))
    printed = capsys.readouterr()
    assert code == 0, printed.err
    return read_metrics(Path(printed.out.strip()).parent)


def test_a_run_is_measured_again_with_the_same_figures(finished, capsys):
    before = read_metrics(finished / "run")
    again = evaluated(capsys, f"run={finished / 'run'}")
    assert set(again["phases"]) == {"teacher", "swapped", "stage1"}
    assert again["phases"]["swapped"] == before["phases"]["swapped"]
    old, new = before["phases"]["stage1"], again["phases"]["stage1"]
    assert new["training"] == old["training"]
    for book, entry in old["perplexity"].items():
        assert new["perplexity"][book]["ppl"] == pytest.approx(entry["ppl"], rel=1e-3)
    assert again["recovery"].keys() == before["recovery"].keys()


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
        (["model=tiny", "eval=all"], ["eval='all'", "perplexity"]),
        (["model=tiny", "speed=3"], ["speed='3'", "trust_remote_code"]),
        (["model=tiny", "model=x"], ["model='x'", "one value"]),
        (["model=tiny", "budget=huge"], ["budget='huge'", "quick"]),
        (["model=tiny", "verbose=yes"], ["verbose='yes'", "true"]),
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
    assert not list(tmp_path.iterdir())


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


def test_without_arguments_it_says_how_to_start():
    bare = subprocess.run([sys.executable, "-m", "eval"], capture_output=True, text=True)
    assert bare.returncode == 2
    assert "python -m eval run=<run folder>" in bare.stderr
    assert "Traceback" not in bare.stderr
