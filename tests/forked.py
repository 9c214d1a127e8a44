"""Runs command lines of `replace` in forked children, one a line of standard input, and kills some of them.

The modules are imported once, which takes longer than a run of the tiny model. A line is a JSON object with
`arguments` and the file `output` for what the child prints; with `reproduce`, if it is that command; with
`number`, a signal, and `after`, seconds, counted from when a file matches the glob `when`, if that is given;
with `half`, the count of the checkpoint in the middle of whose writing the child kills itself; with `rename`,
that of the rename before which it does. The answer is the exit code, negative for a signal.
"""

import glob
import json
import os
import signal
import sys
import time
from pathlib import Path

import torch

import distill.checkpoint
import replace.pipeline  # noqa: F401  # for the children's sake
from replace import __main__ as start
from replace import reproduce


def die_in_write(count):
    """Kill this process when its `count`-th checkpoint is half written; best steps do not count."""
    plain, calls = distill.checkpoint.save_file, []

    def half(tensors, path, metadata):
        if ".best-" not in str(path):
            calls.append(path)
        plain(tensors, path, metadata)
        if len(calls) == count:
            data = Path(path).read_bytes()
            Path(path).write_bytes(data[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)

    distill.checkpoint.save_file = half


def die_before_rename(count):
    """Kill this process before its `count`-th rename of a file or folder that it has written."""
    plain, calls = os.replace, []

    def rename(source, target, **named):
        calls.append(source)
        if len(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(source, target, **named)

    os.replace = rename


def child(job):
    """Run the command line of a job; never returns."""
    output = os.open(job["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdin.close()
    torch.set_num_threads(1)
    if "half" in job:
        die_in_write(job["half"])
    if "rename" in job:
        die_before_rename(job["rename"])
    code = 1  # what an error that nothing caught leaves
    try:
        module = reproduce if job.get("reproduce") else start
        code = module.main(job["arguments"])
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def watch(pid, job):
    """Wait for a child, and send it its signal at the moment that the job names; returns the exit code."""
    due = time.monotonic() + job["after"] if "after" in job and "when" not in job else None
    sent = "number" not in job
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if due is None and "when" in job and glob.glob(job["when"]):
            due = time.monotonic() + job.get("after", 0)
        if not sent and due is not None and time.monotonic() >= due:
            os.kill(pid, job["number"])  # not waited for yet, so the number is still the child's
            sent = True
        time.sleep(0.002)


if __name__ == "__main__":
    print("ready", flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        pid = os.fork()
        if pid == 0:
            child(job)
        print(watch(pid, job), flush=True)
    os._exit(0)  # taking the interpreter down takes longer than a run
