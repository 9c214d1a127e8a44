"""Window, sinks and a linear sum under one denominator, in blocks as the default experiment has them."""

import importlib
from typing import Any

import torch

import kernels
from kernels.bench.ops.base import Draw, Given, Op, Outputs, Shape

NAME = "window_linear_attention"
SPAN: dict[str, Any] = {"block": 32, "window": 32, "sinks": 4}
STATE = ("M", "z", "n", "blocks", "sink_k", "sink_v", "sink_seen")


def there() -> bool:
    """Whether this version of the kernels has the operator."""
    return NAME in kernels.__all__


class WindowLinearAttention(Op):
    """`kernels.window_linear_attention`, its window's softmax included."""

    name = NAME
    leaves = ("q", "k", "v", "phi_q", "phi_k", "write_gate")

    def __init__(self) -> None:
        self._op: Any = importlib.import_module(f"kernels.{NAME}.op")
        self._state: Any = importlib.import_module(f"kernels.{NAME}.state").WindowLinearState

    def draw(self, draw: Draw, tokens: int, shape: Shape) -> Given:
        """q, k and v, phi(q) and phi(k), and the write gate."""
        return {
            "q": draw.normal(tokens, shape.heads, shape.width),
            "k": draw.normal(tokens, shape.groups, shape.width),
            "v": draw.normal(tokens, shape.groups, shape.width),
            "phi_q": draw.feature(tokens, shape.heads, shape.width),
            "phi_k": draw.feature(tokens, shape.groups, shape.width),
            "write_gate": draw.share(tokens, shape.groups),
        }

    def ours(self, given: Given, backend: str) -> Outputs:
        """out, the state and the counters."""
        out, state, counters = self._op.window_linear_attention(**given, **SPAN, backend=backend)
        return (out, *state, *counters)

    def ours_step(self, given: Given, backend: str) -> Outputs:
        """out: a token writes nothing by itself."""
        tokens = (given[name] for name in ("q", "k", "v", "phi_q"))
        state = self._state(*(given[name] for name in STATE))
        return (self._op.window_linear_attention_step(*tokens, state, backend=backend),)

    def context(self, draw: Draw, shape: Shape) -> Given:
        """A state of `shape.length` tokens, and the window: the tokens that have not left, and one more."""
        batch, length = shape.batch, shape.length
        read = self.arranged(self.draw(draw, batch * length, shape), batch, length)
        with torch.no_grad():
            _, *state = self.ours(read, "auto")[: 1 + len(STATE)]
        token = self.draw(draw, batch, shape)
        kept = {name: read[name][:, -SPAN["window"] :] for name in ("k", "v")}
        window = {name: torch.cat([x, token[name].unsqueeze(1)], 1) for name, x in kept.items()}
        return {name: token[name] for name in ("q", "phi_q")} | window | dict(zip(STATE, state, strict=True))

    def flops(self, shape: Shape, direction: str) -> float:
        """Those of linear attention, and two products with a window's keys."""
        tokens = shape.batch * (1 if direction == "decode" else shape.length)
        seen = SPAN["window"] + SPAN["sinks"]
        forward = 2.0 * tokens * (shape.heads + shape.groups) * shape.width**2
        forward += 4.0 * tokens * shape.heads * seen * shape.width
        return 3 * forward if direction == "forward_backward" else forward
