"""Read an export back with the installed project: none of the folder's code runs."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from replace.convert import SwapSpec
from replace.errors import UserError, bad_value, resume_argument
from replace.export.modeling import convert
from replace.export.write import PREFIX, config_class
from replace.files import expanded

ALLOWED = "a run's folder that has model/, or an exported folder"


def load(
    run_folder: Path | str, dtype: torch.dtype | str = "auto"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and tokenizer of a run, in evaluation mode; the model is of the family's own class.

    Args:
        run_folder: the folder of a run, or of an export.
        dtype: of the weights; "auto" is as saved. The mixers' own parameters are always fp32.

    Raises:
        UserError: there is no whole export.
    """
    folder = expanded(run_folder)
    if (folder / "model" / "config.json").is_file():
        folder = folder / "model"
    saved = _read_config(folder, run_folder)
    spec = SwapSpec.from_json(saved.pop("replacement"))
    base = _base_class(saved.pop("architectures"), run_folder)
    del saved["auto_map"]
    kind = config_class(base)
    config = kind.from_dict({**saved, "model_type": kind.model_type, "architectures": [base.__name__]})
    soft_cap = getattr(config.get_text_config(decoder=True), "attn_logit_softcapping", None)

    def build(model: PreTrainedModel, config, *args, **kwargs) -> None:
        base.__init__(model, config, *args, **kwargs)
        convert(model, spec)

    # sdpa silently drops a soft cap.
    body = {"__init__": build, "_supports_sdpa": base._supports_sdpa and soft_cap is None}
    building: Any = type(base.__name__, (base,), body)
    try:
        model, info = building.from_pretrained(
            folder, config=config, dtype=dtype, output_loading_info=True, use_safetensors=True
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, config=config)
    except (OSError, ValueError) as error:
        raise bad_value("run", str(run_folder), f"{ALLOWED}; this one cannot be read ({error})") from error
    if info["missing_keys"]:
        lacking = ", ".join(sorted(info["missing_keys"])[:3])
        raise bad_value("run", str(run_folder), f"{ALLOWED} with all its weights; this one lacks {lacking}")
    model.__class__ = base
    return model, tokenizer


def _read_config(folder: Path, given: Path | str) -> dict:
    try:
        saved = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise bad_value("run", str(given), ALLOWED) from error
    if {"stages", "budget"} <= set(saved):  # the config of a run, whose export would lie beside it
        raise UserError(
            f"run={str(given)!r} is unfinished: it has no model yet; "
            f"`python -m replace {resume_argument(folder)}` continues it."
        )
    if not {"replacement", "architectures", "auto_map"} <= set(saved):
        raise bad_value("run", str(given), f"{ALLOWED}; this is another model's")
    return saved


def _base_class(architectures: list[str], given: Path | str) -> type[PreTrainedModel]:
    """The family's own class.

    Raises:
        UserError: transformers has none of that name.
    """
    name = architectures[0].removeprefix(PREFIX)
    base = getattr(transformers, name, None)
    if not (isinstance(base, type) and issubclass(base, PreTrainedModel)):
        raise UserError(
            f"run={str(given)!r} is a {name}, which this transformers does not have; load it with "
            "AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)."
        )
    return base
