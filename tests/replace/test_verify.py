"""`python -m replace.verify`: what it says of sound and of broken variants, and what a run checks."""

import json
import re
from pathlib import Path

import pytest
import torch

import replace.pipeline as pipeline
from replace.compose import choices, compose
from replace.config import AttentionConfig
from replace.convert import SwapSpec, mixers, swap
from replace.errors import UserError
from replace.properties import distance, found
from replace.properties.examine import check, examine, length_for
from replace.tiny import tiny_model
from replace.verify import main

ROOT = Path(__file__).parents[2]
SMALL = ["model=tiny", "layers=first", "layers.k=2", "attention.block=4", "attention.window=4"]
SMALL += ["attention.sinks=2", "attention.distance_cap=16"]
PEEK = """
from replace.attention.sliding_window import SlidingWindow


class Peek(SlidingWindow):
    def mix(self, blocks, exact, mass, call):
        return exact + 0.01 * exact.mean((2, 3), keepdim=True)
"""


@pytest.fixture
def peek(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A variant of somebody's own that sees the future."""
    (tmp_path / "peek.py").write_text(PEEK, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    return "peek:Peek"


@pytest.mark.parametrize(
    "overrides",
    [
        *([f"attention={name}", "attention.pairs=3"] for name in choices("attention") if name != "identity"),
        ["attention=identity"],
        ["attention=linear", "attention.local=none", "attention.window=0", "layers.k=1"],
        ["attention=infini", "attention.update=delta_bounded", "attention.pairs=0"],
        ["attention=infini", "attention.local=segment", "attention.window=0", "attention.pairs=0"],
        ["attention=linear", "attention.local=none", "attention.window=0", "attention.feature_map=taylor"],
        ["attention=linear", "attention.pairs=3", "attention.pairs_score=self_recall", "layers.k=1"],
        # No fp64 in its experts, learned sinks, a sliding window.
        ["model.family=gpt_oss", "attention=linear", "attention.pairs=3", "layers.k=1"],
    ],
    ids=" ".join,
)
def test_every_variant_holds_what_it_must(overrides: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, *overrides, "json=true"]) == 0
    about = json.loads(capsys.readouterr().out)
    assert about["passed"] is True
    verdicts = [row["passed"] for row in about["properties"]]
    assert False not in verdicts
    least = 9 if overrides == ["attention=identity"] else 24
    assert verdicts.count(True) >= least
    for row in about["properties"]:
        assert (row["figure"] is None) == (row["passed"] is None)
        assert row["passed"] is None or row["figure"] <= row["limit"]


def test_what_the_teacher_does_not_keep_is_no_failure(capsys: pytest.CaptureFixture[str]) -> None:
    """OPT's own attention sees all documents of a packed row."""
    overrides = ["model.family=opt", "attention=infini", "attention.pairs=0", "layers.k=1"]
    assert main([*SMALL, *overrides]) == 0
    said = capsys.readouterr().out.splitlines()
    (place,) = [i for i, line in enumerate(said) if "model: packed documents" in line]
    assert said[place].startswith("does not apply")
    assert "with its own attention either" in said[place + 1]


def test_a_variant_that_peeks_fails(peek: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "attention=sliding_window", f"attention.name={peek}"]) == 1
    said = capsys.readouterr().out
    failed = [line for line in said.splitlines() if line.startswith("FAILS")]
    assert any("layers 0, 1: no token sees the future" in line for line in failed)
    assert any("model: no token sees the future" in line for line in failed)
    assert "that means: outputs depend on later tokens" in said
    assert "left out: Peek has no static method `definition`" in said
    assert re.search(r"^FAILED: .*no token sees the future", said, re.M)


def test_a_variant_that_peeks_fails_in_json_and_quickly(
    peek: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*SMALL, "attention=sliding_window", f"attention.name={peek}", "quick=true", "json=true"]
    assert main(arguments) == 1
    about = json.loads(capsys.readouterr().out)
    assert about["passed"] is False
    assert [row["property"] for row in about["properties"] if row["passed"] is False]


