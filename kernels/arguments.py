"""Checks of what the operators are given, in one place: every refusal names the argument and its shape.

Nothing here waits for a device, but for `check_borders`, which reads the borders of packed sequences once.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.int32, torch.int64)


class Sizes(NamedTuple):
    """B, T, H, G, F, D, and N: states, one a row or one a packed sequence."""

    batch: int
    length: int
    heads: int
    groups: int
    features: int
    width: int
    states: int

    def state(self, *last: int) -> tuple[int, ...]:
        """A state's shape: `[N, G, *last]`."""
        return (self.states, self.groups, *last)


def _shape(x: Tensor) -> str:
    return f"[{', '.join(str(int(n)) for n in x.shape)}]"


def expect(
    name: str,
    x: object,
    letters: str,
    shape: Sequence[int | None],
    dtypes: Sequence[torch.dtype],
    device: torch.device,
) -> None:
    """Refuse what is not a dense tensor of that shape, dtype and device.

    Args:
        name: the argument.
        letters: its dimensions by name, such as "B, T, H, F".
        shape: the expected sizes, None where any size above 0 will do.
        dtypes: the dtypes allowed.
        device: where it must be.

    Raises:
        ValueError: naming the argument, what it is and what is expected.
    """
    if not isinstance(x, Tensor):
        raise ValueError(f"{name} is a {type(x).__name__}; expected a tensor [{letters}].")
    same = (have > 0 if want is None else have == want for have, want in zip(x.shape, shape, strict=False))
    sound = x.dim() == len(shape) and all(same)
    if sound and x.dtype in dtypes and x.device == device and x.layout == torch.strided:
        return  # at once: a decoded token would wait for words that nobody reads
    sizes = ", ".join("any" if n is None else str(int(n)) for n in shape)
    wanted = f"expected [{letters}] = [{sizes}]"
    if x.dim() != len(shape):
        raise ValueError(f"{name} has shape {_shape(x)}, {x.dim()} dimensions; {wanted}.")
    for have, want in zip(x.shape, shape, strict=True):
        if want is not None and have != want:
            raise ValueError(f"{name} has shape {_shape(x)}; {wanted}.")
        if have == 0:
            raise ValueError(f"{name} has shape {_shape(x)}; {wanted}, no size of which may be 0.")
    if x.dtype not in dtypes:
        allowed = " or ".join(str(dtype) for dtype in dtypes)
        raise ValueError(f"{name} {_shape(x)} is {x.dtype}; expected {allowed}.")
    if x.device != device:
        raise ValueError(f"{name} {_shape(x)} is on {x.device}; expected {device}, where q is.")
    if x.layout != torch.strided:
        raise ValueError(f"{name} {_shape(x)} has layout {x.layout}; expected torch.strided, a dense tensor.")


def check_qkv(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None = None) -> Sizes:
    """q `[B, T, H, F]`, k `[B, T, G, F]`, v `[B, T, G, D]` of one dtype and device, and G divides H.

    Args:
        cu_seqlens: `[N + 1]` int, where packed sequences begin and end; B must be 1 then.

    Raises:
        ValueError: as `expect`.
    """
    if not isinstance(q, Tensor):
        raise ValueError(f"q is a {type(q).__name__}; expected a tensor [B, T, H, F].")
    expect("q", q, "B, T, H, F", (None,) * 4, FLOATS, q.device)
    batch, length, heads, features = q.shape
    expect("k", k, "B, T, G, F", (batch, length, None, features), (q.dtype,), q.device)
    expect("v", v, "B, T, G, D", (batch, length, k.shape[2], None), (q.dtype,), q.device)
    check_groups(q, k, heads, k.shape[2])
    states = batch
    if cu_seqlens is not None:
        expect("cu_seqlens", cu_seqlens, "N + 1", (None,), INTEGERS, q.device)
        if cu_seqlens.shape[0] < 2:
            raise ValueError(f"cu_seqlens has shape {_shape(cu_seqlens)}; expected [N + 1], N of 1 or more.")
        if batch != 1:
            raise ValueError(f"q has shape {_shape(q)}; expected [B, T, H, F] with B = 1 beside cu_seqlens.")
        states = cu_seqlens.shape[0] - 1
    return Sizes(batch, length, heads, k.shape[2], features, v.shape[3], states)


