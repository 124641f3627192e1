"""SliceGPT: rotate the residual stream to its principal axes and cut the weakest, for a smaller dense model.

Paper: SliceGPT: Compress Large Language Models by Deleting Rows and Columns (arXiv 2401.15024). RMSNorm commutes with
rotations, so every sub-layer may read and write the stream in a basis of its own (the principal axes of its input) as long
as the skip path carries the rotation from one basis to the next; coordinates with little energy are then deleted. What is
left runs on ordinary matrix products: every matrix is narrower, nothing is masked.

`norm_fusion` folds the norms into their neighbours, `rotation` finds the bases, `slicing` walks through the model and
writes the sliced weights, `modeling` and `configuration` are the sliced models, `recovery` the LoRA setting to repair them.

Departures from the paper's code: embedding means are subtracted for LayerNorm models only (for RMSNorm models that would
change the function); each norm keeps its model's own epsilon; no damping before the eigendecomposition, as a multiple of
the identity moves no eigenvector; widths are rounded down to multiples of 32, not 8.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grainwise.compress.slicegpt.configuration import SlicedLlamaConfig, SlicedOPTConfig
    from grainwise.compress.slicegpt.modeling import SlicedLlamaForCausalLM, SlicedOPTForCausalLM, SlicingReport
    from grainwise.compress.slicegpt.recovery import recovery_config
    from grainwise.compress.slicegpt.slicing import SliceGPTConfig, recipe_step, rotate_model, slice_model
    from grainwise.compress.structural import compress

_HOMES = {
    "SliceGPTConfig": "slicegpt.slicing",
    "slice_model": "slicegpt.slicing",
    "rotate_model": "slicegpt.slicing",
    "recipe_step": "slicegpt.slicing",
    "recovery_config": "slicegpt.recovery",
    "SlicingReport": "slicegpt.modeling",
    "SlicedLlamaForCausalLM": "slicegpt.modeling",
    "SlicedOPTForCausalLM": "slicegpt.modeling",
    "SlicedLlamaConfig": "slicegpt.configuration",
    "SlicedOPTConfig": "slicegpt.configuration",
    "compress": "structural",
}
__all__ = [
    "SliceGPTConfig",
    "SlicedLlamaConfig",
    "SlicedLlamaForCausalLM",
    "SlicedOPTConfig",
    "SlicedOPTForCausalLM",
    "SlicingReport",
    "compress",
    "recipe_step",
    "recovery_config",
    "register",
    "rotate_model",
    "slice_model",
]


def register() -> None:
    """Make the Auto classes know the sliced models. Cheap, and calling it again changes nothing.

    Only the configs enter here; the models follow when a sliced config is made (see `configuration`). Transformers' own
    modules import each other in a circle, so when this is called from inside the import of `modeling_auto` it leaves the
    work to the call that comes when that import is finished.
    """
    modeling_auto = importlib.import_module("transformers.models.auto.modeling_auto")
    if not hasattr(modeling_auto, "AutoModelForCausalLM"):
        return
    from transformers.models.auto.configuration_auto import AutoConfig

    from grainwise.compress.slicegpt.configuration import SlicedLlamaConfig, SlicedOPTConfig

    for config in (SlicedLlamaConfig, SlicedOPTConfig):
        AutoConfig.register(config.model_type, config, exist_ok=True)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"grainwise.compress.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
