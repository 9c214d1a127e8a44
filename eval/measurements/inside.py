"""Where a memory works and where it is idle: gates, shares and reads of each head, on a held-out row.

What a mixer is given is recorded once, in one forward of the model; it is then asked again with its parts
off, which every variant knows (`BlockMixer.off`). Nothing here knows a variant's equations:

- exact: with the memory off; answer: with the window off, A_mem alone; out: as it is
- out = g answer + (1 - g) exact gives the read gate g of each token and head: under a gate of its own that
  gate, under a shared denominator the memory's share of it. Tokens before which nothing was stored are left
  out. Where the equation does not hold the variant joins its parts in another way, and there is no gate.
- |g A_mem| / |out|: root mean squares over those tokens
- the read's entropy: with values 1 and with random signs in place of the stored ones the answer is the sum of
  its weights and, squared and averaged over the width, the sum of their squares, since a memory is linear
  in what it stores. (sum)^2 / (sum of squares) is the effective number of tokens that a read is spread over,
  and its logarithm the Renyi entropy of order 2; the figure is the geometric mean over tokens, beside that of
  the number stored. Below 1 the weights cancel each other, as a delta rule's may.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from eval.measurements import MEASUREMENTS
from eval.perplexity import tokenise
from replace.config import Config
from replace.convert import attention_layers

BINS = 10
"""Of a histogram over 0..1."""
FITS = 1e-2
"""Largest error of out = g answer + (1 - g) exact, relative to out."""
SEED = 0


@dataclass
class Given:
    """What a mixer was given in one forward: query `[B, H, T, D]`, key and value `[B, G, T, D]`, the rest."""

    mixer: Any
    query: Tensor
    key: Tensor
    value: Tensor
    call: Any

    def ask(self, *off: str, value: Tensor | None = None) -> Tensor:
        """The mixer's output `[B, H, T, D]` in fp32 with parts off; the mixer is left as it was."""
        mixer = self.mixer
        before = {name: getattr(mixer, name) for name in ("off", "calls", "clamped", "nonfinite")}
        try:
            mixer.off = mixer.off | frozenset(off)
            value = self.value if value is None else value
            return mixer(self.query.float(), self.key.float(), value.float(), self.call)
        finally:
            for name, held in before.items():
                setattr(mixer, name, held)


@contextmanager
def listening(model: nn.Module) -> Iterator[dict[int, Given]]:
    """Within the block every call of a mixer without a cache is recorded, by the index of its layer."""
    given: dict[int, Given] = {}

    def recorder(index: int):
        def record(mixer: nn.Module, arguments: tuple) -> None:
            given[index] = Given(mixer, *arguments)

        return record

    found = [(module.layer_idx, getattr(module, "mixer", None)) for _, module in attention_layers(model)]
    hooks = [mixer.register_forward_pre_hook(recorder(index)) for index, mixer in found if mixer is not None]
    try:
        yield given
    finally:
        for hook in hooks:
            hook.remove()


@MEASUREMENTS.register("inside")
@torch.no_grad()
def inside(model, tokenizer, config: Config, using) -> dict:
    """Every layer's gates, shares and reads on the beginning of a held-out text.

    Returns:
        {"inside": {"text", "tokens", "layers": [{"layer", "read_gate": {"mean": [H], "histogram": [H][BINS]
        (shares)}, "share": [H], "effective_tokens": [H], "stored_tokens", "write_gate": {"mean": [G],
        "histogram": [G][BINS]}}]}}. What a layer has no part for is null, with "why".
    """
    name, text = next(iter((using.dev or using).books.items()))
    ids, _ = tokenise(tokenizer, text, config.budget.eval.perplexity_length)
    replaced = [module for _, module in attention_layers(model) if getattr(module, "mixer", None) is not None]
    if not replaced:
        return {"inside": {"text": name, "tokens": len(ids), "layers": [], "why": "no layer was replaced"}}
    with listening(model) as given:
        rows = torch.tensor([ids], device=model.get_input_embeddings().weight.device)
        model(input_ids=rows, use_cache=False, logits_to_keep=1)
    layers = []
    for module in replaced:
        row: dict = {"layer": module.layer_idx}
        if module.layer_idx not in given:
            layers.append(row | _nothing("the teacher's own attention stands here"))
        else:
            layers.append(row | look_inside(given[module.layer_idx]))
    return {"inside": {"text": name, "tokens": len(ids), "layers": layers}}


