"""The language probes of the layer-replacement guideline: can the model still say the simplest things?"""

import re
from dataclasses import dataclass

import torch

from eval.stored import kept


@dataclass(frozen=True)
class Probe:
    """A prompt and what a sound continuation contains; None where the text is only shown."""

    prompt: str
    expected: str | None


PROBES = (
    Probe("The capital of France is", "Paris"),
    Probe("1 + 1 =", "2"),
    Probe("Hello, my name is", None),
)


@kept
def probe(model, tokenizer, *, tokens: int = 12, probes: tuple[Probe, ...] = PROBES) -> list[dict]:
    """Greedy continuations of `tokens` tokens, through the model's own `generate` and cache.

    Returns:
        [{"prompt", "continuation", "expected", "hit": true, false, or null where nothing is expected}].
    """
    device = model.get_input_embeddings().weight.device
    results = []
    for item in probes:
        inputs = tokenizer(item.prompt, return_tensors="pt").to(device)
        with torch.inference_mode():
            output = model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                max_new_tokens=tokens,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id
                if tokenizer.pad_token_id is not None
                else tokenizer.eos_token_id,
            )
        text = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        hit = None if item.expected is None else bool(re.search(rf"\b{re.escape(item.expected)}\b", text))
        results.append({"prompt": item.prompt, "continuation": text, "expected": item.expected, "hit": hit})
    return results
