"""The tuning with adapters: who made them, on what, and what the held-out chats say."""

from eval.sections import SECTIONS, Section
from eval.words import DASH, short


def tuning(phases: dict, names: list[str]) -> str:
    """One paragraph, and the loss on conversations that were not trained on."""
    found = phases[names[-1]]["tuning"]
    data = found["data"]
    read = (
        f"{data['read']:,} of {data['conversations']:,} conversations" if data["kind"] == "chat" else "text"
    )
    lines = [
        f"Adapters of rank {found['rank']} by {found['backend']} ({found['why']}) on "
        f"{', '.join(f'`{target}`' for target in found['targets'])}, trained on {read} and merged into the "
        f"weights; so merged, the logits differ by {found['merge_difference']:.1e} of their size."
    ]
    held_out = found.get("held_out")
    if held_out is None:
        return "\n".join([*lines, "", "Loss on held-out chats: not measured: the data are text"])
    error = DASH if held_out["standard_error"] is None else short(held_out["standard_error"])
    lines += [
        "",
        "| loss on held-out chats, nats a token of the assistant's turns | before | after | difference |",
        "|---|---|---|---|",
        f"| {held_out['tokens']:,} tokens in {held_out['rows']} rows | {held_out['before']:.3f} "
        f"| {held_out['after']:.3f} | {held_out['difference']:+.3f} ± {error} |",
        "",
        "±: one standard error, paired by rows.",
    ]
    return "\n".join(lines)


SECTIONS.register("tuning")(Section("Tuning with adapters", "tuning", tuning))
