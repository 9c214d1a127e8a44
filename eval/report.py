"""report.md: what a person reads first. Every word about a result follows from a number in metrics.json.

The text is arranged in report.md.j2; here the numbers become words, and what is missing is named with the
reason ("not measured: ...").
"""

import json
import logging
import shlex
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from omegaconf import OmegaConf

from eval.checklist import checklist, patterns
from eval.explaining import explaining, what_it_is
from eval.html import page
from eval.metrics import PHASES, last_student, most_final, perplexities, read_metrics
from eval.niah import means
from eval.plots import PHASE_WORDS, STATES, TASK_WORDS, draw_all
from eval.sections import pictures, written
from eval.summary import summary
from eval.verdict import PARTS, PERPLEXITY_GAIN, RECALL_GAIN
from eval.words import (
    DASH,
    PART_WORDS,
    bounds,
    exact,
    group,
    inline,
    percent,
    recall_at,
    recall_lengths,
    short,
    squeeze,
    with_interval,
)
from replace.files import atomic_write

logger = logging.getLogger(__name__)

PLOTS = {
    "loss.png": "Loss by stage",
    "transfer.png": "Transfer error by layer, before and after",
    "perplexity.png": "Perplexity by phase and by position",
    "recall.png": "Recall by length and depth, with parts of the state on and off",
    "cost.png": "Bytes kept and decoding speed by length of context",
}


TRAINED_PLOTS = ("loss.png",)
"""Those that show the training itself, which only the run's own command repeats."""
FAILURES = {
    "collapse": "the model's language collapses",
    "high_loss": "the loss is far too high",
    "nonfinite": "NaN or infinity",
    "no_progress": "the loss does not fall",
}
"""The failure patterns by the names under which `distill.watch` records them."""
FIGURES = {
    "perplexity": ("perplexity, with its ablations", "eval=perplexity"),
    "passkey": ("recall, with its ablations", "eval=recall"),
    "probes": ("language probes and layer outputs", "eval=probes"),
}


def write_report(folder: Path, source: Path | None = None) -> Path:
    """Write report.md and plots/ into a folder that has a metrics.json.

    Args:
        source: the run's folder, with train.jsonl and provenance.json, if it is another one.

    Raises:
        UserError: the folder has no readable metrics.json.
    """
    folder, source = Path(folder), Path(source or folder)
    metrics = read_metrics(folder)
    log = read_log(source / "train.jsonl")
    drawn = draw_all(metrics, log, folder / "plots", pictures(metrics["phases"]))
    path = folder / "report.md"
    provenance, command = _json(source / "provenance.json"), _command(source)
    config = _json(source / "config.json")
    again = _again(metrics, source, config)
    text = render(metrics, drawn, log=log, provenance=provenance, command=command, config=config, again=again)
    atomic_write(path, text)
    by_training = dict.fromkeys(TRAINED_PLOTS, command or again)
    atomic_write(folder / "report.html", page(text, folder, {"": again, **by_training}))
    logger.info("report: %s and report.html", path)
    return path


def read_log(path: Path) -> list[dict]:
    """The lines of train.jsonl; none if there is no such file. A last line that was cut off is left out."""
    lines = []
    for number, line in enumerate(
        path.read_text(encoding="utf-8").splitlines() if path.is_file() else [], start=1
    ):
        try:
            lines.append(json.loads(line))
        except ValueError:
            logger.warning("line %d of %s is not whole and is left out", number, path.name)
    return lines


