"""Several processes make the run of one: the same loss in every step, one writer, checkpoints that any number
reads.

Two processes are joined by gloo on the CPU; what puts layers in shards there is the code that GPUs run.
"""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from eval.__main__ import main as evaluate
from eval.metrics import read_metrics, without_times
from replace.__main__ import main
from replace.chat import main as chat
from replace.compose import CONF, LAUNCHES
from replace.errors import UserError
from replace.launch import become_torchrun, hush
from replace.ranks import Team, check_asked, check_type, split
from replace.reproduce import main as reproduce
from replace.verify import main as verify

WORDS = ("the", "old", "house", "stood", "near", "a", "river", "nobody", "knew", "who", "lived", "there")
CLOSE = 1e-5
"""Of a loss, between one process and several with the same rows."""

# All stages in seconds, with rows of recall, scores that learn, and rates at which a wrong gradient shows.
TINY = ["+exp=infini", "model=tiny", "budget=smoke", "threads=1", "precision=fp32", "data=files"]
TINY += ["layers=first", "layers.k=2", "layers.rest=keep", "stage.checkpoint_every=2", "data.path=texts"]
TINY += ["data.recall=0.75"]
TINY += ["attention.block=8", "attention.window=8", "attention.pairs=4", "attention.distance_cap=16"]
TINY += ["budget.eval.phase_lengths=[144]", "budget.eval.final_lengths=[144]", "stage.lr_stage3=1e-2"]
TINY += ["budget.eval.speed_lengths=[16]", "budget.eval.perplexity_tokens=64"]
TINY += ["budget.eval.perplexity_length=64", "stage.validate_every=1", "stage.validate_rows=2"]
for stage in (1, 2, 3):
    TINY += [f"budget.stage{stage}.{option}" for option in ("tokens=1920", "length=240", "batch=2")]
SHORT = [*TINY, "eval=perplexity"]


class Server:
    """A process that runs command lines, each in forked children; see tests/ranked.py."""

    def __init__(self, folder):
        self.folder = folder
        rng = random.Random(0)
        (folder / "texts").mkdir()
        for index in range(3):
            text = " ".join(" ".join(rng.choices(WORDS, k=9)).capitalize() + "." for _ in range(120))
            (folder / "texts" / f"{index}.txt").write_text(text)
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).parents[1] / "ranked.py")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=folder,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert self.process.stdout.readline() == "ready\n"

    def run(self, run, arguments=(), ranks=1, **job):
        """Run one command line, or resume; returns the ranks' exit codes and what they printed."""
        output = self.folder / "output.txt"
        output.write_text("")
        arguments = [*arguments, f"hydra.run.dir={run}"] if arguments else [f"resume={run}"]
        job |= {"arguments": arguments, "ranks": ranks, "output": str(output)}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline()), output.read_text()

    def steps(self, run):
        """Every step's line of train.jsonl, without its time."""
        lines = [json.loads(line) for line in (self.folder / run / "train.jsonl").read_text().splitlines()]
        return [{key: value for key, value in line.items() if key != "tokens_per_second"} for line in lines]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    made = Server(tmp_path_factory.mktemp("ranks"))
    yield made
    made.process.stdin.close()
    assert made.process.wait(60) == 0


@pytest.fixture(scope="module")
def one(server):
    """The run of one process."""
    code, said = server.run("one", SHORT)
    assert code == [0], said
    assert [(line["stage"], line["step"]) for line in server.steps("one")] == [
        (stage, step) for stage in (1, 2, 3) for step in range(4)
    ]
    return server.steps("one")


def assert_same(got, want):
    """Every step's loss is equal to CLOSE, its parts to CLOSE of their size, and what is counted exactly."""
    assert len(got) == len(want)
    for mine, theirs in zip(got, want, strict=True):
        place = mine["stage"], mine["step"]
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=0, abs=CLOSE), place
        assert mine["losses"] == pytest.approx(theirs["losses"], rel=CLOSE, abs=CLOSE), place
        if mine["stage"] != "lora":  # the tuning has no dev loss
            assert mine["dev_loss"] == pytest.approx(theirs["dev_loss"], rel=0, abs=CLOSE), place
        kept = [key for key in mine if not key.startswith(("loss", "dev_loss"))]
        rest = ({key: line[key] for key in kept} for line in (mine, theirs))
        assert next(rest) == next(rest), place


