"""Which form of an operator runs, why, and that it is said once; and what importing the package does."""

import importlib.util
import logging
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels import dispatch, linear_attention
from kernels.linear_attention import fla
from kernels.testing import assert_close

ROOT = Path(__file__).resolve().parents[2]
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_said", set())


def on_a_gpu(monkeypatch: pytest.MonkeyPatch, *capability: int) -> None:
    """As on a machine with such a GPU and without the interpreter."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setitem(sys.modules, "triton", types.ModuleType("triton"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")


@pytest.mark.parametrize(
    ("capability", "dtype", "refusal"),
    [
        ((9, 0), torch.bfloat16, None),
        ((8, 0), torch.float32, None),
        ((7, 5), torch.float16, None),
        ((7, 5), torch.bfloat16, "on Turing only fp16 has matrix units, not torch.bfloat16"),
        ((7, 5), torch.float32, "on Turing only fp16 has matrix units, not torch.float32"),
        ((7, 0), torch.float16, "sm_70 is older than Turing"),
        ((9, 0), torch.float64, "fp64 has no Triton kernel"),
    ],
)
def test_the_architecture_decides(
    capability: tuple[int, int], dtype: torch.dtype, refusal: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_a_gpu(monkeypatch, *capability)
    assert dispatch.choose("op", "auto", CUDA, dtype) == ("triton" if refusal is None else "chunk")
    if refusal is None:
        assert dispatch.choose("op", "triton", CUDA, dtype) == "triton"
    else:
        with pytest.raises(ValueError, match=f"backend='triton' is not possible for op: {refusal}"):
            dispatch.choose("op", "triton", CUDA, dtype)


def test_the_cpu_runs_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert dispatch.choose("op", "auto", CPU, torch.float32) == "chunk"
    on_a_gpu(monkeypatch, 9, 0)
    assert dispatch.choose("op", "auto", CPU, torch.float32) == "chunk"
    with pytest.raises(ValueError, match="Triton needs a GPU, and the tensors are on cpu"):
        dispatch.choose("op", "triton", CPU, torch.float32)


def test_the_interpreter_is_asked_for_and_is_not_given_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_gpu(monkeypatch, 9, 0)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert dispatch.choose("op", "triton", CPU, torch.float16) == "triton"
    assert dispatch.choose("op", "auto", CPU, torch.float16) == "chunk"
    with pytest.raises(ValueError, match="interpreter computes bf16 wrongly"):
        dispatch.choose("op", "triton", CPU, torch.bfloat16)
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1 is for tensors on the CPU"):
        dispatch.choose("op", "triton", CUDA, torch.float16)


def test_without_triton_chunks_run_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_gpu(monkeypatch, 9, 0)
    monkeypatch.delitem(sys.modules, "triton")
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert dispatch.choose("op", "auto", CUDA, torch.bfloat16) == "chunk"
    with pytest.raises(ValueError, match="triton is not installed"):
        dispatch.choose("op", "triton", CUDA, torch.bfloat16)


def test_a_call_may_have_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_gpu(monkeypatch, 9, 0)
    assert dispatch.choose("op", "auto", CUDA, torch.float16, "F is above 1024") == "chunk"
    with pytest.raises(ValueError, match="for op: F is above 1024"):
        dispatch.choose("op", "triton", CUDA, torch.float16, "F is above 1024")
    q, v = torch.rand(1, 2, 1, 1025), torch.rand(1, 2, 1, 4)
    with pytest.raises(ValueError, match="for linear_attention: F or D is above 1024"):
        linear_attention(q, q, v, backend="triton")


def test_each_choice_is_said_once_with_the_reason(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "kernels.dispatch")
    x = torch.rand(1, 2, 1, 3)
    for _ in range(3):
        linear_attention(x, x, x)
        linear_attention(x, x, x, backend="reference")
    mine = [record.getMessage() for record in caplog.records if record.name == "kernels.dispatch"]
    assert len(mine) == 2
    assert mine[0].startswith("linear_attention runs as chunk: on a CPU Triton ")
    assert mine[1] == "linear_attention runs as reference: backend=reference asks for it"


def test_a_compiled_call_says_it_too(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "kernels.dispatch")
    torch.compiler.reset()
    compiled = torch.compile(linear_attention, fullgraph=True, backend="eager")
    x = torch.rand(1, 2, 1, 3)
    for _ in range(2):
        compiled(x, x, x)
    mine = [record.getMessage() for record in caplog.records if record.name == "kernels.dispatch"]
    assert len(mine) == 1
    assert mine[0].startswith("linear_attention runs as chunk")


def flash_linear_attention(monkeypatch: pytest.MonkeyPatch, **functions: object) -> None:
    """As with that library installed, holding these functions, and as if the CPU were a GPU to it."""
    module = types.ModuleType("fla.ops.linear_attn")
    for name, function in functions.items():
        setattr(module, name, function)
    for name in ("fla", "fla.ops"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "fla.ops.linear_attn", module)


def test_fla_is_refused_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.rand(1, 2, 1, 3)
    words = "backend='fla' is not possible for linear_attention: "
    if importlib.util.find_spec("fla") is None:
        with pytest.raises(ValueError, match=words + "flash-linear-attention .* is not installed"):
            linear_attention(x, x, x, backend="fla")
    flash_linear_attention(monkeypatch)
    with pytest.raises(ValueError, match=words + "the installed .* has no fla.ops.linear_attn.chunk_linear"):
        linear_attention(x, x, x, backend="fla")
    flash_linear_attention(monkeypatch, chunk_linear_attn=None)
    with pytest.raises(ValueError, match=words + "it needs a GPU, and the tensors are on cpu"):
        linear_attention(x, x, x, backend="fla")
    with pytest.raises(ValueError, match=words + "it has no grouped heads, and q has 2 where k has 1"):
        linear_attention(x.expand(1, 2, 2, 3), x, x, backend="fla")
    with pytest.raises(ValueError, match=words + "its linear attention takes no cu_seqlens"):
        linear_attention(x, x, x, cu_seqlens=torch.tensor([0, 2]), backend="fla")


def test_fla_gets_what_its_function_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    def chunk_linear_attn(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        initial_state: Tensor | None,
        output_final_state: bool,
        normalize: bool,
    ) -> tuple[Tensor, Tensor]:
        assert scale == 1.0
        assert output_final_state
        assert not normalize
        held = None if initial_state is None else (initial_state, initial_state[..., 0])
        out, state = linear_attention(q, k, v, initial_state=held, normalize=False, backend="reference")
        return out, state.M

    flash_linear_attention(monkeypatch, chunk_linear_attn=chunk_linear_attn)
    monkeypatch.setattr(fla, "fla_refusal", lambda *_: None)
    q, k, v = (torch.rand(2, 5, 2, 3) for _ in range(3))
    initial, mask = (torch.rand(2, 2, 3, 3), torch.rand(2, 2, 3)), torch.rand(2, 5) > 0.3
    for state in (None, initial):
        for normalize in (True, False):
            options = {"initial_state": state, "mask": mask, "normalize": normalize}
            got = linear_attention(q, k, v, backend="fla", **options)  # type: ignore[arg-type]
            want = linear_attention(q, k, v, backend="reference", **options)  # type: ignore[arg-type]
            assert_close("out", got[0], want[0], 1e-5)
            assert_close("M", got[1].M, want[1].M, 1e-5)
            assert_close("z", got[1].z, want[1].z, 1e-5)


def in_a_fresh_process(code: str) -> str:
    command = [sys.executable, "-c", code]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.strip()


def test_the_name_is_the_operator_whatever_was_imported_before() -> None:
    said = in_a_fresh_process(
        "import sys\n"
        "from kernels.linear_attention import chunk\n"
        "import kernels\n"
        "from kernels import linear_attention\n"
        "import torch\n"
        "x = torch.rand(1, 2, 1, 3)\n"
        "linear_attention(x, x, x)\n"
        "from kernels.linear_attention import reference\n"
        "print(callable(kernels.linear_attention), chunk.__name__, 'triton' in sys.modules)"
    )
    assert said == "True kernels.linear_attention.chunk False"


def test_what_is_not_there_is_said() -> None:
    import kernels

    with pytest.raises(AttributeError, match="'kernels' has no attribute 'nothing'"):
        _ = kernels.nothing
