"""Write a swapped model as a folder that transformers loads and generates with, without this project."""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.dynamic_module_utils import get_relative_import_files

from replace.convert import SwapSpec, conversion_of
from replace.errors import UserError
from replace.export.bundle import collect, flat_names, flatten, top
from replace.export.card import card
from replace.feature_maps import FEATURE_MAPS
from replace.files import atomic_folder
from replace.memory import UPDATES
from replace.mixer import VARIANTS
from replace.registry import Registry
from replace.scores import SCORES

logger = logging.getLogger(__name__)

PREFIX = "LayerReplace"
"""Before the base model's class name: the class of an export."""

TYPE_PREFIX = "layer_replace_"
"""Before the base model's `model_type`."""

MODELING = "modeling_layer_replace"
CONVERTER = "replace.export.modeling"
PRESENT = frozenset({"torch", "transformers"})
"""Packages that whoever loads the folder has; a class of any other is carried along."""

REGISTRIES: tuple[tuple[str, str, Registry], ...] = (
    ("replace.mixer", "VARIANTS", VARIANTS),
    ("replace.scores", "SCORES", SCORES),
    ("replace.feature_maps", "FEATURE_MAPS", FEATURE_MAPS),
    ("replace.memory", "UPDATES", UPDATES),
)


def export(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path | str,
    provenance: Mapping[str, Any],
    dtype: torch.dtype | None = None,
    results: Sequence[Mapping[str, str]] = (),
) -> Path:
    """Write `model` with its tokenizer, its code, a model card and where it comes from; whole or not at all.

    Args:
        model: swapped by `replace.convert.swap`, or read by `load`.
        folder: is made, or replaced if it is there.
        provenance: for `provenance.json`; what it says of the model (`kind`, `id`, `note`, `licence`, at its
            top or under "model") and under "data" also goes into the card.
        dtype: of the weights; by default as they are. The mixers' own parameters stay in fp32.
        results: rows of the card's table of results, each from column to cell.

    Returns:
        the folder.

    Raises:
        UserError: the model is not swapped, is wrapped by PEFT, or uses a class without a source file.
    """
    if not isinstance(model, PreTrainedModel):
        name = type(model).__name__
        raise UserError(
            f"a {name} cannot be exported; allowed: a transformers model "
            "(adapters are merged by merge_and_unload())."
        )
    base = type(model)
    if base.__name__.startswith(PREFIX):
        raise UserError(
            f"a {base.__name__} runs its folder's own code; read it with replace.load(folder) to export it."
        )
    spec = conversion_of(model).spec
    files = code(base, spec, soft_cap=_soft_cap(model))
    with atomic_folder(Path(folder)) as temporary:
        # The names that the modules have: older names of a hub are known for transformers' own classes only.
        model.save_pretrained(temporary, save_original_format=False, state_dict=_cast(model, dtype))
        tokenizer.save_pretrained(temporary)
        for name, source in files.items():
            (temporary / f"{name}.py").write_text(source, encoding="utf-8")
        _check_reach(temporary, set(files))
        _mark_config(temporary / "config.json", base, spec, dtype)
        told = _without_paths(provenance)
        record = json.dumps(told, indent=2, default=str) + "\n"
        (temporary / "provenance.json").write_text(record, encoding="utf-8")
        (temporary / "README.md").write_text(card(base.__name__, spec, told, results), encoding="utf-8")
        # mkdtemp makes folders for the owner alone; an export is an ordinary folder.
        temporary.chmod(0o755)
    logger.info("exported to %s with %d modules of code", folder, len(files))
    return Path(folder)


def code(base: type[PreTrainedModel], spec: SwapSpec, soft_cap: bool = False) -> dict[str, str]:
    """The modules of an export, file name without `.py` -> source: the generated one and all it needs."""
    wanted = [
        (module, *found) for module, name, registry in REGISTRIES for found in _entries(name, registry, spec)
    ]
    classes = [base, config_class(base)]
    homes = {x.__module__ for x in (*classes, *(entry for *_, entry in wanted))}
    roots = frozenset({"replace", "kernels", *map(top, homes)}) - PRESENT
    variants = [entry.__module__ for _, name, _, entry in wanted if name == "VARIANTS"]
    reached = collect([CONVERTER, *variants], roots)
    # A registry that no variant here reaches is not carried along, and neither is what it would be asked for.
    entries = [item for item in wanted if item[0] in reached]
    own = [x.__module__ for x in (*classes, *(e for *_, e in entries)) if top(x.__module__) in roots]
    needed = collect([CONVERTER, *own, *(module for module, *_ in entries)], roots)
    names = flat_names(needed, taken=[MODELING])
    files = {
        names[module]: f"# {module} of layer-replace, its imports rewritten.\n"
        + flatten(module, text, names, roots)
        for module, text in needed.items()
    }
    files[MODELING] = _modeling(base, entries, names, soft_cap)
    return files


