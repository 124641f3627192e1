"""Make the quantisers of this room known to transformers, and their refusal to merge known to PEFT.

Both functions run when those libraries are imported (see `grainwise.on_import`), which may be in the middle of an import of
this room; so this module imports nothing that imports them.
"""

from __future__ import annotations

import functools
import importlib
import sys
from typing import Any

MEMBERS = ("qlora",)  # modules of this package that define a quantiser; importing one registers it
MERGE_REFUSED = "merging re-quantises and changes the model; dequantise to bf16 first"


def register() -> tuple[str, ...]:
    """Register every quantiser of this package and return their module names. Calling it again changes nothing."""
    frame = sys.modules.get("grainwise.compress.quantizer")
    if frame is None or hasattr(frame, "COMPLETE"):  # otherwise it is being imported, and calls this when it is done
        for name in MEMBERS:
            importlib.import_module(f"grainwise.compress.{name}")
    return MEMBERS


def refuse_merging() -> None:
    """Make PEFT's LoRA layer say why it cannot merge into packed weights (it would fail on their shape). Idempotent."""
    from peft.tuners.lora.layer import Linear

    if getattr(Linear.merge, "refuses_packed_weights", False):
        return
    original = Linear.merge

    @functools.wraps(original)
    def merge(self: Any, *args: Any, **kwargs: Any) -> Any:
        from grainwise.compress.quantizer import QuantizedLinear

        if isinstance(self.get_base_layer(), QuantizedLinear):
            raise ValueError(MERGE_REFUSED)
        return original(self, *args, **kwargs)

    merge.refuses_packed_weights = True  # type: ignore[attr-defined]
    Linear.merge = merge
