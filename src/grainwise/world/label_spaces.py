"""Several label spaces over the same pictures, for embeddings that answer to a condition."""

from __future__ import annotations

import numpy as np

from grainwise.world.backgrounds import STUFF_NAMES
from grainwise.world.individuals import Individuals
from grainwise.world.shapes import COLOURS
from grainwise.world.taxonomy import World

SPACES = ("kind", "genus", "species", "variety", "main colour", "key value", "background", "side")


def label_space(world: World, drawn: Individuals, space: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """(int64 (n,) labels, their names) of drawn individuals in one label space.

    Raises:
        ValueError: the space is unknown.
    """
    species = [world.species[label] for label in drawn.labels]
    if space == "kind":
        names = tuple(sorted({one.kind for one in world.species}))
        return np.array([names.index(one.kind) for one in species]), names
    if space == "genus":
        return np.array([one.genus for one in species]), tuple(_genus_name(world, genus) for genus in range(world.genera))
    if space == "species":
        return drawn.labels.copy(), tuple(one.name for one in world.species)
    if space == "variety":
        names = tuple(world.variety(one.index, k).name for one in world.species for k in range(world.varieties))
        return drawn.labels * world.varieties + drawn.varieties, names
    if space == "main colour":
        names = tuple(COLOURS)
        return np.array([names.index(one.parts[0].colour) for one in species]), names
    if space == "key value":
        names = tuple(sorted({key_value(one) for one in world.species}))
        return np.array([names.index(key_value(one)) for one in species]), names
    if space == "background":
        return drawn.backgrounds.copy(), STUFF_NAMES
    if space == "side":
        return (drawn.azimuths >= 0).astype(np.int64), ("turned left", "turned right")
    raise ValueError(f"label space {space!r} is unknown; choose from {', '.join(SPACES)}")


def _genus_name(world: World, genus: int) -> str:
    return world.species[genus * world.species_per_genus].name.split()[0]


def key_value(species: object) -> str:
    """What the deciding attribute is: "beak colour red"."""
    part, attribute = species.key  # type: ignore[attr-defined]
    return f"{species.parts[part].name} {attribute} {species.parts[part].attribute(attribute)}"  # type: ignore[attr-defined]