def render(
    metrics: dict,
    drawn: dict[str, str | None],
    *,
    log: Sequence[dict] = (),
    provenance: dict | None = None,
    command: str | None = None,
    config: dict | None = None,
    again: str = "python -m eval run=<folder>",
) -> str:
    """The report as Markdown.

    Args:
        drawn: what `eval.plots.draw_all` returned.
        log: the lines of train.jsonl.
        command: how the run was started.
        config: config.json of the run.
        again: the command that measures the last phase again.
    """
    phases = metrics["phases"]
    student = last_student(metrics)
    main = phases[student or "teacher"] if phases else {}
    main = main | most_final(main)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    text = environment.get_template("report.md.j2").render(
        title=_title(metrics),
        summary=summary(metrics, student),
        called=what_it_is(metrics),
        notes=metrics.get("notes", []),
        verdicts=_verdicts(metrics),
        explained=explaining(main),
        recall_gain=f"{100 * RECALL_GAIN:.0f}",
        perplexity_gain=f"{100 * PERPLEXITY_GAIN:g}",
        phase_table=_phase_table(phases),
        recoveries=[
            {"name": name, "value": with_interval(entry, "value")}
            for name, entry in metrics.get("recovery", {}).items()
        ],
        recall_tables=_recall(phases, main),
        generation=_generation(main),
        ablated=_ablated(main),
        unmeasured={
            name.replace("_", " "): twin["why"]
            for name, twin in main.get("ablation", {}).items()
            if "why" in twin
        },
        probes=_probes(phases, student),
        sections=written(phases, drawn),
        choices=_choices(phases, main),
        cost=_cost(phases, student),
        training=_training(metrics, log),
        dev_losses=_dev_losses(metrics["phases"]),
        replaced=_replaced(metrics),
        outputs=_outputs(main, student),
        checklist=_checklist(metrics.get("checklist") or checklist(metrics, log, config)),
        patterns=_patterns(patterns(metrics)),
        commands=_commands(command, again, main),
        protocol=_protocol(metrics),
        reads=metrics.get("test_reads", len(phases)),
        plots={name: _plot(name, drawn.get(name, "it was not drawn")) for name in PLOTS},
        provenance=json.dumps(provenance, indent=1, ensure_ascii=False) if provenance else None,
    )
    return squeeze(text)


# Tables


def _verdicts(metrics: dict) -> list[dict]:
    result = metrics.get("verdict")
    if not result:
        return []
    rows = []
    for part in PARTS:
        detail = result["details"].get(part, {})
        word = result.get(part) or f"not judged: {detail.get('why', 'not measured')}"
        if result.get(part) and result["carried_by_full_attention"]:
            word += ", carried-by-full-attention"
        if detail.get("conflict"):
            word += f" ({detail['conflict']})"
        recall, perplexity = detail.get("recall"), detail.get("perplexity")
        gained, saved = DASH, DASH
        if recall:
            around = bounds(recall["interval"], "+.2f")
            gained = f"{recall['difference']:+.2f} {around}, {recall['episodes']} episodes"
        if perplexity:
            around = bounds(perplexity["interval"], "+.1%")
            saved = f"{perplexity['difference']:+.1%} {around}, {perplexity['windows']} windows"
        rows.append({"part": PART_WORDS[part], "verdict": word, "recall": gained, "perplexity": saved})
    return rows


def _phase_table(phases: dict) -> dict:
    """The figures of each phase, those on dev before those on test."""
    present = [name for name in PHASES if name in phases]
    splits = ["dev", "test"] if any("dev" in phases[name] for name in present) else ["test"]
    columns: list[str] = []
    rows: dict[str, list[str]] = {name: [] for name in present}
    for split in splits:
        views = {name: phases[name].get("dev", {}) if split == "dev" else phases[name] for name in present}
        more, cells = _phase_cells(views)
        columns += [f"{column} ({split})" for column in more] if len(splits) > 1 else more
        for name in present:
            rows[name] += cells[name]
    columns.append("probes")
    for name in present:
        judged = [probe["hit"] for probe in phases[name].get("probes", []) if probe["hit"] is not None]
        rows[name].append(f"{sum(judged)} of {len(judged)}" if judged else DASH)
    return {
        "columns": columns,
        "rows": [{"name": PHASE_WORDS[name], "cells": rows[name]} for name in present],
    }


