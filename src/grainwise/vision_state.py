"""What flows through a vision recipe: a CLIP model, pictures, the recogniser of the moment, and pictures for the report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor, nn

from grainwise.images import Pipeline, from_uint8, normalise
from grainwise.recipe_state import silent

if TYPE_CHECKING:
    from transformers import CLIPModel, PreTrainedTokenizerBase

    from grainwise.recognize.text_classifier import TextClassifier

VIEW = 192  # pixels a side of a picture that people look at


@dataclass(frozen=True)
class Pictures:
    """Pictures as the model sees them, and a way to see them larger.

    images: uint8 (n, side, side, 3). labels: int64 (n,), -1 for a class that no recogniser knows. names: the class of each.
    show: indices -> uint8 (m, VIEW, VIEW, 3), the same pictures for people. deciding: bool (n, side, side), the part that
    tells siblings apart, where that is known.
    """

    images: Tensor
    labels: Tensor
    names: tuple[str, ...]
    show: Callable[[Sequence[int]], np.ndarray]
    deciding: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class Classes:
    """The classes to tell apart.

    prompts: sentences of each class for the zero-shot classifier. groups: classes of one group are siblings.
    descriptions: level (coarse, medium, fine) -> a sentence a class; empty where there is only a name. contrast: two classes
    of a group -> what differs, in words.
    """

    names: tuple[str, ...]
    prompts: tuple[tuple[str, ...], ...]
    groups: tuple[int, ...]
    descriptions: Mapping[str, tuple[str, ...]]
    contrast: Callable[[int, int], str]

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True)
class Picture:
    """Something for the report: panels (what it is, uint8 (height, width, 3)) side by side, and curves (name -> x, y)."""

    caption: str
    panels: tuple[tuple[str, np.ndarray], ...]
    curves: Mapping[str, tuple[list[float], list[float]]] = field(default_factory=dict)


@dataclass
class VisionState:
    """One vision recipe in flight. A step changes `recogniser` or adds `pictures`, and returns its figures.

    clip: the model the recipe names; steps that train work on a copy. mean, std: how it wants its channels. train, test,
    near, far: labelled pictures; near and far show classes that the recogniser cannot know. outliers: uint8 (n, side, side,
    3), unlabelled pictures of anything else. text: the zero-shot classifier. recogniser: a module in evaluation mode, from
    normalised `pixel_values` to an output with `logits`. answers: its logits for test, near and far.
    folder: the running step's output folder; what a step leaves there, its `recipe_restore(state, **options)` reads.
    """

    clip: CLIPModel
    tokenizer: PreTrainedTokenizerBase
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: Classes
    train: Pictures
    test: Pictures
    near: Pictures | None
    far: Pictures | None
    outliers: Tensor | None
    text: TextClassifier
    recogniser: nn.Module
    seed: int
    folder: Path
    progress: Callable[[int, int, str], None] = silent
    pictures: list[Picture] = field(default_factory=list)
    answers: dict[str, Tensor] = field(default_factory=dict)

    @cached_property
    def prepare(self) -> Pipeline:
        """Images in [0, 1] as the model wants them."""
        return Pipeline(partial(normalise, mean=self.mean, std=self.std))

    def logits(self, images: Tensor) -> Tensor:
        """float32 (n, classes): what the recogniser says about images uint8 (n, side, side, 3)."""
        from grainwise.recognize.training import predict_logits

        return predict_logits(self.recogniser, from_uint8(images), prepare=self.prepare)
