"""Checking a whole draft tree in one forward pass of a causal LM, and leaving its cache as if nothing had been guessed."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from grainwise.decode.token_tree import TokenTree

MASKED_ATTENTION = ("eager", "sdpa")  # implementations that take a ready 4-D mask as it is


class TreeVerifier:
    """A causal LM and a cache that holds the text up to, but without, the root of the next tree.

    model: any decoder-only `transformers` model that takes `position_ids` and runs with eager or sdpa attention, also
        with adapters or quantised weights. cache: a `DynamicCache` of full-attention layers; a new one when None.
    Raises ValueError for models and caches with which one pass over a tree would not equal separate passes.
    """

    def __init__(self, model: nn.Module, cache: Cache | None = None) -> None:
        check_model(model)
        self.model = model
        self.cache = DynamicCache(config=model.config) if cache is None else cache
        check_cache(self.cache)
        self.past = self.cache.get_seq_length()  # tokens before the root

    @torch.no_grad()
    def prefill(self, ids: Tensor) -> Tensor:
        """Read ids (1, t), the text that the cache lacks; logits (vocabulary,) of what follows its last token."""
        if ids.ndim != 2 or ids.shape[0] != 1 or ids.shape[1] < 1:
            raise ValueError(f"one sequence of at least one new token is expected, got ids of shape {tuple(ids.shape)}")
        positions = torch.arange(self.past, self.past + ids.shape[1], device=ids.device)[None]
        logits = self._forward(input_ids=ids, position_ids=positions, logits_to_keep=1)
        check_cache(self.cache)  # layers that are made at the first pass
        self.past = self.cache.get_seq_length()
        return logits[-1]

    @torch.no_grad()
    def verify(self, tree: TokenTree) -> Tensor:
        """Logits (n, vocabulary): row i scores what follows the path to node i. Call `keep` next."""
        device = next(self.model.parameters()).device
        ids = torch.from_numpy(tree.tokens)[None].to(device)
        positions = torch.from_numpy(tree.depths)[None].to(device) + self.past
        return self._forward(input_ids=ids, position_ids=positions, attention_mask=self._mask(tree, device))

    def keep(self, nodes: Sequence[int]) -> None:
        """Compact the cache after `verify`: the rows of the given nodes (a path from the root) stay, the others go."""
        end = self.past + len(nodes)
        moved = list(nodes) != list(range(len(nodes)))
        chosen = torch.tensor(nodes) + self.past
        for layer in self.cache.layers:
            for name in ("keys", "values"):
                rows = getattr(layer, name)
                if moved:
                    chosen = chosen.to(rows.device)
                    rows[:, :, self.past : end] = rows[:, :, chosen]
                setattr(layer, name, rows[:, :, :end])
        self.past = end

    def _forward(self, **inputs: Any) -> Tensor:
        return self.model(**inputs, past_key_values=self.cache, use_cache=True, return_dict=True).logits[0]

    def _mask(self, tree: TokenTree, device: torch.device) -> Tensor | None:
        """Additive, (1, 1, n, past + n): the text before the root is open to all nodes, the tree to descendants only."""
        if len(tree) == 1:
            return None
        dtype = self.cache.layers[0].keys.dtype
        mask = torch.zeros(len(tree), self.past + len(tree), dtype=dtype, device=device)
        hidden = torch.from_numpy(~tree.ancestor_mask).to(device)
        mask[:, self.past :].masked_fill_(hidden, torch.finfo(dtype).min)
        return mask[None, None]


def check_model(model: nn.Module) -> None:
    """Raises ValueError if trees cannot be verified with `model`, saying why."""
    config = model.config
    name = type(model).__name__
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{name} is an encoder-decoder model; tree verification needs a decoder-only causal LM")
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise ValueError(f"{name} takes no position_ids, so nodes of a tree cannot be put at the position of their depth")
    attention = getattr(config, "_attn_implementation", "eager")
    if attention not in MASKED_ATTENTION:
        raise ValueError(
            f"attn_implementation is {attention!r}, which does not take a tree mask; "
            f"load the model with one of {', '.join(MASKED_ATTENTION)}"
        )


def check_cache(cache: Cache) -> None:
    """Raises ValueError if rows of `cache` cannot be dropped at will (sliding windows, static, quantised, recurrent)."""
    layers = getattr(cache, "layers", [cache])
    wrong = sorted({type(layer).__name__ for layer in layers if type(layer) is not DynamicLayer})
    if wrong or cache.offloading:
        what = ", ".join(wrong) or "an offloaded cache"
        raise ValueError(
            f"rejected drafts must be dropped from the cache, which {what} cannot do; "
            "use a DynamicCache over full-attention layers (no sliding window, no cache_implementation)"
        )
