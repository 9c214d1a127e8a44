"""The variant that CONTRIBUTING.md shows, taken from there, from another folder, by its import path."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from replace.blocks import Call, Heads
from replace.cache import ReplacedCacheLayer
from replace.config import AttentionConfig
from replace.mixer import VARIANTS, BlockMixer

ROOT = Path(__file__).parents[2]


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A folder that holds additive.py and nothing else."""
    shown = re.search(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.S)
    assert shown is not None
    (tmp_path / "additive.py").write_text(shown[1], encoding="utf-8")
    return tmp_path


@torch.no_grad()
def test_it_behaves_as_our_own_do(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any cut gives the same, the future is not seen, and the memory counts once its amount is not 0."""
    monkeypatch.syspath_prepend(package)
    small = {"block": 4, "window": 4, "sinks": 2, "pairs": 3, "distance_cap": None}
    options = AttentionConfig(name="additive:Additive", **small)
    mixer = VARIANTS.get(options.name)(options, Heads(4, 2, 8, 16), None).double()
    assert isinstance(mixer, BlockMixer)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 30, 8, generator=generator).double() for heads in (4, 2, 2))
    hidden = torch.randn(2, 30, 16, generator=generator).double()

    def attend(*cuts: int) -> Tensor:
        slot, pieces, start = ReplacedCacheLayer(), [], 0
        for cut in cuts:
            piece = slice(start, start + cut)
            call = Call(hidden[:, piece], 0.4, slot=slot)
            pieces.append(mixer(q[:, :, piece], k[:, :, piece], v[:, :, piece], call))
            start += cut
        return torch.cat(pieces, 2)

    untrained = attend(30)
    mixer.amount += 0.7
    whole = attend(30)
    assert torch.equal(untrained[:, :, :8], whole[:, :, :8])
    assert not torch.allclose(untrained[:, :, 12:], whole[:, :, 12:])
    torch.testing.assert_close(attend(*[1] * 30), whole, rtol=1e-8, atol=1e-9)
    v[:, :, 20] = 5.0
    assert torch.equal(attend(30)[:, :, :20], whole[:, :, :20])


def test_the_whole_pipeline_takes_it(package: Path) -> None:
    """Distilled, measured and exported by the one command that CONTRIBUTING.md names."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    shown = re.search(r"python -m (replace .*additive:Additive)", text)
    assert shown is not None
    run = package / "run"
    command = [sys.executable, "-m", *shown[1].split(), "model=tiny", "budget=smoke", f"hydra.run.dir={run}"]
    environment = os.environ | {"PYTHONPATH": f"{package}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, cwd=package, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-2000:]
    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["attention"] == "additive:Additive"
    code = "\n".join(path.read_text(encoding="utf-8") for path in (run / "model").glob("*.py"))
    assert "class Additive" in code