def _phase_cells(views: dict[str, dict]) -> tuple[list[str], dict[str, list[str]]]:
    """Columns, and the cells of each phase, of figures on one split."""
    corpora = list(dict.fromkeys(corpus for view in views.values() for corpus in view.get("perplexity", {})))
    lengths = sorted({length for view in views.values() for length in recall_lengths(view)})
    columns = [f"perplexity, {corpus}" for corpus in corpora]
    columns += [f"bits a byte, {corpus}" for corpus in corpora]
    for length in lengths:
        columns += [f"recall at {length:,}", f"both off, {length:,}"]
    rows = {}
    for name, view in views.items():
        entries = [view.get("perplexity", {}).get(corpus) for corpus in corpora]
        cells = [with_interval(entry, "ppl", ".2f") if entry else DASH for entry in entries]
        cells += [
            f"{entry['bits_per_byte']:.3f}" if entry and entry.get("bits_per_byte") else DASH
            for entry in entries
        ]
        for length in lengths:
            off = view.get("ablation", {}).get("memory_and_pairs_off", {})
            cells += [
                exact(pooled) if pooled else DASH
                for pooled in (recall_at(view, length), recall_at(off, length))
            ]
        rows[name] = cells
    return columns, rows


def _recall(phases: dict, main: dict) -> list[dict]:
    """A table for each task by length, haystack and distractors, the ablations and the teacher beside it."""
    tables = []
    for task, words in TASK_WORDS.items():
        cells = (main.get(task) or {}).get("cells", [])
        if not cells:
            continue
        twins = [state for state in STATES if state and (main.get("ablation", {}).get(state) or {}).get(task)]
        depths = sorted({cell["depth"] for cell in cells})
        columns = [f"depth {depth:g}" for depth in depths] + ["mean", "answer tokens"]
        columns += [STATES[state][0] for state in twins] + ["teacher"]
        rows = []
        for pooled in means(cells):
            alike = [cell for cell in cells if group(cell) == group(pooled)]
            by_depth = {cell["depth"]: f"{cell['exact']:.2f}" for cell in alike}
            others = [main["ablation"][state][task]["cells"] for state in twins]
            others.append((phases.get("teacher", {}).get(task) or {}).get("cells", []))
            beside = [[twin for twin in means(other) if group(twin) == group(pooled)] for other in others]
            many = f", {pooled['distractors']} distractors" if pooled["distractors"] else ""
            rows.append(
                {
                    "length": f"{pooled['length']:,}",
                    "haystack": pooled["haystack"] + many,
                    "cells": [by_depth.get(depth, DASH) for depth in depths]
                    + [f"{exact(pooled)}, {pooled['episodes']} episodes", f"{pooled['digit_accuracy']:.2f}"]
                    + [exact(found[0]) if found else DASH for found in beside],
                }
            )
        kinds = ", ".join(sorted({cell["kind"] for cell in cells}))
        tables.append({"title": f"{words[0].upper()}{words[1:]} ({kinds})", "columns": columns, "rows": rows})
    return tables


def _generation(main: dict) -> str:
    entry = main.get("generation")
    if not entry:
        return "Really generated answers: not measured: not part of this phase's plan."
    return (
        f"Really generated answers (greedy, through the cache): {entry['exact']:.2f} exact in "
        f"{entry['episodes']} episodes; "
        f"they agree with the scored figures in {100 * entry['agrees']:.0f} %."
    )


def _ablated(main: dict) -> dict:
    twins = {
        state: (main.get("ablation", {}).get(state) or {}).get("perplexity") for state in STATES if state
    }
    twins = {state: figures for state, figures in twins.items() if figures}
    if not twins:
        return {"text": "not measured: no part was switched off for perplexity", "rows": []}
    rows = []
    for corpus, entry in main.get("perplexity", {}).items():
        cells = [with_interval(entry, "ppl", ".2f")]
        for figures in twins.values():
            off = (figures or {})[corpus]
            change = (
                f", {percent(off['ppl'] / entry['ppl'] - 1)}" if off.get("ppl") and entry.get("ppl") else ""
            )
            cells.append(with_interval(off, "ppl", ".2f") + change)
        rows.append({"name": corpus, "cells": cells})
    return {
        "text": "The same windows of the same texts:",
        "columns": ["all on", *(STATES[s][0] for s in twins)],
        "rows": rows,
    }


