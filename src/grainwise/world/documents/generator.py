"""Documents by seed and index."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from PIL import Image

from grainwise.world.documents import charts, code_panes, pictures, tables
from grainwise.world.documents.page import Dice, Document, Page
from grainwise.world.taxonomy import LEVELS, World

KINDS = ("bar", "line", "pie", "table", "poster", "collage", "code")
DOCUMENT_KEY = 0xD0C5
LOWEST = {"code": (160, 112), "pie": (96, 96), "poster": (128, 128)}  # the smallest page (width, height); 64 x 64 otherwise


class Documents:
    """Charts, tables, posters, collages and code panes, by seed and index.

    Document i is the same in every process; the words and numbers on every machine too, and the pixels wherever Pillow
    brings the same version of its font renderer.

    Args:
        world: whose species stand in posters and collages.
        seed: which documents.
        width, height: of the page in pixels, 64 to 1024.
        kinds: some of `KINDS`, equally often; all that fit on the page by default.

    Raises:
        ValueError: an unknown kind, a size out of range, or a page too small for a kind.
    """

    def __init__(
        self, world: World, seed: int = 0, width: int = 256, height: int = 192, kinds: Sequence[str] | None = None
    ) -> None:
        if not isinstance(world, World):
            raise TypeError(f"world is {type(world).__name__}; give a grainwise.world.World")
        if not (64 <= width <= 1024 and 64 <= height <= 1024):
            raise ValueError(f"a page is 64 to 1024 pixels wide and high, got {width} x {height}")
        roomy = [kind for kind in KINDS if width >= LOWEST.get(kind, (64, 64))[0] and height >= LOWEST.get(kind, (64, 64))[1]]
        chosen = tuple(roomy if kinds is None else kinds)
        unknown = [kind for kind in chosen if kind not in KINDS]
        if unknown or not chosen:
            raise ValueError(f"kinds {unknown} are unknown; choose some of {', '.join(KINDS)}")
        tight = [kind for kind in chosen if kind not in roomy]
        if tight:
            raise ValueError(f"a page of {width} x {height} pixels is too small for {tight[0]}; it needs {LOWEST[tight[0]]}")
        self.world, self.seed, self.width, self.height, self.kinds = world, seed, width, height, chosen

    def draw(self, indices: Sequence[int] | np.ndarray) -> list[Document]:
        """The documents of these indices (any integers from 0).

        Raises:
            ValueError: no indices, or a negative one.
        """
        numbers = np.atleast_1d(np.asarray(indices, np.int64))
        if numbers.ndim != 1 or not len(numbers) or numbers.min() < 0:
            raise ValueError(f"indices must be one row of integers from 0, got {numbers.tolist()}")
        return [self._draw(int(index)) for index in numbers]

    def records(self, indices: Sequence[int] | np.ndarray) -> list[dict[str, Any]]:
        """The same documents as plain dictionaries; what the `torch` and `datasets` forms hold. `data` is JSON."""
        return [
            {
                "index": one.index,
                "kind": one.kind,
                "image": one.image,
                "data": json.dumps(one.data),
                "elements": [
                    {
                        **asdict(element),
                        "box": list(element.box),
                        "place": list(element.place),
                        "value": None if element.value is None else float(element.value),
                    }
                    for element in one.elements
                ],
                "questions": [
                    {"text": question.text, "answer": question.answer, "kind": question.kind} for question in one.questions
                ],
                **{f"{level}_caption": one.captions[level] for level in LEVELS},
            }
            for one in self.draw(indices)
        ]

    def _draw(self, index: int) -> Document:
        dice = Dice(self.world.seed, self.seed, DOCUMENT_KEY, index)
        kind = dice.pick("kind of document", self.kinds)
        dice = Dice(self.world.seed, self.seed, DOCUMENT_KEY, index, KINDS.index(kind))
        page = Page(self.width, self.height, paper=dice.pick("paper colour", charts.PAPERS))
        titled = self.height >= 96
        if kind in ("bar", "line", "pie"):
            data = {"bar": charts.draw_bar, "line": charts.draw_line, "pie": charts.draw_pie}[kind](dice, page)
            questions, captions = charts.chart_questions(dice, data), charts.chart_captions(data, titled)
        elif kind == "table":
            data = tables.draw_table(dice, page)
            questions, captions = tables.table_questions(dice, data), tables.table_captions(data, titled)
        elif kind == "poster":
            data = pictures.draw_poster(dice, page, self.world)
            questions = pictures.poster_questions(dice, data)
            captions = pictures.poster_captions(data, self.world, any(one.role == "line" for one in page.elements))
        elif kind == "collage":
            data = pictures.draw_collage(dice, page, self.world)
            questions, captions = pictures.collage_questions(dice, data), pictures.collage_captions(data, self.world)
        else:
            data = code_panes.draw_code(dice, page)
            questions, captions = code_panes.code_questions(dice, data), code_panes.code_captions(data)
        return Document(index, kind, page.pixels(), data, tuple(page.elements), tuple(questions), captions)


def document_sheet(seed: int) -> list[tuple[Image.Image, list[str]]]:
    """Two documents of each kind for a contact sheet, each with its caption and three questions with answers."""
    rows = []
    for kind in KINDS:
        for one in Documents(World(seed=seed), seed, 320, 240, kinds=(kind,)).draw([0, 1]):
            asked = [f"{question.text} {question.answer}" for question in one.questions[:3]]
            rows.append((Image.fromarray(one.image), [one.captions["medium"], *asked]))
    return rows
