"""Code panes: a short Python program in an editor window, with what it prints."""

from __future__ import annotations

import keyword
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from grainwise.world.documents.charts import COUNTS
from grainwise.world.documents.page import CODE_HEIGHT, CODE_WIDTH, Colour, Dice, Page, Question

NAMES = ("total", "count", "score", "sum_up", "tally", "result", "best", "level")
ITEMS = ("item", "value", "n", "step", "x", "number")
FUNCTIONS = ("run", "solve", "work", "measure", "collect", "compute", "check")
WORDS = ("oak", "elm", "fern", "moss", "reed", "pine", "ivy", "palm")
TOKEN = re.compile(
    r"(?P<comment>#.*)|(?P<string>\"[^\"]*\")|(?P<number>\b\d+\b)|(?P<word>\b[A-Za-z_]\w*\b)|(?P<rest>[^\s\w\"#]+)"
)


@dataclass(frozen=True)
class Theme:
    """Colours of a pane: ground, gutter, plain text, keywords, strings, numbers, names of functions."""

    name: str
    ground: Colour
    gutter: Colour
    plain: Colour
    keyword: Colour
    string: Colour
    number: Colour
    function: Colour


THEMES = (
    Theme(
        "dark", (30, 32, 40), (44, 47, 58), (222, 224, 230), (198, 120, 221), (152, 205, 121), (229, 170, 92), (97, 175, 239)
    ),
    Theme("light", (255, 255, 255), (238, 240, 244), (36, 41, 47), (207, 34, 46), (10, 100, 60), (5, 80, 174), (130, 80, 223)),
    Theme("sepia", (250, 244, 228), (238, 228, 204), (76, 66, 50), (176, 60, 20), (96, 120, 20), (24, 110, 140), (150, 90, 10)),
    Theme(
        "night", (12, 22, 40), (22, 36, 60), (214, 226, 240), (255, 157, 100), (165, 230, 160), (255, 210, 120), (120, 220, 235)
    ),
)


def _accumulate(dice: Dice) -> tuple[list[str], int]:
    total, item = dice.pick("name", NAMES), dice.pick("item", ITEMS)
    numbers, factor = dice.sample("numbers", range(1, 10), dice.integer("length", 3, 4)), dice.integer("factor", 2, 5)
    lines = [f"{total} = 0", f"for {item} in {numbers}:", f"    {total} += {item} * {factor}", f"print({total})"]
    return lines, sum(numbers) * factor


def _filter(dice: Dice) -> tuple[list[str], int]:
    count, item, function = dice.pick("name", NAMES), dice.pick("item", ITEMS), dice.pick("function", FUNCTIONS)
    numbers, bound = dice.sample("numbers", range(1, 20), dice.integer("length", 3, 5)), dice.integer("bound", 4, 15)
    lines = [
        f"def {function}(bound):",
        f"    {count} = 0",
        f"    for {item} in {numbers}:",
        f"        if {item} > bound:",
        f"            {count} += 1",
        f"    return {count}",
        "",
        f"print({function}({bound}))",
    ]
    return lines, sum(number > bound for number in numbers)


def _highest(dice: Dice) -> tuple[list[str], int]:
    best, item = dice.pick("name", NAMES), dice.pick("item", ITEMS)
    numbers, add = dice.sample("numbers", range(1, 50), 3), dice.integer("add", 1, 9)
    lines = [
        f"{best} = 0",
        f"for {item} in {numbers}:",
        f"    if {item} > {best}:",
        f"        {best} = {item}",
        f"print({best} + {add})",
    ]
    return lines, max(numbers) + add


def _countdown(dice: Dice) -> tuple[list[str], int]:
    name, start, step = dice.pick("name", NAMES), dice.integer("start", 12, 40), dice.integer("step", 3, 7)
    left = start
    while left > step:
        left -= step
    return [f"{name} = {start}", f"while {name} > {step}:", f"    {name} -= {step}", f"print({name})"], left


def _words(dice: Dice) -> tuple[list[str], str]:
    function = dice.pick("function", FUNCTIONS)
    words, joint = dice.sample("words", WORDS, 2), dice.pick("joint", ("-", "+", "/"))
    lines = [f"def {function}(a, b):", f'    return a + "{joint}" + b', "", f'print({function}("{words[0]}", "{words[1]}"))']
    return lines, joint.join(words)