def _entries(name: str, registry: Registry, spec: SwapSpec) -> Iterator[tuple[str, str, Any]]:
    """What the layers of `spec` use of a registry: its Python name, the key and the entry.

    Raises:
        UserError: the entry cannot be imported by its own name.
    """
    option = registry.field.rpartition(".")[2]
    for key in sorted({getattr(options, option) for options in spec.layers.values()}):
        entry = registry.get(key)
        if entry.__qualname__ != entry.__name__ or entry.__module__ == "__main__":
            raise UserError(
                f"{registry.field}={key!r} cannot be exported: "
                f"{entry!r} is not at the top of an importable module."
            )
        yield name, key, entry


def _modeling(
    base: type[PreTrainedModel],
    entries: list[tuple[str, str, str, Any]],
    names: dict[str, str],
    soft_cap: bool,
) -> str:
    """The file that config.json names: registers what is used, derives config and model from the family's."""
    imports: dict[str, set[str]] = {}
    bound: dict[str, object] = {}

    def use(module: str, name: str, what: object) -> str:
        """Import `name`; the name it is bound to."""
        alias = name
        while bound.setdefault(alias, what) is not what:
            alias += "_"
        source = f".{names[module]}" if module in names else module
        imports.setdefault(source, set()).add(name if alias == name else f"{name} as {alias}")
        return alias

    kind = config_class(base)
    config = use(_public(kind), kind.__name__, kind)
    parent = use(_public(base), base.__name__, base)
    mixin = use(CONVERTER, "ReplacedModel", CONVERTER)
    lines = []
    for module, registry, key, entry in entries:
        table, alias = use(module, registry, registry), use(entry.__module__, entry.__name__, entry)
        lines.append(f"{table}.register({key!r})({alias})")
    ordered = sorted(imports, key=lambda source: (source.startswith("."), source))
    header = [f"from {source} import {', '.join(sorted(imports[source]))}" for source in ordered]
    body = [
        "",
        "",
        f"class {PREFIX}Config({config}):",
        '    """The base model\'s config with `replacement`: which layer has which attention."""',
        "",
        f'    model_type = "{TYPE_PREFIX}{kind.model_type}"',
        "",
        "",
        f"class {PREFIX}{base.__name__}({mixin}, {parent}):",
        '    """The base model with replaced attention layers; all other weights keep their names."""',
        "",
        f"    config_class = {PREFIX}Config",
    ]
    if soft_cap:
        body += ["    # transformers' sdpa silently drops a soft cap.", "    _supports_sdpa = False"]
    said = f"{base.__name__} with replaced attention layers, written by layer-replace."
    return "\n".join([f'"""{said}"""', "", *header, "", *lines, *body, ""])


def config_class(base: type[PreTrainedModel]) -> type[PreTrainedConfig]:
    """The config class of a model class.

    Raises:
        UserError: it has none.
    """
    if base.config_class is None:
        raise UserError(f"{base.__name__} names no config class, so it cannot be exported.")
    return base.config_class


def _public(kind: type) -> str:
    """Where to import a class from: transformers itself if it has it, since its inner modules move."""
    return "transformers" if getattr(transformers, kind.__name__, None) is kind else kind.__module__


def _check_reach(folder: Path, files: set[str]) -> None:
    """transformers must find exactly these files, or it copies too few, or looks for some that are not there.

    Raises:
        UserError: an import stands where transformers does not see it, or a text looks like one.
    """
    reached = {Path(file).stem for file in get_relative_import_files(folder / f"{MODELING}.py")} | {MODELING}
    if reached != files:
        wrong = ", ".join(sorted(reached ^ files))
        raise UserError(
            f"the export's modules ({wrong}) cannot be followed; write each import on a line of its own."
        )


def _cast(model: PreTrainedModel, dtype: torch.dtype | None) -> dict[str, Tensor] | None:
    """The state in `dtype`, tied weights still tied; None where it is to be saved as it is."""
    if dtype is None:
        return None
    made: dict[int, Tensor] = {}
    state = {}
    for name, value in model.state_dict(keep_vars=True).items():
        keep = ".mixer." in name or not value.is_floating_point()
        state[name] = value.detach() if keep else made.setdefault(id(value), value.detach().to(dtype))
    return state


def _mark_config(path: Path, base: type[PreTrainedModel], spec: SwapSpec, dtype: torch.dtype | None) -> None:
    """Name the export's classes and the replacement in the config that transformers wrote."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config["model_type"] = TYPE_PREFIX + config_class(base).model_type
    config["architectures"] = [PREFIX + base.__name__]
    config["auto_map"] = {
        "AutoConfig": f"{MODELING}.{PREFIX}Config",
        "AutoModelForCausalLM": f"{MODELING}.{PREFIX}{base.__name__}",
    }
    config["replacement"] = spec.to_json()
    if dtype is not None:
        config["dtype"] = str(dtype).removeprefix("torch.")
    config.pop("_name_or_path", None)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _soft_cap(model: PreTrainedModel) -> bool:
    return getattr(model.config.get_text_config(decoder=True), "attn_logit_softcapping", None) is not None


def _without_paths(told: Any) -> Any:
    """Folders of this machine shortened to their last part: an export is made to be given away."""
    if isinstance(told, Mapping):
        return {k: Path(str(v)).name if k == "path" else _without_paths(v) for k, v in told.items()}
    return [_without_paths(item) for item in told] if isinstance(told, list) else told
