"""Change few weights: adapters that train a small part of a model and leave the rest as it is.

Every member is a PEFT method: a config, a layer and a tuner that `get_peft_model`, `PeftModel.from_pretrained`,
`merge_and_unload` and `Trainer` treat like PEFT's own. The members share

- `registration`: makes a method known to PEFT from outside; importing this package registers all members;
- `tuner`: the frame. A member is a config dataclass, a layer with `init`, `delta` and `get_delta_weight`, and two lines;
  target checks, placement, seeds, merging, saving and restoring the base weight come from the frame;
- `spectral`: the largest or smallest singular components of a weight, and plain LoRA folders made of factors.

One contract test runs over every member (`tests/adapt/test_contract.py`).
"""

from __future__ import annotations

import importlib
from typing import Any

from grainwise.adapt.registration import MEMBERS, register

_EXPORTS = {"KasaConfig": "kasa", "KasaTrainerMixin": "kasa", "kasa_regulariser": "kasa"}

__all__ = ["MEMBERS", "KasaConfig", "KasaTrainerMixin", "kasa_regulariser", "register"]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(f"grainwise.adapt.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module 'grainwise.adapt' has no attribute {name!r}")


register()
