"""The command: how it starts, how it refuses, what a dry run says, and what a resumed run may be told."""

import dataclasses
import json
import logging
import os
import re
import shlex
import signal
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest

from replace import validation
from replace.__main__ import main
from replace.compose import compose
from replace.config import Config, ModelConfig
from replace.dry_run import refuse_too_large
from replace.errors import UserError
from replace.loading import check_model

TINY = ["+exp=infini", "budget=smoke", "model=tiny", "layers=all"]

AUTO = [*TINY, "layers=auto", "layers.k=2"]
NO_WINDOW = ["attention.local=none", "attention.window=0"]
NO_RECALL = ["data.recall=0", "data.recall_transfer=0", "budget.eval.phase_lengths=[5000]"]
NO_RECALL += ["budget.eval.final_lengths=[5000]"]
BY_WEIGHTS = ["stage.transfer_loss=attention_weights"]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative output folders land in a temporary one."""
    monkeypatch.chdir(tmp_path)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a command line that must be refused; return its one sentence."""
    code = main(list(arguments))
    captured = capsys.readouterr()
    assert code == 2
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("error: ")
    assert "Traceback" not in captured.out + captured.err
    assert not Path("outputs").exists(), "a refused run leaves no folder"
    return lines[0]


BAD = [
    # what is typed, the field, the value, a part of what is allowed
    (["+exp=infinii"], "exp", "infinii", "infini_paper"),
    (["exp=window", "budget=huge"], "budget", "huge", "smoke"),
    (["+exp=infini", "attention=softmax"], "attention", "softmax", "sliding_window"),
    (["+exp=infini", "layers=[1,2]"], "layers", "[1, 2]", "layers=list"),
    (["+exp=infini", "model=5"], "model", "5", "smollm2"),
    (["+exp=infini", "seeed=1"], "seeed", "1", "did you mean seed"),
    (["+exp=infini", "attention.blok=3"], "attention.blok", "3", "did you mean block"),
    (["+exp=infini", "+unheard=3"], "unheard", "3", "the keys"),
    (["+exp=infini", "+attention.unheard=3"], "attention.unheard", "3", "the keys"),
    (["+exp=infini", "~seed"], "argument", "~seed", "key=value"),
    (["+exp=infini", "seed=abc"], "seed", "abc", "a whole number"),
    (["+exp=infini", "stages=x"], "stages", "x", "a list"),
    (["+exp=infini", "data.recall="], "data.recall", "", "a number"),
    (["+exp=infini", "verbose=perhaps"], "verbose", "perhaps", "true or false"),
    (["+exp=infini", "model.id.deeper=3"], "model.id.deeper", "3", "model.id without further keys"),
    (["+exp=infini", "seed"], "argument", "seed", "key=value"),
    (["+exp=infini", "seed='"], "argument", "seed='", "key=value"),
    (["+exp=infini", "seed=1,2"], "seed", "1,2", "--multirun"),
    (["+exp=infini", "budget=glob(s*)", "--multirun"], "budget", "glob(s*)", "with commas"),
    (["--json"], "argument", "--json", "key=value"),
    ([*TINY, "attention.name=softmax"], "attention.name", "softmax", "infini"),
    (
        [*TINY, "attention.feature_map=relu"],
        *("attention.feature_map", "relu", "one of elu, hedgehog, t2r, taylor"),
    ),
    ([*TINY, "attention.pairs_score=best"], "attention.pairs_score", "best", "learned"),
    (
        [*TINY, "attention.name=sliding_window", "attention.pairs_score=self_recall"],
        *("attention.pairs_score", "self_recall", "attention, key_norm, learned, random"),
    ),
    ([*TINY, "attention.update=newton"], "attention.update", "newton", "delta_bounded"),
    ([*TINY, "attention.gate=wide"], "attention.gate", "wide", "head"),
    ([*TINY, "attention.write_gate=wide"], "attention.write_gate", "wide", "token"),
    ([*TINY, "attention.local=global"], "attention.local", "global", "segment"),
    ([*TINY, "attention.block=0"], "attention.block", "0", "at least 1"),
    ([*TINY, "attention.block=-4"], "attention.block", "-4", "at least 1"),
    ([*TINY, "attention.block=8192"], "attention.window", "32", "a multiple of attention.block=8192"),
    ([*TINY, "attention.window=33"], "attention.window", "33", "a multiple of attention.block=32"),
    ([*TINY, "attention.window=-32"], "attention.window", "-32", "a multiple of attention.block=32"),
    ([*TINY, "attention.window=0"], "attention.window", "0", "attention.local=segment has no window"),
    (
        [*TINY, "attention.window=4096", "attention.distance_cap=null", *NO_RECALL],
        *("attention.window", "4096", "at most 4064: the model's 4096 positions less attention.block"),
    ),
    ([*TINY, *NO_WINDOW], "attention.local", "none", "segment, sliding_window, where attention.name=infini"),
    (
        ["+exp=window", *TINY[1:], *NO_WINDOW],
        *("attention.local", "none", "segment, sliding_window, where attention.name=sliding_window"),
    ),
    (
        [*TINY, "attention.name=linear", "attention.local=none"],
        *("attention.window", "32", "0, since attention.local=none"),
    ),
    (
        [*TINY, "attention.name=linear", *NO_WINDOW, "attention.pairs_score=attention"],
        *("attention.pairs_score", "attention", "where attention.local=none"),
    ),
    (
        [*TINY, "attention.name=linear", *NO_WINDOW, "layers.rest=sliding_window"],
        *("layers.rest", "sliding_window", "keep, identity, linear, since"),
    ),
    (
        ["+exp=infini", "budget=smoke", *BY_WEIGHTS, "attention.feature_map=taylor"],
        *("stage.transfer_loss", "attention_weights", "attention.feature_map=hedgehog or t2r"),
    ),
    (
        ["+exp=window", "budget=smoke", *BY_WEIGHTS],
        *(
            "stage.transfer_loss",
            "attention_weights",
            "since attention.name=sliding_window has no feature map",
        ),
    ),
    ([*TINY, *BY_WEIGHTS, "stage.lr_map1=0"], "stage.lr_map1", "0.0", "above 0"),
    ([*TINY, "attention.sinks=33"], "attention.sinks", "33", "0 to attention.block=32"),
    ([*TINY, "attention.pairs=-1"], "attention.pairs", "-1", "0 or more"),
    ([*TINY, "attention.distance_cap=63"], "attention.distance_cap", "63", "at least 64"),
    ([*TINY, "attention.clamp=0"], "attention.clamp", "0.0", "above 0"),
    ([*TINY, "layers=list"], "layers.indices", "[]", "0 to 3"),
    ([*TINY, "layers=list", "layers.indices=[4]"], "layers.indices", "4", "0 to 3"),
    ([*TINY, "layers=list", "layers.indices=[1,1]"], "layers.indices", "[1, 1]", "each layer once"),
    ([*TINY, "layers=first"], "layers.k", "5", "1 to 4"),
    ([*TINY, "layers=auto"], "layers.k", "8", "1 to 3, fewer than the model's 4 layers"),
    ([*TINY, "layers=auto", "layers.k=4"], "layers.k", "4", "layers=all takes them all"),
    ([*AUTO, "layers.k=0"], "layers.k", "0", "1 to 3"),
    ([*AUTO, "layers.rest=sliding_window"], "layers.rest", "sliding_window", "keep, since layers=auto"),
    ([*AUTO, "layers.search=best"], "layers.search", "best", "one of independent, greedy"),
    ([*AUTO, "layers.recall_weight=-1"], "layers.recall_weight", "-1.0", "0 (by the KL alone) or more"),
    ([*AUTO, "layers.ranking=nowhere"], "layers.ranking", "nowhere", "the folder of a run with layers=auto"),
    ([*AUTO, "layers.ranking="], "layers.ranking", "", "a run's folder"),
    ([*AUTO, "budget.choice.rows=0"], "budget.choice.rows", "0", "at least 1"),
    ([*AUTO, "budget.choice.length=100"], "budget.choice.length", "100", "192 (128 + attention.window"),
    ([*AUTO, "budget.choice.length=5000"], "budget.choice.length", "5000", "to 4096, the model's positions"),
    ([*AUTO, "budget.choice.tokens=10"], "budget.choice.tokens", "10", "at least 320, one step"),
    ([*TINY, "layers.search=greedy"], "layers.search", "greedy", "needs layers=auto"),
    ([*TINY, "layers.compare=true"], "layers.compare", "True", "needs layers=auto or layers=retrieval"),
    ([*TINY, "layers=retrieval", "layers.search=greedy"], "layers.search", "greedy", "needs layers=auto"),
    ([*TINY, "layers.rest=nothing"], "layers.rest", "nothing", "keep"),
    ([*TINY, "layers.select=some"], "layers.select", "some", "retrieval"),
    ([*TINY, "stages=[1,4]"], "stages", "[1, 4]", "1, 2 and 3"),
    ([*TINY, "stages=[]"], "stages", "[]", "one or more"),
    ([*TINY, "stages=[2,2]"], "stages", "[2, 2]", "each stage once"),
    ([*TINY, "stage.transfer_loss=l1"], "stage.transfer_loss", "l1", "cosine"),
    ([*TINY, "stage.warmup=2"], "stage.warmup", "2.0", "from 0 to 1"),
    ([*TINY, "stage.lr_gate=-1"], "stage.lr_gate", "-1.0", "learning rate"),
    ([*TINY, "data.recall=1.5"], "data.recall", "1.5", "from 0 to 1"),
    ([*TINY, "budget.stage1.length=63"], "budget.stage1.length", "63", "at least 64"),
    ([*TINY, "budget.stage1.tokens=10"], "budget.stage1.tokens", "10", "at least 1024"),
    ([*TINY, "budget.stage2.batch=0"], "budget.stage2.batch", "0", "at least 1"),
    ([*TINY, "budget.eval.final_lengths=[64]"], "budget.eval.final_lengths", "64", "at least 192"),
    ([*TINY, "budget.eval.final_lengths=[]"], "budget.eval.final_lengths", "[]", "at least one length"),
    ([*TINY, "budget.eval.phase_lengths=[]"], "budget.eval.phase_lengths", "[]", "at least one length"),
    ([*TINY, "budget.eval.phase_lengths=[320,4097]"], "budget.eval.phase_lengths", "4097", "at most 4096"),
    ([*TINY, "budget.eval.final_lengths=[8192]"], "budget.eval.final_lengths", "8192", "at most 4096"),
    (
        [*TINY, "budget.eval.perplexity_length=5000", "budget.eval.perplexity_tokens=5000"],
        *("budget.eval.perplexity_length", "5000", "at most 4096"),
    ),
    ([*TINY, "budget.stage1.length=128"], "budget.stage1.length", "128", "at least 192"),
    ([*TINY, "budget.stage2.length=128"], "budget.stage2.length", "128", "data.recall=0.34"),
    ([*TINY, "data.recall_transfer=-0.1"], "data.recall_transfer", "-0.1", "from 0 to 1"),
    ([*TINY, "attention.scale=0"], "attention.scale", "0.0", "above 0, or null"),
    ([*TINY, "attention.local=segment"], "attention.window", "32", "0, since attention.local=segment"),
    ([*TINY, "eval.name=everything"], "eval.name", "everything", "recall"),
    ([*TINY, "eval=everything"], "eval", "everything", "recall"),
    ([*TINY, "stage.lr_stage3=0"], "stage.lr_stage3", "0.0", "above 0"),
    ([*TINY, "stage.validate_every=-1"], "stage.validate_every", "-1", "0 (never)"),
    ([*TINY, "stage.validate_rows=0"], "stage.validate_rows", "0", "at least 1"),
    ([*TINY, "stage.patience=3"], "stage.patience", "3", "stage.validate_every=0"),
    (
        ["+exp=infini", "budget=smoke", "model=tiny", "attention.pairs_score=self_recall"],
        *("layers.rest", "sliding_window", "keep, "),
    ),
    ([*TINY, "precision=fp8"], "precision", "fp8", "bf16"),
    ([*TINY, "threads=0"], "threads", "0", "the cores of this machine"),
    ([*TINY, "lora.kind=all"], "lora.kind", "all", "none, peft, unsloth, auto"),
    ([*TINY, "lora=lora"], "lora", "lora", "auto, none, peft, unsloth"),
    ([*TINY, "lora.rank=8"], "lora.rank", "8", "needs lora=peft or lora=unsloth or lora=auto"),
    ([*TINY, "lora=peft", "lora.rank=0"], "lora.rank", "0", "at least 1"),
    ([*TINY, "lora=peft", "lora.dropout=1"], "lora.dropout", "1.0", "below 1"),
    ([*TINY, "lora=peft", "lora.bias=some"], "lora.bias", "some", "lora_only"),
    ([*TINY, "lora=peft", "lora.data=mail"], "lora.data", "mail", "chat, text"),
    ([*TINY, "lora=peft", "lora.path=nowhere.jsonl"], "lora.path", "nowhere.jsonl", "that exists"),
    ([*TINY, "lora=peft", "lora.data=text", "lora.template=chatml"], "lora.template", "chatml", "null"),
    ([*TINY, "lora=unsloth", "lora.dropout=0.05"], "lora.dropout", "0.05", "0 beside lora=unsloth, since"),
    ([*TINY, "lora=unsloth", "lora.dora=true"], "lora.dora", "True", "or lora=peft"),
    (
        [*TINY, "lora=peft", "budget.lora.length=8192", "budget.lora.tokens=16384"],
        *("budget.lora.length", "8192", "at most 4096"),
    ),
    ([*TINY, "export_dtype=int4"], "export_dtype", "int4", "fp32, bf16, fp16"),
    ([*TINY, "model=hf"], "model.id", "None", "hub model"),
    ([*TINY, "model=local", "model.path=nowhere"], "model.path", "nowhere", "config.json"),
    ([*TINY, "data=files"], "data.path", "None", "file"),
    ([*TINY, "data=files", "data.path=missing.txt"], "data.path", "missing.txt", "exists"),
    ([*TINY, "data=hf"], "data.path", "None", "hub data set"),
    ([*TINY, "source=nowhere"], "from", "nowhere", "the folder of a run"),
    (["resume=nowhere"], "resume", "nowhere", "the folder of a run"),
    # What the chosen option of a group does not read.
    ([*TINY, "data.path=/nope"], "data.path", "/nope", "needs data=files or data=hf"),
    ([*TINY, "data.name=en"], "data.name", "en", "needs data=hf"),
    ([*TINY, "data.text_field=body"], "data.text_field", "body", "needs data=files or data=hf"),
    ([*TINY, "model.id=a/b"], "model.id", "a/b", "needs model=hf"),
    ([*TINY, "model.path=/nope"], "model.path", "/nope", "needs model=local"),
    (["+exp=infini", "model.family=gpt2"], "model.family", "gpt2", "needs model=tiny"),
    ([*TINY, "layers.indices=[99]"], "layers.indices", "[99]", "needs layers=list"),
    ([*TINY, "layers.k=-3"], "layers.k", "-3", "needs layers=every or layers=first"),
    ([*TINY, "logger.project=mine"], "logger.project", "mine", "needs logger=wandb"),
    # Names that import something else, or nothing.
    ([*TINY, "attention.name=json:dumps"], "attention.name", "json:dumps", "a subclass of Module"),
    ([*TINY, "attention.name=json:JSONDecoder"], "attention.name", "JSONDecoder", "a subclass of Module"),
    ([*TINY, "attention.feature_map=json:dumps"], "attention.feature_map", "dumps", "of FeatureMap"),
    ([*TINY, "attention.feature_map=torch.nn:GELU"], "attention.feature_map", "GELU", "of FeatureMap"),
    ([*TINY, "attention.pairs_score=json:dumps"], "attention.pairs_score", "dumps", "a subclass of Score"),
    ([*TINY, "attention.update=json:dumps"], "attention.update", "dumps", "a function called as ours"),
    ([*TINY, "attention.name=replace.attention.infini:Other"], "attention.name", "Other", "Infini"),
    ([*TINY, "layers.rest=json:dumps"], "layers.rest", "json:dumps", "a subclass of Module"),
    # Numbers that are none.
    ([*TINY, "attention.scale=inf"], "attention.scale", "inf", "a finite number"),
    ([*TINY, "attention.scale=nan"], "attention.scale", "nan", "a finite number"),
    ([*TINY, "attention.gate_init=nan"], "attention.gate_init", "nan", "a finite number"),
    ([*TINY, "attention.gate_init=-inf"], "attention.gate_init", "-inf", "a finite number"),
    ([*TINY, "attention.gate_init=1e300"], "attention.gate_init", "1e+300", "a finite number"),
    ([*TINY, "attention.clamp=inf"], "attention.clamp", "inf", "a finite number"),
    ([*TINY, "stage.lr_gate=nan"], "stage.lr_gate", "nan", "a finite number"),
    ([*TINY, "stage.clip=inf"], "stage.clip", "inf", "a finite number"),
    ([*TINY, "eval.niah_depths=[0,nan]"], "eval.niah_depths", "nan", "a finite number"),
    (
        [*TINY, "attention.pairs=100000000"],
        "attention.pairs",
        "100000000",
        "0 to 4096, the model's positions",
    ),
    # Folders without a name, and families that cannot be tried.
    (["resume="], "resume", "", "the folder of a run"),
    ([*TINY, "hydra.run.dir="], "hydra.run.dir", "", "a folder for the run"),
    ([*TINY, "from="], "from", "", "the folder of a run"),
    ([*TINY, "--multirun", "hydra.sweep.dir=''"], "hydra.sweep.dir", "", "a folder for the runs"),
    *(
        ([*TINY, f"model.family={family}", f"dry_run={dry}"], "model.family", family, "a ")
        for family in ("t5", "clip", "bert", "mamba", "gpt_neo", "xlnet")
        for dry in ("true", "false")
    ),
    (["resume=nowhere", "--multirun"], "argument", "--multirun", "resume="),
    (["resume='~nobody_there/run'"], "resume", "~nobody_there/run", "the folder of a run"),
    ([*TINY, "model=local", "model.path='~nobody_there'"], "model.path", "~nobody_there", "config.json"),
    # What Hydra would answer with its usage, or not at all.
    (["+exp=infini", "--cfg"], "argument", "-c: expected one argument", "--hydra-help"),
    (["+exp=infini", "--info=x"], "argument", "invalid choice: 'x'", "--hydra-help"),
    (["+exp=infini", "--multirun=3"], "argument", "-m", "--hydra-help"),
    (["+exp=infini", "--config-dir", "*1}9(=9"], "argument", "*1}9(=9", "key=value"),
    (["+exp=infini", "hydra=3"], "hydra", "3", "the name of an option"),
    (["+exp=infini", "hydra/launcher=3"], "hydra/launcher", "3", "the name of an option"),
    (["+exp=infini", "~hydra"], "argument", "~hydra", "nothing can be deleted"),
    (["+exp=infini", "logger.api_key=abcdefgh"], "argument", "logger.api_key=...", "in the environment"),
]


