"""Measurements beyond the quick set, one file each, found by the name that `eval.more` gives.

A measurement is a function under `@MEASUREMENTS.register("<name>")`,

    measure_it(model, tokenizer, config: Config, using: Yardstick) -> dict

whose result, in what JSON can hold, joins the phase's dict in `metrics.json` (`eval.metrics` has the schema).
It is called for the teacher and for the last phase, in evaluation mode, without gradients and in the
precision of the config. `python -m eval` keeps its result (`eval.stored`). One that takes minutes marks its
own parts `@kept`, functions whose first argument is the model, so that an interruption loses one part only.
"""

from collections.abc import Callable

from replace.registry import Registry

MEASUREMENTS: Registry[Callable[..., dict]] = Registry("eval.more", "eval.measurements")
