"""Which kernel computes what is left of softmax: forced, refused, or replaced where it has no backward."""

import importlib.util
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import replace.pipeline as pipeline
from replace import softmax_backend
from replace.__main__ import main
from replace.compose import compose
from replace.config import AttentionConfig
from replace.convert import SwapSpec, mixers, swap, teacher_attention
from replace.errors import UserError
from replace.softmax_backend import (
    EXPANDED,
    ORDER,
    OWN,
    WINDOW,
    XFORMERS,
    SoftmaxKernels,
    softmax_kernels,
    trials_of,
)
from replace.tiny import tiny_model
from replace.validation import SOFTMAX_BACKENDS, validate

FLASH = "_scaled_dot_product_flash_attention_for_cpu"
WINDOWED = AttentionConfig(
    name="sliding_window", block=4, window=4, sinks=2, pairs=0, distance_cap=16, feature_map="elu"
)
MESSAGE = """No operator found for `memory_efficient_attention_backward` with inputs:
     query       : shape=(1, 24, 4, 16) (torch.float32)
     p           : 0.0
`fa2B@2.5.7-pt` is not supported because:
    requires device with capability > (8, 0) but your GPU has capability (7, 5) (too old)
    dtype=torch.float32 (supported: {torch.float16, torch.bfloat16})
`ckB` is not supported because:
    operator wasn't built - see `python -m xformers.info` for more info"""
TOLD = (
    "No operator found for `memory_efficient_attention_backward` "
    "(`fa2B@2.5.7-pt`: requires device with capability > (8, 0) but your GPU has capability (7, 5) (too old)"
    "; `ckB`: operator wasn't built - see `python -m xformers.info` for more info)"
)
# As documented: [B, T, H, D], a bias whose rows are laid out at multiples of 8, or a causal one.
PACKAGE = """
import torch

class LowerTriangularMask:
    pass

class Planted(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()
    @staticmethod
    def backward(ctx, grad):
        {backward}

def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None):
    assert query.shape[2] == key.shape[2] == value.shape[2] and p == 0
    logits = torch.einsum("bqhd,bkhd->bhqk", query, key) * (scale or query.shape[-1] ** -0.5)
    if isinstance(attn_bias, LowerTriangularMask):
        seen = torch.ones(logits.shape[-2:], dtype=torch.bool).tril()
        logits = logits.masked_fill(~seen, -torch.inf)
    elif attn_bias is not None:
        assert attn_bias.shape == logits.shape and attn_bias.stride(-2) % 8 == 0
        logits = logits + attn_bias
    calls.append(1)
    return Planted.apply(torch.einsum("bhqk,bkhd->bqhd", logits.softmax(-1), value))

calls = []
"""


class Operators(TorchDispatchMode):
    """Counts torch's operators, and has one of them fail."""

    def __init__(self, broken: str | None = None) -> None:
        super().__init__()
        self.broken, self.count = broken, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.partition(".")[0]
        self.count[name] = self.count.get(name, 0) + 1
        if name == self.broken:
            raise NotImplementedError(MESSAGE)
        return func(*args, **(kwargs or {}))


def a_model(replaced: tuple[int, ...] = ()):
    model = tiny_model("llama")
    if replaced:
        swap(model, SwapSpec(dict.fromkeys(replaced, WINDOWED)), keep_originals=True)
    return model


def a_step(model) -> torch.Tensor:
    """Logits of a padded batch and of a whole text, and a backward of them."""
    ids = torch.arange(40).view(2, 20) + 5
    padded = torch.ones_like(ids)
    padded[1, -4:] = 0
    logits = model(input_ids=ids, attention_mask=padded, use_cache=False).logits
    whole = model(input_ids=ids[:1], use_cache=False).logits
    (logits[0].square().mean() + logits[1, :-4].square().mean() + whole.square().mean()).backward()
    return torch.cat([logits[0], logits[1, :-4], whole[0]]).detach()


def kernels_of(chosen: dict, place: str) -> set[str]:
    return {row["kernel"] for row in chosen["chosen"] if row["place"] == place}


