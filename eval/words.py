"""Numbers and names in the words of the report."""

from collections.abc import Sequence

from eval.niah import means, rate
from eval.plots import TASK_WORDS

DASH = "–"
PART_WORDS = {"memory": "linear memory", "pairs": "retained pairs", "memory_and_pairs": "both together"}


def with_interval(entry: dict, key: str, form: str = ".2f") -> str:
    """A figure with its interval, or why there is none."""
    if entry.get(key) is None:
        return f"not measured: {entry.get('why', 'no reason was recorded')}"
    return f"{entry[key]:{form}} {bounds(entry.get('interval'), form)}".rstrip()


def bounds(interval: Sequence[float] | None, form: str) -> str:
    return "" if interval is None else f"[{interval[0]:{form}}, {interval[1]:{form}}]"


def exact(entry: dict) -> str:
    return f"{entry['exact']:.2f} {bounds(entry['interval'], '.2f')}"


def percent(share: float) -> str:
    return f"{share:+.1%}"


def short(value: float | None) -> str:
    return DASH if value is None else f"{value:.3g}"


def listed(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def inline(text: str) -> str:
    """Text for one cell of a table."""
    return "`" + " ".join(text.split()).replace("|", "\\|").replace("`", "'") + "`"


def squeeze(text: str) -> str:
    """At most one empty line in a row."""
    lines: list[str] = []
    for line in text.splitlines():
        if line.strip() or (lines and lines[-1]):
            lines.append(line.rstrip())
    return "\n".join(lines).rstrip() + "\n"


def group(cell: dict) -> tuple:
    return tuple(cell[name] for name in ("length", "kind", "phrasing", "haystack", "distractors"))


def recall_means(phase: dict) -> list[dict]:
    return means([cell for task in TASK_WORDS for cell in (phase.get(task) or {}).get("cells", [])])


def recall_lengths(phase: dict) -> list[int]:
    return sorted({pooled["length"] for pooled in recall_means(phase) if not pooled["distractors"]})


def recall_at(phase: dict, length: int) -> dict | None:
    """Exact match over all cells of one length without distractors; None if there are none."""
    cells = [cell for task in TASK_WORDS for cell in (phase.get(task) or {}).get("cells", [])]
    hits = [
        hit for cell in cells if cell["length"] == length and not cell["distractors"] for hit in cell["hits"]
    ]
    return rate(hits) if hits else None
