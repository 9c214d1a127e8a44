"""Runs and models side by side: one table of their figures, with differences to the first and intervals.

Figures are read from metrics.json, not measured again. Where two were measured on the same items (text,
vocabulary, how far needles keep clear) differences are paired by window or episode. Intervals are 95 %: a
bootstrap over windows for perplexity; for rates Clopper-Pearson for each and for differences Tango's score
interval where paired, else one from both exact intervals (Newcombe 1998). Runs that differ in the seed only
are one column: the mean and the standard deviation over the runs, and differences by a bootstrap over the
items of their mean.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from eval.intervals import bootstrap, clopper_pearson, paired_difference, unpaired_difference
from eval.metrics import FILE, PHASES, clean, read_metrics
from eval.niah import key
from eval.plan import clear_tokens
from eval.plots import PHASE_WORDS
from eval.words import DASH, PART_WORDS, squeeze
from replace.compose import load_config
from replace.config import Config
from replace.errors import bad_value
from replace.files import atomic_write, expanded

SCHEMA = 1
NOT_COMPARED = ("training", "seconds", "layer_outputs", "dev", "test_reads")
TASKS = ("passkey", "niah")
SEEDLESS = ("seed", "source", "resume", "dry_run", "verbose", "threads", "logger")
"""Fields of a config in which runs of one experiment may differ."""
LOWER, HIGHER = "lower", "higher"


@dataclass
class Item:
    """One thing to compare.

    Attributes:
        name: as the command line named it, or its folder below the one that was named.
        metrics: what its metrics.json holds; None for a model that is still to be measured.
        config: the run's, if it is one.
    """

    name: str
    folder: Path | None
    metrics: dict | None
    config: Config | None


@dataclass
class Figure:
    """One figure of one run.

    Attributes:
        kind: perplexity (units are windows), rate (units are episodes) or number.
        units: name of a window or episode -> (loss, tokens) or hit.
        fixed: whether the units are the same in every run, whatever its text.
        better: lower, higher, or None where it is neither.
    """

    kind: str
    value: float | None
    interval: list[float] | None = None
    units: dict[Any, Any] = field(default_factory=dict)
    better: str | None = None
    why: str | None = None
    fixed: bool = False


@dataclass
class Column:
    """The runs of one column, one or several that differ in the seed only."""

    name: str
    items: list[Item]
    figures: list[dict[str, Figure]]
    phases: list[str]


# The runs


def find_items(names: Sequence[str]) -> list[Item]:
    """The runs, folders of runs and models that the names stand for.

    Raises:
        UserError: nothing is named, or a folder of runs has none.
    """
    found: list[Item] = []
    for name in names:
        folder = expanded(name)
        if (folder / FILE).is_file():
            found.append(_run(name, folder))
        elif (folder / "config.json").is_file() and _is_run(folder):
            raise bad_value(
                "compare", name, "runs that have a metrics.json; `python -m eval run=...` makes one"
            )
        elif folder.is_dir() and not (folder / "config.json").is_file():
            below = sorted(path.parent for path in folder.rglob(FILE))
            below = [path for path in below if not any(parent in below for parent in path.parents)]
            if not below:
                raise bad_value("compare", name, f"runs, models, or a folder below which runs have a {FILE}")
            found += [_run(str(path), path) for path in below]
        else:
            found.append(Item(name, folder if folder.exists() else None, None, None))
    if not found:
        raise bad_value("compare", "[]", "one or more runs or models, such as compare=[<run>,<run>,<model>]")
    return found


def _run(name: str, folder: Path) -> Item:
    home = folder if (folder / "config.json").is_file() else folder.parent
    config = load_config(home, "compare") if _is_run(home) else None
    metrics = read_metrics(folder)
    if (folder / "eval" / FILE).is_file():
        later = read_metrics(folder / "eval")
        if later.get("items") == metrics.get("items"):
            for phase, figures in later["phases"].items():
                metrics["phases"][phase] = figures | metrics["phases"].get(phase, {})
    return Item(name, folder, metrics, config)


def _is_run(folder: Path) -> bool:
    """Whether config.json is that of a run, not of a model."""
    try:
        return "budget" in json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False


# The comparison


def compare(items: Sequence[Item], *, seed: int = 0) -> dict:
    """The table.

    Returns:
        {"schema", "columns": [{"name", "runs", "seeds", "phases", "missing"}], "rows": [{"figure", "kind",
        "better", "cells": [{"value", "interval", "std", "runs", "units", "difference": {"value", "interval",
        "relative", "paired", "p", "clear"} or null, "why"}]}], "verdicts": [{"part", "cells"}]}. A
        perplexity's difference is a share of the first column's, any other a plain difference; "clear" says
        whether its interval excludes 0.
    """
    columns = _columns(items)
    names = list(dict.fromkeys(name for column in columns for one in column.figures for name in one))
    rows = []
    for name in names:
        groups = [[one[name] for one in column.figures if name in one] for column in columns]
        sample = next(figure for group in groups for figure in group)
        cells = []
        for place, group in enumerate(groups):
            cell = _cell(group, seed)
            first = groups[0]
            if place and cell["value"] is not None and _value(first) is not None:
                paired = sample.fixed or _same_items([columns[0], columns[place]], sample.kind)
                cell["difference"] = _difference(first, group, paired, seed)
            cells.append(cell)
        rows.append({"figure": name, "kind": sample.kind, "better": sample.better, "cells": cells})
    about = [
        {
            "name": column.name,
            "runs": [str(item.folder or item.name) for item in column.items],
            "seeds": [item.metrics["seed"] for item in column.items if item.metrics],
            "phases": list(dict.fromkeys(column.phases)),
            "missing": [name for name in names if all(name not in one for one in column.figures)],
        }
        for column in columns
    ]
    return clean({"schema": SCHEMA, "columns": about, "rows": rows, "verdicts": _verdicts(columns)})


def _columns(items: Sequence[Item]) -> list[Column]:
    """Items as columns, those that differ in the seed only together."""
    groups: dict[str, list[Item]] = {}
    for place, item in enumerate(items):
        name = str(place)
        if item.config is not None:
            plain = {k: v for k, v in asdict(item.config).items() if k not in SEEDLESS}
            name = json.dumps([plain, _phase(item.metrics or {})], sort_keys=True, default=str)
        groups.setdefault(name, []).append(item)
    columns = []
    for group in groups.values():
        seeds = [item.metrics["seed"] for item in group if item.metrics]
        if len(set(seeds)) < len(seeds):  # the same seed twice is no other draw
            columns += [_column([item]) for item in group]
        else:
            columns.append(_column(group))
    names = [column.name for column in columns]
    for place, column in enumerate(columns):
        if names.count(column.name) > 1:
            column.name = f"{column.name} ({place + 1}: {_place(column.items[0])})"
    return columns


def _column(items: list[Item]) -> Column:
    phases = [_phase(item.metrics or {}) for item in items]
    figures = [
        dict(figures_of((item.metrics or {})["phases"].get(phase, {})))
        for item, phase in zip(items, phases, strict=True)
    ]
    metrics = items[0].metrics or {}
    name = str(metrics.get("experiment") or metrics.get("attention") or metrics.get("model"))
    if phases[0] in ("teacher", "model"):
        name = f"{metrics.get('model')}, {PHASE_WORDS[phases[0]]}" if phases[0] == "teacher" else name
    if len(items) > 1:
        name += f" ({len(items)} seeds: {', '.join(str((item.metrics or {})['seed']) for item in items)})"
    return Column(name, items, figures, phases)


def _place(item: Item) -> str:
    """The folder's own name, with its parent's where that is short of saying which."""
    folder = (item.folder or Path(item.name)).resolve()
    return f"{folder.parent.name}/{folder.name}"


def _phase(metrics: Mapping) -> str:
    """The phase that is compared: the last one that is not the teacher's."""
    measured = [name for name in PHASES if name in metrics.get("phases", {})]
    return next(
        (name for name in reversed(measured) if "teacher" not in name), measured[-1] if measured else ""
    )


