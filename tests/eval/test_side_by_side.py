"""Forwards beside each other give what they give one after the other, whatever is switched on."""

import threading
import time

import pytest
import torch
from transformers import LlamaForCausalLM

from eval.niah import Cell, recall_grid
from eval.perplexity import perplexity
from eval.side_by_side import side_by_side
from replace.config import AttentionConfig
from replace.convert import SwapSpec, swap
from replace.episodes import haystack, make_episode
from replace.tiny import tiny_model

ANY = torch.nn.Linear(1, 1)
"""A model on a CPU whose forward changes nothing in it."""


@pytest.fixture(autouse=True)
def two_cores():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_results_are_in_order_and_two_run_at_once():
    meeting = threading.Barrier(2, timeout=30)

    def slow_first(item):
        meeting.wait()  # passes only where two are at work
        time.sleep(0.05 if item == 0 else 0)
        return item, torch.get_num_threads(), torch.is_inference_mode_enabled()

    assert list(side_by_side(slow_first, range(4), ANY)) == [(item, 1, True) for item in range(4)]
    assert torch.get_num_threads() == 2


def test_what_is_switched_on_is_seen_within():
    product = torch.ones(2, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = list(side_by_side(lambda x: (x @ x).dtype, [product] * 2, ANY))
    assert inside == [torch.bfloat16] * 2
    assert list(side_by_side(lambda x: (x @ x).dtype, [product] * 2, ANY)) == [torch.float32] * 2


def test_an_error_ends_it_and_what_has_not_begun_never_does():
    begun = []

    def fail(item):
        begun.append(item)
        time.sleep(0.05)
        raise ValueError(item)

    with pytest.raises(ValueError, match="0"):
        list(side_by_side(fail, range(50), ANY))
    assert len(begun) < 10
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize(("threads", "items"), [(1, 3), (2, 1)])
def test_a_single_core_or_item_needs_no_threads(threads, items):
    torch.set_num_threads(threads)
    names = side_by_side(lambda _: threading.current_thread().name, range(items), ANY)
    assert set(names) == {threading.main_thread().name}


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_a_model_whose_rotary_tables_follow_the_length_reads_one_text_after_the_other(kind):
    """They are set anew in each forward, and a shorter text beside it would set them back."""
    config = tiny_model("llama").config
    factors = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "original_max_position_embeddings": 64}
    config.rope_parameters = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0, **factors}
    model = LlamaForCausalLM(config).eval()
    names = side_by_side(lambda _: threading.current_thread().name, range(3), model)
    assert set(names) == {threading.main_thread().name}


def test_figures_are_the_same_on_one_core_and_on_two(tiny):
    model = tiny_model("llama").eval()
    options = AttentionConfig(block=16, window=16, sinks=2, pairs=8, pairs_score="key_norm")
    swap(model, SwapSpec(dict.fromkeys(range(4), options)))
    source = haystack("filler", [], tiny.tokenizer)

    def make(cell, rng):
        return make_episode(
            tiny.tokenizer, rng, cell.length, cell.depth, cell.kind, source, cell.phrasing, clear=32
        )

    cells = [Cell(160, depth, "passkey", "test", "filler") for depth in (0.1, 0.5, 0.9)]
    text = "It was the best of times, it was the worst of times. " * 60

    def figures():
        recalled = recall_grid(model, cells, make, episodes=2, batch=2)
        return recalled, perplexity(model, tiny.tokenizer, text, length=64, tokens=500, batch=4)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        both = figures()
        torch.set_num_threads(1)
        alone = figures()
    assert both[0] == alone[0]
    assert both[1]["ppl"] == pytest.approx(alone[1]["ppl"], rel=1e-4)  # other batches, so other roundings
