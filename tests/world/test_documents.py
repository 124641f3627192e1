"""Documents: pixels agree with numbers, layouts don't collide, and every answer follows from the data."""

import contextlib
import hashlib
import io
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from grainwise.world import World
from grainwise.world.documents import KINDS, Documents, document_sheet
from grainwise.world.documents.page import Dice, ink
from grainwise.world.documents.pictures import _layout, where
from grainwise.world.record_views import RecordDataset, to_dataset

WORLD = World(seed=11)
SIZES = [(256, 192), (192, 256), (128, 128), (320, 160), (640, 480), (64, 64)]
WRITTEN = {"title", "legend", "tick", "category", "share", "text", "date", "time", "place", "price", "line", "line number"}


def overlap(a, b):
    return max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))


@pytest.fixture(scope="module")
def drawn():
    """Documents of every kind."""
    return {kind: Documents(WORLD, 10, kinds=(kind,)).draw(np.arange(12)) for kind in KINDS}


def test_a_document_is_the_same_in_any_batch_and_process():
    documents = Documents(WORLD, 10)
    first, again = documents.draw([0, 1, 2, 3, 4]), documents.draw([3, 1])
    for one, two in ((first[3], again[0]), (first[1], again[1])):
        np.testing.assert_array_equal(one.image, two.image)
        assert (one.data, one.elements, one.questions, one.captions) == (two.data, two.elements, two.questions, two.captions)
    code = (
        "import hashlib; from grainwise.world import World; from grainwise.world.documents import Documents;"
        "d = Documents(World(seed=11), 10).draw([3])[0]; print(hashlib.sha256(d.image.tobytes() + repr(d.data).encode()).hexdigest())"
    )
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert there == hashlib.sha256(first[3].image.tobytes() + repr(first[3].data).encode()).hexdigest()


def test_seeds_and_indices_differ():
    pictures = [one.image.tobytes() for seed in (10, 12) for one in Documents(WORLD, seed, kinds=("bar",)).draw(np.arange(10))]
    assert len(set(pictures)) == 20


def test_all_kinds_occur():
    assert {one.kind for one in Documents(WORLD, 10, 128, 128).draw(np.arange(60))} == set(KINDS) - {"code"}


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_text_is_on_the_page_and_never_on_other_text(width, height):
    for one in Documents(WORLD, 10, width, height).draw(np.arange(24 if width < 400 else 10)):
        assert one.image.shape == (height, width, 3)
        written = [element for element in one.elements if element.role in WRITTEN and element.text]
        for number, element in enumerate(written):
            x0, y0, x1, y1 = element.box
            assert 0 <= x0 < x1 <= width
            assert 0 <= y0 < y1 <= height
            assert len(np.unique(one.image[y0:y1, x0:x1].reshape(-1, 3), axis=0)) > 1, element
            for other in written[:number]:
                assert not overlap(element.box, other.box), (one.kind, element, other)


