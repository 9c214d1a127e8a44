"""Measurements beyond the quick set, one file each, found by the name that `eval.more` gives.

A measurement is a function under `@MEASUREMENTS.register("<name>")`,

    measure_it(model, tokenizer, config: Config, using: Yardstick) -> dict

whose result, in what JSON can hold, joins the phase's dict in `metrics.json` (`eval.metrics` has the schema).
It is called for the teacher and for the last phase, in evaluation mode, without gradients and in the
precision of the config. What can be known to be wrong before a model is loaded is refused by a function under
`CHECKS[<name>]`. `python -m eval` keeps the result (`eval.stored`). A measurement that takes minutes marks
its own parts `@kept`, functions whose first argument is the model, so that an interruption loses one part.
"""

from collections.abc import Callable

from replace.config import Config
from replace.registry import Registry

MEASUREMENTS: Registry[Callable[..., dict]] = Registry("eval.more", "eval.measurements")

KEPT: Registry[Callable[..., object]] = Registry("eval.more", "eval.measurements")
"""What a measurement keeps of the teacher, for the students: under the same name, with the same arguments;
what it returns is `using.kept[<name>]`.
"""

CHECKS: dict[str, Callable[[Config], None]] = {}


def check(config: Config) -> None:
    """Refuse unknown measurements, and those that the config asks for wrongly.

    Raises:
        UserError: the first thing found wrong.
    """
    for name in config.eval.more:
        MEASUREMENTS.get(name)
        if name in CHECKS:
            CHECKS[name](config)