def test_the_table_is_long() -> None:
    print(f"{len(BAD)} bad invocations")
    assert len(BAD) >= 140
    assert len({" ".join(row[0]) for row in BAD}) == len(BAD)


@pytest.mark.parametrize(
    ("arguments", "field", "value", "allowed"), BAD, ids=[" ".join(row[0]) for row in BAD]
)
def test_a_mistake_is_one_sentence(
    capsys: pytest.CaptureFixture[str], arguments: list[str], field: str, value: str, allowed: str
) -> None:
    sentence = refused(capsys, *arguments)
    assert re.match(rf"error: {re.escape(field)}=", sentence), sentence
    assert value in sentence
    assert allowed in sentence.partition("allowed: ")[2]


@pytest.mark.parametrize(
    "overrides",
    [
        ["budget.stage1.length=128", "data.recall_transfer=0"],
        ["stage.lr_stage3=0", "stages=[1,2]"],
        ["stage.lr_stage3=0", "budget.stage3.tokens=0"],
        ["attention.local=segment", "attention.window=0"],
        ["layers=retrieval", "layers.rest=keep", "attention.pairs_score=self_recall"],
        ["budget.eval.speed_lengths=[65536]"],
        ["budget.choice.length=100"],
        ["layers=auto", "layers.k=3", "budget.choice.tokens=0"],
        ["attention.scale=0.5", "eval=recall"],
        ["attention.feature_map=taylor"],
        [*BY_WEIGHTS, "attention.feature_map=t2r"],
        ["attention.name=linear", *NO_WINDOW, "attention.sinks=0", "attention.pairs=0"],
        ["attention.name=linear", *NO_WINDOW, "layers=retrieval", "layers.rest=identity"],
    ],
)
def test_what_does_no_harm_is_allowed(overrides: list[str]) -> None:
    validation.validate(compose([*TINY, *overrides]))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("empty.txt", b"", "not empty"),
        ("binary.txt", b"\x7fELF\0\0\0", "not binary"),
        ("short.txt", b"A few words.", "at least one row of 512 tokens"),
        ("picture.png", b"\x89PNG", ".txt"),
    ],
)
def test_a_file_that_is_no_text_is_refused(
    capsys: pytest.CaptureFixture[str], name: str, content: bytes, said: str
) -> None:
    Path(name).write_bytes(content)
    assert said in refused(capsys, *TINY, "data=files", f"data.path={name}")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        (":", "", "ValueError"),
        (".foo:Bar", "", "TypeError"),
        ("nowhere_at_all:Bar", "", "No module named"),
        ("own_syntax:Bar", "def (:\n", "SyntaxError"),
        ("own_raises:Bar", "raise RuntimeError('on the\\nway')\n", "RuntimeError: on the way"),
        ("own_ends:Bar", "import sys\nsys.exit(3)\n", "SystemExit: 3"),
    ],
)
@pytest.mark.parametrize("field", ["attention.name", "attention.feature_map"])
def test_a_module_that_cannot_be_imported_is_a_sentence(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, field: str, name: str, content: str,
    said: str,
) -> None:  # fmt: skip
    if content:
        Path(f"{name.partition(':')[0]}.py").write_text(content)
    monkeypatch.syspath_prepend(str(Path.cwd()))
    sentence = refused(capsys, *TINY, f"{field}='{name}'")
    assert f"{field}={name!r} cannot be imported: " in sentence
    assert said in sentence