def check_one_token(q: Tensor, k: Tensor, v: Tensor) -> Sizes:
    """q `[B, H, F]`, k `[B, G, F]`, v `[B, G, D]` of one dtype and device, and G divides H.

    Raises:
        ValueError: as `expect`.
    """
    if not isinstance(q, Tensor):
        raise ValueError(f"q is a {type(q).__name__}; expected a tensor [B, H, F].")
    expect("q", q, "B, H, F", (None,) * 3, FLOATS, q.device)
    batch, heads, features = q.shape
    expect("k", k, "B, G, F", (batch, None, features), (q.dtype,), q.device)
    expect("v", v, "B, G, D", (batch, k.shape[1], None), (q.dtype,), q.device)
    check_groups(q, k, heads, k.shape[1])
    return Sizes(batch, 1, heads, k.shape[1], features, v.shape[2], batch)


def check_groups(q: Tensor, k: Tensor, heads: int, groups: int) -> None:
    """G must divide H.

    Raises:
        ValueError: it does not.
    """
    if heads % groups:
        raise ValueError(
            f"q has shape {_shape(q)} and k {_shape(k)}; expected H = {heads} to be a multiple of "
            f"G = {groups}."
        )


def check_mask(mask: Tensor | None, q: Tensor, shape: Sequence[int]) -> None:
    """mask `[B, T]` (or `[B]`, for one token) bool on q's device, if there is one.

    Raises:
        ValueError: as `expect`.
    """
    if mask is not None:
        letters = ", ".join("BT"[: len(shape)])
        expect("mask", mask, letters, shape, (torch.bool,), q.device)


def state_dtype(q: Tensor) -> torch.dtype:
    """fp32, or fp64 for fp64 inputs."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def check_state(name: str, x: Tensor, letters: str, shape: Sequence[int], q: Tensor) -> None:
    """One tensor of a state: its exact shape, in `state_dtype`, on q's device.

    Raises:
        ValueError: as `expect`.
    """
    expect(name, x, letters, shape, (state_dtype(q),), q.device)


def check_choice(name: str, value: object, allowed: Sequence[object]) -> None:
    """A word out of a list.

    Raises:
        ValueError: with the list.
    """
    if value not in allowed:
        words = ", ".join(str(item) for item in allowed)
        raise ValueError(f"{name}={value!r} is not possible; expected one of {words}.")


def check_number(name: str, value: object, least: int) -> None:
    """A whole number of at least `least`.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}={value!r} is not possible; expected a whole number of at least {least}.")


def check_real(name: str, value: object, zero: bool = False, words: str = "") -> None:
    """A finite number above 0, or of at least 0 where `zero`; `words` are what else is allowed.

    Raises:
        ValueError: it is not.
    """
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (number and math.isfinite(value) and (value >= 0 if zero else value > 0)):  # type: ignore[arg-type, operator]
        least = "of at least 0" if zero else "above 0"
        raise ValueError(f"{name}={value!r} is not possible; expected a finite number {least}{words}.")


_checked: WeakIdKeyDictionary = WeakIdKeyDictionary()


def check_borders(cu_seqlens: Tensor, length: int) -> list[int] | None:
    """The values of cu_seqlens: 0 first, T last, rising, so that no sequence is empty.

    They are read once a tensor, since the same one is given to every layer; on a GPU that waits for it,
    unless a CUDA graph is being captured. What is not checked cannot do harm: `kernels.packing` holds the
    values to 0..T.

    Returns:
        the values; None where a capture keeps them from being read.

    Raises:
        ValueError: with the first border that is wrong.
    """
    # A tensor made under inference_mode counts no changes, so what was read of it may be out of date.
    now = None if cu_seqlens.is_inference() else (cu_seqlens._version, length)
    if now is not None:
        known, borders = _checked.get(cu_seqlens, (None, None))
        if known == now:
            return borders
    if cu_seqlens.is_cuda and torch.cuda.is_current_stream_capturing():
        return None
    borders = cu_seqlens.tolist()
    if borders[0] != 0:
        raise ValueError(f"cu_seqlens[0] is {borders[0]}; expected 0.")
    if borders[-1] != length:
        raise ValueError(f"cu_seqlens ends with {borders[-1]}; expected T = {length}.")
    for n, (start, stop) in enumerate(pairwise(borders)):
        if stop <= start:
            raise ValueError(
                f"cu_seqlens[{n + 1}] is {stop} after {start}; expected rising values, no sequence empty."
            )
    if now is not None:
        _checked[cu_seqlens] = (now, borders)
    return borders