def _probes(phases: dict, student: str | None) -> list[dict]:
    rows = []
    for name in dict.fromkeys(("teacher", "swapped", student or "teacher")):
        for entry in phases.get(name, {}).get("probes", []):
            hit = {True: "hit", False: "missed", None: ""}[entry["hit"]]
            rows.append(
                {
                    "phase": PHASE_WORDS[name],
                    "prompt": inline(entry["prompt"]),
                    "continuation": inline(entry["continuation"]),
                    "expected": f"{entry['expected']}: {hit}" if entry["expected"] else "anything",
                }
            )
    return rows


def _choices(phases: dict, main: dict) -> dict:
    """Tasks of lm-eval, metric by metric: the teacher, the last phase, and what lies between them."""
    rows, notes = [], []
    before = phases.get("teacher", {})
    tasks, others = main.get("lm_eval", {}), {} if main is before else before.get("lm_eval", {})
    for task, entry in tasks.items():
        teacher = others.get(task, {})
        for metric in entry["stderr"]:
            delta = entry.get("delta", {}).get(metric, {})
            gap = DASH if delta.get("difference") is None else f"{delta['difference']:+.3f}"
            if delta.get("stderr") is not None:
                gap += f" ± {delta['stderr']:.3f} {bounds(delta['interval'], '+.3f')}"
            of = DASH if entry["n"] is None else f"{entry['n']:,} of {entry['of']:,}"
            chance = f"{entry['chance']:.2f}" if entry["chance"] and metric.startswith("acc") else DASH
            figures = [_with_error(of_phase, metric) for of_phase in (teacher, entry)]
            p = f"{delta['p']:.2g}" if "p" in delta else DASH
            rows.append({"name": f"{task}, {metric}", "cells": [of, chance, *figures, gap, p]})
        note = ((entry.get("source") or {}).get("source") or {}).get("note")
        notes += [f"{task}: {note}"] if note else []
    return {"rows": rows, "notes": notes}


def _with_error(entry: dict, metric: str) -> str:
    """A figure of lm-eval and its standard error."""
    value, error = entry.get(metric), entry.get("stderr", {}).get(metric)
    if value is None:
        return DASH
    return f"{value:.3f}" if error is None else f"{value:.3f} ± {error:.3f}"


def _cost(phases: dict, student: str | None) -> dict:
    shown = [
        name for name in dict.fromkeys(("teacher", student)) if name and phases.get(name, {}).get("speed")
    ]
    if not shown:
        return {"text": "not measured: not part of this run's plan", "rows": []}
    columns, tables = [], []
    for name in shown:
        speed = phases[name]["speed"]
        columns += [f"{PHASE_WORDS[name]}, bytes kept", f"{PHASE_WORDS[name]}, decoded tokens a second"]
        tables.append({row["length"]: row for row in speed.get("state", [])})
        tables.append({row["length"]: row for row in speed.get("decode", [])})
    rows = []
    for length in sorted({length for table in tables for length in table}):
        cells = []
        for place, table in enumerate(tables):
            row = table.get(length)
            figure = None if row is None else row.get("tokens_per_second" if place % 2 else "bytes")
            if row is not None and figure is None:
                cells.append(f"not measured: {row['why']}")
            else:
                cells.append(DASH if figure is None else f"{figure:,.1f}" if place % 2 else f"{figure:,}")
        rows.append({"name": f"{length:,}", "cells": cells})
    how = []
    for name in shown:
        ways = dict.fromkeys(row["how"] for row in phases[name]["speed"].get("state", []))
        how.append(f"{PHASE_WORDS[name]}: {', '.join(ways)}")
    state = phases[shown[-1]]["speed"].get("state", [])
    text = f"Bytes that one row keeps between tokens ({'; '.join(how)})."
    if student and len(state) > 1:
        first, last = state[0], state[-1]
        same = "the same" if first["bytes"] == last["bytes"] else "not the same"
        text += f" The student's are {same} at {first['length']:,} and at {last['length']:,} tokens."
    return {"text": text, "columns": columns, "rows": rows}


