"""The pictures of a vision recipe: drawn from the microworld, or read from folders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from grainwise.images import centre_crop, from_uint8, resize
from grainwise.recipe.fields import FolderPictures, VisionRecipe, WorldPictures
from grainwise.vision_state import VIEW, Classes, Pictures
from grainwise.world import World
from grainwise.world.real import SUFFIXES, read_image
from grainwise.world.splits import Table, few_shot, open_set, rows
from grainwise.world.taxonomy import LEVELS

OUTLIER_GENERA = 100


@dataclass(frozen=True)
class VisionData:
    """All pictures of a recipe, and the classes to tell apart."""

    classes: Classes
    train: Pictures
    test: Pictures
    near: Pictures | None
    far: Pictures | None
    outliers: Tensor | None


def load(recipe: VisionRecipe, side: int) -> VisionData:
    """The recipe's pictures, `side` pixels wide and high. Raises ValueError for folders that don't fit each other."""
    data = recipe.data
    return from_world(data, recipe.seed, side) if isinstance(data, WorldPictures) else from_folders(data, side)


def counts(recipe: VisionRecipe) -> tuple[int, int]:
    """(training pictures, pictures that every measurement looks at), without drawing or reading any."""
    data = recipe.data
    if isinstance(data, WorldPictures):
        split = open_set(World(**data.world.model_dump()), split=recipe.seed)
        return data.shots * len(split.known), data.test * (len(split.known) + len(split.near) + len(split.far))
    looked_at = (getattr(data, name) for name in ("test", "near", "far") if data.has(name))
    return len(_files(data.train)), sum(len(_files(folder)) for folder in looked_at)


def from_world(data: WorldPictures, seed: int, side: int) -> VisionData:
    """Known species with training and test pictures, novelties with test pictures, and outliers from another world."""
    world = World(**data.world.model_dump())
    split = open_set(world, split=seed)
    known, style = split.known, data.style
    number = {species: i for i, species in enumerate(known)}
    shots = few_shot(world, data.shots, known, episode=seed)
    others = World(seed=world.seed + 1, genera=OUTLIER_GENERA, species_per_genus=2)  # a genus is drawn from (seed, genus)
    pool = np.arange(data.outliers)
    return VisionData(
        _classes(world, known, data.describe),
        _drawn(world, Table(shots.labels, shots.individuals, style), side, number),
        _drawn(world, rows(known, data.test, "test", style), side, number),
        _drawn(world, rows(split.near, data.test, "test", style), side, {}),
        _drawn(world, rows(split.far, data.test, "test", style), side, {}),
        torch.from_numpy(others.draw(pool % len(others), pool, size=side, style=style).images) if data.outliers else None,
    )


def _classes(world: World, known: Sequence[int], level: str) -> Classes:
    species = [world.species[i] for i in known]
    descriptions = {name: tuple(one.describe(name) for one in species) for name in LEVELS}
    return Classes(
        names=tuple(one.name for one in species),
        prompts=tuple((text,) for text in descriptions[level]),
        groups=tuple(one.genus for one in species),
        descriptions=descriptions,
        contrast=lambda a, b: species[a].unlike(species[b]),
    )


def _drawn(world: World, table: Table, side: int, number: dict[int, int]) -> Pictures:
    drawn = world.draw(table.labels, table.individuals, size=side, style=table.style)

    def show(which: Sequence[int]) -> np.ndarray:
        chosen = np.asarray(which, np.int64)
        return world.draw(table.labels[chosen], table.individuals[chosen], size=VIEW, style=table.style).images

    labels = torch.tensor([number.get(int(label), -1) for label in table.labels])
    names = tuple(world.species[int(label)].name for label in table.labels)
    return Pictures(torch.from_numpy(drawn.images), labels, names, show, drawn.key_parts)


def from_folders(data: FolderPictures, side: int) -> VisionData:
    """Pictures by class from `<folder>/<class>/<picture>`; every class of `test` must be one of `train`."""
    names = _class_names(data.train)
    unknown = sorted(set(_class_names(data.test)) - set(names))
    if unknown:
        listed = ", ".join(unknown[:5])
        raise ValueError(f"data.test has classes that data.train lacks: {listed}; put them under data.near or data.far")
    if len(names) < 2:
        raise ValueError(f"data.train has one class, {names[0]}: there is nothing to tell apart")
    classes = Classes(
        names=names,
        prompts=tuple((data.template.replace("{}", name.replace("_", " ")),) for name in names),
        groups=tuple(range(len(names))),
        descriptions={},
        contrast=lambda a, b: "",
    )
    given = [name for name in ("train", "test", "near", "far", "outliers") if data.has(name)]
    sets = {name: _read(getattr(data, name), side, names) for name in given}
    outliers = sets["outliers"].images if "outliers" in sets else None
    return VisionData(classes, sets["train"], sets["test"], sets.get("near"), sets.get("far"), outliers)


def _files(folder: str) -> list[Path]:
    root = Path(folder).expanduser()
    found = sorted(file for file in root.glob("*/*") if file.suffix.lower() in SUFFIXES)
    if not found:
        raise ValueError(f"{root} has no pictures in sub-folders; expected {root}/<class>/<name>.png")
    return found


def _class_names(folder: str) -> tuple[str, ...]:
    return tuple(sorted({file.parent.name for file in _files(folder)}))


def _read(folder: str, side: int, names: Sequence[str]) -> Pictures:
    files = _files(folder)
    images = torch.stack([squared(read_image(file), side) for file in files])

    def show(which: Sequence[int]) -> np.ndarray:
        return torch.stack([squared(read_image(files[i]), VIEW) for i in which]).numpy()

    of_class = {name: i for i, name in enumerate(names)}
    labels = torch.tensor([of_class.get(file.parent.name, -1) for file in files])
    return Pictures(images, labels, tuple(file.parent.name for file in files), show)


def squared(image: np.ndarray, side: int) -> Tensor:
    """A picture (height, width, 3) as uint8 (side, side, 3): the shorter edge to `side`, then the middle."""
    height, width = image.shape[:2]
    scale = side / min(height, width)
    sized = resize(from_uint8(image[None]), (max(side, round(height * scale)), max(side, round(width * scale))))
    return (centre_crop(sized, side)[0] * 255).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).contiguous()
