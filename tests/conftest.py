"""What holds for all tests."""

import json
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

# Two workers on two cores: each, and what it starts, has one. Read when torch is first imported.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import HealthCheck, settings

from kernels.dispatch import force
from replace.console import Console

# How long an example takes says how busy the machine is, not whether the property holds; and what runs once
# says something about a change only if the examples are the same before it and after. Others than these are
# tried by `pytest --hypothesis-profile=exploring`.
for name, same in (("patient", True), ("exploring", False)):
    settings.register_profile(
        name, deadline=None, derandomize=same, suppress_health_check=[HealthCheck.too_slow]
    )
settings.load_profile("patient")

# Without a GPU the Triton kernels run in its interpreter. Triton reads this when it is first imported, so it
# is set here, before any test is.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


# A shell that starts the tests in the background has them ignore both, and what they start as well.
for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, usual)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is long comes first: begun last, it would have one worker wait for the other."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    """A command that a test runs in this process leaves its console and its form of operators to none."""
    yield
    force("auto")
    if logging.root.manager.disable:  # to set it, or a level, is to walk over every library's loggers
        logging.disable(logging.NOTSET)
    for log in (logging.getLogger(), *map(logging.getLogger, list(logging.root.manager.loggerDict))):
        log.handlers[:] = [handler for handler in log.handlers if not isinstance(handler, Console)]
        if log.name.partition(".")[0] in ("replace", "distill", "eval", "kernels"):
            log.propagate, log.disabled = True, False
            if log.level:
                log.setLevel(logging.NOTSET)


@pytest.fixture
def summaries() -> Callable[[Path], list[dict]]:
    """Reads what the offline W&B runs below a folder would send as their summaries."""
    return lambda folder: [_summary(path) for path in sorted(folder.rglob("*.wandb"))]


def _summary(path: Path) -> dict:
    """The keys of a summary as they stand at the end of a W&B file, with the last of history beside them."""
    from wandb.proto.wandb_internal_pb2 import Record

    found: dict = {}
    deadline = time.monotonic() + 120
    while True:  # W&B's own process goes on writing for a moment after a run has finished
        records = [Record.FromString(data) for data in _records(path.read_bytes())]
        if any(record.HasField("exit") for record in records):
            break
        assert time.monotonic() < deadline, f"{path} has no end"
        time.sleep(0.1)
    for record in records:
        for items in (record.history.item, record.summary.update):
            for item in items:
                found[item.key or ".".join(item.nested_key)] = json.loads(item.value_json)
    return found


def _records(data: bytes) -> Iterator[bytes]:
    """The records of a W&B file: a header of 7 bytes, then LevelDB's log format in blocks of 32 KiB."""
    block, place, held = 32768, 7, b""
    while place + 7 <= len(data):
        left = block - place % block
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        if left < 7 or kind == 0:
            place += left
            continue
        held += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield held
            held = b""
