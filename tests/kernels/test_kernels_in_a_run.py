"""The pipeline with the fused operator and without: one layer, whole stages, and what may be asked for."""

import logging
from collections.abc import Iterable, Iterator

import pytest
import torch
from torch import Tensor

from distill.data import Batch
from distill.stages import language_stage, transfer_stage
from kernels import dispatch
from kernels.linear_attention import op
from kernels.testing import assert_close, tolerance
from replace.attention import gated_delta, infini, linear
from replace.blocks import Call, Heads
from replace.cache import ReplacedCacheLayer
from replace.compose import compose
from replace.config import AttentionConfig, Config
from replace.convert import SwapSpec, swap
from replace.errors import UserError
from replace.mixer import VARIANTS
from replace.rotary import RotarySpec
from replace.tiny import tiny_model
from replace.validation import validate

FORMS = ["reference", pytest.param("triton", marks=pytest.mark.interpret)]
LAYERS = {
    "as measured": {"pairs": 4, "pairs_score": "key_norm"},
    "token gates": {"gate": "token", "write_gate": "none", "feature_map": "elu", "pairs": 0},
    "as published": {"local": "segment", "window": 0, "sinks": 0, "pairs": 0, "clamp": 0.05},
}
LINEAR = {
    "as measured": {"write_gate": "none"},
    "rotated, capped and gated": {"distance_cap": 12, "rotary": True, "window": 8, "sinks": 3},
    "segments without sinks": {
        "local": "segment",
        "window": 0,
        "sinks": 0,
        "feature_map": "elu",
        "clamp": 0.05,
    },
}


def each_by_reference(names: Iterable[str], fused: str) -> list:
    """Each layer by the reference and by the fused form; interpreted, all but `fused` are slow."""
    cases = [pytest.param("reference", name) for name in names]
    for name in names:
        marks = [pytest.mark.interpret, *([] if name == fused else [pytest.mark.slow])]
        cases.append(pytest.param("triton", name, marks=marks))
    return cases


