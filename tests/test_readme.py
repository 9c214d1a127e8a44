"""The figures in the README are those of the runs that are kept under eval/results, to the letter."""

import json
from pathlib import Path

ROOT = Path(__file__).parents[1]
RUN = ROOT / "eval" / "results" / "infini_quick"
PUBLISHED = ROOT / "eval" / "results" / "infini_paper_quick"


def table(metrics: dict, published: dict) -> list[str]:
    """The README's table: the default run's metrics, and those of Infini-attention as published.

    Between the phases the dev text is read, so the untrained swap has figures there only.
    """
    phases = metrics["phases"]
    teacher, swapped, student = phases["teacher"], phases["swapped"], phases["stage3"]
    off = student["ablation"]["memory_and_pairs_off"]
    columns = (teacher, swapped, student, off, published["phases"]["stage3"])
    dev = [phase.get("dev", {}) for phase in columns]

    def perplexity(phase: dict, base: dict, book: str) -> str:
        if book not in phase.get("perplexity", {}):
            return "–"
        value, least = (p["perplexity"][book]["ppl"] for p in (phase, base))
        return f"{value:.2f}" if phase is base else f"{value:.2f} ({100 * (value / least - 1):+.1f} %)"

    def recall(phase: dict, tasks: tuple[str, ...], length: int, distractors: bool = False) -> str:
        means = [
            mean
            for task in tasks
            for mean in phase.get(task, {}).get("means", [])
            if mean["length"] == length and bool(mean["distractors"]) == distractors
        ]
        episodes = sum(mean["episodes"] for mean in means)
        hits = round(sum(mean["exact"] * mean["episodes"] for mean in means))
        return f"{hits} of {episodes}" if means else "–"

    def state(phase: dict) -> str:
        return f"{phase['speed']['state'][-1]['bytes'] / 2**20:,.1f} MiB"

    def row(name: str, cells: list[str]) -> str:
        return f"| {name} | {' | '.join(cells)} |"

    heads = ["teacher", "swapped, untrained", "after stage 3", "pairs and memory off", "`infini_paper`"]
    lines = [row("", heads).replace("|  |", "| |"), "|---|---|---|---|---|---|"]
    for split, word in ((columns, ""), (dev, " (dev)")):
        for book in split[0]["perplexity"]:
            lines.append(
                row(f"perplexity, {book}{word}", [perplexity(phase, split[0], book) for phase in split])
            )
    for task, words in (("passkey", "pass key"), ("niah", "needle, phrasing never trained on")):
        for length in (1024, 4096):
            cells = [recall(phase, (task,), length) for phase in columns]
            lines.append(row(f"{words}, {length:,} tokens", cells))
    lines.append(row("both, 1,024 tokens (dev)", [recall(phase, ("passkey", "niah"), 1024) for phase in dev]))
    cells = [recall(phase, ("passkey",), 1024, True) for phase in columns]
    lines.append(row("pass key among 8 others, 1,024 tokens", cells))
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
