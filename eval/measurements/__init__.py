"""Measurements beyond the quick set, one file each, found by the name that `eval.more` gives.

A measurement is a function under `@MEASUREMENTS.register("<name>")`,

    measure_it(model, tokenizer, config: Config, using: Yardstick) -> dict

whose result joins the phase's dict in `metrics.json` (`eval.metrics` has the schema). It is called for the
teacher and for the last phase, in evaluation mode, without gradients and in the precision of the config.
"""

from collections.abc import Callable

from replace.registry import Registry

MEASUREMENTS: Registry[Callable[..., dict]] = Registry("eval.more", "eval.measurements")

KEPT: Registry[Callable[..., object]] = Registry("eval.more", "eval.measurements")
"""What a measurement keeps of the teacher, for the students: under the same name, with the same arguments;
what it returns is `using.kept[<name>]`.
"""
