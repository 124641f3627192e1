"""The zoo's CLIP, as proofs use it."""

from __future__ import annotations

import functools
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from grainwise import zoo
from grainwise.zoo.vision.specs import MEAN, STD

NORMALISED: dict[str, Any] = {"mean": MEAN, "std": STD}  # how the tower wants its channels


@functools.cache
def clip_mini() -> tuple[Any, PreTrainedTokenizerBase]:
    """(CLIP in evaluation mode, in the bf16 that it is shipped in; tokenizer)."""
    model, processor = zoo.load("clip-mini", torch.bfloat16)
    return model, processor.tokenizer
