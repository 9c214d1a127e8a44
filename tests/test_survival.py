"""A run that is killed or stopped at any moment goes on to the very figures of one that was not."""

import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from eval.metrics import read_metrics, without_times, write_metrics

pytestmark = pytest.mark.long
WORDS = ("the", "old", "house", "stood", "near", "a", "river", "nobody", "knew", "who", "lived", "there")

# All stages on a tiny model in about two seconds; GPT-2 because it has dropout, which draws random numbers.
CHEAP = ["+exp=infini", "model=tiny", "model.family=gpt2", "budget=smoke", "threads=1", "eval=perplexity"]
CHEAP += ["layers=first", "layers.k=2", "layers.rest=keep", "data=files", "stage.checkpoint_every=2"]
CHEAP += ["stage.validate_every=1", "stage.validate_rows=1"]
CHEAP += ["attention.block=8", "attention.window=8", "attention.pairs=4", "attention.distance_cap=16"]
CHEAP += ["attention.pairs_score=key_norm", "data.recall=0", "data.recall_transfer=0"]
CHEAP += ["budget.eval.phase_lengths=[144]", "budget.eval.final_lengths=[144]"]
CHEAP += ["budget.eval.speed_lengths=[16]", "budget.eval.perplexity_tokens=64"]
CHEAP += ["budget.eval.perplexity_length=64"]
for stage in (1, 2, 3):
    CHEAP += [f"budget.stage{stage}.{option}" for option in ("tokens=384", "length=64", "batch=1")]

# With what CHEAP leaves out: rows of recall, scores that learn, a variant in the other layers, llama.
FULL = [
    word for word in CHEAP if not word.startswith(("model.family", "data.recall", "attention.pairs_score"))
]
FULL += ["eval=quick", "layers.rest=sliding_window", "budget.eval.episodes=1"]
for stage in (1, 2, 3):
    FULL += [f"budget.stage{stage}.tokens=1152", f"budget.stage{stage}.length=192"]


class Server:
    """A process that runs command lines, each in a forked child; see tests/forked.py."""

    def __init__(self, folder):
        self.folder = folder
        rng = random.Random(0)
        (folder / "texts").mkdir()
        for index in range(3):
            text = " ".join(" ".join(rng.choices(WORDS, k=9)).capitalize() + "." for _ in range(120))
            (folder / "texts" / f"{index}.txt").write_text(text)
        paths = os.pathsep.join(filter(None, sys.path))
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("forked.py"))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=folder,
            env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"},
        )  # fmt: skip
        assert self.process.stdout.readline() == "ready\n"

    def run(self, run, arguments, **job):
        """Run one command line; returns its exit code and what it printed."""
        output = self.folder / "output.txt"
        output.write_text("")
        if "reproduce" not in job:
            arguments = [*arguments, f"hydra.run.dir={run}"] if arguments else [f"resume={run}"]
        job |= {"arguments": arguments}
        self.process.stdin.write(json.dumps(job | {"output": str(output)}) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline()), output.read_text()

    def result(self, run):
        """What must be equal: the figures without times, the losses, the exported weights."""
        lines = [json.loads(line) for line in (self.folder / run / "train.jsonl").read_text().splitlines()]
        for line in lines:
            del line["tokens_per_second"]
        weights = (self.folder / run / "model" / "model.safetensors").read_bytes()
        return without_times(read_metrics(self.folder / run)), lines, weights


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    made = Server(tmp_path_factory.mktemp("survival"))
    yield made
    made.process.stdin.close()
    assert made.process.wait(60) == 0


@pytest.fixture(scope="module")
def whole(server):
    """The run that nothing happens to."""
    code, said = server.run("whole", [*CHEAP, "data.path=texts"])
    assert code == 0, said
    return server.result("whole")


