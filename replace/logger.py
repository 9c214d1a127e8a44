"""Where a run's figures go besides its folder: nowhere, or Weights & Biases."""

import dataclasses
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar, Protocol

from replace.config import Config
from replace.files import atomic_write

logger = logging.getLogger(__name__)

IDENTITY = "wandb.json"
"""In a run's folder: which W&B run its figures went to, so that a resumed run continues that one."""
OBJECTIVE = "objective"
"""The key of W&B's summary that a sweep minimises, see `eval.objective`."""


class Logger(Protocol):
    """Takes figures as they come."""

    def log(self, figures: Mapping[str, Any], step: int) -> None:
        """Record `figures` at `step`: tokens of the running stage, or phases measured so far."""

    def results(self, metrics: dict, run_dir: Path) -> None:
        """Take over what a finished run left in its folder: figures, pictures, texts, the export."""

    def failed(self, why: str) -> None:
        """Say that the run ended early, and why."""

    def finish(self) -> None:
        """Close; safe to call once at the end of a run, failed or not."""


class NoLogger:
    """Records nothing: train.jsonl and metrics.json hold everything already."""

    def log(self, figures: Mapping[str, Any], step: int) -> None:
        """Nothing."""

    def results(self, metrics: dict, run_dir: Path) -> None:
        """Nothing."""

    def failed(self, why: str) -> None:
        """Nothing."""

    def finish(self) -> None:
        """Nothing."""


class WandbLogger:
    """A W&B run, offline in the run's folder unless WANDB_API_KEY or WANDB_MODE is set; never asks.

    Under a sweep's agent the agent says which run it is; else a run resumed from its folder goes on.
    """

    begun: ClassVar[bool] = False
    """Whether this process has had one, which then has said itself what went wrong."""

    def __init__(self, config: Config, run_dir: Path) -> None:
        import wandb  # only here: it takes seconds and most runs do without

        self._wandb = wandb
        self._run = wandb.init(
            project=config.logger.project,
            name=f"{config.experiment}-{run_dir.name}",
            id=None if os.environ.get("WANDB_RUN_ID") else _identity(run_dir),
            resume="allow",
            dir=str(run_dir),
            config=dataclasses.asdict(config),
            mode=_mode(),  # type: ignore[arg-type]  # wandb refuses other words itself
            settings=wandb.Settings(silent=True, console="off"),
        )
        atomic_write(run_dir / IDENTITY, json.dumps({"id": self._run.id, "project": config.logger.project}))
        self._artifact = config.logger.artifact
        self._code = 0
        WandbLogger.begun = True

    def log(self, figures: Mapping[str, Any], step: int) -> None:
        """Record `figures`; W&B counts its own steps, because it drops any that goes back."""
        self._run.log({**figures, "tokens": step})

    def results(self, metrics: dict, run_dir: Path) -> None:
        """The summary, every picture of the report, tables of what was written, gates, and the export."""
        wandb = self._wandb
        if metrics.get(OBJECTIVE) is not None:
            self._run.summary[OBJECTIVE] = metrics[OBJECTIVE]
        self._run.summary["verdict"] = (metrics.get("verdict") or {}).get("called")
        shown: dict[str, Any] = {
            f"report/{path.stem}": wandb.Image(str(path))
            for path in sorted((run_dir / "plots").glob("*.png"))
        }
        rows = continuations(metrics["phases"])
        if rows:
            table = wandb.Table(columns=["phase", "prompt", "continuation", "expected"])
            for row in rows:
                table.add_data(*row)
            shown["continuations"] = table
        for name, counts in gates(metrics["phases"]).items():
            edges = [index / len(counts) for index in range(len(counts) + 1)]
            shown[f"gates/{name}"] = wandb.Histogram(np_histogram=(counts, edges))
        self._run.log(shown)
        if self._artifact and (run_dir / "model").is_dir():
            self._log_export(metrics, run_dir)

    def _log_export(self, metrics: dict, run_dir: Path) -> None:
        """The model folder as an artifact that says where it comes from."""
        provenance = json.loads((run_dir / "provenance.json").read_text(encoding="utf-8"))
        lineage = {key: provenance[key] for key in ("model", "data", "commit", "seed") if key in provenance}
        about = {"teacher": metrics["model"], "layers": metrics["layers"], "attention": metrics["attention"]}
        export = self._wandb.Artifact(f"student-{self._run.id}", type="model", metadata=about | lineage)
        export.add_dir(str(run_dir / "model"), policy="immutable")  # else every file is copied first
        self._run.log_artifact(export)

    def failed(self, why: str) -> None:
        """A sweep sees the reason beside the run, and goes on with the next one."""
        self._run.summary["failed"] = why
        self._code = 1

    def finish(self) -> None:
        """Write what is left and close."""
        self._run.finish(exit_code=self._code)


def open_logger(config: Config, run_dir: Path) -> Logger:
    """The logger that `logger=` names; validation has checked the name."""
    return WandbLogger(config, run_dir) if config.logger.kind == "wandb" else NoLogger()


def _mode() -> str:
    return os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")


def _identity(run_dir: Path) -> str | None:
    """The W&B run of a folder that was begun before."""
    try:
        return str(json.loads((run_dir / IDENTITY).read_text(encoding="utf-8"))["id"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        logger.warning("%s cannot be read; the figures go to a new W&B run", run_dir / IDENTITY)
        return None


def continuations(phases: Mapping[str, dict]) -> list[tuple[str, str, str, str]]:
    """What each phase wrote after the probes' prompts: phase, prompt, continuation, what was expected."""
    return [
        (name, probe["prompt"], probe["continuation"], str(probe.get("expected") or ""))
        for name, phase in phases.items()
        for probe in phase.get("probes") or []
    ]


def gates(phases: Mapping[str, dict]) -> dict[str, list[float]]:
    """Shares of a histogram over 0..1, the mean over heads, of the gates that `eval=inside` looked at."""
    found: dict[str, list[float]] = {}
    for phase in phases.values():
        for layer in (phase.get("inside") or {}).get("layers", []):
            for name in ("read_gate", "write_gate"):
                heads = (layer.get(name) or {}).get("histogram")
                if heads:
                    shares = [fmean(column) for column in zip(*heads, strict=True)]
                    found[f"layer {layer['layer']}, {name.replace('_', ' ')}"] = shares
    return found


def report_refusal(why: str) -> None:
    """Tell a sweep's agent that its trial was refused before it began, where there is an agent."""
    if WandbLogger.begun or not os.environ.get("WANDB_SWEEP_ID"):
        return
    import wandb

    settings = wandb.Settings(silent=True, console="off")
    run = wandb.init(dir=str(Path.cwd()), mode=_mode(), settings=settings)  # type: ignore[arg-type]  # wandb refuses other words
    run.summary["failed"] = why
    run.finish(exit_code=1)
