"""Long inputs: attention in near-linear time, and key-value caches with more to them than growing.

Members enter transformers at two places. Attention functions (`hyperattention`) are registered under a name for
`attn_implementation=...`; `patch_attention(model, layers=..., kind=...)` switches chosen layers and keeps the options in
the model's config. Cache methods build on `KitCache`, a `transformers.Cache` with true positions, forks, temporary
entries, byte counts and a hook that computes attention from the stored entries.

Shared: `attention_registration` (names, masks, the per-layer switch) and `cache_kit`. Importing this room registers
its attention functions if transformers is loaded; otherwise that happens as soon as it is.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

from grainwise.context import attention_registration

_NAMES = {
    "KitCache": "cache_kit",
    "KitLayer": "cache_kit",
    "attention_hardness": "hyperattention",
    "hyper_attention": "hyperattention",
    "patch_attention": "attention_registration",
    "unpatch_attention": "attention_registration",
}
__all__ = sorted(_NAMES)

if "transformers.modeling_utils" in sys.modules:
    attention_registration.register()


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(importlib.import_module(f"grainwise.context.{_NAMES[name]}"), name)
    raise AttributeError(f"module 'grainwise.context' has no attribute {name!r}")