@pytest.mark.parametrize(("width", "height"), [(256, 192), (400, 300), (64, 64)])
def test_bars_are_as_long_as_their_numbers(width, height):
    for one in Documents(WORLD, 10, width, height, kinds=("bar",)).draw(np.arange(15)):
        several, along = len(one.data["series"]) > 1, one.data["horizontal"]
        lengths, values = [], []
        for element in one.of_role("bar"):
            x0, y0, x1, y1 = element.box
            colour = one.data["colours"][element.place[0] if several else element.place[1]]
            strip = one.image[(y0 + y1) // 2] if along else one.image[:, (x0 + x1) // 2]
            same = np.flatnonzero((strip == ink(colour)).all(-1))
            inside = (same >= (x0 if along else y0)) & (same < (x1 if along else y1))
            assert inside.sum() == (x1 - x0 if along else y1 - y0)
            lengths.append(inside.sum())
            values.append(element.value)
            assert element.value == one.data["values"][element.place[0]][element.place[1]]
        axis = one.of_role("axis")[0].box
        scale = (axis[2] - axis[0] if along else axis[3] - axis[1]) / one.data["axis"][1]
        np.testing.assert_allclose(lengths, np.array(values) * scale, atol=1.01)


def test_points_lie_at_their_numbers(drawn):
    for one in drawn["line"]:
        axis, limit = one.of_role("axis")[0].box, one.data["axis"][1]
        for element in one.of_role("point"):
            x, y = (element.box[0] + element.box[2]) / 2, (element.box[1] + element.box[3]) / 2
            assert (axis[3] - y) / (axis[3] - axis[1]) * limit == pytest.approx(
                element.value, abs=1.2 * limit / (axis[3] - axis[1])
            )
            last = element.place[0] == len(one.data["series"]) - 1  # later lines may cross earlier points
            if last:
                assert (one.image[int(y), int(x)] == ink(one.data["colours"][element.place[0]])).all()


def test_slices_fill_their_share(drawn):
    for one in drawn["pie"]:
        assert sum(one.data["values"][0]) == 100
        whole = np.array([element.box for element in one.of_role("slice")])
        x0, y0, x1, y1 = whole[:, 0].min(), whole[:, 1].min(), whole[:, 2].max(), whole[:, 3].max()
        pixels = one.image[y0:y1, x0:x1]
        counts = [(pixels == ink(colour)).all(-1).sum() for colour in one.data["colours"]]
        np.testing.assert_allclose(100 * np.array(counts) / sum(counts), one.data["values"][0], atol=3.5)
        middle = np.array([(x0 + x1) / 2, (y0 + y1) / 2])
        angles = np.radians(np.cumsum([0, *one.data["values"][0]]) * 3.6 - 90)
        for colour, start, end in zip(one.data["colours"], angles[:-1], angles[1:]):
            at = middle + 0.4 * (x1 - x0) / 2 * np.array([np.cos((start + end) / 2), np.sin((start + end) / 2)])
            assert (one.image[int(at[1]), int(at[0])] == ink(colour)).all()


def chart_answer(data, question):
    """The answer of a chart question, from its numbers, the slow way."""
    rows, names, unit = data["values"], data["categories"], "%" if data["kind"] == "pie" else ""
    about = question.about
    row = rows[about[0]] if about and question.kind not in ("colour", "highest group") else None
    pairs = sorted(zip(row, names)) if row else []
    return {
        "value": lambda: f"{row[about[1]]}{unit}",
        "highest": lambda: pairs[-1][1],
        "lowest": lambda: pairs[0][1],
        "difference": lambda: f"{max(row[about[1]], row[about[2]]) - min(row[about[1]], row[about[2]])}{unit}",
        "compare": lambda: "yes" if sorted([row[about[1]], row[about[2]]])[1] == row[about[1]] else "no",
        "count": lambda: str(len(row or rows[0])),
        "over": lambda: str(len([value for value in row if value > about[1]])),
        "sum": lambda: str(int(np.sum(row))),
        "colour": lambda: data["colours"][about[0]],
        "series colour": lambda: data["colours"][about[0]],
        "highest group": lambda: max(zip((r[about[0]] for r in rows), data["series"]))[1],
        "trend": lambda: "yes" if row[0] < row[-1] else "no",
    }[question.kind]()


@pytest.mark.parametrize("kind", ["bar", "line", "pie"])
def test_chart_answers_follow_from_the_numbers(drawn, kind):
    asked = set()
    for one in drawn[kind]:
        assert len({value for row in one.data["values"] for value in row}) == sum(map(len, one.data["values"]))
        for question in one.questions:
            asked.add(question.kind)
            assert question.answer == chart_answer(one.data, question), question
            for place in question.about[1:] if question.kind in ("value", "difference", "compare") else ():
                assert one.data["categories"][place] in question.text
            if len(one.data["series"]) > 1 and question.kind in (
                "value",
                "highest",
                "lowest",
                "difference",
                "compare",
                "over",
                "sum",
                "trend",
            ):
                assert one.data["series"][question.about[0]] in question.text
    assert len(asked) >= 6


@pytest.mark.parametrize("kind", ["bar", "line", "pie"])
def test_chart_captions_hold_every_number(drawn, kind):
    for one in drawn[kind]:
        facts = one.captions["fine"].rstrip(".").split(". ")[-1].split("; ")
        for fact, name, row in zip(facts, one.data["series"], one.data["values"], strict=True):
            named = fact.removeprefix(f"{name}: ")
            found = [piece.rsplit(" ", 1) for piece in named.split(", ")]
            assert [label for label, _ in found] == one.data["categories"]
            assert [int(value.rstrip("%")) for _, value in found] == row
        assert one.data["title"] in one.captions["medium"]


def table_answer(values, names, heads, question):
    """The answer of a table question, from the parsed numbers."""
    about = question.about
    column = [row[about[-1]] for row in values] if about else []
    assert not about or question.kind in ("find", "cell") or heads[about[-1]] in question.text
    return {
        "rows": lambda: str(len(values)),
        "columns": lambda: str(len(heads)),
        "cell": lambda: str(values[about[0]][about[1]]),
        "highest": lambda: names[column.index(max(column))],
        "lowest": lambda: names[column.index(min(column))],
        "sum": lambda: str(sum(column)),
        "find": lambda: names[column.index(values[about[0]][about[1]])],
        "missing": lambda: names[column.index(None)],
    }[question.kind]()


def test_tables_parse_back_and_answer(drawn):
    kinds, empty = set(), 0
    for one in [*drawn["table"], *Documents(WORLD, 10, kinds=("table",)).draw(np.arange(12, 40))]:
        lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in one.captions["fine"].splitlines()[1:]]
        values = [[int(cell) if cell else None for cell in line[1:]] for line in lines[2:]]
        assert lines[0] == one.data["columns"]
        assert [line[0] for line in lines[2:]] == one.data["rows"]
        assert values == one.data["values"]
        empty += any(value is None for row in values for value in row)
        for element in one.of_role("cell"):
            r, c = element.place
            assert element.value == values[r - 1][c - 1]
        cells = [element.box for role in ("head", "name", "cell") for element in one.of_role(role)]
        assert not any(overlap(a, b) for i, a in enumerate(cells) for b in cells[:i])
        for text in one.of_role("text"):
            box = next(element.box for element in one.elements if element.role != "text" and element.place == text.place)
            assert overlap(text.box, box) == (text.box[2] - text.box[0]) * (text.box[3] - text.box[1])
        heads = lines[0][1:]
        for question in one.questions:
            kinds.add(question.kind)
            assert question.answer == table_answer(values, one.data["rows"], heads, question), question
    assert len(kinds) == 8
    assert empty


