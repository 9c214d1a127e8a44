"""Where a run's figures go besides its folder: nowhere, or Weights & Biases."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from replace.config import Config


class Logger(Protocol):
    """Takes figures as they come."""

    def log(self, figures: Mapping[str, Any], step: int) -> None:
        """Record `figures` at `step`: tokens of the running stage, or phases measured so far."""

    def finish(self) -> None:
        """Close; safe to call once at the end of a run, failed or not."""


class NoLogger:
    """Records nothing: train.jsonl and metrics.json hold everything already."""

    def log(self, figures: Mapping[str, Any], step: int) -> None:
        """Nothing."""

    def finish(self) -> None:
        """Nothing."""


class WandbLogger:
    """A W&B run, offline in the run's folder unless WANDB_API_KEY or WANDB_MODE is set; never asks."""

    def __init__(self, config: Config, run_dir: Path) -> None:
        import wandb  # only here: it takes seconds and most runs do without

        mode = os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")
        self._run = wandb.init(
            project=config.logger.project,
            name=f"{config.experiment}-{run_dir.name}",
            dir=str(run_dir),
            config=dataclasses.asdict(config),
            mode=mode,  # type: ignore[arg-type]  # wandb refuses other words itself
            settings=wandb.Settings(silent=True, console="off"),
        )

    def log(self, figures: Mapping[str, Any], step: int) -> None:
        """Record `figures`; W&B counts its own steps, because it drops any that goes back."""
        self._run.log({**figures, "tokens": step})

    def finish(self) -> None:
        """Write what is left and close."""
        self._run.finish()


def open_logger(config: Config, run_dir: Path) -> Logger:
    """The logger that `logger=` names; validation has checked the name."""
    return WandbLogger(config, run_dir) if config.logger.kind == "wandb" else NoLogger()
