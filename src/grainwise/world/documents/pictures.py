"""Posters and collages: pages with pictures of the world's species on them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
from PIL import Image

from grainwise.world.body_plans import PLANS
from grainwise.world.documents.charts import COUNTS, MONTHS, TOWNS
from grainwise.world.documents.page import INKS, Dice, Page, Question, contrasting, fitting, ink
from grainwise.world.individuals import Nuisance
from grainwise.world.taxonomy import World

EVENTS = ("Fair", "Show", "Market", "Parade", "Auction", "Picnic", "Race", "Concert")
HALLS = ("Town Hall", "Old Barn", "West Park", "City Museum", "Mill Pond", "Station Yard")
LINES = ("All are welcome", "Bring a friend", "Rain or shine", "Free tea for all", "Doors open early", "No dogs, please")


def _picture(world: World, species: int, number: int, width: int, height: int) -> Image.Image:
    """An individual in a frame of any shape, wholly visible."""
    side, share = max(16, width, height), min(width, height) / max(width, height)
    shown = Nuisance(scale=(0.33 * share, 0.38 * share), place=0.02 * share, turn=8, clutter=0, occlusion=0)
    pixels = world.draw([species], [number], size=side, nuisance=shown).images[0]
    left, top = (side - width) // 2, (side - height) // 2
    return Image.fromarray(pixels[top : top + height, left : left + width])


def draw_poster(dice: Dice, page: Page, world: World) -> dict[str, Any]:
    """A poster for an event: headline, picture, day, time, place, price and a line of small print."""
    colour = dice.pick("colour", INKS)
    species, number = dice.integer("species", 0, len(world) - 1), dice.integer("number", 0, 9999)
    kind = world.species[species].kind
    event = dice.pick("event", EVENTS)
    data: dict[str, Any] = {
        "kind": "poster",
        "title": f"{kind.capitalize()} {event}",
        "species": species,
        "individual": number,
        "shown": kind,
        "colour": colour,
        "date": f"{dice.integer('day', 1, 28)} {dice.pick('month', MONTHS)}",
        "time": f"{dice.integer('hour', 8, 20)}:{dice.pick('minute', ('00', '15', '30', '45'))}",
        "place": f"{dice.pick('hall', HALLS)}, {dice.pick('town', TOWNS)}",
        "price": dice.integer("price", 2, 60),
        "line": dice.pick("line", LINES),
    }
    wide = page.width > 1.15 * page.height
    size = fitting([data["title"]], page.width - 12, 2 * page.text_size)
    band = round(1.5 * size)
    page.fill((0, 0, page.width, band), ink(colour))
    page.write("title", data["title"], (page.width / 2, band / 2), size=size, anchor="mm", fill=contrasting(ink(colour)))
    if wide:
        box = (6, band + 6, min(page.width // 2, 6 + page.height - band - 12), page.height - 6)
        area = (box[2] + 4, band + 6, page.width - 4, page.height - 6)
    else:
        lower = band + round((page.height - band) * 0.55)
        box, area = (6, band + 6, page.width - 6, lower), (4, lower + 4, page.width - 4, page.height - 4)
    page.image.paste(_picture(world, species, number, box[2] - box[0], box[3] - box[1]), box[:2])
    page.note("picture", world.species[species].describe("medium"), box)
    _details(page, data, area)
    return data


def _details(page: Page, data: dict[str, Any], area: tuple[int, int, int, int]) -> None:
    """The lines of a poster below or beside its picture."""
    lines = [
        ("date", data["date"]),
        ("time", data["time"]),
        ("place", data["place"]),
        ("price", f"Entry {data['price']} coins"),
    ]
    if page.height >= 128:
        lines.append(("line", data["line"]))
    row = (area[3] - area[1]) / len(lines)
    largest = max(6, min(round(page.text_size * 1.2), int(row) - 2))
    size = fitting([text for _, text in lines], area[2] - area[0], largest)
    for number, (role, text) in enumerate(lines):
        value = float(data["price"]) if role == "price" else None
        at = ((area[0] + area[2]) / 2, area[1] + (number + 0.5) * row)
        page.write(role, text, at, size=size, anchor="mm", value=value)


def poster_questions(dice: Dice, data: dict[str, Any]) -> list[Question]:
    """Questions about a poster."""
    people = dice.integer("people", 2, 6)
    return [
        Question("On which day is it?", data["date"], "date"),
        Question("When does it begin?", data["time"], "time"),
        Question("Where is it?", data["place"], "place"),
        Question("How many coins does one person pay?", str(data["price"]), "price"),
        Question(f"How many coins do {COUNTS[people]} people pay?", str(people * data["price"]), "total", (people,)),
        Question("What kind of thing is in the picture?", data["shown"], "shown"),
        Question("What colour is the band behind the headline?", data["colour"], "colour"),
        Question("What does the headline say?", data["title"], "title"),
    ]


def poster_captions(data: dict[str, Any], world: World, lines: bool) -> dict[str, str]:
    """What a poster shows."""
    seen = world.species[data["species"]]
    last = f' The last line says "{data["line"]}".' if lines else ""
    return {
        "coarse": "a poster",
        "medium": f'a poster headed "{data["title"]}" with a picture of {seen.describe("coarse")}',
        "fine": f'The image shows a poster headed "{data["title"]}" on a {data["colour"]} band, '
        f"with a picture of {seen.describe('fine')}. "
        f"It announces {data['date']} at {data['time']}, {data['place']}, entry {data['price']} coins.{last}",
    }


def draw_collage(dice: Dice, page: Page, world: World) -> dict[str, Any]:
    """A grid of pictures, up to three by three; two or three cells of one row or column may be one picture."""
    rows, columns = dice.pick("grid", [(r, c) for r in (1, 2, 3) for c in (1, 2, 3) if r * c > 1])
    cells = _layout(dice, rows, columns)
    gap = dice.integer("gap", 1, 1 + min(page.width, page.height) // 32)
    paper = dice.pick("paper", ((255, 255, 255), (30, 32, 38), (236, 228, 208)))
    page.fill((0, 0, page.width, page.height), paper)
    across = np.round(np.linspace(gap, page.width, columns + 1)).astype(int)
    down = np.round(np.linspace(gap, page.height, rows + 1)).astype(int)
    shown = []
    for number, (r0, c0, r1, c1) in enumerate(cells):
        species, individual = (
            dice.integer(f"species {number}", 0, len(world) - 1),
            dice.integer(f"individual {number}", 0, 9999),
        )
        box = (int(across[c0]), int(down[r0]), int(across[c1]) - gap, int(down[r1]) - gap)
        page.image.paste(_picture(world, species, individual, box[2] - box[0], box[3] - box[1]), box[:2])
        seen = world.species[species]
        page.note("cell", seen.describe("medium"), box, place=(r0, c0, r1, c1))
        shown.append({"place": [r0, c0, r1, c1], "species": species, "individual": individual, "shown": seen.kind})
    return {"kind": "collage", "rows": rows, "columns": columns, "cells": shown}


def _layout(dice: Dice, rows: int, columns: int) -> list[tuple[int, int, int, int]]:
    """Cells as row, column, end row, end column (ends not included), in reading order; together they cover the grid once."""
    merged = None
    if rows * columns > 2 and dice.chance("merged", 0.5):
        if columns > 1 and (rows == 1 or dice.chance("along a row", 0.5)):
            length = dice.integer("length", 2, columns if rows > 1 else columns - 1)
            r, c = dice.integer("row", 0, rows - 1), dice.integer("column", 0, columns - length)
            merged = (r, c, r + 1, c + length)
        else:
            length = dice.integer("length", 2, rows if columns > 1 else rows - 1)
            r, c = dice.integer("row", 0, rows - length), dice.integer("column", 0, columns - 1)
            merged = (r, c, r + length, c + 1)
    free = [(r, c, r + 1, c + 1) for r in range(rows) for c in range(columns)]
    if merged is None:
        return free
    free = [one for one in free if not (merged[0] <= one[0] < merged[2] and merged[1] <= one[1] < merged[3])]
    return sorted([*free, merged])


def where(place: list[int]) -> str:
    """ "row 1, column 2"; "row 1, columns 2 to 3"."""
    r0, c0, r1, c1 = place
    row = f"row {r0 + 1}" if r1 == r0 + 1 else f"rows {r0 + 1} to {r1}"
    return f"{row}, {f'column {c0 + 1}' if c1 == c0 + 1 else f'columns {c0 + 1} to {c1}'}"


def _an(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def collage_questions(dice: Dice, data: dict[str, Any]) -> list[Question]:
    """Questions about a collage."""
    cells = data["cells"]
    counts = Counter(cell["shown"] for cell in cells)
    one = dice.integer("asked", 0, len(cells) - 1)
    kind = dice.pick("kind", tuple(PLANS))
    present = dice.pick("present", sorted(counts))
    asked = [
        Question("How many pictures are there?", str(len(cells)), "count"),
        Question(f"What is in {where(cells[one]['place'])}?", _an(cells[one]["shown"]), "content", (one,)),
        Question(f"Is there {_an(kind)}?", "yes" if counts[kind] else "no", "present", (kind,)),
        Question(f"How many pictures show {_an(present)}?", str(counts[present]), "kind count", (present,)),
        Question("How many different kinds of things are shown?", str(len(counts)), "kinds"),
    ]
    single = [number for number, cell in enumerate(cells) if counts[cell["shown"]] == 1]
    if single:
        chosen = dice.pick("single", single)
        asked.append(Question(f"Where is the {cells[chosen]['shown']}?", where(cells[chosen]["place"]), "where", (chosen,)))
    return asked


def collage_captions(data: dict[str, Any], world: World) -> dict[str, str]:
    """What a collage shows, picture by picture in reading order."""
    cells = data["cells"]
    counts = Counter(cell["shown"] for cell in cells)
    each = "; ".join(f"{where(cell['place'])}: {world.species[cell['species']].describe('medium')}" for cell in cells)
    kinds = ", ".join(
        f"{COUNTS[counts[kind]]} {kind}{'s' if counts[kind] > 1 and kind != 'fish' else ''}" for kind in sorted(counts)
    )
    number, grid = COUNTS[len(cells)], f"{COUNTS[data['rows']]} by {COUNTS[data['columns']]}"
    return {
        "coarse": f"a collage of {number} pictures",
        "medium": f"a collage of {number} pictures: {kinds}",
        "fine": f"The image shows a collage of {number} pictures in {grid} places. {each}.",
    }