def test_a_resumed_run_may_hold_what_it_never_read() -> None:
    config = compose([*TINY, "layers.k=7"])
    config.resume = "run"
    validation.validate(config)


def test_text_without_a_whole_row_is_refused_before_the_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from replace import pipeline

    Path("short.txt").write_text("The grass is green and the sky is blue. " * 90)
    monkeypatch.setattr(pipeline, "load_model", lambda *_: pytest.fail("a model was loaded"))
    config = compose([*TINY, "data=files", "data.path=short.txt", "budget.stage2.length=1024"])
    said = r"data\.path='short\.txt' .* 1024 tokens, .*budget\.stage2\.length \(the longest has \d+\)"
    with pytest.raises(UserError, match=said):
        pipeline.run(config, Path("run"))
    config.stages = [1]  # its rows are shorter, and there is text enough
    with pytest.raises(pytest.fail.Exception, match="a model was loaded"):
        pipeline.run(config, Path("other"))


@pytest.mark.parametrize("family", validation.NOT_CAPTURED)
def test_a_family_that_cannot_be_captured_is_refused_by_name(family: str) -> None:

    facts = dataclasses.replace(check_model(ModelConfig()), family=family)
    with pytest.raises(UserError, match=family):
        validation.validate(compose(["+exp=infini"]), facts)


