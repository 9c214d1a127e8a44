"""The mutation script: every planted mistake is caught, by the tests and by verify on the real model."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "tests" / "mutations.py"


def test_no_mistake_is_stale(monkeypatch: pytest.MonkeyPatch) -> None:
    """What each of them replaces stands in the sources exactly once, and the result compiles."""
    spec = importlib.util.spec_from_file_location("mutations", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "mutations", script)
    spec.loader.exec_module(script)
    assert len({mistake.name for mistake in script.MISTAKES}) == len(script.MISTAKES) >= 18
    for mistake in script.MISTAKES:
        for file, source in script.changed_sources(mistake).items():
            assert source != (ROOT / file).read_text(encoding="utf-8"), mistake.name
            compile(source, file, "exec")


@pytest.mark.slow
def test_every_planted_mistake_is_caught() -> None:
    ended = subprocess.run(
        [sys.executable, str(SCRIPT)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    figures = re.search(r"caught/planted: tests (\d+)/(\d+), verify (\d+)/(\d+)", ended.stdout)
    assert figures is not None, ended.stdout + ended.stderr
    tests, planted, verify, _ = map(int, figures.groups())
    assert tests == verify == planted >= 18, ended.stdout
    assert ended.returncode == 0, ended.stdout
