"""The zoo's CLIP, and pictures of worlds that it has not seen."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer, CLIPModel, PreTrainedTokenizerBase

from grainwise import zoo
from grainwise.world import World
from grainwise.zoo.vision.specs import IMAGE, MEAN, STD

NORMALISED: dict[str, Any] = {"mean": MEAN, "std": STD}  # how the tower wants its channels


@functools.cache
def clip_mini() -> tuple[CLIPModel, PreTrainedTokenizerBase]:
    """(CLIP in evaluation mode, in the bf16 that it is shipped in; tokenizer)."""
    folder = zoo.path("clip-mini")
    return CLIPModel.from_pretrained(folder, dtype=torch.bfloat16).eval(), AutoTokenizer.from_pretrained(folder)


def pictures(world: World, labels: np.ndarray, first: int, **options: object) -> Tensor:
    """float32 (n, 3, side, side) in [0, 1]; individuals are numbered from `first`."""
    drawn = world.draw(labels, first + np.arange(len(labels)), size=IMAGE, **options)
    return torch.from_numpy(drawn.images).permute(0, 3, 1, 2).float().div_(255)
