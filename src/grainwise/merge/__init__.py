"""Join and shrink what was learned: everything here works on task vectors, the differences that fine-tuning made.

A task vector is a `TaskDelta`: read tensor by tensor from state dicts, safetensors files, sharded model folders or PEFT
adapter folders, so that what is in memory is bounded by the largest tensor and not by the model. Its relatives share the
same interface (`layout`, `read`, `items`, `apply`, `to_peft`): `TernaryDelta`, the sparse ternary form of ComPEFT with a
Golomb-coded file and arithmetic on bit masks, and `DeltaSum`, their weighted sums. `merging` joins deltas of any of these
kinds by task arithmetic, TIES or a gradient-free search for weights; `tensor_store` reads and writes safetensors in a
stream; `golomb` is the coder.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "TaskDelta": "task_delta",
    "TernaryDelta": "compeft",
    "DeltaSum": "delta_sum",
    "compress_to_file": "compeft",
    "tune": "compeft",
    "task_arithmetic": "merging",
    "ties_merge": "merging",
    "compose": "merging",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"grainwise.merge.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'grainwise.merge' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
