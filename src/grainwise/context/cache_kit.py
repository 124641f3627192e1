"""A key-value cache that long-context methods build on: true positions, forks, temporary entries, bytes, an attention hook.

`KitCache` is a `transformers.Cache`, so it goes wherever `past_key_values` goes. What it adds:

- every entry knows its true position, and the next token's position survives the removal of entries;
- `fork()` gives an independent cache that shares the stored tensors until either is written to;
- `with cache.temporary():` drops what is written inside, for example a question asked of a shared context;
- `nbytes()` counts the bytes that are held, tensors shared between caches once;
- an `attend` hook sees the query, keys, values and positions of each layer and computes attention itself (for methods
  that choose keys by the query); it needs `attn_implementation="cache_kit"`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.cache_utils import DynamicLayer

Hook = Callable[..., Tensor]
"""hook(query, keys, values, *, layer, mask, scale) -> (B, H, n, d).

query (B, H, n, d); keys, values (B, Hkv, entries, d), the new ones included; layer: the `KitLayer`, for its positions;
mask: bool (B, 1, n, entries), True where a query may look, or None for causal (one query: everything)."""


class KitLayer(DynamicLayer):
    """The entries of one layer. keys, values: (B, Hkv, entries, d); positions: long (entries,), shared by the batch."""

    keys: Any
    values: Any

    def __init__(self, attend: Hook | None = None) -> None:
        super().__init__()
        self.attend = attend
        self.positions = torch.empty(0, dtype=torch.long)
        self.next_position = 0

    @property
    def entries(self) -> int:
        """How many entries are stored."""
        return len(self.positions)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, positions: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append entries and return all keys and values. positions: default the next ones; long (new entries,)."""
        count = key_states.shape[-2]
        if positions is None:
            positions = torch.arange(self.next_position, self.next_position + count)
        elif positions.shape != (count,):
            raise ValueError(f"positions must be ({count},), one per new entry, got {tuple(positions.shape)}")
        keys, values = super().update(key_states, value_states)
        self.positions = torch.cat([self.positions, positions.cpu()])
        if count:
            self.next_position = max(self.next_position, int(positions.max()) + 1)
        if self.attend is not None:
            keys = keys.view_as(keys)  # its own object: the attention function finds the layer through it
            keys.kit_layer = self
        return keys, values

    def keep(self, indices: Tensor) -> None:
        """Keep only the entries `indices` (long (kept,), or bool (entries,)), in this order; positions stay true."""
        if indices.dtype == torch.bool:
            indices = indices.nonzero().flatten()
        if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < self.entries:
            found = f"{int(indices.min())}..{int(indices.max())}"
            raise ValueError(f"entries to keep must lie in 0..{self.entries - 1}, got {found}")
        if self.is_initialized:
            here = indices.to(self.keys.device)
            self.keys, self.values = self.keys.index_select(-2, here), self.values.index_select(-2, here)
        self.positions = self.positions[indices.cpu()]

    def get_seq_length(self) -> int:
        """The next token's position, from which models count; not the number of entries."""
        return self.next_position

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(keys, offset) that make a causal mask let new tokens see every stored entry."""
        return self.entries + query_length, self.next_position - self.entries

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest -tokens_to_remove entries (a number <= 0, as in transformers)."""
        super().crop(tokens_to_remove)
        if tokens_to_remove:
            self.positions = self.positions[:tokens_to_remove]
            self.next_position = int(self.positions.max()) + 1 if self.entries else 0

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.positions, self.next_position = self.positions[:0], 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Choose batch rows, for beam search."""
        if self.entries:
            self.batch_select_indices(beam_idx.to(self.keys.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every batch row."""
        if self.entries:
            self.keys, self.values = (x.repeat_interleave(repeats, dim=0) for x in (self.keys, self.values))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the batch rows `indices`."""
        if self.entries:
            self.keys, self.values = self.keys[indices], self.values[indices]

    def state(self) -> dict[str, Any]:
        """Everything that a write changes; tensors by reference, which is enough because writes make new ones."""
        return dict(self.__dict__)


class KitCache(Cache):
    """A cache of `KitLayer`s, one per model layer, made on first use. attend: the hook of every layer, or None."""

    def __init__(self, attend: Hook | None = None) -> None:
        super().__init__(layers=[])
        self.attend = attend

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write entries to a layer: what models call. positions=...: as in `KitLayer.update`."""
        while len(self.layers) <= layer_idx:
            self.layers.append(KitLayer(self.attend))
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    write = update

    def positions(self, layer_idx: int = 0) -> Tensor:
        """True positions of a layer's entries, long (entries,)."""
        return self.layers[layer_idx].positions

    def keep(self, indices: Tensor, layer_idx: int | None = None) -> None:
        """Keep only these entries, in one layer or in all."""
        for layer in self.layers if layer_idx is None else [self.layers[layer_idx]]:
            layer.keep(indices)

    def continue_at(self, position: int) -> None:
        """Let the next token stand at `position`, after the last entry's at the earliest. Raises ValueError before that."""
        for i, layer in enumerate(self.layers):
            last = int(layer.positions.max()) if layer.entries else -1
            if position <= last:
                raise ValueError(f"layer {i} holds an entry at position {last}: the next token cannot stand at {position}")
            layer.next_position = position

    def fork(self) -> KitCache:
        """An independent cache with the same entries; their tensors are shared, and never written in place."""
        twin = KitCache(self.attend)
        for layer in self.layers:
            copy = KitLayer()
            copy.__dict__.update(layer.state())
            twin.layers.append(copy)
        return twin

    @contextmanager
    def temporary(self) -> Iterator[KitCache]:
        """Inside, the cache may be written and trimmed; on leaving, also by an error, it is as before."""
        before = [(layer, layer.state()) for layer in self.layers]
        try:
            yield self
        finally:
            for layer, state in before:
                layer.__dict__.clear()
                layer.__dict__.update(state)
            self.layers[:] = [layer for layer, _ in before]

    def nbytes(self, *others: KitCache) -> int:
        """Bytes of keys and values in this cache and `others`; storage that several hold counts once."""
        held: dict[int, int] = {}
        for cache in (self, *others):
            for layer in cache.layers:
                for x in (layer.keys, layer.values):
                    if x is not None:
                        storage = x.untyped_storage()
                        held[storage.data_ptr()] = storage.nbytes()
        return sum(held.values())


def cache_kit_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **request: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function "cache_kit": a layer's hook where the cache has one, exact attention elsewhere."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    layer = getattr(key, "kit_layer", None)
    if layer is None or layer.attend is None:
        out: Tensor = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **request)[0]
        return out, None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = layer.attend(query, key, value, layer=layer, mask=attention_mask, scale=scale)
    if out.shape != query.shape:
        raise ValueError(f"the attend hook must return the shape of its query, {tuple(query.shape)}, got {tuple(out.shape)}")
    return out.transpose(1, 2).contiguous(), None