@contextmanager
def a_package(folder: Path, monkeypatch: pytest.MonkeyPatch, backward: str) -> Iterator[list]:
    """xFormers, as documented, on the path."""
    import sys

    (folder / "xformers").mkdir()
    (folder / "xformers" / "__init__.py").write_text("")
    (folder / "xformers" / "ops.py").write_text(PACKAGE.format(backward=backward))
    monkeypatch.syspath_prepend(folder)
    importlib.invalidate_caches()
    try:
        yield importlib.import_module("xformers.ops").calls
    finally:
        for name in ("xformers", "xformers.ops"):
            sys.modules.pop(name, None)


def test_the_words_are_those_of_the_config() -> None:
    assert tuple(ORDER) == SOFTMAX_BACKENDS


@pytest.mark.parametrize(
    ("wanted", "reason"),
    [
        ("efficient", "there is no efficient: torch has no such kernel there"),
        ("xformers", "there is no xformers: xFormers is not installed"),
    ],
)
def test_an_impossible_choice_is_refused_before_weights_are_loaded(
    wanted: str, reason: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if torch.cuda.is_available():
        pytest.skip("it may be possible on this GPU")

    def loading(*_: object) -> None:
        raise AssertionError("a weight was loaded")

    monkeypatch.setattr(pipeline, "load_model", loading)
    words = ["+exp=window", "model=tiny", "precision=fp32", f"softmax_backend={wanted}"]
    assert main(words) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"error: softmax_backend='{wanted}' is not possible; allowed: auto, flash, math,")
    assert "float32 with head_dim=16 on a CPU" in line
    assert reason in line


def test_other_words_are_refused() -> None:
    with pytest.raises(
        UserError, match=r"softmax_backend='cudnn'.*one of auto, flash, efficient, math, xformers"
    ):
        validate(compose(["model=tiny", "softmax_backend=cudnn"]))


@pytest.mark.parametrize("wanted", ["auto", "flash", "math"])
def test_the_choice_reaches_the_kernel(wanted: str) -> None:
    """Four layers, two of them replaced; in training their exact part is written out on a CPU."""
    model = a_model((1, 2))
    expected = 0 if wanted == "math" else 4
    with softmax_kernels(model, wanted, "fp32", training=True) as chosen:
        assert kernels_of(chosen, OWN) == {"math" if wanted == "math" else "flash"}
        assert kernels_of(chosen, WINDOW) == {"math" if wanted == "math" else "flash", "written out"}
        with torch.no_grad(), Operators() as seen:
            model(torch.arange(30)[None], use_cache=False)
        assert seen.count.get(FLASH, 0) == expected
        with Operators() as seen:
            a_step(model)
        assert seen.count.get(f"{FLASH}_backward", 0) == expected  # two calls of two layers


def test_every_kernel_gives_the_same_figures() -> None:
    with softmax_kernels(a_model(), "math", "fp32", training=True):
        want = a_step(a_model())
    with softmax_kernels(a_model(), "flash", "fp32", training=True):
        torch.testing.assert_close(a_step(a_model()), want, atol=1e-5, rtol=1e-4)


def test_a_kernel_without_a_backward_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    model = a_model((1,))
    want = a_step(a_model((1,)))
    with Operators(broken=f"{FLASH}_backward"):
        with pytest.raises(NotImplementedError, match="No operator found"):
            a_step(model)  # what a run without the probe would end with
        model.zero_grad()
        kernels = SoftmaxKernels("auto", "fp32")
        with caplog.at_level(logging.INFO, "replace.softmax_backend"):
            chosen = kernels.settle(model)
            kernels.settle(model)
        try:
            torch.testing.assert_close(a_step(model), want, atol=1e-5, rtol=1e-4)
        finally:
            kernels.close()
    assert "it has no backward: No operator found" in chosen["left_out"]["flash"]
    assert kernels_of(chosen, OWN) == {"math"}
    reasons = [row["why"] for row in chosen["chosen"] if row["kernel"] == "math"]
    assert all(reason.startswith("flash not, since it has no backward") for reason in reasons)
    warned = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warned) == 1
    assert "flash is left out on a CPU: it has no backward" in warned[0]
    assert len({r.getMessage() for r in caplog.records}) == len(caplog.records), "a line was said twice"


