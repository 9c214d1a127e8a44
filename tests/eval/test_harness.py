"""lm-eval's figures for a model in memory: its own to the letter, whatever the padding, and paired."""

import json
import random
import subprocess
import sys

import numpy as np
import pytest
import torch

import eval.__main__ as command
from eval import harness
from eval.harness import add_deltas, check_tasks, offline_tasks, run_tasks
from eval.measure import conclude, measure, yardstick
from eval.metrics import new_metrics
from eval.perplexity import perplexity
from eval.report import render
from replace.compose import compose
from replace.config import OFFLINE_TASKS, AttentionConfig, Config, EvalConfig, ModelConfig
from replace.convert import SwapSpec, swap
from replace.corpora import Document
from replace.errors import UserError
from replace.export.write import export
from replace.tiny import tiny_model, tiny_tokenizer

WORDS = (
    "the",
    "pass",
    "key",
    "is",
    "a",
    "number",
    "that",
    "you",
    "must",
    "remember",
    "city",
    "never",
    "better",
)
OPTIONS = {"block": 8, "window": 8, "sinks": 2, "distance_cap": 32, "pairs": 4}
VARIANTS = {
    "infini": {},
    "gated_delta": {"pairs": 0},
    "linear": {"feature_map": "elu", "pairs": 0},
    "sliding_window": {},
}


def say(rng: random.Random, least: int, most: int) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(least, most)))


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """A user's own task file over items of very different lengths."""
    folder = tmp_path_factory.mktemp("task")
    rng = random.Random(0)
    rows = []
    for _ in range(24):
        choices = [say(rng, 4, 4) for _ in range(3)]
        rows.append({"question": say(rng, 2, 30), "choices": choices, "gold": rng.randrange(3)})
    return write_task(folder, "mine", rows)


def write_task(folder, name: str, rows: list[dict], **changes) -> str:
    """A task file and its items; returns the file's path."""
    items = folder / f"{name}.jsonl"
    items.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(items)}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True}
            for metric in ("acc", "acc_norm")
        ],
        **changes,
    }
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return str(path)


def swapped(name: str, seed: int = 2):
    """A tiny model with that attention, its mixers not as they were initialised."""
    model = tiny_model("llama")
    options = AttentionConfig(name=name, **(OPTIONS | VARIANTS[name]))
    swap(model, SwapSpec(dict.fromkeys(range(4), options)))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def hflm(model, **options):
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=model, tokenizer=tiny_tokenizer(), **options)


def requests(kind: str, *arguments: tuple):
    from lm_eval.api.instance import Instance

    return [Instance(request_type=kind, doc={}, arguments=pair, idx=0) for pair in arguments]


