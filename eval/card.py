"""The rows of a model card's results, from a run's metrics."""

from eval.metrics import last_student
from eval.plots import PHASE_WORDS
from eval.words import DASH, bounds, exact, recall_means


def results_of(metrics: dict) -> list[dict[str, str]]:
    """Perplexity and recall of the teacher and of the last student that was measured, on test."""
    student = last_student(metrics)
    if student is None:
        return []
    names = [name for name in ("teacher", student) if name in metrics["phases"]]
    columns = {PHASE_WORDS[name]: _figures(metrics["phases"][name]) for name in names}
    kinds = dict.fromkeys(kind for figures in columns.values() for kind in figures)
    return [
        {"figure": kind} | {name: figures.get(kind, DASH) for name, figures in columns.items()}
        for kind in kinds
    ]


def _figures(phase: dict) -> dict[str, str]:
    """Words for each figure, with its interval."""
    found = {}
    for book, entry in phase.get("perplexity", {}).items():
        if entry.get("ppl") is not None:
            interval = bounds(entry.get("interval"), ".2f")
            found[f"perplexity, {book}"] = f"{entry['ppl']:.2f} {interval}".rstrip()
    for pooled in recall_means(phase):
        among = f" among {pooled['distractors']} others" if pooled["distractors"] else ""
        name = f"recall, {pooled['kind']} ({pooled['phrasing']} phrasing){among}, {pooled['length']:,} tokens"
        found.setdefault(name, exact(pooled))
    return found
