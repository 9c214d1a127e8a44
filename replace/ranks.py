"""What differs when several processes make one run: who writes, who waits, and what is summed.

`accelerate launch` or `torchrun` starts the processes (ranks); `joined` connects them by accelerate. Every
rank goes the same way through a run and ends each step with the same weights. Rank 0 alone reads and writes
the run's folder, and tells the others what it read. With one process every function here does nothing.

A step's rows are those of one process. Its parts (`stage.accumulate`) go to teams of ranks; in a team each
rank takes an equal share of a part's rows, so `batch * accumulate` must be a multiple of the ranks and
nothing more. A loss is a sum over a part's rows divided by a count or a variance; in a team these are taken
over all of its rows (`total`, `variance`), so what a rank computes is its share of the loss, and the shares
of losses, figures and gradients add up to what one process computes.
"""

import json
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from replace.config import Config, DevicesConfig
from replace.errors import UserError, bad_value
from replace.launch import Lost, asked_for, asks_for_cpu, rank, world
from replace.machine import device_of_choice
from replace.precision import dtype_of

logger = logging.getLogger(__name__)

WAIT = timedelta(days=1)
"""A rank waits for another for as long as a measurement may last; one that died is noticed at once."""
BUCKET = 1 << 25
"""Bytes of gradients that are summed in one go."""
SHARDINGS = ("none", "fsdp2")
"""What a dry run can plan for."""
TYPES = ("MULTI_GPU", "MULTI_CPU", "FSDP")
"""Of accelerate's distributed types, those that a run takes."""
SETTINGS = {
    "ACCELERATE_MIXED_PRECISION": ("mixed_precision", "no", "precision= of the run says it"),
    "ACCELERATE_DYNAMO_BACKEND": ("dynamo_backend", "no", "a run compiles nothing"),
}
"""Of accelerate's config, what a run would pass over in silence: name there, what it has to be, and why."""
FSDP_SETTINGS = {
    "FSDP_OFFLOAD_PARAMS": ("fsdp_offload_params", "false", "a run keeps its shards on the devices"),
    "FSDP_CPU_RAM_EFFICIENT_LOADING": (
        "fsdp_cpu_ram_efficient_loading",
        "false",
        "each rank loads the weights",
    ),
    "FSDP_ACTIVATION_CHECKPOINTING": (
        "fsdp_activation_checkpointing",
        "false",
        "stage.gradient_checkpointing of the run says it",
    ),
}
"""The same of its fsdp_config."""


@dataclass(frozen=True)
class Team:
    """The ranks that share the rows of a part.

    Attributes:
        teams: their number; the parts of a step are dealt to them.
        index: of this rank's team.
        place: of this rank in its team.
        size: ranks of a team.
        group: of the team; None where a rank is one by itself.
    """

    teams: int = 1
    index: int = 0
    place: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = field(default=None, repr=False)

    def parts(self, accumulate: int) -> range:
        """The parts of a step that this team does."""
        return range(self.index, accumulate, self.teams)

    def share(self, rows: int) -> slice:
        """This rank's of a part's rows."""
        own = rows // self.size
        return slice(self.place * own, (self.place + 1) * own)


_team: ContextVar[Team] = ContextVar("team", default=Team())  # noqa: B039  # frozen
_sharded = False


def is_main() -> bool:
    """Whether this process reads and writes the run's folder."""
    return rank() == 0


def sharded() -> bool:
    """Whether the processes that are joined shard the model (FSDP2)."""
    return _sharded


@contextmanager
def joined() -> Iterator[None]:
    """Within the block the processes of a launch are connected.

    Raises:
        UserError: they cannot be, or accelerate makes something else of them than was asked for.
    """
    global _sharded
    if world() == 1:
        yield
        return
    from accelerate import Accelerator, InitProcessGroupKwargs  # only here: it takes seconds

    on_cpu = asks_for_cpu() or not torch.cuda.is_available()
    handlers = [InitProcessGroupKwargs(timeout=WAIT)]
    try:
        made = Accelerator(cpu=on_cpu, mixed_precision="no", kwargs_handlers=handlers)
    except (ValueError, RuntimeError) as error:  # no address, none that answers, no such device
        raise UserError(f"The {world()} processes cannot be joined: {_first_line(error)}.") from error
    try:
        plugin = made.state.fsdp_plugin if made.distributed_type.value == "FSDP" else None
        version = None if plugin is None else plugin.fsdp_version
        check_type(asked_for(), made.distributed_type.value, made.num_processes, version)
        _sharded = plugin is not None
        if not is_main():
            logging.disable(logging.WARNING)  # what rank 0 says is said once
        yield
    finally:
        _sharded = False
        logging.disable(logging.NOTSET)
    dist.destroy_process_group()  # not after an error: NCCL would wait for what no rank sends any more


