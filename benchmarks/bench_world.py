"""The microworld: pictures a second of species and of scenes with all annotations, on one thread.

The naive way takes one picture at a time and draws shape by shape with Pillow: polygons into the picture, into the maps of
owners and parts, and into a mask of each individual's whole extent. Its ground, measurements, relations and texts are the
library's own, called for a single scene. It draws no texture, light, grain or soft edge on the individuals, so
it does less than ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
from PIL import Image, ImageDraw

from grainwise.bench import Benchmark, Setting, Timing, alternate
from grainwise.world import World
from grainwise.world.backgrounds import STUFF_NAMES, surface
from grainwise.world.captions import caption, regions
from grainwise.world.counter_random import Draws
from grainwise.world.expressions import Facts, absent, groups, refer
from grainwise.world.individuals import Nuisance, Pose, boxes_of, pose, pose_stamps
from grainwise.world.painter import Stamps
from grainwise.world.questions import ask
from grainwise.world.relations import measure, relate
from grainwise.world.scenes import Scene, Scenes
from grainwise.world.shapes import SHAPES
from grainwise.world.stuff_regions import textured_ground
from grainwise.world.taxonomy import LEVELS

WORLD = World(seed=0)
SIZE = 64
PICTURES, SCENES = 512, 256
NAIVE = 48
CORNERS = {
    "square": ((-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)),
    "diamond": ((-1, 0), (0, -1), (1, 0), (0, 1)),
    "triangular": ((0, -0.9), (0.98, 0.85), (-0.98, 0.85)),
    "leaf-shaped": ((-1, 0), (-0.5, -0.8), (0, -1), (0.5, -0.8), (1, 0), (0.5, 0.8), (0, 1), (-0.5, 0.8)),
    "cross-shaped": tuple((x, y) for x, y in ((-1, -0.36), (-0.36, -0.36), (-0.36, -1), (0.36, -1), (0.36, -0.36), (1, -0.36),
                                              (1, 0.36), (0.36, 0.36), (0.36, 1), (-0.36, 1), (-0.36, 0.36), (-1, 0.36))),
}  # fmt: skip


def outline(shape: str) -> np.ndarray:
    """float (corners, 2): a polygon for an outline of the world; a circle of 20 corners for the round ones."""
    if shape in CORNERS:
        return np.array(CORNERS[shape])
    angle = np.linspace(0, 2 * np.pi, 20, endpoint=False)
    return np.stack([np.cos(angle), np.sin(angle)], 1)


OUTLINES = [outline(shape) for shape in SHAPES]


def polygons(stamps: Stamps) -> list[tuple[int, int, list[tuple[float, float]], tuple[int, ...]]]:
    """(owner, part, corners, colour) of each stamp, the farthest first."""
    found = []
    for i in np.argsort(stamps.rank, kind="stable").tolist():
        corners = OUTLINES[stamps.shape[i]] * (stamps.a[i], stamps.b[i])
        x = stamps.x[i] + corners[:, 0] * stamps.cos[i] - corners[:, 1] * stamps.sin[i]
        y = stamps.y[i] + corners[:, 0] * stamps.sin[i] + corners[:, 1] * stamps.cos[i]
        colour = tuple(int(255 * value) for value in stamps.colour[i])
        found.append((int(stamps.owner[i]), int(stamps.part[i]), list(zip(x.tolist(), y.tolist(), strict=True)), colour))
    return found


def naive_picture(ground: np.ndarray, stamps: Stamps, owners: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Image, owners, parts (size, size) and whole extents (owners, size, size), drawn by Pillow on a ground (size, size, 3)."""
    picture = Image.fromarray((ground * 255).astype(np.uint8))
    owner, part = Image.new("L", (SIZE, SIZE)), Image.new("L", (SIZE, SIZE))
    whole = [Image.new("1", (SIZE, SIZE)) for _ in range(owners)]
    pens = [ImageDraw.Draw(one) for one in (picture, owner, part, *whole)]
    for whose, what, corners, colour in polygons(stamps):
        for pen, value in ((pens[0], colour), (pens[1], whose), (pens[2], what), (pens[2 + whose], 1)):
            pen.polygon(corners, fill=value)
    return np.asarray(picture), np.asarray(owner), np.asarray(part), np.stack([np.asarray(one) for one in whole])


