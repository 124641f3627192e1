"""Pairs for composed retrieval: a reference picture and a text of change that together name a target picture."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from grainwise.world.counter_random import Draws
from grainwise.world.individuals import Individuals, Nuisance
from grainwise.world.taxonomy import COUNT_WORDS, Species, World


@dataclass(frozen=True)
class ComposedPairs:
    """n pairs; target i is another individual of the sibling species that change i asks for.

    references, targets: `Individuals` of length n; changes: n texts.
    """

    references: Individuals
    targets: Individuals
    changes: tuple[str, ...]


def change_text(source: Species, target: Species, wording: int = 0) -> str:
    """What turns a species into its sibling: "make the beak red instead of blue"."""
    if source.genus != target.genus or source.index == target.index:
        raise ValueError(f"{target.name} is no sibling of {source.name}")
    part, attribute = source.key
    old, new = source.parts[part], target.parts[part]
    if attribute == "count":
        count, noun = COUNT_WORDS[new.count], new.noun
        return (f"with {count} {noun}", f"the same, but with {count} {noun}", f"change the number of {old.name} to {count}")[
            wording % 3
        ]
    value, was = new.attribute(attribute), old.attribute(attribute)
    return (
        f"make the {new.noun} {value} instead of {was}",
        f"the same, but with {value} {new.noun}",
        f"change the {attribute} of the {new.noun} to {value}",
    )[wording % 3]


def composed_pairs(
    world: World, indices: np.ndarray, *, size: int = 64, style: str = "plain", nuisance: Nuisance | None = None
) -> ComposedPairs:
    """The pairs with the given indices (n,); needs two species a genus."""
    if world.species_per_genus < 2:
        raise ValueError("composed pairs change one species into a sibling: the world needs two species a genus")
    indices = np.asarray(indices, np.int64)
    draws = Draws(world.seed, indices)
    genus = draws.integers("genus", world.genera) * world.species_per_genus
    members = draws.order("members", world.species_per_genus)[:, :2] + genus[:, None]
    numbers = 300_000 + draws.integers("number", 100_000, (2,))
    wording = draws.integers("wording", 3)
    changes = tuple(change_text(world.species[a], world.species[b], int(w)) for (a, b), w in zip(members, wording, strict=True))
    first, second = (world.draw(members[:, k], numbers[:, k], size=size, style=style, nuisance=nuisance) for k in (0, 1))
    return ComposedPairs(first, second, changes)
