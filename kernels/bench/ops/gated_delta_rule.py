"""The delta rule, with and without decay.

Keys have length 1 and steps are taken as they are (`scaled=False`), because flash-linear-attention has
nothing else: so every provider computes the same function. Scaling costs one sum of squares a key more.
"""

import importlib
from typing import Any

import torch

import kernels
from kernels.bench.ops.base import Draw, Form, Given, Op, Outputs, Shape
from kernels.dispatch import fla_refusal


class GatedDeltaRule(Op):
    """`kernels.gated_delta_rule`; flash-linear-attention's is `chunk_gated_delta_rule`."""

    name = "gated_delta_rule"
    leaves: tuple[str, ...] = ("q", "k", "v", "beta", "log_decay")
    module, function = "fla.ops.gated_delta_rule", "gated_delta_rule"

    def draw(self, draw: Draw, tokens: int, shape: Shape) -> Given:
        """Keys of length 1; a token forgets 2 % in the median."""
        keys = draw.normal(tokens, shape.groups, shape.width)
        return {
            "q": draw.normal(tokens, shape.heads, shape.width) * shape.width**-0.5,
            "k": torch.nn.functional.normalize(keys, dim=-1),
            "v": draw.normal(tokens, shape.groups, shape.width),
            "beta": draw.share(tokens, shape.groups),
            "log_decay": torch.nn.functional.logsigmoid(draw.normal(tokens, shape.groups).float() + 4),
        }

    def ours(self, given: Given, backend: str) -> Outputs:
        """out and S."""
        everything: dict[str, Any] = given | {"scaled": False, "backend": backend}
        return kernels.gated_delta_rule(**everything)

    def ours_step(self, given: Given, backend: str) -> Outputs:
        """out and S."""
        return kernels.gated_delta_rule_step(**given, scaled=False, backend=backend)

    def others(self, device: torch.device) -> dict[str, Form]:
        """flash-linear-attention's, which is not asked for the state."""
        if fla_refusal(self.module, f"chunk_{self.function}", device) is not None:
            return {}
        run = getattr(importlib.import_module(self.module), f"chunk_{self.function}")
        return {"fla": lambda given: (run(**_theirs(given), scale=1.0)[0],)}

    def other_steps(self, device: torch.device) -> dict[str, Form]:
        """Its recurrent form, of one token."""
        if fla_refusal(self.module, f"fused_recurrent_{self.function}", device) is not None:
            return {}
        run = getattr(importlib.import_module(self.module), f"fused_recurrent_{self.function}")

        def step(given: Given) -> Outputs:
            token = {name: x.unsqueeze(1) for name, x in given.items() if name != "state"}
            out, state = run(
                **_theirs(token), scale=1.0, initial_state=given["state"], output_final_state=True
            )
            return out.squeeze(1), state

        return {"fla": step}

    def context(self, draw: Draw, shape: Shape) -> Given:
        """A state of `shape.length` tokens."""
        read = self.arranged(self.draw(draw, shape.batch * shape.length, shape), shape.batch, shape.length)
        with torch.no_grad():
            state = self.ours(read, "auto")[1]
        return self.draw(draw, shape.batch, shape) | {"state": state}

    def flops(self, shape: Shape, direction: str) -> float:
        """Products of F x D: what the key finds, what is written, and what each head reads."""
        tokens = shape.batch * (1 if direction == "decode" else shape.length)
        forward = 2.0 * tokens * (shape.heads + 2 * shape.groups) * shape.width**2
        return 3 * forward if direction == "forward_backward" else forward


class DeltaRule(GatedDeltaRule):
    """Without decay; flash-linear-attention's is `chunk_delta_rule`."""

    name = "delta_rule"
    leaves = ("q", "k", "v", "beta")
    module, function = "fla.ops.delta_rule", "delta_rule"

    def draw(self, draw: Draw, tokens: int, shape: Shape) -> Given:
        """The same without `log_decay`."""
        given = super().draw(draw, tokens, shape)
        del given["log_decay"]
        return given


def _theirs(given: Given) -> dict[str, Any]:
    """That library calls the logarithm of the decay g."""
    return {"g" if name == "log_decay" else name: x for name, x in given.items()}