def check_type(asked: str | None, made: str, processes: int, version: int | None = None) -> None:
    """Refuse processes that are not connected as they were asked to be.

    accelerate gives FSDP on GPUs only; asked for it on CPUs it replicates the model and says nothing.

    Raises:
        UserError: they are not.
    """
    if processes != world():
        raise bad_value("num_processes", processes, f"{world()}, as launched; accelerate joined others")
    if made not in TYPES:
        raise bad_value("distributed_type", made, TYPES)
    if asked is not None and asked != made and (asked == "FSDP" or made == "FSDP"):
        why = f"accelerate makes {made} of it here, since it shards models on GPUs only"
        raise bad_value("distributed_type", asked, f"MULTI_CPU ({why})")
    if version is not None and version != 2:
        raise bad_value("fsdp_version", version, "2")


def check_asked() -> None:
    """Refuse what accelerate's launcher was asked for and a run would not do.

    Raises:
        UserError: there is such a thing.
    """
    asked = asked_for()
    if asked not in (None, *TYPES):
        raise bad_value("distributed_type", asked, TYPES)
    settings = SETTINGS | (FSDP_SETTINGS if asked == "FSDP" else {})
    for variable, (name, allowed, why) in settings.items():
        value = os.environ.get(variable) or allowed
        if value.lower() != allowed:
            raise bad_value(name, value, f"{allowed}, since {why}")


def check_ranks(config: Config) -> None:
    """Refuse a run whose rows cannot be dealt to its processes.

    Raises:
        UserError: a step's rows do not divide, a phase cannot be shared, or the launcher was asked for more.
    """
    devices = config.devices
    if devices.processes < 0:
        raise bad_value("devices.processes", devices.processes, "0 (those of the launch) or more")
    if devices.sharding not in SHARDINGS:
        raise bad_value("devices.sharding", devices.sharding, SHARDINGS)
    if not 0 <= devices.memory < math.inf:
        raise bad_value("devices.memory", devices.memory, "GiB of a device, or 0 for what is here")
    for name, default in vars(DevicesConfig()).items():
        value = getattr(devices, name)
        if value != default and not config.dry_run:
            allowed = f"{default} without dry_run=true: a run takes what its launcher gives it"
            raise bad_value(f"devices.{name}", value, allowed)
    if world() > 1:
        check_asked()
    many = processes(config)
    if many == 1:
        return
    if config.lora.kind != "none" and config.lora.qlora:
        raise bad_value("lora.qlora", True, f"false, since {many} processes make this run")
    budgets = {f"stage{number}": budget for number, budget in config.running.items()}
    budgets |= {"lora": config.budget.lora} if config.tunes else {}
    for name, budget in budgets.items():
        split(budget.batch, config.stage.accumulate, many, f"budget.{name}.batch")
    in_shards = asked_for() == "FSDP" or devices.sharding == "fsdp2"
    if in_shards and dtype_of(config.precision, device_of_choice()) == torch.float16:
        raise bad_value("precision", config.precision, "bf16 or fp32: gradients in shards are not scaled")


def processes(config: Config) -> int:
    """Those that a run has, or that a dry run is to plan for."""
    return config.devices.processes or world()


def split(batch: int, accumulate: int, ranks: int, name: str = "batch") -> tuple[int, int]:
    """Teams, and ranks of each; as many teams as the parts allow, since a team's ranks wait for each other.

    Raises:
        UserError: the rows of a step are no multiple of the ranks.
    """
    if (batch * accumulate) % ranks:
        allowed = f"with stage.accumulate={accumulate} what makes a step's rows a multiple of the "
        raise bad_value(name, batch, f"{allowed}{ranks} processes that share them")
    teams = math.gcd(accumulate, ranks)
    return teams, ranks // teams