def test_two_processes_make_the_run_of_one(server, one):
    """Losses, all that is measured, and the weights; one of the two says and writes something."""
    code, said = server.run("two", SHORT, ranks=2)
    assert code == [0, 0], said
    assert_same(server.steps("two"), one)
    assert said.count("report.md and report.html") == 1
    names = [sorted(path.name for path in (server.folder / run).rglob("*")) for run in ("one", "two")]
    assert names[0] == names[1]
    mine, theirs = (flat(without_times(read_metrics(server.folder / run))) for run in ("two", "one"))
    assert mine == pytest.approx(theirs, rel=CLOSE, abs=CLOSE)


def flat(value, place=""):
    """Every number of a structure by its place."""
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    else:
        return {place: value} if isinstance(value, int | float) else {}
    return {name: leaf for key, item in items for name, leaf in flat(item, f"{place}.{key}").items()}


def test_two_processes_go_on_where_one_stopped(server, one):
    code, said = server.run("up", SHORT, stop=0, number=signal.SIGTERM, at=(2, 2))
    assert code == [128 + signal.SIGTERM], said
    code, said = server.run("up", ranks=2)
    assert code == [0, 0], said
    assert_same(server.steps("up"), one)


def test_one_process_goes_on_where_two_stopped(server, one):
    """The signal reaches the one that does not write; both end, and one of them says how."""
    code, said = server.run("down", SHORT, ranks=2, stop=1, number=signal.SIGTERM, at=(3, 2))
    assert code == [128 + signal.SIGTERM] * 2, said
    assert said.count("error: interrupted; `python -m replace resume=") == 1
    code, said = server.run("down")
    assert code == [0], said
    assert_same(server.steps("down"), one)


def test_layers_in_shards_have_the_losses_of_one_process(server, one):
    """FSDP2, stopped in the last stage, where all parameters are in shards, and resumed."""
    code, said = server.run("shards", SHORT, ranks=2, shards=True, stop=0, number=signal.SIGINT, at=(3, 2))
    assert code == [128 + signal.SIGINT] * 2, said
    code, said = server.run("shards", ranks=2, shards=True)
    assert code == [0, 0], said
    assert_same(server.steps("shards"), one)


def test_a_process_that_is_killed_ends_the_other_with_a_sentence(server):
    code, said = server.run("lost", SHORT, ranks=2, stop=1, number=signal.SIGKILL, at=(2, 2))
    assert code == [2, -signal.SIGKILL], said
    assert "Traceback" not in said
    sentence = said.strip().splitlines()[-1]
    assert sentence.startswith("error: another of the 2 processes has ended (")
    assert "`python -m replace resume=" in sentence


def test_shards_are_not_promised_where_accelerate_makes_none(server):
    """Asked for FSDP on CPUs it replicates the model and says nothing."""
    asked = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "ACCELERATE_USE_CPU": "true"}
    code, said = server.run("refused", SHORT, ranks=2, environment=asked, ends=True)
    assert 2 in code
    assert set(code) <= {2, -signal.SIGTERM}
    assert said.splitlines()[-1].startswith("error: distributed_type='FSDP' is not possible; allowed: ")
    assert said.count("error:") == 1, "the other one waits for rank 0 to say it"
    assert not (server.folder / "refused").exists()


@pytest.mark.parametrize(
    ("asked", "made", "version", "word"),
    [
        ("FSDP", "MULTI_GPU", None, "distributed_type='FSDP'"),
        (None, "DEEPSPEED", None, "distributed_type='DEEPSPEED'"),
        (None, "NO", None, "distributed_type='NO'"),
        ("FSDP", "FSDP", 1, "fsdp_version=1"),
    ],
)
def test_what_accelerate_makes_is_what_was_asked_for(monkeypatch, asked, made, version, word):
    of_two(monkeypatch)
    check_type("FSDP", "FSDP", 2, 2)
    check_type(None, "MULTI_CPU", 2)
    with pytest.raises(UserError, match=word):
        check_type(asked, made, 2, version)
    with pytest.raises(UserError, match="num_processes=1"):
        check_type(None, "MULTI_GPU", 1)


