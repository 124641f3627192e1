"""Long inputs: attention in near-linear time, and key-value caches with more to them than growing.

Members enter transformers at two places. Attention functions (`hyperattention`) are registered under a name for
`attn_implementation=...`; `patch_attention(model, layers=..., kind=...)` switches chosen layers and keeps the options in
the model's config. Cache methods build on `KitCache`, a `transformers.Cache` with true positions, forks, temporary
entries, byte counts and a hook that computes attention from the stored entries.

Shared: `attention_registration` (names, masks, the per-layer switch) and `cache_kit`. Importing this room registers
its attention functions if transformers is loaded; otherwise that happens as soon as it is.
"""

from __future__ import annotations

import sys

from grainwise.context import attention_registration
from grainwise.lazy import exports

__getattr__, __dir__, __all__ = exports(
    __name__,
    {
        "cache_kit": ("KitCache", "KitLayer"),
        "hyperattention": ("attention_hardness", "hyper_attention"),
        "attention_registration": ("patch_attention", "unpatch_attention"),
    },
)

if "transformers.modeling_utils" in sys.modules:
    attention_registration.register()
