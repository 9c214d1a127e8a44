"""Memory that is free, and a model that does not fit into it."""

import psutil
import pytest

from replace import loading, machine
from replace.config import ModelConfig
from replace.errors import UserError


@pytest.mark.parametrize(("limit", "free"), [("3000", 2000), ("500", 0), ("max", None)])
def test_a_container_s_limit_counts(tmp_path, monkeypatch, limit, free):
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text(f"{limit}\n")
    (tmp_path / "memory.current").write_text("1000\n")
    found = machine.free_memory()
    assert found == free if free is not None else 0 < found <= psutil.virtual_memory().total


def test_without_a_container_it_is_what_the_machine_has(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    assert 0 < machine.free_memory() <= psutil.virtual_memory().total


def test_a_model_fits_or_is_refused_by_the_size_of_its_weights(monkeypatch):
    config = ModelConfig(kind="tiny")
    size = 4 * loading.check_model(config).parameters
    monkeypatch.setattr(loading, "free_memory", lambda: size)
    loading.check_memory(config)
    monkeypatch.setattr(loading, "free_memory", lambda: size - 1)
    with pytest.raises(
        UserError, match=r"model.family='llama' .* fits into the 0\.0 GiB .* parameters, 0\.0 GiB in float32"
    ):
        loading.check_memory(config)
