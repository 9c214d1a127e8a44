"""Which kernel computes what is left of softmax attention, here, for this dtype and layout of heads, and why.

Two places are left: the attention of layers that are not replaced (the teacher's are none of them at first),
and the exact part of replaced layers. Both call torch's scaled_dot_product_attention, whose dispatcher knows
when a kernel has no forward for a call, and takes the next. It does not know when one has no backward: that
is found out here, on the very calls of the model and before anything is trained, and such a kernel is left
out of the run, with the reason in its log and in metrics.json.

xFormers is no kernel of torch's. Where it is asked for, the layers that are not replaced go through an
attention function of ours. So they do where only kernels can run that know nothing of shared key-value heads:
torch would answer them with the one that holds the whole T x T matrix.

What is not asked of a kernel: an exact part that shares its denominator with a memory, that has a soft cap
or a learned sink, or that trains on a CPU, is written out in `kernels.exact_attention`; a model loaded with
eager attention writes out its own.
"""

import importlib
import importlib.util
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from replace.convert import at_rest, attention_layers, conversion_of, probe_ids, uncounted
from replace.layer import AttentionModule, ReplacedAttention
from replace.precision import autocast

logger = logging.getLogger(__name__)

KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
"""Torch's own. cuDNN's is left out: it plans anew for every length, and few GPUs have it."""
ORDER = {
    "auto": ("flash", "efficient", "math"),
    "flash": ("flash", "efficient", "math"),
    "efficient": ("efficient", "flash", "math"),
    "math": ("math",),
    "xformers": ("flash", "efficient", "math"),
}
"""What a choice prefers, for a call that its first kernel cannot take the next one."""

EXPANDED = "layer_replace_expanded"
XFORMERS = "layer_replace_xformers"
OWN, WINDOW = "layers that are not replaced", "exact part of replaced layers"
WRITTEN_OUT = {
    OWN: "the model is loaded with eager attention",
    WINDOW: "with a memory's denominator, a soft cap, learned sinks or training on a CPU no kernel serves",
}
UNSUPPORTED = " is not supported because:"
"""How xFormers begins to say why it does not take one of its operators."""
ALIGNED = 8
"""Keys to a multiple of which xFormers wants the memory of a mask laid out."""
LENGTH = 24
"""Tokens of the text on which the calls are seen."""

Attend = Callable[..., Tensor]


@dataclass(frozen=True)
class Layout:
    """One kind of call: what decides which kernels can take it.

    Attributes:
        place: `OWN` or `WINDOW`.
        training: whether gradients are wanted.
        heads, kv_heads: H and G; where the caller has expanded the keys, G is H.
        head_dim, value_dim: D of queries and keys, and of values.
        mask: none, bool or additive.
    """

    place: str
    training: bool
    device: str
    dtype: torch.dtype
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    mask: str
    causal: bool

    def __str__(self) -> str:
        shared = "" if self.heads == self.kv_heads else f" on {self.kv_heads} key-value heads"
        seen = "causal" if self.causal else "no mask" if self.mask == "none" else f"{self.mask} mask"
        when = "training" if self.training else "reading"
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{when}, {dtype}, {self.heads} heads{shared}, head_dim {self.head_dim}, {seen}, {self.device}"


@dataclass
class Trial:
    """What came of asking one kernel for one layout; both None if it can.

    Attributes:
        forward, backward: why there is none.
    """

    forward: str | None = None
    backward: str | None = None

    @property
    def refusal(self) -> str | None:
        """Why it cannot be used, or None."""
        return self.forward or self.backward


@dataclass
class Seen:
    """What was seen of a layout: which layers call so, and what came of each kernel, by name."""

    layers: set[int] = field(default_factory=set)
    trials: dict[str, Trial] = field(default_factory=dict)


# One call, one kernel