def test_a_number_of_processes_that_accelerate_was_not_given_is_asked_for(monkeypatch):
    """Its default on a machine with GPUs is their number, which `--cpu` does not change."""
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    for name, value in (("MASTER_PORT", "29500"), ("ACCELERATE_USE_CPU", "true")):
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"^num_processes=None is not possible; allowed: a number after"):
        become_torchrun("replace")


def of_two(monkeypatch, number=0):
    """This process is one of two, as the environment says."""
    for name, value in (("WORLD_SIZE", 2), ("RANK", number), ("LOCAL_RANK", number)):
        monkeypatch.setenv(name, str(value))


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["budget.stage2.batch=3"], "budget.stage2.batch=3"),
        (["budget.stage2.batch=3", "stage.accumulate=3"], "stage.accumulate=3"),
        (["lora=peft", "budget.lora.batch=1"], "budget.lora.batch=1"),
        (["lora=peft", "lora.qlora=true"], "lora.qlora=True"),
        (["--multirun", "seed=1,2"], "argument='--multirun'"),
    ],
)
def test_rows_that_do_not_divide_are_refused_before_anything_is_loaded(
    monkeypatch, capsys, tmp_path, options, word
):
    of_two(monkeypatch)
    monkeypatch.chdir(tmp_path)
    assert main(["+exp=infini", "model=tiny", "budget=smoke", *options]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert word in said[0]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"WORLD_SIZE": "many"}, "WORLD_SIZE='many' is not possible; allowed: a whole number from 1 on"),
        ({"WORLD_SIZE": "-2"}, "WORLD_SIZE='-2'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE='0'"),
        ({"WORLD_SIZE": "2.0"}, "WORLD_SIZE='2.0'"),
        ({"RANK": "first"}, "RANK='first' is not possible; allowed: a whole number from 0 on"),
        ({"RANK": "2"}, "RANK='2' is not possible; allowed: less than WORLD_SIZE=2"),
        ({"LOCAL_RANK": "gpu"}, "LOCAL_RANK='gpu'"),
    ],
)
def test_an_environment_that_no_launcher_makes_is_refused(monkeypatch, capsys, tmp_path, environment, words):
    of_two(monkeypatch)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    hush()
    assert main(["+exp=infini", "model=tiny"]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert words in said[0]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "mixed_precision='bf16' is not possible; allowed: no"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "dynamo_backend='INDUCTOR'"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "distributed_type='DEEPSPEED'"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params='true'"),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"},
            "fsdp_cpu_ram_efficient_loading='true' is not possible; allowed: false, since",
        ),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_ACTIVATION_CHECKPOINTING": "true"},
            "fsdp_activation_checkpointing='true' is not possible; allowed: false, since "
            "stage.gradient_checkpointing",
        ),
    ],
)
def test_what_a_launcher_was_asked_for_and_a_run_would_not_do_is_refused(
    monkeypatch, capsys, tmp_path, environment, words
):
    of_two(monkeypatch)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    assert main(["+exp=infini", "model=tiny", "budget=smoke"]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert words in said[0]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", [evaluate, verify, reproduce, chat])
def test_a_command_that_several_processes_cannot_share_refuses_them(monkeypatch, capsys, tmp_path, command):
    """Each would do all of it, and write to the same place."""
    of_two(monkeypatch)
    assert command([f"run={tmp_path}"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: num_processes=2 is not possible; allowed: 1, since `python -m ")
    assert said.count("\n") == 1


def test_a_dry_run_for_shards_refuses_the_precision_that_the_run_would_refuse(capsys):
    planned = ["dry_run=true", "devices.processes=2", "devices.sharding=fsdp2"]
    assert main(["+exp=infini", "model=tiny", "budget=smoke", "precision=fp16", *planned]) == 2
    assert capsys.readouterr().err.startswith("error: precision='fp16' is not possible; allowed: bf16")


@pytest.fixture
def unjoined():
    """accelerate holds what it knows of other processes for good, also of those that did not meet."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("unjoined")
def test_processes_that_cannot_meet_are_refused(monkeypatch, capsys, tmp_path):
    of_two(monkeypatch)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.chdir(tmp_path)
    assert main(["+exp=infini", "model=tiny", "budget=smoke"]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert said[0].startswith("error: The 2 processes cannot be joined: ")
    assert "MASTER_ADDR" in said[0]
    assert not list(tmp_path.iterdir())


def test_what_the_sample_configs_ask_for_is_not_refused(monkeypatch):
    of_two(monkeypatch)
    settings = yaml.safe_load((CONF / LAUNCHES / "fsdp2.yaml").read_text())
    for name, value in settings["fsdp_config"].items():
        monkeypatch.setenv(name.upper(), str(value).lower())
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", settings["mixed_precision"])
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")  # as accelerate's launcher sets it
    check_asked()


@pytest.mark.parametrize(
    ("batch", "accumulate", "count"),
    [(2, 1, 2), (1, 2, 2), (4, 3, 2), (2, 2, 4), (6, 4, 8), (6, 4, 12), (3, 1, 1), (8, 8, 16)],
)
def test_every_row_is_some_ranks(batch, accumulate, count):
    """Each once, and every rank has as many."""
    teams, size = split(batch, accumulate, count)
    seen = []
    for number in range(count):
        team = Team(teams, number // size, number % size, size)
        rows = range(batch)[team.share(batch)]
        mine = [(part, row) for part in team.parts(accumulate) for row in rows]
        assert len(mine) == batch * accumulate // count
        seen += mine
    assert sorted(seen) == [(part, row) for part in range(accumulate) for row in range(batch)]


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_the_sample_configs_are_accelerates(name):
    """Their lines for two machines too."""
    file = CONF / LAUNCHES / f"{name}.yaml"
    wanted = {"ddp": "MULTI_GPU", "fsdp2": "FSDP"}[name]
    assert load_config_from_file(str(file)).distributed_type.value == wanted
    lines = file.read_text().splitlines()
    more = [line.removeprefix("# ") for line in lines if line.startswith(("# num", "# main"))]
    assert len(more) == 4
    several = yaml.safe_load(
        "\n".join(line for line in lines if not line.startswith("num")) + "\n".join(["", *more])
    )
    assert several["num_machines"] == 2
    assert set(several) >= {"main_process_ip", "main_process_port", "num_processes"}


@pytest.mark.slow
@pytest.mark.parametrize("shards", [False, True])
def test_four_processes_in_two_teams_with_activation_checkpointing(server, shards):
    """Two parts of two rows: each team does a part, each of its ranks a row."""
    options = [*SHORT, "stage.accumulate=2", "stage.gradient_checkpointing=true"]
    name = f"four_{shards}"
    code, said = server.run(f"{name}_one", [*SHORT, "stage.accumulate=2"])
    assert code == [0], said
    code, said = server.run(name, options, ranks=4, shards=shards)
    assert code == [0] * 4, said
    assert_same(server.steps(name), server.steps(f"{name}_one"))


@pytest.mark.slow
def test_adapters_are_trained_by_two_processes_as_by_one(server):
    options = [*SHORT, "lora=peft", "lora.data=text", "budget.lora.length=120", "budget.lora.tokens=960"]
    options += [f"budget.stage{number}.tokens=0" for number in (1, 3)]
    for run, count in (("adapters_one", 1), ("adapters", 2)):
        code, said = server.run(run, options, ranks=count)
        assert code == [0] * count, said
    assert {line["stage"] for line in server.steps("adapters")} == {2, "lora"}
    assert_same(server.steps("adapters"), server.steps("adapters_one"))


@pytest.mark.slow
def test_the_command_of_the_readme(server, one):
    """By accelerate's launcher, which on CPUs starts one process whatever is asked for."""
    said = {}
    for count in (1, 2):
        launch = ["launch", "--cpu", "--num_processes", str(count), "-m", "replace", *SHORT]
        command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", *launch]
        done = subprocess.run(
            [*command, f"hydra.run.dir=launched_{count}", "stage.lr_stage3=1e-5"],
            cwd=server.folder, capture_output=True, text=True, check=False,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        said[count] = done.stdout + done.stderr
    assert said[2].count("report.md and report.html") == 1
    ends = [server.steps(f"launched_{count}") for count in (1, 2)]
    assert_same(ends[1], ends[0])
