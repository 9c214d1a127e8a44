"""The sweep files: an agent's command line is one that this project takes."""

import functools
import itertools
import json
import os
import subprocess
import sys
import zipfile
from contextlib import suppress
from pathlib import Path

import jsonschema
import pytest
import yaml
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

from replace.__main__ import normalise
from replace.compose import CONF, GROUPS, SWEEPS, compose, overridden
from replace.config import Config
from replace.errors import UserError
from replace.validation import validate

FILES = sorted((CONF / SWEEPS).glob("*.yaml"))


def read(path: Path) -> dict:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def trials(sweep: dict) -> list[dict]:
    """Trials that an agent could be given: every combination of listed values, the ends of each range."""
    names = list(sweep["parameters"])
    choices = [p.get("values") or [p["min"], p["max"]] for p in sweep["parameters"].values()]
    return [dict(zip(names, values, strict=True)) for values in itertools.product(*choices)]


def command_of(sweep: dict, trial: dict) -> list[str]:
    """What wandb's agent runs for a trial, by its own functions."""
    given = create_sweep_command_args({"args": {name: {"value": value} for name, value in trial.items()}})
    words = []
    for word in create_sweep_command(sweep["command"]):
        words += given["args_no_hyphens"] if word == "${args_no_hyphens}" else [word]
    return words


@functools.cache
def composed(options: tuple[str, ...]) -> Config:
    """The options of groups, which many trials share, composed once."""
    return compose(options)


def config_of(arguments: list[str]) -> Config:
    """What `compose` gives, in a fifth of its time: single values are put into what the groups make."""
    groups = tuple(word for word in arguments if word.lstrip("+").partition("=")[0] in (*GROUPS, "exp"))
    return overridden(composed(groups), [word for word in arguments if word not in groups])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_an_agent_s_trials_are_taken_or_refused_in_a_sentence(path, tmp_path):
    sweep = read(path)
    taken = 0
    for place, trial in enumerate(trials(sweep)):
        words = command_of(sweep, trial)
        start = words.index("replace") + 1
        assert words[start - 2 : start] == ["-m", "replace"]
        arguments = [word for word in normalise(words[start:]) if not word.startswith("source=")]
        assert "logger=wandb" in arguments
        with suppress(UserError):
            config = config_of(arguments)
            assert place % 10 or config == compose(arguments)
            validate(config)
            taken += 1
    assert taken >= 3


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_sweep_minimises_the_one_objective(path):
    sweep = read(path)
    assert sweep["metric"] == {"name": "objective", "goal": "minimize"}
    assert {read(file)["method"] for file in FILES} == {"bayes", "grid", "random"}
    assert any("early_terminate" in read(file) for file in FILES)


@pytest.mark.slow
def test_wandb_s_own_schema_takes_every_sweep(tmp_path):
    """The package `sweeps` wants an older numpy than ours, so its schema is read out of the wheel."""
    fetch = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(tmp_path), "sweeps==0.3.0"]
    subprocess.run(fetch, check=True)
    (wheel,) = tmp_path.glob("sweeps-*.whl")
    schema = json.loads(zipfile.ZipFile(wheel).read("sweeps/config/schema.json"))
    for path in FILES:
        jsonschema.validate(read(path), schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(read(FILES[0]) | {"method": "guess"}, schema)


@pytest.mark.slow
def test_an_agent_s_command_runs(tmp_path, monkeypatch, summaries):
    """The very command line, with a model and a budget that a test can afford behind it."""
    sweep = read(CONF / SWEEPS / "window.yaml")
    words = command_of(sweep, trials(sweep)[0])
    words = ["/usr/bin/env" if word == "${env}" else word for word in words]  # as the agent does
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("WANDB_SWEEP_ID", "abc")
    monkeypatch.setenv("WANDB_RUN_ID", "trial1")
    monkeypatch.setenv("WANDB_MODE", "offline")
    small = ["model=tiny", "budget=smoke", f"hydra.run.dir={tmp_path / 'run'}"]
    ended = subprocess.run([*words, *small], capture_output=True, text=True, check=False, cwd=CONF.parent)
    assert ended.returncode == 0, ended.stderr[-2000:]
    (summary,) = summaries(tmp_path / "run")
    assert isinstance(summary["objective"], float)
    assert [place.name[-6:] for place in tmp_path.glob("run/wandb/offline-run-*")] == ["trial1"]