def test_an_output_folder_that_cannot_be_made(capsys: pytest.CaptureFixture[str]) -> None:
    Path("occupied").write_text("a file")
    sentence = refused(capsys, *TINY, "hydra.run.dir=occupied/run")
    assert "occupied" in sentence


def test_the_folder_of_another_run_is_not_written_into(capsys: pytest.CaptureFixture[str]) -> None:
    written_run(Path("old"), [*TINY])
    assert "resume=" in refused(capsys, *TINY, "hydra.run.dir=old")


def test_verbose_adds_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["+exp=infini", "attention.block=0", "verbose=true"]) == 2
    printed = capsys.readouterr().err
    assert "Traceback" in printed
    assert printed.strip().splitlines()[-1].startswith("error: attention.block=0")


def test_bare_says_how_to_start(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "python -m replace +exp=infini" in capsys.readouterr().out


def test_a_dry_run_tells_and_writes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["+exp=infini", "dry_run=true"]) == 0
    said = capsys.readouterr().out
    for word in ("infini", "sliding_window", "stage 1", "stage 3", "minutes", "memory", "disk", "estimates"):
        assert word in said
    assert not list(Path().iterdir())


def test_a_dry_run_tells_that_there_is_nothing_to_learn(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["+exp=window", "stage.lr_projection1=0", "dry_run=true"]) == 0
    assert "  stage 1  left out, since there is nothing to learn\n" in capsys.readouterr().out


