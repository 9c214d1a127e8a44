"""CUDA is told to grow its segments before torch could read the setting, unless a person set it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from replace.allocator import SETTINGS, grow_segments

# `_run` stands for the run: what it finds is what torch will.
LOOK = """
import os, sys
import replace.__main__ as command
def look(arguments):
    print(os.environ["PYTORCH_CUDA_ALLOC_CONF"], "torch" in sys.modules)
    return 0
command._run = look
sys.exit(command.main(["+exp=infini"]))
"""


def test_segments_grow_by_default() -> None:
    environment = {"HOME": "/"}
    grow_segments(environment)
    assert environment == {"HOME": "/", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_persons_own_setting_stays(name: str) -> None:
    environment = {name: "max_split_size_mb:64"}
    grow_segments(environment)
    assert environment == {name: "max_split_size_mb:64"}


def test_a_run_sets_it_before_torch_is_imported(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    root = Path(__file__).resolve().parents[2]
    ended = subprocess.run(
        [sys.executable, "-c", LOOK],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=environment | {"PYTHONPATH": str(root)},
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.split() == ["expandable_segments:True", "False"]
