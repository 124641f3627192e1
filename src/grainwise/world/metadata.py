"""Where and when an individual was seen: meta-data that depends on the species by a known law.

Each species has a home on a map of [0, 1] x [0, 1], a season (day of the year at which it is most often seen) and two habitats.
An individual's place is its home plus Gaussian noise, its day the season plus noise, its habitat one of the two, more often
the first. Siblings get homes far apart, so that the place tells what the picture hardly shows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from grainwise.world.backgrounds import STUFF_NAMES
from grainwise.world.counter_random import Draws
from grainwise.world.individuals import cos_sin
from grainwise.world.taxonomy import World

SPREAD = 0.08  # standard deviation of a place about the home
DAYS = 20.0  # standard deviation of a day about the season
FIRST_HABITAT = 0.75  # how often an individual is in its species' first habitat
MONTHS = (
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
)


@dataclass(frozen=True)
class Law:
    """What meta-data say about species: homes (species, 2), seasons (species,) in days, habitats (species, 2) into
    `STUFF_NAMES`.
    """

    homes: np.ndarray
    seasons: np.ndarray
    habitats: np.ndarray


@dataclass(frozen=True)
class MetaData:
    """Of n individuals: places float32 (n, 2), days int64 (n,) from 0 to 364, habitats int64 (n,), texts."""

    places: np.ndarray
    days: np.ndarray
    habitats: np.ndarray
    texts: tuple[str, ...]


def law_of(world: World) -> Law:
    """The law of a world: the siblings of a genus sit on a circle around a point of their own."""
    species = np.arange(len(world))
    genus = Draws(world.seed, species // world.species_per_genus)
    number = species % world.species_per_genus
    angle = genus.uniform("turn", 0, 360) + 360 * number / world.species_per_genus
    cos, sin = cos_sin(angle)
    centre = genus.uniform("region", 0.35, 0.65, (2,))
    homes = centre + np.float32(0.3) * np.stack([cos, sin], 1)
    habitats = Draws(world.seed, species).order("habitats", len(STUFF_NAMES))[:, :2]
    return Law(homes.astype(np.float32), Draws(world.seed, species).integers("season", 365), habitats)


def metadata(world: World, labels: np.ndarray, individuals: np.ndarray) -> MetaData:
    """Meta-data of individuals, by the world's law; arrays (n,) as for `World.draw`."""
    labels, individuals = np.asarray(labels), np.asarray(individuals)
    law, draws = law_of(world), Draws(world.seed, labels, individuals)
    places = np.clip(law.homes[labels] + np.float32(SPREAD) * draws.normal("place noise", (2,)), 0, 1)
    days = (law.seasons[labels] + np.round(DAYS * draws.normal("day noise")).astype(np.int64)) % 365
    second = (~draws.chance("habitat", FIRST_HABITAT)).astype(np.int64)
    habitats = law.habitats[labels, second]
    texts = tuple(
        f"seen in {MONTHS[min(day * 12 // 365, 11)]} at {north:.2f} north, {east:.2f} east, on {STUFF_NAMES[habitat]}"
        for day, (east, north), habitat in zip(days.tolist(), places.tolist(), habitats.tolist(), strict=True)
    )
    return MetaData(places, days, habitats, texts)


def log_likelihood(world: World, data: MetaData) -> np.ndarray:
    """float64 (n, species): log p(place, day, habitat | species) under the law, the most that meta-data can tell."""
    law = law_of(world)
    away = ((data.places[:, None].astype(np.float64) - law.homes[None]) ** 2).sum(-1) / (2 * SPREAD**2)
    days = np.abs(data.days[:, None] - law.seasons[None])
    late = np.minimum(days, 365 - days) ** 2 / (2 * DAYS**2)
    first, second = (law.habitats[None, :, k] == data.habitats[:, None] for k in (0, 1))
    habitat = np.where(first, FIRST_HABITAT, np.where(second, 1 - FIRST_HABITAT, 1e-12))
    return -away - late + np.log(habitat)
