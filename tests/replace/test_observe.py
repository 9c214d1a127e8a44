"""Looking at the teacher changes nothing, and what is seen is its attention."""

import pytest
import torch

from replace.config import ModelConfig
from replace.convert import attention_layers
from replace.loading import load_model
from replace.observe import CHUNK, later_attention, observe
from replace.retrieval import retrieval_layers


def brute_force(query, key, scaling, gap):
    """The largest attention of any counted query: those whose chunk begins at least `gap` after the key."""
    heads, groups, length = query.shape[1], key.shape[1], query.shape[2]
    logits = query @ key.repeat_interleave(heads // groups, 1).transpose(-1, -2) * scaling
    logits = logits.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
    probability = logits.softmax(-1).unflatten(1, (groups, heads // groups)).amax(2)  # [B, G, T, T]
    begin = torch.arange(length) // CHUNK * CHUNK
    counted = torch.arange(length) < (begin - gap).unsqueeze(-1)
    return (probability * counted).amax(2)


@pytest.mark.parametrize("length", [1, 40, CHUNK, CHUNK + 1, 3 * CHUNK + 7])
def test_later_attention_is_the_largest_probability_of_a_later_query(length):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, length, 8, generator=generator)
    key = torch.randn(2, 2, length, 8, generator=generator)
    got = later_attention(query, key, 0.5, gap=16)
    assert torch.allclose(got, brute_force(query, key, 0.5, 16), atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_observing_changes_no_logit_and_leaves_nothing_behind(family):
    model = load_model(ModelConfig(kind="tiny", family=family)).model.eval()
    layers = [module for _, module in attention_layers(model)]
    configs = [module.config for module in layers]
    ids = torch.randint(0, 100, (1, 20))
    want, seen = model(ids).logits, []
    with observe(
        layers, lambda module, q, k, scaling: seen.append((module.layer_idx, q.shape, k.shape, scaling))
    ):
        got = model(ids).logits
    assert torch.equal(got, want)
    assert [entry[0] for entry in seen] == [module.layer_idx for module in layers]
    assert seen[0][2][1] == layers[0].config.num_key_value_heads
    assert all(module.config is config for module, config in zip(layers, configs, strict=True))
    assert not any(hasattr(module, "layer_replace_observer") for module in layers)


def test_retrieval_layers_are_the_best_in_order_and_at_most_all():
    scores = {0: 0.1, 1: 0.9, 2: 0.9, 3: 0.5}
    assert retrieval_layers(scores, 2) == [1, 2]
    assert retrieval_layers(scores, 3) == [1, 2, 3]
    assert retrieval_layers(scores, 10) == [0, 1, 2, 3]
