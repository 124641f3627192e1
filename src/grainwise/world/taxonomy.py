"""Who lives in the world: genera, their species and their varieties, drawn from a seed.

A genus fixes a body plan and the attributes of every part. Its species share all of them except one attribute of one small
part, the key; any two siblings differ in exactly that. Varieties of a species share even that and differ in the shade of a
second small part only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from grainwise.world.body_plans import PLANS, Slot
from grainwise.world.counter_random import Draws
from grainwise.world.shapes import COLOURS, SIZES, TEXTURES

if TYPE_CHECKING:
    from grainwise.world.individuals import Individuals

COUNT_WORDS = ("no", "one", "two", "three", "four", "five", "six")
PLURALS = ("legs", "petals", "feet", "antennae", "wheels", "feelers", "spots")
ATTRIBUTES = ("colour", "shape", "count", "size", "texture")
SYLLABLES = (
    "ba",
    "cor",
    "du",
    "fen",
    "gil",
    "ha",
    "kes",
    "lor",
    "mi",
    "nar",
    "or",
    "pel",
    "qua",
    "ris",
    "sta",
    "tul",
    "ve",
    "wim",
    "xa",
    "zo",
)
LEVELS = ("coarse", "medium", "fine")


@dataclass(frozen=True)
class Part:
    """One part of a species: where it sits (`slot`) and what it looks like."""

    slot: Slot
    shape: str
    colour: str
    texture: str
    second: str
    count: int
    size: str

    @property
    def name(self) -> str:
        return self.slot.name

    def attribute(self, name: str) -> str | int:
        """The value of one of `ATTRIBUTES`."""
        return getattr(self, name)

    @property
    def plural(self) -> bool:
        """Whether there are several, or the name says so."""
        return self.count > 1 or self.name in PLURALS

    @property
    def noun(self) -> str:
        """The name, in the plural where there are several."""
        return self.name + "s" if self.count > 1 and self.name not in PLURALS else self.name

    def phrase(self, *, fine: bool = True) -> str:
        """ "three small yellow triangular legs"; without `fine`, "yellow legs"."""
        noun = self.noun
        if not fine:
            return f"{self.colour} {noun}"
        look = self.colour if self.texture == "plain" else f"{self.colour} and {self.second} {self.texture}"
        size = "" if self.size == "medium" else f"{self.size} "
        number = f"{COUNT_WORDS[self.count]} " if self.count > 1 else ""
        return f"{number}{size}{look} {self.shape} {noun}"


@dataclass(frozen=True)
class Species:
    """A species: `index` in the world, `genus` it belongs to, parts in the order of their plan.

    `key` is (index of the part, attribute) in which it differs from its siblings; `shaded` is the index of the part whose
    shade tells its varieties apart.
    """

    index: int
    genus: int
    name: str
    kind: str
    parts: tuple[Part, ...]
    key: tuple[int, str]
    shaded: int

    @property
    def key_part(self) -> Part:
        return self.parts[self.key[0]]

    def attributes(self) -> dict[str, str | int]:
        """{"beak colour": "red", ...}: every attribute of every part."""
        return {f"{part.name} {name}": part.attribute(name) for part in self.parts for name in ATTRIBUTES}

    def describe(self, level: str = "fine") -> str:
        """A sentence about the species at one granularity.

        coarse: the kind alone; medium: the kind and the colours of its two main parts; fine: every attribute of every part.
        """
        article = "an" if self.kind[0] in "aeiou" else "a"
        if level == "coarse":
            return f"{article} {self.kind}"
        if level == "medium":
            first, second = (with_article(part.phrase(fine=False), part) for part in self.parts[:2])
            return f"{article} {self.kind} with {first} and {second}"
        if level != "fine":
            raise ValueError(f"level is {level!r}; choose one of {', '.join(LEVELS)}")
        phrases = [with_article(part.phrase(), part) for part in self.parts]
        return f"{article} {self.kind} with {', '.join(phrases[:-1])} and {phrases[-1]}"

    def unlike(self, other: Species) -> str:
        """The contrast with a sibling: "unlike Velora tarni, its beak is red, not blue"."""
        if other.genus != self.genus or other.index == self.index:
            raise ValueError(f"{other.name} is no sibling of {self.name}; contrasts are between two species of one genus")
        part, attribute = self.key
        mine, its = self.parts[part], other.parts[part]
        verb = "are" if mine.plural else "is"
        if attribute == "count":
            return f"unlike {other.name}, it has {COUNT_WORDS[mine.count]} {mine.noun}, not {COUNT_WORDS[its.count]}"
        return f"unlike {other.name}, its {mine.noun} {verb} {mine.attribute(attribute)}, not {its.attribute(attribute)}"


def with_article(phrase: str, part: Part) -> str:
    """Put the article before the phrase of a single part."""
    if part.plural:
        return phrase
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


@dataclass(frozen=True)
class Variety:
    """A variety of a species: the shade of one small part, from -1 (darkest) to 1 (lightest)."""

    species: int
    index: int
    name: str
    part: str
    shade: float


@dataclass(frozen=True)
class World:
    """A world of `genera` x `species` x `varieties`, drawn from `seed`.

    Args:
        seed: two worlds of one seed are the same, in every process and on every machine.
        genera: how many genera; their kinds (bird, fish, truck ...) take turns.
        species: species per genus, at most 12 (the number of colours); a genus with more than its key can take raises.
        varieties: varieties per species.
        kinds: the body plans to use; all by default.

    Raises:
        ValueError: an unknown kind, or more species than any attribute can tell apart.
    """

    seed: int = 0
    genera: int = 8
    species_per_genus: int = 4
    varieties: int = 2
    kinds: tuple[str, ...] = tuple(PLANS)

    def __post_init__(self) -> None:
        unknown = [kind for kind in self.kinds if kind not in PLANS]
        if unknown or not self.kinds:
            raise ValueError(f"kinds {unknown} are unknown; choose from {', '.join(PLANS)}")
        if not 1 <= self.species_per_genus <= len(COLOURS) - 1:
            raise ValueError(
                f"species_per_genus is {self.species_per_genus}; a key can tell 1 to {len(COLOURS) - 1} siblings apart"
            )
        if self.genera < 1 or self.varieties < 1:
            raise ValueError(f"a world needs at least one genus and one variety, got {self.genera} and {self.varieties}")

    @cached_property
    def species(self) -> tuple[Species, ...]:
        """All species, those of genus 0 first."""
        return tuple(species for genus in range(self.genera) for species in self._genus(genus))

    def __len__(self) -> int:
        return self.genera * self.species_per_genus

    def siblings(self, species: int) -> tuple[Species, ...]:
        """The other species of the same genus."""
        genus = self.species[species].genus
        return tuple(one for one in self._members(genus) if one.index != species)

    def variety(self, species: int, index: int) -> Variety:
        """Variety `index` of a species."""
        if not 0 <= index < self.varieties:
            raise ValueError(f"variety {index} of {self.varieties}")
        which = self.species[species]
        shade = 0.0 if self.varieties == 1 else 2 * index / (self.varieties - 1) - 1
        word = "light" if shade > 0 else "dark" if shade < 0 else "plain"
        part = which.parts[which.shaded].name
        return Variety(species, index, f"{which.name} var. {word}-{part.replace(' ', '-')}", part, shade)

    def draw(self, labels: Any, individuals: Any, **options: Any) -> Individuals:
        """Pictures of individuals; see `grainwise.world.individuals.draw_individuals`."""
        from grainwise.world.individuals import draw_individuals

        return draw_individuals(self, labels, individuals, **options)

    def _members(self, genus: int) -> tuple[Species, ...]:
        return self.species[genus * self.species_per_genus : (genus + 1) * self.species_per_genus]

    def _genus(self, genus: int) -> Iterator[Species]:
        """The species of one genus: common parts, then the key's values."""
        draws = Draws(self.seed, genus)
        kind = self.kinds[genus % len(self.kinds)]
        plan = PLANS[kind]
        slots = plan[: 4 + int(draws.integers("parts", len(plan) - 3)[0])]
        parts = tuple(_draw_part(draws, slot, position) for position, slot in enumerate(slots))
        parts = _tell_apart(draws, parts)
        key, shaded = _choose_key(draws, parts, self.species_per_genus)
        values = _values(draws, parts, key, self.species_per_genus)
        first = _name(draws, "genus").capitalize()
        for number, value in enumerate(values):
            index = genus * self.species_per_genus + number
            name = f"{first} {_name(Draws(self.seed, genus, number), 'species')}"
            part = replace(parts[key[0]], **{key[1]: value})  # type: ignore[arg-type]
            yield Species(index, genus, name, kind, (*parts[: key[0]], part, *parts[key[0] + 1 :]), key, shaded)


