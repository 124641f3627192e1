"""Which individuals of which species belong to which split.

Every split is a table of (species, individual) pairs, fixed by the world's seed; individuals of different parts never coincide.
Training, validation and test use numbers 0-99,999, 100,000-199,999 and 200,000-299,999 of each species.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from grainwise.world.counter_random import Draws
from grainwise.world.taxonomy import World

PARTS = {"train": 0, "val": 100_000, "test": 200_000}


@dataclass(frozen=True)
class Table:
    """Rows of a split: labels and individuals, int64 (n,), to hand to `World.draw`; `style` is how they are drawn."""

    labels: np.ndarray
    individuals: np.ndarray
    style: str = "plain"

    def __len__(self) -> int:
        return len(self.labels)

    def shuffled(self, seed: int) -> Table:
        """The same rows in another order."""
        order = np.random.default_rng(seed).permutation(len(self))
        return Table(self.labels[order], self.individuals[order], self.style)


def _first_of(part: str) -> int:
    if part not in PARTS:
        raise ValueError(f"part {part!r} is unknown; choose from {', '.join(PARTS)}")
    return PARTS[part]


def rows(species: Sequence[int], counts: int | Sequence[int], part: str = "train", style: str = "plain") -> Table:
    """`counts` individuals (one number, or one for each) of every species given."""
    each = np.broadcast_to(np.asarray(counts, np.int64), (len(species),))
    if (each < 0).any() or (each > 100_000).any():
        raise ValueError(f"counts {each.min()}..{each.max()}: a part of a split holds 0 to 100,000 individuals of a species")
    labels = np.repeat(np.asarray(species, np.int64), each)
    numbers = np.concatenate([np.arange(count) for count in each]) if len(each) else np.zeros(0, np.int64)
    return Table(labels, _first_of(part) + numbers.astype(np.int64), style)


def balanced(world: World, each: int, part: str = "train", style: str = "plain") -> Table:
    """`each` individuals of every species."""
    return rows(range(len(world)), each, part, style)


def few_shot(world: World, shots: int, species: Sequence[int] | None = None, episode: int = 0) -> Table:
    """`shots` training individuals of each species; episodes differ in which."""
    if shots < 1:
        raise ValueError(f"shots is {shots}; at least one picture of each species is needed")
    chosen = np.asarray(range(len(world)) if species is None else species, np.int64)
    numbers = Draws(world.seed, chosen, episode).order("shots", max(1000, shots))[:, :shots]
    return Table(np.repeat(chosen, shots), numbers.reshape(-1))


def long_tail(world: World, most: int, imbalance: float = 100.0, part: str = "train") -> Table:
    """Counts fall geometrically from `most` to `most / imbalance` over the species, in an order drawn from the seed."""
    if imbalance < 1 or most < imbalance:
        raise ValueError(
            f"most is {most} and imbalance {imbalance}: the rarest species would have {most / imbalance:.2f} individuals; "
            "it needs one"
        )
    order = Draws(world.seed).order("long tail", len(world))[0]
    share = np.arange(len(world)) / max(len(world) - 1, 1)
    counts = np.maximum(np.round(most * imbalance**-share), 1).astype(np.int64)
    return rows(order.tolist(), counts.tolist(), part)


@dataclass(frozen=True)
class OpenSet:
    """Species that a model knows, near novelties (unknown species of known genera) and far ones (unknown genera)."""

    known: tuple[int, ...]
    near: tuple[int, ...]
    far: tuple[int, ...]


def open_set(world: World, near_share: float = 0.25, far_share: float = 0.25, split: int = 0) -> OpenSet:
    """Hold out whole genera (far) and, of every other genus, some species (near).

    Args:
        world: whose species.
        near_share: share of each remaining genus that is held out, at least one species and never all.
        far_share: share of the genera, at least one and never all.
        split: another split of the same world.

    Raises:
        ValueError: fewer than two genera or two species a genus.
    """
    if world.genera < 2 or world.species_per_genus < 2:
        raise ValueError(
            f"an open set needs two genera of two species, the world has {world.genera} of {world.species_per_genus}"
        )
    order = Draws(world.seed, split).order("far genera", world.genera)[0]
    away = min(max(1, round(far_share * world.genera)), world.genera - 1)
    held = min(max(1, round(near_share * world.species_per_genus)), world.species_per_genus - 1)
    far, near, known = [], [], []
    for genus in range(world.genera):
        members = genus * world.species_per_genus + Draws(world.seed, split, genus).order("near", world.species_per_genus)[0]
        if genus in order[:away]:
            far += members.tolist()
        else:
            near += members[:held].tolist()
            known += members[held:].tolist()
    return OpenSet(tuple(sorted(known)), tuple(sorted(near)), tuple(sorted(far)))


def base_novel(world: World, split: int = 0) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(base, novel): half of the species of every genus each, so that novel ones look like base ones."""
    if world.species_per_genus < 2:
        raise ValueError("base and novel species need two species a genus")
    base, novel = [], []
    for genus in range(world.genera):
        members = genus * world.species_per_genus + Draws(world.seed, split, genus).order("base", world.species_per_genus)[0]
        half = (world.species_per_genus + 1) // 2
        base += members[:half].tolist()
        novel += members[half:].tolist()
    return tuple(sorted(base)), tuple(sorted(novel))


def cross_domain(world: World, each: int, source: str = "plain", target: str = "ink") -> dict[str, Table]:
    """Training pictures in one style, validation in the same, test in both: {"train", "val", "test", "shifted"}."""
    return {
        "train": balanced(world, each, "train", source),
        "val": balanced(world, max(each // 4, 1), "val", source),
        "test": balanced(world, max(each // 4, 1), "test", source),
        "shifted": balanced(world, max(each // 4, 1), "test", target),
    }
