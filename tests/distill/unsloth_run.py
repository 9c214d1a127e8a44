"""What `test_unsloth.py` looks at: the tuning by Unsloth and by PEFT, where Unsloth was imported first.

python tests/distill/unsloth_run.py <folder>: writes found.json there.
"""

import json
import sys
from pathlib import Path
from typing import Any

from distill.lora.patching import import_unsloth

unsloth: Any = import_unsloth()

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import distill.lora.tune as tune_module
from distill.lora.data import tuning_data
from distill.lora.quantised import check_bitsandbytes
from distill.lora.stage import loss_of
from distill.lora.targets import targets_of
from distill.lora.unsloth import adapted_by_unsloth
from replace import AttentionConfig, SwapSpec, export_model, swap
from replace.config import Config, LoraConfig, ModelConfig, StageBudget
from replace.convert import mixers, probe_ids
from replace.errors import UserError
from replace.loading import load_model
from replace.logger import NoLogger
from replace.tiny import tiny_model, tiny_tokenizer

SMALL: dict[str, Any] = {"block": 8, "window": 8, "sinks": 2, "distance_cap": 32, "pairs": 4}
STEPS = 8


def student():
    """Layers 0 and 2 are replaced, 1 and 3 keep full attention."""
    model = tiny_model("llama")
    swap(model, SwapSpec({0: AttentionConfig(**SMALL), 2: AttentionConfig(name="sliding_window", **SMALL)}))
    return model


def config_for(folder: Path, kind: str, **more: Any) -> Config:
    folder.mkdir(parents=True, exist_ok=True)
    chats = folder / "chats.jsonl"
    lines = [
        {"instruction": f"Say {n}.", "output": f"The number is {n}, and the sky is blue."} for n in range(60)
    ]
    chats.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = Config(precision="fp32")
    config.lora = LoraConfig(kind=kind, path=str(chats), template="plain", rank=4, lr=1e-2, **more)
    config.budget.lora = StageBudget(tokens=STEPS * 2 * 128, batch=2, length=128)
    config.budget.eval.perplexity_tokens = 128
    return config


def tuned(folder: Path, kind: str, **more: Any) -> tuple[Any, dict, list[float]]:
    """The merged model, what the tuning returned, and the loss of each step."""
    made, losses = tune_module.lora_stage, []

    def listening(model, config):
        stage = made(model, config)
        step = stage.step

        def heard(batch, scale):
            found = step(batch, scale)
            losses.append(found["loss"])
            return found

        stage.step = heard
        return stage

    tune_module.lora_stage = listening
    try:
        model = student()
        config = config_for(folder, kind, **more)
        result = tune_module.tune(model, tiny_tokenizer(), config, folder, [], NoLogger())
    finally:
        tune_module.lora_stage = made
    return model, result, losses


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(probe_ids(model, 60), use_cache=False).logits


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def own_loss(folder: Path) -> dict:
    """Unsloth's chunked cross-entropy on the adapted student, beside ours on the same rows."""
    model, config = student(), config_for(folder, "unsloth")
    before = logits(model)
    calls = [mixer.calls for mixer in mixers(model).values()]
    wrapped = adapted_by_unsloth(model, tiny_tokenizer(), config, targets_of(model, ["all-linear"]))
    batch = tuning_data(tiny_tokenizer(), [], config).rows.batch(0)
    ours = float(loss_of(model, batch).detach()) / batch.counted
    found = {
        "class": type(wrapped).__name__,
        "unchanged": difference(logits(model), before),
        "calls": [m.calls - before for m, before in zip(mixers(model).values(), calls, strict=True)],
        "ours": ours,
    }
    if unsloth.DEVICE_TYPE == "cpu":
        from unsloth_zoo.cpu.ops import patch_chunked_causal_lm_loss

        patch_chunked_causal_lm_loss(model)
        model._unsloth_cpu_chunked_ce_active = True
    said = model(
        input_ids=batch.input_ids, position_ids=batch.position_ids, labels=batch.labels, use_cache=False
    )
    return found | {"theirs": float(said.loss), "chunked": said.logits is None}


def default_model(folder: Path) -> dict:
    """One step on the default model, every layer replaced, in bf16: deep enough for its rounding to show."""
    loaded, config = load_model(ModelConfig()), config_for(folder, "unsloth")
    swap(loaded.model, SwapSpec(dict.fromkeys(range(30), AttentionConfig())))
    config.precision, config.lora.rank, config.lora.template = "bf16", LoraConfig().rank, None
    config.budget.lora = StageBudget(tokens=128, batch=1, length=128)
    result = tune_module.tune(loaded.model, loaded.tokenizer, config, folder, [], NoLogger())
    return {key: result["tuning"][key] for key in ("backend", "why")}


def four_bit(folder: Path) -> dict:
    """QLoRA, and the export read in 4 bit; empty where bitsandbytes does not run."""
    try:
        check_bitsandbytes()
    except UserError as error:
        return {"why": str(error)}
    model, result, losses = tuned(folder / "qlora", "unsloth", qlora=True)
    export_model(model, tiny_tokenizer(), folder / "export", {"kind": "tiny"})
    small = AutoModelForCausalLM.from_pretrained(
        folder / "export",
        trust_remote_code=True,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        ),
    )
    linear = {type(m).__name__ for name, m in small.named_modules() if name.endswith("q_proj")}
    mixer = {str(p.dtype) for name, p in small.named_parameters() if ".mixer." in name}
    return {
        "backend": result["tuning"]["backend"],
        "why": result["tuning"]["why"],
        "losses": losses,
        "kinds": sorted({type(m).__name__ for m in model.modules() if "Linear" in type(m).__name__}),
        "linear": sorted(linear),
        "mixer": sorted(mixer),
        "difference": difference(logits(small), logits(model)),
    }


def main(folder: Path) -> None:
    by_peft, _, plain = tuned(folder / "peft", "peft")
    model, result, losses = tuned(folder / "unsloth", "unsloth")
    again = PeftModel.from_pretrained(student(), str(folder / "unsloth" / "adapter"))
    found = {
        "device": unsloth.DEVICE_TYPE,
        "version": unsloth.__version__,
        "peft": plain,
        "unsloth": losses,
        "backend": result["tuning"]["backend"],
        "why": result["tuning"]["why"],
        "merged": result["tuning"]["merge_difference"],
        "weights": difference(logits(model), logits(by_peft)),
        "reloaded": difference(logits(again), logits(model)),
        "own_loss": own_loss(folder / "own"),
        "four_bit": four_bit(folder / "four"),
        "default_model": default_model(folder / "default"),
    }
    (folder / "found.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
