"""The facts as one screen of plain text."""

import textwrap
from typing import Any

from replace.doctor.advice import SUPPORT

WIDTH = 110
LABEL = 13
GLUE = "\0"
"""A space at which no line is broken."""


def screen(facts: dict[str, Any]) -> str:
    """All of it: what there is, what `auto` takes, what is supported, what is wrong and how to mend it."""
    lines = [*_machine(facts), "", *_choices(facts), "", *_support(facts), ""]
    problems = facts["problems"]
    for number, problem in enumerate(problems, 1):
        word = "hinders a run" if problem["hinders"] else "does not hinder a run"
        lines += _wrapped(f"{number}. ", f"{problem['what']} [{word}]")
        lines += _wrapped("   mend: ", problem["mend"])
    hindering = sum(problem["hinders"] for problem in problems)
    if problems:
        lines.append("")
    lines.append(
        "Nothing hinders a run."
        if not hindering
        else f"{hindering} problem{'s' if hindering > 1 else ''} hinder{'' if hindering > 1 else 's'} a run."
    )
    return "\n".join(lines) + "\n"


def _machine(facts: dict[str, Any]) -> list[str]:
    python, torch, memory = facts.get("python", {}), facts.get("torch", {}), facts.get("memory", {})
    cuda = torch.get("cuda") or ("ROCm " + torch["rocm"] if torch.get("rocm") else "none")
    gpus = [
        f"{gpu['name']}, {gpu['architecture']}, {_free(gpu['free_bytes'], gpu['total_bytes'])}"
        for gpu in torch.get("gpus") or []
    ]
    listed = facts.get("nvidia_gpus") or []
    if not gpus:
        gpus = [f"{name} (torch does not see it)" for name in listed] or (
            ["Apple's GPU"] if torch.get("mps") else ["none"]
        )
    places, caches = facts.get("places", {}), facts.get("caches", {})
    sizes = [
        f"{one['place']} {_size(one['bytes'])}{'' if one['whole'] else ' or more'} ({name})"
        for name, one in caches.items()
    ]
    free = [
        f"{_size(place.get('free_bytes'))} at the {'cache' if name == 'cache' else 'outputs'}"
        f"{', which cannot be written' if place.get('unwritable') else ''}"
        for name, place in places.items()
    ]
    wandb = facts.get("wandb", {})
    rows = {
        "Python": f"{python.get('version')}, {python.get('system')}, {python.get('environment')}",
        "torch": f"{torch.get('version') or 'cannot be imported'}, CUDA {cuda}",
        "GPU": "; ".join(gpus),
        "memory": _free(memory.get("available_bytes"), memory.get("total_bytes")),
        "disk free": ", ".join(free),
        "precision": facts.get("precision_advice"),
        "libraries": ", ".join(_library(name, one) for name, one in facts.get("libraries", {}).items()),
        "W&B": f"{wandb.get('mode')} ({wandb.get('why')})",
        "caches": ", ".join(sizes),
    }
    return [line for label, text in rows.items() for line in _wrapped(f"{label:{LABEL}}", str(text))]


def _choices(facts: dict[str, Any]) -> list[str]:
    """What the word auto stands for on this machine."""
    run = facts.get("run", {})
    unknown = "not known, since a run's code cannot be imported"
    kernels, softmax, lora = run.get("kernels"), run.get("softmax"), run.get("lora")
    refused = "; ".join(f"{n}: {why}" for n, why in (softmax or {}).get("refused", {}).items())
    rows = {
        "kernels": f"{kernels['choice']} ({kernels['why']}); a run takes chunk unless told"
        if kernels
        else unknown,
        "softmax": f"{softmax['choice']}{f' (not {refused})' if refused else ''}" if softmax else unknown,
        "precision": f"{run['dtype']} on {run['device']}" if "dtype" in run else unknown,
        "lora": f"{lora['choice']} ({lora['why']})" if lora else unknown,
    }
    lines = [line for label, text in rows.items() for line in _wrapped(f"  {label:{LABEL - 2}}", text)]
    return ["auto takes", *lines]


def _support(facts: dict[str, Any]) -> list[str]:
    rows = [("support", "CUDA", "CPU", "macOS"), *((label, *cells) for label, cells in SUPPORT.items())]
    return [f"{row[0]:17}{row[1]:34}{row[2]:26}{row[3]}" for row in rows]


def _library(name: str, one: dict[str, Any]) -> str:
    if one["state"] == "absent":
        return f"{name}{GLUE}-"
    words = [name, one["version"] or "", "BROKEN" if one["state"] == "broken" else ""]
    return GLUE.join(filter(None, words))


def _free(count: int | None, total: int | None) -> str:
    return f"{_size(count)} of {_size(total)} free"


def _size(count: int | None) -> str:
    if not count:
        return "?" if count is None else "nothing"
    return f"{count / 1e9:.1f} GB" if count >= 10**8 else f"{count / 1e6:.1f} MB"


def _wrapped(label: str, text: str) -> list[str]:
    """A label and a text beside it; nothing is cut."""
    lines = textwrap.wrap(
        text,
        WIDTH,
        initial_indent=label,
        subsequent_indent=" " * len(label),
        break_long_words=False,
        break_on_hyphens=False,
    )
    return [line.replace(GLUE, " ") for line in lines] or [label.rstrip()]
