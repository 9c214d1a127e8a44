"""Multiple choice and whatever else lm-eval has tasks for: `eval.tasks`, of each `eval.limit` items."""

from eval.harness import check_tasks, run_tasks
from eval.measurements import CHECKS, MEASUREMENTS
from replace.config import Config

NAME = "lm_eval"


@MEASUREMENTS.register(NAME)
def lm_eval(model, tokenizer, config: Config, using) -> dict:
    """{"lm_eval": {"<task>": see `eval.harness.run_tasks`}}."""
    return {NAME: run_tasks(model, tokenizer, config.eval.tasks, config.eval.limit)}


def _check(config: Config) -> None:
    """A dry run fetches nothing, so it looks at no item of the offline tasks."""
    check_tasks(config.eval.tasks, config.eval.limit, load=not config.dry_run)


CHECKS[NAME] = _check
