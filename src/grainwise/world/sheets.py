"""Labelled contact sheets: what each part of the world looks like, with what is known of it.

`SHEETS` maps a kind to a function `sheet(seed) -> list of (picture, lines of text)`, written "module:function" so that only
what is asked for is imported.
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from grainwise.naming import did_you_mean
from grainwise.world.backgrounds import STUFF_NAMES
from grainwise.world.captions import caption, near_duplicates
from grainwise.world.defects import DEFECTS, draw_defects
from grainwise.world.expressions import Facts, absent, groups, refer
from grainwise.world.individuals import CALM
from grainwise.world.questions import ask
from grainwise.world.scenes import FIRST_INSTANCE, Scene, Scenes
from grainwise.world.taxonomy import World
from grainwise.world.viewpoints import draw_views

if TYPE_CHECKING:
    from PIL.ImageFont import FreeTypeFont

Cells = list[tuple[Image.Image, list[str]]]
SHEETS: dict[str, str] = {
    "species": "grainwise.world.sheets:species",
    "siblings": "grainwise.world.sheets:siblings",
    "individuals": "grainwise.world.sheets:individuals",
    "scene": "grainwise.world.sheets:scene",
    "annotations": "grainwise.world.sheets:annotated",
    "expressions": "grainwise.world.sheets:expressions",
    "questions": "grainwise.world.sheets:questions",
    "duplicates": "grainwise.world.sheets:duplicates",
    "defects": "grainwise.world.sheets:defects",
    "views": "grainwise.world.sheets:views",
    "video": "grainwise.world.clips:clip_sheet",
    "documents": "grainwise.world.documents.generator:document_sheet",
}
PAPER, INK = (250, 249, 246), (38, 38, 44)
WIDTH, GAP, FONT = 1280, 14, 13


def sheet(kind: str, seed: int) -> Cells:
    """The cells of a sheet. Raises ValueError for a kind that is not in `SHEETS`."""
    if kind not in SHEETS:
        raise ValueError(f"there is no sheet of kind {kind!r}. {did_you_mean(kind, SHEETS)}")
    module, function = SHEETS[kind].split(":")
    return getattr(importlib.import_module(module), function)(seed)


def draw_sheet(cells: Cells, width: int = WIDTH) -> Image.Image:
    """Put the cells side by side in lines of at most `width` pixels (a wider picture has a line of its own), words below."""
    font = ImageFont.load_default(FONT)
    assert not isinstance(font, ImageFont.ImageFont)
    texts = [[line for words in lines for line in wrap(words, max(picture.width, 120), font)] for picture, lines in cells]
    rows: list[list[int]] = []
    used = width
    for number, (picture, _) in enumerate(cells):
        if used + picture.width + GAP > width:
            rows.append([])
            used = GAP
        rows[-1].append(number)
        used += max(picture.width, 120) + GAP
    heights = [max(cells[i][0].height + 6 + len(texts[i]) * (FONT + 4) for i in row) + GAP for row in rows]
    widths = [GAP + sum(max(cells[i][0].width, 120) + GAP for i in row) for row in rows]
    paper = Image.new("RGB", (max(widths), sum(heights) + GAP), PAPER)
    pen = ImageDraw.Draw(paper)
    y = GAP
    for row, height in zip(rows, heights, strict=True):
        x = GAP
        for i in row:
            paper.paste(cells[i][0], (x, y))
            for number, line in enumerate(texts[i]):
                pen.text((x, y + cells[i][0].height + 4 + number * (FONT + 4)), line, INK, font)
            x += max(cells[i][0].width, 120) + GAP
        y += height
    return paper


def save_sheet(kind: str, seed: int, path: Path) -> None:
    """Draw a sheet and write it as a PNG file."""
    picture = draw_sheet(sheet(kind, seed))
    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    picture.save(temporary, "PNG")
    os.replace(temporary, path)


def wrap(words: str, width: int, font: FreeTypeFont) -> list[str]:
    """The words in lines of at most `width` pixels."""
    lines: list[str] = []
    for word in words.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def enlarged(image: np.ndarray, times: int) -> Image.Image:
    """An image (height, width, 3) with every pixel `times` times as large."""
    return Image.fromarray(image.repeat(times, 0).repeat(times, 1))


def species(seed: int) -> Cells:
    """One individual of every species, in a calm pose, with its name and description."""
    world = World(seed=seed)
    drawn = world.draw(np.arange(len(world)), 0, size=144, nuisance=CALM)
    return [
        (Image.fromarray(image), [one.name, one.describe("medium")])
        for image, one in zip(drawn.images, world.species, strict=True)
    ]


def siblings(seed: int) -> Cells:
    """Three individuals of each species of four genera, with what sets a species apart from its first sibling."""
    world = World(seed=seed)
    cells: Cells = []
    for one in world.species[:16]:
        drawn = world.draw(one.index, np.arange(3), size=96)
        first = one.index - one.index % world.species_per_genus
        part, attribute = one.key
        key = f"{one.kind}: {one.parts[part].name} {attribute} {one.parts[part].attribute(attribute)}"
        words = [one.unlike(world.species[first])] if one.index != first else [key]
        cells.append((Image.fromarray(np.concatenate(list(drawn.images), 1)), [one.name, *words]))
    return cells


def individuals(seed: int) -> Cells:
    """The same species in many places, lights and poses, in three styles."""
    world = World(seed=seed)
    cells: Cells = []
    for style in ("plain", "ink", "felt"):
        for label in range(0, len(world), world.species_per_genus):
            drawn = world.draw(label, np.arange(4), size=72, style=style)
            cells.append((Image.fromarray(np.concatenate(list(drawn.images), 1)), [f"{world.species[label].name}, {style}"]))
    return cells


def scene(seed: int) -> Cells:
    """Scenes with their coarse and medium captions."""
    scenes = Scenes(World(seed=seed), seed, size=128)
    return [(enlarged(one.image, 2), [caption(one, "coarse"), caption(one, "medium")]) for one in scenes.draw(np.arange(12))]


def annotated(seed: int) -> Cells:
    """Scenes beside their segments, parts, extents behind others, and boxes."""
    cells: Cells = []
    for one in Scenes(World(seed=seed), seed, size=128, individuals=(3, 8)).draw(np.arange(6)):
        names = ("image", "panoptic map", "parts", "whole extents (nearer: lighter)", "boxes, from far to near")
        pictures = (Image.fromarray(one.image), *_maps(one), _boxed(one))
        cells += [
            (picture.resize((236, 236), Image.Resampling.NEAREST), [words])
            for picture, words in zip(pictures, names, strict=True)
        ]
    return cells


def expressions(seed: int) -> Cells:
    """For each scene three expressions that mean one, one that means several, and one that means nobody; meant ones are lit."""
    cells: Cells = []
    for one in Scenes(World(seed=seed), seed, size=128, individuals=(4, 8)).draw(np.arange(6)):
        facts = Facts(one)
        found = [e for e in refer(one, facts) if e is not None and len(e.predicates) > 1][:3]
        found += groups(one, facts)[-1:] + absent(one, facts)[-1:]
        for e in found:
            lit = np.asarray(one.masks[list(e.targets)].any(0))[..., None]
            cells.append((enlarged(np.where(lit, one.image, one.image // 4 + 60), 2).resize((232, 232)), [e.text]))
    return cells


def questions(seed: int) -> Cells:
    """Scenes with their questions, choices and answers."""
    cells: Cells = []
    for one in Scenes(World(seed=seed), seed, size=128, individuals=(3, 8)).draw(np.arange(8)):
        lines = [f"{q.text} ({', '.join(q.options)}) {q.letter}: {q.answer}" for q in ask(one)]
        cells.append((enlarged(one.image, 2).resize((300, 300)), lines))
    return cells


def duplicates(seed: int) -> Cells:
    """Bags of scenes that differ in their fine captions only."""
    scenes = Scenes(World(seed=seed), seed, size=128, individuals=(1, 4))
    return [
        (enlarged(one.image, 2).resize((300, 300)), [f"{caption(one, 'coarse')}:", caption(one, "fine")])
        for bag in range(3)
        for one in near_duplicates(scenes, bag, 4)
    ]


def defects(seed: int) -> Cells:
    """An individual of each kind, whole and with each defect, and the pixels the defect changed."""
    world = World(seed=seed)
    labels = np.repeat(np.arange(0, len(world), world.species_per_genus), len(DEFECTS))
    drawn = draw_defects(world, labels, np.arange(len(labels)), np.arange(len(labels)) % len(DEFECTS) + 1, size=128)
    return [
        (Image.fromarray(np.concatenate([whole, image, mask[..., None] * np.full(3, 255, np.uint8)], 1)), [what])
        for whole, image, mask, what in zip(drawn.whole, drawn.images, drawn.masks, drawn.names, strict=True)
    ]


def views(seed: int) -> Cells:
    """Individuals from eight sides, with the sides that show the part deciding their species."""
    world = World(seed=seed)
    labels = np.arange(0, len(world), world.species_per_genus)
    drawn = draw_views(world, labels, np.zeros_like(labels), size=112)
    cells: Cells = []
    for label, images, decisive in zip(labels.tolist(), drawn.images, drawn.decisive, strict=True):
        sides = ", ".join(f"{azimuth:.0f}" for azimuth in drawn.azimuths[decisive])
        words = f"{world.species[label].name}, turned by 0 to 315 degrees; its {world.species[label].key_part.name} decides"
        cells.append((Image.fromarray(np.concatenate(list(images), 1)), [f"{words} and is seen at {sides or 'none'}"]))
    return cells


def _maps(one: Scene) -> tuple[Image.Image, Image.Image, Image.Image]:
    """Panoptic map, part map and whole extents in colours."""
    palette = np.array([(i * 67 % 151 + 60, i * 113 % 163 + 50, i * 41 % 157 + 70) for i in range(64)], np.uint8)
    stuff = palette[one.panoptic] // 2 + 20
    panoptic = np.where((one.panoptic >= FIRST_INSTANCE)[..., None], palette[one.panoptic + 20], stuff)
    parts = np.where((one.parts > 0)[..., None], palette[one.parts * 5], 24).astype(np.uint8)
    whole = np.full((*one.parts.shape, 3), 24, np.uint8)
    for i in np.argsort(one.depths).tolist():
        colour = palette[FIRST_INSTANCE + 20 + i] // 2 + np.uint8(120 * (one.depths[i] + 1) // len(one))
        whole = np.where(one.amodal[i][..., None], (whole // 3 + colour.astype(np.uint16) * 2 // 3).astype(np.uint8), whole)
    return Image.fromarray(panoptic), Image.fromarray(parts), Image.fromarray(whole)


def _boxed(one: Scene) -> Image.Image:
    """The picture with a numbered box around what is seen of each."""
    picture = Image.fromarray(one.image // 2 + 64).resize((236, 236))
    pen, times = ImageDraw.Draw(picture), 236 / one.size
    for i, box in enumerate(one.boxes.tolist()):
        x0, y0, x1, y1 = (value * times for value in box)
        pen.rectangle((x0, y0, x1 - 1, y1 - 1), outline=(210, 30, 40))
        label = f"{one.depths[i]} {one.species[i].kind}" + (f" on {STUFF_NAMES[one.on[i]]}" if one.on[i] >= 0 else "")
        pen.text((x0 + 2, y0), label, (20, 20, 24), ImageFont.load_default(10))
    return picture