@contextmanager
def teamed(batch: int, accumulate: int) -> Iterator[Team]:
    """Within the block the ranks do a step's rows in teams."""
    if world() == 1:
        yield Team()
        return
    teams, size = split(batch, accumulate, world())
    group = None
    if size > 1:
        group, _ = dist.new_subgroups(size, timeout=WAIT) if teams > 1 else (dist.group.WORLD, None)
    token = _team.set(Team(teams, rank() // size, rank() % size, size, group))
    try:
        yield _team.get()
    finally:
        _team.reset(token)
        if teams > 1 and group is not None:
            dist.destroy_process_group(group)


@contextmanager
def alone() -> Iterator[None]:
    """Within the block each rank does rows by itself; those of a sharded model have to do the same ones."""
    token = _team.set(Team())
    try:
        yield
    finally:
        _team.reset(token)


def total(value: Tensor) -> Tensor:
    """The sum of a count over the rows of this part, which the ranks of a team share; without gradient."""
    group = _team.get().group
    if group is None:
        return value
    value = value.detach().clone()
    with or_lost():
        dist.all_reduce(value, group=group)
    return value


def variance(value: Tensor) -> Tensor:
    """The variance over all elements of the team's."""
    if _team.get().group is None:
        return value.var()
    exact = value.to(_exact(value.device))
    count, whole = total(torch.stack([exact.new_tensor(exact.numel()), exact.sum()]))
    squares = total((exact - whole / count).square().sum())  # around the common mean: nothing cancels
    return (squares / (count - 1)).to(value.dtype)


def sum_figures(figures: Mapping[str, float], device: torch.device) -> dict[str, float]:
    """The sum of each figure over all ranks, which have the same ones."""
    if world() == 1:
        return dict(figures)
    sums = torch.tensor(list(figures.values()), dtype=_exact(device), device=device)
    with or_lost():
        dist.all_reduce(sums)
    return dict(zip(figures, sums.tolist(), strict=True))


@torch.no_grad()
def sum_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Add the gradients of all ranks up, in each of them.

    One that only some ranks have, as of an expert that no token of a rank's was sent to, is 0 on the others;
    one that no rank has stays none, as in one process.
    """
    parameters = [p for p in parameters if not isinstance(p, DTensor)]  # shards are summed in the backward
    if world() == 1 or not parameters:
        return
    device = parameters[0].device
    found = torch.tensor([p.grad is not None for p in parameters], dtype=torch.uint8, device=device)
    with or_lost():
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        gradients = []
        for parameter, any_rank in zip(parameters, found.tolist(), strict=True):
            if any_rank:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                gradients.append(parameter.grad)
        for bucket in _buckets(gradients):
            flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
            dist.all_reduce(flat)
            for gradient, part in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                gradient.copy_(part.view_as(gradient))


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of one dtype, in their order, together no larger than BUCKET unless one alone is."""
    held: list[Tensor] = []
    for tensor in tensors:
        size = sum(t.nbytes for t in held) + tensor.nbytes
        if held and (size > BUCKET or tensor.dtype != held[0].dtype):
            yield held
            held = []
        held.append(tensor)
    if held:
        yield held


@torch.no_grad()
def broadcast(parameters: Sequence[Tensor]) -> None:
    """Give every rank the parameters that rank 0 has."""
    if world() == 1:
        return
    with or_lost():
        for parameter in parameters:
            if not isinstance(parameter, DTensor):
                dist.broadcast(parameter, 0)


def maximum(number: int) -> int:
    """The largest of the ranks' numbers."""
    if world() == 1:
        return number
    largest = torch.tensor(number, device=_device())
    with or_lost():
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest)


def by_main(function: Callable[[], Any]) -> Any:
    """What rank 0 gets from `function`, which JSON must hold; the others wait for it and are told.

    An error of rank 0's ends it, and with it the others.
    """
    if world() == 1:
        return function()
    value = function() if is_main() else None
    return _told(value, 0)


def by_main_read(read: Callable[[], tuple[dict[str, Tensor], Any] | None]) -> Any:
    """As `by_main`, of tensors by name and what JSON holds, or None."""
    if world() == 1:
        return read()
    found = read() if is_main() else None
    about = None
    if found is not None:
        shapes = {name: [str(t.dtype).removeprefix("torch."), *t.shape] for name, t in found[0].items()}
        about = {"tensors": shapes, "about": found[1]}
    about = _told(about, 0)
    if about is None:
        return None
    tensors = {}
    with or_lost():
        for name, (dtype, *shape) in about["tensors"].items():
            given = found[0][name] if found is not None else torch.empty(shape, dtype=getattr(torch, dtype))
            given = given.to(_device()).contiguous()
            dist.broadcast(given, 0)
            tensors[name] = given.cpu()
    return tensors, about["about"]


def spread(jobs: Mapping[str, Callable[[], Any]]) -> dict[str, Any]:
    """The result of each job, which JSON must hold; each is done by one rank, in turn, and told to all.

    A job must not depend on another, nor on the random numbers that one draws.
    """
    if world() == 1:
        return {name: job() for name, job in jobs.items()}
    done = {name: job() for i, (name, job) in enumerate(jobs.items()) if i % world() == rank()}
    return {name: _told(done.get(name), i % world()) for i, name in enumerate(jobs)}


@contextmanager
def main_first() -> Iterator[None]:
    """The block is done by one rank of each machine before the others, which find what it has downloaded."""
    first = int(os.environ.get("LOCAL_RANK") or 0) == 0
    if not first:
        barrier()
    yield
    if first:
        barrier()


def barrier() -> None:
    """Wait until all ranks are here."""
    maximum(0)


def _told(value: Any, source: int) -> Any:
    """`value` of the rank `source`, as JSON has it: nothing that comes from elsewhere is unpickled."""
    data = json.dumps(value).encode() if rank() == source else b""
    device = _device()
    size = torch.tensor(len(data), device=device)
    with or_lost():
        dist.broadcast(size, source)
        text = torch.empty(int(size), dtype=torch.uint8, device=device)
        if rank() == source:
            text.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        dist.broadcast(text, source)
    return json.loads(bytes(text.cpu().numpy()))


@contextmanager
def or_lost() -> Iterator[None]:
    """Around all that ranks tell each other: that one of them is gone is said in a sentence.

    Raises:
        Lost: one is gone.
    """
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):  # gloo has no class of its own
            raise
        raise Lost(f"another of the {world()} processes has ended ({_first_line(error)}).") from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__).strip().rstrip(".")


def _device() -> torch.device:
    """Where what is told must lie: NCCL knows GPUs only."""
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")


def _exact(device: torch.device) -> torch.dtype:
    """The widest float of a device."""
    return torch.float32 if device.type == "mps" else torch.float64
