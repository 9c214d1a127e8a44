"""What a run records of itself, and that a reproduction compares what it should."""

import dataclasses
import hashlib
import json
import re
import subprocess
from pathlib import Path

import pytest
import torch

from eval.metrics import new_metrics, read_metrics, write_metrics
from replace import provenance, reproduce
from replace.compose import compose
from replace.corpora import Document
from replace.loading import load_model
from replace.provenance import differing, end_provenance, for_export, weights_sha256, write_provenance
from replace.reproduce import compare, main

TINY = ["+exp=infini", "budget=smoke", "model=tiny", "layers=all", "threads=1"]


@pytest.fixture
def begun(tmp_path):
    """A run's folder as it is when the model has been loaded."""
    config = compose([*TINY, "seed=5"])
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    splits = ("train", "dev", "test")
    texts = [Document(split, f"Text of {split}.", "/home/me/texts", split) for split in splits]
    loaded = load_model(config.model)
    assert write_provenance(tmp_path, config, loaded, texts) == []
    return tmp_path, config, loaded, texts


def test_everything_that_a_figure_depends_on_is_recorded(begun):
    folder, _, loaded, _ = begun
    about = json.loads((folder / "provenance.json").read_text())
    assert about["seed"] == 5
    assert about["versions"]["torch"].startswith(torch.__version__.partition("+")[0])
    assert {"transformers", "numpy", "safetensors", "tokenizers", "hydra-core"} <= set(about["versions"])
    assert (about["device"], about["threads"]) == ("cpu", torch.get_num_threads())
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", about["started"])
    assert about["config_sha256"] == hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()
    assert about["model"]["weights_sha256"] == weights_sha256(loaded.model)
    assert len({split["sha256"] for split in about["data"]["splits"].values()}) == 3
    assert about["command"].split()[:3] == ["python", "-m", "replace"]
    if (Path(provenance.__file__).parents[1] / ".git").exists():
        head = ["git", "rev-parse", "HEAD"]
        told = subprocess.run(head, cwd=Path(provenance.__file__).parent, capture_output=True, text=True)
        assert about["commit"] == told.stdout.strip()
        assert isinstance(about["dirty"], bool)
    end_provenance(folder, began=0.0)
    ended = json.loads((folder / "provenance.json").read_text())
    assert ended["ended"] >= ended["started"]
    assert ended["wall_seconds"] > 0


def test_the_hash_of_the_weights_is_theirs(begun):
    _, _, loaded, _ = begun
    before = weights_sha256(loaded.model)
    assert before == weights_sha256(load_model(compose(TINY).model).model)
    with torch.no_grad():
        next(loaded.model.parameters()).view(-1)[0] += 1
    assert weights_sha256(loaded.model) != before
    half = weights_sha256(load_model(compose(TINY).model, torch.bfloat16).model)
    assert half not in (before, weights_sha256(loaded.model))


def test_the_command_is_one_that_a_shell_takes_and_holds_no_key(begun, monkeypatch):
    _, config, _, _ = begun
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 30)
    monkeypatch.setattr("sys.argv", ["replace", "stages=[2, 3]", "data.path=hf_" + "x" * 30])
    assert provenance.command(config) == "python -m replace 'stages=[2, 3]' data.path=<hidden>"
    config.resume = "/runs/my run"
    assert provenance.command(config) == """python -m replace 'resume='"'"'/runs/my run'"'"''"""


def test_a_resumed_run_says_by_what_it_was_resumed(begun, monkeypatch):
    folder, config, loaded, texts = begun
    first = json.loads((folder / "provenance.json").read_text())
    config.resume = str(folder)
    assert write_provenance(folder, config, loaded, texts) == []
    monkeypatch.setattr(provenance.metadata, "version", lambda name: "9.9")
    (said, *_) = write_provenance(folder, config, loaded, texts)
    about = json.loads((folder / "provenance.json").read_text())
    assert said == f"torch {first['versions']['torch']}, now 9.9"
    assert [one["versions"]["torch"] == "9.9" for one in about.pop("resumed")] == [False, True]
    assert about == first, "what it began with stays"


def test_an_export_tells_of_the_model_and_of_no_folder(begun):
    folder, *_ = begun
    told = for_export(folder)
    assert (told["kind"], told["seed"]) == ("tiny", 5)
    assert told["versions"]["torch"]
    assert "command" not in told
    from replace.export.write import _without_paths

    assert "/home/me" not in json.dumps(_without_paths(told))


def test_environments_differ_in_what_both_record():
    old = {"python": "3.11", "versions": {"torch": "1", "gone": "1"}, "commit": None, "dirty": False}
    new = {
        "python": "3.12",
        "versions": {"torch": "2", "new": "1"},
        "commit": "abc",
        "threads": 2,
        "dirty": False,
    }
    assert differing(old, new) == ["python 3.11, now 3.12", "torch 1, now 2", "commit None, now abc"]


# Reproduction