# Figures


def figures_of(phase: dict) -> Iterator[tuple[str, Figure]]:
    """Every figure of a phase that can be compared, by its name in the table."""
    for corpus, entry in (phase.get("perplexity") or {}).items():
        yield f"perplexity, {corpus}", _perplexity(entry)
        yield f"bits a byte, {corpus}", Figure("number", entry.get("bits_per_byte"), better=LOWER)
    yield from _recall("recall", phase)
    for name, twin in (phase.get("ablation") or {}).items():
        words = name.replace("_", " ")
        for corpus, entry in (twin.get("perplexity") or {}).items():
            yield f"perplexity, {corpus}, {words}", _perplexity(entry)
        yield from _recall(f"recall, {words}", twin)
    judged = [probe for probe in phase.get("probes") or [] if probe["hit"] is not None]
    if judged:
        prompts = _rate({probe["prompt"]: int(probe["hit"]) for probe in judged})
        yield "language probes", replace(prompts, fixed=True)
    if phase.get("generation"):
        yield "recall, really generated", Figure("number", phase["generation"]["exact"], better=HIGHER)
    speed = phase.get("speed") or {}
    for row in speed.get("state", []):
        yield f"bytes kept at {row['length']:,} tokens", Figure("number", row.get("bytes"), better=LOWER)
    for row in speed.get("decode", []):
        value, why = row.get("tokens_per_second"), row.get("why")
        yield f"decoded tokens a second at {row['length']:,}", Figure("number", value, better=HIGHER, why=why)
    known = ("perplexity", "ablation", "probes", "generation", "speed", *TASKS, *NOT_COMPARED)
    for name, entry in phase.items():
        if name not in known:
            yield from _any(name.replace("_", " "), entry)


