"""Checkpoints: safetensors and JSON, checked by SHA-256, written under a temporary name and renamed.

A checkpoint is a folder with state.safetensors, whose header also holds the counters, so that one checksum
covers all that is read, and about.json: the checksum, and the counters once more for a person. Nothing is
ever unpickled. Of several ranks the first alone reads and writes, so that any number of them goes on where
any other number stopped.
"""

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from distill.sharding import like, whole
from distill.stages import LORA
from replace import ranks
from replace.compose import load_config
from replace.files import atomic_folder, atomic_write, expanded

logger = logging.getLogger(__name__)

KEEP = 2
"""Checkpoints kept inside a stage: the newest and, should it be damaged, the one before."""
STATE, ABOUT = "state.safetensors", "about.json"


@dataclass
class Progress:
    """Where a stage stands: steps done, and the counters that go into its metrics."""

    step: int
    counters: dict[str, Any]


def save_step(
    folder: Path, names: list[str], model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress
) -> None:
    """Write `folder/step-<n>`: trained parameters, optimizer moments and counters."""
    tensors = _parameters(model, names)
    for group in optimizer.param_groups:
        for index, parameter in enumerate(group["params"]):
            for key, value in optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{group['name']}.{index}.{key}"] = whole(torch.as_tensor(value))
    if not ranks.is_main():
        return
    newest = folder / f"step-{progress.step:07d}"
    _write(newest, tensors, {"step": progress.step, "counters": progress.counters})
    present = sorted(folder.glob("step-*"))
    later = [path for path in present if path.name > newest.name]  # damaged: the stage began before them
    for old in [*later, *[path for path in present if path not in later][:-KEEP]]:
        _remove(old)
    # Of the best steps those stay that a checkpoint which is left would go on with.
    left = [_step_of(path) for path in folder.glob("step-*")]
    best = {_step_of(path): path for path in folder.glob("best-*")}
    needed = {max((step for step in best if step <= at), default=None) for at in left}
    for step, path in best.items():
        if step not in needed:
            _remove(path)


def load_step(
    folder: Path, names: list[str], model: nn.Module, optimizer: torch.optim.Optimizer
) -> Progress | None:
    """Go on from the newest whole checkpoint inside a stage; None if there is none."""
    read = ranks.by_main_read(lambda: _newest(folder))
    if read is None:
        return None
    tensors, about = read
    _restore(model, {name: tensors[name] for name in names})
    for group in optimizer.param_groups:
        for index, parameter in enumerate(group["params"]):
            start = f"optimizer.{group['name']}.{index}."
            state = {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}
            if state:  # the count of steps stays on the CPU, where the optimizer keeps it
                optimizer.state[parameter] = {
                    key: value if key == "step" else like(parameter, value) for key, value in state.items()
                }
    return Progress(about["step"], about["counters"])


def save_best(folder: Path, names: list[str], model: nn.Module, step: int) -> None:
    """Write `folder/best-<n>`: the trained parameters of the step that is the best so far."""
    tensors = _parameters(model, names)
    if ranks.is_main():
        _write(folder / f"best-{step:07d}", tensors, {"step": step})


def load_best(folder: Path, model: nn.Module, step: int) -> bool:
    """Take over the parameters of the best step; False, and nothing is changed, where they are damaged."""
    read = ranks.by_main_read(lambda: _read(folder / f"best-{step:07d}"))
    if read is None:
        logger.warning("checkpoint best-%07d is damaged; the last step's weights are taken", step)
        return False
    _restore(model, read[0])
    return True


def forget_best(folder: Path, step: int) -> None:
    """Drop the best steps after `step`, at which a stage goes on and will find them anew."""
    for path in folder.glob("best-*") if ranks.is_main() else ():
        if _step_of(path) > step:
            _remove(path)


def save_stage(folder: Path, names: list[str], model: nn.Module, about: dict) -> None:
    """Write a finished stage's parameters to `folder/final`; the checkpoints inside the stage go."""
    tensors = _parameters(model, names)
    if not ranks.is_main():
        return
    _write(folder / "final", tensors, about)
    for old in [*folder.glob("step-*"), *folder.glob("best-*")]:
        _remove(old)


