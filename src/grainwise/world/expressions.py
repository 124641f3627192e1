"""Referring expressions that are true of the individuals they mean and of nobody else, checked by enumeration over the scene.

A predicate is true of some individuals of a scene; a set of individuals is an integer with bit i for individual i. An
expression is a kind with further predicates; it means the individuals of which all are true. `shortest` tries every
combination of predicates, fewest first, so that no shorter one of this vocabulary would do. A predicate about a part helps
to describe an individual only where that part is seen; it rules others out by what they are, seen or not.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import combinations
from typing import NamedTuple

import numpy as np

from grainwise.world.backgrounds import STUFF_NAMES
from grainwise.world.body_plans import PLANS
from grainwise.world.relations import RELATIONS
from grainwise.world.scenes import Scene
from grainwise.world.taxonomy import World
from grainwise.world.words import NUMBERS, plural, with_part

LONGEST = 4
SEEN = 3
SIDES = ("left", "right", "top", "bottom")
MOST = ("leftmost", "rightmost", "highest", "lowest", "largest", "smallest")
TOLD = ("colour", "shape", "count", "size", "texture")


class Predicate(NamedTuple):
    """family: "kind" (kind), "part" (part, attribute, value, count), "on" (stuff), "at" (side), "most" (which, kind) or
    "relation" (name, kind of the other); terms: the words in brackets."""

    family: str
    terms: tuple[str | int, ...]

    def phrase(self, kinds: dict[str, int], noun: str) -> str:
        """What follows the noun, a kind; `kinds`: the scene's kinds and their sets, to say "the" of the only one."""
        if self.family == "part":
            part, attribute, value, count = self.terms
            return with_part(str(part), int(count), str(attribute), value)
        if self.family == "on":
            return f"on the {self.terms[0]}"
        if self.family == "at":
            return f"at the {self.terms[0]}"
        if self.family == "relation":
            name, kind = self.terms
            which = "another" if kind == noun else "the" if kinds[str(kind)].bit_count() == 1 else "a"
            return f"{name} {which} {kind}"
        raise ValueError(f"a predicate of family {self.family!r} has no phrase of its own")


@dataclass(frozen=True)
class Expression:
    """form: "one", "group" or "none"; targets: the individuals meant."""

    text: str
    form: str
    predicates: tuple[Predicate, ...]
    targets: tuple[int, ...]


@lru_cache(maxsize=4096)
def part_predicates(world: World, label: int) -> tuple[tuple[int, Predicate], ...]:
    """(number of the part, predicate) for everything an expression may say about the parts of a species."""
    found = []
    for number, part in enumerate(world.species[label].parts):
        for attribute in TOLD:
            value = part.attribute(attribute)
            says = value not in ("medium", "plain") if attribute != "count" else len(part.slot.counts) > 1
            if says:
                found.append((number, Predicate("part", (part.name, attribute, value, part.count))))
    return tuple(found)


