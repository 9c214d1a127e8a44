"""`python -m replace.verify model=... attention=... layers=...`: what must hold, measured on your own model.

The command line is that of `python -m replace` as far as model, attention and layers go, with `+exp=` and,
besides, `quick=true` (what a run checks at conversion, in seconds) and `json=true`. Exit code 0: everything
holds; 1: something fails; 2: the command line is at fault.
"""

import json
import logging
import math
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from replace.files import expanded
from replace.interrupt import CODE, end_quietly
from replace.launch import refuse_several

if __name__ == "__main__":
    end_quietly()  # the imports below take a second

from replace.compose import compose, normalise
from replace.config import Config
from replace.errors import UserError, bad_value
from replace.validation import selected, validate_swap

if TYPE_CHECKING:
    from replace.convert import SwapSpec
    from replace.loading import Loaded, ModelFacts
    from replace.properties import Finding

START = """Measure on your own model what must hold for every replaced layer, before you train it.

For example:   python -m replace.verify model=smollm2 attention=infini layers=all
In seconds:    python -m replace.verify model=smollm2 attention=infini layers=all quick=true"""

OWN = ("json", "quick")
WORDS = {True: "holds", False: "FAILS", None: "does not apply"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: that of the process) and return the exit code."""
    arguments = normalise(sys.argv[1:] if argv is None else argv)
    if not arguments:
        sys.stdout.write(START + "\n")
        return 2
    try:
        refuse_several("replace.verify")
        switches, overrides = _switches(arguments)
        config = compose(overrides)
        return _run(config, validate_swap(config), **switches)
    except (UserError, OSError) as error:
        if any(argument.lower() == "verbose=true" for argument in arguments):
            traceback.print_exc()
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("error: interrupted; nothing was kept, so the same command starts anew.\n")
        return CODE


def _switches(arguments: Sequence[str]) -> tuple[dict[str, bool], list[str]]:
    """What only this command knows, and the rest."""
    switches, rest = dict.fromkeys(OWN, False), []
    for argument in arguments:
        key, _, value = argument.partition("=")
        if argument.startswith("-"):
            raise bad_value("argument", argument, "key=value")
        if key not in OWN:
            rest.append(argument)
        elif value.lower() not in ("true", "false"):
            raise bad_value(key, value, "true or false")
        else:
            switches[key] = value.lower() == "true"
    return switches, rest


def _run(config: Config, facts: "ModelFacts", json: bool, quick: bool) -> int:
    # Only here: torch and transformers take seconds to import.
    from transformers.utils import logging as transformers_logging

    from replace.loading import load_model
    from replace.machine import device_of_choice
    from replace.properties.examine import check_length

    if not quick:
        check_length([config.attention], facts.max_position)
    for noisy in ("transformers", "replace"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()
    began = time.perf_counter()
    if config.threads:
        import torch

        torch.set_num_threads(config.threads)
    loaded = load_model(config.model)
    loaded.model.to(device_of_choice())  # type: ignore[arg-type]  # transformers' decorated `to`
    spec = _spec(config, loaded)
    title = f"{config.attention.name} in {len(spec.layers)} of {facts.layers} layers of {config.model.kind}"
    findings = []
    if not json:
        sys.stdout.write(f"{title}\n\n{'verdict':14} {'figure':>9} {'limit':>8}  property\n")
    for finding in _findings(loaded, spec, quick):
        findings.append(finding)
        if not json:
            sys.stdout.write(_row(finding))
            sys.stdout.flush()
    seconds = time.perf_counter() - began
    sys.stdout.write(_as_json(title, findings, seconds) if json else _summary(findings, seconds))
    return 1 if any(finding.passed is False for finding in findings) else 0


def _findings(loaded: "Loaded", spec: "SwapSpec", quick: bool) -> Iterator["Finding"]:
    from replace.convert import swap
    from replace.properties import examine

    if not quick:
        return examine.examine(loaded.model, spec)
    swap(loaded.model, spec, keep_originals=True)
    return iter(examine.quick(loaded.model))


def _spec(config: Config, loaded: "Loaded") -> "SwapSpec":
    """Which layer gets what."""
    from replace.choice import layers_of, spec_of
    from replace.corpora import load_documents
    from replace.ranking import independent_order, read_ranking, taken
    from replace.retrieval import retrieval_scores

    indices, layers = layers_of(loaded.model), config.layers
    if selected(layers, len(indices)) is not None:
        return spec_of(config, indices)
    if layers.ranking is not None:
        return spec_of(config, indices, taken(read_ranking(expanded(layers.ranking)), layers))
    scores = retrieval_scores(loaded.model, loaded.tokenizer, load_documents(config.data))
    order = independent_order({index: -share for index, share in scores.items()})
    return spec_of(config, indices, sorted(order[: layers.k]))


def _row(finding: "Finding") -> str:
    """Two lines of the table: verdict, figure, limit, property; what a failure would mean, or why not."""
    figure, limit = ("" if x is None else f"{x:.1e}" if x else "0" for x in (finding.figure, finding.limit))
    line = f"{WORDS[finding.passed]:14} {figure:>9} {limit:>8}  {finding.property}\n"
    words = {True: "else: ", False: "that means: ", None: "because "}[finding.passed]
    return f"{line}{'':35}{words}{finding.meaning}\n"


def _summary(findings: list["Finding"], seconds: float) -> str:
    failed = [finding.property for finding in findings if finding.passed is False]
    held = sum(1 for finding in findings if finding.passed)
    verdict = f"FAILED: {'; '.join(failed)}" if failed else f"All {held} properties that apply hold."
    return f"\n{verdict} ({seconds:.0f} s)\n"


def _as_json(title: str, findings: list["Finding"], seconds: float) -> str:
    """JSON has no infinity: such a figure is null, and its property has failed."""
    rows = [asdict(finding) for finding in findings]
    for row in rows:
        if row["figure"] is not None and not math.isfinite(row["figure"]):
            row["figure"] = None
    passed = all(finding.passed is not False for finding in findings)
    about = {"title": title, "passed": passed, "seconds": round(seconds, 1), "properties": rows}
    return json.dumps(about, indent=1) + "\n"


if __name__ == "__main__":
    sys.exit(main())
