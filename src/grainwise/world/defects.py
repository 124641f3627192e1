"""Things that went wrong with an individual: a scratch, a missing part, a part of the wrong colour, contamination. With
masks and names.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from grainwise.world.counter_random import Draws
from grainwise.world.individuals import Alteration, Individuals, Nuisance
from grainwise.world.shapes import COLOURS
from grainwise.world.taxonomy import World

DEFECTS = ("scratch", "missing part", "wrong colour", "contamination")
INSPECTION = Nuisance(
    scale=(0.32, 0.36),
    place=0.02,
    turn=4.0,
    azimuth=6.0,
    flip=False,
    light=0.06,
    clutter=0,
    occlusion=0.0,
    backgrounds=("snow", "cloth"),
)


@dataclass
class Defective:
    """n inspected individuals, drawn twice: whole and as found.

    images: uint8 (n, size, size, 3), as found; whole: uint8, the same individual without the defect; masks: bool (n, size,
    size), the pixels the defect changed (none for a good one); kinds: int64 (n,), 0 good, else 1 + index into `DEFECTS`;
    names: what a person would say, for example "the beak is missing"; drawn: the whole individuals in full.
    """

    images: np.ndarray
    whole: np.ndarray
    masks: np.ndarray
    kinds: np.ndarray
    names: tuple[str, ...]
    drawn: Individuals


def draw_defects(world: World, labels: np.ndarray, numbers: np.ndarray, kinds: np.ndarray, *, size: int = 64) -> Defective:
    """Draw individuals for inspection, each with the defect asked for.

    Args:
        world, labels, numbers: as for `World.draw`.
        kinds: int (n,), 0 for none, else 1 + index into `DEFECTS`.
        size: side in pixels.

    Raises:
        ValueError: a kind out of range.
    """
    labels, numbers, kinds = (
        np.array(a, np.int64) for a in np.broadcast_arrays(np.atleast_1d(labels), np.atleast_1d(numbers), np.atleast_1d(kinds))
    )
    if len(kinds) and not 0 <= kinds.min() <= kinds.max() <= len(DEFECTS):
        raise ValueError(f"kinds {kinds.min()}..{kinds.max()}: 0 is good, 1 to {len(DEFECTS)} are {', '.join(DEFECTS)}")
    whole = world.draw(labels, numbers, size=size, nuisance=INSPECTION)
    alter, names = _alterations(world, whole, kinds)
    images = world.draw(labels, numbers, size=size, nuisance=INSPECTION, alter=alter).images
    draws = Draws(world.seed, labels, numbers)
    for index in np.flatnonzero((kinds == 1) | (kinds == 4)):
        paint, names[index] = (_scratch, "a scratch") if kinds[index] == 1 else (_contaminate, "contamination")
        pick = draws.uniform(f"defect {kinds[index]}", size=(8,))[index]
        images[index] = paint(images[index].astype(np.float32), whole.parts[index] > 0, pick).astype(np.uint8)
    masks = (np.abs(images.astype(np.int16) - whole.images) > 12).any(-1)
    return Defective(images, whole.images, masks, kinds, tuple(names), whole)


def _alterations(world: World, whole: Individuals, kinds: np.ndarray) -> tuple[Alteration, list[str]]:
    """Choose, for each individual with a missing or wrongly coloured part, a part that is seen (never the first, its body)."""
    count, size = len(kinds), whole.images.shape[1]
    draws = Draws(world.seed, whole.labels, whole.individuals)
    chance, palette = draws.uniform("part"), draws.order("wrong colour", len(COLOURS))
    hidden, recoloured = np.zeros(count, np.int64), np.zeros(count, np.int64)
    colour, names = np.zeros((count, 3), np.float32), ["good"] * count
    for index in np.flatnonzero((kinds == 2) | (kinds == 3)):
        parts = world.species[whole.labels[index]].parts
        area = np.bincount(whole.parts[index].reshape(-1), minlength=len(parts) + 1)[2:]
        seen = np.flatnonzero(area >= 0.003 * size * size)
        seen = seen if len(seen) else np.array([area.argmax()])
        part = parts[int(seen[int(chance[index] * len(seen))]) + 1]
        number, verb = parts.index(part) + 1, "are" if part.plural else "is"
        if kinds[index] == 2:
            hidden[index], names[index] = number, f"the {part.noun} {verb} missing"
            continue
        used = {one.colour for one in parts}
        wrong = next(name for name in (list(COLOURS)[k] for k in palette[index]) if name not in used)
        recoloured[index], colour[index] = number, np.array(COLOURS[wrong], np.float32) / 255
        names[index] = f"the {part.noun} {verb} {wrong} instead of {part.colour}"
    return Alteration(hidden, recoloured, colour), names


def _scratch(image: np.ndarray, inside: np.ndarray, pick: np.ndarray) -> np.ndarray:
    """A thin line on the individual, dark on light and light on dark."""
    size = len(image)
    rows, columns = np.nonzero(inside)
    y, x = rows[int(pick[0] * len(rows))], columns[int(pick[0] * len(rows))]
    i, j = np.mgrid[:size, :size].astype(np.float32)
    slope = pick[1] * 2 - 1
    along, across = (j - x) + slope * (i - y), (i - y) - slope * (j - x)
    mark = (np.abs(across) < 0.9 + 0.012 * size) & (np.abs(along) < size * (0.1 + 0.12 * pick[2])) & inside
    image[mark] = 30.0 if image[mark].mean() > 110 else 235.0
    return image


def _contaminate(image: np.ndarray, inside: np.ndarray, pick: np.ndarray) -> np.ndarray:
    """Three blots of mud or mould on and around a point of the individual."""
    size = len(image)
    rows, columns = np.nonzero(inside)
    y, x = rows[int(pick[0] * len(rows))], columns[int(pick[0] * len(rows))]
    i, j = np.mgrid[:size, :size].astype(np.float32)
    blot = (j - x) ** 2 + (i - y) ** 2 * (0.6 + pick[3]) < (size * (0.045 + 0.03 * pick[2])) ** 2
    for across, down in ((pick[4], pick[5]), (pick[6], pick[7])):
        aside, below = size * 0.16 * (across - 0.5), size * 0.16 * (down - 0.5)
        blot |= (j - x - aside) ** 2 + (i - y - below) ** 2 < (size * 0.03) ** 2
    mud = np.array((96, 84, 40) if pick[1] < 0.5 else (60, 120, 84), np.float32)
    alike = np.abs(image[blot].mean(0) - mud).max() < 40
    image[blot] = 255 - mud if alike else mud
    return image
