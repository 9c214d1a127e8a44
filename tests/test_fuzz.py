"""Whatever is asked for is either done or refused in one sentence: configurations, command lines, text files.

Nothing but `UserError` may come out, and a configuration that is accepted builds: the model is swapped and
gives finite logits.
"""

import dataclasses
import json
import sys
import types
import typing
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, event, example, given, settings
from hypothesis import strategies as st

from distill.data import check_text
from eval import __main__ as evaluation
from eval.measurements import check
from replace import validation
from replace.__main__ import main
from replace.choice import layers_of, spec_of
from replace.compose import choices, compose, overridden
from replace.config import Config, DataConfig
from replace.convert import swap
from replace.corpora import load_documents
from replace.errors import UserError
from replace.feature_maps import FEATURE_MAPS
from replace.memory import UPDATES
from replace.mixer import VARIANTS
from replace.pipeline import run
from replace.scores import SCORES
from replace.tiny import tiny_model, tiny_tokenizer

SHARED = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.filter_too_much]
SHARED += [HealthCheck.data_too_large, HealthCheck.large_base_example]


def one_sentence(error: UserError) -> None:
    """A refusal as `main` prints it."""
    said = " ".join(str(error).split())
    assert said.endswith((".", "!")), said
    assert "Traceback" not in said
    assert len(said) < 1500, said


# Configurations


