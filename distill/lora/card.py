"""The README of an adapter's folder."""

import json

from distill.lora.choice import Choice
from replace.config import Config


def adapter_card(config: Config, choice: Choice) -> str:
    """README.md with a YAML header, which says what the adapter goes onto."""
    options = config.lora
    header = {"library_name": "peft", "pipeline_tag": "text-generation", "tags": ["lora", "layer-replace"]}
    yaml = "\n".join(f"{key}: {json.dumps(value)}" for key, value in header.items())
    flags = (("rsLoRA", options.rslora), ("DoRA", options.dora), ("QLoRA", options.qlora))
    kinds = "".join(f", {word}" for word, on in flags if on)
    return f"""---
{yaml}
---

# Adapter of {config.experiment}

Rank {options.rank}, alpha {options.alpha}{kinds}; trained through {choice.kind}.
It goes onto `../base`, the student before the tuning, and not onto `../model`, which has it merged in.

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("../base", trust_remote_code=True)
model = PeftModel.from_pretrained(model, ".")
model.load_adapter("<another adapter>", "other")
model.set_adapter("other")
```
"""