def _training(metrics: dict, log: Sequence[dict]) -> list[dict]:
    rows = []
    for name in PHASES:
        entry = metrics["phases"].get(name, {}).get("training")
        if entry:
            seconds = metrics.get("wall_seconds", {}).get(name)
            rows.append(
                {
                    "name": PHASE_WORDS[name],
                    "tokens": f"{entry.get('tokens', 0):,}",
                    "loss": _loss(
                        entry, [line for line in log if str(line["stage"]) == name.removeprefix("stage")]
                    ),
                    "skipped": entry.get("skipped_steps", DASH),
                    "clamped": entry.get("clamped", DASH),
                    "nonfinite": entry.get("nonfinite", DASH),
                    "seconds": DASH if seconds is None else f"{seconds:.0f}",
                }
            )
    return rows


def _dev_losses(phases: dict) -> list[str]:
    """A sentence for each phase whose loss on the dev text was to be measured while it trained."""
    said = []
    for name in PHASES:
        dev = phases.get(name, {}).get("training", {}).get("dev")
        if not dev:
            continue
        if dev["losses"] is None:
            said.append(f"{PHASE_WORDS[name]}: not measured, since {dev['why']}")
            continue
        losses = dict(dev["losses"])
        (first, begun), *_, (last, ended) = dev["losses"]
        words = f"{short(begun)} after step {first}, {short(ended)} after step {last}"
        if dev["best_step"] not in (None, last):
            words += f"; lowest after step {dev['best_step']}: {short(losses[dev['best_step']])}"
        words += f"; the weights after step {dev['taken_step']} are taken"
        said.append(f"{PHASE_WORDS[name]}: {words}{'; it ended early' if dev['stopped_early'] else ''}")
    return said


