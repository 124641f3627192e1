"""Bar, line and pie charts with the numbers behind them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from grainwise.world.documents.page import INKS, Dice, Page, Question, contrasting, fitting, ink, text_width

MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
YEARS = tuple(str(year) for year in range(2008, 2026))
TOWNS = ("Arden", "Brook", "Corfe", "Dale", "Elm", "Fenby", "Glen", "Holt")
FRUIT = ("apples", "pears", "plums", "figs", "limes", "dates", "kiwis")
TEAMS = ("Reds", "Owls", "Foxes", "Larks", "Bears", "Elks")
LETTERS = tuple("ABCDEFGHJK")
COUNTS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")

TOPICS: tuple[tuple[str, str, Sequence[str]], ...] = (
    ("Visitors", "month", MONTHS),
    ("Rainy days", "year", YEARS),
    ("Letters sent", "day", DAYS),
    ("Houses built", "town", TOWNS),
    ("Crates sold", "fruit", FRUIT),
    ("Points", "team", TEAMS),
)
GROUPS = (("North", "South", "East"), ("Inland", "Coast", "Island"), ("Upper", "Middle", "Lower"))
MOST = {"bar": 8, "line": 8, "pie": 6}
PAPERS = ((255, 255, 255), (250, 248, 240), (240, 244, 250), (246, 242, 250))


@dataclass(frozen=True)
class Table:
    """The numbers of a chart: values[series][category]."""

    title: str
    quantity: str
    by: str
    categories: tuple[str, ...]
    series: tuple[str, ...]
    values: tuple[tuple[int, ...], ...]
    colours: tuple[str, ...]

    def data(self, kind: str, **more: Any) -> dict[str, Any]:
        """As plain lists."""
        return {
            "kind": kind,
            "title": self.title,
            "quantity": self.quantity,
            "by": self.by,
            "categories": list(self.categories),
            "series": list(self.series),
            "values": [list(row) for row in self.values],
            "colours": list(self.colours),
            **more,
        }


@dataclass(frozen=True)
class Frame:
    """The plot's area in pixels (far edges exclusive) and the value at its end."""

    left: int
    top: int
    right: int
    bottom: int
    limit: int
    step: int