def test_a_dry_run_tells_what_a_choice_of_layers_costs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["+exp=infini", "layers=auto", "layers.k=8", "layers.search=greedy", "dry_run=true"]) == 0
    said = capsys.readouterr().out
    assert "8 get infini (measured first: those that cost least)" in said
    # 30 + 29 + ... + 23 layers and 5 sets, of 4 rows and 4 needles of 512 tokens
    assert "217 measurements of 4,096 tokens of dev text and a transfer of 8,192 tokens, about " in said
    assert main(["+exp=infini", "layers=all", "dry_run=true"]) == 0
    assert "  choice  " not in capsys.readouterr().out


def test_a_dry_run_plans_for_devices_and_refuses_what_they_cannot_hold(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each of eight needs less in shards; what is too much is refused, and how much it is, is said."""
    planned = ["+exp=infini", "layers=all", "budget=standard", "lora=none", "dry_run=true"]
    needed = {}
    for count, sharding in ((1, "none"), (8, "none"), (8, "fsdp2")):
        devices = [f"devices.processes={count}", f"devices.sharding={sharding}", "devices.memory=1000"]
        assert main([*planned, *devices]) == 0
        said = capsys.readouterr().out
        needed[count, sharding] = float(said.partition("memory   about ")[2].split()[0])
        assert ("on each of 8 devices" in said) == (count == 8)
    assert needed[8, "fsdp2"] < needed[8, "none"] < needed[1, "none"]
    assert main([*planned, "devices.processes=8", "devices.memory=1.5"]) == 2
    printed = capsys.readouterr()
    assert "stage 3" in printed.out, "what would be done is still told"
    sentence = printed.err.strip()
    assert sentence.startswith(
        "error: budget.stage3.batch=16 is not possible; allowed: what fits into the 1.5 GiB"
    )
    assert f"about {needed[8, 'none']} would be needed" in sentence
    assert "devices.sharding=fsdp2" in sentence


@pytest.mark.parametrize(
    ("override", "allowed"),
    [
        ("devices.sharding=zero", "none, fsdp2"),
        ("devices.processes=-1", "0 (those of the launch) or more"),
        ("devices.memory=-1.0", "GiB of a device"),
        ("devices.processes=3", "a multiple of the 3 processes"),
    ],
)
def test_devices_that_cannot_be_planned_for_are_refused(
    capsys: pytest.CaptureFixture[str], override: str, allowed: str
) -> None:
    assert main([*TINY, "dry_run=true", override]) == 2
    assert allowed in capsys.readouterr().err
    assert main([*TINY, override]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert said[0].startswith(f"error: {override.partition('=')[0]}=")


# Folders, resuming and reusing


def written_run(folder: Path, overrides: list[str]) -> Config:
    """A run's folder as far as the command line reads it."""
    config = compose(overrides)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    return config


def stand_in(monkeypatch: pytest.MonkeyPatch, run: Callable[[Config, Path], None]) -> None:
    """Put `run` where the command finds the pipeline, whose own work is shown elsewhere."""
    module = types.ModuleType("replace.pipeline")
    module.run = run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Config, Path]]:
    """What the command hands to the pipeline."""
    made: list[tuple[Config, Path]] = []

    def run(config: Config, folder: Path) -> None:
        logging.getLogger("replace.pipeline").info("A line.")
        made.append((config, folder))

    stand_in(monkeypatch, run)
    return made


