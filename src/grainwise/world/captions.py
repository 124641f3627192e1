"""Captions of scenes at three granularities, descriptions of single individuals, pairs of regions and attributes,
near-duplicates.

coarse: how many of which kind; medium: with their main colour, the ground and a few relations; fine: every individual's
parts, as far as they are seen, and its place.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from grainwise.world.backgrounds import STUFF_NAMES
from grainwise.world.body_plans import PLANS
from grainwise.world.relations import RELATIONS
from grainwise.world.scenes import Scene, SceneBatch, Scenes
from grainwise.world.taxonomy import ATTRIBUTES, LEVELS, Part, World
from grainwise.world.words import NUMBERS, article, counted, listed, part_noun

SEEN = 3
FACTS = 3
TOLD = ("left of", "above", "in front of", "touching", "larger than")
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "centre", "right")


def caption(scene: Scene, level: str = "medium") -> str:
    """The scene in words at one of the granularities coarse, medium, fine."""
    if level == "coarse":
        return coarse(scene)
    if level == "medium":
        return medium(scene)
    if level == "fine":
        return fine(scene)
    raise ValueError(f"level is {level!r}; choose one of {', '.join(LEVELS)}")


def coarse(scene: Scene) -> str:
    """ "a bird and two fish"."""
    counts = Counter(species.kind for species in scene.species)
    return listed([counted(counts[kind], kind) for kind in PLANS if kind in counts])


def nouns(scene: Scene) -> list[str]:
    """ "pink bird": each individual's kind with the colour of its largest part."""
    return [_words(scene.world, label).noun for label in scene.labels.tolist()]


def medium(scene: Scene) -> str:
    """Kinds with colours, the ground, and up to three relations between individuals that colour and kind single out."""
    names = nouns(scene)
    counts = Counter(names)
    order = sorted(counts, key=lambda name: (list(PLANS).index(name.rsplit(" ", 1)[1]), name))
    text = listed([counted(counts[name], name) for name in order])
    if scene.stuff_seen:
        text += f" on {listed(scene.stuff_seen)}"
    alone = [i for i, name in enumerate(names) if counts[name] == 1]
    facts = [
        (r, a, b) for r, a, b in np.argwhere(scene.relations).tolist()
        if a in alone and b in alone and RELATIONS[r] in TOLD and (RELATIONS[r] != "touching" or a < b)
    ]  # fmt: skip
    if not facts:
        return text
    chosen = scene.draws.order("relations told", len(facts))[0, :FACTS]
    told = [f"the {names[a]} is {RELATIONS[r]} the {names[b]}" for r, a, b in (facts[i] for i in sorted(chosen.tolist()))]
    return f"{text}; {listed(told)}"


def place(scene: Scene, individual: int) -> str:
    """ "on the grass at the top left": where an individual is; the picture is divided in three by three."""
    x0, y0, x1, y1 = scene.amodal_boxes[individual].tolist()
    column = COLUMNS[min(int((x0 + x1) * 1.5 / scene.size), 2)]
    row = ROWS[min(int((y0 + y1) * 1.5 / scene.size), 2)]
    words = [row] * (row != "middle") + [column] * (column != "centre")
    spot = "at the " + " ".join(words) if words else "in the middle"
    stuff = scene.on[individual]
    return f"on the {STUFF_NAMES[stuff]} {spot}" if stuff >= 0 else spot


def describe(scene: Scene, individual: int) -> str:
    """One individual: its kind, its parts as far as they are seen, and its place."""
    species = scene.species[individual]
    phrases = _words(scene.world, int(scene.labels[individual])).phrases
    seen = scene.part_areas[individual].tolist()
    parts = [phrase for phrase, area in zip(phrases, seen, strict=False) if area >= SEEN]
    look = f" with {listed(parts)}" if parts else ""
    return f"{article(species.kind)}{look} {place(scene, individual)}"


def fine(scene: Scene) -> str:
    """Every individual, from left to right."""
    centre = scene.amodal_boxes[:, 0] + scene.amodal_boxes[:, 2]
    return "; ".join(describe(scene, i) for i in np.argsort(centre, kind="stable").tolist())


class _Words(NamedTuple):
    """What captions say of a species: kind with main colour, a phrase for each part, attributes of each part and of all."""

    noun: str
    phrases: tuple[str, ...]
    attributes: tuple[dict[str, str | int], ...]
    whole: dict[str, str | int]


@lru_cache(maxsize=4096)
def _words(world: World, label: int) -> _Words:
    species = world.species[label]
    largest = max(species.parts, key=lambda part: part.count * part.slot.half[0] * part.slot.half[1])
    return _Words(
        noun=f"{largest.colour} {species.kind}",
        phrases=tuple(_part(part) for part in species.parts),
        attributes=tuple({"part": part.name, **{name: part.attribute(name) for name in ATTRIBUTES}} for part in species.parts),
        whole={"kind": species.kind, "species": species.name, **species.attributes()},
    )


def _part(part: Part) -> str:
    look = part.colour if part.texture == "plain" else f"{part.colour} and {part.second} {part.texture}"
    size = "" if part.size == "medium" else f"{part.size} "
    words = f"{size}{look} {part.shape} {part_noun(part.name, part.count)}"
    return article(words) if part.count == 1 else f"{NUMBERS[part.count]} {words}"


@dataclass(frozen=True)
class Region:
    """A region with what is true of it: box (x0, y0, x1, y1) in pixels, part -1 for the whole individual, text, attributes."""

    individual: int
    part: int
    box: tuple[float, float, float, float]
    text: str
    attributes: dict[str, str | int]


def regions(scene: Scene) -> Iterator[Region]:
    """Every individual and each of its parts that is seen, with its attributes. Masks: `scene.masks[i]`,
    `scene.part_mask(i, p)`."""
    boxes, part_boxes, areas = scene.boxes.tolist(), scene.part_boxes.tolist(), scene.part_areas.tolist()
    for i, species in enumerate(scene.species):
        words = _words(scene.world, species.index)
        yield Region(i, -1, tuple(boxes[i]), species.describe("medium"), words.whole)
        for p, (phrase, attributes) in enumerate(zip(words.phrases, words.attributes, strict=True)):
            if areas[i][p] >= SEEN:
                yield Region(i, p, tuple(part_boxes[i][p]), phrase, attributes)


def near_duplicates(scenes: Scenes, bag: int, members: int) -> SceneBatch:
    """A bag of scenes with one coarse caption between them and as many fine captions as members.

    Member m depends on the members before it only where it would repeat one's fine caption: then another is drawn in its place.
    """
    drawn = scenes.draw_bags(bag, np.arange(members))
    taken: set[str] = set()
    for m, scene in enumerate(drawn.scenes):
        for again in range(1, 30):
            if fine(scene) not in taken:
                break
            scene = scenes.draw_bags(bag, m + again * 1_000_003).scenes[0]
        else:
            raise ValueError(f"bag {bag} has fewer than {members} scenes with different fine captions; allow more species")
        taken.add(fine(scene))
        drawn.scenes[m], drawn.images[m], drawn.panoptic[m] = scene, scene.image, scene.panoptic
    return drawn
