"""Constructed metrics of a whole run, and a tiny model, for the tests of eval."""

import json
import random
from pathlib import Path

import pytest

from eval.measure import conclude
from eval.metrics import new_metrics, write_metrics
from eval.niah import means, rate
from eval.report import write_report
from replace.config import ModelConfig
from replace.loading import load_model

GROUPS = (("passkey", "train"), ("sentence", "test"))
PARTS = {"replaced": 30, "memory": 10, "pairs": 30, "full_attention": 0}


@pytest.fixture(scope="session")
def tiny():
    """A random model of the default family and its tokenizer."""
    return load_model(ModelConfig(kind="tiny"))


def perplexities(level: float, spread: random.Random, windows: int = 8) -> dict:
    """Entries of two books around a level of -log p."""
    entries = {}
    for name, hard in (("Pride and Prejudice", 0.0), ("The Voyage Out", 0.2)):
        base = random.Random(name)
        rows = [
            {"nll": 1023 * (level + hard + base.gauss(0, 0.1) + spread.gauss(0, 0.003)), "tokens": 1023}
            for _ in range(windows)
        ]
        mean = sum(row["nll"] for row in rows) / sum(row["tokens"] for row in rows)
        buckets = [(0, 64), (64, 128), (128, 256), (256, 512), (512, 1024)]
        entries[name] = {
            "ppl": 2.718281828**mean,
            "interval": [2.718281828 ** (mean - 0.07), 2.718281828 ** (mean + 0.07)],
            "bits_per_byte": mean / 3,
            "tokens": 1023 * windows,
            "protocol": "disjoint windows of 1024 tokens, stride 1024, first 8192 tokens, bfloat16",
            "windows": rows,
            "by_position": [
                {"from": a, "to": b, "ppl": 2.718281828 ** (mean + 0.6 - 0.15 * i), "tokens": 8 * (b - a)}
                for i, (a, b) in enumerate(buckets)
            ],
        }
    return entries


def recalls(chance: float, lengths: list[int], episodes: int = 2, distractors: float | None = None) -> dict:
    """Cells in which an episode is a hit with that chance, drawn from the episode's own random numbers."""
    found: dict[str, dict] = {}
    cells = [
        (length, depth, kind, phrasing, haystack, 0)
        for length in lengths
        for kind, phrasing in GROUPS
        for haystack in ("novel", "filler")
        for depth in (0.1, 0.5, 0.9)
    ]
    if distractors is not None:
        cells += [(1024, depth, "passkey", "train", "novel", 8) for depth in (0.1, 0.5, 0.9)]
    for cell in cells:
        length, depth, kind, phrasing, haystack, many = cell
        draw = random.Random(str(cell))
        hits = [int(draw.random() < (distractors if many else chance)) for _ in range(episodes)]
        entry = {
            "length": length,
            "depth": depth,
            "kind": kind,
            "phrasing": phrasing,
            "haystack": haystack,
            "distractors": many,
            **rate(hits),
            "digit_accuracy": sum(hits) / len(hits),
            "answer_loss": 0.1,
            "hits": hits,
        }
        found.setdefault("passkey" if kind == "passkey" else "niah", {"cells": []})["cells"].append(entry)
    for task in found.values():
        task["means"] = means(task["cells"])
    return found