def test_a_sound_variant_of_ones_own_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The one that CONTRIBUTING.md shows; its definition is not known, which is said."""
    shown = re.search(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.S)
    assert shown is not None
    (tmp_path / "additive.py").write_text(shown[1], encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    assert main([*SMALL, "attention=infini", "attention.name=additive:Additive", "attention.pairs=3"]) == 0
    assert "left out: Additive has no static method `definition`" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["model=tiny", "attention=softmax"], "attention='softmax' is not possible; allowed: one of "),
        (["model=tiny", "attention.block=0"], "attention.block=0 is not possible"),
        (["model=tiny", "layers=list", "layers.indices=[4]"], "layers.indices=4 is not possible"),
        (
            ["model=tiny", "layers=auto", "layers.k=2"],
            "layers='auto' is not possible; allowed: layers.ranking=",
        ),
        (
            ["model=tiny", "layers=auto", "layers.k=2", "layers.ranking=x"],
            "layers.ranking='x' is not possible",
        ),
        (["model=tiny", "quick=perhaps"], "quick='perhaps' is not possible; allowed: true or false"),
        (["model=tiny", "--fast"], "argument='--fast' is not possible"),
        (["model=tiny", "model.family=bloom"], "model.family='bloom' is not possible"),
        (["model=tiny", "attention.window=4096", "attention.distance_cap=null"], "4096 positions"),
        (["model=tiny", "attention.pairs=4096"], "attention.pairs=4096"),
        (["model=local", "model.path=nowhere"], "model.path='nowhere' is not possible"),
        (["model=tiny", "attention.name=nowhere:Class"], "cannot be imported"),
    ],
)
def test_bad_input_is_one_sentence(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.strip().splitlines()
    assert line.startswith("error: ")
    assert said in line


def test_an_interrupt_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("replace.loading.load_model", interrupted)
    assert main(SMALL) == 130
    said = capsys.readouterr().err
    assert said.startswith("error: interrupted")
    assert said.count("\n") == 1


def test_bare_says_how_to_start(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "python -m replace.verify model=smollm2" in capsys.readouterr().out


OPTIONS = AttentionConfig(block=4, window=4, sinks=2, pairs=3, distance_cap=16, pairs_score="key_norm")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_check_leaves_the_model_exactly_as_it_was(dtype: torch.dtype) -> None:
    model = tiny_model("llama").to(dtype).train()
    swap(model, SwapSpec(dict.fromkeys(range(4), OPTIONS)), keep_originals=True)
    model(torch.arange(30)[None], use_cache=False)
    first = next(iter(mixers(model).values()))
    first.clamped = first.clamped + 5
    tensors = {
        name: (x, x.clone(), x.dtype) for name, x in [*model.named_parameters(), *model.named_buffers()]
    }
    counters = [(m.calls, int(m.clamped), int(m.nonfinite)) for m in mixers(model).values()]
    drawn, modes = torch.get_rng_state(), [m.training for m in model.modules()]
    check(model)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert [m.training for m in model.modules()] == modes
    assert [(m.calls, int(m.clamped), int(m.nonfinite)) for m in mixers(model).values()] == counters
    for name, x in [*model.named_parameters(), *model.named_buffers()]:
        same, values, kind = tensors[name]
        assert x is same
        assert x.dtype == kind
        assert torch.equal(x, values)


def test_examining_leaves_the_model_exactly_as_it_was() -> None:
    model = tiny_model("llama")
    before = {name: x.clone() for name, x in model.state_dict().items()}
    classes, drawn = [type(m) for m in model.modules()], torch.get_rng_state()
    findings = list(examine(model, SwapSpec({1: OPTIONS, 2: OPTIONS})))
    assert all(finding.passed is not False for finding in findings)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert [type(m) for m in model.modules()] == classes
    after = model.state_dict()
    assert all(x.dtype == after[name].dtype and torch.equal(x, after[name]) for name, x in before.items())
    assert len(before) == len(after)


def test_a_run_refuses_a_variant_that_peeks(peek: str, tmp_path: Path) -> None:
    run = ["+exp=window", "budget=smoke", *SMALL, f"attention.name={peek}"]
    with pytest.raises(
        UserError, match=r"fails '.*no token sees the future'.*outputs depend on later tokens"
    ):
        pipeline.run(compose(run), tmp_path / "run")


def test_figures_that_are_no_numbers_fail() -> None:
    nan, one = torch.tensor([torch.nan]), torch.ones(1)
    assert distance(nan, one) == float("inf")
    assert distance(torch.ones(2), one) == float("inf")
    assert found("", "", (float("nan"), 1.0)).passed is False
    assert found("", "", "why").passed is None


def test_the_texts_fill_memory_and_pairs() -> None:
    """What has left outnumbers the pairs, and at least two blocks have."""
    for block, window, sinks, pairs in ((32, 32, 4, 64), (4, 8, 2, 3), (128, 0, 0, 0), (1, 1, 0, 5)):
        options = AttentionConfig(block=block, window=window, sinks=sinks, pairs=pairs)
        left = ((length_for([options]) - 1) // block - window // block) * block
        assert left >= max(2 * block, sinks + pairs + 1)


def test_layers_are_taken_from_a_ranking(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"layer": index} for index in range(4)]
    ranking = {"version": 1, "select": "auto", "orders": {"independent": [2, 0, 3, 1]}, "layers": rows}
    (tmp_path / "ranking.json").write_text(json.dumps(ranking))
    overrides = [
        "model=tiny",
        "attention=sliding_window",
        "quick=true",
        "json=true",
        "layers=auto",
        "layers.k=1",
    ]
    assert main([*overrides, f"layers.ranking={tmp_path}"]) == 0
    assert json.loads(capsys.readouterr().out)["title"] == "sliding_window in 1 of 4 layers of tiny"