def _name(draws: Draws, what: str) -> str:
    count = 2 + int(draws.integers(what + " length", 2)[0])
    return "".join(SYLLABLES[i] for i in draws.integers(what, len(SYLLABLES), (count,))[0])


def _draw_part(draws: Draws, slot: Slot, position: int) -> Part:
    """The attributes of one part, common to a genus."""
    name = f"part {position}"
    colours = list(COLOURS)
    first, second = draws.order(name + " colours", len(colours))[0, :2]
    big = slot.half[0] * slot.half[1] > 0.12
    texture = TEXTURES[int(draws.integers(name + " texture", len(TEXTURES))[0])] if big else "plain"
    sizes = list(SIZES)
    return Part(
        slot=slot,
        shape=slot.shapes[int(draws.integers(name + " shape", len(slot.shapes))[0])],
        colour=colours[first],
        texture=texture,
        second=colours[second],
        count=slot.counts[int(draws.integers(name + " count", len(slot.counts))[0])],
        size=sizes[1 + int(draws.integers(name + " size", 2)[0])] if slot.small else "medium",
    )


def _tell_apart(draws: Draws, parts: tuple[Part, ...]) -> tuple[Part, ...]:
    """Give each part a colour that no earlier part has, so that a small part is seen on the one behind it."""
    taken: set[str] = set()
    result = []
    for position, part in enumerate(parts):
        colour = part.colour
        if colour in taken:
            colour = next(
                list(COLOURS)[i] for i in draws.order(f"recolour {position}", len(COLOURS))[0] if list(COLOURS)[i] not in taken
            )
        second = part.second
        if second == colour:
            second = "white" if colour != "white" else "black"
        taken.add(colour)
        result.append(replace(part, colour=colour, second=second))
    return tuple(result)