def _recall(words: str, phase: dict) -> Iterator[tuple[str, Figure]]:
    """Exact match by task and length, and by length with competing facts."""
    groups: dict[str, dict] = {}
    for task in TASKS:
        for cell in (phase.get(task) or {}).get("cells", []):
            among = f", {cell['distractors']} competing facts" if cell["distractors"] else ""
            name = (
                f"{words}, {'pass key' if task == 'passkey' else 'needle'}, {cell['length']:,} tokens{among}"
            )
            hits = {f"{key(cell)}/{index}": hit for index, hit in enumerate(cell["hits"])}
            groups.setdefault(name, {}).update(hits)
    for name, hits in groups.items():
        yield name, _rate(hits)


def _any(words: str, entry: Any, depth: int = 0) -> Iterator[tuple[str, Figure]]:
    """Figures in the results of any measurement, told by their shape: hits, windows, values with intervals.

    Plain numbers count where they stand at most two levels deep.
    """
    if isinstance(entry, list):
        for item in entry:
            if isinstance(item, dict):
                marks = [f"{k} {v}" for k, v in item.items() if isinstance(v, str | int) and k not in _VALUES]
                yield from _any(", ".join([words, *marks[:4]]), item, depth + 1)
        return
    if not isinstance(entry, dict):
        if depth <= 2 and isinstance(entry, int | float) and not isinstance(entry, bool):
            yield words, Figure("number", float(entry))
        return
    hits, windows = entry.get("hits"), entry.get("windows")
    if isinstance(hits, list) and hits and set(hits) <= {0, 1}:
        yield words, _rate(dict(enumerate(hits)))
        return
    if isinstance(windows, list) and windows and isinstance(windows[0], dict) and "nll" in windows[0]:
        yield words, _perplexity(entry)
        return
    name = next(
        (name for name in _VALUES if isinstance(entry.get(name), int | float | None) and name in entry), None
    )
    if name is not None:
        interval, error, value = entry.get("interval"), entry.get("stderr"), entry[name]
        if interval is None and isinstance(error, int | float) and value is not None:
            interval = [value - 1.96 * error, value + 1.96 * error]
        better = LOWER if name == "ppl" else HIGHER if name in ("accuracy", "acc", "exact") else None
        yield words, Figure("number", value, interval, better=better, why=entry.get("why"))
        return
    for part, item in entry.items():
        yield from _any(f"{words}, {str(part).replace('_', ' ')}", item, depth + 1)


_VALUES = ("value", "accuracy", "acc", "exact", "mean", "ppl", "hit")


def _perplexity(entry: dict) -> Figure:
    units = {}
    for index, window in enumerate(entry.get("windows") or []):
        units[index] = (window["nll"], window["tokens"])
    if any(nll is None for nll, _ in units.values()):
        units = {}
    return Figure("perplexity", entry.get("ppl"), entry.get("interval"), units, LOWER, entry.get("why"))


def _rate(hits: dict) -> Figure:
    count = sum(hits.values())
    return Figure("rate", count / len(hits), clopper_pearson(count, len(hits)), hits, HIGHER)


