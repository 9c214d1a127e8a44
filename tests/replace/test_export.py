"""Export and load: the same model, in a process that does not know this project, and back through it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.utils.import_utils import KERNELS_MIN_VERSION

from replace import AttentionConfig, SwapSpec, UserError, export_model, load, restore, swap
from replace.convert import mixers
from replace.export.bundle import collect, flat_names, flatten
from replace.export.write import MODELING, code
from replace.tiny import tiny_model, tiny_tokenizer

OPTIONS = {"block": 8, "window": 8, "sinks": 2, "distance_cap": 32}
IDS = torch.randint(3, 500, (2, 77), generator=torch.Generator().manual_seed(1))
TINY = {"kind": "tiny"}


def options(name: str, **more) -> AttentionConfig:
    return AttentionConfig(name=name, **{**OPTIONS, "pairs": 4, **more})


def swapped(
    layers: dict[int, AttentionConfig], family: str = "llama", dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """A swapped model whose mixers are not as they were initialised, so that lost weights would show."""
    model = tiny_model(family, dtype)
    swap(model, SwapSpec(layers))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for mixer in mixers(model).values():
            for parameter in mixer.parameters():
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def mixed(family: str = "llama", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    layers = {0: options("infini"), 1: options("sliding_window"), 2: options("infini", gate="token", pairs=0)}
    return swapped({**layers, 3: options("linear", feature_map="elu")}, family, dtype)


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model(IDS).logits


def greedy(model: PreTrainedModel, new: int) -> list[int]:
    """A continuation by full forwards, without a cache."""
    ids = IDS[:1]
    for _ in range(new):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return ids[0, IDS.shape[1] :].tolist()


# Run elsewhere, without site hooks (so without the editable install): all that an export promises.
STRANGER = """
import importlib.util, json, sys
arguments = json.loads(sys.argv[1])
sys.path += arguments["packages"]
for name in ("replace", "distill", "eval", "mine"):
    assert importlib.util.find_spec(name) is None, name
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Cache

def check_folder(folder):
    want = torch.load(folder + ".pt")
    load = lambda path, **more: AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, **more)
    model, ids = load(folder), want["ids"]
    got = model(ids).logits
    assert (got - want["logits"]).abs().max() <= 1e-6, (got - want["logits"]).abs().max()
    assert model.config.tie_word_embeddings == (model.lm_head.weight is model.get_input_embeddings().weight)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    assert tokenizer.decode(tokenizer("The pass key is 7.").input_ids) == "The pass key is 7."

    new = len(want["greedy"])
    plain = dict(do_sample=False, eos_token_id=None, return_dict_in_generate=True)
    said = model.generate(ids[:1], max_new_tokens=new, **plain)
    assert said.sequences[0, -new:].tolist() == want["greedy"]
    replaced = [layer for layer in said.past_key_values.layers if hasattr(layer, "state")]
    assert len(replaced) == want["replaced"]
    shorter = model(ids[:1, :20]).past_key_values
    states = lambda cache: [c.state for c in cache.layers if hasattr(c, "state")]
    size = lambda cache: [[x.shape for x in state.tensors().values()] for state in states(cache)]
    assert size(shorter) == size(said.past_key_values)

    model.save_pretrained(folder + "_again")
    assert torch.equal(load(folder + "_again")(ids).logits, got)
    half = load(folder, dtype=torch.bfloat16)
    assert half(ids).logits.isfinite().all()
    mixers = {name: p.dtype for name, p in half.named_parameters() if ".mixer." in name}
    assert set(mixers.values()) <= {torch.float32} and half.lm_head.weight.dtype == torch.bfloat16
    if arguments["peft"]:
        from peft import LoraConfig, get_peft_model
        tuned = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"]))
        assert torch.equal(tuned(ids).logits, got)
        tuned(input_ids=ids, labels=ids).loss.backward()
        grown = [p.grad for name, p in tuned.named_parameters() if "lora_B" in name]
        assert grown and all(g is not None and g.abs().sum() > 0 for g in grown)

for folder in arguments["folders"]:
    check_folder(folder)
