"""The teacher's own attention behind the capture, to prove that the capture changes nothing."""

import torch
from torch import Tensor, nn

from kernels.numerics import wide
from replace.mixer import VARIANTS


@VARIANTS.register("identity")
class Identity(nn.Module):
    """Plain causal softmax attention with an ordinary cache, on q and k as the family rotated them."""

    wants_rotated = True

    def __init__(self, options, heads, rotary) -> None:
        super().__init__()
        self.heads = heads
        self.off: frozenset[str] = frozenset()
        self.calls = 0

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, call) -> Tensor:
        """Attend.

        Args:
            query: `[B, H, T, D]`; key, value: `[B, G, P, D]`.
            mask: bool or additive `[B, 1, T, P]`, or None (causal).

        Returns:
            `[B, H, T, D]` in the dtype of `value`.
        """
        self.calls += 1
        repeat = self.heads.repeat
        key, value = key.repeat_interleave(repeat, dim=1), value.repeat_interleave(repeat, dim=1)
        if mask is None:
            own = torch.arange(key.shape[2] - query.shape[2], key.shape[2], device=key.device).unsqueeze(-1)
            place = torch.arange(key.shape[2], device=key.device)
            mask = place <= own
            if call.sliding_window is not None:
                mask = mask & (own - place < call.sliding_window)
        if call.softcap is None and call.sink_logit is None:
            return torch.nn.functional.scaled_dot_product_attention(
                query,
                key.to(query.dtype),
                value.to(query.dtype),
                attn_mask=mask,
                dropout_p=call.dropout,
                scale=call.scaling,
            ).to(value.dtype)
        logits = wide(query) @ wide(key).transpose(-1, -2) * call.scaling
        if call.softcap is not None:
            logits = call.softcap * torch.tanh(logits / call.softcap)
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
        if call.sink_logit is not None:
            sink = wide(call.sink_logit).view(1, -1, 1, 1).expand(*logits.shape[:3], 1)
            logits = torch.cat([logits, sink], dim=-1)
        weights = logits.softmax(dim=-1)[..., : key.shape[2]].nan_to_num(0.0)
        weights = torch.nn.functional.dropout(weights, call.dropout)
        return (weights @ wide(value)).to(value.dtype)