def test_every_difference_is_found():
    old = {"a": {"x": 1.0, "gone": [1]}, "b": [1, {"y": 2}], "c": [1, 2], "same": None, "kind": 1}
    new = {"a": {"x": 1.0 + 2**-52, "new": 3}, "b": [1, {"y": 5}], "c": [1], "same": None, "kind": True}
    assert list(compare(old, new)) == [
        ("a.x", 1.0, 1.0 + 2**-52),
        ("a.gone", [1], "absent"),
        ("a.new", "absent", 3),
        ("b[1].y", 2, 5),
        ("c", [1, 2], [1]),
        ("kind", 1, True),
    ]
    assert not list(compare(old, json.loads(json.dumps(old))))


@pytest.fixture
def finished(tmp_path):
    """A finished run as far as a reproduction reads it."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(compose([*TINY, "logger=wandb"]))))
    write_metrics(folder, figures(3.0, 1.0))
    record = {"versions": {"torch": "0.1"}, "threads": 1, "model": {"weights_sha256": "old"}}
    (folder / "provenance.json").write_text(json.dumps(record))
    return folder


def figures(ppl, seconds):
    metrics = new_metrics(
        model="m", attention="infini", layers=[0], seed=0, device="cpu", experiment="infini"
    )
    metrics["phases"]["teacher"] = {"perplexity": {"a": {"ppl": ppl}}, "seconds": {"perplexity": seconds}}
    return metrics | {"verdict": {"memory": None}, "wall_seconds": {"teacher": seconds}}


def again(monkeypatch, ppl):
    """A pipeline that measures `ppl`; returns the configs that it was given."""
    given = []

    def run(config, out):
        given.append(config)
        write_metrics(out, figures(ppl, 2.0))
        record = {"versions": {"torch": "0.2"}, "threads": 1, "model": {"weights_sha256": "new"}}
        (out / "provenance.json").write_text(json.dumps(record))

    monkeypatch.setattr(reproduce, "run", run)
    return given


def test_equal_figures_are_said_to_be_equal(finished, monkeypatch, capsys, caplog):
    given = again(monkeypatch, 3.0)
    assert main([f"run={finished}"]) == 0
    printed = capsys.readouterr().out
    assert "equal: every figure is the same, times aside" in printed
    assert "not as it was: torch 0.1, now 0.2" in printed
    assert "not as it was: model.weights_sha256 old, now new" in printed
    (out,) = (finished / "reproduced").iterdir()
    assert json.loads((out / "reproduction.json").read_text())["equal"] is True
    assert (given[0].threads, given[0].logger.kind) == (1, "none")
    assert "not as it was: torch 0.1" in (out / "run.log").read_text() + printed


def test_differences_are_listed(finished, monkeypatch, capsys, tmp_path):
    again(monkeypatch, 3.5)
    assert main([f"run={finished}", f"out={tmp_path / 'new'}"]) == 1
    printed = capsys.readouterr().out
    assert "phases.teacher.perplexity.a.ppl: 3.0, now 3.5\n" in printed
    assert "1 figures differ, times aside" in printed
    record = json.loads((tmp_path / "new" / "reproduction.json").read_text())
    place = "phases.teacher.perplexity.a.ppl"
    assert record["differences"] == [{"figure": place, "recorded": 3.0, "now": 3.5}]
    assert read_metrics(finished)["phases"]["teacher"]["perplexity"]["a"]["ppl"] == 3.0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["tiny"], "argument='tiny'"),
        (["run="], "argument='run='"),
        (["out=x"], "run=None"),
        (["run=a", "run=b"], "argument='run=b'"),
        (["run=nowhere"], "config.json"),
        (["run={run}", "out={run}"], "a new folder"),
        (["run={run}", "out={tmp}"], "a new folder"),
        (["run={run}", "out={tmp}/file"], "a new folder"),
        (["run={run}", "out={tmp}/other"], "there is a run with seed=3"),
        (["run={tmp}/other"], "metrics.json"),
        (["run={tmp}/unfinished"], "a run that has finished"),
    ],
)
def test_a_mistake_is_one_sentence(finished, monkeypatch, capsys, tmp_path, arguments, said):
    monkeypatch.setattr(reproduce, "run", lambda *given: pytest.fail("it was run"))
    (tmp_path / "file").touch()
    (tmp_path / "other").mkdir()
    other = dataclasses.asdict(compose([*TINY, "seed=3"]))
    (tmp_path / "other" / "config.json").write_text(json.dumps(other))
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "config.json").write_text(json.dumps(other))
    write_metrics(tmp_path / "unfinished", {k: v for k, v in figures(3.0, 1.0).items() if k != "verdict"})
    assert main([a.format(run=finished, tmp=tmp_path) for a in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert said in error


def test_an_interrupted_reproduction_is_gone_on_with(finished, monkeypatch, capsys, tmp_path):
    out = tmp_path / "new"

    def interrupted(config, folder):
        (folder / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
        raise KeyboardInterrupt

    monkeypatch.setattr(reproduce, "run", interrupted)
    assert main([f"run={finished}", f"out={out}"]) == 130
    command = f"`python -m replace.reproduce run={finished} out={out}` continues"
    assert command in capsys.readouterr().err
    again(monkeypatch, 3.0)
    assert main([f"run={finished}", f"out={out}"]) == 0


def test_without_arguments_it_says_how_to_start(capsys):
    assert main([]) == 2
    assert "replace.reproduce run=" in capsys.readouterr().err
    assert main(["--help"]) == 0