def test_posters_answer(drawn):
    for one in drawn["poster"]:
        texts = {element.role: element.text for element in one.elements}
        for question in one.questions:
            if question.kind in ("date", "time", "place", "title"):
                assert question.answer == texts[question.kind]
            elif question.kind == "total":
                assert int(question.answer) == question.about[0] * int(re.search(r"\d+", texts["price"]).group())
            elif question.kind == "price":
                assert question.answer in texts["price"]
            elif question.kind == "shown":
                assert question.answer == WORLD.species[one.data["species"]].kind
        corner = one.image[1, 1]
        assert (corner == ink(one.data["colour"])).all()
        assert all(
            text in one.captions["fine"] for role, text in texts.items() if role in ("title", "date", "time", "place", "line")
        )


@pytest.mark.parametrize(("rows", "columns"), [(r, c) for r in (1, 2, 3) for c in (1, 2, 3) if r * c > 1])
def test_collages_cover_their_grid_once(rows, columns):
    merged = 0
    for index in range(30):
        cells = _layout(Dice(10, rows, columns, index), rows, columns)
        covered = np.zeros((rows, columns), int)
        for r0, c0, r1, c1 in cells:
            covered[r0:r1, c0:c1] += 1
        assert (covered == 1).all()
        assert len(cells) >= 2
        merged += len(cells) < rows * columns
    assert merged or rows * columns == 2


def collage_answer(cells, kinds, question):
    """The answer of a collage question, from the kinds of its cells."""
    about = question.about
    return {
        "count": lambda: str(len(cells)),
        "content": lambda: kinds[about[0]],
        "present": lambda: "yes" if about[0] in kinds else "no",
        "kind count": lambda: str(kinds.count(about[0])),
        "kinds": lambda: str(len(set(kinds))),
        "where": lambda: where(cells[kinds.index(kinds[about[0]])]["place"]),
    }[question.kind]()


