"""Tables: names down the side, quantities along the top, a number in each cell."""

from __future__ import annotations

from typing import Any

import numpy as np

from grainwise.world.documents.charts import COUNTS, LETTERS, TEAMS, TOWNS
from grainwise.world.documents.page import INKS, Dice, Page, Question, contrasting, fitting, ink, text_width

PEOPLE = ("Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gus", "Hana")
COLUMNS = ("Age", "Score", "Wins", "Rank", "Cost", "Days", "Size", "Mass")
SIDES = (("Name", "people", PEOPLE), ("Town", "towns", TOWNS), ("Team", "teams", TEAMS))


def draw_table(dice: Dice, page: Page) -> dict[str, Any]:
    """A table of numbers; one cell may be empty."""
    data = _contents(dice, page)
    texts = [
        data["columns"],
        *([name, *("" if v is None else str(v) for v in row)] for name, row in zip(data["rows"], data["values"], strict=True)),
    ]
    top = 3
    if page.height >= 96:
        size = fitting([data["title"]], page.width - 8, round(page.text_size * 1.25))
        top = page.write("title", data["title"], (page.width / 2, 4), size=size, anchor="ma").box[3] + max(
            4, page.text_size // 2
        )
    size = page.text_size
    while size > 6 and _width(texts, size) > page.width - 6:
        size -= 1
    widths = [max(text_width(row[c], size) for row in texts) + size for c in range(len(texts[0]))]
    spare = max(0, page.width - 6 - sum(widths)) // len(widths)
    widths = [width + min(spare, 3 * size) for width in widths]
    height = min((page.height - top - 3) // len(texts), 2 * size)
    _cells(dice, page, texts, data, widths, (max(1, (page.width - sum(widths)) // 2), top, height), size)
    return data


def _width(texts: list[list[str]], size: int) -> int:
    return sum(max(text_width(row[c], size) for row in texts) + size for c in range(len(texts[0])))


def _contents(dice: Dice, page: Page) -> dict[str, Any]:
    """Names and numbers of a table that fits on the page."""
    small = min(page.width, page.height) < 128
    corner, whose, pool = ("", "", LETTERS) if small else dice.pick("side", SIDES)
    columns = max(1, min(5, page.width // (5 * page.text_size)))
    rows = max(2, min(7, page.height // round(2.2 * page.text_size) - 2))
    rows = dice.integer("rows", 2, min(rows, len(pool)))
    columns = dice.integer("columns", 1 if columns < 2 else 2, max(columns, 1))
    heads = [letter.lower() for letter in LETTERS[:columns]] if small else dice.sample("heads", COLUMNS, columns)
    flat: list[int | None] = list(dice.sample("values", range(1, 100), rows * columns))
    if not small and dice.chance("empty", 0.2):
        flat[dice.integer("which", 0, len(flat) - 1)] = None
    names = dice.sample("names", pool, rows)
    values = [flat[r * columns : (r + 1) * columns] for r in range(rows)]
    title = f"{' and '.join(heads[:2])} of {whose}" if whose else "Values"
    return {"kind": "table", "title": title, "columns": [corner, *heads], "rows": names, "values": values}


def _cells(
    dice: Dice, page: Page, texts: list[list[str]], data: dict[str, Any], widths: list[int], at: tuple[int, int, int], size: int
) -> None:
    """Fill, rule and write every cell."""
    left, top, height = at
    head = ink(dice.pick("head", INKS))
    striped, ruled, align = (
        dice.chance("striped", 0.5),
        dice.chance("ruled", 0.6),
        dice.pick("align", ("left", "centre", "right")),
    )
    edges = np.cumsum([left, *widths]).tolist()
    for r, row in enumerate(texts):
        up = top + r * height
        shade = head if r == 0 else (236, 238, 242) if striped and r % 2 == 0 else page.paper
        page.fill((edges[0], up, edges[-1], up + height), shade)
        for c, text in enumerate(row):
            box = (edges[c], up, edges[c + 1], up + height)
            if ruled:
                page.pen.rectangle((box[0], box[1], box[2], box[3]), outline=(120, 124, 130))
            role = "head" if r == 0 else "name" if c == 0 else "cell"
            value = data["values"][r - 1][c - 1] if role == "cell" else None
            page.note(role, text, box, value=value, place=(r, c))
            where = "left" if c == 0 else align
            x, anchor = {
                "left": (box[0] + size // 2, "lm"),
                "centre": ((box[0] + box[2]) / 2, "mm"),
                "right": (box[2] - size // 2, "rm"),
            }[where]
            if text:
                fill = contrasting(head) if r == 0 else page.ink
                page.write("text", text, (x, up + height / 2), size=size, anchor=anchor, fill=fill, place=(r, c))


def table_questions(dice: Dice, data: dict[str, Any]) -> list[Question]:
    """Questions about a table; empty cells are never asked for, nor columns that hold one."""
    names, heads, values = data["rows"], data["columns"][1:], data["values"]
    side = data["columns"][0].lower() or "row"
    full = [c for c in range(len(heads)) if all(row[c] is not None for row in values)]
    asked = [
        Question("How many rows of numbers does the table have?", str(len(names)), "rows"),
        Question("How many columns of numbers does the table have?", str(len(heads)), "columns"),
    ]
    filled = [(r, c) for r in range(len(names)) for c in range(len(heads)) if values[r][c] is not None]
    r, c = dice.pick("cell", filled)
    asked.append(Question(f"What is {heads[c]} for {names[r]}?", str(values[r][c]), "cell", (r, c)))
    if full:
        c = dice.pick("column", full)
        column = [row[c] for row in values]
        asked += [
            Question(f"Which {side} has the highest {heads[c]}?", names[int(np.argmax(column))], "highest", (c,)),
            Question(f"Which {side} has the lowest {heads[c]}?", names[int(np.argmin(column))], "lowest", (c,)),
            Question(f"What is the sum of the column {heads[c]}?", str(sum(column)), "sum", (c,)),
            Question(f"Which {side} has {column[r]} under {heads[c]}?", names[r], "find", (r, c)),
        ]
    empty = [(i, j) for i, row in enumerate(values) for j, value in enumerate(row) if value is None]
    if empty:
        i, j = empty[0]
        asked.append(Question(f"Which {side} has no {heads[j]}?", names[i], "missing", (j,)))
    return asked


def table_captions(data: dict[str, Any], titled: bool) -> dict[str, str]:
    """What a table shows; the fine caption holds the whole table in Markdown."""
    headed = f' titled "{data["title"]}"' if titled else ""
    size = f"{COUNTS[len(data['rows'])]} rows and {COUNTS[len(data['columns']) - 1]} columns of numbers"
    lines = [data["columns"], ["---"] * len(data["columns"])]
    lines += [
        [name, *("" if v is None else str(v) for v in row)] for name, row in zip(data["rows"], data["values"], strict=True)
    ]
    markdown = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return {
        "coarse": "a table",
        "medium": f"a table{headed} with {size}",
        "fine": f"The image shows a table{headed} with {size}.\n{markdown}",
    }