@pytest.mark.parametrize("length", [9, 33, 64])
def test_rolling_likelihood_is_our_perplexity_where_the_protocols_coincide(tiny, length):
    """lm-eval gives each window one token of context: ours are then one longer and share that token.

    A last window that is not full would reach further back there.
    """
    rng, text = random.Random(1), "the"
    while (count := len(tiny.tokenizer(text)["input_ids"])) < 150 or count % (length - 1):
        text += " " + rng.choice(WORDS)
    rolling = hflm(tiny.model, max_length=length - 1).loglikelihood_rolling(
        requests("loglikelihood_rolling", (text,)), disable_tqdm=True
    )
    bos = tiny.tokenizer.bos_token
    ours = perplexity(tiny.model, tiny.tokenizer, bos + text, length=length, stride=length - 1, tokens=10_000)
    assert ours["tokens"] == count
    assert sum(window["nll"] for window in ours["windows"]) == pytest.approx(-rolling[0], rel=1e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_padding_on_the_right_does_not_matter(name):
    model, rng = swapped(name), random.Random(3)
    pairs = [(say(rng, 1, 40), " " + say(rng, 1, 12)) for _ in range(12)]
    found = {
        batch: hflm(model, batch_size=batch).loglikelihood(
            requests("loglikelihood", *pairs), disable_tqdm=True
        )
        for batch in (1, 12)
    }
    for (alone, _), (padded, _) in zip(found[1], found[12], strict=True):
        assert padded == pytest.approx(alone, rel=1e-5)


def test_the_figures_are_those_of_lm_eval_s_own_run(task, tmp_path):
    """From a folder, as its command line loads a model, with the same file and limit."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    model = tiny_model("llama", seed=5)
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    theirs = simple_evaluate(
        "hf",
        model_args={"pretrained": str(tmp_path), "dtype": "float32", "device": "cpu"},
        tasks=[task],
        task_manager=TaskManager(include_defaults=False),
        limit=20,
        batch_size=1,
    )
    mine = run_tasks(model, tiny_tokenizer(), [task], 20)["mine"]
    for metric in ("acc", "acc_norm"):
        assert mine[metric] == theirs["results"]["mine"][f"{metric},none"]
        assert mine["stderr"][metric] == theirs["results"]["mine"][f"{metric}_stderr,none"]
        assert mine["hits"][metric] == [int(sample[metric]) for sample in theirs["samples"]["mine"]]
        assert 0 < sum(mine["hits"][metric]) < 20
        low, high = mine["interval"][metric]
        assert low < mine[metric] < high
    assert (mine["n"], mine["of"], mine["limit"]) == (20, 24, 20)
    assert mine["chance"] == pytest.approx(1 / 3)


def test_a_delta_is_paired_item_by_item(task):
    teacher = run_tasks(tiny_model("llama", seed=5), tiny_tokenizer(), [task], None)
    student = run_tasks(tiny_model("llama", seed=6), tiny_tokenizer(), [task], None)
    add_deltas(teacher, student)
    delta = student["mine"]["delta"]["acc"]
    gaps = np.subtract(student["mine"]["hits"]["acc"], teacher["mine"]["hits"]["acc"])
    assert np.any(gaps > 0)
    assert np.any(gaps < 0)
    assert delta["difference"] == pytest.approx(student["mine"]["acc"] - teacher["mine"]["acc"])
    assert delta["stderr"] == pytest.approx(np.std(gaps, ddof=1) / np.sqrt(24))
    assert delta["interval"][0] < delta["difference"] < delta["interval"][1]
    assert (delta["only_on"], delta["only_off"]) == (np.sum(gaps > 0), np.sum(gaps < 0))

    fewer = run_tasks(tiny_model("llama", seed=6), tiny_tokenizer(), [task], 20)
    add_deltas(teacher, fewer)
    assert fewer["mine"]["delta"] == {"why": "the teacher was not measured on these items"}


def test_metrics_that_are_not_right_or_wrong_have_an_unpaired_delta():
    def entry(value, error):
        return {"items": None, "f1": value, "stderr": {"f1": error}, "hits": {}}

    student = {"a": entry(0.5, 0.3), "b": entry(None, None), "c": entry(0.5, None)}
    add_deltas({"a": entry(0.6, 0.4), "b": entry(0.6, 0.4), "c": entry(0.6, 0.4)}, student)
    assert student["a"]["delta"]["f1"]["stderr"] == pytest.approx(0.5)
    assert student["a"]["delta"]["f1"]["interval"] == pytest.approx([-0.1 - 0.98, -0.1 + 0.98], abs=1e-3)
    assert student["b"]["delta"]["f1"]["difference"] is None
    assert student["c"]["delta"]["f1"]["stderr"] is None


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_phase_is_measured_in_its_precision_and_leaves_random_numbers_alone(task, precision):
    config = Config(model=ModelConfig(kind="tiny"), precision=precision)
    config.eval = EvalConfig(name="lm_eval", base="none", more=["lm_eval"], tasks=[task], limit=6)
    documents = [Document(f"book {i}", "It was so. " * 200, "x", "test") for i in range(2)]
    tokenizer, model = tiny_tokenizer(), swapped("infini")
    using = yardstick(tokenizer, config, documents)
    states = random.getstate(), torch.get_rng_state(), np.random.get_state()[1].copy()
    metrics = new_metrics(model="tiny", attention="infini", layers=[0, 1, 2, 3], seed=0, device="cpu")
    teacher = tiny_model("llama")
    for phase, measured in (("teacher", teacher), ("swapped", model), ("stage1", model)):
        final = phase == "stage1"
        metrics["phases"][phase] = measure(measured, tokenizer, config, phase=phase, final=final, using=using)
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
    assert np.array_equal(np.random.get_state()[1], states[2])
    assert [name for name, phase in metrics["phases"].items() if "lm_eval" in phase] == ["teacher", "stage1"]

    conclude(metrics, {"replaced": 4, "memory": 4, "pairs": 4, "full_attention": 0})
    entry = metrics["phases"]["stage1"]["lm_eval"]["mine"]
    assert entry["delta"]["acc"]["episodes"] == 6
    report = render(metrics, {})
    (row,) = [line for line in report.splitlines() if line.startswith("| mine, acc |")]
    assert "| 6 of 24 | 0.33 |" in row
    assert f"{entry['delta']['acc']['difference']:+.3f} ± " in row


def test_what_cannot_be_measured_is_refused(task, tmp_path, monkeypatch):
    # lm-eval's own tasks take half a minute to read.
    monkeypatch.setattr(harness, "_manager", lambda names: harness._index(True))
    rows = [{"question": "is it", "choices": ["a", "b"], "gold": gold} for gold in (0, 1, None)]
    unlabelled = write_task(tmp_path, "unlabelled", rows)
    negative = write_task(tmp_path, "negative", [{**row, "gold": -1} for row in rows])
    beyond = write_task(tmp_path, "beyond", [{**rows[0], "gold": 0}, {**rows[0], "gold": 2}])
    column = write_task(tmp_path, "column", rows[:2], doc_to_target="label")
    template = write_task(tmp_path, "template", rows[:2], doc_to_target="{{label}}")
    nowhere = write_task(tmp_path, "nowhere", rows[:2], doc_to_target=None)
    spoken = {"output_type": "loglikelihood", "doc_to_choice": None, "doc_to_target": "answer"}
    silent = write_task(tmp_path, "silent", [{"question": "is it", "answer": ""}], **spoken)
    for names, words in {
        ("offline_piqaa",): "'offline_piqaa' is not possible; allowed: offline_boolq, ",
        (str(tmp_path / "none.yaml"),): "a task file that exists",
        (unlabelled,): "item 2 has none",
        (negative,): "item 0 has none",
        (beyond,): "item 1 has none",
        (column,): "item 0 has none",
        (template,): "gold labels lm-eval can read",
        (nowhere,): "gold labels lm-eval can read",
        (silent,): "item 0 has none",
        (): "one or more tasks",
        (task, task): "each once",
    }.items():
        with pytest.raises(UserError, match=r"^eval\.tasks=") as error:
            check_tasks(list(names), None)
        assert words in str(error.value)
        assert "\n" not in str(error.value)
    check_tasks([unlabelled], 2)
    with pytest.raises(UserError, match=r"eval\.limit=0"):
        check_tasks([task], 0)


def test_refused_before_anything_is_loaded(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "load_model", lambda *_: pytest.fail("a model was loaded"))
    rows = [{"question": "is it", "choices": ["a", "b"], "gold": None}]
    bad = write_task(tmp_path, "bad", rows)
    for fields, words in ((f"eval.tasks=[{bad}]", "item 0 has none"), ("eval.limit=0", "eval.limit=0")):
        assert command.main(["model=tiny", "eval=lm_eval", fields, f"out={tmp_path / 'out'}"]) == 2
        said = capsys.readouterr().err.strip().replace("\r", "\n").split("\n")[-1]  # after a progress bar
        assert said.startswith("error: eval.")
        assert words in said


def test_a_dry_run_fetches_nothing(monkeypatch, tmp_path):
    from eval.measurements import check

    monkeypatch.setattr("eval.items.read_items", lambda name: pytest.fail(f"{name} was fetched"))
    check(compose(["+exp=infini", "eval=lm_eval", "dry_run=true"]))
    with pytest.raises(UserError, match=r"none\.yaml"):
        check(compose(["+exp=infini", "eval=lm_eval", "dry_run=true", f"eval.tasks=[{tmp_path}/none.yaml]"]))


def test_the_default_tasks_are_the_files():
    assert set(OFFLINE_TASKS) == set(offline_tasks())


@pytest.mark.slow
def test_a_name_that_lm_eval_does_not_know_is_refused_and_one_that_it_knows_is_found():
    with pytest.raises(UserError, match="'piqaa' is not possible"):
        check_tasks(["piqaa"], 10)
    assert "piqa" in harness._manager(["piqa"]).all_tasks


@pytest.mark.slow
def test_lm_eval_s_command_measures_an_export(tmp_path):
    """`lm_eval --model hf` on the folder gives what a run gives for the model in memory."""
    model, tokenizer = swapped("infini"), tiny_tokenizer()
    export(model, tokenizer, tmp_path / "model", provenance={})
    arguments = ["--model", "hf", "--tasks", "offline_piqa", "--include_path", str(harness.TASKS)]
    arguments += ["--model_args", f"pretrained={tmp_path / 'model'},trust_remote_code=True,dtype=float32"]
    arguments += ["--limit", "8", "--device", "cpu", "--batch_size", "8", "--log_samples"]
    arguments += ["--output_path", str(tmp_path / "out")]
    root = str(harness.TASKS.parent.parent)
    ended = subprocess.run(
        [sys.executable, "-m", "lm_eval", *arguments], capture_output=True, text=True, check=False, cwd=root
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    (written,) = (tmp_path / "out").rglob("results_*.json")
    theirs = json.loads(written.read_text())["results"]["offline_piqa"]
    mine = run_tasks(model, tokenizer, ["offline_piqa"], 8)["offline_piqa"]
    assert (mine["acc"], mine["acc_norm"]) == (theirs["acc,none"], theirs["acc_norm,none"])
    assert mine["stderr"]["acc"] == theirs["acc_stderr,none"]
