"""Fetching sealed wheels, converting the default teacher once, and a sentence for each mistake."""

import dataclasses
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from replace import loading, wheels
from replace.config import ModelConfig
from replace.errors import UserError
from replace.loading import check_model, load_model, load_tokenizer
from replace.wheels import cache_dir, fetch_wheel, read_members, sha256_of


def make_wheel(folder: Path, name: str = "nothing_here", version: str = "1.0") -> Path:
    """A minimal wheel, so that pip itself can be run without a network."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}/data/a.txt", "text")
        archive.writestr(f"{name}/__init__.py", "raise SystemExit('a wheel must never be imported')")
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """An empty cache, and a pip that looks nowhere but in a folder."""
    monkeypatch.setenv("LAYER_REPLACE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "links"))
    return tmp_path


def test_a_wheel_is_fetched_once_and_read_without_installing_it(own_cache, monkeypatch):
    made = make_wheel(own_cache / "links")
    path = fetch_wheel("nothing-here", "1.0", sha256_of(made))
    assert path.parent == cache_dir() / "wheels"
    assert read_members(path, "nothing_here/data/", ".txt") == {"nothing_here/data/a.txt": b"text"}
    made.unlink()
    assert fetch_wheel("nothing-here", "1.0", sha256_of(path)) == path
    assert "nothing_here" not in sys.modules
    assert [item.name for item in path.parent.iterdir()] == [path.name]


def test_a_damaged_wheel_in_the_cache_is_fetched_again(own_cache):
    made = make_wheel(own_cache / "links")
    path = fetch_wheel("nothing-here", "1.0", sha256_of(made))
    path.write_bytes(path.read_bytes()[:100])
    assert sha256_of(fetch_wheel("nothing-here", "1.0", sha256_of(made))) == sha256_of(made)


def test_a_wrong_checksum_is_refused_and_nothing_is_left(own_cache):
    make_wheel(own_cache / "links")
    with pytest.raises(UserError, match=r"nothing-here 1\.0 is corrupt"):
        fetch_wheel("nothing-here", "1.0", "0" * 64)
    assert list((cache_dir() / "wheels").iterdir()) == []


def test_no_network_is_one_sentence(own_cache):
    with pytest.raises(
        UserError, match=r"could not be fetched from the package index .* check the network"
    ) as error:
        fetch_wheel("nothing-here", "1.0", "0" * 64)
    assert "\n" not in str(error.value)
    assert list((cache_dir() / "wheels").iterdir()) == []


def test_a_full_disk_is_not_blamed_on_the_network(own_cache, monkeypatch):
    said = "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device\n"
    ended = subprocess.CompletedProcess([], 1, "", said)
    monkeypatch.setattr(wheels.subprocess, "run", lambda *_, **__: ended)
    with pytest.raises(UserError, match=r"no space is left .*LAYER_REPLACE_CACHE") as error:
        fetch_wheel("nothing-here", "1.0", "0" * 64)
    assert "network" not in str(error.value)


def test_an_environment_without_pip_is_one_sentence(own_cache, monkeypatch):
    monkeypatch.setattr(wheels.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="has no pip; install it with"):
        fetch_wheel("nothing-here", "1.0", "0" * 64)


def test_a_cache_that_is_a_file_is_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LAYER_REPLACE_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="LAYER_REPLACE_CACHE"):
        fetch_wheel("nothing-here", "1.0", "0" * 64)


def test_a_converted_folder_is_whole_only_with_the_files_it_lists(tmp_path):
    assert not loading._is_whole(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    checksum = sha256_of(tmp_path / "model.safetensors")
    (tmp_path / "provenance.json").write_text(json.dumps({"files": {"model.safetensors": checksum}}))
    assert loading._is_whole(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"weight")
    assert not loading._is_whole(tmp_path)
    (tmp_path / "provenance.json").write_text("{")
    assert not loading._is_whole(tmp_path)


def test_the_default_teacher_loads_and_answers():
    loaded = load_model(ModelConfig())
    ids = loaded.tokenizer("The capital of France is", return_tensors="pt")
    answer = loaded.model.generate(**ids, max_new_tokens=3, do_sample=False)
    assert "Paris" in loaded.tokenizer.decode(answer[0])
    assert loaded.provenance["note"].endswith("dequantised from Q4_1")
    assert loaded.tokenizer.convert_ids_to_tokens(loaded.tokenizer(" 12345")["input_ids"]) == list("Ġ12345")
    assert loaded.tokenizer.eos_token == "<|im_end|>"
    assert not hasattr(loaded.model.config, "quantization_config")
    facts = dataclasses.asdict(check_model(ModelConfig()))
    config = loaded.model.config
    assert facts["parameters"] == loaded.model.num_parameters()
    assert (facts["layers"], facts["kv_heads"], facts["head_dim"]) == (30, 3, 64)
    assert loading.smollm2_config().rope_parameters == config.rope_parameters
    assert facts["vocab"] == config.vocab_size


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox", "gemma2", "mixtral"])
def test_the_tiny_model_is_the_same_every_time(family):
    cfg = ModelConfig(kind="tiny", family=family)
    state = torch.get_rng_state()
    first, second = load_model(cfg), load_model(cfg)
    assert torch.equal(torch.get_rng_state(), state)
    ids = first.tokenizer("The pass key is 12345.", return_tensors="pt")["input_ids"]
    assert torch.equal(first.model(ids).logits, second.model(ids).logits)
    facts = check_model(cfg)
    assert (facts.layers, facts.hidden, facts.heads, facts.family) == (4, 64, 4, family)
    assert facts.parameters == first.model.num_parameters()


def test_the_tiny_tokenizer_spells_out_digits_and_any_text():
    tokenizer = load_tokenizer(ModelConfig(kind="tiny"))
    assert tokenizer.tokenize(" 12345")[-5:] == list("12345")
    text = 'Zürich, 7 °C\n\n"Well"…'
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert {tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id} == {0, 1, 2}


def test_a_local_folder_loads_with_its_soft_cap_intact(tmp_path):
    tiny = load_model(ModelConfig(kind="tiny", family="gemma2"))
    tiny.model.save_pretrained(tmp_path)
    tiny.tokenizer.save_pretrained(tmp_path)
    loaded = load_model(ModelConfig(kind="local", path=str(tmp_path)), torch.bfloat16)
    assert loaded.model.dtype == torch.bfloat16
    assert loaded.model.config._attn_implementation == "eager"
    assert not loaded.model.training


@pytest.mark.parametrize(
    ("cfg", "words"),
    [
        (ModelConfig(kind="nonsense"), "model.kind='nonsense'"),
        (ModelConfig(kind="tiny", family="nonsense"), "model.family='nonsense'"),
        (ModelConfig(kind="local"), "model.path=None"),
        (ModelConfig(kind="local", path="no/such/folder"), "model.path='no/such/folder'"),
        (ModelConfig(kind="hf"), "model.id=None"),
    ],
)
def test_bad_models_name_the_field(cfg, words):
    for function in (load_model, check_model):
        with pytest.raises(UserError, match=words):
            function(cfg)


def test_a_folder_without_weights_is_one_sentence(tmp_path):
    load_model(ModelConfig(kind="tiny")).model.config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"model\.path=.* could not be loaded"):
        load_model(ModelConfig(kind="local", path=str(tmp_path)))