def _loss(entry: dict, lines: Sequence[dict]) -> str:
    """A stage's loss at its beginning and end: means, since one row says more of itself than of the model."""
    losses = [line["loss"] for line in lines if line.get("loss") is not None]
    if "why" in entry:
        return f"left out: {entry['why']}"
    if not losses:
        return f"{short(entry.get('loss_first'))} → {short(entry.get('loss_last'))} (first and last step)"
    tenth = max(1, len(losses) // 10)
    return f"{short(fmean(losses[:tenth]))} → {short(fmean(losses[-tenth:]))}"


def _replaced(metrics: dict) -> dict:
    layers = metrics.get("replaced")
    if not layers:
        return {"text": "not measured: this run replaced no layer, or did not record which", "rows": []}
    rows = []
    for layer in layers:
        output = layer.get("output") or {}
        state = layer.get("state_bytes")
        rows.append(
            {
                "layer": layer["layer"],
                "path": layer["path"],
                "classes": f"{layer['old_class']} → {layer['new_class']}",
                "parameters": f"{layer['parameters']:,}",
                "state": DASH if state is None else f"{state:,}",
                "output": [short(output.get(name)) for name in ("mean", "std", "min", "max")]
                + [f"{100 * output['beyond_fp16']:.4g} %" if output.get("beyond_fp16") is not None else DASH],
            }
        )
    return {
        "text": "The last five columns describe the original layer's output before the swap.",
        "rows": rows,
    }


def _outputs(main: dict, student: str | None) -> dict:
    layers = main.get("layer_outputs")
    if not layers:
        return {"text": "not measured: there was no teacher to compare with", "rows": []}
    rows = [
        {
            "layer": row["layer"],
            "mean": f"{short(row['mean'])} ({short(row['teacher_mean'])})",
            "std": f"{short(row['std'])} ({short(row['teacher_std'])})",
            "max": short(row["max_difference"]),
            "error": short(row["error"]),
            "transfer": short(row["transfer_error"]),
        }
        for row in layers
    ]
    return {
        "text": f"Phase: {PHASE_WORDS[student or 'teacher']}. "
        "Errors are shares of the variance of the teacher's output.",
        "rows": rows,
    }


def _checklist(boxes: Sequence[dict]) -> list[dict]:
    verdicts = {True: "met", False: "**not met**"}
    return [
        box
        | {
            "value": (box["value"] or DASH).replace("|", "\\|"),
            "verdict": verdicts.get(box["passed"], f"not measured: {box['why']}"),
        }
        for box in boxes
    ]


def _patterns(stages: Sequence[dict]) -> dict:
    def cell(seen: dict | None, name: str) -> str:
        if seen is None:
            return "not measured: not watched for"
        return f"**seen from step {seen[name]}**" if name in seen else "not seen"

    rows = [
        {"name": words, "cells": [cell(stage["seen"], name) for stage in stages] or [NO_STAGE]}
        for name, words in FAILURES.items()
    ]
    return {"columns": [PHASE_WORDS[stage["phase"]] for stage in stages] or ["training"], "rows": rows}


NO_STAGE = "not measured: no stage was trained"


def _commands(command: str | None, again: str, main: dict) -> list[dict]:
    rows = [{"figures": "every measured figure of the last phase", "command": again}]
    if command:
        rows.insert(0, {"figures": "all phases, the training and the plots", "command": command})
    plain = shlex.join(part for part in shlex.split(again) if not part.startswith("eval="))
    rows += [
        {"figures": f"{words} of the last phase", "command": f"{plain} {option}"}
        for name, (words, option) in FIGURES.items()
        if main.get(name)
    ]
    return rows


def _again(metrics: dict, source: Path, config: dict | None) -> str:
    """The command that measures the last phase again."""
    if metrics.get("command"):
        return metrics["command"]
    if config is None:
        return f"python -m eval model={metrics['model']}"
    wanted = (config.get("eval") or {}).get("name", "quick")
    place = source.resolve()
    if place.is_relative_to(Path.cwd()):
        place = place.relative_to(Path.cwd())
    return f"python -m eval run={place}" + ("" if wanted == "quick" else f" eval={wanted}")


def _protocol(metrics: dict) -> list[str]:
    lines = []
    entries = {
        (corpus, entry["protocol"])
        for phase in metrics["phases"].values()
        for corpus, entry in perplexities(phase).items()
    }
    lines += [f"perplexity on {corpus}: {protocol}" for corpus, protocol in sorted(entries)]
    lines.append(f"seed {metrics['seed']}, device {metrics['device']}")
    if metrics.get("wall_seconds"):
        spent = ", ".join(f"{name} {seconds:.0f}" for name, seconds in metrics["wall_seconds"].items())
        lines.append(f"seconds: {spent}")
    return lines


# Words


def _title(metrics: dict) -> str:
    names = dict.fromkeys(filter(None, (metrics.get("experiment"), metrics.get("attention"))))
    return " with ".join([str(metrics["model"]), *([" / ".join(f"`{n}`" for n in names)] if names else [])])


def _plot(name: str, why: str | None) -> str:
    return f"![{PLOTS[name]}](plots/{name})" if why is None else f"{PLOTS[name]}: not measured: {why}"


def _json(path: Path) -> dict | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _command(folder: Path) -> str | None:
    """The command line of the run, from what Hydra recorded."""
    path = folder / ".hydra" / "overrides.yaml"
    if not path.is_file():
        return None
    return " ".join(["python -m replace", *(str(item) for item in OmegaConf.load(path))])