PROGRAMS: tuple[Callable[[Dice], tuple[list[str], int | str]], ...] = (_accumulate, _filter, _highest, _countdown, _words)


def draw_code(dice: Dice, page: Page) -> dict[str, Any]:
    """A code pane with line numbers and coloured tokens; programs that would not fit are not chosen."""
    theme = dice.pick("theme", THEMES)
    fitting = [one for one in (program(dice) for program in PROGRAMS) if _scale(page, one[0]) >= 1]
    lines, printed = dice.pick("program", fitting)
    scale = min(_scale(page, lines), 3)
    bar = _bar(page)
    page.fill((0, 0, page.width, page.height), theme.ground)
    page.fill((0, 0, page.width, bar), theme.gutter)

    def dots(pen: Any, big: int) -> None:
        for k, colour in enumerate(((236, 95, 86), (245, 190, 60), (98, 196, 84))):
            x, y, r = (bar * 0.6 + k * bar * 0.7) * big, bar / 2 * big, bar * 0.22 * big
            pen.ellipse((x - r, y - r, x + r, y + r), fill=colour)

    page.smooth(dots)
    gutter = round(2.6 * CODE_WIDTH * scale)
    page.fill((0, bar, gutter, page.height), theme.gutter)
    height = (CODE_HEIGHT + 2) * scale
    for number, line in enumerate(lines):
        top = bar + 3 * scale + number * height
        label = str(number + 1)
        left = gutter - (len(label) * CODE_WIDTH + 3) * scale
        page.write_code("line number", label, left, top, scale, [(0, label, (140, 144, 154))], number)
        if line:
            page.write_code("line", line, gutter + 3 * scale, top, scale, _spans(line, theme), number)
    return {"kind": "code", "language": "Python", "theme": theme.name, "lines": lines, "prints": str(printed)}


def _bar(page: Page) -> int:
    return max(8, page.height // 14)


def _scale(page: Page, lines: list[str]) -> int:
    """How many times the bitmap font can be enlarged so that all lines fit; 0: they don't."""
    across = page.width // round(CODE_WIDTH * (max(map(len, lines)) + 4))
    return min(across, (page.height - _bar(page) - 4) // ((CODE_HEIGHT + 2) * len(lines) + 3))


def _spans(line: str, theme: Theme) -> list[tuple[int, str, Colour]]:
    """The tokens of a line with their columns and colours."""
    spans = []
    for found in TOKEN.finditer(line):
        text, kind = found.group(), found.lastgroup
        colour = {"string": theme.string, "number": theme.number}.get(kind or "", theme.plain)
        if kind == "word" and keyword.iskeyword(text):
            colour = theme.keyword
        elif kind == "word" and line[found.end() : found.end() + 1] == "(":
            colour = theme.function
        spans.append((found.start(), text, colour))
    return spans


def code_questions(dice: Dice, data: dict[str, Any]) -> list[Question]:
    """Questions about a program."""
    lines = data["lines"]
    chosen = dice.pick("asked", [k for k, line in enumerate(lines) if line])
    asked = [
        Question("What does the program print?", data["prints"], "prints"),
        Question("How many lines does the program have, empty ones included?", str(len(lines)), "lines"),
        Question(f"What is on line {chosen + 1}?", lines[chosen].strip(), "line", (chosen,)),
        Question(
            "On which line does the program print?",
            str(1 + next(k for k, line in enumerate(lines) if "print(" in line)),
            "print line",
        ),
    ]
    defined = re.match(r"def (\w+)", lines[0])
    if defined:
        asked.append(Question("What is the name of the function?", defined.group(1), "function"))
    loop = next((line.split()[0] for line in lines if line.split()[:1] in (["for"], ["while"])), None)
    asked.append(Question("Does the program have a loop?", "yes" if loop else "no", "loop"))
    return asked


def code_captions(data: dict[str, Any]) -> dict[str, str]:
    """What a code pane shows; the fine caption holds the program as it stands."""
    lines = data["lines"]
    program = "\n".join(lines)
    return {
        "coarse": "a code pane",
        "medium": f"a code pane with a {data['language']} program of {COUNTS[len(lines)]} lines",
        "fine": f"The image shows a code pane with a {data['language']} program of {COUNTS[len(lines)]} lines.\n"
        f"```python\n{program}\n```\nIt prints {data['prints']}.",
    }
