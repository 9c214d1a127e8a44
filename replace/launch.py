"""Which processes a launcher has started, read from the environment; torch is not imported here.

accelerate's launcher starts one process on CPUs, whatever `--num_processes` says (1.15: the rest is MPI's).
Such a process becomes torchrun for as many as were asked for.
"""

import os
import sys
import time

import psutil

from replace.errors import UserError, bad_value

INSTEAD = "`ACCELERATE_USE_CPU=true torchrun --nproc-per-node 2 -m replace ...`"
GRACE = 5.0
"""Seconds that rank 0 has to meet an error as well, before another says it."""


class Lost(UserError):
    """Another rank has ended; it has said why."""


def world() -> int:
    """Processes of this run."""
    return _number("WORLD_SIZE", 1) if "LOCAL_RANK" in os.environ else 1


def rank() -> int:
    """The number of this process among them."""
    return _number("RANK", 0) if world() > 1 else 0


def check() -> None:
    """Refuse an environment that no launcher makes; until then `world` and `rank` take it for one process.

    Raises:
        UserError: a number is none, or too large.
    """
    if "LOCAL_RANK" not in os.environ:
        return
    for name, least in (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0)):
        value = os.environ.get(name) or str(least)
        if not value.isdecimal() or int(value) < least:
            allowed = f"a whole number from {least} on, as a launcher sets it beside LOCAL_RANK"
            raise bad_value(name, value, allowed)
    if rank() >= world():
        raise bad_value("RANK", os.environ["RANK"], f"less than WORLD_SIZE={world()}")


def refuse_several(module: str) -> None:
    """Refuse to be one of several processes, where each would do and write the same.

    Raises:
        UserError: it is one.
    """
    check()
    if world() > 1:
        raise bad_value("num_processes", world(), f"1, since `python -m {module}` is one process")


def _number(name: str, otherwise: int) -> int:
    value = os.environ.get(name, "")
    return int(value) if value.isdecimal() else otherwise


def asks_for_cpu() -> bool:
    """Whether the launcher was told to leave GPUs alone."""
    return _true("ACCELERATE_USE_CPU")


def asked_for() -> str | None:
    """accelerate's distributed type as the launcher was asked for it; None for whatever fits the machine."""
    for name, kind in (
        ("ACCELERATE_USE_FSDP", "FSDP"),
        ("ACCELERATE_USE_DEEPSPEED", "DEEPSPEED"),
        ("ACCELERATE_USE_MEGATRON_LM", "MEGATRON_LM"),
    ):
        if _true(name):
            return kind
    return None


def hush() -> None:
    """No progress bars but rank 0's; tqdm reads this when it is imported."""
    if rank():
        os.environ["TQDM_DISABLE"] = "1"


def is_own(error: Exception) -> bool:
    """Whether an error is this rank's own, so that it has to say it; what all meet rank 0 says.

    Where rank 0 meets it too, the launcher ends this process while it waits here.
    """
    if isinstance(error, Lost):
        return False
    time.sleep(GRACE)
    return True


def become_torchrun(module: str) -> None:
    """Where accelerate was asked for several processes on CPUs and has started one, start them all.

    Does nothing elsewhere.

    Raises:
        UserError: how many were asked for cannot be known, or they are of several machines.
    """
    single = "MASTER_PORT" in os.environ and asks_for_cpu() and "LOCAL_RANK" not in os.environ
    if not single or any(name.startswith(("PMI_", "OMPI_", "MV2_", "MPI_")) for name in os.environ):
        return
    count, machines = _asked_of_accelerate()
    if count is None:
        allowed = f"a number after `accelerate launch --cpu`; {INSTEAD} does without accelerate's launcher"
        raise bad_value("num_processes", count, allowed)
    if machines > 1:
        allowed = f"1 machine when accelerate starts processes on CPUs; {INSTEAD} does without it"
        raise bad_value("num_machines", machines, allowed)
    if count == 1:
        return
    del os.environ["MASTER_PORT"], os.environ["MASTER_ADDR"]
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *command, "-m", module, *sys.argv[1:]])


def _asked_of_accelerate() -> tuple[int | None, int]:
    """Processes and machines on the command line of accelerate, which waits for this process."""
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    words = psutil.Process(os.getppid()).cmdline()
    start = next(
        (i for i, word in enumerate(words) if word in ("launch", "accelerate.commands.launch")), None
    )
    if start is None:
        start = next((i for i, word in enumerate(words) if word.endswith("accelerate-launch")), None)
    if start is None:
        return None, 1
    given = launch_command_parser().parse_args(words[start + 1 :])
    config = load_config_from_file(given.config_file) if given.config_file else None
    count = given.num_processes or getattr(config, "num_processes", None)
    return count, given.num_machines or getattr(config, "num_machines", None) or 1


def _true(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes")