class Facts:
    """The truth of every predicate in one scene, as sets.

    true: the individuals of which it holds; tellable: those of them on which it can be seen. Both map predicates to sets.
    """

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.everybody = (1 << len(scene)) - 1
        self.kinds: dict[str, int] = {}
        self.true: dict[Predicate, int] = {}
        self.tellable: dict[Predicate, int] = {}
        self._add_kinds_and_parts()
        self._add_places()
        self._add_relations()

    @cached_property
    def told(self) -> list[list[Predicate]]:
        """For each individual the predicates, besides its kind, that can be seen to be true of it."""
        found: list[list[Predicate]] = [[] for _ in self.scene.species]
        for predicate, told in self.tellable.items():
            if predicate.family != "kind":
                for i in _members(told):
                    found[i].append(predicate)
        return found

    def holds(self, predicate: Predicate) -> int:
        """The set of which a predicate is true; empty for one that no individual of the scene makes true."""
        return self.true.get(predicate, 0)

    def meant(self, predicates: tuple[Predicate, ...]) -> int:
        """The set of which all are true."""
        found = self.everybody
        for predicate in predicates:
            found &= self.holds(predicate)
        return found

    def _add(self, predicate: Predicate, found: int, tellable: int | None = None) -> None:
        if found:
            self.true[predicate] = self.true.get(predicate, 0) | found
            self.tellable[predicate] = self.tellable.get(predicate, 0) | (found if tellable is None else tellable)

    def _add_kinds_and_parts(self) -> None:
        scene, areas = self.scene, self.scene.part_areas.tolist()
        for i, (label, species) in enumerate(zip(scene.labels.tolist(), scene.species, strict=True)):
            bit = 1 << i
            self.kinds[species.kind] = self.kinds.get(species.kind, 0) | bit
            for number, predicate in part_predicates(scene.world, label):
                count_seen = SEEN * (int(predicate.terms[3]) if predicate.terms[1] == "count" else 1)
                self._add(predicate, bit, bit if areas[i][number] >= count_seen else 0)
        for kind, found in self.kinds.items():
            self._add(Predicate("kind", (kind,)), found)

    def _add_places(self) -> None:
        scene = self.scene
        for i, stuff in enumerate(scene.on.tolist()):
            if stuff >= 0:
                self._add(Predicate("on", (STUFF_NAMES[stuff],)), 1 << i)
        boxes = scene.amodal_boxes / np.float32(scene.size)
        x, y = ((boxes[:, 0] + boxes[:, 2]) / 2).tolist(), ((boxes[:, 1] + boxes[:, 3]) / 2).tolist()
        for side, values in (("left", x), ("right", [1 - v for v in x]), ("top", y), ("bottom", [1 - v for v in y])):
            self._add(Predicate("at", (side,)), sum(1 << i for i, value in enumerate(values) if value < 0.3))
        areas = scene.amodal_areas.tolist()
        down, left, small = [1 - v for v in y], [1 - v for v in x], [-a for a in areas]
        for kind, found in self.kinds.items():
            members = [i for i in range(len(x)) if found >> i & 1]
            if len(members) < 2:
                continue
            for which, values in zip(MOST, (x, left, y, down, small, areas), strict=True):
                first, second = sorted(members, key=values.__getitem__)[:2]
                clear = values[second] - values[first] >= 0.08
                if which in ("largest", "smallest"):
                    clear = 4 * max(areas[first], areas[second]) >= 5 * min(areas[first], areas[second])
                if clear:
                    self._add(Predicate("most", (which, kind)), 1 << first)

    def _add_relations(self) -> None:
        rows = (self.scene.relations * (1 << np.arange(len(self.scene)))).sum(2).tolist()  # [r][a]: those to which a is in r
        for name, related in zip(RELATIONS, rows, strict=True):
            for kind, anchors in self.kinds.items():
                found = sum(1 << a for a, others in enumerate(related) if others & anchors)
                if found and found != self.everybody:
                    self._add(Predicate("relation", (name, kind)), found)


def phrase(facts: Facts, kind: str, predicates: tuple[Predicate, ...], *, many: bool = False) -> str:
    """The noun with its predicates: "leftmost bird", "birds with red beaks on the grass"."""
    order = ("part", "relation", "on", "at")
    most = [str(p.terms[0]) for p in predicates if p.family == "most"]
    rest = sorted((p for p in predicates if p.family in order), key=lambda p: order.index(p.family))
    following = ""
    for before, predicate in zip((None, *rest), rest, strict=False):
        words = predicate.phrase(facts.kinds, kind)
        joined = before is not None and before.family in ("part", "relation")  # "with a red beak and on the grass"
        following += (" and " if joined else " ") + words
    return " ".join([*most, plural(kind) if many else kind]) + following


def combinations_that_mean(facts: Facts, target: int, usable: list[Predicate]) -> Iterator[tuple[Predicate, ...]]:
    """All combinations of the least size that mean `target` alone, the kind first; none where no `LONGEST` predicates do."""
    bit = 1 << target
    noun = Predicate("kind", (facts.scene.species[target].kind,))
    base = facts.true[noun]
    if base == bit:
        yield (noun,)
        return
    useful = [(p, facts.true[p] & base) for p in usable]
    useful = [(p, found) for p, found in useful if found != base]
    alone = [p for p, found in useful if found == bit]
    if alone:
        yield from ((noun, p) for p in alone)
        return
    for size in range(2, LONGEST):
        hits = False
        for chosen in combinations(useful, size):
            left = base
            for _, found in chosen:
                left &= found
            if left == bit:
                hits = True
                yield (noun, *(p for p, _ in chosen))
        if hits:
            return


