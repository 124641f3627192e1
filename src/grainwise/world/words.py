"""Words for what the world holds: plurals, numbers, articles, and the phrase for one attribute of one part."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
SINGULAR = {
    "legs": "leg",
    "wheels": "wheel",
    "petals": "petal",
    "spots": "spot",
    "antennae": "antenna",
    "feet": "foot",
    "feelers": "feeler",
}


def plural(noun: str) -> str:
    """ "birds", "fish", "red fish"."""
    return noun if noun.endswith("fish") else noun + "s"


def article(phrase: str) -> str:
    """The phrase with "a" or "an" before it."""
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def counted(number: int, noun: str) -> str:
    """ "a bird", "two birds"; `noun` may carry adjectives."""
    return article(noun) if number == 1 else f"{NUMBERS[number]} {plural(noun)}"


def listed(phrases: Sequence[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return phrases[0] if len(phrases) == 1 else ", ".join(phrases[:-1]) + " and " + phrases[-1]


def part_noun(name: str, count: int) -> str:
    """The part's name in the number that fits: "leg", "legs", "marks"."""
    one = SINGULAR.get(name, name)
    if count == 1:
        return one
    return name if name in SINGULAR else name + "s"


@lru_cache(maxsize=8192)
def with_part(name: str, count: int, attribute: str, value: str | int) -> str:
    """ "with a red beak", "with round eyes", "with three legs": one attribute of a part of which there are `count`."""
    noun = part_noun(name, count)
    if attribute == "count":
        return f"with {NUMBERS[count]} {noun}"
    return "with " + (article(f"{value} {noun}") if count == 1 else f"{value} {noun}")
