"""Compress: keep fewer weights and fewer bits.

Two families live here. Quantisers store weights in few bits and enter transformers as quantizers, so that
`from_pretrained(..., quantization_config=...)` works. Structural methods remove rows, columns, channels or layers: each is a
config for one call, `compress(model, config, calibration) -> (model, report)`, whose model still generates, saves and reloads.

Quantisers share `quantizer` (configs, loading, saving, packed layers that PEFT takes as linear ones).
The structural methods share `architecture` (which module is a norm, reads or writes the residual stream), `block_walker`
(layer-by-layer calibration) and `structural` (the call, the report, the forms of calibration data).
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "CompressionReport": "structural",
    "NF4Config": "qlora",
    "NF4Linear": "qlora",
    "PagedOptimizer": "paged_optimizer",
    "SliceGPTConfig": "slicegpt",
    "bits_per_param": "qlora",
    "compress": "structural",
    "dequantize_model": "quantizer",
    "quantize_model": "quantizer",
    "rotate_model": "slicegpt",
    "slice_model": "slicegpt",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"grainwise.compress.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
