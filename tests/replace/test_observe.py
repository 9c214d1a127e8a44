"""Looking at the teacher changes nothing, and what is seen is its attention."""

import itertools
import math

import pytest
import torch

from replace.config import ModelConfig
from replace.convert import attention_layers
from replace.loading import load_model
from replace.observe import Attending, later_attention, observe
from replace.tiny import tiny_model

CHUNK = 6


def brute_force(attending, real, gap):
    """The largest attention of any counted query, one softmax at a time, written out.

    A query counts for a key if its chunk begins at least `gap` after the key.
    """
    query, key = attending.query, attending.key
    (batch, heads, length, _), groups = query.shape, key.shape[1]
    best = torch.zeros(batch, groups, length)
    for b, h, t in itertools.product(range(batch), range(heads), range(length)):
        if not real[b, t]:
            continue
        g, window = h // (heads // groups), attending.sliding_window or length
        seen = [j for j in range(max(0, t + 1 - window), t + 1) if real[b, j]]
        logits = [float(query[b, h, t] @ key[b, g, j]) * attending.scaling for j in seen]
        if attending.softcap is not None:
            logits = [attending.softcap * math.tanh(x / attending.softcap) for x in logits]
        total = sum(math.exp(x) for x in logits)
        if attending.sink_logit is not None:
            total += math.exp(float(attending.sink_logit[h]))
        for j, x in zip(seen, logits, strict=True):
            if j < t // CHUNK * CHUNK - gap:
                best[b, g, j] = max(best[b, g, j], math.exp(x) / total)
    return best


KINDS = {
    "plain": {},
    "window": {"sliding_window": 9},
    "softcap": {"softcap": 0.7},
    "sinks": {"sink_logit": torch.tensor([2.0, -1.0, 0.5, 3.0])},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("padded", [None, torch.bool, torch.float32])
@pytest.mark.parametrize("length", [1, 8, 27])
def test_later_attention_is_the_largest_probability_of_a_later_query(length, kind, padded, monkeypatch):
    monkeypatch.setattr("replace.observe.CHUNK", CHUNK)
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, length, 8, generator=generator)
    key = torch.randn(2, 2, length, 8, generator=generator)
    real, mask = torch.ones(2, length, dtype=torch.bool), None
    if padded is not None:
        real[0, : length // 3], real[1, length - length // 4 :] = False, False
        mask = (real[:, None, None] & torch.ones(length, length).tril().bool()).contiguous()
    if padded == torch.float32:
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    attending = Attending(query, key, 0.5, mask, **KINDS[kind])
    got = later_attention(attending, gap=3)
    assert torch.allclose(got, brute_force(attending, real, 3), atol=1e-6)


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gpt_oss", "qwen2_moe"])
@torch.no_grad()
def test_what_is_observed_is_how_the_teacher_attends(family):
    """Its weights, from what the observer was told, are those that the eager forward gives out."""
    kinds = {"use_sliding_window": True, "layer_types": ["sliding_attention", "full_attention"] * 2}
    changes = {"sliding_window": 7, "initializer_range": 0.5, **({} if family == "mistral" else kinds)}
    model = tiny_model(family, **changes)
    model.set_attn_implementation("eager")
    ids, mask = torch.randint(3, 60, (2, 20)), torch.ones(2, 20, dtype=torch.long)
    mask[0, :5] = 0
    told = []
    with observe([m for _, m in attention_layers(model)], lambda module, attending: told.append(attending)):
        model(ids, attention_mask=mask, use_cache=False)
    weights = model(ids, attention_mask=mask, use_cache=False, output_attentions=True).attentions
    assert len(told) == len(weights) == 4
    for attending, want in zip(told, weights, strict=True):
        got = attending.log_weights(0, 20).exp().flatten(1, 2)
        torch.testing.assert_close(got[0, :, 5:], want[0, :, 5:])
        torch.testing.assert_close(got[1], want[1])
        assert not got[0, :, :5].any()


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_observing_changes_no_logit_and_leaves_nothing_behind(family):
    model = load_model(ModelConfig(kind="tiny", family=family)).model.eval()
    layers = [module for _, module in attention_layers(model)]
    configs = [module.config for module in layers]
    ids = torch.randint(0, 100, (1, 20))
    want, seen = model(ids).logits, []
    with observe(layers, lambda module, attending: seen.append((module, attending))):
        got = model(ids).logits
    assert torch.equal(got, want)
    assert [module for module, _ in seen] == layers
    for module, attending in seen:
        assert attending.key.shape[1] == layers[0].config.num_key_value_heads
        assert attending.scaling == module.scaling
        assert attending.softcap == getattr(module, "attn_logit_softcapping", None)
    assert all(module.config is config for module, config in zip(layers, configs, strict=True))
    assert not any(hasattr(module, "layer_replace_observer") for module in layers)
