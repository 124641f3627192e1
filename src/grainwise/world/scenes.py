"""Scenes: one to twelve individuals on ground of two to four kinds of stuff, with the truth about every pixel.

Scene i of `Scenes(world, seed)` is the same on every machine, in every process and in any batch. Nobody is hidden more than
`Scenes.seen` allows: a scene in which that happens is laid out again, with smaller individuals.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from grainwise.world.backgrounds import STUFF_NAMES
from grainwise.world.counter_random import Draws
from grainwise.world.individuals import Pose, finish, light_of, pose_stamps
from grainwise.world.painter import STYLES, Canvases
from grainwise.world.relations import RELATIONS, Pixels, measure, relate
from grainwise.world.stuff_regions import textured_ground
from grainwise.world.taxonomy import Species, World

FIRST_INSTANCE = 1 + len(STUFF_NAMES)
MOST = 12
CANDIDATES = 10
GROUND = 16  # scenes whose ground is made together: few enough to stay in the processor's cache


@dataclass
class Scene:
    """One scene of k individuals, numbered from 0.

    image: uint8 (size, size, 3). panoptic: uint8 (size, size); 1 + s where stuff `STUFF_NAMES[s]` is seen, `FIRST_INSTANCE`
    + i where individual i is. parts: uint8 (size, size), p + 1 where part p of an individual is seen, else 0. stuff: uint8
    (size, size), the kind of ground everywhere, also under individuals. light: float32 (2,), the direction it comes from.
    labels, individuals, varieties: int64 (k,), species, the number of the specimen and its variety. boxes, amodal_boxes:
    float32 (k, 4), x0 y0 x1 y1 in pixels of what is seen and of all that lies in the picture. amodal: bool (k, size, size).
    depths: int64 (k,), 0 for the farthest. areas, amodal_areas: int64 (k,), pixels. on: int64 (k,), index of the stuff that
    at least 60 % of it stand before, else -1. part_areas: int64 (k, parts), pixels seen of each; part_boxes: float32 (k,
    parts, 4). relations: bool (len(RELATIONS), k, k), [r, a, b]: a is in relation r to b. `key` names the scene to `Draws`.
    """

    world: World
    key: tuple[int, ...]
    image: np.ndarray
    panoptic: np.ndarray
    parts: np.ndarray
    stuff: np.ndarray
    light: np.ndarray
    labels: np.ndarray
    individuals: np.ndarray
    varieties: np.ndarray
    boxes: np.ndarray
    amodal_boxes: np.ndarray
    amodal: np.ndarray
    depths: np.ndarray
    areas: np.ndarray
    amodal_areas: np.ndarray
    on: np.ndarray
    part_areas: np.ndarray
    part_boxes: np.ndarray
    relations: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def size(self) -> int:
        return self.image.shape[0]

    @property
    def masks(self) -> np.ndarray:
        """bool (k, size, size): what is seen of each individual."""
        return self.panoptic == (FIRST_INSTANCE + np.arange(len(self), dtype=np.uint8))[:, None, None]

    @cached_property
    def species(self) -> tuple[Species, ...]:
        """The species of each individual."""
        return tuple(self.world.species[label] for label in self.labels)

    @cached_property
    def stuff_seen(self) -> tuple[str, ...]:
        """Names of the stuff of which something is seen."""
        present = np.bincount(self.panoptic.ravel(), minlength=FIRST_INSTANCE)[1:FIRST_INSTANCE]
        return tuple(STUFF_NAMES[kind] for kind in np.flatnonzero(present))

    def part_mask(self, individual: int, part: int) -> np.ndarray:
        """bool (size, size): what is seen of part `part` (from 0) of an individual."""
        return (self.panoptic == FIRST_INSTANCE + individual) & (self.parts == part + 1)

    @cached_property
    def draws(self) -> Draws:
        """Random numbers of the scene's own, for what is said of it."""
        return Draws(self.world.seed, *self.key)

    def relation(self, name: str) -> np.ndarray:
        """bool (k, k): [a, b], whether a is `name` b."""
        return self.relations[RELATIONS.index(name)]


