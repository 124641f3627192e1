"""The sheet of paper: draw text and shapes, and remember where everything is.

Text is set in the font that comes with Pillow (Aileron) or, for code, in Pillow's fixed-width bitmap font; both need no file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from grainwise.world.counter_random import Draws
from grainwise.world.shapes import COLOURS

SMOOTH = 4  # shapes with slanted edges are drawn this many times larger and reduced
CODE_WIDTH, CODE_HEIGHT = 6, 11
INKS = tuple(name for name in COLOURS if name not in ("white", "black"))
Box = tuple[int, int, int, int]
Colour = tuple[int, int, int]
T = TypeVar("T")


@dataclass(frozen=True)
class Element:
    """Something on the page: its role ("title", "bar", "cell" ...), its text, its box x0 y0 x1 y1 in pixels (far edges
    exclusive), the number it stands for, and its place among its like (row and column, series and category ...)."""

    role: str
    text: str
    box: Box
    value: float | None = None
    place: tuple[int, ...] = ()


@dataclass(frozen=True)
class Question:
    """A question with its true answer; `kind` and `about` say how the answer follows from the document's data."""

    text: str
    answer: str
    kind: str
    about: tuple[Any, ...] = ()


@dataclass
class Document:
    """A drawn document: uint8 picture (height, width, 3), the data behind it, what is where, questions and captions by
    granularity.
    """

    index: int
    kind: str
    image: np.ndarray
    data: dict[str, Any]
    elements: tuple[Element, ...]
    questions: tuple[Question, ...]
    captions: dict[str, str]

    def of_role(self, role: str) -> tuple[Element, ...]:
        """The elements of one role, in the order in which they were drawn."""
        return tuple(one for one in self.elements if one.role == role)


class Dice:
    """Single random choices by name, for one document."""

    def __init__(self, *keys: int) -> None:
        self.draws = Draws(*keys)

    def integer(self, name: str, low: int, high: int) -> int:
        """low to high, both included."""
        return low + int(self.draws.integers(name, high - low + 1)[0])

    def pick(self, name: str, options: Sequence[T]) -> T:
        """One of the options."""
        return options[self.integer(name, 0, len(options) - 1)]

    def sample(self, name: str, options: Sequence[T], count: int) -> list[T]:
        """`count` different options in random order."""
        return [options[i] for i in self.draws.order(name, len(options))[0, :count]]

    def chance(self, name: str, probability: float) -> bool:
        """True with this probability."""
        return bool(self.draws.chance(name, probability)[0])


@lru_cache(maxsize=64)
def font(size: int) -> ImageFont.FreeTypeFont:
    """Pillow's own outline font at a size in pixels."""
    found = ImageFont.load_default(size)
    if not isinstance(found, ImageFont.FreeTypeFont):
        raise RuntimeError("this build of Pillow has no FreeType; install the wheels of pillow")
    return found


def text_width(text: str, size: int) -> int:
    """Pixels from the pen's start to its end."""
    return int(np.ceil(font(size).getlength(text)))


def fitting(texts: Sequence[str], room: float, size: int, least: int = 6) -> int:
    """The largest size up to `size` at which every text is at most `room` pixels wide, but not under `least`."""
    while size > least and any(text_width(text, size) > room for text in texts):
        size -= 1
    return size


def contrasting(colour: Colour) -> Colour:
    """Black or white, whichever is read more easily on a colour."""
    return (24, 24, 28) if 0.3 * colour[0] + 0.59 * colour[1] + 0.11 * colour[2] > 135 else (250, 250, 250)


def ink(name: str) -> Colour:
    """The colour of a name of `COLOURS`."""
    return COLOURS[name]


@dataclass
class Page:
    """A page of width x height pixels on which elements are drawn."""

    width: int
    height: int
    paper: Colour = (255, 255, 255)
    ink: Colour = (40, 40, 46)
    elements: list[Element] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.image = Image.new("RGB", (self.width, self.height), self.paper)
        self.pen = ImageDraw.Draw(self.image)

    @property
    def text_size(self) -> int:
        """The size of running text on a page of this size, in pixels."""
        return int(np.clip(round(min(self.width, self.height) / 16), 7, 28))

    def write(
        self,
        role: str,
        text: str,
        at: tuple[float, float],
        *,
        size: int | None = None,
        anchor: str = "la",
        fill: Colour | None = None,
        value: float | None = None,
        place: tuple[int, ...] = (),
    ) -> Element:
        """Write a line of text; `anchor` is Pillow's ("la": left, top; "mm": centre; "rs": right, base line)."""
        chosen = font(size or self.text_size)
        where = (round(at[0]), round(at[1]))
        self.pen.text(where, text, font=chosen, fill=fill or self.ink, anchor=anchor)
        return self.note(role, text, self.pen.textbbox(where, text, font=chosen, anchor=anchor), value=value, place=place)

    def write_code(
        self, role: str, text: str, left: int, top: int, scale: int, spans: Sequence[tuple[int, str, Colour]], line: int
    ) -> Element:
        """Write a line in the fixed-width bitmap font, enlarged by whole pixels: spans of (column, text, colour)."""
        plain = ImageFont.load_default_imagefont()
        for column, piece, colour in spans:
            mask = Image.new("L", (CODE_WIDTH * len(piece), CODE_HEIGHT))
            ImageDraw.Draw(mask).text((0, 0), piece, font=plain, fill=255)
            mask = mask.resize((mask.width * scale, mask.height * scale), Image.Resampling.NEAREST)
            self.image.paste(colour, (left + column * CODE_WIDTH * scale, top), mask)
        indent = len(text) - len(text.lstrip())
        box = (left + indent * CODE_WIDTH * scale, top, left + len(text) * CODE_WIDTH * scale, top + CODE_HEIGHT * scale)
        return self.note(role, text, box, place=(line,))

    def fill(self, box: Box, colour: Colour) -> None:
        """Fill a box; its far edges are not part of it."""
        if box[2] > box[0] and box[3] > box[1]:
            self.pen.rectangle((box[0], box[1], box[2] - 1, box[3] - 1), fill=colour)

    def smooth(self, paint: Callable[[ImageDraw.ImageDraw, int], None]) -> None:
        """Let `paint(pen, scale)` draw shapes on the page enlarged by `scale`, and reduce it again: smooth edges."""
        large = self.image.resize((self.width * SMOOTH, self.height * SMOOTH), Image.Resampling.NEAREST)
        paint(ImageDraw.Draw(large), SMOOTH)
        self.image.paste(large.reduce(SMOOTH))

    def note(
        self, role: str, text: str, box: Sequence[float], *, value: float | None = None, place: tuple[int, ...] = ()
    ) -> Element:
        """Remember an element; its box is cut to the page."""
        x0, y0 = (int(np.clip(np.floor(one), 0, limit)) for one, limit in zip(box[:2], (self.width, self.height), strict=True))
        x1, y1 = (int(np.clip(np.ceil(one), 0, limit)) for one, limit in zip(box[2:], (self.width, self.height), strict=True))
        element = Element(role, text, (x0, y0, x1, y1), value, place)
        self.elements.append(element)
        return element

    def pixels(self) -> np.ndarray:
        """uint8 (height, width, 3)."""
        return np.array(self.image)
