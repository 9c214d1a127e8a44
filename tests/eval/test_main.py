"""`python -m eval`: the same schema for any model; a mistake is one sentence and exit code 2."""

import random
import subprocess
import sys

import pytest

from eval.__main__ import main, parse
from eval.metrics import read_metrics
from replace.errors import UserError

WORDS = ("the", "old", "house", "stood", "near", "a", "river", "nobody", "knew", "who", "lived", "there")


def test_any_model_is_measured_in_the_same_schema(tmp_path, capsys):
    rng = random.Random(0)
    for index in range(3):
        text = " ".join(" ".join(rng.choices(WORDS, k=9)).capitalize() + "." for _ in range(300))
        (tmp_path / f"{index}.txt").write_text(text)
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