@dataclass
class SceneBatch:
    """Several scenes. images: uint8 (n, size, size, 3); panoptic: uint8 (n, size, size); all else per scene, as lists."""

    images: np.ndarray
    panoptic: np.ndarray
    scenes: list[Scene]

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, item: int) -> Scene:
        return self.scenes[item]

    def __iter__(self) -> Iterator[Scene]:
        return iter(self.scenes)

    @property
    def labels(self) -> list[np.ndarray]:
        return [scene.labels for scene in self.scenes]

    @property
    def boxes(self) -> list[np.ndarray]:
        return [scene.boxes for scene in self.scenes]

    @property
    def masks(self) -> list[np.ndarray]:
        return [scene.masks for scene in self.scenes]

    @property
    def amodal(self) -> list[np.ndarray]:
        return [scene.amodal for scene in self.scenes]

    @property
    def depths(self) -> list[np.ndarray]:
        return [scene.depths for scene in self.scenes]


@dataclass
class _Layout:
    """Who stands where in n scenes of at most `most` individuals; all arrays (n, most) or (n, most, 2), lengths in picture
    sides.
    """

    present: np.ndarray
    labels: np.ndarray
    numbers: np.ndarray
    centre: np.ndarray
    unit: np.ndarray
    depth: np.ndarray
    turn: np.ndarray
    azimuth: np.ndarray
    flip: np.ndarray


