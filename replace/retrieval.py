"""Where a memory is worth having: layers in which the teacher looks from the answer back to the needle."""

import random

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from replace.convert import attention_layers
from replace.corpora import Document, choosing_split
from replace.episodes import Episode, haystack, make_episode
from replace.layer import AttentionModule
from replace.observe import Attending, observe

EPISODES, LENGTH = 8, 512


@torch.no_grad()
def retrieval_scores(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, documents: list[Document], seed: int = 0
) -> dict[int, float]:
    """For each layer, the largest share of attention that one head puts on the needle while answering.

    Measured on 8 seeded pass-key episodes of at most 512 tokens in dev text, phrased as in the training.

    Returns:
        layer index -> mean over the episodes of the best head's share, 0 to 1.
    """
    source, split = haystack("novel", documents, tokenizer), choosing_split(documents)
    rng = random.Random(f"retrieval {seed}")
    layers = [module for _, module in attention_layers(model)]
    total = {module.layer_idx: 0.0 for module in layers}
    limit = _length(model)
    for number in range(EPISODES):
        depth = (number + 0.5) / EPISODES * 0.8
        episode = make_episode(tokenizer, rng, limit, depth, "passkey", source, haystack_split=split)

        def look(module: AttentionModule, attending: Attending, episode: Episode = episode) -> None:
            total[module.layer_idx] += _share(attending, episode) / EPISODES

        with observe(layers, look):
            model(
                input_ids=episode.input_ids.unsqueeze(0).to(model.device), use_cache=False, logits_to_keep=1
            )
    return total


def _share(attending: Attending, episode: Episode) -> float:
    """The best head's mean attention from the positions that predict the answer to the needle's tokens."""
    weights = attending.log_weights(episode.answer.start - 1, episode.answer.stop - 1)[0].exp()
    return float(weights[..., episode.needle].sum(-1).mean(-1).max())


def protocol(model: PreTrainedModel, documents: list[Document]) -> dict[str, str | int]:
    """How the scores are measured, for a ranking."""
    return {"text": choosing_split(documents), "episodes": EPISODES, "length": _length(model)}


def _length(model: PreTrainedModel) -> int:
    """Tokens of an episode."""
    return min(LENGTH, model.config.get_text_config(decoder=True).max_position_embeddings)