def leaves(kind: type, prefix: str = "") -> dict[str, object]:
    """Every dotted key of a config dataclass with its type."""
    found: dict[str, object] = {}
    for name, hint in typing.get_type_hints(kind).items():
        if dataclasses.is_dataclass(hint):
            found |= leaves(hint, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = hint
    return found


KEYS = leaves(Config)
FAMILIES = (
    "llama",
    "gpt2",
    "qwen3",
    "gemma2",
    "gpt_neox",
    "mixtral",
    "opt",
    "falcon",
    "bert",
    "t5",
    "nothing",
)
NAMES = {
    "attention.name": VARIANTS.names(),
    "attention.feature_map": FEATURE_MAPS.names(),
    "attention.pairs_score": SCORES.names(),
    "attention.update": UPDATES.names(),
    "attention.local": validation.LOCALS,
    "attention.gate": validation.GATES,
    "attention.write_gate": validation.WRITE_GATES,
    "layers.select": validation.SELECTS,
    "layers.rest": ("keep", *VARIANTS.names()),
    "stage.transfer_loss": validation.LOSSES,
    "stage.objective": validation.OBJECTIVES,
    "eval.base": validation.BASES,
    "eval.name": choices("eval"),
    "precision": validation.PRECISIONS,
    "kernels.backend": validation.BACKENDS,
    "logger.kind": ("none", "wandb"),
    "lora.kind": ("none", "peft"),
    "data.kind": ("index", "files"),
    "model.kind": ("tiny", "local"),
    "model.family": FAMILIES,
}
NUMBERS = {
    "attention.block": (4, 8, 16, 32),
    "attention.window": (0, 8, 16, 32, 64),
    "attention.sinks": (0, 1, 4),
    "attention.pairs": (0, 1, 4, 64),
    "attention.pairs_recent": (0.0, 0.5, 1.0),
    "attention.pairs_fade": (0.0, 3.0, 1e6),
    "attention.distance_cap": (16, 64, 128, 512),
    "layers.k": (1, 2, 4),
}
LEFT_OUT = ("resume", "source", "dry_run", "verbose", "eval.control", "model.id", "model.trust_remote_code")
"""What starts something else, and what would ask a hub."""

WILD = ("", "x", "1", "null", "Infini", "json:dumps", "os:sep", "a.b:c", "../..", "é", " ", "0x10")


def of(kind: object) -> st.SearchStrategy:
    """Any value of an annotated type, at the edges above all."""
    if isinstance(kind, types.UnionType):
        return st.one_of(*(of(part) for part in typing.get_args(kind)))
    if typing.get_origin(kind) is list:
        return st.lists(of(typing.get_args(kind)[0]), max_size=3)
    if typing.get_origin(kind) is dict:
        return st.dictionaries(st.sampled_from(["key", "gate", "x"]), st.integers(-1, 3), max_size=2)
    edges = {
        bool: st.booleans(),
        int: st.sampled_from([0, 1, 2, 3, 7, 33, 64, 512, -1, 4096, 4097, 10**6, 2**31, 2**63, -(2**63)]),
        float: st.sampled_from([0.0, 1.0, 0.5, 1e-5, 1e4, -1.0, 1e38, 1e300, float("nan"), float("-inf")]),
        str: st.sampled_from(WILD),
        type(None): st.none(),
    }
    return edges[typing.cast(type, kind)]


def values(key: str) -> st.SearchStrategy:
    """Values of a key: mostly what it is made for."""
    fitting = NAMES.get(key) or NUMBERS.get(key)
    if fitting is None:
        return of(KEYS[key])
    return st.one_of(st.sampled_from(list(fitting)), st.sampled_from(list(fitting)), of(KEYS[key]))


def written(key: str, value: object) -> str:
    """An override as a person types it."""
    if isinstance(value, str):
        return f"{key}='{value}'"
    return f"{key}={json.dumps(value)}".replace('"', "").replace("NaN", "nan").replace("Infinity", "inf")


ATTENTION = [key for key in KEYS if key.startswith(("attention.", "layers."))]
OTHERS = [key for key in KEYS if key not in ATTENTION and key not in LEFT_OUT]


@st.composite
def overrides(draw: st.DrawFn, *, fitting: bool = False) -> list[str]:
    """Single values of a command line, most of them of the attention.

    Args:
        fitting: only values that their keys are made for, of the keys that decide what is built.
    """
    if fitting:
        named = {**NAMES, **NUMBERS}
        keys = [key for key in named if key in ATTENTION or key.startswith("stage.")]
        chosen = draw(st.lists(st.sampled_from(keys), unique=True, min_size=2, max_size=8))
        return [written(key, draw(st.sampled_from(list(named[key])))) for key in chosen]
    chosen = draw(st.lists(st.sampled_from(ATTENTION), unique=True, max_size=6))
    chosen += draw(st.lists(st.sampled_from(OTHERS), unique=True, max_size=2))
    return [written(key, draw(values(key))) for key in chosen]


@pytest.fixture(scope="module")
def base() -> Config:
    """Small enough that most combinations of sizes are possible."""
    less = ["attention.block=8", "attention.window=8", "attention.pairs=4", "attention.distance_cap=64"]
    config = compose(["+exp=infini", "budget=smoke", "model=tiny", "layers=all", *less])
    config.layers.k = 1
    return config


def accepted(base: Config, words: list[str]) -> Config | None:
    """The config, or None where it was refused in one sentence."""
    try:
        config = overridden(base, words)
        validation.validate(config)
        check(config)
    except UserError as error:
        one_sentence(error)
        return None
    return config


@settings(max_examples=300, suppress_health_check=SHARED)
@given(words=st.one_of(overrides(), overrides(fitting=True)))
def test_a_configuration_is_refused_in_one_sentence_or_builds(base: Config, words: list[str]) -> None:
    config = accepted(base, words)
    if config is None:
        event("refused")
        return
    event("built")
    model = tiny_model(config.model.family)
    indices = layers_of(model)
    chosen = None if validation.selected(config.layers, len(indices)) is not None else indices[:2]
    swap(model, spec_of(config, indices, chosen))
    ids = torch.arange(40)[None] % 512
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    assert logits.isfinite().all()


# Not shrunk: a failing one is a handful of words already, and each try to leave one out is a whole run.
@pytest.mark.slow
@settings(max_examples=20, suppress_health_check=SHARED, phases=set(Phase) - {Phase.shrink, Phase.explain})
@given(words=overrides(fitting=True).map(tuple), seed=st.integers(0, 99))
def test_a_configuration_that_builds_trains_two_steps_a_stage(
    base: Config, words: tuple[str, ...], seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The whole pipeline; of what is refused another one is drawn."""
    from hypothesis import assume

    config = accepted(base, [*words, f"seed={seed}"])
    assume(config is not None)
    assert config is not None
    folder = tmp_path_factory.mktemp("fuzz")
    sentence = "The old house stood near a river and nobody knew who lived there. "
    for index in range(3):
        (folder / f"{index}.txt").write_text(f"Part {index}. " + sentence * 120)
    config.data = DataConfig(kind="files", path=str(folder), recall=0.5, recall_transfer=0.5)
    config.eval.base, config.threads = "perplexity", 1
    reach = 128 + config.attention.window + config.attention.block
    for number in (1, 2, 3):
        stage = getattr(config.budget, f"stage{number}")
        stage.length, stage.tokens = (
            max(reach, 2 * config.attention.block),
            2 * max(reach, 2 * config.attention.block),
        )
    measured = config.budget.eval
    measured.phase_lengths = measured.final_lengths = [reach]
    measured.speed_lengths, measured.perplexity_tokens, measured.perplexity_length = [16], 64, 64
    validation.validate(config)
    metrics = run(config, folder / "run")
    for number in (1, 2, 3):
        assert metrics["phases"][f"stage{number}"]["training"]["nonfinite"] == 0


# Text


SOUND = "".join(f"Sentence number {i} is here. " for i in range(60))
LINES = st.one_of(
    st.builds(lambda text: json.dumps({"text": text}), st.text(max_size=40)),
    st.builds(lambda text: json.dumps({"text": text}, ensure_ascii=False), st.text(max_size=40)),
    st.sampled_from(
        ['{"text": "ha', "{}", "[]", "null", "3", '{"text": 3}', '{"body": "x"}', "", "  ", "{'a'}"]
    ),
    st.sampled_from(["[" * 100_000, "9" * 5_000, '{"text": "\\ud800"}', '{"text": "a\\u2028b"}', "\x85"]),
    st.just(json.dumps({"text": SOUND})),
)


def encoded(text: str, encoding: str) -> bytes:
    return text.encode(encoding, "replace")


CONTENTS = st.one_of(
    st.just(b""),
    st.binary(max_size=200),
    st.builds(
        encoded, st.just(SOUND * 40), st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32", "cp037"])
    ),
    st.builds(encoded, st.just("é" * 900), st.sampled_from(["latin-1", "utf-8", "utf-16-le"])),
    st.builds(lambda lines: "\n".join(lines).encode("utf-8", "surrogatepass"), st.lists(LINES, max_size=5)),
    st.just(b"x" * 2_000_000),
    st.just(b"word " * 400_000),
    st.just(b"\n" * 10_000),
)


@settings(max_examples=80, suppress_health_check=SHARED)
@given(
    content=CONTENTS,
    ending=st.sampled_from([".txt", ".jsonl", ".parquet", ".csv"]),
    cut=st.one_of(st.none(), st.integers(1, 100)),
)
@example(content=b'{"text": "\\ud800"}', ending=".jsonl", cut=None)
@example(content=b"[" * 100_000, ending=".jsonl", cut=None)
@example(content=b"9" * 5_000, ending=".jsonl", cut=None)
def test_a_file_is_read_or_refused(
    base: Config,
    content: bytes,
    ending: str,
    cut: int | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LAYER_REPLACE_CACHE", str(tmp_path / "cache"))
    path = tmp_path / f"text{ending}"
    path.write_bytes(content if cut is None else content[:-cut])
    config = dataclasses.replace(base, data=DataConfig(kind="files", path=str(path)))
    try:
        validation.validate(config)
        check_text(load_documents(config.data), tiny_tokenizer(), config)
    except UserError as error:
        one_sentence(error)


@settings(max_examples=60, suppress_health_check=SHARED)
@given(
    places=st.lists(st.integers(0, 10_000), max_size=4), bits=st.integers(1, 255), cut=st.integers(0, 3000)
)
def test_a_damaged_parquet_file_is_read_or_refused(
    places: list[int], bits: int, cut: int, tmp_path: Path
) -> None:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "text.parquet"
    table = pyarrow.table({"text": [SOUND, None, "row"], "more": [1, 2, 3]})
    pyarrow.parquet.write_table(table, path)
    data = bytearray(path.read_bytes())
    for place in places:
        data[place % len(data)] ^= bits
    path.write_bytes(bytes(data[: len(data) - cut % len(data)] if cut % 2 else data))
    try:
        assert load_documents(DataConfig(kind="files", path=str(path)))
    except UserError as error:
        one_sentence(error)


# Command lines


SIGNS = st.text(st.sampled_from(list("abz019._-+~=,:;\\'\"[]{}()$@*%# \n\té")), max_size=12)
ARGUMENTS = st.one_of(
    SIGNS,
    st.builds("{}={}".format, st.sampled_from([*KEYS, "exp", "from", "attention", "layers", "x.y"]), SIGNS),
    st.builds("{}={}".format, SIGNS, SIGNS),
    st.sampled_from(["+exp=infini", "model=tiny", "budget=smoke", "layers=all", "seed=1,2", "seed=${x}"]),
    st.sampled_from(["experiment=${oc.env:NOTHING}", "seed=${seed}", "stages=[1,[2]]", "attention={name:x}"]),
    st.sampled_from(["--multirun", "-m", "--help", "--cfg", "--json", "-", "--", "--config-dir", "--info=x"]),
    st.sampled_from(
        ["hydra.mode=x", "hydra/launcher=x", "hydra.x=1", "~hydra", "hydra.verbose=x", "hydra=3"]
    ),
)


EVALUATIONS = st.lists(
    st.one_of(
        SIGNS.filter(lambda text: text not in ("-h", "")),
        st.builds("{}={}".format, st.sampled_from([*sorted(evaluation.WHAT), "out", "data", "eval"]), SIGNS),
        st.builds("{}={}".format, st.sampled_from(["budget", "cache", "eval.limit", "eval.more"]), SIGNS),
        st.sampled_from(["model=tiny", "eval=quick", "budget=smoke", "run=.", "compare=[]", "eval.=3"]),
    ),
    min_size=1,
    max_size=4,
)


def spoken(code: int, printed: str) -> None:
    """Exit code 0, or 2 and sentences, one a line."""
    assert code in (0, 2)
    assert "Traceback" not in printed
    if code == 2:
        lines = printed.strip().splitlines()
        assert lines
        assert all(line.startswith("error: ") for line in lines), printed


@settings(max_examples=60, suppress_health_check=SHARED)
@given(arguments=st.lists(ARGUMENTS, min_size=1, max_size=4))
def test_a_command_line_is_run_or_refused(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = types.ModuleType("replace.pipeline")
    module.run = lambda config, folder: None  # type: ignore[attr-defined]  # what is accepted is not trained
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    code = main(arguments)
    spoken(code, capsys.readouterr().err)


@settings(max_examples=60, suppress_health_check=SHARED)
@given(arguments=EVALUATIONS)
def test_an_evaluation_is_run_or_refused(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def asked(*given: object, **named: object) -> None:
        raise UserError("It would be measured.")

    monkeypatch.setattr(evaluation, "load_model", asked)
    monkeypatch.setattr(evaluation, "load_documents", asked)
    monkeypatch.setattr(evaluation, "check_memory", asked)  # would ask a hub for the config
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    code = evaluation.main(arguments)
    spoken(code, capsys.readouterr().err)
