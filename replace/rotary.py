"""Rotary position encoding at positions of our own choosing, measured from the family's own function.

A replaced layer needs keys without their position (for the memory) and keys at positions other than their own
(for distances that are capped). Families differ in which dimensions they rotate, how they pair them and how
they scale their tables, so none of it is assumed: the family's function is applied to the unit vectors at
position 1, and the matrix that comes out says everything.
"""

import inspect
import sys
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kernels.numerics import wide
from replace.errors import UserError


@dataclass
class RotarySpec:
    """What the matrix at position 1 says; plain numbers, so that an export can hold them.

    Attributes:
        angles: the angle per position of each rotated pair of dimensions, R/2 of them.
        pairing: `half` pairs dimension i with i + R/2, `interleaved` pairs 2i with 2i + 1.
        scaling: what the family multiplies its tables with (YaRN); 1 for most.
    """

    angles: list[float]
    pairing: str
    scaling: float = 1.0

    @property
    def width(self) -> int:
        """R: how many leading dimensions of a head are rotated."""
        return 2 * len(self.angles)


def family_rotation(attention: nn.Module):
    """The `apply_rotary_pos_emb` of the module that defines this attention class, or None."""
    for kind in type(attention).__mro__:
        function = getattr(sys.modules.get(kind.__module__), "apply_rotary_pos_emb", None)
        if function is not None:
            return function
    return None


def unrotate(function, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Take the position out of q and k with the family's own function and tables.

    The inverse of a plane rotation scaled by r is that by the negative angle divided by r^2, and cos^2 +
    sin^2 = r^2 holds entry by entry however the tables are scaled (YaRN) or rounded (bf16); so the division
    goes into the small tables.

    Args:
        q: `[B, H, T, D]`; k: `[B, G, T, D]`; cos, sin: `[B, T, R]`, or half as wide in some families.
        width: how many leading dimensions a call rotates, `RotarySpec.width`.
    """
    cos, sin = wide(cos), wide(sin)
    square = cos.square() + sin.square()
    q, k = wide(q), wide(k)
    if width == q.shape[-1]:
        return function(q, k, cos / square, -sin / square)
    turned_q, turned_k = function(q[..., :width], k[..., :width], cos / square, -sin / square)
    return torch.cat([turned_q, q[..., width:]], dim=-1), torch.cat([turned_k, k[..., width:]], dim=-1)


def rotated_width(function, table: int, head_dim: int) -> int:
    """How many leading dimensions a call of the family's function rotates.

    As many as the table is wide (a part of the head in some families), or the whole head where the table
    holds each angle once and is half as wide (gpt_oss): the first of the two that the function accepts.

    Args:
        table: R, the last dimension of the tables.

    Raises:
        UserError: it accepts neither.
    """
    parameters = list(inspect.signature(function).parameters)
    known = parameters[2:4] == ["cos", "sin"]
    for width in dict.fromkeys((min(table, head_dim), head_dim)) if known else ():
        x, zero = torch.zeros(1, 1, 1, width), torch.zeros(1, 1, table)
        try:
            turned = function(x, x, zero, zero)[0]
        except RuntimeError:  # shapes that do not go together
            continue
        if turned.shape == x.shape:
            return width
    raise UserError(
        f"the model's rotary function {function.__name__}({', '.join(parameters)}) does not rotate heads of "
        f"{head_dim} by tables of {table}, so it cannot be replaced."
    )


def measure_rotary(function, cos: Tensor, sin: Tensor, head_dim: int) -> RotarySpec:
    """Read angles, pairing and scaling off the family's function.

    Args:
        function: the family's `apply_rotary_pos_emb(q, k, cos, sin)`.
        cos, sin: the family's tables `[1, T, R]` with T >= 2 for the positions 0, 1, ...

    Raises:
        UserError: the function takes other arguments, or the rotation is not a set of plane rotations in one
            of the two known pairings.
    """
    width = rotated_width(function, cos.shape[-1], head_dim)
    unit = torch.eye(width, dtype=torch.float32, device=cos.device).view(width, 1, 1, width)
    table = [t[:1, 1:2].float().expand(width, 1, -1) for t in (cos, sin)]
    # Row i: where dimension i goes.
    matrix = function(unit, unit, *table)[0].view(width, width).double().cpu()
    half = torch.arange(width // 2)
    for pairing, first, second in (
        ("half", half, half + width // 2),
        ("interleaved", 2 * half, 2 * half + 1),
    ):
        c, s = matrix[first, first], matrix[first, second]
        rebuilt = torch.zeros_like(matrix)
        rebuilt[first, first], rebuilt[second, second] = c, c
        rebuilt[first, second], rebuilt[second, first] = s, -s
        if torch.allclose(rebuilt, matrix, atol=1e-5):
            scaling = float((c.square() + s.square()).sqrt().mean())
            return RotarySpec(torch.atan2(s, c).tolist(), pairing, round(scaling, 6))
    raise UserError(
        "the model's rotary encoding is neither paired by halves nor interleaved, so it cannot be replaced."
    )


class Rotary(nn.Module):
    """Rotates by integer position, of a block's own frame or of the text, with a measured `RotarySpec`."""

    def __init__(self, spec: RotarySpec, table: int) -> None:
        super().__init__()
        self.spec = spec
        self.table = table

    def tables(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin `[..., R/2]` at integer positions `[...]`."""
        angles = torch.tensor(self.spec.angles, dtype=torch.float64, device=positions.device)
        if positions.device.type == "mps":
            angles = angles.float()
        phase = positions.unsqueeze(-1).to(angles.dtype) * angles
        return (phase.cos() * self.spec.scaling).to(dtype), (phase.sin() * self.spec.scaling).to(dtype)

    def forward(self, x: Tensor, positions: Tensor, absolute: bool = False) -> Tensor:
        """Rotate `x [..., N, D]` to integer `positions [..., N]` (broadcast), in fp32 or x's fp64.

        `absolute`: the positions are those of the text rather than of a frame, and may exceed the table.
        """
        x = wide(x)
        cos, sin = self.tables(positions, x.dtype) if absolute else self._look_up(positions, x.dtype)
        width = self.spec.width
        turn, rest = x[..., :width], x[..., width:]
        if self.spec.pairing == "half":
            a, b = turn.chunk(2, dim=-1)
        else:
            a, b = turn[..., 0::2], turn[..., 1::2]
        first = torch.addcmul(a * cos, b, sin, value=-1)
        second = torch.addcmul(b * cos, a, sin)
        if self.spec.pairing == "interleaved":
            first, second = torch.stack([first, second], dim=-1).flatten(-2).chunk(2, dim=-1)
        return torch.cat([first, second, rest] if rest.shape[-1] else [first, second], dim=-1)

    def _look_up(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Tables cached for the positions below `table`, all that a capped frame has; else computed."""
        if not self.table:
            return self.tables(positions, dtype)
        key = (positions.device, dtype)
        cached = self.__dict__.setdefault("_cached", {})
        if key not in cached:
            with torch.inference_mode(False):  # else a later backward could not use them
                cached[key] = self.tables(torch.arange(self.table, device=positions.device), dtype)
        cos, sin = cached[key]
        embed = torch.nn.functional.embedding
        return embed(positions, cos), embed(positions, sin)