def usable(facts: Facts, target: int, without: tuple[str, ...] = ()) -> list[Predicate]:
    """The predicates that can be seen to be true of an individual; `without`: families, or names of parts, to leave out."""
    return [p for p in facts.told[target] if p.family not in without and p.terms[0] not in without]


def shortest(scene: Scene, target: int) -> list[Expression]:
    """Every shortest expression that means individual `target` alone; empty when the vocabulary cannot single it out."""
    if not 0 <= target < len(scene):
        raise ValueError(f"individual {target} is not in a scene of {len(scene)}")
    facts = Facts(scene)
    return [_one(facts, target, found) for found in combinations_that_mean(facts, target, usable(facts, target))]


def name(facts: Facts, target: int, chance: int, without: tuple[str, ...] = ()) -> Expression | None:
    """A shortest expression for one individual, or None; the integer `chance` decides between several."""
    options = usable(facts, target, without)
    start = chance % max(len(options), 1)
    options = options[start:] + options[:start]  # a different predicate comes first each time
    first = next(combinations_that_mean(facts, target, options), None)
    return None if first is None else _one(facts, target, first)


def _one(facts: Facts, target: int, predicates: tuple[Predicate, ...]) -> Expression:
    kind = str(predicates[0].terms[0])
    return Expression("the " + phrase(facts, kind, predicates[1:]), "one", predicates, (target,))


def refer(scene: Scene, facts: Facts | None = None) -> list[Expression | None]:
    """One shortest expression for each individual, chosen by the scene's key; None where there is none."""
    facts = facts or Facts(scene)
    chances = scene.draws.words("refer", (len(scene),)).tolist()[0]
    return [name(facts, target, chance) for target, chance in enumerate(chances)]


def groups(scene: Scene, facts: Facts | None = None) -> list[Expression]:
    """Expressions of a kind with at most one predicate that mean two individuals or more."""
    facts = facts or Facts(scene)
    found = []
    for kind, base in facts.kinds.items():
        noun = Predicate("kind", (kind,))
        chosen: dict[int, tuple[Predicate, ...]] = {base: (noun,)}
        for predicate, true in facts.true.items():
            meant = true & base
            said = predicate.family in ("part", "on", "at", "relation") and not meant & ~facts.tellable[predicate]
            if said and meant & (meant - 1) and meant not in chosen:
                chosen[meant] = (noun, predicate)
        for meant, predicates in chosen.items():
            number = meant.bit_count()
            if number >= 2:
                head = f"the {NUMBERS[number]}" if len(predicates) > 1 else "both" if number == 2 else "all"
                text = f"{head} {phrase(facts, kind, predicates[1:], many=True)}"
                found.append(Expression(text, "group", predicates, _members(meant)))
    return found


def absent(scene: Scene, facts: Facts | None = None) -> list[Expression]:
    """Expressions that sound as if they meant somebody and mean nobody: siblings' features, other ground, kinds that are
    not there."""
    facts = facts or Facts(scene)
    kinds = {species.kind for species in scene.world.species}
    found = [(kind, ()) for kind in PLANS if kind in kinds - set(facts.kinds)]
    maybe: dict[tuple[str, tuple[Predicate, ...]], None] = {}
    decided = bool((scene.on >= 0).all())  # nobody stands between two kinds of stuff
    for species in (scene.world.species[label] for label in sorted(set(scene.labels.tolist()))):
        for sibling in scene.world.siblings(species.index):
            part, attribute = sibling.key_part, sibling.key[1]
            value = part.attribute(attribute)
            if value != "medium":
                maybe[species.kind, (Predicate("part", (part.name, attribute, value, part.count)),)] = None
        for stuff in scene.stuff_seen if decided else ():
            maybe[species.kind, (Predicate("on", (stuff,)),)] = None
    found += [(kind, more) for kind, more in maybe if not facts.kinds[kind] & facts.meant(more)]
    nouns = [(kind, (Predicate("kind", (kind,)), *more), more) for kind, more in found]
    return [Expression("the " + phrase(facts, kind, more), "none", predicates, ()) for kind, predicates, more in nouns]


def _members(found: int) -> tuple[int, ...]:
    return tuple(i for i in range(found.bit_length()) if found >> i & 1)
