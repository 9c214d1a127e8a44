"""Perplexity of a held-out text, with what a comparison needs: protocol, interval, position buckets.

A text is tokenised as the tokenizer does by itself (no beginning-of-sequence token is added by hand), its
first `tokens` tokens are cut into windows of `length` that start every `stride` tokens, and every token that
has context in a window is scored once, by the window in which it has the most. Windows are independent of
each other: no state is carried over.
"""

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from eval.intervals import bootstrap
from eval.side_by_side import side_by_side
from eval.stored import kept
from replace.errors import UserError, bad_value

EDGES = (0, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
CHUNK = 256
"""Tokens whose logits are held in fp32 at once."""
CHARACTERS_PER_TOKEN = 12
"""More than an average token has, so that a long book need not be tokenised to its end."""


@kept
def perplexity(
    model,
    tokenizer,
    text: str,
    *,
    length: int,
    tokens: int,
    stride: int | None = None,
    batch: int = 1,
    seed: int = 0,
    label: str = "perplexity",
) -> dict:
    """The perplexity of `model` on the first `tokens` tokens of `text`.

    Args:
        length: tokens of a window.
        stride: distance of the windows' starts, 1..length; by default `length`, so that windows are disjoint.
        batch: windows of equal length at once, in one forward or, on a CPU, in one a core. The model's own
            forward is used, so a soft cap or a scale on the logits is honoured; they are held once, in the
            model's dtype, as [batch, length, V].
        seed: of the bootstrap over windows.

    Returns:
        {"ppl", "bits_per_byte", "tokens" (scored), "protocol", "interval", "by_position": [{"from", "to",
        "ppl", "tokens"}], "windows": [{"nll" (sum, natural log), "tokens"}]}. "ppl" is null with "why" if it
        is not finite.

    Raises:
        UserError: length, stride or tokens are not possible, or the text has fewer than two tokens.
    """
    stride = length if stride is None else stride
    if length < 2:
        raise bad_value("perplexity_length", length, "a whole number of at least 2")
    if not 1 <= stride <= length:
        raise bad_value("stride", stride, f"1 to {length}, the length of a window")
    ids, sizes = tokenise(tokenizer, text, tokens)
    spans = list(windows(len(ids), length, stride))
    row = torch.tensor(ids, dtype=torch.long)

    nll = np.zeros(len(ids))
    position = np.zeros(len(ids), dtype=np.int64)
    scored = np.zeros(len(ids), dtype=bool)
    sums = []
    device = model.get_input_embeddings().weight.device
    if device.type == "cpu":
        batch = max(1, batch // torch.get_num_threads())
    groups = list(batches(spans, batch))

    def losses_of(group: list[tuple[int, int, int]]) -> np.ndarray:
        rows = torch.stack([row[start:stop] for start, stop, _ in group]).to(device)
        return token_losses(model, rows).cpu().numpy()

    with torch.inference_mode():
        found = side_by_side(losses_of, groups, model)
        for group, losses in zip(tqdm(groups, desc=label, unit="window", leave=False), found, strict=True):
            for (start, stop, first), values in zip(group, losses, strict=True):
                nll[first:stop] = values[first - start - 1 :]
                position[first:stop] = np.arange(first - start, stop - start)
                scored[first:stop] = True
                sums.append({"nll": float(nll[first:stop].sum()), "tokens": stop - first})

    kind = "disjoint" if stride == length else "strided"
    dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else model.dtype
    dtype = str(dtype).removeprefix("torch.")
    result = {
        "tokens": int(scored.sum()),
        "protocol": f"{kind} windows of {length} tokens, stride {stride}, first {len(ids)} tokens, {dtype}",
        **summary(sums, seed),
        "bits_per_byte": None,
        "by_position": [],
        "windows": sums,
    }
    bytes_scored = int(sizes[scored].sum())
    if result["ppl"] is not None and bytes_scored:
        result["bits_per_byte"] = float(nll[scored].sum()) / math.log(2) / bytes_scored
    for low, high in zip(EDGES, (*EDGES[1:], math.inf), strict=True):
        inside = scored & (position >= low) & (position < high)
        if inside.any():
            value = exponential(float(nll[inside].mean()))
            bucket = {"from": low, "to": int(min(high, length)), "ppl": value, "tokens": int(inside.sum())}
            result["by_position"].append(bucket)
    return result


def tokenise(tokenizer, text: str, tokens: int) -> tuple[list[int], np.ndarray]:
    """The first `tokens` token ids of `text` and the UTF-8 bytes that each of them stands for.

    Bytes are counted up to each token's end from the end of the token before, so they add up to those of the
    text even where a tokenizer drops white space or splits one character over several tokens.
    """
    if tokens < 2:
        raise bad_value("perplexity_tokens", tokens, "a whole number of at least 2")
    part = text[: tokens * CHARACTERS_PER_TOKEN]
    fast = bool(getattr(tokenizer, "is_fast", False))
    encoded = tokenizer(part, return_offsets_mapping=fast, verbose=False)
    if len(encoded["input_ids"]) <= tokens and len(part) < len(text):
        part = text
        encoded = tokenizer(part, return_offsets_mapping=fast, verbose=False)
    ids = list(encoded["input_ids"])[:tokens]
    if len(ids) < 2:
        raise UserError(f"The text for perplexity has {len(ids)} tokens; at least 2 are needed.")
    if fast:
        ends = np.array([end for _, end in encoded["offset_mapping"]][: len(ids)])
        before = np.concatenate([[0], np.cumsum([len(character.encode()) for character in part])])
        return ids, np.diff(before[np.maximum.accumulate(ends)], prepend=0)
    return ids, np.array([len(tokenizer.decode([token]).encode()) for token in ids])


def windows(count: int, length: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """The windows over `count` tokens as (start, stop, first scored): no token is scored twice.

    A window's first token has no context there: where windows are disjoint it is not scored, nor is a last
    window of a single token.
    """
    scored_to = 0
    for start in range(0, count, stride):
        stop = min(start + length, count)
        first = max(scored_to, start + 1)
        if first >= stop:
            break
        yield start, stop, first
        scored_to = stop


def batches(spans: list[tuple[int, int, int]], batch: int) -> Iterator[list[tuple[int, int, int]]]:
    """Neighbouring windows of equal length, `batch` at a time: rows never need padding."""
    group: list[tuple[int, int, int]] = []
    for span in spans:
        if group and (len(group) == batch or span[1] - span[0] != group[0][1] - group[0][0]):
            yield group
            group = []
        group.append(span)
    if group:
        yield group


def token_losses(model, rows: Tensor) -> Tensor:
    """-log p of each next token, natural logarithm, in fp32: rows [B, T] -> [B, T - 1]."""
    logits = model(input_ids=rows, use_cache=False).logits
    losses = [
        F.cross_entropy(
            logits[:, start : min(start + CHUNK, rows.shape[1] - 1)].float().flatten(0, 1),
            rows[:, start + 1 : start + CHUNK + 1].flatten(),
            reduction="none",
        ).view(rows.shape[0], -1)
        for start in range(0, rows.shape[1] - 1, CHUNK)
    ]
    return torch.cat(losses, dim=1)


def summary(sums: list[dict], seed: int = 0) -> dict:
    """{"ppl", "interval"} of window sums as `perplexity` gives them; the interval is a bootstrap."""
    nll = np.array([window["nll"] for window in sums])
    tokens = np.array([window["tokens"] for window in sums])
    value = exponential(float(nll.sum() / tokens.sum()))
    if value is None:
        return {"ppl": None, "interval": None, "why": "the loss is not finite"}
    interval = bootstrap(len(sums), lambda draw: math.exp(nll[draw].sum() / tokens[draw].sum()), seed=seed)
    return {"ppl": value, "interval": interval}


def exponential(loss: float) -> float | None:
    """e to the loss, or None where that is not a finite number."""
    return math.exp(loss) if math.isfinite(loss) and loss < 700 else None
