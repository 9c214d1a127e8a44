"""A saved ranking of layers: what `layers=auto` and `layers=retrieval` measured, and what is taken of it.

`ranking.json` in a run's folder is

    {"version": 1, "select": "auto" | "retrieval", "k",
     "model": the options of `model`, "attention": a variant's name, "rest",
     "orders": {"independent" | "greedy" | "retrieval": layers, best first},
     "layers": [{"layer", auto: "cost", "kl", "kl_error", "recall"; retrieval: "share"}],
     "sets": [{"name", "layers", "kl", "kl_error", "recall"}] or {"why"},
     "teacher": {"recall"} where it was measured,
     "protocol": {"text": "dev" | "train", ...}, "seconds": {"foreseen", "spent"}}

A greedy order ends after k layers, the others hold all. `kl` is in nats a token of text, with its standard
error over the rows; `recall` the share of the tokens of the needles' values that are the most likely ones.
"""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from replace.config import LayersConfig
from replace.errors import bad_value

FILE = "ranking.json"
VERSION = 1
MEASURED = {"auto": "those that cost least", "retrieval": "where the teacher retrieves"}
"""The values of `layers.select` that need a ranking, and what it puts first."""
SEARCHES = ("independent", "greedy")
RANDOM_SETS = 3


def order_of(layers: LayersConfig) -> str:
    """The name of the order that `layers` takes its k layers of."""
    return "retrieval" if layers.select == "retrieval" else layers.search


def read_ranking(place: Path, field: str = "layers.ranking") -> dict[str, Any]:
    """The ranking in a file, or in the folder of a run.

    Raises:
        UserError: there is none; `field` is the key that named the place.
    """
    path = place / FILE if place.is_dir() else place
    allowed = f"a {FILE}, or the folder of a run with layers=auto or layers=retrieval, which writes one"
    try:
        ranking = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise bad_value(field, str(place), allowed) from error
    if not _is_ranking(ranking):
        raise bad_value(field, str(place), allowed)
    return ranking


def _is_ranking(found: Any) -> bool:
    if not isinstance(found, dict) or found.get("version") != VERSION or found.get("select") not in MEASURED:
        return False
    orders, rows = found.get("orders"), found.get("layers")
    if not isinstance(orders, dict) or not orders or not isinstance(rows, list):
        return False
    known = {row.get("layer") for row in rows if isinstance(row, dict)}
    return all(
        isinstance(order, list) and len(set(order)) == len(order) > 0 and set(order) <= known
        for order in orders.values()
    )


def check_ranking(ranking: dict[str, Any], layers: LayersConfig, count: int) -> None:
    """Refuse a ranking that does not fit `layers`, or a model of `count` layers.

    Raises:
        UserError: so it is.
    """
    select, place, order = ranking["select"], layers.ranking, order_of(layers)
    if select != layers.select:
        allowed = f"a ranking of layers={layers.select}, which that of layers={select} is not"
        raise bad_value("layers.ranking", place, allowed)
    if order not in ranking["orders"]:
        why = f"{', '.join(ranking['orders'])}, as layers.ranking={place!r} was searched"
        raise bad_value("layers.search", layers.search, why)
    largest = max(row["layer"] for row in ranking["layers"])
    if largest >= count:
        allowed = f"a ranking of a model with {count} layers, which one with a layer {largest} is not"
        raise bad_value("layers.ranking", place, allowed)
    held = len(ranking["orders"][order])
    if select == "auto" and layers.k > held:
        raise bad_value("layers.k", layers.k, f"1 to {held}, the layers that layers.ranking={place!r} orders")


def taken(ranking: dict[str, Any], layers: LayersConfig) -> list[int]:
    """The k best layers, in the order of the model; all of them where k is larger than their number.

    Raises:
        UserError: k is all layers that a choice could be made of.
    """
    if layers.select == "auto":
        check_k(layers, len(ranking["layers"]))
    return sorted(ranking["orders"][order_of(layers)][: layers.k])


def check_k(layers: LayersConfig, count: int) -> None:
    """A choice by cost leaves at least one layer as it is.

    Raises:
        UserError: it would not.
    """
    if not 1 <= layers.k < count:
        allowed = f"1 to {count - 1}, fewer than the model's {count} layers (layers=all takes them all)"
        raise bad_value("layers.k", layers.k, allowed)


def independent_order(cost: dict[int, float]) -> list[int]:
    """Layers by rising cost, the lower one first where two cost the same."""
    return sorted(cost, key=lambda layer: (cost[layer], layer))


def uniform(indices: Sequence[int], k: int) -> list[int]:
    """The middles of k equal parts of the layers."""
    return [indices[(2 * part + 1) * len(indices) // (2 * k)] for part in range(k)]


def baselines(indices: Sequence[int], k: int, seed: int) -> dict[str, list[int]]:
    """Sets of k layers that no measurement chose, by name; the random ones depend on the seed alone."""
    sets = {"uniform": uniform(indices, k)}
    for number in range(1, RANDOM_SETS + 1):
        rng = random.Random(f"layers {seed} {number}")
        sets[f"random {number}"] = sorted(rng.sample(list(indices), k))
    return sets


def measurements(layers: LayersConfig, count: int) -> tuple[int, int]:
    """(how often layers in place are measured, how many transfers come before) for `count` layers."""
    if layers.select not in MEASURED or layers.ranking is not None:
        return 0, 0
    k = min(layers.k, count)
    sets = 1 + 1 + RANDOM_SETS if layers.compare else 0
    if layers.select == "retrieval":
        return sets, sets  # each with its own `rest`
    rounds = k if layers.search == "greedy" else 1
    return sum(count - done for done in range(rounds)) + sets, 1
