"""GLSim: let a ViT look again at the region most similar to its global token.

Paper: Global-Local Similarity for Efficient Fine-Grained Image Recognition with Vision Transformers (arXiv 2407.12891).
The cosine of each patch token with the class token, after the final norm, costs one pass over the last layer's output and
no attention weights; the box around the top k patches is enlarged to the size of the image and encoded again by the same
encoder. The class tokens of both looks pass one more transformer block, whose first token is classified.

`selection` holds the similarity, the boxes and the control selectors, `modeling` the model, `configuration` its config.

Departures from the authors' code: the crop is one batched sampling instead of a loop over images; the boxes leave the last
selected row and column of patches out, as theirs do, unless `box="inclusive"`; its class token of the crop's own, which no
forward pass reads, is left out. Additions, off by default: `skip_if_confident`, `flip_at_test`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grainwise.recognize.glsim.configuration import GLSimConfig
    from grainwise.recognize.glsim.modeling import GLSimForImageClassification, GLSimOutput
    from grainwise.recognize.glsim.selection import (
        attention_rollout,
        global_local_similarity,
        placed_at_centre,
        placed_at_random,
        select_crops,
        topk_box,
    )
    from grainwise.recognize.glsim.step import recipe_restore, recipe_step

_HOMES = {
    "GLSimConfig": "configuration",
    "GLSimForImageClassification": "modeling",
    "GLSimOutput": "modeling",
    "attention_rollout": "selection",
    "global_local_similarity": "selection",
    "placed_at_centre": "selection",
    "placed_at_random": "selection",
    "recipe_restore": "step",
    "recipe_step": "step",
    "select_crops": "selection",
    "topk_box": "selection",
}
__all__ = [
    "GLSimConfig",
    "GLSimForImageClassification",
    "GLSimOutput",
    "attention_rollout",
    "global_local_similarity",
    "placed_at_centre",
    "placed_at_random",
    "recipe_restore",
    "recipe_step",
    "select_crops",
    "topk_box",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
