"""What keys weigh must reach the answer: a memory that normalises them is told from one that scales them."""

import pytest
import torch

from replace.config import AttentionConfig, ModelConfig
from replace.convert import SwapSpec, swap
from replace.loading import load_model
from replace.memory import MemoryMixer
from replace.pipeline import bounds_of
from replace.properties.examine import magnitudes

OPTIONS = {"block": 16, "window": 16, "pairs": 0, "sinks": 2, "distance_cap": 64}


@pytest.fixture
def model():
    made = load_model(ModelConfig(kind="tiny")).model
    spec = {1: AttentionConfig(**OPTIONS), 2: AttentionConfig(name="sliding_window", **OPTIONS)}
    swap(made, SwapSpec(spec))
    return made


def test_doubled_keys_change_what_is_answered(model):
    found = magnitudes(model)
    assert set(found) == {1, 2}
    assert all(change > 0.01 for change in found.values())


def test_unit_norm_keys_do_not(model, monkeypatch):
    scaled = MemoryMixer._scaled

    def normalised(self, x, positions, scaling):
        return torch.nn.functional.normalize(scaled(self, x, positions, scaling), dim=-1)

    monkeypatch.setattr(MemoryMixer, "_scaled", normalised)
    found = magnitudes(model)
    assert found[1] < 1e-6
    assert found[2] > 0.01


def test_scale_and_clamp_are_those_of_the_options(model):
    memory, window = (model.model.layers[index].self_attn.mixer for index in (1, 2))
    assert bounds_of(model, memory) == {"scale": pytest.approx(16**-0.25), "clamp": 1e4}
    assert bounds_of(model, window) == {"scale": pytest.approx(16**-0.25), "clamp": None}
    memory.options.scale = 0.5
    assert bounds_of(model, memory)["scale"] == 0.5
    assert bounds_of(model, torch.nn.Linear(1, 1)) == {"scale": None, "clamp": None}
