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
from itertools import product
from pathlib import Path
from typing import NoReturn

from replace import launch
from replace.files import expanded
from replace.interrupt import Stopped, code_of, end_quietly, stoppable
from replace.launch import Lost, become_torchrun, hush, is_own, rank, world

if __name__ == "__main__":
    end_quietly()  # the imports below take a second
    hush()

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from replace.allocator import grow_segments
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
from replace.errors import UserError, bad_value, quoted, resume_argument
from replace.logger import report_refusal
from replace.secrets import refuse_keys

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
FOLDERS = {
    "hydra.run.dir": "a folder for the run",
    "hydra.sweep.dir": "a folder for the runs",
    "resume": "the folder of a run",
    "source": "the folder of a run",
}
# What a resumed run may be told anew: none of it changes a figure.
FREE_ON_RESUME = ("verbose", "logger", "threads", "dry_run", "devices")


class JobErrors(UserError):
    """What is wrong with several jobs of a multirun, each named by its overrides."""

    def __init__(self, errors: list[UserError]) -> None:
        super().__init__(" ".join(map(str, errors)))
        self.errors = errors


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: that of the process) and return the exit code."""
    arguments = normalise(sys.argv[1:] if argv is None else argv)
    if not arguments:
        print(START)
        return 2
    grow_segments()
    try:
        launch.check()
        become_torchrun("replace")
        return _run(arguments)
    except (UserError, HydraException, OmegaConfBaseException, OSError) as error:
        if _is_verbose(arguments):
            traceback.print_exc()
        if rank() and not is_own(error):
            return 2
        for one in error.errors if isinstance(error, JobErrors) else [error]:
            sentence = _sentence(one, arguments)
            print(f"error: {sentence}", file=sys.stderr)
            report_refusal(sentence)
        return 2
    except SystemExit as ended:  # --help and the like
        return ended.code if isinstance(ended.code, int) else 0
    except KeyboardInterrupt as interrupt:
        # A run says where it stands; before there is one, nothing can be continued.
        said = interrupt.args[0] if interrupt.args else "interrupted before a run began."
        if not rank():
            print(f"error: {said}", file=sys.stderr)
        return code_of(interrupt)


def _run(arguments: list[str]) -> int:
    refuse_keys(arguments)
    flags = [argument.partition("=")[0] for argument in arguments if argument.startswith("-")]
    for flag in flags:
        if flag not in MULTIRUN and flag not in FLAGS:
            raise bad_value("argument", flag, "key=value, or a flag that --hydra-help lists")
    if not flags:
        _refuse_empty(arguments)
        return _run_one(arguments)
    if world() > 1:
        raise bad_value("argument", flags[0], f"no flags where {world()} processes make a run")
    if any(argument.startswith("resume=") for argument in arguments):
        raise bad_value("argument", flags[0], "no flags beside resume=")
    if all(argument in MULTIRUN for argument in arguments if argument.startswith("-")):
        overrides = [argument for argument in arguments if argument not in MULTIRUN]
        # In front, since Hydra takes no overrides on both sides of a flag.
        return _launch([MULTIRUN[-1], *overrides], None, _checked_jobs(overrides))
    _check_flags(arguments)
    return _launch(arguments, None)


def _check_flags(arguments: list[str]) -> None:
    """Have Hydra read the flags, whose own refusal would be its usage in full."""

    def refuse(message: str) -> NoReturn:
        said = " ".join(message.split())
        raise bad_value("argument", said, "key=value, or a flag as --hydra-help explains it")

    parser = get_args_parser()
    parser.error = refuse  # type: ignore[method-assign]
    parser.parse_args(arguments)


def _checked_jobs(overrides: list[str]) -> list[str]:
    """The names of a multirun's jobs, each of which was validated, in the order in which Hydra runs them.

    Raises:
        JobErrors: some of them are not possible.
    """
    refuse_unknown(overrides)
    _refuse_empty(overrides)
    choices_of = []
    for override in parse(overrides):
        if override.is_sweep_override():
            choices_of.append([f"{override.get_key_element()}={v}" for v in override.sweep_string_iterator()])
        else:
            choices_of.append([str(override.input_line)])
    names, errors = [], []
    for job in product(*choices_of):
        swept = [word for word, among in zip(job, choices_of, strict=True) if len(among) > 1]
        names.append(" ".join(swept or job))
        try:
            _validate(compose(job))
        except UserError as error:
            errors.append(UserError(f"The job {names[-1]}: {error}"))
    if errors:
        raise JobErrors(errors)
    return names


def _refuse_empty(overrides: list[str]) -> None:
    """Refuse a folder without a name, which would be the one that the command was started in."""
    for override in parse(overrides):
        key, value = override.key_or_group, override.value()
        if key in FOLDERS and isinstance(value, str) and not value.strip():
            raise bad_value("from" if key == "source" else key, value, FOLDERS[key])


def _run_one(overrides: list[str]) -> int:
    resumed, overrides = _resumed(overrides)
    config = resumed or compose(overrides)
    _validate(config)
    if config.dry_run:
        if not rank():
            _describe(config)
        return 0
    if world() == 1:
        return _launch(overrides, resumed)
    from replace import ranks  # only here: torch takes seconds to import

    with ranks.joined():
        return _follow(config) if rank() else _launch(overrides, resumed)


def _follow(config: Config) -> int:
    """What a rank does that writes nothing: it is told the folder, and takes its part in the run."""
    from replace.pipeline import run
    from replace.ranks import by_main

    with stoppable():
        run(config, Path(by_main(lambda: None)))
    return 0


def _launch(arguments: list[str], resumed: Config | None, jobs: Sequence[str] = ()) -> int:
    """Let Hydra compose, make the run's folder and call the pipeline; once for each of the jobs, if any."""
    failures: list[UserError] = []

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
            from replace.ranks import by_main

            run(config, Path(by_main(lambda: str(folder))))
        except (UserError, OSError) as error:
            sentence = _sentence(error, arguments)
            folder = Path(HydraConfig.get().runtime.output_dir)
            if isinstance(error, OSError | Lost) and (folder / "config.json").exists():
                sentence = f"{sentence.removesuffix('.')}; {_continued(folder)}."
            # The root logger writes to run.log only; the console gets the sentence at the end.
            logging.getLogger().error(sentence)
            log.debug("The run failed.", exc_info=error)
            whose = f"The job {jobs[HydraConfig.get().job.num]}: " if jobs else ""
            failures.append(UserError(whose + sentence))
            failures[-1].__cause__ = error
        except KeyboardInterrupt as interrupt:
            said = "interrupted before the run began."
            folder = Path(HydraConfig.get().runtime.output_dir)
            if (folder / "config.json").exists():
                said = f"interrupted; {_continued(folder)}."
            logging.getLogger().error(said)
            raise Stopped(said, code_of(interrupt)) from interrupt

    register()
    with stoppable(), _hydra_process(arguments):
        hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(task)()
    if failures:
        raise JobErrors(failures) if len(failures) > 1 else failures[0]
    return 0


def _continued(folder: Path) -> str:
    return f"`python -m replace {resume_argument(folder)}` continues"


def _validate(config: Config) -> None:
    from replace.validation import check_lora

    check_lora(config)
    if config.lora.kind in ("auto", "unsloth") and not config.dry_run:
        from distill.lora.first import import_unsloth_first

        import_unsloth_first(config)
    from eval.measurements import check
    from replace.validation import validate

    validate(config)
    from replace.ranks import check_ranks  # only now: most mistakes are found before torch is imported

    check_ranks(config)
    check(config)  # here, because replace knows nothing of eval


def _describe(config: Config) -> None:
    from eval.plan import plan_for
    from replace.dry_run import describe, refuse_too_large

    print(describe(config, plan_for))
    refuse_too_large(config)


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
    run = expanded(str(folder)).resolve()
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
    return config, [f"hydra.run.dir={quoted(run)}", "hydra.output_subdir=null"]


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