def look_inside(given: Given) -> dict:
    """The figures of one layer."""
    if not getattr(given.mixer, "has_memory", False):
        return _nothing("this layer has no linear memory")
    out, exact, answer = given.ask(), given.ask("memory"), given.ask("window")
    # Where nothing is stored no memory answers in the window's place, so switching it off changes nothing.
    alone = answer - given.ask("window", "memory")
    held = alone.square().sum(-1) > 1e-12 * answer.square().sum(-1)  # [B, H, T]
    apart = answer - exact
    size = apart.square().sum(-1)
    if not bool(held.any()):
        return _nothing("the row is too short for anything to be stored")
    gate = ((out - exact) * apart).sum(-1) / torch.where(size > 0, size, 1)
    error = (out - exact - gate.unsqueeze(-1) * apart)[held].norm() / out[held].norm()
    result: dict = {"write_gate": _write_gate(given)}
    if not float(error) < FITS:
        why = "this variant does not join its parts by a gate"
        result |= {
            name: value for name, value in _nothing(why).items() if name in ("read_gate", "share", "why")
        }
    else:
        told = gate.unsqueeze(-1) * answer
        result["read_gate"] = _spread(gate, held)
        result["share"] = [_ratio(told[:, h][held[:, h]], out[:, h][held[:, h]]) for h in range(out.shape[1])]
    return result | _reads(given, held)


def _reads(given: Given, held: Tensor) -> dict:
    """Over how many tokens a read is spread, `[H]`, and how many there are."""
    generator = torch.Generator().manual_seed(SEED)
    signs = torch.randint(0, 2, given.value.shape, generator=generator).to(given.value.device) * 2.0 - 1
    signs[..., 0] = 1
    answer = given.ask("window", value=signs)
    tokens = answer[..., 0].square() / answer[..., 1:].square().mean(-1)
    spread = [_geometric(tokens[:, h][held[:, h]]) for h in range(tokens.shape[1])]
    block, lookback = given.mixer.block, given.mixer.lookback
    place = torch.arange(held.shape[2], device=held.device)
    stored = (block * (place // block - lookback) - given.mixer.options.sinks).clamp_min(1)
    return {"effective_tokens": spread, "stored_tokens": _geometric(stored.expand_as(held)[held].float())}


def _write_gate(given: Given) -> dict | None:
    weights = getattr(given.mixer, "write_weights", lambda hidden: None)(given.call.hidden)
    return None if weights is None else _spread(weights, torch.ones_like(weights, dtype=torch.bool))


def _spread(x: Tensor, counted: Tensor) -> dict:
    """{"mean", "histogram"} of each head of `x [B, H, T]` over the tokens that count."""
    means, shares = [], []
    for head in range(x.shape[1]):
        values = x[:, head][counted[:, head]].float().cpu().numpy()
        found, _ = np.histogram(values.clip(0, 1), bins=BINS, range=(0, 1))
        means.append(float(values.mean()) if len(values) else None)
        shares.append((found / max(1, len(values))).round(4).tolist())
    return {"mean": means, "histogram": shares}


def _geometric(x: Tensor) -> float | None:
    """The geometric mean of what is finite and above 0."""
    x = x[x.isfinite() & (x > 0)]
    return float(x.log().mean().exp()) if len(x) else None


def _ratio(part: Tensor, whole: Tensor) -> float | None:
    size = float(whole.float().norm())
    return float(part.float().norm()) / size if size else None


def _nothing(why: str) -> dict:
    return dict.fromkeys(("read_gate", "share", "effective_tokens", "stored_tokens", "write_gate")) | {
        "why": why
    }
