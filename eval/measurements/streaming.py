"""Streaming perplexity: one pass over a whole held-out book, the state carried from first token to last.

Beside it the teacher with a sliding window and sinks of the same bytes: its own weights, untrained, in the
variant `sliding_window`. The teacher as it is cannot be measured like that, because it has not the positions.
"""

import math
from itertools import pairwise

import numpy as np
import torch
from torch.nn import functional as F

from eval.ablation import ablate, parts_of
from eval.intervals import bootstrap
from eval.measurements import MEASUREMENTS
from eval.perplexity import CHUNK, summary, tokenise
from eval.stream import PIECE, Reach, Stream, device_of, pieces, positions_of, reach_of
from replace.choice import layers_of
from replace.config import AttentionConfig, Config
from replace.convert import SwapSpec, restore, swap
from replace.loading import load_model
from replace.precision import cast_once

OFF_TOKENS = 16384
"""Tokens that are read once more with linear memory and retained pairs switched off."""
SEED = 0


@MEASUREMENTS.register("streaming")
def streaming(model, tokenizer, config: Config, using) -> dict:
    """{"streaming": {"book", "ppl", ...: see `read_book`, "off", "teacher_window", "against_teacher"}}.

    "off": the first tokens again without memory and pairs, and "against_on", their perplexity over the same
    tokens' with them.
    "against_teacher": the student's perplexity over that of the teacher's window, paired by piece.
    What cannot be measured has null and "why".
    """
    book, text = max(using.books.items(), key=lambda item: len(item[1]))
    ids, sizes = tokenise(tokenizer, text, config.eval.stream_tokens)
    reach = reach_of(model)
    about = {"book": book, "tokens": len(ids) - 1}
    if reach.limit is not None:
        why = f"the state of its {reach.full} layers with full attention grows with the text"
        if not reach.full:
            why = f"it has no more than {reach.limit} positions"
        return {"streaming": {**about, "ppl": None, "why": why}}
    result = {**about, **read_book(model, reach, ids, sizes, "streaming perplexity")}
    parts = parts_of(model)
    if parts["memory"] or parts["pairs"]:
        with ablate(model, memory=True, pairs=True):
            off = read_book(model, reach, ids[:OFF_TOKENS], sizes, "streaming, memory and pairs off")
        result["off"] = off | {"against_on": against(off["pieces"], result["pieces"])}
    beside = teacher_window(config, model, tokenizer, ids, sizes, result["bytes"])
    result["teacher_window"] = beside
    if beside["ppl"] is not None and result["ppl"] is not None:
        result["against_teacher"] = against(result["pieces"], beside["pieces"])
    return {"streaming": result}


def read_book(model, reach: Reach, ids: list[int], sizes: np.ndarray, label: str) -> dict:
    """One pass over `ids`.

    Args:
        sizes: UTF-8 bytes of each token, at least as many as `ids`.

    Returns:
        {"tokens" (scored), "ppl", "interval" (bootstrap over pieces), "bits_per_byte", "by_position": [{
        "from", "to", "ppl", "interval", "tokens"}] by powers of two, "pieces": [{"nll", "tokens"}], "bytes"
        (of the state after the last piece), "constant" (they were the same after every piece), "protocol"}.
    """
    row = torch.tensor([ids], device=device_of(model))
    stream, nll, held = Stream(model, reach), np.zeros(len(ids)), []
    for piece in pieces(row[:, :-1], label=label):
        start = stream.tokens
        logits = stream.feed(piece, keep=0)[0]
        stop = start + piece.shape[1]
        for first in range(start, stop, CHUNK):
            last = min(first + CHUNK, stop)
            loss = F.cross_entropy(
                logits[first - start : last - start].float(), row[0, first + 1 : last + 1], reduction="none"
            )
            nll[first + 1 : last + 1] = loss.cpu().numpy()
        held.append(stream.bytes())
    result = {
        "tokens": len(ids) - 1,
        **_figure(nll, 1, len(ids)),
        "bits_per_byte": None,
        "by_position": [],
        "pieces": _pieces(nll, 1, len(ids)),
        "bytes": held[-1],
        "constant": len(set(held)) == 1,
        "protocol": f"one pass in pieces of {PIECE} tokens, the state of {held[-1]:,} bytes carried",
    }
    if result["ppl"] is not None:
        result["bits_per_byte"] = float(nll.sum() / math.log(2) / sizes[1 : len(ids)].sum())
    low, high = 1, 64
    while low < len(ids):
        stop = min(high, len(ids))
        figure = _figure(nll, low, stop)
        place = {"from": 0 if low == 1 else low, "to": stop, "tokens": stop - low}
        result["by_position"].append(place | figure)
        low, high = high, 2 * high
    return result


