"""One layer class for every family: transformers projects in and out, the mixer does what lies between.

The attention object stays what it was; its class becomes a subclass of its own class, made on the fly, and
its config a shallow copy that names our attention function. So old parameters keep their names, and masks are
still made from the model's own config.
"""

import copy
import zlib
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.configuration_utils import PreTrainedConfig

from replace.blocks import Call, Heads
from replace.cache import cache_slot
from replace.errors import UserError
from replace.layout import documents_of
from replace.rotary import family_rotation, unrotate

IMPLEMENTATION = f"layer_replace_{zlib.crc32(__name__.encode()):08x}"
"""The name under which transformers' attention interface knows our function.

Another one in each copy of this file, because an export that is loaded beside the project brings its own.
"""

AttentionModule: TypeAlias = Any
"""Any family's attention module. Any, because torch types every attribute of a Module as Tensor | Module."""

CACHE_ARGUMENTS = ("past_key_values", "layer_past", "past_key_value")
"""What families call their cache."""


class ReplacedAttention(nn.Module):
    """Mixed into a family's attention class: keeps the cache from the family, hands the context through."""

    mixer: nn.Module
    layer_idx: int
    config: PreTrainedConfig

    def forward(self, hidden_states: Tensor, **kwargs):
        """The family's own forward, with its attention function answered by the mixer."""
        cache = None
        for name in CACHE_ARGUMENTS:
            if kwargs.get(name) is not None:
                cache, kwargs[name] = kwargs[name], None
        context = {
            "hidden": hidden_states,
            "cache": cache,
            "mask": kwargs.get("attention_mask"),
            "position_ids": kwargs.get("position_ids"),
            "rotary": kwargs.get("position_embeddings"),
        }
        return super().forward(hidden_states=hidden_states, replace_context=context, **kwargs)


