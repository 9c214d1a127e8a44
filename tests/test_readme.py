"""The figures in the README are those of the runs that are kept under eval/results, to the letter."""

import json
import re
from pathlib import Path

import pytest
import yaml

from replace.compose import compose
from replace.ranks import check_ranks

ROOT = Path(__file__).parents[1]
RUN = ROOT / "eval" / "results" / "infini_quick"
PUBLISHED = ROOT / "eval" / "results" / "infini_paper_quick"
FULL = ROOT / "eval" / "results" / "infini_full"


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


def test_what_the_readme_says_of_the_whole_evaluation_is_in_its_figures():
    student = json.loads((FULL / "metrics.json").read_text("utf-8"))["phases"]["stage3"]
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    keys = [cell for cell in student["passkey_long"]["cells"] if cell["length"] == 16384]
    hits, off = (sum(sum(part["hits"]) for part in parts) for parts in (keys, [cell["off"] for cell in keys]))
    assert (
        f"at 16,384 tokens in {hits} of {len(keys)} episodes, with both parts off in {off} of {len(keys)}"
        in readme
    )
    codes = [mean for mean in student["niah_grid"]["means"] if mean["form"] == "single_3"]
    first = sum(mean["ranks"].count(1) for mean in codes)
    episodes, exact = (
        sum(f(mean) for mean in codes) for f in (lambda m: m["episodes"], lambda m: sum(m["hits"]))
    )
    without = sum(mean["off"]["ranks"].count(1) for mean in codes)
    words = f"it ranks {first} first among ten (with both parts off {without}) and copies {exact} exactly"
    assert f"of {episodes} UUIDs {words}" in readme
    streamed = student["streaming"]
    pairs = zip(streamed["by_position"], streamed["teacher_window"]["by_position"], strict=True)
    gaps = [(mine["from"], round(100 * (mine["ppl"] / theirs["ppl"] - 1))) for mine, theirs in pairs]
    near, far = ([gap for start, gap in gaps if f(start)] for f in (lambda s: s < 2048, lambda s: s >= 32768))
    assert f"{-max(near)} to {-min(near)} % below that of the teacher with a sliding window" in readme
    assert f"{min(far)} to {max(far)} % above it from 32,768 on" in readme
    assert f"a novel of {streamed['tokens']:,} tokens" in readme


def launches() -> list[str]:
    """The README's commands that make a run of several processes, or plan one."""
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    commands = [re.split(r" {3,}", line.strip())[0] for line in lines if "-m replace +exp=" in line]
    return [command for command in commands if "accelerate" in command or "devices." in command]


@pytest.mark.parametrize("command", launches())
def test_a_launch_of_the_readme_deals_its_rows_to_its_processes(command):
    launcher, _, options = command.partition("-m replace ")
    overrides, words = options.split(), launcher.split()
    if "--config_file" in words:
        file = ROOT / words[words.index("--config_file") + 1]
        overrides.append(f"devices.processes={yaml.safe_load(file.read_text())['num_processes']}")
    elif "--num_processes" in words:
        overrides.append(f"devices.processes={words[words.index('--num_processes') + 1]}")
    config = compose([*overrides, "dry_run=true"])
    assert config.devices.processes > 1
    check_ranks(config)


def test_the_readme_shows_each_kind_of_launch():
    assert {launch.split()[0] for launch in launches()} == {"accelerate", "python"}


def test_what_the_readme_points_to_is_there():
    assert (RUN / "recall.png").exists()
    for run in (RUN, PUBLISHED, FULL):
        assert json.loads((run / "provenance.json").read_text(encoding="utf-8"))["commit"]
