"""The figures in the README are those of the runs that are kept under eval/results, to the letter."""

import json
from pathlib import Path

ROOT = Path(__file__).parents[1]
RUN = ROOT / "eval" / "results" / "infini_quick"
PUBLISHED = ROOT / "eval" / "results" / "infini_paper_quick"


def table(metrics: dict, published: dict) -> list[str]:
    """The README's table: the default run's metrics, and those of Infini-attention as published."""
    phases = metrics["phases"]
    teacher, swapped, student = phases["teacher"], phases["swapped"], phases["stage3"]
    off = student["ablation"]["memory_and_pairs_off"]
    columns = (teacher, swapped, student, off, published["phases"]["stage3"])

    def perplexity(phase: dict, book: str) -> str:
        base, value = (p["perplexity"][book]["ppl"] for p in (teacher, phase))
        return f"{value:.2f}" if phase is teacher else f"{value:.2f} ({100 * (value / base - 1):+.1f} %)"

    def recall(phase: dict, task: str, length: int, distractors: bool = False) -> str:
        means = [
            mean
            for mean in phase.get(task, {}).get("means", [])
            if mean["length"] == length and bool(mean["distractors"]) == distractors
        ]
        episodes = sum(mean["episodes"] for mean in means)
        hits = round(sum(mean["exact"] * mean["episodes"] for mean in means))
        return f"{hits} of {episodes}" if means else "–"

    def state(phase: dict) -> str:
        return f"{phase['speed']['state'][-1]['bytes'] / 2**20:,.1f} MiB"

    heads = ["teacher", "swapped, untrained", "after stage 3", "pairs and memory off", "`infini_paper`"]
    lines = [f"| | {' | '.join(heads)} |", "|---|---|---|---|---|---|"]
    for book in teacher["perplexity"]:
        cells = [perplexity(phase, book) for phase in columns]
        lines.append(f"| perplexity, {book} | {' | '.join(cells)} |")
    for task, words in (("passkey", "pass key"), ("niah", "needle, phrasing never trained on")):
        for length in (1024, 4096):
            cells = [recall(phase, task, length) for phase in columns]
            lines.append(f"| {words}, {length:,} tokens | {' | '.join(cells)} |")
    cells = [recall(phase, "passkey", 1024, True) for phase in columns]
    lines.append(f"| pass key among 8 others, 1,024 tokens | {' | '.join(cells)} |")
    lines.append(
        f"| bytes kept at 65,536 tokens | {state(teacher)} | | {state(student)} | | {state(columns[-1])} |"
    )
    return lines


def test_the_table_of_results_is_that_of_the_kept_run():
    metrics, published = (json.loads((run / "metrics.json").read_text("utf-8")) for run in (RUN, PUBLISHED))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for line in table(metrics, published):
        assert line in readme
    assert f"{sum(metrics['wall_seconds'].values()) / 60:.0f} minutes" in readme


def test_what_the_readme_points_to_is_there():
    assert (RUN / "recall.png").exists()
    for run in (RUN, PUBLISHED):
        assert json.loads((run / "provenance.json").read_text(encoding="utf-8"))["commit"]