def test_a_run_survives_two_kills_and_a_polite_end(server, whole):
    """In the middle of a checkpoint of stage 1, anywhere in stage 2, and SIGTERM in stage 3."""
    run = server.folder / "survivor"
    code, _ = server.run("survivor", [*CHEAP, "data.path=texts"], half=2)
    assert code == -signal.SIGKILL
    left = [path.name for path in (run / "checkpoints" / "stage1").iterdir()]
    assert any(name.startswith("best-") for name in left)
    steps = [name for name in left if "step-" in name]
    assert sorted(re.sub(r"\..{8}\.", ".*.", name) for name in steps) == [
        ".step-0000004.*.part",
        "step-0000002",
    ]

    when = str(run / "checkpoints" / "stage2" / "step-*")  # any: a later one takes the place of an earlier
    code, _ = server.run(
        "survivor", [], number=signal.SIGKILL, when=when, after=random.Random(1).random() / 4
    )
    assert code == -signal.SIGKILL
    assert not list(run.rglob(".step-0000004.*.part")), "the half of a checkpoint is gone"

    when = str(run / "checkpoints" / "stage3" / "step-*")
    code, said = server.run("survivor", [], number=signal.SIGTERM, when=when)
    assert code == 128 + signal.SIGTERM
    (sentence,) = [line for line in said.splitlines() if line.startswith("error: ")]
    command = shlex.split(re.search(r"`(.*)` continues", sentence)[1])
    assert command == ["python", "-m", "replace", f"resume={run}"]
    assert "Traceback" not in said

    code, said = server.run(run, [])
    assert code == 0, said
    assert server.result("survivor") == whole
    for stage in (1, 2, 3):
        dev = whole[0]["phases"][f"stage{stage}"]["training"]["dev"]
        assert [step for step, _ in dev["losses"]] == list(range(7))
        assert f"- stage {stage}: {dev['losses'][0][1]:.3g}"[:12] in (run / "report.md").read_text()


def test_a_run_is_reproduced_from_its_record_alone(server, whole):
    """Its own folder apart nothing is given; a changed record is found out."""
    code, said = server.run("again", ["run=whole", "out=again"], reproduce=True)
    assert code == 0, said
    assert "equal: every figure is the same" in said
    assert server.result("again") == whole
    about = [json.loads((server.folder / run / "provenance.json").read_text()) for run in ("whole", "again")]
    assert about[0]["model"] == about[1]["model"]
    assert about[0]["data"] == about[1]["data"]
    metrics = read_metrics(server.folder / "whole")
    metrics["phases"]["stage3"]["training"]["loss_last"] += 1e-12
    write_metrics(server.folder / "whole", metrics)
    code, said = server.run("again", ["run=whole", "out=again"], reproduce=True)
    assert code == 1, said
    assert "phases.stage3.training.loss_last: " in said
    assert "1 figures differ" in said


@pytest.mark.slow
@pytest.mark.parametrize("options", [CHEAP, FULL], ids=["dropout", "recall"])
def test_ten_kills_in_a_row_end_with_the_same_figures(server, options):
    """20 in all: seven at random moments and three in the middle of writing, for each of two kinds of run."""
    options, name = [*options, "data.path=texts"], "dropout" if options is CHEAP else "recall"
    began = time.monotonic()
    code, said = server.run(f"{name}-whole", options)
    took = time.monotonic() - began
    assert code == 0, said
    whole = server.result(f"{name}-whole")
    rng, places = random.Random(20), []
    moments = [{"number": signal.SIGKILL, "after": rng.random() * 0.8 * took} for _ in range(7)]
    # A half-written checkpoint of each stage: each has two inside it and a final one.
    moments += [{"half": rng.randrange(1, 4) + 3 * stage} for stage in range(2)]
    moments += [{"rename": rng.randrange(1, 30)}]
    rng.shuffle(moments)
    number, killed = 0, 0
    while killed < len(moments):
        number += 1
        run, arguments = f"{name}-{number}", options
        for moment in moments[killed : killed + 3]:
            code, said = server.run(run, arguments, **moment)
            if code == 0:  # it was faster than the kill, which is tried upon a new run
                if "half" in moment:
                    moment["half"] = 1
                break
            assert code == -signal.SIGKILL, said
            killed += 1
            places.append(place_of(server.folder / run))
            started = (server.folder / run / "config.json").exists()
            arguments = [] if started else options
        else:
            code, said = server.run(run, arguments)
            assert code == 0, said
        assert server.result(run) == whole, f"run {number}, killed in {places}"
    print(f"{killed} kills over {number} runs: {places}")
    assert len(set(places)) > 2


def place_of(run):
    """The phase that a killed run was in: the one after the last that is in its metrics."""
    if not (run / "metrics.json").exists():
        return "teacher"
    phases = ("teacher", "swapped", "stage1", "stage2", "stage3", "report")
    done = [name for name in phases if name in read_metrics(run)["phases"]]
    return phases[phases.index(done[-1]) + 1]