def test_a_run_gets_its_folder_and_its_log(
    calls: list[tuple[Config, Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(TINY) == 0
    ((config, folder),) = calls
    assert config == compose(TINY)
    assert folder.parent == Path.cwd() / "outputs" / "infini"
    assert (folder / ".hydra" / "config.yaml").is_file()
    assert capsys.readouterr().out == "A line.\n"
    assert (folder / "run.log").read_text().endswith("INFO replace.pipeline: A line.\n")


def test_the_folder_can_be_chosen(calls: list[tuple[Config, Path]]) -> None:
    assert main([*TINY, "hydra.run.dir=here/it is"]) == 0
    assert calls[0][1] == Path.cwd() / "here" / "it is"


@pytest.mark.parametrize("arguments", [["--multirun", *TINY, "seed=1,2"], [*TINY, "-m", "seed=1,2"]])
def test_a_multirun_is_one_run_a_value(calls: list[tuple[Config, Path]], arguments: list[str]) -> None:
    """Wherever the flag stands."""
    assert main(arguments) == 0
    assert [config.seed for config, _ in calls] == [1, 2]
    assert len({folder for _, folder in calls}) == 2


def test_a_multirun_starts_only_if_every_job_is_possible(
    calls: list[tuple[Config, Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--multirun", *TINY, "seed=1,2", "attention.window=32,33"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert [line.partition(" is not possible")[0] for line in lines] == [
        f"error: The job seed={seed} attention.window=33: attention.window=33" for seed in (1, 2)
    ]
    assert not calls
    assert not list(Path().iterdir())


def test_every_job_of_a_multirun_that_fails_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(config: Config, folder: Path) -> None:
        if config.seed != 2:
            raise UserError(f"Seed {config.seed} is no good.")

    stand_in(monkeypatch, fails)
    assert main(["-m", *TINY, "seed=1,2,3"]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert said == [f"error: The job seed={seed}: Seed {seed} is no good." for seed in (1, 3)]


def test_an_interrupted_run_says_how_it_is_continued(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(config: Config, folder: Path) -> None:
        (folder / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
        raise KeyboardInterrupt

    stand_in(monkeypatch, interrupted)
    assert main([*TINY, "hydra.run.dir=my run"]) == 130
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    words = shlex.split(re.search(r"`(.*)`", said)[1])  # type: ignore[index]
    assert said[7:].strip() in Path("my run/run.log").read_text()
    assert words[:3] == ["python", "-m", "replace"]
    assert main(words[3:]) == 130


def test_the_log_holds_what_ended_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(config: Config, folder: Path) -> None:
        raise UserError("No good.")

    stand_in(monkeypatch, fails)
    assert main([*TINY, "hydra.run.dir=run"]) == 2
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "error: No good.\n")
    assert Path("run/run.log").read_text().endswith("ERROR root: No good.\n")


@pytest.mark.parametrize("name", ["run", "a run, with (odd) 'signs' = {x}"])
def test_a_resumed_run_is_the_run_it_was(calls: list[tuple[Config, Path]], name: str) -> None:
    stored = written_run(Path(name), [*TINY, "seed=7", "threads=1"])
    quoted = name.replace("'", "\\'")
    assert main([f"resume='{quoted}'", "verbose=true", "logger=wandb"]) == 0
    ((config, folder),) = calls
    assert folder == Path(name).resolve()
    assert config.resume == str(folder)
    assert (config.seed, config.verbose, config.logger.kind) == (7, True, "wandb")
    assert config.attention == stored.attention
    assert not (folder / ".hydra").exists(), "the first start's record is left alone"


def test_a_resumed_run_may_be_told_again_what_it_is(calls: list[tuple[Config, Path]]) -> None:
    written_run(Path("run"), [*TINY, "seed=7"])
    assert main([*TINY, "seed=7", "resume=run"]) == 0
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("argument", "field"),
    [
        ("+exp=window", "experiment"),
        ("seed=8", "seed"),
        ("budget=quick", "budget.name"),
        ("attention.pairs=3", "attention.pairs"),
        ("hydra.run.dir=elsewhere", "hydra.run.dir"),
    ],
)
def test_a_resumed_run_cannot_be_changed(
    capsys: pytest.CaptureFixture[str], argument: str, field: str
) -> None:
    written_run(Path("run"), [*TINY, "seed=7"])
    assert refused(capsys, "resume=run", argument).startswith(f"error: {field}=")


def test_stages_are_taken_only_from_a_run_of_the_same_layers(
    capsys: pytest.CaptureFixture[str], calls: list[tuple[Config, Path]]
) -> None:
    written_run(Path("run"), TINY)
    assert main([*TINY, "from=run", "stages=[2,3]", "seed=3"]) == 0
    assert calls[0][0].source == "run"
    for folder in Path().glob("outputs/*/*"):
        folder.rename(Path(folder.name))
    Path("outputs/infini").rmdir()
    Path("outputs").rmdir()
    assert "attention.pairs is 64" in refused(capsys, *TINY, "from=run", "stages=[2,3]", "attention.pairs=8")
    assert refused(capsys, *TINY, "from=run").startswith("error: stages=[1, 2, 3]")


def test_a_disk_that_fails_is_a_sentence(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(config: Config, folder: Path) -> None:
        raise OSError(28, "No space left on device", str(folder / "model"))

    stand_in(monkeypatch, fails)
    assert main(TINY) == 2
    assert "No space left on device" in capsys.readouterr().err


def test_a_disk_that_fills_up_says_how_the_run_is_continued(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(config: Config, folder: Path) -> None:
        (folder / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
        raise OSError(28, "No space left on device", str(folder / "model"))

    stand_in(monkeypatch, fails)
    assert main([*TINY, "hydra.run.dir=run"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"No space left on device; `python -m replace resume={Path.cwd() / 'run'}` continues.\n" in said


def test_sigterm_is_one_sentence_with_its_own_code(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(config: Config, folder: Path) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    stand_in(monkeypatch, stopped)
    assert main(TINY) == 143
    assert capsys.readouterr().err == "error: interrupted before the run began.\n"


def test_the_module_runs_from_any_folder(tmp_path: Path) -> None:
    """One real process: exit codes and streams are what a shell sees, beside a folder named conf."""
    (tmp_path / "conf").mkdir()
    command = [sys.executable, "-m", "replace", "+exp=infini", "attention.block=x"]
    ended = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env=dict(os.environ), check=False
    )
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert ended.stderr.splitlines() == [
        "error: attention.block='x' is not possible; allowed: a whole number."
    ]


def test_what_is_refused_once_the_model_is_there_leaves_the_folder_to_the_mended_command(capsys):
    """Neither a run that resume= could only refuse again, nor one in the way."""
    Path("text.txt").write_text("The old house stood near a river, and nobody knew who lived there. " * 60)
    command = [*TINY, "data=files", "data.path=text.txt", "lora=peft", "lora.data=text", "hydra.run.dir=run"]
    for budget in ("stage1", "stage2", "stage3", "lora"):
        command.append(f"budget.{budget}.length=256")
    for _ in range(2):
        assert main([*command, "lora.targets=[query]"]) == 2
        assert "error: lora.targets='query' is not possible" in capsys.readouterr().err
        assert not Path("run/config.json").exists()


def test_a_tuning_alone_that_does_not_fit_is_refused_by_its_own_budget():
    config = compose(["+exp=infini", "budget=smoke", "model=tiny", "lora=peft", "devices.memory=0.0001"])
    config.stages = []
    with pytest.raises(UserError, match=r"budget\.lora\.batch"):
        refuse_too_large(config)