@pytest.fixture(autouse=True)
def _nothing_forced(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(dispatch, "_said", set())
    yield
    dispatch.force("auto")


def layer(
    form: str, changes: dict, off: str = "", variant: str = "infini", **teacher: object
) -> dict[str, Tensor]:
    """A layer fed in three pieces, padded and with a NaN, then token by token; values, state, gradients."""
    dispatch.force(form)
    torch.manual_seed(0)
    options = {"block": 4, "window": 4, "sinks": 1, "distance_cap": 64} | changes
    rotary = None if variant == "infini" else RotarySpec([1.0, 0.3, 0.1, 0.01], "half")
    mixer = VARIANTS.get(variant)(AttentionConfig(**options), Heads(4, 2, 8, 16), rotary)
    mixer.off = frozenset([off] if off else [])
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    length = 23
    q, k, v = (torch.randn(2, heads, length, 8) for heads in (4, 2, 2))
    hidden, real = torch.randn(2, length, 16), torch.rand(2, length) > 0.2
    k[0, 0, 3], real[0, 3] = torch.nan, True
    if variant == "gated_delta":  # too large to be written, and in a block that leaves with a later piece
        k[1, 1, 17], real[1, 17] = 3e15, True
    leaves = [x.requires_grad_() for x in (q, k, v)]
    slot, outs = ReplacedCacheLayer(), []
    for part in (slice(0, 14), slice(14, 20), slice(20, 23)):
        call = Call(hidden[:, part], 0.35, slot=slot, real=real[:, part], **teacher)  # type: ignore[arg-type]
        outs.append(mixer(q[:, :, part], k[:, :, part], v[:, :, part], call))
    torch.cat(outs, 2).nan_to_num().square().sum().backward()
    with torch.no_grad():
        for _ in range(3):
            q, k, v = (torch.randn(2, heads, 1, 8) for heads in (4, 2, 2))
            call = Call(torch.randn(2, 1, 16), 0.35, slot=slot, **teacher)  # type: ignore[arg-type]
            outs.append(mixer(q, k, v, call))
    state = slot.state
    assert state is not None
    found = {"out": torch.cat(outs, 2).nan_to_num()} | state.tensors()
    found |= {name: torch.tensor(float(getattr(mixer, name))) for name in ("clamped", "nonfinite")}
    parameters = {name: x.grad for name, x in mixer.named_parameters() if x.grad is not None}
    inputs = {f"d{i}": x.grad for i, x in enumerate(leaves) if x.grad is not None}
    return {name: x.detach().double().nan_to_num() for name, x in (found | parameters | inputs).items()}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_the_same_by_the_operator(form: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    want = layer("auto", LAYERS[name])
    used = []
    for taken in ("_remember_by", "_read_by"):
        method = getattr(infini.Infini, taken)
        monkeypatch.setattr(
            infini.Infini, taken, lambda *a, m=method, n=taken: (used.append((n, a[2])), m(*a))[1]
        )
    got = layer(form, LAYERS[name])
    assert {(kind, how) for kind, how in used} == {("_remember_by", form), ("_read_by", form)}
    assert got.keys() == want.keys()
    assert (float(want["clamped"]) > 0) == ("clamp" in LAYERS[name])
    for key, value in want.items():
        if value.numel():
            assert_close(key, got[key], value, tolerance(torch.float32))


@pytest.mark.parametrize("off", ["memory", "window"])
def test_an_ablation_is_the_same_by_the_operator(off: str) -> None:
    want, whole = layer("auto", LAYERS["as measured"], off), layer("auto", LAYERS["as measured"])
    got = layer("reference", LAYERS["as measured"], off)
    assert_close("out", got["out"], want["out"], tolerance(torch.float32))
    assert not torch.allclose(want["out"], whole["out"])


def test_what_the_operator_does_not_know_goes_the_general_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(infini.Infini, "_remember_by", None)
    layer("reference", LAYERS["as measured"] | {"update": "delta_bounded"})
    layer("chunk", LAYERS["as measured"])
    layer("auto", LAYERS["as measured"])


@pytest.mark.parametrize(("form", "name"), each_by_reference(LINEAR, "rotated, capped and gated"))
def test_a_linear_layer_is_the_same_by_the_operator(
    form: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"pairs": 0} | LINEAR[name]
    teacher = {"sink_logit": torch.randn(4)} if options.get("sinks", 1) else {}
    want = layer("auto", options, variant="linear", **teacher)
    used, method = [], linear.Linear._attend_by
    monkeypatch.setattr(linear.Linear, "_attend_by", lambda *a: (used.append(a[2]), method(*a))[1])
    got = layer(form, options, variant="linear", **teacher)
    assert set(used) == {form}
    assert len(used) > 3  # each piece, and a token that completes a block
    assert got.keys() == want.keys()
    assert (float(want["clamped"]) > 0) == ("clamp" in options)
    assert float(want["nonfinite"]) > 0
    for key, value in want.items():
        if value.numel():
            assert_close(key, got[key], value, tolerance(torch.float32))


def test_a_linear_layer_goes_the_general_way_where_the_operator_knows_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(linear.Linear, "_attend_by", None)
    plain = {"pairs": 0}
    layer("reference", {"pairs": 4, "pairs_score": "key_norm"}, variant="linear")
    layer("reference", plain | {"update": "delta_bounded"}, variant="linear")
    layer("reference", plain | {"local": "none", "window": 0}, variant="linear")
    for teacher in ({"softcap": 3.0}, {"sliding_window": 5}, {"dropout": 0.1}):
        layer("reference", plain, variant="linear", **teacher)
    layer("reference", plain | {"sinks": 0}, variant="linear", sink_logit=torch.randn(4))
    for off in ("memory", "window", "sinks"):
        layer("reference", plain, off, variant="linear")
    layer("chunk", plain, variant="linear")
    layer("auto", plain, variant="linear")


GATED = {
    "as measured": {"pairs": 0},
    "rotated, with pairs": {
        "pairs": 4,
        "pairs_score": "key_norm",
        "rotary": True,
        "gate": "token",
        "window": 8,
    },
    "segments": {"local": "segment", "window": 0, "sinks": 0, "pairs": 0, "own": {"step_init": 0.9}},
}


@pytest.mark.parametrize(("form", "name"), each_by_reference(GATED, "rotated, with pairs"))
def test_a_gated_delta_layer_is_the_same_by_the_operator(
    form: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"clamp": gated_delta.UNREACHED} | GATED[name]
    want = layer("auto", options, variant="gated_delta")
    used, method = [], gated_delta.GatedDelta._read_by
    monkeypatch.setattr(gated_delta.GatedDelta, "_read_by", lambda *a: (used.append(a[2]), method(*a))[1])
    got = layer(form, options, variant="gated_delta")
    assert set(used) == {form}
    assert len(used) > 3  # each piece, and a token that completes a block
    assert got.keys() == want.keys()
    assert float(want["nonfinite"]) == (1 if options.get("window") else 2)  # or it has not left yet
    for key, value in want.items():
        if value.numel():
            assert_close(key, got[key], value, tolerance(torch.float32))


def test_a_gated_delta_layer_goes_the_general_way_where_the_operator_knows_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gated_delta.GatedDelta, "_read_by", None)
    layer("reference", {"pairs": 0}, variant="gated_delta")  # whose guard may have to limit
    open_ended = {"pairs": 0, "clamp": gated_delta.UNREACHED}
    layer("chunk", open_ended, variant="gated_delta")
    layer("auto", open_ended, variant="gated_delta")


def losses(form: str, steps: int, device: str = "cpu") -> list[float]:
    """The losses of `steps` steps of stage 1 and as many of stage 2 on the tiny model."""
    dispatch.force(form)
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 64}
    model = tiny_model("llama", **sizes, initializer_range=0.2)  # a KL of more than rounding
    model.train().to(device)  # type: ignore[arg-type]  # transformers' decorated `to`
    options = AttentionConfig(block=8, window=8, sinks=2, pairs=4, distance_cap=64)
    swap(model, SwapSpec({0: options}), keep_originals=True)
    config, found = Config(), []
    config.stage.lr_projection1 = 1e-3
    ids = torch.randint(3, 64, (1, 48), generator=torch.Generator().manual_seed(0)).to(device)
    for make in (transfer_stage, lambda *given: language_stage(*given, 2)):
        stage = make(model, config)
        optimizer = torch.optim.AdamW(stage.groups, betas=(0.9, 0.99))
        for _ in range(steps):
            found.append(stage.step(Batch(ids, torch.zeros_like(ids, dtype=torch.bool)), 1.0)["loss"])
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize(
    ("steps", "form", "device"),
    [
        pytest.param(12, "triton", "cpu", marks=pytest.mark.interpret),
        pytest.param(50, "triton", "cpu", marks=[pytest.mark.interpret, pytest.mark.slow]),
        pytest.param(50, "triton", "cuda", marks=pytest.mark.gpu),
        (2, "reference", "cpu"),
    ],
)
def test_training_is_the_same_with_the_kernel_step_by_step(
    steps: int, form: str, device: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "kernels.dispatch")
    want = losses("chunk", steps, device)
    got = losses(form, steps, device)
    said = [line for line in caplog.messages if "infini_memory runs as" in line]
    assert said == [f"infini_memory runs as {form}: backend={form} asks for it"]
    assert len(got) == 2 * steps
    assert want[steps - 1] < want[0]
    assert want[-1] < want[steps]
    limit = tolerance(torch.float32, device)
    wrong = {i: (a, b) for i, (a, b) in enumerate(zip(got, want, strict=True)) if abs(a - b) > limit * abs(b)}
    assert wrong == {}