def _table(dice: Dice, page: Page, kind: str) -> Table:
    """Draw what a chart is about."""
    quantity, by, pool = dice.pick("topic", TOPICS)
    small = min(page.width, page.height) < 128
    room = max(2, min(MOST[kind], int((page.width - 16) // (16 if small else 28))))
    number = dice.integer("categories", min(3, room), min(room, len(pool)))
    if small:
        pool, by = LETTERS, "letter"
    if by in ("month", "year", "day") or small:
        first = dice.integer("first", 0, len(pool) - number)
        categories = tuple(pool[first : first + number])
    else:
        categories = tuple(dice.sample("names", pool, number))
    most = 1 if small or kind == "pie" else 3 if kind == "line" else 2
    several = dice.integer("several", 1, most)
    series = tuple(dice.pick("groups", GROUPS)[:several]) if several > 1 else (quantity,)
    if kind == "pie":
        values: tuple[tuple[int, ...], ...] = (_shares(dice, number),)
        colours = tuple(dice.sample("colours", INKS, number))
    else:
        flat = dice.sample("values", range(4, 98), number * several)
        values = tuple(tuple(flat[s * number : (s + 1) * number]) for s in range(several))
        colours = tuple(dice.sample("colours", INKS, number if kind == "bar" and several == 1 else several))
    return Table(f"{quantity} by {by}", quantity, by, categories, series, values, colours)


def _shares(dice: Dice, number: int) -> tuple[int, ...]:
    """Different whole percentages of at least 6 that sum to 100."""
    for trial in range(1000):
        cuts = sorted(dice.sample(f"cuts {trial}", range(6, 95), number - 1))
        parts = np.diff([0, *cuts, 100]).tolist()
        if min(parts) >= 6 and len(set(parts)) == number:
            return tuple(parts)
    raise RuntimeError("no different shares found")


def _headline(page: Page, title: str) -> int:
    """Write the title on top; returns where the rest may begin. Pages lower than 96 pixels have none."""
    if page.height < 96:
        return 3
    size = fitting([title], page.width - 8, round(page.text_size * 1.25))
    element = page.write("title", title, (page.width / 2, 4), size=size, anchor="ma")
    return element.box[3] + max(3, page.text_size // 3)


def _legend(page: Page, names: Sequence[str], colours: Sequence[str], top: int) -> int:
    """A row of coloured squares with names; returns where the rest may begin."""
    size = fitting(["".join(names)], page.width - 12 - 2.2 * page.text_size * len(names), page.text_size)
    widths = [text_width(name, size) + round(1.9 * size) for name in names]
    left = (page.width - sum(widths)) // 2
    for number, (name, colour, width) in enumerate(zip(names, colours, widths, strict=True)):
        page.fill((left, top, left + size - 1, top + size - 1), ink(colour))
        page.write("legend", name, (left + size + 2, top + size // 2), size=size, anchor="lm", place=(number,))
        left += width
    return top + size + max(3, size // 2)


def _frame(page: Page, table: Table, top: int, *, horizontal: bool = False) -> Frame:
    """Draw both axes with ticks and their labels."""
    highest = max(max(row) for row in table.values)
    length = page.width if horizontal else page.height - top
    step = next(step for step in (5, 10, 20, 25, 50) if highest / step <= max(2, length / (3.2 * page.text_size)))
    limit = int(np.ceil(highest / step)) * step
    size = max(6, page.text_size - 1)
    along = list(table.categories)
    if horizontal:
        left = max(text_width(name, size) for name in along) + 8
        frame = Frame(
            left, top, page.width - text_width(str(limit), size) // 2 - 4, page.height - round(1.25 * size) - 6, limit, step
        )
    else:
        left = text_width(str(limit), size) + 8
        frame = Frame(left, top + size // 2, page.width - 5, page.height - round(1.25 * size) - 5, limit, step)
    for value in range(0, limit + 1, step):
        if horizontal:
            x = frame.left + round(value / limit * (frame.right - frame.left))
            page.pen.line((x, frame.top, x, frame.bottom), fill=(214, 214, 218))
            page.write("tick", str(value), (x, frame.bottom + 3), size=size, anchor="ma", value=value)
        else:
            y = frame.bottom - round(value / limit * (frame.bottom - frame.top))
            page.pen.line((frame.left, y, frame.right, y), fill=(214, 214, 218))
            page.write("tick", str(value), (frame.left - 4, y), size=size, anchor="rm", value=value)
    cell = ((frame.bottom - frame.top) if horizontal else (frame.right - frame.left)) / len(along)
    size = size if horizontal else fitting(along, cell - 2, size)
    for number, name in enumerate(along):
        if horizontal:
            page.write(
                "category", name, (frame.left - 4, frame.top + (number + 0.5) * cell), size=size, anchor="rm", place=(number,)
            )
        else:
            page.write(
                "category",
                name,
                (frame.left + (number + 0.5) * cell, frame.bottom + 3),
                size=size,
                anchor="ma",
                place=(number,),
            )
    return frame


def draw_bar(dice: Dice, page: Page) -> dict[str, Any]:
    """A bar chart, upright or lying, with one bar or a group of two for each category."""
    table = _table(dice, page, "bar")
    horizontal = dice.chance("horizontal", 0.3) and min(page.width, page.height) >= 128
    top = _headline(page, table.title)
    if len(table.series) > 1:
        top = _legend(page, table.series, table.colours, top)
    frame = _frame(page, table, top, horizontal=horizontal)
    start, end = (frame.top, frame.bottom) if horizontal else (frame.left, frame.right)
    cell = (end - start) / len(table.categories)
    thick = max(2, int(cell * dice.integer("thickness", 55, 80) / 100 / len(table.series)))
    for s, row in enumerate(table.values):
        for c, value in enumerate(row):
            side = round(start + (c + 0.5) * cell - thick * len(table.series) / 2) + s * thick
            if horizontal:
                box = (
                    frame.left + 1,
                    side,
                    frame.left + 1 + round(value / frame.limit * (frame.right - frame.left)),
                    side + thick,
                )
            else:
                box = (side, frame.bottom - round(value / frame.limit * (frame.bottom - frame.top)), side + thick, frame.bottom)
            colour = table.colours[s if len(table.series) > 1 else c]
            page.fill(box, ink(colour))
            page.note("bar", table.categories[c], box, value=value, place=(s, c))
    page.pen.line((frame.left, frame.top, frame.left, frame.bottom), fill=page.ink)
    if horizontal:
        page.note("axis", "values", (frame.left, frame.bottom, frame.right, page.height))
    else:
        page.pen.line((frame.left, frame.bottom, frame.right, frame.bottom), fill=page.ink)
        page.note("axis", "values", (0, frame.top, frame.left, frame.bottom))
    return table.data("bar", horizontal=horizontal, axis=[0, frame.limit, frame.step])


def draw_line(dice: Dice, page: Page) -> dict[str, Any]:
    """A line chart of one to three series."""
    table = _table(dice, page, "line")
    top = _headline(page, table.title)
    if len(table.series) > 1:
        top = _legend(page, table.series, table.colours, top)
    frame = _frame(page, table, top)
    cell = (frame.right - frame.left) / len(table.categories)
    radius = max(2.0, page.text_size / 4)
    page.pen.line((frame.left, frame.top, frame.left, frame.bottom), fill=page.ink)
    page.pen.line((frame.left, frame.bottom, frame.right, frame.bottom), fill=page.ink)
    places = [
        [
            (frame.left + (c + 0.5) * cell, frame.bottom - value / frame.limit * (frame.bottom - frame.top))
            for c, value in enumerate(row)
        ]
        for row in table.values
    ]

    def paint(pen: Any, scale: int) -> None:
        for row, colour in zip(places, table.colours, strict=True):
            pen.line(
                [(x * scale, y * scale) for x, y in row], fill=ink(colour), width=round(radius * 0.9 * scale), joint="curve"
            )
            for x, y in row:
                pen.ellipse([(one + sign * radius) * scale for sign in (-1, 1) for one in (x, y)], fill=ink(colour))

    page.smooth(paint)
    for s, row in enumerate(places):
        for c, (x, y) in enumerate(row):
            box = (x - radius, y - radius, x + radius, y + radius)
            page.note("point", table.categories[c], box, value=table.values[s][c], place=(s, c))
    page.note("axis", "values", (0, frame.top, frame.left, frame.bottom))
    return table.data("line", axis=[0, frame.limit, frame.step])


def draw_pie(dice: Dice, page: Page) -> dict[str, Any]:
    """A pie chart with the percentage in each slice and a legend at the side."""
    table = _table(dice, page, "pie")
    top = _headline(page, table.title)
    size = fitting(table.categories, page.width * 0.3, page.text_size)
    legend = max(text_width(name, size) for name in table.categories) + round(2.2 * size)
    radius = min(page.width - legend - 8, page.height - top - 4) / 2
    x, y = 4 + radius + max(0.0, (page.width - legend - 8 - 2 * radius) / 2), top + (page.height - top) / 2
    edges = np.cumsum([0, *table.values[0]]) * 3.6 - 90

    def paint(pen: Any, scale: int) -> None:
        whole = [(one + sign * radius) * scale for sign in (-1, 1) for one in (x, y)]
        for start, end, colour in zip(edges[:-1], edges[1:], table.colours, strict=True):
            pen.pieslice(whole, start, end, fill=ink(colour), outline=page.paper, width=scale)

    page.smooth(paint)
    inner = fitting(["88%"], radius * 0.5, page.text_size)
    for c, (name, value) in enumerate(zip(table.categories, table.values[0], strict=True)):
        around = np.radians(
            np.r_[np.linspace(edges[c], edges[c + 1], 64), [a for a in range(-90, 271, 90) if edges[c] <= a <= edges[c + 1]]]
        )
        across, down = np.r_[x, x + radius * np.cos(around)], np.r_[y, y + radius * np.sin(around)]
        page.note("slice", name, (across.min(), down.min(), across.max(), down.max()), value=value, place=(0, c))
        middle = np.radians((edges[c] + edges[c + 1]) / 2)
        at = (x + 0.68 * radius * np.cos(middle), y + 0.68 * radius * np.sin(middle))
        page.write(
            "share",
            f"{value}%",
            at,
            size=inner,
            anchor="mm",
            fill=contrasting(ink(table.colours[c])),
            value=value,
            place=(0, c),
        )
    row = min(round(1.7 * size), (page.height - top - 4) // len(table.categories))
    start = round(y - row * len(table.categories) / 2)
    for c, (name, colour) in enumerate(zip(table.categories, table.colours, strict=True)):
        left, up = page.width - legend, start + c * row
        page.fill((left, up + (row - size) // 2, left + size - 1, up + (row - size) // 2 + size - 1), ink(colour))
        page.write("legend", name, (left + size + 3, up + row / 2), size=size, anchor="lm", place=(c,))
    return table.data("pie")


def chart_questions(dice: Dice, data: dict[str, Any]) -> list[Question]:
    """Questions about a chart, answered from its numbers."""
    names, rows, series, several = data["categories"], data["values"], data["series"], len(data["series"]) > 1
    s = dice.integer("asked series", 0, len(series) - 1)
    row = rows[s]
    one, two = dice.sample("asked", range(len(names)), 2)
    of = f" of {series[s]}" if several else ""
    thing = {"bar": "bar", "line": "point", "pie": "slice"}[data["kind"]]
    unit = "%" if data["kind"] == "pie" else ""
    asked = [
        Question(f"What is the value{of} for {names[one]}?", f"{row[one]}{unit}", "value", (s, one)),
        Question(f"Which {data['by']} has the highest value{of}?", names[int(np.argmax(row))], "highest", (s,)),
        Question(f"Which {data['by']} has the lowest value{of}?", names[int(np.argmin(row))], "lowest", (s,)),
        Question(
            f"How much do the values{of} for {names[one]} and {names[two]} differ?",
            f"{abs(row[one] - row[two])}{unit}",
            "difference",
            (s, one, two),
        ),
        Question(
            f"Is the value{of} for {names[one]} higher than for {names[two]}?",
            "yes" if row[one] > row[two] else "no",
            "compare",
            (s, one, two),
        ),
        Question(f"How many {data['by']}s are shown?", str(len(names)), "count"),
    ]
    if data["kind"] != "pie":
        bound = dice.integer("bound", 2, 9) * 10
        asked.append(
            Question(f"How many values{of} are over {bound}?", str(sum(value > bound for value in row)), "over", (s, bound))
        )
        asked.append(Question(f"What is the sum of all values{of}?", str(sum(row)), "sum", (s,)))
    if not several and data["kind"] in ("bar", "pie"):
        asked.append(Question(f"What colour is the {thing} for {names[one]}?", data["colours"][one], "colour", (one,)))
    if several:
        asked.append(Question(f"What colour is {series[s]}?", data["colours"][s], "series colour", (s,)))
        asked.append(
            Question(
                f"Which group is highest for {names[one]}?",
                series[int(np.argmax([r[one] for r in rows]))],
                "highest group",
                (one,),
            )
        )
    if data["kind"] == "line":
        asked.append(
            Question(
                f"Does the line{of} rise from {names[0]} to {names[-1]}?", "yes" if row[-1] > row[0] else "no", "trend", (s,)
            )
        )
    return asked


def chart_captions(data: dict[str, Any], titled: bool) -> dict[str, str]:
    """What a chart shows: its kind; with title and sizes; with every number."""
    names, rows, series = data["categories"], data["values"], data["series"]
    kind = f"{'horizontal ' if data.get('horizontal') else ''}{data['kind']} chart"
    headed = f' titled "{data["title"]}"' if titled else ""
    groups = f" for {COUNTS[len(series)]} groups" if len(series) > 1 else ""
    unit = "%" if data["kind"] == "pie" else ""
    each = []
    for name, row in zip(series, rows, strict=True):
        numbers = ", ".join(f"{category} {value}{unit}" for category, value in zip(names, row, strict=True))
        each.append(f"{name}: {numbers}" if len(series) > 1 else numbers)
    return {
        "coarse": f"a {data['kind']} chart",
        "medium": f"a {kind}{headed} with {COUNTS[len(names)]} {data['by']}s{groups}",
        "fine": f"The image shows a {kind}{headed} with {COUNTS[len(names)]} {data['by']}s{groups}. {'; '.join(each)}.",
    }
