"""Linear attention of feature-mapped queries and keys, divided by its denominator or not."""

import importlib

import torch

import kernels
from kernels.bench.ops.base import Draw, Form, Given, Op, Outputs, Shape
from kernels.dispatch import fla_refusal

FLA = "fla.ops.linear_attn"
GLA = "fla.ops.simple_gla"


class LinearAttention(Op):
    """`kernels.linear_attention`; flash-linear-attention's is `chunk_linear_attn`."""

    name = "linear_attention"
    normalize = True

    def draw(self, draw: Draw, tokens: int, shape: Shape) -> Given:
        """phi(q), phi(k) and v."""
        return {
            "q": draw.feature(tokens, shape.heads, shape.width),
            "k": draw.feature(tokens, shape.groups, shape.width),
            "v": draw.normal(tokens, shape.groups, shape.width),
        }

    def ours(self, given: Given, backend: str) -> Outputs:
        """out, M and z."""
        tokens = (given["q"], given["k"], given["v"])
        out, state = kernels.linear_attention(*tokens, normalize=self.normalize, backend=backend)
        return (out, *state)

    def ours_step(self, given: Given, backend: str) -> Outputs:
        """out, M and z."""
        tokens, state = (given["q"], given["k"], given["v"]), (given["M"], given["z"])
        out, after = kernels.linear_attention_step(*tokens, state, normalize=self.normalize, backend=backend)
        return (out, *after)

    def others(self, device: torch.device) -> dict[str, Form]:
        """flash-linear-attention's, which is not asked for the state."""
        if fla_refusal(FLA, "chunk_linear_attn", device) is not None:
            return {}
        run = importlib.import_module(FLA).chunk_linear_attn
        return {"fla": lambda given: (run(**given, scale=1.0, normalize=self.normalize)[0],)}

    def context(self, draw: Draw, shape: Shape) -> Given:
        """A state of `shape.length` tokens."""
        read = self.arranged(self.draw(draw, shape.batch * shape.length, shape), shape.batch, shape.length)
        with torch.no_grad():
            _, M, z = self.ours(read, "auto")
        return self.draw(draw, shape.batch, shape) | {"M": M, "z": z}

    def flops(self, shape: Shape, direction: str) -> float:
        """A product of F x D to write, for each key-value head, and one to read, for each head."""
        tokens = shape.batch * (1 if direction == "decode" else shape.length)
        forward = 2.0 * tokens * (shape.heads + shape.groups) * shape.width**2
        return 3 * forward if direction == "forward_backward" else forward


class UnnormalizedLinearAttention(LinearAttention):
    """Without the division: the kernels alone, of which that library also has `simple_gla`."""

    name = "linear_attention_unnormalized"
    normalize = False

    def others(self, device: torch.device) -> dict[str, Form]:
        """`chunk_linear_attn`, and `chunk_simple_gla` without a decay."""
        found = super().others(device)
        if fla_refusal(GLA, "chunk_simple_gla", device) is None:
            run = importlib.import_module(GLA).chunk_simple_gla
            found["fla_simple_gla"] = lambda given: (run(**given, scale=1.0)[0],)
        return found

    def other_steps(self, device: torch.device) -> dict[str, Form]:
        """`fused_recurrent_simple_gla` of one token."""
        if fla_refusal(GLA, "fused_recurrent_simple_gla", device) is not None:
            return {}
        run = importlib.import_module(GLA).fused_recurrent_simple_gla

        def step(given: Given) -> Outputs:
            token = {name: given[name].unsqueeze(1) for name in ("q", "k", "v")}
            out, M = run(**token, scale=1.0, initial_state=given["M"], output_final_state=True)
            return out.squeeze(1), M

        return {"fla_simple_gla": step}
