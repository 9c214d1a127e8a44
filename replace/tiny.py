"""A random 4-layer model of any family and a byte-level tokenizer, made on the spot, for tests."""

import torch
from huggingface_hub.errors import StrictDataclassError
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from replace.errors import bad_value

VOCABULARY = 512
SPECIAL = ["<pad>", "<bos>", "<eos>"]

# The merges are learnt from these lines: frequent words are one or two tokens, all else is bytes.
TRAINING_TEXT = """
The pass key is the number that you must remember. The secret number of the city is known to all of them.
The grass is green and the sky is blue, and the sun is yellow. Here we go, there and back again.
What is the pass key? Remember it well, for there was never a better word for what they had to say about this.
It was the best of times and it was the worst of times; she had been with him when he came to her house.
"""


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of at most 512 tokens, each digit a token, the same everywhere."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TRAINING_TEXT.strip().splitlines(), trainer)
    pad, bos, eos = SPECIAL
    tokens = {"pad_token": pad, "bos_token": bos, "eos_token": eos}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **tokens)


def tiny_config(family: str, **changes: object) -> PretrainedConfig:
    """A config of `family` with 4 layers, hidden 64, 4 heads and 2 key-value heads, 4,096 positions.

    Args:
        changes: fields of the config that are to differ.

    Raises:
        UserError: transformers knows no such family.
    """
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 4096,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **_FAMILY_SIZES.get(family, {}),
        **changes,
    }
    sizes = {name: size for name, size in sizes.items() if size is not None}
    try:
        return AutoConfig.for_model(family, **sizes)
    except (ValueError, NotImplementedError, StrictDataclassError) as error:  # also sizes that do not fit
        raise bad_value("model.family", family, "a model type of transformers, such as llama") from error


# What the general names do not reach: sizes that would otherwise stay those of the full model; None where a
# family does not take a general name.
_MIXTURE: dict[str, object] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "num_local_experts": 4,
}
_LATENT: dict[str, object] = {
    "head_dim": 8,
    "num_key_value_heads": 4,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "moe_intermediate_size": 64,
}
_FAMILY_SIZES: dict[str, dict[str, object]] = {
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64},
    "gpt2": {"n_inner": 128},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {**_MIXTURE, "shared_expert_intermediate_size": 64},
    "qwen3_moe": _MIXTURE,
    "solar_open": {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "falcon": {"head_dim": None},
    "gptj": {"rotary_dim": 8},
    "deepseek_v3": {
        **_LATENT,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 2,
    },
    "youtu": _LATENT,
}


def tiny_model(
    family: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: object
) -> PreTrainedModel:
    """A random model of `tiny_config(family)`, in evaluation mode; the global random state is left alone."""
    config = tiny_config(family, **changes)
    # As real models are loaded: sdpa silently drops a soft cap.
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    options = {"attn_implementation": "eager"} if capped else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model = AutoModelForCausalLM.from_config(config, **options)
        except ValueError as error:
            raise bad_value("model.family", family, "a causal language model type of transformers") from error
    return model.to(dtype).eval()