# Cells


def _value(group: Sequence[Figure]) -> float | None:
    """The mean over runs: of the logarithm for perplexities."""
    values = [figure.value for figure in group if figure.value is not None]
    if not values:
        return None
    if group[0].kind == "perplexity":
        return math.exp(fmean(math.log(value) for value in values))
    return fmean(values)


def _cell(group: Sequence[Figure], seed: int) -> dict:
    measured = [figure for figure in group if figure.value is not None]
    cell: dict[str, Any] = {"value": _value(group), "interval": None, "std": None, "difference": None}
    cell |= {"runs": len(measured), "units": len(measured[0].units) if measured else 0}
    if not measured:
        cell["why"] = next((figure.why for figure in group if figure.why), "not in its metrics.json")
    elif len(measured) == 1:
        cell["interval"] = measured[0].interval
    else:
        cell["std"] = stdev(figure.value for figure in measured if figure.value is not None)
        names, rows = _shared(measured)
        if names:
            cell["interval"] = bootstrap(
                len(names), lambda draw: _mean(measured[0].kind, rows, draw), seed=seed
            )
    return cell


def _shared(group: Sequence[Figure]) -> tuple[list, np.ndarray]:
    """The units that all have, and per unit the mean over runs: [N] hits, or [N, 2] of loss and tokens."""
    names = [name for name in group[0].units if all(name in figure.units for figure in group)]
    if group[0].kind == "perplexity":
        # Windows of unequal length are not the same text.
        tokens = [{figure.units[name][1] for figure in group} for name in names]
        names = [name for name, found in zip(names, tokens, strict=True) if len(found) == 1]
    rows = [[figure.units[name] for figure in group] for name in names]
    return names, np.array(rows, dtype=float).mean(axis=1) if names else np.zeros(0)


def _mean(kind: str, rows: np.ndarray, draw: np.ndarray) -> float:
    if kind == "perplexity":
        return math.exp(rows[draw, 0].sum() / rows[draw, 1].sum())
    return float(rows[draw].mean())


def _difference(first: Sequence[Figure], other: Sequence[Figure], paired: bool, seed: int) -> dict:
    """The difference of two cells, with an interval where their units allow one."""
    kind, a, b = first[0].kind, _value(first), _value(other)
    assert a is not None
    assert b is not None
    relative = kind == "perplexity"
    result: dict[str, Any] = {
        "value": b / a - 1 if relative else b - a,
        "interval": None,
        "relative": relative,
        "paired": False,
        "p": None,
    }
    single = len(first) == len(other) == 1
    both = [*first, *other]
    names, _ = _shared(both) if paired else ([], None)
    if names and kind == "rate" and single:
        hits = [[figure.units[name] for name in names] for figure in (other[0], first[0])]
        found = paired_difference(hits[0], hits[1])
        result |= {
            "value": found["difference"],
            "interval": found["interval"],
            "paired": True,
            "p": found["p"],
        }
    elif names and kind in ("rate", "perplexity"):
        a_rows, b_rows, every = _rows(first, names), _rows(other, names), np.arange(len(names))
        result |= {"value": _gap(kind, a_rows, b_rows, every, every), "paired": True}
        result["interval"] = bootstrap(
            len(names), lambda draw: _gap(kind, a_rows, b_rows, draw, draw), seed=seed
        )
    elif kind == "rate" and single:
        counts = [(sum(figure.units.values()), len(figure.units)) for figure in (other[0], first[0])]
        result["interval"] = unpaired_difference(*counts[0], *counts[1])
    elif kind in ("rate", "perplexity"):
        result["interval"] = _apart(kind, first, other, seed)
    interval = result["interval"]
    result["clear"] = interval is not None and not interval[0] <= 0 <= interval[1]
    return result


def _rows(group: Sequence[Figure], names: Sequence) -> np.ndarray:
    return np.array([[figure.units[name] for figure in group] for name in names], dtype=float).mean(axis=1)


def _gap(kind: str, a: np.ndarray, b: np.ndarray, draw_a: np.ndarray, draw_b: np.ndarray) -> float:
    """b against a on drawn units: a share for perplexities, else a difference."""
    one, other = _mean(kind, a, draw_a), _mean(kind, b, draw_b)
    return other / one - 1 if kind == "perplexity" else other - one


