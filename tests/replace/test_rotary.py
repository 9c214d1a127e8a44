"""Rotary encoding measured from the family's own function, on families that pair and scale differently."""

import sys

import pytest
import torch
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from replace.errors import UserError
from replace.rotary import Rotary, RotarySpec, measure_rotary, unrotate

DIM = 16
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
FAMILIES = {
    "llama": {},
    "yarn": {"rope_parameters": YARN},  # tables scaled by more than 1
    "phi3": {"partial_rotary_factor": 0.5},
    "gpt_neox": {"rotary_pct": 0.25},
    "glm": {"partial_rotary_factor": 0.5, "head_dim": DIM},  # interleaved
    "cohere": {},  # interleaved
    "gpt_oss": {
        "head_dim": DIM,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },  # half-width
}


def family(name: str):
    """The family's `apply_rotary_pos_emb` and a function from positions `[1, T]` to its tables."""
    config = AutoConfig.for_model(
        "llama" if name == "yarn" else name,
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        pad_token_id=0,
        **FAMILIES[name],
    )
    module = sys.modules[MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__module__]
    embedding = next(v for k, v in vars(module).items() if k.endswith("RotaryEmbedding"))(config=config)
    return module.apply_rotary_pos_emb, lambda positions: embedding(torch.zeros(1), positions)


def applied(function, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The family's rotation of `x`, on as many leading dimensions as its tables are wide."""
    width = DIM if function.__module__.endswith("gpt_oss") else min(cos.shape[-1], x.shape[-1])
    return torch.cat([function(x[..., :width], x[..., :width], cos, sin)[0], x[..., width:]], -1)


@pytest.mark.parametrize("name", FAMILIES)
def test_rotates_as_the_family_does_and_back(name: str) -> None:
    function, tables = family(name)
    positions = torch.arange(200)[None]
    cos, sin = tables(positions)
    spec = measure_rotary(function, *tables(torch.arange(4)[None]), DIM)
    x = torch.randn(1, 2, 200, DIM, generator=torch.Generator().manual_seed(0))
    turned = applied(function, x, cos, sin)
    torch.testing.assert_close(
        unrotate(function, turned, turned, cos, sin, spec.width)[0], x, atol=1e-5, rtol=1e-5
    )
    assert spec.pairing == ("interleaved" if name in ("glm", "cohere") else "half")
    assert (spec.scaling > 1.01) == (name == "yarn")
    assert len(spec.angles) == {"phi3": 4, "glm": 4, "gpt_neox": 2}.get(name, 8)
    for size in (0, 200):  # computed, and looked up
        torch.testing.assert_close(Rotary(spec, size)(x, positions), turned, atol=2e-4, rtol=1e-4)


def test_only_distances_matter_and_the_look_up_agrees() -> None:
    rotary, generator = Rotary(RotarySpec([1.0, 0.1, 0.01], "half"), 64), torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 8, generator=generator).double()
    at = [torch.tensor([p]) for p in (3, 13, 40, 50)]
    near = rotary(q, at[1]) @ rotary(k, at[0]).T
    torch.testing.assert_close(near, rotary(q, at[3]) @ rotary(k, at[2]).T)
    torch.testing.assert_close(rotary(q, at[2]), rotary(q, at[2], absolute=True))
    far = torch.tensor([1_000_000])
    assert rotary(q, far, absolute=True).norm() == pytest.approx(float(q.norm()))


def test_a_table_made_in_inference_mode_serves_training() -> None:
    rotary, x = Rotary(RotarySpec([1.0], "half"), 8), torch.randn(1, 4, 2)
    with torch.inference_mode():
        rotary(x, torch.arange(4))
    x.requires_grad_()
    rotary(x, torch.arange(4)).sum().backward()
    assert x.grad is not None


def test_an_unknown_pairing_is_refused() -> None:
    def mirrored(q, k, cos, sin):
        return q.flip(-1), k.flip(-1)

    with pytest.raises(UserError, match="neither paired by halves nor interleaved"):
        measure_rotary(mirrored, torch.ones(1, 2, 4), torch.zeros(1, 2, 4), 4)