def test_a_forced_kernel_without_a_backward_falls_back(caplog: pytest.LogCaptureFixture) -> None:
    model = a_model()
    with Operators(broken=f"{FLASH}_backward"), softmax_kernels(model, "flash", "fp32", True) as chosen:
        a_step(model)
    assert kernels_of(chosen, OWN) == {"math"}
    assert "softmax_backend=flash computes nothing here: math does instead." in caplog.text


def test_a_run_survives_a_missing_backward_and_records_it(tmp_path: Path) -> None:
    sizes = ["layers=first", "layers.k=2", "stages=[3]", "budget.stage3.tokens=512", "eval.base=none"]
    config = compose(["+exp=window", "model=tiny", "budget=smoke", *sizes])
    with Operators(broken=f"{FLASH}_backward"):
        metrics = pipeline.run(config, tmp_path / "run")
    about = metrics["softmax_attention"]
    assert list(about["left_out"]) == ["flash"]
    assert about["wanted"] == "auto"
    assert about["device"] == "a CPU"
    assert metrics["phases"]["stage3"]["training"]["tokens"] > 0
    assert {row["layers"] for row in about["chosen"] if row["place"] == OWN} == {2}
    assert torch.backends.cuda.flash_sdp_enabled()


@pytest.mark.parametrize("wanted", ["math", "flash", "auto"])
def test_everything_is_afterwards_as_it_was(wanted: str) -> None:
    model = a_model((0, 3)).train()
    first = mixers(model)[0]
    first.clamped = first.clamped + 5
    counters = [(m.calls, int(m.clamped), int(m.nonfinite)) for m in mixers(model).values()]
    drawn, modes = torch.get_rng_state(), [m.training for m in model.modules()]
    flags = [
        getattr(torch._C, f"_get_{n}_sdp_enabled")() for n in ("flash", "mem_efficient", "math", "cudnn")
    ]
    order = torch._C._get_sdp_priority_order()
    with softmax_kernels(model, wanted, "bf16", training=True):
        assert [(m.calls, int(m.clamped), int(m.nonfinite)) for m in mixers(model).values()] == counters
        assert torch.equal(torch.get_rng_state(), drawn)
        assert [m.training for m in model.modules()] == modes
        assert all(p.grad is None for p in model.parameters())
    after = [
        getattr(torch._C, f"_get_{n}_sdp_enabled")() for n in ("flash", "mem_efficient", "math", "cudnn")
    ]
    assert after == flags
    assert torch._C._get_sdp_priority_order() == order


def test_the_dtype_is_the_one_that_autocast_computes_in() -> None:
    with softmax_kernels(a_model((1,)), "auto", "bf16") as chosen:
        calls = [row["call"] for row in chosen["chosen"]]
    assert calls
    assert all("bfloat16" in call for call in calls if call != "reading")
    assert any("4 heads on 2 key-value heads, head_dim 16, causal, cpu" in call for call in calls)


def test_eager_attention_is_said_to_write_out_its_own() -> None:
    with softmax_kernels(tiny_model("gemma2"), "auto", "fp32") as chosen:
        (row,) = chosen["chosen"]
    assert row["kernel"] == "written out"
    assert row["layers"] == 4
    assert "eager" in row["why"]


def test_values_that_are_narrower_than_keys_are_asked_for_as_they_are() -> None:
    """Multi-head latent attention: on a CPU flash takes no such heads."""
    with softmax_kernels(tiny_model("deepseek_v3"), "auto", "fp32") as chosen:
        assert kernels_of(chosen, OWN) == {"math"}
        assert all("same last dimension" in row["why"] for row in chosen["chosen"])


@pytest.mark.parametrize("function", [EXPANDED, XFORMERS])
def test_our_attention_functions_are_the_same_attention(
    function: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    want_model, model = a_model((1,)), a_model((1,))
    want = a_step(want_model)
    with a_package(tmp_path, monkeypatch, "return grad"), softmax_backend._own_function(model, function):
        assert model.config._attn_implementation == function
        got = a_step(model)
        with teacher_attention(model), torch.no_grad():
            model(torch.arange(30)[None], use_cache=False)
    assert model.config._attn_implementation == "sdpa"
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    for mine, theirs in zip(model.parameters(), want_model.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-5, rtol=1e-3)


def test_xformers_that_cannot_be_imported_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "xformers").mkdir()
    (tmp_path / "xformers" / "__init__.py").write_text("raise OSError('libcudart.so: no such file')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        UserError, match=r"there is no xformers: xFormers cannot be imported .libcudart.so: no such"
    ):
        validate(compose(["model=tiny", "softmax_backend=xformers"]))