def load_stage(folder: Path, model: nn.Module) -> dict | None:
    """Take over a finished stage's parameters and return what `save_stage` was told; None if unfinished."""
    read = ranks.by_main_read(lambda: _read(folder / "final"))
    if read is None:
        if ranks.is_main() and (folder / "final").is_dir():
            logger.warning("the final checkpoint of %s is damaged; the stage is done again", folder.name)
        return None
    tensors, about = read
    _restore(model, tensors)
    return about


def stages_of(run: Path) -> dict[int, Path]:
    """Stage -> checkpoint folder, in their order, of what a run's weights are made of, finished or not.

    Its own stages, and what it took over by `from=`, as far as that comes before the first of its own.

    Raises:
        UserError: the run, or one that it took stages over from, is not there.
    """
    config = load_config(run, "from")
    taken = {} if config.source is None else stages_of(expanded(config.source))
    first = min(config.running, default=LORA)
    before = {number: folder for number, folder in taken.items() if number < first}
    return before | {number: run / "checkpoints" / f"stage{number}" for number in config.running}


def load_last(run: Path, model: nn.Module) -> tuple[int, int | None] | None:
    """Take over what an unfinished run trained last, on top of its finished stages.

    Returns:
        the stage, and the step inside of it, or None where the stage is finished; None if there is no whole
        checkpoint.
    """
    last: tuple[int, int | None] | None = None
    for number, folder in stages_of(run).items():
        if load_stage(folder, model) is not None:
            last = (number, None)
            continue
        for path in sorted(folder.glob("step-*"), reverse=True):
            read = _read(path)
            if read is None:
                logger.warning("checkpoint %s is damaged; the one before it is used", path.name)
                continue
            present = dict(model.named_parameters())
            _restore(model, {name: tensor for name, tensor in read[0].items() if name in present})
            return number, read[1]["step"]
    return last


def _step_of(path: Path) -> int:
    """The step that a checkpoint inside a stage is of."""
    return int(path.name.rpartition("-")[2])


def _parameters(model: nn.Module, names: list[str]) -> dict[str, Tensor]:
    """Named parameters, detached and on the CPU."""
    present = dict(model.named_parameters())
    return {name: whole(present[name]).detach().cpu().contiguous() for name in names}


def _restore(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Copy tensors into the parameters of that name."""
    present = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in tensors.items():
            present[name].copy_(like(present[name], value))


def _write(folder: Path, tensors: dict[str, Tensor], about: dict) -> None:
    """One checkpoint folder, whole or not at all."""
    with atomic_folder(folder) as temporary:
        save_file(tensors, temporary / STATE, metadata={"about": json.dumps(about)})
        about = {**about, "sha256": _hash(temporary / STATE)}
        atomic_write(temporary / ABOUT, json.dumps(about, indent=1))


def _read(folder: Path) -> tuple[dict[str, Tensor], dict] | None:
    """A checkpoint folder's tensors and description; None if it is missing or damaged."""
    try:
        written = json.loads((folder / ABOUT).read_text())
        if written["sha256"] != _hash(folder / STATE):
            return None
        with safe_open(folder / STATE, "pt") as file:
            about = (file.metadata() or {}).get("about")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
    except (OSError, ValueError, TypeError, KeyError, SafetensorError):
        return None
    return tensors, written if about is None else json.loads(about)  # none: of an earlier version


def _newest(folder: Path) -> tuple[dict[str, Tensor], dict] | None:
    """The newest whole checkpoint inside a stage; None if there is none."""
    for path in sorted(folder.glob("step-*"), reverse=True):
        read = _read(path)
        if read is not None:
            return read
        logger.warning("checkpoint %s is damaged; the one before it is used", path.name)
    return None


def _remove(folder: Path) -> None:
    """Delete a checkpoint folder of ours; about.json goes first, so that no half of it is taken for whole."""
    for name in (ABOUT, STATE):
        (folder / name).unlink(missing_ok=True)
    folder.rmdir()


def _hash(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