def _options(part: Part, attribute: str, parts: tuple[Part, ...]) -> list[str | int]:
    """The values by which `attribute` of a small part may tell siblings apart."""
    if attribute == "colour":
        body = {parts[0].colour, parts[0].second}
        return [colour for colour in COLOURS if colour not in body]
    if attribute == "shape":
        return list(part.slot.shapes)
    if attribute == "count":
        return list(part.slot.counts)
    return list(SIZES)


def _choose_key(draws: Draws, parts: tuple[Part, ...], species: int) -> tuple[tuple[int, str], int]:
    """Which (part, attribute) decides between siblings, and which other small part carries the varieties' shade."""
    small = [index for index, part in enumerate(parts) if part.slot.small]
    keys = [
        (index, attribute)
        for index in small
        for attribute in ("colour", "shape", "count", "size")
        if len(_options(parts[index], attribute, parts)) >= species
    ]
    key = keys[int(draws.integers("key", len(keys))[0])]
    others = [index for index in small if index != key[0]] or [0]
    return key, others[int(draws.integers("shaded", len(others))[0])]


def _values(draws: Draws, parts: tuple[Part, ...], key: tuple[int, str], species: int) -> list[str | int]:
    options = _options(parts[key[0]], key[1], parts)
    return [options[i] for i in draws.order("values", len(options))[0, :species]]