from transformers.utils import is_kernels_available
print("kernels" in sys.modules, is_kernels_available())
"""


OURS = re.compile(r"(__editable__|__pycache__|_*layer[-_]replace|replace|kernels|distill|eval|conf)\b")


def run_elsewhere(folders: list[Path], where: Path, package: Path | None = None, peft: bool = True) -> str:
    """Run STRANGER in an isolated interpreter that has every package but this project."""
    site = where / "site"
    site.mkdir()
    for path in sys.path:
        if path.endswith(("site-packages", "dist-packages")) and Path(path).is_dir():
            for entry in Path(path).iterdir():
                if not OURS.match(entry.name) and not (site / entry.name).exists():
                    (site / entry.name).symlink_to(entry)
    packages = [str(site)] if package is None else [str(package), str(site)]
    arguments = {"packages": packages, "folders": [str(folder) for folder in folders], "peft": peft}
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "HF_"))}
    environment |= {"HF_HOME": str(where / "hub"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-I", "-S", "-c", STRANGER, json.dumps(arguments)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, cwd=where, env=environment)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return ended.stdout.strip()


def exported(model: PreTrainedModel, folder: Path) -> Path:
    export_model(model, tiny_tokenizer(), folder, TINY)
    want = {"ids": IDS, "logits": logits(model), "greedy": greedy(model, 12), "replaced": len(mixers(model))}
    torch.save(want, str(folder) + ".pt")
    return folder


OWN_VARIANT = '''"""A variant of somebody's own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import mine.numbers as numbers
from mine import factor as twice
from replace.mixer import BlockMixer

from . import shapes
from .tools import *

if TYPE_CHECKING:
    from mine.never import Nothing


class Calm(BlockMixer):
    """The exact part, scaled."""

    def mix(self, blocks, exact, mass, call):
        from .lazy import one
        from mine.lazy import zero as nothing
        from kernels.numerics import (
            wide,  # in brackets, over lines
        )
        return wide(exact) * numbers.HALF * twice() * one() * shapes.same(unit(1)) + nothing
