"""`python -m replace +exp=<experiment> [key=value ...]`: the one command of the project.

The command line is composed and validated before anything is loaded or written; then Hydra makes the run's
folder and calls the pipeline. A person's mistake ends in one sentence and exit code 2; a traceback only with
`verbose=true`.
"""

import logging
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from replace.compose import (
    CONF,
    choices,
    compose,
    differences,
    explain,
    load_config,
    normalise,
    parse,
    refuse_unknown,
    register,
    select,
    typed,
)
from replace.config import Config
from replace.errors import UserError, bad_value

log = logging.getLogger(__name__)

START = f"""Replace attention layers of a pretrained model, win them back, and measure what was kept.

Start with:          python -m replace +exp=infini
In about a minute:   python -m replace +exp=infini budget=smoke
What would happen:   python -m replace +exp=infini dry_run=true
Continue a run:      python -m replace resume=<run folder>

Experiments: {", ".join(choices("exp"))}.  Budgets: {", ".join(choices("budget"))}."""

MULTIRUN = ("-m", "--multirun")
# Hydra's other flags; `--hydra-help` explains them.
FLAGS = {
    *(
        "-h",
        "--help",
        "--hydra-help",
        "--version",
        "-c",
        "--cfg",
        "--resolve",
        "-p",
        "--package",
        "-r",
        "--run",
    ),
    *("-sc", "--shell-completion", "-cp", "--config-path", "-cn", "--config-name", "-cd", "--config-dir"),
    *("-i", "--info", "--experimental-rerun"),
}
# What a resumed run may be told anew: none of it changes a figure.
FREE_ON_RESUME = ("verbose", "logger", "threads", "dry_run")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: that of the process) and return the exit code."""
    arguments = normalise(sys.argv[1:] if argv is None else argv)
    if not arguments:
        print(START)
        return 2
    try:
        return _run(arguments)
    except (UserError, HydraException, OmegaConfBaseException, OSError) as error:
        if _is_verbose(arguments):
            traceback.print_exc()
        print(f"error: {_sentence(error, arguments)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted; `python -m replace resume=<run folder>` continues.", file=sys.stderr)
        return 130


def _run(arguments: list[str]) -> int:
    flags = [argument.partition("=")[0] for argument in arguments if argument.startswith("-")]
    for flag in flags:
        if flag not in MULTIRUN and flag not in FLAGS:
            raise bad_value("argument", flag, "key=value, or a flag that --hydra-help lists")
    if not flags:
        return _run_one(arguments)
    if any(argument.startswith("resume=") for argument in arguments):
        raise bad_value("argument", flags[0], "no flags beside resume=")
    if all(flag in MULTIRUN for flag in flags):
        refuse_unknown([argument for argument in arguments if not argument.startswith("-")])
    return _launch(arguments, None)


def _run_one(overrides: list[str]) -> int:
    resumed, overrides = _resumed(overrides)
    config = resumed or compose(overrides)
    _validate(config)
    if config.dry_run:
        _describe(config)
        return 0
    return _launch(overrides, resumed)


def _launch(arguments: list[str], resumed: Config | None) -> int:
    """Let Hydra compose, make the run's folder and call the pipeline; once for each job of a multirun."""
    failures: list[Exception] = []

    def task(composed: DictConfig) -> None:
        # Kept, not raised: Hydra would print a line of its own before it passes an error on.
        try:
            config = resumed or typed(composed)
            _validate(config)
            if config.dry_run:
                return _describe(config)
            folder = Path(HydraConfig.get().runtime.output_dir)
            _check_folder(folder, config)
            if config.verbose:
                for room in ("replace", "distill", "eval", "kernels"):
                    logging.getLogger(room).setLevel(logging.DEBUG)
            from replace.pipeline import run  # only here: torch and transformers take seconds to import

            run(config, folder)
        except (UserError, OSError) as error:
            failures.append(error)
            log.debug("The run failed.", exc_info=error)

    register()
    with _hydra_process(arguments):
        hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(task)()
    if failures:
        raise failures[0]
    return 0


def _validate(config: Config) -> None:
    from eval.measurements import check
    from replace.validation import validate

    validate(config)
    check(config)  # here, because replace knows nothing of eval


def _describe(config: Config) -> None:
    from eval.plan import plan_for
    from replace.dry_run import describe

    print(describe(config, plan_for))


def _check_folder(folder: Path, config: Config) -> None:
    """Refuse to write a new run into the folder of an old one."""
    if config.resume is None and (folder / "config.json").exists():
        raise bad_value(
            "hydra.run.dir", str(folder), f"a new folder, or resume={folder} to continue what is there"
        )


def _resumed(overrides: list[str]) -> tuple[Config | None, list[str]]:
    """The config of the run to continue, if `resume=` is given, and the overrides for Hydra.

    Raises:
        UserError: there is no such run, or the command line asks for something else than that run was.
    """
    named = [override for override in parse(overrides) if override.key_or_group == "resume"]
    folder = named[-1].value() if named else None
    if folder is None:
        return None, overrides
    run = Path(str(folder)).expanduser().resolve()
    config = load_config(run, "resume")
    rest = [override for override in overrides if not override.startswith(("resume=", "hydra.run.dir="))]
    if len(rest) + len(named) < len(overrides):
        raise bad_value("hydra.run.dir", "...", "nothing beside resume=, which names the folder")
    asked = compose(rest)
    for override in parse(rest):
        key = "experiment" if override.key_or_group == "exp" else override.key_or_group
        top = key.partition(".")[0]
        if top in FREE_ON_RESUME:
            setattr(config, top, getattr(asked, top))
        elif top != "hydra":
            for name, mine, theirs in differences(select(asked, key), select(config, key), key):
                raise bad_value(name, mine, f"{theirs!r}, as in the run to resume (or leave it out)")
    config.resume = str(run)
    # The run's own .hydra stays as it was; the log is continued.
    return config, [f"hydra.run.dir={_quoted(run)}", "hydra.output_subdir=null"]


def _quoted(path: Path) -> str:
    """A path as Hydra's grammar takes it, whatever signs it holds."""
    escaped = str(path).replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


@contextmanager
def _hydra_process(arguments: list[str]) -> Iterator[None]:
    """The process as `hydra.main` wants it: arguments in sys.argv, errors raised instead of printed."""
    old_argv, old_flag = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv = [old_argv[0], *arguments]
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        sys.argv = old_argv
        if old_flag is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = old_flag


def _sentence(error: Exception, arguments: list[str]) -> str:
    if isinstance(error, UserError):
        return " ".join(str(error).split())
    if isinstance(error, OSError) and not isinstance(error, HydraException):
        return f"{error.filename or 'The disk'} cannot be read or written: {error.strerror or error}."
    return str(explain(error, [argument for argument in arguments if not argument.startswith("-")]))


def _is_verbose(arguments: list[str]) -> bool:
    """Whether `verbose=true` was given; asked of the text, since the config may be what failed."""
    return any(
        argument.lower() in ("verbose=true", "verbose=1", "verbose=yes", "verbose=on")
        for argument in arguments
    )


if __name__ == "__main__":
    sys.exit(main())