@dataclass(frozen=True)
class Scenes:
    """An endless supply of scenes.

    Args:
        world: whose species.
        seed: which supply.
        size: side of the pictures in pixels, 32 to 512.
        individuals: the least and the most in a scene, within 1 to 12.
        regions: the least and the most kinds of stuff, within 1 to 8.
        species: the species that occur; all by default.
        style: "plain", "ink" or "felt".
        light: strength of the brightness gradient and of the colour cast.
        seen: the least share of an individual that is not hidden by others, at most 0.9.

    Raises:
        ValueError: an argument outside these ranges.
    """

    world: World
    seed: int = 0
    size: int = 64
    individuals: tuple[int, int] = (1, MOST)
    regions: tuple[int, int] = (2, 4)
    species: tuple[int, ...] | None = None
    style: str = "plain"
    light: float = 0.14
    seen: float = 0.4

    def __post_init__(self) -> None:
        if not 32 <= self.size <= 512:
            raise ValueError(f"size is {self.size} pixels; choose 32 to 512")
        if not 1 <= self.individuals[0] <= self.individuals[1] <= MOST:
            raise ValueError(f"individuals is {self.individuals}; choose (least, most) within 1 to {MOST}")
        if not 1 <= self.regions[0] <= self.regions[1] <= len(STUFF_NAMES):
            raise ValueError(f"regions is {self.regions}; choose (least, most) within 1 to {len(STUFF_NAMES)}")
        if self.style not in STYLES:
            raise ValueError(f"style {self.style!r} is unknown; choose from {', '.join(STYLES)}")
        if not 0 <= self.seen <= 0.9:
            raise ValueError(f"seen is {self.seen}; choose a share from 0 to 0.9")
        allowed = self.species if self.species is not None else range(len(self.world))
        wrong = [one for one in allowed if not 0 <= one < len(self.world)]
        if wrong or not allowed:
            raise ValueError(f"species {wrong or 'none'} do not make scenes in a world of {len(self.world)} species")

    def draw(self, indices: Any) -> SceneBatch:
        """Scenes by index: an integer, or integers (n,)."""
        indices = _integers(indices, "indices")
        keys = np.stack([np.full(len(indices), zlib.crc32(b"scene")), indices, np.zeros_like(indices)], 1)
        return self._in_batches(keys, keys)

    def draw_bags(self, bags: Any, members: Any) -> SceneBatch:
        """Near-duplicates: members of one bag have the same genera, so one coarse caption, and differ in species and places.

        Args:
            bags, members: integers, broadcast against each other; `captions.near_duplicates` also excludes chance repetitions.
        """
        bags, members = np.broadcast_arrays(_integers(bags, "bags"), _integers(members, "members"))
        bag = np.stack([np.full(len(bags), zlib.crc32(b"bag")), bags, np.full(len(bags), -1)], 1)
        return self._in_batches(bag, np.stack([bag[:, 0], bags, members], 1))

    def _in_batches(self, who: np.ndarray, each: np.ndarray) -> SceneBatch:
        if not len(who):
            return SceneBatch(
                np.zeros((0, self.size, self.size, 3), np.uint8), np.zeros((0, self.size, self.size), np.uint8), []
            )
        step = max(8, 256 * 64 * 64 // self.size**2)
        batches = [self._batch(who[i : i + step], each[i : i + step]) for i in range(0, len(who), step)]
        return SceneBatch(
            images=np.concatenate([batch.images for batch in batches]),
            panoptic=np.concatenate([batch.panoptic for batch in batches]),
            scenes=[scene for batch in batches for scene in batch.scenes],
        )

    def _draws(self, keys: np.ndarray, *more: int) -> Draws:
        return Draws(self.world.seed, self.seed, *keys.T, *more)

    def _batch(self, who: np.ndarray, each: np.ndarray) -> SceneBatch:
        """Scenes composed by the keys `who` (n, 3) and laid out by `each` (n, 3)."""
        draws = self._draws(each)
        grounds = [
            textured_ground(self._draws(each[i : i + GROUND]), *self.regions, self.size) for i in range(0, len(each), GROUND)
        ]
        ground, stuff = (np.concatenate(maps) for maps in zip(*grounds, strict=True))
        light = light_of(draws)
        layout, canvases, pixels = self._painted(who, each, ground, stuff, light)
        image = finish(canvases, draws, light, self.light, STYLES[self.style])
        panoptic = np.where(canvases.owner > 0, canvases.owner + np.uint8(FIRST_INSTANCE - 1), stuff + np.uint8(1))
        boxes, amodal_boxes = pixels.boxes, pixels.amodal_boxes
        found = relate(pixels, layout.depth, self.size)
        varieties = layout.numbers % self.world.varieties
        scenes = []
        for i, k in enumerate(layout.present.sum(1).tolist()):
            parts = max(len(self.world.species[label].parts) for label in layout.labels[i, :k].tolist())
            scenes.append(
                Scene(
                    self.world, (self.seed, *each[i].tolist()), image[i], panoptic[i], canvases.part[i], stuff[i], light[i],
                    layout.labels[i, :k], layout.numbers[i, :k], varieties[i, :k], boxes[i, :k], amodal_boxes[i, :k],
                    pixels.amodal[i, :k], layout.depth[i, :k], pixels.areas[i, :k], pixels.amodal_areas[i, :k], pixels.on[i,
                    :k], pixels.part_areas[i, :k, :parts], pixels.part_boxes[i, :k, :parts], found[i, :, :k, :k],
                )
            )  # fmt: skip
        return SceneBatch(image, panoptic, scenes)

    def _painted(
        self, who: np.ndarray, each: np.ndarray, ground: np.ndarray, stuff: np.ndarray, light: np.ndarray
    ) -> tuple[_Layout, Canvases, Pixels]:
        """Lay out, paint and measure; scenes with someone hidden too much are done again until there are none."""
        layout, canvases, pixels = self._attempt(who, each, ground, stuff, light, 0)
        for attempt in range(1, 40):
            hidden = (pixels.areas < np.float32(self.seen) * pixels.amodal_areas) | (pixels.amodal_areas == 0)
            again = np.flatnonzero((hidden & layout.present).any(1))
            if not len(again):
                return layout, canvases, pixels
            news = self._attempt(who[again], each[again], ground[again], stuff[again], light[again], attempt)
            for old, new in zip((layout, canvases, pixels), news, strict=True):
                for name, value in vars(new).items():
                    if isinstance(value, np.ndarray):
                        getattr(old, name)[again] = value
        raise RuntimeError(f"no layout shows {self.seen:.0%} of everybody; lower `seen` or `individuals`")

    def _attempt(
        self, who: np.ndarray, each: np.ndarray, ground: np.ndarray, stuff: np.ndarray, light: np.ndarray, attempt: int
    ) -> tuple[_Layout, Canvases, Pixels]:
        layout = self._lay_out(self._draws(who), self._draws(each), self._draws(each, attempt), attempt)
        canvases = Canvases(ground.copy())
        style = STYLES[self.style]
        if style.paper is not None:
            canvases.image = np.float32(0.35) * canvases.image + np.float32(0.65) * np.array(style.paper, np.float32)
        amodal = np.zeros((len(who), self.individuals[1], self.size, self.size), bool)
        scene, slot = np.nonzero(layout.present)
        side, seen = np.float32(self.size), (scene, slot)
        stance = Pose(
            layout.centre[seen] * side, layout.unit[seen] * side, layout.turn[seen], layout.azimuth[seen], layout.flip[seen]
        )
        labels, varieties = layout.labels[seen], layout.numbers[seen] % self.world.varieties
        stamps = pose_stamps(self.world, labels, varieties, stance, scene, slot + 1, layout.depth[seen])
        canvases.paint(stamps, style, light, amodal)
        canvases.part[canvases.owner == 0] = 0
        return layout, canvases, measure(canvases.owner, canvases.part, stuff, amodal)

    def _lay_out(self, who: Draws, each: Draws, now: Draws, attempt: int) -> _Layout:
        """`who` decides the number and the genera, `each` the species, `now` the places."""
        low, high = self.individuals
        count = low + who.integers("individuals", high - low + 1)
        present = np.arange(high) < count[:, None]
        labels = self._labels(who, each)
        spread = np.float32(0.32) / (np.float32(0.2) + np.float32(0.8) * np.sqrt(count.astype(np.float32)))
        unit = spread[:, None] * now.uniform("unit", 0.75, 1.25, (high,)) * np.float32(0.9**attempt)
        centre = _places(now, unit, present)
        height = centre[..., 1] + now.uniform("depth", 0, 0.4, (high,))  # lower in the picture is mostly nearer
        depth = np.argsort(np.argsort(np.where(present, height, 9), axis=1, kind="stable"), axis=1, kind="stable")
        return _Layout(
            present=present,
            labels=labels,
            numbers=each.integers("specimen", 1 << 16, (high,)),
            centre=centre,
            unit=unit,
            depth=depth,
            turn=now.uniform("turn", -12, 12, (high,)),
            azimuth=now.uniform("azimuth", -25, 25, (high,)),
            flip=now.chance("flip", 0.5, (high,)),
        )

    def _labels(self, who: Draws, each: Draws) -> np.ndarray:
        """int64 (n, most): genera repeat in a scene, so that it holds siblings and several of one species."""
        allowed = sorted(set(self.species if self.species is not None else range(len(self.world))))
        genera: dict[int, list[int]] = {}
        for one in allowed:
            genera.setdefault(self.world.species[one].genus, []).append(one)
        width = max(map(len, genera.values()))
        members = np.array([[*own, *[own[0]] * (width - len(own))] for own in genera.values()])
        sizes = np.array([len(own) for own in genera.values()], np.float32)
        most = self.individuals[1]
        genus = who.integers("genus", len(genera), (most,))
        copies, like = who.chance("same genus", 0.5, (most,)), who.uniform("like whom", size=(most,))
        pick = each.uniform("species", size=(most,))
        same = each.chance("same species", 0.35, (most,))
        for slot in range(1, most):
            model = np.floor(like[:, slot] * np.float32(slot)).astype(np.int64)[:, None]
            genus[:, slot] = np.where(copies[:, slot], np.take_along_axis(genus, model, 1)[:, 0], genus[:, slot])
            alike = copies[:, slot] & same[:, slot]
            pick[:, slot] = np.where(alike, np.take_along_axis(pick, model, 1)[:, 0], pick[:, slot])
        return members[genus, np.floor(pick * sizes[genus]).astype(np.int64)]


def _places(now: Draws, unit: np.ndarray, present: np.ndarray) -> np.ndarray:
    """float32 (n, most, 2): centres; each takes the first of ten random places far enough from those before it, or the
    farthest."""
    n, most = unit.shape
    edge = np.minimum(unit * np.float32(1.1), np.float32(0.48))[:, :, None]
    tries = edge[..., None] + now.uniform("centre", size=(most, CANDIDATES, 2)) * (1 - 2 * edge[..., None])
    enough = now.uniform("distance", 0.75, 1.5, (most,))
    centre = np.zeros((n, most, 2), np.float32)
    centre[:, 0] = tries[:, 0, 0]
    every = np.arange(n)
    for slot in range(1, most):
        gap = tries[:, slot, :, None] - centre[:, None, :slot]
        far = np.sqrt(gap[..., 0] * gap[..., 0] + gap[..., 1] * gap[..., 1])
        far = far / (unit[:, None, slot, None] + unit[:, None, :slot])
        free = far.min(-1)
        good = free >= enough[:, slot, None]
        centre[:, slot] = tries[every, slot, np.where(good.any(1), good.argmax(1), free.argmax(1))]
    return centre


def _integers(values: Any, name: str) -> np.ndarray:
    array = np.atleast_1d(np.asarray(values))
    if array.ndim != 1 or not (np.issubdtype(array.dtype, np.integer) or not array.size):
        raise ValueError(f"{name} must be an integer or a list of integers, got {array.dtype} of shape {array.shape}")
    return array.astype(np.int64)
