"""Without a GPU: the fused kernels compile for real ones, and fit their shared memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Bytes a block may use (CUDA C++ Programming Guide, technical specifications per compute capability).
SHARED = {75: 65_536, 80: 166_912, 86: 101_376, 90: 232_448}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "dtype", "width"),
    [
        (75, "fp16", 128),
        (80, "bf16", 128),
        (86, "bf16", 64),
        (90, "bf16", 128),
        (90, "bf16", 256),
        (90, "fp16", 128),
        (90, "fp32", 128),
    ],
)
def test_the_kernels_fit(capability: int, dtype: str, width: int, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "tests/kernels/compile_for.py", str(capability), dtype, str(width)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    assert ended.returncode == 0, ended.stderr[-3000:]
    found = json.loads(ended.stdout)
    assert {"_states", "_output", "_state_gradients", "_gradients", "_one_token"} <= found.keys()
    assert {name: size for name, size in found.items() if size > SHARED[capability]} == {}
