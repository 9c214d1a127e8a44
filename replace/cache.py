"""The cache of a replaced layer: a fixed number of bytes, whatever the length of the text."""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, StaticLayer


@dataclass
class State:
    """What a replaced layer remembers of each row. L lookback blocks and the current one are the local part.

    Attributes:
        length: `[B]` int64, real tokens so far.
        keys, values: `[B, G, (L + 1) S, D]`, position-free keys and values of the local part, in slots.
        score: `[B, G, (L + 1) S]` fp32, what decides about retention when a block leaves; None where it need
            not be known before that.
        weight: `[B, G, (L + 1) S]` fp32, the write gate of each local token; None without one.
        sink_keys, sink_values: `[B, G, n, D]`.
        pair_keys, pair_values: `[B, G, K, D]`; pair_score `[B, G, K]` fp32, -inf in empty places;
            pair_position `[B, G, K]` int64; pair_weight `[B, G, K]` fp32, the write gates, for a pair that
            later moves into the memory.
        memory_M, memory_z, memory_n: `[B, G, F, D]` and `[B, G, F]` fp32, `[B, G]`; see
            `kernels.linear_memory.chunk`, or the variant if its memory is of another kind.
        own: whatever else a variant keeps, by name; the first dimension is B.
    """

    length: Tensor
    keys: Tensor
    values: Tensor
    sink_keys: Tensor
    sink_values: Tensor
    score: Tensor | None = None
    weight: Tensor | None = None
    pair_keys: Tensor | None = None
    pair_values: Tensor | None = None
    pair_score: Tensor | None = None
    pair_position: Tensor | None = None
    pair_weight: Tensor | None = None
    memory_M: Tensor | None = None
    memory_z: Tensor | None = None
    memory_n: Tensor | None = None
    own: dict[str, Tensor] = field(default_factory=dict)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are there, by name; a variant's own as `own.<name>`."""
        found = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "own"}
        named = {name: value for name, value in found.items() if value is not None}
        return named | {f"own.{name}": value for name, value in self.own.items()}

    def map(self, change: Callable[[Tensor], Tensor]) -> "State":
        """A state with `change` applied to every tensor."""
        found = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "own"}
        named = {name: change(value) for name, value in found.items() if value is not None}
        return State(**named, own={name: change(value) for name, value in self.own.items()})


class ReplacedCacheLayer(CacheLayerMixin):
    """One layer's place in a transformers cache.

    It counts every token it has seen, pads included, because masks are made from that count; the state itself
    counts real tokens only.
    """

    is_sliding = False
    is_croppable = False

    def __init__(self, room: int = 0) -> None:
        """room: the length of a static cache, 0 for one that grows.

        Beside a static cache the state's tensors stay where they are, so that a compiled step (and a CUDA
        graph) finds them again, and the count is a tensor, because a compiler takes a changing Python number
        for a reason to compile anew.
        """
        super().__init__()
        self.room = room
        self.is_compileable = room > 0
        self.seen: int | Tensor = torch.tensor(0) if room else 0
        self.state: State | None = None
        self.until_full: int | None = None

    def steps_to_go(self, block: int) -> int:
        """How many tokens fit into the blocks of all rows before the first block is full, at most `block`."""
        if self.until_full is None:
            assert self.state is not None
            self.until_full = block - int((self.state.length % block).max())
        return self.until_full

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the mixer makes the state in its first forward."""

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """An error: replaced layers never call it, and an unreplaced one would lose its keys here."""
        raise RuntimeError("this cache slot belongs to a replaced layer; its mixer keeps its own state.")

    def store(self, state: State, tokens: int) -> None:
        """Take the state after `tokens` more tokens."""
        if isinstance(self.seen, Tensor):
            self._store_in_place(state, tokens)
        else:
            self.state = state
            self.seen += tokens
        self.is_initialized = True

    def _store_in_place(self, state: State, tokens: int) -> None:
        assert isinstance(self.seen, Tensor)
        if self.state is None:
            # Copies, because a state may hold views, and several fields the same tensor.
            self.state = state.map(lambda x: x.detach().clone())
            self.seen = self.seen.to(state.length.device)
            if not torch.compiler.is_compiling():
                for tensor in [self.seen, *self.state.tensors().values()]:
                    torch._dynamo.mark_static_address(tensor)
        else:
            for held, new in zip(self.state.tensors().values(), state.tensors().values(), strict=True):
                held.copy_(new)
        self.seen.add_(tokens)

    def get_seq_length(self) -> int:
        """Tokens seen, pads included."""
        return cast(int, self.seen)  # a tensor beside a static cache, as transformers' own layers do there

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Masks cover every token, as for an ordinary layer; one layer's answer sizes the masks of all."""
        return self.room or self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    def offload(self) -> None:
        """Nothing to gain: the state is small."""

    def prefetch(self) -> None:
        """See `offload`."""

    def reset(self) -> None:
        """Forget everything."""
        self.seen = torch.tensor(0) if self.room else 0
        self.state, self.until_full, self.is_initialized = None, None, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search: take rows."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Take rows."""
        if self.state is not None:
            self.state = self.state.map(lambda x: x[indices.to(x.device)])
            self.until_full = None

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        if self.state is not None:
            self.state = self.state.map(lambda x: x.repeat_interleave(repeats, dim=0))

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: what has been written into a memory cannot be taken out again.

        Raises:
            RuntimeError: always, unless nothing is to be removed.
        """
        if tokens_to_remove != 0:
            raise RuntimeError(
                "a replaced layer's cache cannot be cropped, because its memory cannot forget single tokens; "
                "use generation without an assistant model, or start from a fresh cache."
            )

    @property
    def batch_size(self) -> int:
        """Rows held, -1 before the first forward."""
        return -1 if self.state is None else self.state.length.shape[0]


def cache_slot(cache: Cache | None, layer_idx: int) -> ReplacedCacheLayer | None:
    """The layer's place in `cache`, put there on first use.

    Raises:
        RuntimeError: the cache already holds ordinary keys for this layer.
    """
    if cache is None:
        return None
    while len(cache.layers) <= layer_idx and cache.layer_class_to_replicate is not None:
        cache.layers.append(cache.layer_class_to_replicate())
    # The place of an attention layer: linear-attention layers of a hybrid family are never replaced.
    present = cast(CacheLayerMixin, cache.layers[layer_idx])
    if isinstance(present, ReplacedCacheLayer):
        return present
    if present.is_initialized and present.get_seq_length() > 0:
        raise RuntimeError(
            f"the cache holds keys of an unreplaced layer {layer_idx}; start from a fresh cache."
        )
    static = [x.max_cache_len for x in cache.layers if isinstance(x, StaticLayer) and not x.is_sliding]
    slot = ReplacedCacheLayer(max(static, default=0))
    cache.layers[layer_idx] = slot
    return slot


def state_bytes(cache: Cache) -> int:
    """Bytes of all tensors that a cache holds, replaced and ordinary attention layers alike."""
    total = 0
    for layer in cast(list[CacheLayerMixin], cache.layers):
        if isinstance(layer, ReplacedCacheLayer):
            tensors = list(layer.state.tensors().values()) if layer.state is not None else []
        else:
            tensors = [x for x in (layer.keys, layer.values) if isinstance(x, torch.Tensor)]
        total += sum(x.numel() * x.element_size() for x in tensors)
    return total