def teacher_window(config: Config, student, tokenizer, ids: list[int], sizes: np.ndarray, size: int) -> dict:
    """The teacher of `config` with a window and sinks that take `size` bytes, on the same tokens.

    Returns:
        as `read_book`, with "window" and "sinks" in tokens; or {"ppl": None, "why"}.
    """
    teacher = load_model(config.model).model.to(device_of(student))  # type: ignore[arg-type]
    teacher.eval().requires_grad_(False)
    if parts_of(teacher)["replaced"]:
        return {"ppl": None, "why": "the model that was given is the student itself; there is no teacher"}
    with cast_once(teacher, config.precision):
        options = window_of(teacher, size)
        swap(teacher, SwapSpec(dict.fromkeys(layers_of(teacher), options)))
        result = read_book(teacher, reach_of(teacher), ids, sizes, "streaming, teacher with a window")
    result["protocol"] += (
        f"; the teacher's own weights, every layer with a sliding window of {options.window} tokens (and the "
        f"own block of {options.block}) and {options.sinks} sinks, because the teacher has no more than "
        f"{positions_of(teacher)} positions"
    )
    return result | {"window": options.window, "sinks": options.sinks}


def window_of(teacher, size: int) -> AttentionConfig:
    """The sliding window, sinks and own block that take at least `size` bytes in a teacher's cache.

    A window that would need more positions than the teacher has is as long as those allow.
    """
    room = math.ceil(size / bytes_of_a_token(teacher))
    block = max(1, min(32, room // 4))
    sinks = min(4, block)
    blocks = max(1, math.ceil((room - sinks - block) / block))
    limit = positions_of(teacher)
    if limit is not None:
        blocks = max(1, min(blocks, limit // block - 1))
    span = (blocks + 1) * block
    cap = max(span, min(512, limit or 512))
    return _window(block, blocks * block, sinks, cap)


def bytes_of_a_token(teacher) -> float:
    """Bytes of one place in the window that `window_of` describes, in the precision that is measured.

    It is tried out, since an ordinary cache may hold wider numbers than a window does. The teacher is swapped
    and restored.
    """
    swap(teacher, SwapSpec(dict.fromkeys(layers_of(teacher), _window(PROBE, PROBE, 0, None))))
    stream = Stream(teacher)
    stream.feed(torch.zeros(1, 2, dtype=torch.long, device=device_of(teacher)))
    restore(teacher)
    return stream.bytes() / (2 * PROBE)


def _window(block: int, window: int, sinks: int, cap: int | None) -> AttentionConfig:
    return AttentionConfig(
        name="sliding_window",
        block=block,
        window=window,
        sinks=sinks,
        pairs=0,
        distance_cap=cap,
        write_gate="none",
    )


PROBE = 16
"""Block and window of the trial."""


def against(mine: list[dict], theirs: list[dict]) -> dict:
    """{"ratio", "interval"}: one perplexity over another on the pieces of both, bootstrapped in pairs."""
    both = [
        (a["nll"], b["nll"], a["tokens"])
        for a, b in zip(mine, theirs, strict=False)
        if a["tokens"] == b["tokens"]
    ]
    a, b, tokens = np.array(both).T

    def ratio(draw: np.ndarray) -> float:
        return math.exp((a[draw].sum() - b[draw].sum()) / tokens[draw].sum())

    return {"ratio": ratio(np.arange(len(a))), "interval": bootstrap(len(a), ratio, seed=SEED)}


def _pieces(nll: np.ndarray, start: int, stop: int) -> list[dict]:
    """Sums over pieces whose borders are multiples of PIECE."""
    edges = [start, *range(PIECE * (start // PIECE + 1), stop, PIECE), stop]
    return [{"nll": float(nll[a:b].sum()), "tokens": b - a} for a, b in pairwise(edges)]


def _figure(nll: np.ndarray, start: int, stop: int) -> dict:
    """{"ppl", "interval"} of the tokens start..stop."""
    return summary(_pieces(nll, start, stop), SEED)
