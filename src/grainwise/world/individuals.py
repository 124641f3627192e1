"""Draw individuals of the species: each with its own pose, size, light, background, clutter and occlusion.

An individual is named by (world seed, species, number). Its variety is its number modulo the world's varieties.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from grainwise.world.backgrounds import STUFF_NAMES, surface
from grainwise.world.counter_random import Draws
from grainwise.world.painter import STYLES, Canvases, Stamps, Style
from grainwise.world.shapes import COLOURS, SHAPES, SIZES, TEXTURES
from grainwise.world.taxonomy import Species, World

BATCH = 256


@dataclass(frozen=True)
class Nuisance:
    """What varies between individuals and says nothing about the species.

    scale: the body's unit as a share of the picture's side, from .. to; place: how far (share of the side) the centre strays;
    turn: degrees in the picture plane, either way; azimuth: degrees about the vertical axis, either way; flip: whether to
    mirror;
    light: strength of the brightness gradient and of the colour cast; clutter: most other shapes behind it;
    occlusion: how often something stands in front; backgrounds: names of stuff, all by default.
    """

    scale: tuple[float, float] = (0.28, 0.38)
    place: float = 0.08
    turn: float = 14.0
    azimuth: float = 28.0
    flip: bool = True
    light: float = 0.16
    clutter: int = 4
    occlusion: float = 0.15
    backgrounds: tuple[str, ...] = STUFF_NAMES

    def __post_init__(self) -> None:
        unknown = [name for name in self.backgrounds if name not in STUFF_NAMES]
        if unknown or not self.backgrounds:
            raise ValueError(f"backgrounds {unknown} are unknown; choose from {', '.join(STUFF_NAMES)}")
        if not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"scale {self.scale} is no range of positive shares")


CALM = Nuisance(
    place=0.0, turn=0.0, azimuth=0.0, flip=False, light=0.0, clutter=0, occlusion=0.0, backgrounds=("snow",), scale=(0.36, 0.36)
)


@dataclass
class Individuals:
    """n drawn individuals.

    images: uint8 (n, size, size, 3); parts: uint8 (n, size, size), 0 where the individual is not seen, else the number of
    the part; key_parts: bool (n, size, size), the part that decides between siblings; boxes: float32 (n, 4), x0 y0 x1 y1 of
    what is seen, in pixels; labels, individuals, varieties: int64 (n,); backgrounds: int64 (n,), index into `STUFF_NAMES`;
    azimuths: float32 (n,), degrees.
    """

    images: np.ndarray
    parts: np.ndarray
    key_parts: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    individuals: np.ndarray
    varieties: np.ndarray
    backgrounds: np.ndarray
    azimuths: np.ndarray

    def __len__(self) -> int:
        return len(self.images)

    @property
    def masks(self) -> np.ndarray:
        """bool (n, size, size): the visible individual."""
        return self.parts > 0


@dataclass(frozen=True)
class SpeciesTable:
    """The stamps of every species before any pose, one row per (species, copy of a part), padded with empty ones.

    place, half: float32 (species, copies, 3); tilt: degrees; part: the part's number from 1, 0 in padding.
    """

    place: np.ndarray
    half: np.ndarray
    tilt: np.ndarray
    shape: np.ndarray
    texture: np.ndarray
    colour: np.ndarray
    second: np.ndarray
    part: np.ndarray


def _copies(species: Species) -> list[dict[str, object]]:
    """The stamps of one species: repeated parts stand in a row or on a circle."""
    rows: list[dict[str, object]] = []
    for number, part in enumerate(species.parts, 1):
        slot, size = part.slot, SIZES[part.size]
        for copy in range(part.count):
            x, y, z = slot.place
            if slot.ring:
                angle = 2 * np.pi * (copy / part.count) - np.pi / 2
                x, y = x + slot.ring * round(float(np.cos(angle)), 6), y + slot.ring * round(float(np.sin(angle)), 6)
            else:
                middle = copy - (part.count - 1) / 2
                x, y, z = (x + slot.step[0] * middle, y + slot.step[1] * middle, z + slot.step[2] * middle)
            rows.append(
                {
                    "place": (x, y, z),
                    "half": tuple(size * value for value in slot.half),
                    "tilt": slot.tilt,
                    "shape": SHAPES.index(part.shape),
                    "texture": TEXTURES.index(part.texture),
                    "colour": tuple(value / 255 for value in COLOURS[part.colour]),
                    "second": tuple(value / 255 for value in COLOURS[part.second]),
                    "part": number,
                }
            )
    return rows


@lru_cache(maxsize=16)
def species_table(world: World) -> SpeciesTable:
    """The table of a world's species (made once)."""
    rows = [_copies(species) for species in world.species]
    width = max(map(len, rows))
    empty = {
        "place": (0, 0, 0),
        "half": (1e-3, 1e-3, 1e-3),
        "tilt": 0,
        "shape": 0,
        "texture": 0,
        "colour": (0, 0, 0),
        "second": (0, 0, 0),
        "part": 0,
    }

    def column(name: str, dtype: type) -> np.ndarray:
        return np.array([[row[name] for row in [*one, *[empty] * (width - len(one))]] for one in rows], dtype)

    floats = {name: column(name, np.float32) for name in ("place", "half", "tilt", "colour", "second")}
    return SpeciesTable(**floats, **{name: column(name, np.int64) for name in ("shape", "texture", "part")})


