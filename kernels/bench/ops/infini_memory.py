"""The Infini memory with a gate and a write gate a token, in blocks as the default experiment has them."""

from typing import Any

import torch

import kernels
from kernels.bench.ops.base import Draw, Given, Op, Outputs, Shape

BLOCK, LOOKBACK = 32, 1


class InfiniMemory(Op):
    """`kernels.infini_memory`; the local attention that it is mixed with is given, and not timed."""

    name = "infini_memory"
    leaves = ("q", "k", "v", "local", "gate", "write_gate")

    def draw(self, draw: Draw, tokens: int, shape: Shape) -> Given:
        """phi(q), phi(k), v, the local answer and both gates."""
        return {
            "q": draw.feature(tokens, shape.heads, shape.width),
            "k": draw.feature(tokens, shape.groups, shape.width),
            "v": draw.normal(tokens, shape.groups, shape.width),
            "local": draw.normal(tokens, shape.heads, shape.width),
            "gate": draw.share(tokens, shape.heads),
            "write_gate": draw.share(tokens, shape.groups),
        }

    def ours(self, given: Given, backend: str) -> Outputs:
        """out, M, z, n and the counters."""
        everything: dict[str, Any] = given | {"block": BLOCK, "lookback": LOOKBACK, "backend": backend}
        out, state, counters = kernels.infini_memory(**everything)
        return (out, *state, *counters)

    def ours_step(self, given: Given, backend: str) -> Outputs:
        """out: a token writes nothing by itself."""
        state = (given["M"], given["z"], given["n"])
        return (
            kernels.infini_memory_step(given["q"], given["local"], given["gate"], state, backend=backend),
        )

    def context(self, draw: Draw, shape: Shape) -> Given:
        """A state of `shape.length` tokens."""
        read = self.arranged(self.draw(draw, shape.batch * shape.length, shape), shape.batch, shape.length)
        with torch.no_grad():
            _, M, z, n, *_ = self.ours(read, "auto")
        token = self.draw(draw, shape.batch, shape)
        return {name: token[name] for name in ("q", "local", "gate")} | {"M": M, "z": z, "n": n}

    def flops(self, shape: Shape, direction: str) -> float:
        """A product of F x D to write, for each key-value head, and one to read, for each head."""
        if direction == "decode":
            return 2.0 * shape.batch * shape.heads * shape.width**2
        forward = 2.0 * shape.batch * shape.length * (shape.heads + shape.groups) * shape.width**2
        return 3 * forward if direction == "forward_backward" else forward
