"""Which layers were replaced and why: the ranking, and its set beside uniform and random ones."""

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from eval.plots import BLUE, GREY, NotMeasured, panels_of, scale_of
from eval.sections import SECTIONS, Section, table
from eval.words import DASH

RANKED_BY = {"auto": "cost", "retrieval": "share"}
"""The figure of a layer that decides."""
LABELS = {
    "auto": "cost of the layer alone",
    "retrieval": "share of a head's attention\non the needle",
}


def text(phases: dict, names: list[str]) -> str:
    """What was measured, a line a layer, best first, and a line a set."""
    ranking = phases[names[0]]["choice"]
    parts = [_said(ranking), _layers(ranking)]
    if isinstance(ranking["sets"], dict):
        parts.append(f"Whole sets of layers: not measured: {ranking['sets']['why']}")
    else:
        rows = [
            [one["name"], ", ".join(map(str, one["layers"])), _divergence(one), _number(one["recall"], ".2f")]
            for one in ranking["sets"]
        ]
        parts.append(f"Sets of {ranking['k']} layers, swapped together after the same short transfer:")
        parts.append(table(["set", "layers", "KL to the teacher", "needle tokens right"], rows))
        parts.append(_best(ranking["sets"]))
    return "\n\n".join(parts)


def _said(ranking: dict[str, Any]) -> str:
    """How the ranking was made."""
    how, count = ranking["protocol"], len(ranking["layers"])
    spent = f"{ranking['seconds']['spent'] / 60:.1f} minutes"
    foreseen = ranking["seconds"]["foreseen"]
    spent += "" if foreseen is None else f", {foreseen / 60:.1f} foreseen"
    if ranking["select"] == "retrieval":
        what = (
            f"`layers=retrieval`: {len(ranking['taken'])} of {count} layers, those in which one head of the "
            "teacher puts the largest share of its attention, from the answer, on the needle; the mean of "
            f"{how['episodes']} episodes of {how['length']} tokens in {how['text']} text."
        )
        how = how.get("sets")
    else:
        search = " and ".join(ranking["orders"])
        what = (
            f"`layers=auto`: the {len(ranking['taken'])} of {count} layers that cost least ({search}). The "
            f"cost is the KL to the teacher when `{ranking['attention']}` is in this layer alone, in nats a "
            f"token, and {how['recall_weight']:g} times the share of needle tokens that are lost."
        )
    if how is not None:
        what += (
            f" Measured on {how['rows']} rows and {how['episodes']} needles of {how['length']} tokens in "
            f"{how['text']} text, after a transfer of {how['transfer_tokens']:,} tokens; the teacher gets "
            f"{ranking['teacher']['recall']:.2f} of the needle tokens right."
        )
    return f"{what} ± is the standard error over rows. It took {spent}; no test text was read."


def _layers(ranking: dict[str, Any]) -> str:
    greedy = ranking["orders"].get("greedy")
    best = next(iter(ranking["orders"].values()))
    by_layer = {row["layer"]: row for row in ranking["layers"]}
    auto = ranking["select"] == "auto"
    columns = ["layer", "taken", *(["greedy"] if greedy else []), RANKED_BY[ranking["select"]]]
    columns += ["KL to the teacher", "needle tokens right"] if auto else []
    rows = []
    for layer in best:
        row = by_layer[layer]
        cells = [str(layer), "yes" if layer in ranking["taken"] else ""]
        if greedy:
            cells.append(str(greedy.index(layer) + 1) if layer in greedy else "")
        cells.append(_number(row[RANKED_BY[ranking["select"]]], ".3g"))
        cells += [_divergence(row), _number(row["recall"], ".2f")] if auto else []
        rows.append(cells)
    return table(columns, rows)


def _best(sets: list[dict[str, Any]]) -> str:
    """Which set is nearest to the teacher, by the figures alone."""
    measured = [one for one in sets if one["kl"] is not None]
    if not measured:
        return "No set has a finite KL."
    nearest = min(measured, key=lambda one: one["kl"])
    return f"The smallest KL is that of the {nearest['name']} set."


def _divergence(row: dict[str, Any]) -> str:
    error = "" if row["kl_error"] is None else f" ± {row['kl_error']:.1g}"
    return _number(row["kl"], ".3g") + error


def _number(value: float | None, form: str) -> str:
    return DASH if value is None else f"{value:{form}}"


def picture(phases: dict, names: list[str]) -> Figure:
    """Each layer's figure, those that were taken in colour, and the KL of the sets."""
    ranking = phases[names[0]]["choice"]
    key = RANKED_BY[ranking["select"]]
    rows = [row for row in ranking["layers"] if row[key] is not None]
    if not rows:
        raise NotMeasured("no layer has a finite figure")
    sets = [] if isinstance(ranking["sets"], dict) else [s for s in ranking["sets"] if s["kl"] is not None]
    figure, axes = panels_of(1, 2 if sets else 1, width=5.2, height=3.0)
    left = axes[0][0]
    values = [row[key] for row in rows]
    colours = [BLUE if row["layer"] in ranking["taken"] else GREY for row in rows]
    left.scatter([row["layer"] for row in rows], values, color=colours, s=22)
    scale_of(left, values)
    left.set_xlabel("decoder layer (blue: taken)")
    left.set_ylabel(LABELS[ranking["select"]])
    if sets:
        _compare(axes[0][1], sets)
    return figure


def _compare(axis: Axes, sets: list[dict[str, Any]]) -> None:
    """A bar a set, with its standard error."""
    for place, one in enumerate(sets):
        baseline = one["name"] == "uniform" or one["name"].startswith("random")
        axis.bar(place, one["kl"], yerr=one["kl_error"], capsize=3, color=GREY if baseline else BLUE)
    words = [f"{one['name']}\nneedles {one['recall']:.2f}" for one in sets]
    axis.set_xticks(range(len(sets)), words, fontsize=7)
    axis.set_ylabel("KL to the teacher, nats a token")
    axis.set_title(f"sets of {len(sets[0]['layers'])} layers")


SECTIONS.register("choice")(
    Section(
        "Choice of layers",
        "choice",
        text,
        {"choice.png": ("Each layer's figure, and sets of layers beside uniform and random ones", picture)},
    )
)
