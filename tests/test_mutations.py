"""The mutation script: every planted mistake is caught, by the tests and by verify on the real model."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_every_planted_mistake_is_caught() -> None:
    command = [sys.executable, str(ROOT / "tests" / "mutations.py")]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    figures = re.search(r"caught/planted: tests (\d+)/(\d+), verify (\d+)/(\d+)", ended.stdout)
    assert figures is not None, ended.stdout + ended.stderr
    tests, planted, verify, _ = map(int, figures.groups())
    assert tests == verify == planted >= 18, ended.stdout
    assert ended.returncode == 0, ended.stdout