def test_the_form_is_a_field_of_the_config(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = ["model=tiny", "budget=smoke"]
    assert compose(tiny).kernels.backend == "chunk"
    config = compose([*tiny, "kernels.backend=reference"])
    validate(config)
    with pytest.raises(UserError, match=r"kernels.backend='cuda' .*auto, triton, chunk, reference"):
        validate(compose([*tiny, "kernels.backend=cuda"]))
    asked = compose([*tiny, "kernels.backend=triton"])
    monkeypatch.setattr(dispatch, "triton_refusal", lambda *_: "there is no such thing")
    with pytest.raises(UserError, match=r"kernels.backend='triton'.* since there is no such thing"):
        validate(asked)
    monkeypatch.setattr(dispatch, "triton_refusal", lambda *_: None)
    validate(asked)
    asked.attention.feature_map = "taylor"
    monkeypatch.setattr(op, "LARGEST", 100)
    with pytest.raises(UserError, match="feature_map=taylor has 153 features"):
        validate(asked)


def test_a_forced_form_must_be_one_that_all_operators_have() -> None:
    with pytest.raises(ValueError, match="backend='fla' is not possible; expected one of auto, triton"):
        dispatch.force("fla")
    assert dispatch.choose("op", "auto", torch.device("cpu"), torch.float32) == "chunk"
    dispatch.force("reference")
    assert dispatch.choose("op", "auto", torch.device("cpu"), torch.float32) == "reference"
    assert dispatch.choose("op", "chunk", torch.device("cpu"), torch.float32) == "chunk"