@pytest.mark.unsloth
@pytest.mark.skipif(importlib.util.find_spec("xformers") is None, reason="xFormers is not installed")
def test_the_real_xformers_has_no_operator_on_a_cpu_and_is_refused_in_one_sentence() -> None:
    found = trials_of(torch.device("cpu"), torch.float32, 4, 2, 16)["xformers"]
    assert found.forward is not None
    assert found.forward.startswith("No operator found for `memory_efficient_attention_forward` (")
    assert "device=cpu (supported: {'cuda'})" in found.forward
    assert "\n" not in found.forward
    if torch.cuda.is_available():
        return
    with pytest.raises(UserError, match=r"on a CPU there is no xformers: No operator found .*device=cpu"):
        validate(compose(["model=tiny", "precision=fp32", "softmax_backend=xformers"]))


def test_xformers_serves_the_layers_that_are_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = a_model((1,))
    with a_package(tmp_path, monkeypatch, "return grad") as calls:
        assert trials_of(torch.device("cpu"), torch.float32, 4, 2, 16)["xformers"].refusal is None
        with softmax_kernels(model, "xformers", "fp32", training=True) as chosen:
            assert kernels_of(chosen, OWN) == {"xformers"}
            assert kernels_of(chosen, WINDOW) == {"flash", "written out"}
            del calls[:]
            model(torch.arange(30)[None], use_cache=False)
            assert len(calls) == 3


def test_xformers_without_a_backward_falls_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = a_model((1,))
    with (
        a_package(tmp_path, monkeypatch, f"raise NotImplementedError({MESSAGE!r})") as calls,
        softmax_kernels(model, "xformers", "fp32", training=True) as chosen,
    ):
        del calls[:]
        a_step(model)
        assert not calls
    assert kernels_of(chosen, OWN) == {"flash"}
    assert f"it has no backward: {TOLD} (training, float32" in chosen["left_out"]["xformers"]
    assert "softmax_backend=xformers computes nothing here: flash, written out does instead." in caplog.text


def test_heads_that_share_keys_are_expanded_where_only_that_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Turing: no flash, and the efficient kernel knows nothing of shared key-value heads."""
    inner = softmax_backend.attend

    def turing(kernel: str, q, k, v, **options):
        if kernel.startswith("flash"):
            raise RuntimeError("No available kernel.  Aborting execution.")
        if kernel == "efficient" and q.shape[1] != k.shape[1]:
            raise RuntimeError("No available kernel.  Aborting execution.")
        return inner(kernel.replace("efficient", "math"), q, k, v, **options)

    monkeypatch.setattr(softmax_backend, "attend", turing)
    model = a_model((1,))
    with softmax_kernels(model, "auto", "fp32", training=True) as chosen:
        assert kernels_of(chosen, OWN) == {
            "efficient expanded",
            "efficient",
        }  # transformers expands masked ones
        assert model.config._attn_implementation == EXPANDED
    assert model.config._attn_implementation == "sdpa"
    assert trials_of(torch.device("cpu"), torch.float16, 4, 2, 16)["efficient"].refusal is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("wanted", ["auto", "flash", "efficient", "math"])
def test_on_a_gpu_every_choice_trains_and_agrees(wanted: str, precision: str) -> None:
    results = []
    for name in ("math", wanted):
        model = a_model((1, 2)).cuda()
        ids = torch.arange(128, device="cuda").view(2, 64) + 5
        with softmax_kernels(model, name, precision, training=True) as chosen:
            with softmax_backend.autocast(precision, model.device):
                logits = model(input_ids=ids, use_cache=False).logits.float()
            logits.square().mean().backward()
        results.append(logits.detach())
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
        assert "left to torch" not in str(chosen)
        if name == "efficient":
            assert {kernel.split()[0] for kernel in kernels_of(chosen, OWN)} == {"efficient"}
    torch.testing.assert_close(results[1], results[0], atol=2e-2, rtol=2e-2)
