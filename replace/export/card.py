"""The model card of an export."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from replace.config import AttentionConfig
from replace.convert import SwapSpec

HUB_IDS = {"smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct"}
"""Hub names of teachers that come from elsewhere."""


def card(
    base: str, spec: SwapSpec, provenance: Mapping[str, Any], results: Sequence[Mapping[str, str]] = ()
) -> str:
    """README.md with a YAML header.

    Args:
        base: the base model's class.
        provenance, results: what `export` was given.
    """
    about = provenance.get("model")
    origin_of = about if isinstance(about, Mapping) else provenance
    kind = origin_of.get("kind")
    hub_id = origin_of.get("id") or HUB_IDS.get(str(kind))
    licence = origin_of.get("licence")
    terms = f" ({licence})" if licence else ""
    header = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["layer-replace", *sorted({options.name for options in spec.layers.values()})],
    }
    if hub_id:
        header["base_model"] = hub_id
    if licence:
        header["license"] = str(licence).lower()
    origin = hub_id or origin_of.get("path") or kind or "unknown"
    note = f" ({origin_of['note']})" if origin_of.get("note") else ""
    # JSON strings and lists are YAML too, so no value can break the header.
    yaml = "\n".join(f"{key}: {json.dumps(value)}" for key, value in header.items())
    layers = "\n".join(_rows(spec))
    return f"""---
{yaml}
---

# {base} with replaced attention

Made by layer-replace from {origin}{note}: the attention of {len(spec.layers)} decoder layers was replaced.

| layers | attention |
|---|---|
{layers}

All options are in `config.json` under `replacement`.
{_results(results)}{_data(provenance.get("data"))}
## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
```

`trust_remote_code=True` runs the `.py` files of this folder; read them first. They need torch and
transformers, nothing else. The replaced layers' part of the cache has a constant size; assisted decoding,
which takes tokens back, is refused. Their own parameters stay in fp32 whatever `dtype` is asked for.
PEFT needs its `target_modules` named, as for any model type that it does not know.

## Limits

- vLLM, SGLang and llama.cpp know nothing of the replaced layers: no vLLM, and no GGUF of a swapped model yet.
- What fits into neither window, sinks, retained pairs nor memory is forgotten; the run's report says it.
- It inherits what the base model gets wrong, and was tuned on little text beside what that was trained on.

Licence: the weights are under the base model's{terms}; the `.py` files of layer-replace are under
Apache-2.0, those of other packages under their own. `provenance.json` says where everything comes from.
"""


def _rows(spec: SwapSpec) -> list[str]:
    """One row for each set of options, with the layers that have it."""
    groups: dict[str, list[int]] = {}
    for index, options in sorted(spec.layers.items()):
        groups.setdefault(_words(options), []).append(index)
    return [f"| {', '.join(map(str, indices))} | {words} |" for words, indices in groups.items()]


def _words(options: AttentionConfig) -> str:
    """The variant and its sizes; everything else is in config.json."""
    reach = {"segment": "own block only", "none": "no window"}.get(options.local, f"window {options.window}")
    recent = f", {options.recent_places} of them recent" if options.recent_places else ""
    pairs = f", {options.pairs} retained pairs ({options.pairs_score}{recent})" if options.pairs else ""
    return f"`{options.name}`: blocks of {options.block}, {reach}, {options.sinks} sinks{pairs}"


def _results(rows: Sequence[Mapping[str, str]]) -> str:
    """The table of results, or nothing where nothing was measured."""
    if not rows:
        return ""
    columns = list(rows[0])
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    lines += [f"| {' | '.join(row[column] for column in columns)} |" for row in rows]
    return "\n## Results\n\n" + "\n".join(lines) + "\n"


def _data(data: object) -> str:
    """What it was trained on, with licences."""
    sources = list(_sources(data))
    return "\n## Data\n\n" + "\n".join(f"- {source}" for source in sources) + "\n" if sources else ""


def _sources(data: object) -> Iterator[str]:
    if isinstance(data, Mapping):
        for source in [*data.get("sources", ()), *filter(None, [data.get("tuning")])]:
            name = f"{source['package']} {source['version']}" if "package" in source else source.get("path")
            yield f"{name}: {source.get('licence') or 'licence not recorded'}"