def attend(kernel: str, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """softmax(scale q k^T + mask) v by one kernel and no other.

    Args:
        kernel: of `KERNELS`, "xformers", or one of them with " expanded", which repeats the key-value heads.
        q: `[B, H, T, D]`; k: `[B, G, P, D]`; v: `[B, G, P, Dv]`.
        options: those of scaled_dot_product_attention.

    Returns:
        `[B, H, T, Dv]`.

    Raises:
        RuntimeError, ValueError, ImportError: the kernel cannot take it.
    """
    name, _, expanded = kernel.partition(" ")
    if name == "xformers":
        options.pop("enable_gqa", None)
        return _xformers(q, k, v, **options)
    if expanded:
        repeat = q.shape[1] // k.shape[1]
        k, v, options = repeat_kv(k, repeat), repeat_kv(v, repeat), options | {"enable_gqa": False}
    with sdpa_kernel([KERNELS[name]]):
        return F.scaled_dot_product_attention(q, k, v, **options)


def _xformers(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """As `attend`. xFormers takes `[B, T, H, D]`; heads that share keys are given them expanded."""
    operators = importlib.import_module("xformers.ops")
    repeat = q.shape[1] // k.shape[1]
    k, v = repeat_kv(k, repeat), repeat_kv(v, repeat)
    bias: Any = None
    if attn_mask is not None:
        batch, heads, queries, _ = q.shape
        keys = k.shape[2]
        room = q.new_zeros(batch, heads, queries, -(-keys // ALIGNED) * ALIGNED)
        bias = room[..., :keys]
        if attn_mask.dtype == torch.bool:
            bias.masked_fill_(~attn_mask, -torch.inf)
        else:
            bias.copy_(attn_mask.expand_as(bias))
    elif is_causal:
        bias = operators.LowerTriangularMask()
    tensors = [x.transpose(1, 2).to(v.dtype) for x in (q, k, v)]
    out = operators.memory_efficient_attention(*tensors, attn_bias=bias, p=dropout_p, scale=scale)
    return out.transpose(1, 2)


def attempt(kernel: str, tensors: Sequence[Tensor], options: dict[str, Any], training: bool) -> Trial:
    """Ask `kernel` for the output of this call and, in training, for its gradients.

    Args:
        tensors: query, key and value as in `attend`; they and their gradients are left alone.
    """
    q, k, v = (x.detach().requires_grad_(training) for x in tensors)
    with warnings.catch_warnings(record=True) as said, torch.set_grad_enabled(training):
        warnings.simplefilter("always")  # torch warns with the reason and raises without one
        try:
            out = attend(kernel, q, k, v, **options)
            _settle(out)
        except (RuntimeError, ValueError, ImportError) as error:
            return Trial(forward=_reason(error, said))
        if not training:
            return Trial()
        try:
            torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
            _settle(out)
        except (RuntimeError, ValueError) as error:
            return Trial(backward=f"it has no backward: {_reason(error, said)}")
    return Trial()


def _settle(x: Tensor) -> None:
    """Wait for the device: what a kernel fails of is said there, and later."""
    if x.device.type == "cuda":
        torch.cuda.synchronize(x.device)


def _reason(error: Exception, said: Sequence[warnings.WarningMessage]) -> str:
    """One line: what torch warned of last, else the error's first line, with what xFormers says below it."""
    told = [str(one.message).partition(" (Triggered")[0].strip() for one in said]
    told = [line for line in told if line and not line.endswith("because:")]
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    own = lines[0] if lines else type(error).__name__
    # Of each operator of xFormers' the first of its reasons; the shapes between are in the layout.
    first = [
        f"{line.removesuffix(UNSUPPORTED)}: {reason}"
        for line, reason in pairwise(lines)
        if line.endswith(UNSUPPORTED)
    ]
    if first:
        own = f"{own.removesuffix(' with inputs:')} ({'; '.join(first)})"
    vague = own.startswith(("No available kernel", "No viable backend"))
    if vague and not told:
        return "torch has no such kernel there"
    return (told[-1] if vague else own).rstrip(".")


# What a machine can do, without a model


def trials_of(
    device: torch.device,
    dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    head_dim: int,
    names: Sequence[str] = (*KERNELS, "xformers"),
) -> dict[str, Trial]:
    """What comes of kernels, by name, for training causal attention of such heads, on a few drawn tokens."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, count, LENGTH, head_dim) for count in (heads, kv_heads, kv_heads)]
    tensors = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
    options = {"is_causal": True, "enable_gqa": heads != kv_heads}
    found = {}
    for name in names:
        found[name] = _asked(name, tensors, options, True)
        if found[name].refusal and name != "xformers" and heads != kv_heads:
            again = _asked(f"{name} expanded", tensors, options, True)
            found[name] = again if again.forward is None else found[name]
    return found


def _asked(kernel: str, tensors: Sequence[Tensor], options: dict[str, Any], training: bool) -> Trial:
    if kernel == "xformers":
        if importlib.util.find_spec("xformers") is None:
            return Trial(forward="xFormers is not installed")
        try:
            importlib.import_module("xformers.ops")
        except (ImportError, OSError, RuntimeError, AttributeError) as error:
            return Trial(forward=f"xFormers cannot be imported ({_reason(error, ())})")
    if not kernel.startswith(("math", "xformers")) and tensors[0].device.type not in ("cuda", "cpu"):
        return Trial(forward=f"on {tensors[0].device.type} torch has one kernel of its own")
    return attempt(kernel, tensors, options, training)


def device_name(device: torch.device) -> str:
    """The device in words, a GPU with its architecture."""
    if device.type != "cuda":
        return {"cpu": "a CPU", "mps": "Apple's GPU"}.get(device.type, device.type)
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)} (sm_{major}{minor})"


# The calls of a model


class _Calls(TorchFunctionMode):
    """Sees each kind of call to scaled_dot_product_attention once and tries every kernel on it."""

    def __init__(self, wanted: str) -> None:
        super().__init__()
        self.wanted = wanted
        self.here: list[tuple[str, int]] = []
        self.seen: dict[Layout, Seen] = {}
        self.silent: dict[tuple[str, bool], set[int]] = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention or not self.here:
            return func(*args, **kwargs)
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        call = dict(zip(names, args, strict=False)) | kwargs
        tensors = [call.pop(name) for name in names[:3]]
        place, layer = self.here[-1]
        training = torch.is_grad_enabled()
        layout = _layout(place, training, tensors, call)
        seen = self.seen.setdefault(layout, Seen())
        seen.layers.add(layer)
        self.silent[place, training].discard(layer)
        if not seen.trials:
            with torch.autocast(layout.device, enabled=False):
                tensors = [x.to(layout.dtype) for x in tensors]
                if layout.mask == "additive":
                    call["attn_mask"] = call["attn_mask"].to(layout.dtype)
                seen.trials = self._try(layout, tensors, call)
        return func(*args, **kwargs)

    def _try(self, layout: Layout, tensors: list[Tensor], call: dict[str, Any]) -> dict[str, Trial]:
        trials = {name: _asked(name, tensors, call, layout.training) for name in KERNELS}
        if layout.place == OWN and layout.heads != layout.kv_heads:
            for name in KERNELS:
                if trials[name].refusal:
                    again = f"{name} expanded"
                    trials[again] = _asked(again, tensors, call, layout.training)
        if layout.place == OWN and self.wanted == "xformers":
            trials["xformers"] = _asked("xformers", tensors, call, layout.training)
        return trials

    @contextmanager
    def watching(self, model: PreTrainedModel) -> Iterator[None]:
        """Within the block it is known which layer calls."""

        def enter(module: AttentionModule, *_: object) -> None:
            place = WINDOW if isinstance(module, ReplacedAttention) else OWN
            self.here.append((place, module.layer_idx))
            self.silent.setdefault((place, torch.is_grad_enabled()), set()).add(module.layer_idx)

        def leave(*_: object) -> None:
            self.here.pop()

        hooks = []
        for _, module in attention_layers(model):
            hooks += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _layout(place: str, training: bool, tensors: Sequence[Tensor], call: dict[str, Any]) -> Layout:
    """The dtype is the one in which autocast has a kernel compute."""
    q, k, v = tensors
    mask, device = call.get("attn_mask"), q.device.type
    lower = torch.is_autocast_enabled(device) and q.dtype != torch.float64
    return Layout(
        place=place,
        training=training,
        device=device,
        dtype=torch.get_autocast_dtype(device) if lower else v.dtype,
        heads=q.shape[1],
        kv_heads=k.shape[1],
        head_dim=q.shape[-1],
        value_dim=v.shape[-1],
        mask="none" if mask is None else "bool" if mask.dtype == torch.bool else "additive",
        causal=bool(call.get("is_causal", False)),
    )


def _look(model: PreTrainedModel, wanted: str, precision: str, training: bool) -> _Calls:
    """Let the model read a few tokens, whole and padded, with gradients and without.

    Weights, counters and the state of random numbers are afterwards what they were.
    """
    ids = probe_ids(model, LENGTH).repeat(2, 1)
    padded = torch.ones_like(ids)
    padded[1, -3:] = 0
    calls = _Calls(wanted)
    devices = [model.device] if model.device.type == "cuda" else []
    fork = torch.random.fork_rng(devices=devices)
    with fork, uncounted(model), at_rest(model), autocast(precision, model.device):
        for graph in (False, True) if training else (False,):
            with torch.set_grad_enabled(graph), calls.watching(model), calls:
                model(input_ids=ids[:1], use_cache=False)
                model(input_ids=ids, attention_mask=padded, use_cache=False)
    return calls


# What a run chooses


class SoftmaxKernels:
    """The choice of a run, in force from `settle` to `close`."""

    def __init__(self, wanted: str, precision: str, training: bool = True) -> None:
        """wanted: a key of `ORDER`; training: whether there will be a backward."""
        self.wanted, self.precision, self.training = wanted, precision, training
        self._seen: dict[Layout, Seen] = {}
        self._written: dict[tuple[str, bool], int] = {}
        self._said: set[str] = set()
        self._stack = ExitStack()

    def settle(self, model: PreTrainedModel) -> dict:
        """Look at the model's calls, choose, and put the choice in force; once more after a swap.

        A kernel that has no backward for one of them is left out, as is one that was asked for and can take
        none of them: then the next stands in, with a warning.

        Returns:
            `{"wanted", "device", "chosen": [{"place", "layers", "call", "kernel", "why"}], "left_out":
            {kernel: why}}` for metrics.json.
        """
        self.close()
        calls = _look(model, self.wanted, self.precision, self.training)
        self._seen |= calls.seen
        self._written |= {key: len(layers) for key, layers in calls.silent.items()}
        broken = self._broken()
        order = [name for name in ORDER[self.wanted] if name not in broken]
        rows = [self._row(layout, seen, broken) for layout, seen in self._seen.items()]
        function = self._function(rows)
        if function is not None:
            self._stack.enter_context(_own_function(model, function))
        if order and model.device.type in ("cuda", "cpu"):
            backends = [KERNELS[name] for name in order]
            self._stack.enter_context(sdpa_kernel(backends, set_priority=True))
        for (place, training), layers in self._written.items():
            if layers:
                call = "training" if training else "reading"
                rows.append(_described(place, layers, call, "written out", WRITTEN_OUT[place]))
        where = device_name(model.device)
        self._say(rows, broken, where)
        return {"wanted": self.wanted, "device": where, "chosen": rows, "left_out": broken}

    def close(self) -> None:
        """Leave torch and the models as they were."""
        self._stack.close()

    def _broken(self) -> dict[str, str]:
        """Kernels that take a call and cannot give its gradients; torch would choose them all the same."""
        found: dict[str, str] = {}
        for layout, seen in self._seen.items():
            for kernel, trial in seen.trials.items():
                if trial.backward:
                    found.setdefault(kernel.split(" ")[0], f"{trial.backward} ({layout})")
        return found

    def _xformers_refusal(self) -> str | None:
        """Why xFormers is not used, or None: it must be able to take every call of the layers it serves."""
        if self.wanted != "xformers":
            return "it was not asked for"
        asked = [seen.trials["xformers"] for layout, seen in self._seen.items() if layout.place == OWN]
        refusals = [trial.refusal for trial in asked if trial.refusal]
        return refusals[0] if refusals else None if asked else "no layer calls for it"

    def _row(self, layout: Layout, seen: Seen, broken: dict[str, str]) -> dict:
        """The first kernel of the order that can take this call, and why not those before it."""
        order, reasons = ORDER[self.wanted], list[str]()
        if self.wanted == "xformers" and layout.place == OWN:
            order = ("xformers", *order)
        for name in order:
            trials = {form: seen.trials.get(form) for form in (name, f"{name} expanded")}
            refusal = self._xformers_refusal() if name == "xformers" else broken.get(name)
            for form, trial in trials.items():
                if trial is not None and not (refusal or trial.refusal):
                    why = "; ".join(reasons) or ("asked for" if self.wanted == name else "the first that can")
                    return _described(layout.place, len(seen.layers), str(layout), form, why)
            own = trials[name]
            reasons.append(f"{name} not, since {refusal or (own and own.refusal)}")
        return _described(layout.place, len(seen.layers), str(layout), "left to torch", "; ".join(reasons))

    def _function(self, rows: Sequence[dict]) -> str | None:
        """The attention function that layers which are not replaced need for this choice, if one of ours."""
        kernels = {row["kernel"] for row in rows if row["place"] == OWN}
        if "xformers" in kernels:
            return XFORMERS
        return EXPANDED if any(kernel.endswith(" expanded") for kernel in kernels) else None

    def _say(self, rows: Sequence[dict], broken: dict[str, str], where: str) -> None:
        """Each thing once a run; what was asked for and could not be had as a warning."""
        for kernel, why in broken.items():
            self._once(logging.WARNING, f"softmax attention: {kernel} is left out on {where}: {why}")
        for row in rows:
            line = (
                f"softmax attention, {row['place']} ({row['call']}): {row['kernel']} on {where}; {row['why']}"
            )
            self._once(logging.INFO, line)
        used = {row["kernel"].removesuffix(" expanded") for row in rows}
        if self.wanted not in ("auto", "math") and self.wanted not in used:
            self._once(
                logging.WARNING,
                f"softmax_backend={self.wanted} computes nothing here: "
                f"{', '.join(sorted(used)) or 'nothing'} does instead.",
            )

    def _once(self, level: int, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
            logger.log(level, line)


def _described(place: str, layers: int, call: str, kernel: str, why: str) -> dict:
    return {"place": place, "layers": layers, "call": call, "kernel": kernel, "why": why}


@contextmanager
def softmax_kernels(
    model: PreTrainedModel, wanted: str, precision: str, training: bool = False
) -> Iterator[dict]:
    """Within the block the choice for `model` is in force; yields what `SoftmaxKernels.settle` returns."""
    kernels = SoftmaxKernels(wanted, precision, training)
    try:
        yield kernels.settle(model)
    finally:
        kernels.close()


# Attention functions of ours, for layers that are not replaced


def expanded_attention(
    module: AttentionModule,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs,
) -> tuple[Tensor, None]:
    """As transformers' sdpa, on keys `[B, G, T, D]` that are repeated for each head first."""
    repeat = getattr(module, "num_key_value_groups", 1)
    bare: Any = SimpleNamespace(is_causal=getattr(module, "is_causal", True))
    return sdpa_attention_forward(
        bare, query, repeat_kv(key, repeat), repeat_kv(value, repeat), attention_mask, **kwargs
    )


def xformers_attention(
    module: AttentionModule,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """By xFormers, `[B, T, H, D]`; a mask that is None is causal, as it is for transformers' sdpa."""
    tokens = query.shape[2]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = tokens > 1 and attention_mask is None and causal
    if causal:  # keys beyond the queries are empty room of a static cache
        key, value = key[:, :, :tokens], value[:, :, :tokens]
    out = _xformers(query, key, value, attention_mask, dropout, causal, scaling)
    return out.transpose(1, 2).contiguous(), None


for _name, _function in ((EXPANDED, expanded_attention), (XFORMERS, xformers_attention)):
    AttentionInterface.register(_name, _function)
    AttentionMaskInterface.register(_name, sdpa_mask)


@contextmanager
def _own_function(model: PreTrainedModel, function: str) -> Iterator[None]:
    """Within the block the layers that are not replaced, and kept originals, attend by `function`."""
    modules = [module for _, module in attention_layers(model) if not isinstance(module, ReplacedAttention)]
    modules += list(conversion_of(model).originals.values()) if hasattr(model, "layer_replace") else []
    configs = [model.config, model.config.get_text_config(decoder=True), *(m.config for m in modules)]
    configs = [c for c in {id(c): c for c in configs}.values() if c._attn_implementation == "sdpa"]
    try:
        for config in configs:
            config._attn_implementation_internal = function
        yield
    finally:
        for config in configs:
            config._attn_implementation_internal = "sdpa"
