"""Runs command lines of `replace` in one or several forked processes that are joined by gloo, one line each.

The modules are imported once. A line of standard input is a JSON object with `arguments`, the number of
`ranks` and the file `output` for what they print; with `shards`, layers are put in shards as on GPUs, by the
same code (accelerate would not on a CPU); with `environment`, what else a launcher would set; with `stop`,
the rank that sends itself `number`, a signal, `at` a stage and step; with `ends`, the others get SIGTERM once
one has failed, as torchrun has it. The answer is the list of exit codes, negative for a signal.
"""

import json
import os
import signal
import socket
import sys
import time
import traceback
from functools import partial

import torch

import distill.trainer
import replace.pipeline  # noqa: F401  # for the children's sake
from distill.data import Mixture
from replace import __main__ as start
from replace import ranks

EPS = 1e-2
"""AdamW's own divides what is all but 0 by itself, and so makes a step of it that rounding decides. With this
one a step is in proportion to the gradient: rounding does not show, and a gradient of the wrong scale does.
"""


def child(job, rank, port):
    """Run the command line of a job as one of its ranks; never returns."""
    output = os.open(job["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdin.close()
    torch.set_num_threads(1)
    if job["ranks"] > 1:
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": job["ranks"]}
        where |= {"RANK": rank, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": job["ranks"]}
        os.environ |= {name: str(value) for name, value in where.items()} | job.get("environment", {})
        start.hush()
    if job.get("shards"):
        ranks.sharded = lambda: True
    distill.trainer.LOG_EVERY = 1
    if job.get("stop") == rank:
        stop_at(*job["at"], job["number"])
    torch.optim.AdamW = partial(torch.optim.AdamW, eps=EPS)
    code = 1  # what an error that nothing caught leaves
    try:
        code = start.main(job["arguments"])
    finally:
        if sys.exception() is not None:
            traceback.print_exc()  # os._exit leaves no room for Python's own
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def stop_at(stage, step, number):
    """Send this process a signal when it draws the rows of a step."""
    plain = Mixture.batch

    def batch(mixture, at, *more):
        if (mixture.stage, at) == (stage, step):
            os.kill(os.getpid(), number)
        return plain(mixture, at, *more)

    Mixture.batch = batch


def watch(pids, job):
    """Wait for all; returns the exit codes."""
    codes = {}
    while len(codes) < len(pids):
        for pid in pids:
            if pid not in codes:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    codes[pid] = os.waitstatus_to_exitcode(status)
        if job.get("ends") and any(codes.values()):
            for pid in set(pids) - set(codes):
                os.kill(pid, signal.SIGTERM)
        time.sleep(0.005)
    return [codes[pid] for pid in pids]


def main():
    """Answer line after line."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    print("ready", flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        pids = []
        for rank in range(job["ranks"]):
            pid = os.fork()
            if pid == 0:
                child(job, rank, port)
            pids.append(pid)
        print(json.dumps(watch(pids, job)), flush=True)
    os._exit(0)  # taking the interpreter down takes longer than a run


if __name__ == "__main__":
    main()
