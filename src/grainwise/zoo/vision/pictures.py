"""Pictures for the zoo: drawn once, then read in random order with cheap augmentation."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from grainwise.data.batching import shuffled_rows
from grainwise.world import Individuals, Nuisance, World
from grainwise.world.scenes import Scenes
from grainwise.zoo.vision.specs import IMAGE, MEAN, SCENE, STD, TRAIN_GENERA, ZOO_WORLD, VisionSpec, species_of

HELD_OUT = 1_000_000  # individuals from this number on are never drawn in training
STYLE_SHARES = (("plain", 0.7), ("ink", 0.15), ("felt", 0.15))
VARIED = Nuisance(scale=(0.26, 0.42))


def normalise(images: Tensor | np.ndarray) -> Tensor:
    """uint8 (batch, height, width, 3) to normalised float (batch, 3, height, width)."""
    images = torch.as_tensor(images).permute(0, 3, 1, 2).float() / 255
    return (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def draw_pool(world: World, species: list[int], count: int, seed: int = 0, size: int = IMAGE) -> Individuals:
    """`count` individuals of the given species in turn, in the three styles; a drawing takes about a millisecond."""
    labels = np.asarray(species)[np.arange(count) % len(species)]
    numbers = np.arange(count) // len(species) + seed * 10_000
    pieces, start = [], 0
    order = np.argsort((np.arange(count) * 2654435761) % 2**32, kind="stable")
    for style, share in STYLE_SHARES:
        end = count if style == STYLE_SHARES[-1][0] else start + round(share * count)
        chosen = order[start:end]
        pieces.append(world.draw(labels[chosen], numbers[chosen], size=size, style=style, nuisance=VARIED))
        start = end
    return Individuals(**{name: np.concatenate([getattr(piece, name) for piece in pieces]) for name in pieces[0].__dict__})


def held_out(world: World, species: list[int], each: int, *, style: str = "plain", size: int = IMAGE) -> Individuals:
    """`each` individuals of every species that no training has seen."""
    labels = np.repeat(species, each)
    return world.draw(labels, HELD_OUT + np.arange(len(labels)), style=style, size=size, nuisance=VARIED)


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift by up to four pixels, change brightness and contrast; normalised float (batch, 3, size, size) in and out."""
    size = images.shape[-1]
    padded = nn.functional.pad(images, (4, 4, 4, 4), mode="reflect")
    i, j = torch.randint(9, (2,), generator=generator).tolist()
    moved = padded[..., i : i + size, j : j + size]
    gain = 1 + 0.3 * (torch.rand(len(images), 1, 1, 1, generator=generator) - 0.5)
    shift = 0.6 * (torch.rand(len(images), 1, 1, 1, generator=generator) - 0.5)
    return moved * gain + shift


def order_of(spec: VisionSpec, count: int) -> Iterator[Tensor]:
    """`spec.steps` batches of indices below `count`, every index once an epoch."""
    return shuffled_rows(count, spec.batch, spec.steps, torch.Generator().manual_seed(spec.seed))


def scenes(seed: int = 0, size: int = SCENE) -> Scenes:
    """Scenes of one to six individuals, as the zoo is trained on; numbers from `HELD_OUT` on are for measuring."""
    return Scenes(ZOO_WORLD, seed, size=size, individuals=(1, 6), species=tuple(species_of(TRAIN_GENERA)))