def replaced_attention(
    module: AttentionModule,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    replace_context: dict | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """The function that transformers calls for a replaced layer.

    Args:
        query: `[B, H, T, D]`; key, value: `[B, G, T, D]`, rotated by the family.

    Returns:
        `[B, T, H, D]`, and None for the attention weights, which do not exist.
    """
    if replace_context is None:
        raise UserError(
            f"{type(module).__name__} does not pass keyword arguments on to its attention function, "
            "so this family cannot be replaced."
        )
    mixer = module.mixer
    call = Call(
        hidden=replace_context["hidden"],
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        dropout=dropout,
        softcap=softcap,
        sliding_window=own_window(module) if sliding_window is None else sliding_window,
        sink_logit=s_aux,
    )
    cache = replace_context["cache"]
    if getattr(mixer, "wants_rotated", False):
        if cache is not None:
            key, value = cache.update(key, value, module.layer_idx)
        return _by_token(mixer.attend(query, key, value, attention_mask, call)), None
    call.slot = cache_slot(cache, module.layer_idx)
    seen = call.slot.seen if call.slot is not None else 0
    call.real = real_tokens(attention_mask, query.shape[2], seen)
    call.document = documents_of(replace_context["position_ids"], call.real, (query.shape[0], query.shape[2]))
    first = call.slot is None or call.slot.state is None
    if first and call.real is not None and call.document is None:
        refuse_other_masks(attention_mask, call.real, call.sliding_window)
    if replace_context["rotary"] is not None and mixer.rotary is not None:
        (cos, sin), width = replace_context["rotary"], mixer.rotary.spec.width
        query, key = unrotate(family_rotation(module), query, key, cos, sin, width)
    query, key = query.to(value.dtype), key.to(value.dtype)
    return _by_token(mixer(query, key, value, call)), None


def _by_token(out: Tensor) -> Tensor:
    """`[B, H, T, D]` -> `[B, T, H, D]`, laid out so that a family may view it as `[B, T, H D]`."""
    return out.transpose(1, 2).contiguous()


AttentionInterface.register(IMPLEMENTATION, replaced_attention)


def real_tokens(mask: Tensor | None, tokens: int, seen: int | Tensor = 0) -> Tensor | None:
    """`[B, T]` bool, False for pads, off the diagonal of a 4D mask: all tokens but pads see themselves.

    Documents packed into a row are told apart by `position_ids` that begin anew, not by a block-diagonal mask
    of the caller's own, which `refuse_other_masks` finds.

    Args:
        mask: None (nothing is padded), bool `[B, 1, T, P]`, or additive float of that shape. The last T keys
            are the new tokens, unless a static cache left room behind them.
        seen: tokens before this call, pads included; a 0-dimensional tensor beside a static cache.

    Raises:
        UserError: a mask of another form.
    """
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise UserError(
            f"an attention mask of type {type(mask).__name__} cannot be read by a replaced layer; allowed: "
            "attn_implementation='sdpa' or 'eager', whose masks are tensors."
        )
    if mask.ndim != 4:
        raise UserError(
            f"an attention mask of {mask.ndim} dimensions cannot be read by a replaced layer; 4 are needed."
        )
    room = mask.shape[-1] - tokens
    if isinstance(seen, Tensor):
        place = (seen.clamp(max=room) + torch.arange(tokens, device=mask.device)).view(1, -1, 1)
        own = mask[:, 0].gather(-1, place.expand(mask.shape[0], -1, -1)).squeeze(-1)
    else:
        start = min(seen, room)
        own = mask[:, 0, :, start : start + tokens].diagonal(dim1=-2, dim2=-1)
    return visible(own)


def visible(mask: Tensor) -> Tensor:
    """Bool: where a mask, bool or additive, lets a query see a key."""
    return mask if mask.dtype == torch.bool else mask == 0


def refuse_other_masks(mask: Tensor | None, real: Tensor, sliding_window: int | None) -> None:
    """Refuse a mask that hides more than pads and the layer's own sliding window do.

    A replaced layer would see what it hides. The last real query of each row tells: it sees all real tokens
    of its row, unless there are several documents or a pattern of its own. So the cost is one row of the
    mask, in the first call of a text only.

    Args:
        mask: `[B, 1, T, P]`, bool or additive.
        real: `[B, T]` bool, False for pads.

    Raises:
        UserError: it does.
    """
    if mask is None:
        return
    place = torch.arange(real.shape[1], device=real.device)
    last = torch.where(real, place, -1).amax(1, keepdim=True)  # -1 in rows of pads only
    own = last.clamp_min(0).view(-1, 1, 1).expand(-1, 1, real.shape[1])
    seen = visible(mask[:, 0, :, : real.shape[1]].expand(real.shape[0], -1, -1).gather(1, own).squeeze(1))
    expected = real if sliding_window is None else real & (last - place < sliding_window)
    if bool((expected & ~seen).any()):
        raise UserError(
            "an attention mask that hides earlier tokens cannot be followed by a replaced layer; allowed: "
            "masks for padding, and packed documents whose position_ids begin anew at 0."
        )


def own_window(attention: AttentionModule) -> int | None:
    """The sliding window in tokens of a layer whose family puts it into its masks only (qwen2_moe), or None.

    Raises:
        UserError: the layer's keys are chosen by another pattern, such as chunks (llama4).
    """
    kinds = getattr(attention.config, "layer_types", None) or ()
    kind = kinds[attention.layer_idx] if attention.layer_idx < len(kinds) else "full_attention"
    if kind == "sliding_attention":
        return attention.config.sliding_window
    if kind in ("full_attention", "attention"):
        return None
    raise UserError(
        f"layer {attention.layer_idx} of {type(attention).__name__} attends by layer_types={kind!r}; "
        "allowed: full_attention, sliding_attention."
    )


def heads_of(attention: AttentionModule) -> Heads:
    """H, G, D and C of an attention module.

    G is the module's own, since a config may carry a figure that its family ignores.
    """
    config = attention.config
    query = config.num_attention_heads
    shared = getattr(attention, "num_key_value_groups", None)
    key_value = query // shared if shared else getattr(attention, "num_key_value_heads", None) or query
    dim = (
        getattr(attention, "head_dim", None)
        or getattr(config, "head_dim", None)
        or config.hidden_size // query
    )
    return Heads(query, key_value, dim, config.hidden_size)


def become_replaced(attention: AttentionModule, mixer: nn.Module) -> None:
    """Turn one attention object into a replaced one, in place."""
    original = type(attention)
    attention.__class__ = replaced_class(original)
    config = copy.copy(attention.config)
    config._attn_implementation_internal = IMPLEMENTATION
    attention.config = config
    attention.mixer = mixer


_CLASSES: dict[type, type] = {}


def replaced_class(original: type) -> type:
    """The subclass of a family's attention class that is a replaced layer; the same one each time."""
    if original not in _CLASSES:
        _CLASSES[original] = type(f"Replaced{original.__name__}", (ReplacedAttention, original), {})
    return _CLASSES[original]