def naive_species() -> None:
    """`NAIVE` individuals, one at a time, with masks, part maps and boxes."""
    for i in range(NAIVE):
        label, one = np.array([i % len(WORLD)]), np.ones(1, int)
        draws = Draws(WORLD.seed, label, i)
        stamps = pose_stamps(WORLD, label, one * (i % 2), pose(draws, Nuisance(), SIZE), 0 * one, one, np.zeros(1))
        _, owner, _, _ = naive_picture(surface(draws, label % len(STUFF_NAMES), SIZE)[0], stamps, 1)
        boxes_of(owner[None] > 0)


def naive_scenes(drawn: list[Scene]) -> None:
    """The individuals of scenes at about the same places, one scene at a time, with maps, boxes and relations."""
    for number, scene in enumerate(drawn[:NAIVE]):
        boxes, many = scene.amodal_boxes, len(scene)
        zero, owners = np.zeros(many, np.float32), np.arange(1, many + 1)
        stance = Pose((boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2] - boxes[:, 0]) / 2, zero, zero, zero > 0)
        ground, stuff = textured_ground(Draws(WORLD.seed, number), 2, 4, SIZE)
        stamps = pose_stamps(WORLD, scene.labels, scene.varieties, stance, 0 * owners, owners, scene.depths)
        _, owner, part, whole = naive_picture(ground[0], stamps, many)
        relate(measure(owner[None], part[None], stuff, whole[None]), scene.depths[None], SIZE)


def say_all(scenes: Iterable[Scene]) -> None:
    """Visible masks, three captions, all expressions, questions, region-attribute pairs."""
    for scene in scenes:
        facts = Facts(scene)
        refer(scene, facts), groups(scene, facts), absent(scene, facts), ask(scene, facts)
        [caption(scene, level) for level in LEVELS], list(regions(scene)), scene.masks


def copying(count: int) -> Callable[[], object]:
    """The least that must happen: writing the pictures and label maps."""
    image = np.zeros((count, SIZE, SIZE, 3), np.float32)
    return lambda: ((image * 255).astype(np.uint8), np.zeros((count, SIZE, SIZE, 14), np.uint8) + 1)


def run(runs: int) -> Benchmark:
    """Both settings; needs one thread (NumPy's products may use several otherwise, on a small share of the work)."""
    scenes = Scenes(WORLD, seed=0, size=SIZE)
    drawn = scenes.draw(np.arange(NAIVE)).scenes
    labels = np.arange(PICTURES) % len(WORLD)
    work: dict[str, tuple[int, Callable[[], object]]] = {
        "species": (PICTURES, lambda: WORLD.draw(labels, np.arange(PICTURES), size=SIZE)),
        "species, naive": (NAIVE, naive_species),
        "species, writing": (PICTURES, copying(PICTURES)),
        "pixels": (SCENES, lambda: scenes.draw(np.arange(SCENES))),
        "texts": (SCENES, lambda: say_all(scenes.draw(np.arange(SCENES)))),
        "scenes, naive": (NAIVE, lambda: naive_scenes(drawn)),
        "texts, naive": (NAIVE, lambda: (naive_scenes(drawn), say_all(drawn))),
        "scenes, writing": (SCENES, copying(SCENES)),
    }
    times = alternate({name: call for name, (_, call) in work.items()}, runs=runs)

    def rate(name: str) -> float:
        timing: Timing = times[name]
        return round(work[name][0] / timing.median, 1)

    def bound(name: str) -> dict[str, object]:
        return {"what": "converting and writing the pictures and maps", "figure": rate(f"{name}, writing")}

    least = {"naive draws": "flat polygons; our own maps of the ground, measurements and texts, for one scene at a time"}
    settings = [
        Setting("species, 64x64", rate("species"), rate("species, naive"), limit=bound("species"), extra=least),
        Setting(
            "scenes, 64x64, maps, boxes, relations", rate("pixels"), rate("scenes, naive"), limit=bound("scenes"), extra=least
        ),
        Setting(
            "scenes, 64x64, all annotations and texts", rate("texts"), rate("texts, naive"), limit=bound("scenes"), extra=least
        ),
    ]
    return Benchmark(
        system="world",
        unit="pictures/s on one thread",
        settings=settings,
        runs=runs,
        lower_is_better=False,
        spread={name: round(timing.spread, 3) for name, timing in times.items()},
    )
