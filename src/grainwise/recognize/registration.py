"""Make the models of this room known to transformers' Auto classes.

`MODELS` is the one list of them; the contract test runs over it. Only the configs are registered when transformers loads:
its own modules import each other in a circle, so the models follow when a config is made, which is always before a model
is looked up by it.
"""

from __future__ import annotations

import importlib
from typing import Any

from transformers.configuration_utils import PreTrainedConfig

MODELS = {"glsim": ("GLSimConfig", "GLSimForImageClassification")}  # system -> its config and its classifier


def register() -> tuple[str, ...]:
    """Register the config of every model of this room and return the systems. Calling it again changes nothing."""
    modeling_auto = importlib.import_module("transformers.models.auto.modeling_auto")
    if hasattr(modeling_auto, "AutoModelForImageClassification"):  # else it is being imported, and a later call does it
        from transformers.models.auto.configuration_auto import AutoConfig

        for slug, (name, _) in MODELS.items():
            config = getattr(importlib.import_module(f"grainwise.recognize.{slug}.configuration"), name)
            AutoConfig.register(config.model_type, config, exist_ok=True)
    return tuple(MODELS)


class RecognitionConfig(PreTrainedConfig):
    """The base of this room's configs: making one registers its model with `AutoModelForImageClassification`."""

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        from transformers import AutoModelForImageClassification

        _, name = MODELS[self.model_type]
        model = getattr(importlib.import_module(f"grainwise.recognize.{self.model_type}"), name)
        AutoModelForImageClassification.register(type(self), model, exist_ok=True)
