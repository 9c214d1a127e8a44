"""The report says what the numbers say, and names what is missing."""

import copy
import itertools

import pytest

from eval.measure import conclude
from eval.metrics import new_metrics
from eval.plots import draw_all
from eval.report import PLOTS, read_log, render, write_report
from replace.errors import UserError


def test_a_whole_run_is_reported_with_all_plots(reported):
    text = (reported / "report.md").read_text()
    for name in PLOTS:
        assert (reported / "plots" / name).stat().st_size > 10_000
        assert f"(plots/{name})" in text
    assert "not measured" not in text
    assert "All 30 attention layers of SmolLM2-135M-Instruct, dequantised from Q4_1 were replaced" in text
    assert "retained pairs **used**" in text
    assert "8 distractors" in text
    assert "In 3 of 6 heads the memory makes up less than 5% of the output" in text
    assert (reported / "plots" / "inside.png").stat().st_size > 10_000
    assert "| `Once\\|upon` | `a time` | `two times` | 50% |" in text
    assert '"git": "abc"' in text
    assert "\n\n\n" not in text


def test_tables_are_whole(run):
    """Each table row has as many cells as its head, whatever the continuations of the probes contain."""
    lines = render(run, {}).splitlines()
    for above, line in itertools.pairwise(lines):
        if above.startswith("|") and line.startswith("|"):
            assert line.replace("\\|", "").count("|") == above.replace("\\|", "").count("|"), line


def test_the_first_paragraph_follows_the_numbers(run):
    before = render(run, {}).splitlines()[2]
    worse = copy.deepcopy(run)
    for cell in worse["phases"]["stage3"]["passkey"]["cells"] + worse["phases"]["stage3"]["niah"]["cells"]:
        cell["hits"] = [0] * cell["episodes"]
    conclude(worse, run["parts"])
    after = render(worse, {}).splitlines()[2]
    assert "recall at 1,024 tokens is 0.00" in after
    assert "recall at 1,024 tokens is 0.00" not in before
    assert "% of recall" in before
    assert worse["verdict"]["pairs"] == "used"  # perplexity still needs them
    assert worse["recovery"]["recall"]["value"] == 0


def test_layers_with_full_attention_are_named(run):
    conclude(run, run["parts"] | {"full_attention": 5, "replaced": 25})
    text = render(run, {})
    assert "25 of 30 attention layers" in text
    assert "carried-by-full-attention" in text


@pytest.mark.parametrize(
    "missing", ["perplexity", "passkey", "niah", "probes", "layer_outputs", "ablation", "speed"]
)
def test_a_figure_that_is_missing_is_named(run, train_log, tmp_path, missing):
    for phase in run["phases"].values():
        phase.pop(missing, None)
    conclude(run, run["parts"])
    text = render(run, draw_all(run, train_log, tmp_path))
    assert text.startswith("# ")
    if missing not in ("passkey", "niah"):  # one of the two is enough for the tables and plots
        assert "not measured: " in text or "not judged: " in text


def test_an_empty_run_is_reported():
    metrics = new_metrics(model="m", attention="infini", layers=[], seed=0, device="cpu")
    text = render(metrics, dict.fromkeys(PLOTS, "nothing was measured"))
    assert "no attention layer was replaced" in text
    assert text.count("nothing was measured") == len(PLOTS)


def test_a_figure_without_a_value_says_why(run):
    entry = run["phases"]["stage3"]["perplexity"]["The Voyage Out"]
    entry.update(ppl=None, interval=None, bits_per_byte=None, why="the loss is not finite")
    conclude(run, run["parts"])
    assert "not measured: the loss is not finite" in render(run, {})


def test_a_log_that_was_cut_off_is_read_as_far_as_it_goes(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"stage": 1, "loss": 2.0}\n{"stage": 1, "lo')
    assert read_log(tmp_path / "train.jsonl") == [{"stage": 1, "loss": 2.0}]
    assert read_log(tmp_path / "none.jsonl") == []


def test_the_loss_is_a_mean_over_tenths_of_the_logged_steps(run):
    log = [{"stage": 1, "step": step, "loss": float(step)} for step in range(40)]
    lines = render(run, {}, log=log).splitlines()
    assert any("stage 1" in line and "1.5 → 37.5" in line for line in lines)
    assert any("stage 2" in line and "2 → 0.5 (first and last step)" in line for line in lines)
    assert "first → last tenth of the logged steps" in "\n".join(lines)


def test_the_report_says_what_episodes_counts(run):
    assert "counts those of one length and depth" in render(run, {})


def test_a_folder_without_metrics_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"run=.*metrics\.json"):
        write_report(tmp_path)