def cos_sin(degrees: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and sine, rounded to six digits so that all machines agree."""
    radians = np.asarray(degrees, np.float64) * (np.pi / 180)
    return np.round(np.cos(radians), 6).astype(np.float32), np.round(np.sin(radians), 6).astype(np.float32)


@dataclass(frozen=True)
class Alteration:
    """What is wrong with n individuals: hidden and recoloured, int (n,), the numbers of parts that are away or have another
    colour (0: none); colour, float32 (n, 3) in [0, 1], that colour."""

    hidden: np.ndarray
    recoloured: np.ndarray
    colour: np.ndarray

    def rows(self, which: slice) -> Alteration:
        """Those of some individuals."""
        return Alteration(self.hidden[which], self.recoloured[which], self.colour[which])


@dataclass
class Pose:
    """Where n individuals stand: centre (n, 2) and unit (n,) in pixels, turn and azimuth (n,) in degrees, flip (n,) bool."""

    centre: np.ndarray
    unit: np.ndarray
    turn: np.ndarray
    azimuth: np.ndarray
    flip: np.ndarray


def pose(draws: Draws, nuisance: Nuisance, size: int) -> Pose:
    """Draw the poses of a batch."""
    return Pose(
        centre=np.float32(size / 2) + draws.uniform("place", -nuisance.place * size, nuisance.place * size, (2,)),
        unit=draws.uniform("scale", nuisance.scale[0] * size, nuisance.scale[1] * size),
        turn=draws.uniform("turn", -nuisance.turn, nuisance.turn),
        azimuth=draws.uniform("azimuth", -nuisance.azimuth, nuisance.azimuth),
        flip=draws.chance("flip", 0.5) & nuisance.flip,
    )


def pose_stamps(
    world: World,
    labels: np.ndarray,
    varieties: np.ndarray,
    stance: Pose,
    canvas: np.ndarray,
    owner: np.ndarray,
    rank: np.ndarray,
    offsets: np.ndarray | None = None,
    stretch: np.ndarray | None = None,
    alter: Alteration | None = None,
) -> Stamps:
    """The stamps of posed individuals.

    Args:
        world, labels, varieties, stance: who (n,) and how.
        canvas, owner: the canvas of each (n,), and its number in the label map.
        rank: (n,), individuals of higher rank stand in front.
        offsets: float32 (n, copies, 3) or None, moves single stamps in body units (articulation, deformation).
        alter: parts that are away or in another colour, or None.
        stretch: float32 (n, copies, 3) or None, multiplies the half sizes of single stamps.
    """
    table = species_table(world)
    place, half = table.place[labels], table.half[labels]
    if offsets is not None:
        place = place + offsets
    if stretch is not None:
        half = half * stretch
    cos, sin = cos_sin(stance.azimuth)
    across = place[..., 0] * cos[:, None] + place[..., 2] * sin[:, None]
    depth = place[..., 2] * cos[:, None] - place[..., 0] * sin[:, None]
    wide = np.sqrt((half[..., 0] * cos[:, None]) ** 2 + (half[..., 2] * sin[:, None]) ** 2)
    mirror = np.where(stance.flip, np.float32(-1), np.float32(1))[:, None]
    cos, sin = cos_sin(stance.turn)
    x = stance.centre[:, :1] + stance.unit[:, None] * (mirror * across * cos[:, None] - place[..., 1] * sin[:, None])
    y = stance.centre[:, 1:] + stance.unit[:, None] * (mirror * across * sin[:, None] + place[..., 1] * cos[:, None])
    cos, sin = cos_sin(stance.turn[:, None] + mirror * table.tilt[labels])
    here, colour = table.part[labels] > 0, _shaded(world, labels, varieties)
    if alter is not None:
        here = here & (table.part[labels] != alter.hidden[:, None])
        wrong = (table.part[labels] == alter.recoloured[:, None]) & here
        colour = np.where(wrong[..., None], alter.colour[:, None], colour)
    wide_body = np.broadcast_to(stance.unit[:, None], here.shape)

    def spread(values: np.ndarray) -> np.ndarray:
        return np.broadcast_to(values[:, None], here.shape)[here]

    return Stamps(
        canvas=spread(canvas),
        rank=spread(rank).astype(np.float64) * 100 + depth[here],
        x=x[here],
        y=y[here],
        a=np.maximum(wide_body * wide, np.float32(0.4))[here],
        b=np.maximum(wide_body * half[..., 1], np.float32(0.4))[here],
        cos=cos[here],
        sin=sin[here],
        shape=table.shape[labels][here],
        texture=table.texture[labels][here],
        colour=colour[here],
        second=table.second[labels][here],
        owner=spread(owner),
        part=table.part[labels][here],
    )


def _shaded(world: World, labels: np.ndarray, varieties: np.ndarray) -> np.ndarray:
    """float32 (n, copies, 3): colours, with the shade of each individual's variety on the part that carries it."""
    table = species_table(world)
    carrier = np.array([species.shaded + 1 for species in world.species])[labels]
    shade = np.zeros(len(labels), np.float32)
    if world.varieties > 1:
        shade = (2 * varieties / (world.varieties - 1) - 1).astype(np.float32)
    towards = np.where(shade > 0, np.float32(1), np.float32(0))[:, None, None]
    weight = np.float32(0.3) * np.abs(shade)[:, None, None] * (table.part[labels] == carrier[:, None])[..., None]
    colour = table.colour[labels]
    return colour + weight * (towards - colour)


def loose_stamps(
    draws: Draws, name: str, count: int, size: int, *, rank: float, most: np.ndarray, radius: tuple[float, float], owner: int
) -> Stamps:
    """Up to `most` (n,) single shapes anywhere on each canvas: clutter behind (owner -1) or things in front (owner 0)."""
    n = draws.count
    shown = np.arange(count)[None] < most[:, None]
    cos, sin = cos_sin(draws.uniform(name + " turn", 0, 360, (count,)))
    palette = np.array(list(COLOURS.values()), np.float32) / 255
    grid = {
        "canvas": np.broadcast_to(np.arange(n)[:, None], (n, count)),
        "rank": np.broadcast_to(rank + np.arange(count, dtype=np.float64)[None] * 1e-3, (n, count)),
        "x": draws.uniform(name + " x", 0, size, (count,)),
        "y": draws.uniform(name + " y", 0, size, (count,)),
        "a": draws.uniform(name + " a", radius[0] * size, radius[1] * size, (count,)),
        "b": draws.uniform(name + " b", radius[0] * size, radius[1] * size, (count,)),
        "cos": cos,
        "sin": sin,
        "shape": draws.integers(name + " shape", len(SHAPES), (count,)),
        "texture": draws.integers(name + " texture", len(TEXTURES), (count,)),
        "colour": palette[draws.integers(name + " colour", len(palette), (count,))],
        "second": palette[draws.integers(name + " second", len(palette), (count,))],
        "owner": np.full((n, count), owner),
        "part": np.zeros((n, count), np.int64),
    }
    return Stamps(**{key: value[shown] for key, value in grid.items()})


def light_of(draws: Draws) -> np.ndarray:
    """float32 (n, 2): the direction light comes from, mostly from above."""
    return np.stack([draws.uniform("light x", -0.6, 0.6), draws.uniform("light y", -1.0, -0.4)], 1)


def finish(canvases: Canvases, draws: Draws, light: np.ndarray, strength: float, style: Style) -> np.ndarray:
    """uint8 (n, size, size, 3): light falls off across the picture, the lamp has a colour, the surface a grain."""
    size = canvases.size
    axis = (np.arange(size, dtype=np.float32) + np.float32(0.5)) / np.float32(size) * 2 - 1
    slope = np.float32(strength) * light
    gain = (1 + slope[:, 0, None, None] * axis) + slope[:, 1, None, None] * axis[:, None]
    cast = 1 + np.float32(strength / 2) * draws.uniform("cast", -1, 1, (3,))
    image = canvases.image * (gain[..., None] * cast[:, None, None])
    if style.grain:
        image = image + np.float32(style.grain) * (draws.uniform("grain", size=(size, size)) - np.float32(0.5))[..., None]
    return (np.clip(image, 0, 1) * 255 + np.float32(0.5)).astype(np.uint8)


def ground(draws: Draws, nuisance: Nuisance, style: Style, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The backgrounds of a batch: float32 (n, size, size, 3) and their kinds (n,)."""
    allowed = np.array([STUFF_NAMES.index(name) for name in nuisance.backgrounds])
    kinds = allowed[draws.integers("background", len(allowed))]
    image = surface(draws, kinds, size)
    if style.paper is not None:
        image = np.float32(0.35) * image + np.float32(0.65) * np.array(style.paper, np.float32)
    return image, kinds


def draw_individuals(
    world: World,
    labels: np.ndarray,
    individuals: np.ndarray,
    *,
    size: int = 64,
    style: str = "plain",
    nuisance: Nuisance | None = None,
    azimuth: np.ndarray | None = None,
    alter: Alteration | None = None,
) -> Individuals:
    """Draw individuals of a world.

    Args:
        world: whose species.
        labels, individuals: int (n,), species index and number of each; broadcast against each other.
        size: side of the pictures in pixels, 16 to 1024.
        style: "plain", "ink" or "felt".
        nuisance: what varies; `Nuisance()` by default.
        azimuth: float (n,), degrees: the exact view about the vertical axis instead of a random one.
        alter: parts that are away or in another colour.

    Raises:
        ValueError: an unknown style, a species outside the world, a size out of range, or a wrong number of views.
    """
    nuisance = nuisance or Nuisance()
    labels, individuals = (
        np.array(a, np.int64) for a in np.broadcast_arrays(np.atleast_1d(labels), np.atleast_1d(individuals))
    )
    if style not in STYLES:
        raise ValueError(f"style {style!r} is unknown; choose from {', '.join(STYLES)}")
    if not 16 <= size <= 1024:
        raise ValueError(f"size is {size} pixels; choose 16 to 1024")
    if len(labels) and not 0 <= labels.min() <= labels.max() < len(world):
        raise ValueError(f"species {labels.min()}..{labels.max()} are not all in a world of {len(world)} species")
    if azimuth is not None and np.shape(azimuth) != labels.shape:
        raise ValueError(f"azimuth has shape {np.shape(azimuth)} for {len(labels)} individuals")
    pieces = []
    for start in range(0, max(len(labels), 1), BATCH):
        rows = slice(start, start + BATCH)
        view = None if azimuth is None else azimuth[rows]
        pieces.append(
            _draw_batch(
                world, labels[rows], individuals[rows], size, style, nuisance, view, None if alter is None else alter.rows(rows)
            )
        )
    return Individuals(**{name: np.concatenate([getattr(piece, name) for piece in pieces]) for name in pieces[0].__dict__})


def _draw_batch(
    world: World,
    labels: np.ndarray,
    numbers: np.ndarray,
    size: int,
    style_name: str,
    nuisance: Nuisance,
    azimuth: np.ndarray | None,
    alter: Alteration | None,
) -> Individuals:
    draws = Draws(world.seed, labels, numbers)
    style, n = STYLES[style_name], len(labels)
    stance = pose(draws, nuisance, size)
    if azimuth is not None:
        stance.azimuth = np.asarray(azimuth, np.float32)
    varieties = numbers % world.varieties
    image, backgrounds = ground(draws, nuisance, style, size)
    canvases, light = Canvases(image), light_of(draws)
    stamps = [pose_stamps(world, labels, varieties, stance, np.arange(n), np.ones(n, np.int64), np.zeros(n), alter=alter)]
    if nuisance.clutter:
        most = draws.integers("clutter count", nuisance.clutter + 1)
        stamps.append(
            loose_stamps(draws, "clutter", nuisance.clutter, size, rank=-1e4, most=most, radius=(0.03, 0.1), owner=-1)
        )
    if nuisance.occlusion:
        most = draws.chance("occluded", nuisance.occlusion).astype(np.int64)
        stamps.append(loose_stamps(draws, "occluder", 1, size, rank=1e4, most=most, radius=(0.06, 0.12), owner=0))
    canvases.paint(Stamps.join(stamps), style, light)
    parts = canvases.part * (canvases.owner > 0)
    key = np.array([species.key[0] + 1 for species in world.species])[labels]
    return Individuals(
        images=finish(canvases, draws, light, nuisance.light, style),
        parts=parts,
        key_parts=parts == key[:, None, None],
        boxes=boxes_of(parts > 0),
        labels=labels,
        individuals=numbers,
        varieties=varieties,
        backgrounds=backgrounds,
        azimuths=stance.azimuth,
    )


def boxes_of(masks: np.ndarray) -> np.ndarray:
    """float32 (n, 4): the tight box x0 y0 x1 y1 of each mask (n, height, width), far edges exclusive; zeros where a mask is
    empty.
    """
    columns, rows = np.asarray(masks.any(1)), np.asarray(masks.any(2))
    found = np.asarray(columns.any(1))
    x0, x1 = columns.argmax(1), masks.shape[2] - columns[:, ::-1].argmax(1)
    y0, y1 = rows.argmax(1), masks.shape[1] - rows[:, ::-1].argmax(1)
    return (np.stack([x0, y0, x1, y1], 1) * found[:, None]).astype(np.float32)
