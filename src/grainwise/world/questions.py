"""Questions about scenes with answers computed from the truth, also as multiple choice.

Every question carries the program that answers it; `answer` runs a program on a scene.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from grainwise.world.backgrounds import STUFF_NAMES
from grainwise.world.expressions import SEEN, Facts, Predicate, absent, name
from grainwise.world.relations import RELATIONS
from grainwise.world.scenes import Scene
from grainwise.world.shapes import COLOURS, SHAPES
from grainwise.world.words import article, part_noun, plural

LETTERS = "ABCD"
FORMS = ("count", "colour", "shape", "existence", "comparison", "relation", "place")


@dataclass(frozen=True)
class Question:
    """form: one of `FORMS`; options: the choices in order, the answer among them; program: an operation and what it is
    applied to."""

    form: str
    text: str
    answer: str
    options: tuple[str, ...]
    program: tuple[Any, ...]

    @property
    def letter(self) -> str:
        """The letter of the right choice."""
        return LETTERS[self.options.index(self.answer)]

    @property
    def choices(self) -> str:
        """ "A. red\\nB. blue"."""
        return "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, self.options, strict=False))


def answer(scene: Scene, program: tuple[Any, ...], facts: Facts | None = None) -> str:
    """Run a program: ("count", predicates), ("part", individual, part, attribute), ("exists", predicates), ("more", kind,
    kind), ("larger", individual, individual), ("relation", name, individual, individual), ("on", individual)."""
    facts = facts or Facts(scene)
    operation, *terms = program
    if operation == "count":
        return str(facts.meant(terms[0]).bit_count())
    if operation == "exists":
        return _yes(facts.meant(terms[0]) > 0)
    if operation == "part":
        return str(scene.species[terms[0]].parts[terms[1]].attribute(terms[2]))
    if operation == "more":
        return _yes(facts.kinds.get(terms[0], 0).bit_count() > facts.kinds.get(terms[1], 0).bit_count())
    if operation == "larger":
        return _yes(bool(scene.relation("larger than")[terms[0], terms[1]]))
    if operation == "relation":
        return _yes(bool(scene.relation(terms[0])[terms[1], terms[2]]))
    if operation == "on":
        return STUFF_NAMES[scene.on[terms[0]]]
    raise ValueError(f"operation {operation!r} is unknown")


class _Asker:
    """Makes the questions of one scene; `pick` draws by the scene's key."""

    def __init__(self, scene: Scene, facts: Facts) -> None:
        self.scene, self.facts = scene, facts
        self.numbers = scene.draws.words("questions", (len(FORMS), 16))[0].tolist()
        self.position = (0, 0)

    def number(self) -> int:
        row, column = self.position
        self.position = (row, column + 1)
        return self.numbers[row][column]

    def pick(self, options: list[Any]) -> Any:
        return options[self.number() % len(options)]

    def shuffled(self, options: list[Any]) -> list[Any]:
        """The options from a random one on."""
        start = self.number() % max(len(options), 1)
        return options[start:] + options[:start]

    def name(self, individual: int, *without: str) -> str | None:
        """A name that uses no relation and nothing of `without`, lest it be confusing or give the answer away."""
        found = name(self.facts, individual, self.numbers[0][individual], ("relation", *without))
        return None if found is None else found.text

    def finish(self, form: str, text: str, program: tuple[Any, ...], others: list[str]) -> Question:
        """Answer it and put the answer among up to three wrong choices."""
        right = answer(self.scene, program, self.facts)
        wrong = [other for other in others if other != right]
        options = [right]
        while wrong and len(options) < len(LETTERS):
            options.append(wrong.pop(wrong.index(self.pick(wrong))))
        if set(options) == {"yes", "no"}:
            options = ["yes", "no"]
        elif len(options) > 1:
            options.insert(self.pick(list(range(len(options)))), options.pop(0))
        return Question(form, text, right, tuple(options), program)

    def count(self) -> Question:
        kind = self.pick(list(self.facts.kinds))
        base = self.facts.kinds[kind]
        on = [p for p, found in self.facts.true.items() if p.family == "on" and found & base and (self.scene.on >= 0).all()]
        more = self.pick([None, *on])
        noun = Predicate("kind", (kind,))
        number = base.bit_count()
        others = [str(n) for n in range(max(0, number - 3), number + 4)]
        where = f" are on the {more.terms[0]}" if more else " are there"
        return self.finish("count", f"How many {plural(kind)}{where}?", ("count", (noun, more) if more else (noun,)), others)

    def part(self, form: str, values: list[str]) -> Question | None:
        """The colour or shape of a part that is seen."""
        scene = self.scene
        able = [
            (i, p) for i, species in enumerate(scene.species) for p, part in enumerate(species.parts)
            if scene.part_areas[i, p] >= SEEN and (form != "colour" or part.texture == "plain")
        ]  # fmt: skip
        for i, p in self.shuffled(able):
            part = scene.species[i].parts[p]
            whose = self.name(i, part.name)
            if whose is not None:
                verb = "are" if part.count > 1 else "is"
                wrong = list(part.slot.shapes) if form == "shape" and len(part.slot.shapes) >= len(LETTERS) else values
                text = f"What {form} {verb} the {part_noun(part.name, part.count)} of {whose}?"
                return self.finish(form, text, ("part", i, p, form), wrong)
        return None

    def existence(self) -> Question:
        facts = self.facts
        if self.pick([True, False]):
            missing = absent(self.scene, facts)
            if missing:
                expression = self.pick(missing)
                what = article(expression.text.removeprefix("the "))
                return self.finish("existence", f"Is there {what}?", ("exists", expression.predicates), ["yes", "no"])
        i = self.pick(list(range(len(self.scene))))
        noun = Predicate("kind", (self.scene.species[i].kind,))
        seen = [p for p, told in facts.tellable.items() if told >> i & 1 and p.family in ("part", "on")]
        more = self.pick([None, *seen])
        kind = self.scene.species[i].kind
        words = kind if more is None else f"{kind} {more.phrase(facts.kinds, kind)}"
        program = ("exists", (noun, more) if more else (noun,))
        return self.finish("existence", f"Is there {article(words)}?", program, ["yes", "no"])

    def comparison(self) -> Question | None:
        if self.pick([True, False]):
            sizes = self.scene.relation("larger than") | self.scene.relation("smaller than")
            for a, b in self.shuffled(np.argwhere(sizes).tolist()):
                one, other = self.name(a), self.name(b)
                if one and other:
                    return self.finish("comparison", f"Is {one} larger than {other}?", ("larger", a, b), ["yes", "no"])
        kinds = list(self.facts.kinds)
        if len(kinds) < 2:
            return None
        first = self.pick(kinds)
        second = self.pick([kind for kind in kinds if kind != first])
        text = f"Are there more {plural(first)} than {plural(second)}?"
        return self.finish("comparison", text, ("more", first, second), ["yes", "no"])

    def relation(self) -> Question | None:
        """Half the time about a pair that is so related, half about one in the opposite relation."""
        told = RELATIONS[: RELATIONS.index("touching")]
        turned = self.pick([0, 1])
        for r, a, b in self.shuffled(np.argwhere(self.scene.relations[: len(told)]).tolist()):
            one, other = self.name(a), self.name(b)
            if one and other:
                relation = told[r ^ turned]  # the list has each relation beside its opposite
                return self.finish("relation", f"Is {one} {relation} {other}?", ("relation", relation, a, b), ["yes", "no"])
        return None

    def place(self) -> Question | None:
        for i in self.shuffled(np.flatnonzero(self.scene.on >= 0).tolist()):
            what = self.name(i, "on")
            if what:
                return self.finish("place", f"What is {what} on?", ("on", i), list(STUFF_NAMES))
        return None


def ask(scene: Scene, facts: Facts | None = None) -> list[Question]:
    """One question of each form that the scene allows."""
    facts = facts or Facts(scene)
    asker = _Asker(scene, facts)
    makers: dict[str, Callable[[], Question | None]] = {
        "count": asker.count,
        "colour": lambda: asker.part("colour", list(COLOURS)),
        "shape": lambda: asker.part("shape", list(SHAPES)),
        "existence": asker.existence,
        "comparison": asker.comparison,
        "relation": asker.relation,
        "place": asker.place,
    }
    found = []
    for row, form in enumerate(FORMS):
        asker.position = (row, 0)
        question = makers[form]()
        if question is not None:
            found.append(question)
    return found


def _yes(truth: bool) -> str:
    return "yes" if truth else "no"