def test_collages_answer(drawn):
    for one in drawn["collage"]:
        cells = one.data["cells"]
        boxes = [element.box for element in one.of_role("cell")]
        assert not any(overlap(a, b) for i, a in enumerate(boxes) for b in boxes[:i])
        kinds = [WORLD.species[cell["species"]].kind for cell in cells]
        for question in one.questions:
            expected = collage_answer(cells, kinds, question)
            assert question.answer.removeprefix("a ").removeprefix("an ") == expected, question
            if question.kind == "where":
                assert kinds.count(kinds[question.about[0]]) == 1


def test_programs_print_what_is_said():
    for one in Documents(WORLD, 10, kinds=("code",)).draw(np.arange(60)):
        program = "\n".join(one.data["lines"])
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(program, {})
        answers = {question.kind: question.answer for question in one.questions}
        assert answers["prints"] == printed.getvalue().strip()
        assert answers["lines"] == str(program.count("\n") + 1)
        assert one.data["lines"][int(answers["print line"]) - 1].startswith("print(")
        assert answers["loop"] == ("yes" if re.search(r"\b(for|while)\b", program) else "no")
        assert ("function" in answers) == ("def " in program)
        if "function" in answers:
            assert f"def {answers['function']}(" in program
        assert program in one.captions["fine"]
        for element in one.of_role("line"):
            assert element.text == one.data["lines"][element.place[0]]
            _, y0, x1, y1 = element.box
            beyond = one.image[y0:y1, x1:]
            assert (beyond == beyond[0, 0]).all()


def test_small_panes_hold_programs():
    for one in Documents(WORLD, 10, 160, 112, kinds=("code",)).draw(np.arange(30)):
        assert all(element.box[2] <= 160 and element.box[3] <= 112 for element in one.of_role("line"))


def test_captions_and_questions_are_well_formed(drawn):
    for documents in drawn.values():
        for one in documents:
            assert one.captions["fine"].startswith("The image shows a ")
            assert len(one.captions["coarse"]) < len(one.captions["medium"]) < len(one.captions["fine"])
            texts = [question.text for question in one.questions]
            assert len(set(texts)) == len(texts) >= 4
            assert all(question.answer for question in one.questions)
            json.dumps(one.data)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kinds": ("map",)}, "unknown"),
        ({"kinds": ()}, "choose some"),
        ({"width": 32}, "64 to 1024"),
        ({"height": 2000}, "64 to 1024"),
        ({"width": 100, "kinds": ("code",)}, "too small for code"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        Documents(WORLD, **settings)


def test_wrong_indices_are_named():
    for wrong in ([], [-1], [[0]]):
        with pytest.raises(ValueError, match="from 0"):
            Documents(WORLD).draw(wrong)
    with pytest.raises(TypeError, match="World"):
        Documents(7)


def test_torch_and_datasets_forms():
    documents = Documents(WORLD, 10, 96, 96)
    truth = documents.draw([0, 1, 2, 3])
    data = RecordDataset(documents, 4)
    loader = torch.utils.data.DataLoader(
        data, batch_size=2, collate_fn=lambda rows: torch.stack([row["image"] for row in rows])
    )
    np.testing.assert_array_equal(torch.cat(list(loader)).permute(0, 2, 3, 1).numpy(), np.stack([one.image for one in truth]))
    table = to_dataset(documents, 4)
    for row, one in zip(table, truth, strict=True):
        np.testing.assert_array_equal(np.asarray(row["image"]), one.image)
        assert json.loads(row["data"]) == one.data
        assert [element["text"] for element in row["elements"]] == [element.text for element in one.elements]
        assert [question["answer"] for question in row["questions"]] == [question.answer for question in one.questions]


def test_sheet_has_pictures_with_labels():
    rows = document_sheet(10)
    assert len(rows) == 2 * len(KINDS)
    assert all(len(lines) == 4 for _, lines in rows)
