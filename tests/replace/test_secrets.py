"""Keys are refused where they would be kept, and blotted out where they are written."""

import logging

import pytest

from replace.__main__ import main
from replace.compose import compose
from replace.console import Console, RunLog
from replace.errors import UserError
from replace.secrets import BLOT, blot, refuse_keys
from replace.validation import validate

KEY = "0123456789abcdef0123456789abcdef01234567"
HUB = "hf_" + "aBcDeFgHiJ" * 3


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("MY_SECRET_FILE", str(tmp_path))
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("text", "left"),
    [
        (f"key {KEY}.", f"key {BLOT}."),
        (f"{HUB} and {HUB}x", f"{BLOT} and {BLOT}"),
        ("https://me:pass@host/x", f"https://{BLOT}@host/x"),
        ("wandb_v1_" + "a" * 30, BLOT),
        ("ghp_" + "a1" * 12, BLOT),
    ],
)
def test_keys_are_blotted_out(text, left):
    assert blot(text) == left


def test_ordinary_text_stays(tmp_path):
    for text in (f"{tmp_path}/x", "false", "hf_hub", "http://host:80/x", "a" * 40, "stage1.tokens=3"):
        assert blot(text) == text


SECRET = "abcdefgh12345678"


@pytest.mark.parametrize(
    "argument",
    [
        f"logger.api_key={SECRET}",
        f"+wandb.token={SECRET}",
        f"hydra.job.env_set.HF_TOKEN={SECRET}",
        "hydra.job.env_set={WANDB_API_KEY:" + SECRET + "}",
        f"password={SECRET}",
        f"experiment={KEY}",
        f"model.id={HUB}",
        f"data.path=https://me:{SECRET}@host/texts",
    ],
)
def test_a_key_in_the_command_line_is_refused_and_not_repeated(argument, capsys, tmp_path):
    assert main(["+exp=infini", argument]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: argument=")
    assert said.err.count("\n") == 1
    for secret in (SECRET, KEY, HUB):
        assert secret not in said.out + said.err
    assert list(tmp_path.iterdir()) == []


def test_words_of_attention_are_no_keys():
    refuse_keys(["budget.stage1.tokens=512", "attention.own.access_key=3", "attention.write_gate=token"])
    refuse_keys(["hydra.run.dir=outputs/token_study", "eval.stream_tokens=100", "--multirun"])


def test_a_config_from_a_file_holds_no_key():
    config = compose(["+exp=infini", "model=tiny"])
    config.data.path = f"https://me:{SECRET}@host/x"
    with pytest.raises(UserError, match=r"data\.path") as error:
        validate(config)
    assert SECRET not in str(error.value)


def test_a_log_line_holds_no_key(tmp_path, capsys):
    handlers = [Console(), RunLog(tmp_path / "run.log")]
    for handler in handlers:
        handler.handle(logging.LogRecord("x", logging.INFO, "", 0, "key %s", (KEY,), None))
    assert (tmp_path / "run.log").read_text() == f"key {BLOT}\n" == capsys.readouterr().out


def test_a_full_disk_or_a_closed_pipe_costs_a_line_and_no_run(capsys, monkeypatch):
    """/dev/full takes nothing; a closed pipe raises as well."""

    def broken(line):
        raise BrokenPipeError

    record = logging.LogRecord("x", logging.INFO, "", 0, "a line", (), None)
    handler = RunLog("/dev/full")
    handler.handle(record)
    handler.stream = None
    monkeypatch.setattr("replace.console.tqdm.write", broken)
    Console().handle(record)
    assert capsys.readouterr().err == ""
    handler.handle(logging.LogRecord("x", logging.INFO, "", 0, "%d", ("no number",), None))
    assert "Logging error" in capsys.readouterr().err