def _apart(kind: str, first: Sequence[Figure], other: Sequence[Figure], seed: int) -> list[float] | None:
    """The interval of a difference whose two sides are drawn apart from each other."""
    (a_names, a), (b_names, b) = _shared(first), _shared(other)
    if len(a_names) < 2 or len(b_names) < 2:
        return None
    # Not the stream that `bootstrap` draws from, or both sides would be drawn alike, which is pairing.
    generator = np.random.default_rng([seed, 1])

    def gap(draw: np.ndarray) -> float:
        return _gap(kind, a, b, draw, generator.integers(0, len(b_names), len(b_names)))

    return bootstrap(len(a_names), gap, seed=seed)


def _same_items(columns: Sequence[Column], kind: str) -> bool:
    """Whether all runs of the columns were measured on the same windows, or episodes."""
    items = [item for column in columns for item in column.items]
    about = [_about(item) for item in items]
    wanted = ("data", "vocabulary") if kind == "perplexity" else ("data", "vocabulary", "clear")
    return all(
        one is not None and [one[n] for n in wanted] == [(about[0] or {})[n] for n in wanted] for one in about
    )


def _about(item: Item) -> dict | None:
    """What says of which items a run's figures are; of an older run what its config says."""
    recorded = (item.metrics or {}).get("items")
    if recorded is not None or item.config is None:
        return recorded
    config = item.config
    data, model = json.dumps(asdict(config.data)), json.dumps(asdict(config.model))
    return {"data": data, "vocabulary": model, "clear": clear_tokens(config.attention)}


def _verdicts(columns: Sequence[Column]) -> list[dict]:
    """The computed verdicts, one row for each part of the state."""
    rows = []
    for part, words in PART_WORDS.items():
        cells = []
        for column in columns:
            found = [((item.metrics or {}).get("verdict") or {}).get(part) for item in column.items]
            cells.append(", ".join(dict.fromkeys(str(word) for word in found if word)) or None)
        if any(cells):
            rows.append({"part": words, "cells": cells})
    return rows


# Words


def write_comparison(folder: Path, table: dict, command: str) -> Path:
    """Write compare.json and compare.md; returns the latter."""
    atomic_write(
        folder / "compare.json", json.dumps(table, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    )
    path = folder / "compare.md"
    atomic_write(path, render(table, command))
    return path


def render(table: dict, command: str) -> str:
    """The comparison as Markdown."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    rows = [
        {"figure": row["figure"], "cells": [_words(row, cell) for cell in row["cells"]]}
        for row in table["rows"]
    ]
    text = environment.get_template("compare.md.j2").render(
        columns=[c | {"phases": [PHASE_WORDS[name] for name in c["phases"]]} for c in table["columns"]],
        rows=rows,
        verdicts=[row | {"cells": [cell or DASH for cell in row["cells"]]} for row in table["verdicts"]],
        command=command,
        seeds=any(len(column["runs"]) > 1 for column in table["columns"]),
        unpaired=any(
            (cell["difference"] or {}).get("paired") is False and (cell["difference"] or {}).get("interval")
            for row in table["rows"]
            for cell in row["cells"]
        ),
    )
    return squeeze(text)


def _words(row: dict, cell: dict) -> str:
    if cell["value"] is None:
        return f"not measured: {cell['why']}"
    form = {"perplexity": ".2f", "rate": ".2f"}.get(row["kind"], ",.4g")
    value, interval, std = cell["value"], cell["interval"], cell["std"]
    large = row["kind"] == "number" and value >= 1000
    said = f"{value:,.0f}" if large else f"{value:{form}}"
    if std is not None:
        said += f" ± {std:,.0f}" if large else f" ± {std:{form}}"
    if interval is not None:
        said += f" [{interval[0]:{form}}, {interval[1]:{form}}]"
    difference = cell["difference"]
    if difference is None:
        return said
    change = (
        "+.1%"
        if difference["relative"]
        else "+,.0f"
        if large
        else "+.2f"
        if row["kind"] == "rate"
        else "+,.4g"
    )
    gap = f"{difference['value']:{change}}"
    if difference["interval"] is not None:
        low, high = difference["interval"]
        gap += f" [{low:{change}}, {high:{change}}]" + ("" if difference["paired"] else "†")
    return f"{said}; {f'**{gap}**' if difference['clear'] else gap}"
