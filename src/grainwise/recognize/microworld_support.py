"""Captioner and generator of the microworld: what stands in offline for a multimodal captioner and a text-to-image model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from grainwise.images import from_uint8
from grainwise.world import Nuisance, World
from grainwise.world.backgrounds import STUFF_NAMES
from grainwise.world.painter import STYLES


class MicroworldGenerator:
    """Renders prompts: the species whose name stands in the prompt, in the style and on the ground that it mentions.

    names: class name -> species number. Without a style word the picture is plain; without a ground any may come. The names
    are looked for longest first.
    """

    def __init__(self, world: World, names: Mapping[str, int], *, size: int = 32) -> None:
        self.world, self.size = world, size
        self.names = dict(sorted(names.items(), key=lambda item: -len(item[0])))

    def __call__(self, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """float (n, 3, size, size) in [0, 1]. Raises ValueError for a prompt that names no species."""
        images = torch.empty(len(prompts), 3, self.size, self.size)
        scenes: dict[tuple[str, str], list[int]] = {}
        for i, prompt in enumerate(prompts):
            scenes.setdefault(scene_of(prompt), []).append(i)
        for (style, ground), rows in scenes.items():
            nuisance = Nuisance(backgrounds=(ground,)) if ground else Nuisance()
            labels = np.array([self._species(prompts[i]) for i in rows])
            drawn = self.world.draw(labels, np.array([seeds[i] for i in rows]), size=self.size, style=style, nuisance=nuisance)
            images[rows] = from_uint8(drawn.images)
        return images

    def _species(self, prompt: str) -> int:
        for name, number in self.names.items():
            if name in prompt:
                return number
        raise ValueError(f"the prompt {prompt!r} names none of the {len(self.names)} species")


def scene_of(prompt: str) -> tuple[str, str]:
    """(style, ground or "") that a prompt mentions."""
    words = prompt.replace(",", " ").replace(".", " ").split()
    style = next((w for w in words if w in STYLES), "plain")
    return style, next((w for w in words if w in STUFF_NAMES), "")
