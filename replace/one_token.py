"""Decoding, one token that completes no block: nothing leaves the window, so nothing is chosen or written.

What is left is softmax over the sinks, the retained pairs and the window, a read of the memory, and one more
key and value in the local part. The last token of a block takes the general way (`BlockMixer.forward`).
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from kernels.exact_attention.chunk import exact_attention_with_mass
from replace.blocks import Blocks, Call, grouped
from replace.cache import State
from replace.layout import Layout

if TYPE_CHECKING:
    from replace.mixer import BlockMixer

STATE = ("arrange", "next_state", "step_state")
"""The methods of a mixer that decide what is in its state."""


def can_step(mixer: "BlockMixer", query: Tensor, call: Call) -> bool:
    """Whether this call is one token for rows whose blocks it does not fill.

    A compiler gets the general way each time, since it needs one graph for all steps; so does a variant that
    has a state of its own and does not say how a step changes it.
    """
    slot = call.slot
    return (
        query.shape[2] == 1
        and slot is not None
        and slot.state is not None
        and mixer.knows_steps
        and not (mixer.off or call.dropout or torch.compiler.is_compiling())
        and (mixer.score is None or mixer.score.needs != "window")
        and slot.steps_to_go(mixer.block) > 1
    )


def knows_steps(variant: type[nn.Module]) -> bool:
    """Whether `step_state` is at least as special as the methods that make the state of a general call."""
    depth = {name: next(i for i, kind in enumerate(variant.__mro__) if name in vars(kind)) for name in STATE}
    return depth["step_state"] == min(depth.values())


def one_token(mixer: "BlockMixer", query: Tensor, key: Tensor, value: Tensor, call: Call) -> Tensor:
    """Attend and store; as `BlockMixer.forward` with T = 1, in a cache that holds a state.

    Args:
        query: `[B, H, 1, D]`; key, value: `[B, G, 1, D]`, without position.
    """
    assert call.slot is not None
    assert call.slot.state is not None
    assert call.slot.until_full is not None
    state = call.slot.state
    before, size = state.length, mixer.block
    new = None if call.real is None else call.real[:, 0]
    length = before + 1 if new is None else before + new.long()
    layout = Layout(1, 0, 1, 1, start=before, length=length, before=before)
    window = (before // size - mixer.lookback) * size  # position of the first local slot
    slots = torch.arange(state.keys.shape[2], device=query.device)
    here = slots == (before - window).unsqueeze(1)
    if new is not None:
        here = here & new.unsqueeze(1)
    bad = ~(key.sum(-1, dtype=torch.float32) + value.sum(-1, dtype=torch.float32)).isfinite()
    mixer.nonfinite = mixer.nonfinite + (bad if new is None else bad & new[:, None, None]).sum()
    place = here[:, None, :, None]
    bad = bad.unsqueeze(-1)
    keys = torch.where(place, key.masked_fill(bad, torch.nan).to(state.keys.dtype), state.keys)
    values = torch.where(place, value.masked_fill(bad, 0).to(state.values.dtype), state.values)
    exact, mass = _attend(mixer, query, keys, values, window, layout, state, call)
    blocks = Blocks(layout, query, keys, values, here, bad, state, step=True)
    out = mixer.mix(blocks, exact, mass if mixer.needs_mass else None, call)
    out = out.reshape(query.shape).to(value.dtype)
    left = call.slot.until_full - 1
    call.slot.store(mixer.step_state(blocks, key, value, call), 1)
    call.slot.until_full = left
    return out if new is None else out.masked_fill(~new[:, None, None, None], 0)


def _attend(
    mixer: "BlockMixer",
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    window: Tensor,
    layout: Layout,
    state: State,
    call: Call,
) -> tuple[Tensor, Tensor]:
    """Softmax over everything exact: out `[B, G, 1, R, D]` and log-denominator `[B, G, 1, R, 1]`, fp32.

    A key that is not finite is NaN in the state. In the window it makes the output NaN, as the teacher's
    would be; where it is not seen the mask covers it.
    """
    groups, before = mixer.heads.key_value, layout.before.unsqueeze(1)
    local = window.unsqueeze(1) + torch.arange(keys.shape[2], device=keys.device)
    seen = (local >= 0) & (local <= before)
    if call.sliding_window is not None:
        seen = seen & (before - local < call.sliding_window)
    k, v, mask, position = [keys], [values], [seen.unsqueeze(1)], [local.unsqueeze(1)]
    if state.pair_keys is not None and state.pair_values is not None:
        assert state.pair_score is not None
        assert state.pair_position is not None
        k, v = [state.pair_keys, *k], [state.pair_values, *v]
        mask, position = [state.pair_score != -torch.inf, *mask], [state.pair_position, *position]
    count = state.sink_keys.shape[2]
    if count:
        first = torch.arange(count, device=keys.device).expand(len(window), 1, count)
        old = (first < window[:, None, None]) & ~state.sink_keys[..., 0].isnan()
        k, v = [state.sink_keys, *k], [state.sink_values, *v]
        mask, position = [old, *mask], [first, *position]
    query, key = query.unsqueeze(2), torch.cat(k, 2)
    if mixer.rotary is not None:
        origin = mixer.origin(window)
        own = (layout.before - origin).view(-1, 1, 1, 1)
        frame = torch.cat([p.expand(-1, groups, -1) for p in position], -1)
        query = mixer.rotary(query, own)
        key = mixer.rotary(key, (frame - origin[:, None, None]).clamp_min(0))
    sink_logit = None if call.sink_logit is None else call.sink_logit.view(1, groups, 1, -1, 1)
    return exact_attention_with_mass(
        grouped(query.squeeze(2), mixer.heads, 1),
        key.unsqueeze(2),
        torch.cat(v, 2).unsqueeze(2),
        torch.cat([m.expand(-1, groups, -1) for m in mask], -1)[:, :, None, None],
        call.scaling,
        softcap=call.softcap,
        sink_logit=sink_logit,
    )
