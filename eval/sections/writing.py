"""The report's section on how the model writes."""

from eval.sections import SECTIONS, Section
from eval.words import DASH, bounds, inline, short

SHOWN = 5
"""Continuations in the gallery."""
LAST = 80
"""Characters of a prompt that are shown."""


def writing(phase: dict) -> str:
    """Markdown: the figures beside the teacher's, and the most changed continuations."""
    found = phase.get("writing")
    if not found:
        return "not measured: not part of this run's plan (`eval=writing`)"
    theirs = found.get("teacher") or {}
    lines = ["| figure | model | teacher |", "|---|---|---|"]
    lines.append(f"| repeated 4-grams | {_share(found)} | {_share(theirs)} |")
    for length in found["distinct"]:
        beside = short(theirs.get("distinct", {}).get(length))
        lines.append(f"| distinct {length}-grams | {short(found['distinct'][length])} | {beside} |")
    kl = found["kl"]
    if kl.get("value") is None:
        lines += ["", f"KL to the teacher on its own continuations: not measured: {kl['why']}."]
    else:
        losses = f"{short(kl['teacher_loss'])} | {short(kl['own_loss'])}"
        lines += [
            f"| the teacher's loss on this text, nats a token | {losses} |",
            "",
            f"Greedy, {found['prompts']} prompts, {found['tokens']} tokens. KL to the teacher on the model's "
            f"own continuations: {kl['value']:.3f} {bounds(kl['interval'], '.3f')} nats a token. The first "
            f"{found['agreement']:.0%} of a continuation are the teacher's.",
        ]
    if any(row["change"] is not None for row in found["continuations"]):
        lines += [
            "",
            "The most changed continuations:",
            "",
            "| prompt | model | teacher | changed |",
            "|---|---|---|---|",
        ]
        for row in found["continuations"][:SHOWN]:
            prompt = inline(row["prompt"] if len(row["prompt"]) <= LAST else "…" + row["prompt"][-LAST:])
            lines.append(
                f"| {prompt} | {inline(row['text'])} | {inline(row['teacher'])} | {row['change']:.0%} |"
            )
    return "\n".join(lines)


def _share(figures: dict) -> str:
    share = figures.get("repetition")
    return DASH if share is None else f"{share:.1%}"


SECTIONS.register("writing")(Section("Writing", "writing", lambda phases, names: writing(phases[names[-1]])))