'''


@pytest.fixture
def own_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A package `mine` with a variant that imports in every form; the import path of the variant."""
    files = {
        "__init__": "from .tools import factor\n",
        "variant": OWN_VARIANT,
        "numbers": "HALF = 0.5\n",
        "tools": "__all__ = ['factor', 'unit']\n\ndef factor():\n    return 2.0\n\nunit = float\n",
        "lazy": "zero = 0.0\n\ndef one():\n    return 1.0\n",
        "shapes": "def same(x):\n    return x\n",
        "never": "class Nothing: ...\n",
    }
    for name, text in files.items():
        path = tmp_path / "packages" / "mine" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(tmp_path / "packages")
    yield "mine.variant:Calm"
    for name in [name for name in sys.modules if name.partition(".")[0] == "mine"]:
        del sys.modules[name]


def test_a_stranger_loads_generates_tunes_and_saves_it(tmp_path: Path, own_package: str) -> None:
    capped = swapped({0: options("infini"), 3: options("sliding_window")}, "gemma2")
    folders = [
        exported(mixed(), tmp_path / "mixed"),
        exported(swapped({1: options("linear")}), tmp_path / "linear"),
        exported(swapped({1: options("gated_delta")}), tmp_path / "gated"),
        exported(capped, tmp_path / "gemma2"),
        exported(swapped({0: options("linear")}, "mixtral"), tmp_path / "mixtral"),
        exported(swapped({2: options(own_package)}), tmp_path / "own"),
    ]
    assert run_elsewhere(folders, tmp_path) == "False False"


FOREIGN_KERNELS = """
class Anything:
    def __new__(cls, *arguments, **options):
        return lambda decorated: decorated

def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return Anything
"""


def test_it_loads_beside_hugging_face_s_kernels(tmp_path: Path) -> None:
    """transformers imports a package `kernels` of a fitting version; an export must not take it for ours."""
    packages = tmp_path / "packages"
    for path, text in {
        packages / "kernels" / "__init__.py": FOREIGN_KERNELS,
        packages / f"kernels-{KERNELS_MIN_VERSION}.dist-info" / "METADATA": (
            f"Metadata-Version: 2.1\nName: kernels\nVersion: {KERNELS_MIN_VERSION}\n"
        ),
    }.items():
        path.parent.mkdir(parents=True)
        path.write_text(text)
    folder = exported(mixed(), tmp_path / "mixed")
    assert run_elsewhere([folder], tmp_path, packages, peft=False) == "True True"


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox", "phi3", "mixtral"])
def test_load_gives_back_what_was_swapped(family: str, tmp_path: Path) -> None:
    model = swapped({0: options("infini"), 2: options("linear", feature_map="elu")}, family)
    export_model(model, tiny_tokenizer(), tmp_path / "run" / "model", TINY)
    for given in (tmp_path / "run", tmp_path / "run" / "model"):
        loaded, tokenizer = load(given)
        assert type(loaded) is type(model)
        assert loaded.config.model_type == family
        assert not hasattr(loaded.config, "replacement")
        assert (logits(loaded) - logits(model)).abs().max() <= 1e-6
        assert tokenizer("key 7").input_ids == tiny_tokenizer()("key 7").input_ids
    export_model(loaded, tokenizer, tmp_path / "again", TINY)
    assert torch.equal(logits(load(tmp_path / "again")[0]), logits(loaded))
    restore(loaded)
    assert not any("mixer" in name for name in loaded.state_dict())


def test_options_of_a_variant_s_own_are_exported(tmp_path: Path) -> None:
    own = {"decay_init": 0.9, "step_init": 0.25}
    model = swapped({0: options("gated_delta", own=own), 2: options("gated_delta", pairs=0)})
    export_model(model, tiny_tokenizer(), tmp_path / "model", TINY)
    loaded, _ = load(tmp_path / "model")
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.layer_replace.spec == model.layer_replace.spec
    assert loaded.layer_replace.spec.layers[0].own == own
    files = code(type(model), model.layer_replace.spec)
    assert {"replace_attention_gated_delta", "kernels_gated_delta_rule_chunk"} <= set(files)
    assert {"replace_memory", "replace_attention_infini", "replace_feature_maps"}.isdisjoint(files)


def test_a_bf16_model_keeps_its_fp32_mixers(tmp_path: Path) -> None:
    export_model(mixed(), tiny_tokenizer(), tmp_path / "fp32", TINY)
    model, tokenizer = load(tmp_path / "fp32", dtype=torch.bfloat16)
    export_model(model, tokenizer, tmp_path / "model", TINY)
    loaded, _ = load(tmp_path / "model")
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(logits(loaded), logits(model))
    assert {p.dtype for m in mixers(loaded).values() for p in m.parameters()} == {torch.float32}
    assert load(tmp_path / "model", dtype=torch.float32)[0].dtype == torch.float32


def test_old_parameters_keep_their_names(tmp_path: Path) -> None:
    model = mixed()
    old = set(tiny_model("llama").state_dict())
    export_model(model, tiny_tokenizer(), tmp_path / "model", TINY)
    now = set(load(tmp_path / "model")[0].state_dict())
    assert old <= now
    assert all(".self_attn.mixer." in name for name in now - old)


def test_the_folder_holds_only_what_its_variants_need(tmp_path: Path) -> None:
    window, everything = swapped({0: options("sliding_window")}), mixed()
    small = code(type(window), window.layer_replace.spec)
    large = code(type(everything), everything.layer_replace.spec)
    assert {"replace_memory", "replace_attention_infini", "replace_feature_maps"}.isdisjoint(small)
    assert {"replace_memory", "replace_attention_infini", "replace_attention_linear"} <= set(large)
    for files in (small, large):
        for name, source in files.items():
            (tmp_path / f"{name}.py").write_text(source)
            assert not re.search(r"^\s*(from|import) (replace|kernels|distill|eval)\b", source, re.M), name
        reached = get_relative_import_files(tmp_path / f"{MODELING}.py")
        assert {Path(file).stem for file in reached} | {MODELING} == set(files)


def test_the_card_and_the_provenance_tell_where_it_comes_from(tmp_path: Path) -> None:
    local = {"kind": "local", "path": "/somewhere/private/llama-mini", "licence": "Apache-2.0"}
    export_model(mixed(), tiny_tokenizer(), tmp_path / "model", local)
    card = (tmp_path / "model" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name")
    for word in ('license: "apache-2.0"', "llama-mini", "`linear`", "trust_remote_code=True"):
        assert word in card
    for file in (tmp_path / "model").glob("*.*"):
        assert file.suffix == ".safetensors" or "/somewhere" not in file.read_text()
    hub = {"kind": "hf", "id": "someone/model"}
    export_model(mixed(), tiny_tokenizer(), tmp_path / "model", hub)
    assert 'base_model: "someone/model"' in (tmp_path / "model" / "README.md").read_text()


def test_a_failed_export_leaves_the_old_one(tmp_path: Path) -> None:
    export_model(mixed(), tiny_tokenizer(), tmp_path / "model", TINY)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "model").iterdir()}
    with pytest.raises(UserError, match="has no replaced layers"):
        export_model(tiny_model("llama"), tiny_tokenizer(), tmp_path / "model", TINY)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "model").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("broken", ["nothing", "no config", "another model", "lost weights", "not json"])
def test_load_says_what_is_wrong(broken: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    if broken == "another model":
        tiny_model("llama").save_pretrained(folder)
    elif broken != "nothing":
        export_model(mixed(), tiny_tokenizer(), folder, TINY)
    if broken == "no config":
        (folder / "config.json").unlink()
    if broken == "not json":
        (folder / "config.json").write_text("{")
    if broken == "lost weights":
        (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="run="):
        load(tmp_path)


# The bundler ------------------------------------------------------------------------------------------------


def test_every_form_of_import_is_rewritten(own_package: str) -> None:
    roots = frozenset({"mine", "replace", "kernels"})
    sources = collect(["mine.variant"], roots)
    names = flat_names(sources)
    flat = flatten("mine.variant", OWN_VARIANT, names, roots)
    compile(flat, "variant", "exec")
    for line in (
        "from . import mine_numbers as numbers",
        "from .mine import factor as twice",
        "from .replace_mixer import BlockMixer",
        "from . import mine_shapes as shapes",
        "from .mine_tools import *",
        "    from .mine_never import Nothing",
        "        from .mine_lazy import zero as nothing",
        "        from .kernels_numerics import wide",
    ):
        assert line in flat.splitlines()
    assert "mine.never" in sources


def test_flat_names_never_collide() -> None:
    names = flat_names(["a_b.c", "a.b_c", "a.b.c", "x"], taken=["x"])
    assert len(set(names.values())) == 4
    assert "x" not in names.values()


@pytest.mark.parametrize("line", ["import mine.numbers", "import math, mine.numbers as n"])
def test_an_import_without_a_flat_form_is_refused(line: str, own_package: str, tmp_path: Path) -> None:
    (tmp_path / "packages" / "mine" / "odd.py").write_text(line + "\n")
    with pytest.raises(UserError, match="write `from package"):
        collect(["mine.odd"], frozenset({"mine"}))


def test_an_import_that_transformers_would_not_see_is_refused(own_package: str, tmp_path: Path) -> None:
    (tmp_path / "packages" / "mine" / "hidden.py").write_text("x = 1; from mine.numbers import HALF\n")
    (tmp_path / "packages" / "mine" / "variant.py").write_text(
        "from mine.hidden import x\nfrom replace.mixer import BlockMixer\n\nclass Calm(BlockMixer): ...\n"
    )
    with pytest.raises(UserError, match="mine_numbers"):
        export_model(swapped({0: options(own_package)}), tiny_tokenizer(), tmp_path / "model", TINY)
    assert not (tmp_path / "model").exists()


def test_a_class_without_a_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    main = sys.modules["__main__"]
    from replace.attention.sliding_window import SlidingWindow

    made = type("Notebook", (SlidingWindow,), {"__module__": "__main__"})
    monkeypatch.setattr(main, "Notebook", made, raising=False)
    with pytest.raises(UserError, match="top of an importable module"):
        export_model(swapped({0: options("__main__:Notebook")}), tiny_tokenizer(), tmp_path / "model", TINY)
