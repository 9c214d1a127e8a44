"""The real Unsloth on a swapped model, where it is installed; `.ci/unsloth` makes the environment."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from distill.lora.choice import this_machine, why_not_unsloth
from replace.config import LoraConfig

REFUSAL = why_not_unsloth(LoraConfig(kind="unsloth"), this_machine())
ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.unsloth,
    pytest.mark.skipif(REFUSAL is not None, reason=f"{REFUSAL}"),
]


def run(arguments: list[str], where: Path) -> subprocess.CompletedProcess:
    """A process of its own: Unsloth patches the one that it is imported in."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=where, env=environment)


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("unsloth")
    ended = run([str(Path(__file__).parent / "unsloth_run.py"), str(folder)], folder)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return json.loads((folder / "found.json").read_text())


def test_unsloth_made_the_adapters_and_bypassed_nothing(found):
    assert found["backend"] == "unsloth", found["why"]
    assert found["merged"] < 1e-4
    assert found["reloaded"] < 1e-4


def test_the_default_model_is_proven_in_half_precision(found):
    assert found["default_model"]["backend"] == "unsloth", found["default_model"]["why"]


def test_each_step_has_the_loss_that_peft_has(found):
    assert len(found["unsloth"]) == len(found["peft"]) == 8
    assert max(abs(a - b) for a, b in zip(found["unsloth"], found["peft"], strict=True)) < 1e-3
    assert found["unsloth"][-1] < found["unsloth"][0] - 0.1
    assert found["weights"] < 1e-3


def test_unsloths_own_loss_on_the_packed_rows_is_ours(found):
    own = found["own_loss"]
    assert own["unchanged"] < 1e-5
    assert all(calls > 0 for calls in own["calls"])
    assert abs(own["theirs"] - own["ours"]) < 1e-3
    assert own["chunked"] == (found["device"] == "cpu")


def test_four_bit_is_for_the_training_alone_and_the_export_loads_in_it(found):
    four = found["four_bit"]
    if "backend" not in four:
        pytest.skip(four["why"])
    assert four["backend"] == "unsloth", four["why"]
    assert four["losses"][-1] < four["losses"][0]
    assert four["kinds"] == ["Linear"]
    assert four["linear"] == ["Linear4bit"]
    assert four["mixer"] == ["torch.float32"]
    assert four["difference"] < 0.5


def test_the_command_tunes_by_unsloth(tmp_path):
    budget = ["budget=smoke", *(f"budget.stage{n}.tokens=0" for n in (1, 2, 3)), "eval.base=perplexity"]
    tiny = ["+exp=infini", "model=tiny", "lora=unsloth", "lora.template=plain", *budget]
    ended = run(["-m", "replace", *tiny, f"hydra.run.dir={tmp_path / 'run'}"], tmp_path)
    assert ended.returncode == 0, ended.stderr[-3000:]
    phase = json.loads((tmp_path / "run" / "metrics.json").read_text())["phases"]["lora"]
    assert phase["tuning"]["backend"] == "unsloth", phase["tuning"]["why"]
    assert not list(tmp_path.glob("unsloth_compiled_cache"))
