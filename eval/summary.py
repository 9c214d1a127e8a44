"""The first paragraph of the report: what was replaced, lost and won back, and the computed verdict."""

from eval.explaining import who_carries
from eval.metrics import comparable
from eval.plots import PHASE_WORDS
from eval.words import PART_WORDS, exact, listed, percent, recall_at, recall_lengths, recall_means


def summary(metrics: dict, student: str | None) -> str:
    """What was replaced, lost and won back, and the verdict, in plain words."""
    phases = metrics["phases"]
    if student is None or "parts" not in metrics or not metrics["parts"].get("replaced"):
        return f"{metrics['model']} was measured as it is: no attention layer was replaced."
    parts = metrics["parts"]
    remaining = parts["full_attention"]
    count = parts["replaced"]
    which = f"{count} of {count + remaining}" if remaining else f"All {count}"
    sentences = [f"{which} attention layers of {metrics['model']} were replaced by `{metrics['attention']}`."]
    sentences += _lost(phases, student)
    sentences += _won_back(metrics, student)
    sentences += _in_words(metrics)
    if remaining:
        sentences.append(f"Layers that still have full attention and can carry a fact alone: {remaining}.")
    sentences.append(who_carries(metrics))
    sentences += _kept(phases, student)
    distractors = [pooled for pooled in recall_means(phases[student]) if pooled["distractors"]]
    if distractors:
        said = [
            f"{exact(pooled)} with {pooled['distractors']} other facts of the same form "
            f"in {pooled['length']:,} tokens"
            for pooled in distractors
        ]
        teacher = [pooled for pooled in recall_means(phases.get("teacher", {})) if pooled["distractors"]]
        beside = f" (the teacher: {exact(teacher[0])})" if teacher else ""
        sentences.append(f"Recall among competing facts is {'; '.join(said)}{beside}.")
    return " ".join(filter(None, sentences))


def _lost(phases: dict, student: str) -> list[str]:
    """What the untrained swap cost."""
    if "teacher" not in phases or "swapped" not in phases:
        missing = " and ".join(name for name in ("teacher", "swapped") if name not in phases)
        return [f"What the swap lost was not measured ({missing} not measured)."]
    lost = []
    teacher, swapped = comparable(phases["teacher"]), comparable(phases["swapped"])
    for corpus, entry in teacher.get("perplexity", {}).items():
        after = swapped.get("perplexity", {}).get(corpus)
        if after and after.get("ppl") and entry.get("ppl"):
            change = percent(after["ppl"] / entry["ppl"] - 1)
            lost.append(
                f"perplexity on {corpus} went from {entry['ppl']:.2f} to {after['ppl']:.2f} ({change})"
            )
    for length in recall_lengths(swapped):
        before, after = recall_at(teacher, length), recall_at(swapped, length)
        if before and after:
            lost.append(
                f"recall at {length:,} tokens went from {before['exact']:.2f} to {after['exact']:.2f}"
            )
    return [f"Untrained, {listed(lost)}."] if lost else []


def _won_back(metrics: dict, student: str) -> list[str]:
    """Where the trained student stands."""
    phases = metrics["phases"]
    if student == "swapped":
        return ["Nothing was trained."]
    stands = []
    for corpus, entry in phases[student].get("perplexity", {}).items():
        teacher = phases.get("teacher", {}).get("perplexity", {}).get(corpus)
        if entry.get("ppl"):
            beside = (
                f" ({percent(entry['ppl'] / teacher['ppl'] - 1)} against the teacher)"
                if teacher and teacher.get("ppl")
                else ""
            )
            stands.append(f"perplexity on {corpus} is {entry['ppl']:.2f}{beside}")
    for length in recall_lengths(phases[student]):
        pooled = recall_at(phases[student], length)
        if pooled:
            stands.append(f"recall at {length:,} tokens is {exact(pooled)}")
    sentences = [f"After {PHASE_WORDS[student]}, {listed(stands)}."] if stands else []
    shares = [
        f"{100 * entry['value']:.0f} % of {_metric(name)}"
        for name, entry in metrics.get("recovery", {}).items()
        if entry.get("value") is not None
    ]
    return [*sentences, f"Of what was lost, {listed(shares)} came back."] if shares else sentences


def _kept(phases: dict, student: str) -> list[str]:
    """The bytes that are kept between tokens, beside the teacher's."""
    mine = (phases[student].get("speed") or {}).get("state", [])
    theirs = (phases.get("teacher", {}).get("speed") or {}).get("state", [])
    if not mine:
        return []
    said = [f"{row['bytes'] / 1e6:,.2f} MB at {row['length']:,} tokens" for row in mine]
    beside = [f"{row['bytes'] / 1e6:,.2f} MB at {row['length']:,}" for row in theirs]
    return [f"It keeps {listed(said)}" + (f"; the teacher {listed(beside)}." if beside else ".")]


def _metric(name: str) -> str:
    """The name of a figure in `recovery`, in words."""
    kind, _, corpus = name.partition("/")
    return f"{kind} on {corpus}" if corpus else kind


def _in_words(metrics: dict) -> list[str]:
    """The computed verdict as a sentence."""
    result = metrics.get("verdict")
    if not result:
        return ["Verdict on the memory: not measured: no ablation was run."]
    said = []
    for part, words in PART_WORDS.items():
        if part in result:
            detail = result["details"][part]
            said.append(
                f"{words} **{result[part] or 'not judged'}**"
                + ("" if result[part] else f" ({detail['why']})")
            )
    return [f"Computed verdict: {'; '.join(said)}."]
