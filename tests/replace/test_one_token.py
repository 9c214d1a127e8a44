"""Decoding: the short way for one token, and shapes that a compiler takes once."""

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from transformers import DynamicCache, PreTrainedModel, StaticCache

from replace import one_token
from replace.attention.infini import Infini
from replace.blocks import Blocks, Call
from replace.cache import State
from replace.config import AttentionConfig
from replace.convert import SwapSpec, swap
from replace.mixer import BlockMixer
from replace.tiny import tiny_model

IDS = torch.randint(3, 500, (2, 13), generator=torch.Generator().manual_seed(0))
SMALL = {"block": 4, "window": 4, "sinks": 2, "pairs": 3, "distance_cap": 16}
STEPS = 14  # across three borders of blocks


def swapped(name: str, *layers: int) -> PreTrainedModel:
    """A tiny model with these layers replaced, in plain fp32."""
    model = tiny_model("llama")
    swap(model, SwapSpec({i: AttentionConfig(name=name, **SMALL) for i in layers}))
    return model


@torch.no_grad()
def decode(model: PreTrainedModel, step, cache, mask: Tensor | None = None) -> Tensor:
    """Greedy tokens `[B, STEPS]` after a prefill of `IDS`, each by one call of `step`."""
    token = model(IDS, attention_mask=mask, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
    found = [token]
    for _ in range(STEPS - 1):
        if mask is not None:
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        out = step(token, attention_mask=mask, past_key_values=cache, use_cache=True)
        token = out.logits[:, -1:].argmax(-1)
        found.append(token)
    return torch.cat(found, 1)


@pytest.mark.parametrize(
    ("name", "layers"),
    [("infini", (1, 3)), ("gated_delta", (2,)), ("linear", (0,)), ("sliding_window", (0, 1, 2, 3))],
)
def test_a_compiled_step_is_compiled_once(name: str, layers: tuple[int, ...]) -> None:
    """One graph without a break for all steps, and the tokens of the plain model."""
    model = swapped(name, *layers)
    want = decode(model, model, StaticCache(config=model.config, max_cache_len=64))
    torch._dynamo.reset()
    graphs = CompileCounter()
    compiled = torch.compile(model, backend=graphs, fullgraph=True, dynamic=False)
    got = decode(model, compiled, StaticCache(config=model.config, max_cache_len=64))
    torch._dynamo.reset()
    assert torch.equal(got, want)
    assert graphs.frame_count == 1


def test_a_static_cache_keeps_its_tensors_in_place() -> None:
    """A CUDA graph finds them again; and the state is as large after as before."""
    model = swapped("infini", 0, 1, 2, 3)
    cache = StaticCache(config=model.config, max_cache_len=64)
    with torch.no_grad():
        model(IDS, past_key_values=cache, use_cache=True)
        first = {name: x.data_ptr() for name, x in cache.layers[1].state.tensors().items()}
        for token in IDS.split(1, 1):
            model(token, past_key_values=cache, use_cache=True)
    assert {name: x.data_ptr() for name, x in cache.layers[1].state.tensors().items()} == first
    assert int(cache.get_seq_length()) == 26


@pytest.mark.parametrize("name", ["infini", "linear", "sliding_window", "gated_delta"])
def test_the_short_way_is_taken_and_says_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All steps but those that fill a block; with left padding, where rows fill blocks at other steps."""
    model, taken = swapped(name, 0, 1, 2, 3), []
    mask = torch.ones_like(IDS)
    mask[1, :2] = 0
    original = one_token.one_token

    def counted(mixer: BlockMixer, *args) -> Tensor:
        taken.append(mixer)
        return original(mixer, *args)

    monkeypatch.setattr("replace.mixer.one_token", counted)
    got = decode(model, model, DynamicCache(config=model.config), mask)
    # Of 13 steps row 0 (13 tokens before) fills a block in 3, row 1 (11 before) in 4 others.
    assert len(taken) == 4 * (STEPS - 1 - 7)
    monkeypatch.setattr("replace.mixer.can_step", lambda *_: False)
    assert torch.equal(decode(model, model, DynamicCache(config=model.config), mask), got)
    assert len(taken) == 4 * (STEPS - 1 - 7)


@pytest.mark.parametrize("name", ["infini", "linear", "sliding_window"])
def test_a_conversation_goes_on_in_one_cache(name: str) -> None:
    """Generate, add a user's tokens, generate again: as from the whole text; greedy and sampled."""
    model, cache, ids = swapped(name, 0, 2), DynamicCache(), IDS
    for turn, sample in enumerate((False, True, False)):
        settings = {"max_new_tokens": 9, "min_new_tokens": 9, "do_sample": sample}
        settings["attention_mask"] = torch.ones_like(ids)
        torch.manual_seed(turn)
        want = model.generate(ids, use_cache=False, **settings)
        torch.manual_seed(turn)
        ids = model.generate(ids, past_key_values=cache, use_cache=True, **settings)
        assert torch.equal(ids, want)
        ids = torch.cat([ids, IDS[:, : 3 + turn]], 1)


def test_a_variant_that_says_nothing_of_steps_takes_none() -> None:
    """Its own state would stay as it was; one that only joins the parts differently may step."""

    class Remembers(Infini):
        def next_state(self, blocks: Blocks) -> State:
            return super().next_state(blocks)

    class Joins(Infini):
        def mix(self, blocks: Blocks, exact: Tensor, mass: Tensor | None, call: Call) -> Tensor:
            return exact

    assert one_token.knows_steps(Infini)
    assert one_token.knows_steps(Joins)
    assert not one_token.knows_steps(Remembers)
