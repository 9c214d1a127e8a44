"""Several processes make the run of one: the same loss in every step, one writer, checkpoints that any number reads.

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
import torch

from eval.metrics import read_metrics, without_times
from replace import ranks
from replace.compose import compose
from replace.errors import UserError

WORDS = ("the", "old", "house", "stood", "near", "a", "river", "nobody", "knew", "who", "lived", "there")
CLOSE = 1e-5
"""Of a loss, between one process and several with the same rows."""

# All stages in seconds, with rows of recall, scores that learn, and rates at which a wrong gradient shows.
TINY = ["+exp=infini", "model=tiny", "budget=smoke", "threads=1", "precision=fp32", "data=files"]
TINY += ["layers=first", "layers.k=2", "layers.rest=keep", "stage.checkpoint_every=2", "data.path=texts"]
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
        if "when" in job:
            job["when"] = str(self.folder / run / "checkpoints" / job["when"])
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
    code, said = server.run("up", SHORT, stop=0, number=signal.SIGTERM, when="stage2/step-0000002")
    assert code == [128 + signal.SIGTERM], said
    code, said = server.run("up", ranks=2)
    assert code == [0, 0], said
    assert_same(server.steps("up"), one)


def test_one_process_goes_on_where_two_stopped(server, one):
    """The signal reaches one of them alone, and not the one that writes; both end, and one of them says how."""
    code, said = server.run(
        "down", SHORT, ranks=2, stop=1, number=signal.SIGTERM, when="stage3/step-0000002"
    )
    assert code == [128 + signal.SIGTERM] * 2, said
    assert said.count("error: interrupted; `python -m replace resume=") == 1
    code, said = server.run("down")
    assert code == [0], said
    assert_same(server.steps("down"), one)


def test_layers_in_shards_have_the_losses_of_one_process(server, one):
    """FSDP2, stopped in the last stage, where all parameters are in shards, and resumed."""
    code, said = server.run(
        "shards", SHORT, ranks=2, shards=True, stop=0, number=signal.SIGINT, when="stage3/step-0000002"
    )
    assert code == [128 + signal.SIGINT] * 2, said
    code, said = server.run("shards", ranks=2, shards=True)
    assert code == [0, 0], said
    assert_same(server.steps("shards"), one)