def whole_run() -> dict:
    """The metrics of a run in which retained pairs carry recall and the linear memory a little perplexity."""
    metrics = new_metrics(
        model="SmolLM2-135M-Instruct, dequantised from Q4_1",
        attention="infini",
        layers=list(range(30)),
        seed=0,
        device="cpu",
    )
    levels = {"teacher": (3.50, 1.0), "swapped": (3.85, 0.0), "stage1": (3.70, 0.6), "stage2": (3.55, 0.98)}
    levels["stage3"] = (3.54, 0.97)
    for name, (level, chance) in levels.items():
        last = name == "stage3"
        lengths = [1024, 4096] if last else [1024]
        phase: dict = {
            "perplexity": perplexities(level, random.Random(name)),
            **recalls(chance, lengths, distractors=0.9 if name == "teacher" else 0.2 if last else None),
            "probes": [
                {
                    "prompt": "The capital of France is",
                    "continuation": " Paris.\nIt is|was",
                    "expected": "Paris",
                    "hit": True,
                },
                {"prompt": "1 + 1 =", "continuation": " 11", "expected": "2", "hit": False},
                {"prompt": "Hello, my name is", "continuation": " Ann", "expected": None, "hit": None},
            ],
        }
        if name != "teacher":
            phase["ablation"] = {"memory_and_pairs_off": recalls(0.0, lengths)}
            error = {"swapped": 0.3, "stage1": 0.08, "stage2": 0.07, "stage3": 0.07}[name]
            phase["layer_outputs"] = [
                {
                    "layer": index,
                    "path": f"model.layers.{index}.self_attn",
                    "mean": 0.001,
                    "std": 0.2,
                    "teacher_mean": 0.001,
                    "teacher_std": 0.21,
                    "max_difference": 3.2,
                    "error": error * (1 + index / 10),
                    "transfer_error": error * (0.5 + random.Random(index).random()),
                }
                for index in range(30)
            ]
        if name.startswith("stage"):
            phase["training"] = {
                "tokens": 61440,
                "loss_first": 2.0,
                "loss_last": 0.5,
                "skipped_steps": 0,
                "clamped": 0,
                "nonfinite": 0,
                "patterns": {},
            }
        if last:
            off = random.Random("off")
            phase["ablation"] |= {
                "memory_off": recalls(0.96, lengths) | {"perplexity": perplexities(3.56, off)},
                "pairs_off": recalls(0.05, lengths) | {"perplexity": perplexities(3.68, off)},
            }
            phase["ablation"]["memory_and_pairs_off"]["perplexity"] = perplexities(3.75, off)
            phase["generation"] = {"episodes": 2, "exact": 1.0, "agrees": 1.0}
            phase["writing"] = {
                "prompts": 1, "tokens": 3, "repetition": 0.2, "distinct": {"1": 0.5, "2": 0.7, "3": 0.9},
                "teacher": {"repetition": 0.1, "distinct": {"1": 0.6, "2": 0.8, "3": 1.0}}, "agreement": 0.4,
                "kl": {"value": 0.3, "interval": [0.2, 0.4], "teacher_loss": 1.2, "own_loss": 0.9},
                "continuations": [
                    {"prompt": "Once|upon", "text": " a\ntime", "teacher": " two times", "change": 0.5}
                ],
            }  # fmt: skip
            histogram = [[0.5] + [0.0] * 8 + [0.5]]
            phase["inside"] = {
                "text": "Brother Jacob",
                "tokens": 1024,
                "layers": [
                    {
                        "layer": layer,
                        "read_gate": {"mean": [0.1, 0.2], "histogram": histogram * 2},
                        "share": [0.01, 0.3],
                        "effective_tokens": [20.0, 400.0],
                        "stored_tokens": 460.0,
                        "write_gate": {"mean": [0.5], "histogram": histogram},
                    }
                    for layer in range(3)
                ],
            }
        if last or name == "teacher":
            state = [2_900_000, 2_900_000] if last else [23_000_000, 1_470_000_000]
            phase["speed"] = {
                "state": [
                    {"length": n, "bytes": b, "how": "measured"}
                    for n, b in zip((1024, 65536), state, strict=True)
                ],
                "decode": [
                    {
                        "length": n,
                        "tokens_per_second": 14.0 if last else 12.7 / (n / 1024) ** 0.8,
                        "steps": 12,
                    }
                    for n in (1024, 4096)
                ],
            }
        metrics["phases"][name] = phase
        metrics["wall_seconds"][name] = 60.0
    metrics["replaced"] = [
        {
            "layer": index,
            "path": f"model.layers.{index}.self_attn",
            "old_class": "LlamaAttention",
            "new_class": "ReplacedLlamaAttention",
            "parameters": 900_000,
            "state_bytes": 102_400,
            "magnitude": 0.4,
            "scale": 0.35,
            "clamp": 1e4,
            "output": {"mean": 0.0, "std": 0.2, "min": -4.1, "max": 5.0, "beyond_fp16": 0.0},
        }
        for index in range(30)
    ]
    conclude(metrics, dict(PARTS))
    return metrics


@pytest.fixture
def run() -> dict:
    """A fresh copy of a whole run's metrics."""
    return whole_run()


def training_log() -> list[dict]:
    """The lines of train.jsonl of such a run."""
    noise = random.Random(0)
    return [
        {
            "stage": stage,
            "step": step,
            "tokens": 1024 * (step + 1),
            "loss": (2.0 / (1 + step / 5) + 0.3) * (1 + 0.2 * noise.random()),
        }
        for stage, steps in ((1, 60), (2, 48), (3, 8))
        for step in range(steps)
    ]


@pytest.fixture
def train_log() -> list[dict]:
    """A fresh copy of a whole run's train.jsonl."""
    return training_log()


@pytest.fixture(scope="session")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole run with its report; shared, so tests leave it as it is."""
    folder = tmp_path_factory.mktemp("reported")
    write_metrics(folder, whole_run())
    (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in training_log()))
    (folder / "provenance.json").write_text('{"git": "abc"}')
    (folder / "config.json").write_text('{"budget": {"stage1": {"tokens": 2048, "length": 1024}}}')
    (folder / ".hydra").mkdir()
    (folder / ".hydra" / "overrides.yaml").write_text("- +exp=infini\n- seed=3\n")
    write_report(folder)
    return folder
