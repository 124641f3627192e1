"""What individuals do: sub-actions as functions of time, actions that differ in one detail, and expressions of one part.

A sub-action maps its progress p in [0, 1] to a `Motion`: changes of the pose and of groups of parts. An action is two
sub-actions; the actions of a family share both and differ only in their order, in how often one happens, or in how long it
takes. An expression deforms one part, at one of three intensities, and passes through onset, apex and offset.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import numpy as np

from grainwise.world.counter_random import Draws
from grainwise.world.individuals import cos_sin, species_table
from grainwise.world.taxonomy import World

HEADS: dict[str, tuple[str, ...]] = {
    "bird": ("head", "eye", "beak", "crest"),
    "fish": ("eye", "mouth", "whisker"),
    "beetle": ("head", "horn", "eye", "antennae"),
    "flower": ("petals", "disc", "heart"),
    "teapot": ("lid", "knob"),
    "truck": ("cab", "window", "lamp", "chimney"),
    "snail": ("head", "feelers", "eye"),
    "mushroom": ("cap", "spots", "knob"),
}
LEGS = ("legs", "wheels", "feet", "foot", "belly fin")
FACES: dict[str, tuple[str, ...]] = {
    "bird": ("eye", "crest", "beak", "tail"),
    "fish": ("eye", "mouth", "back fin"),
    "beetle": ("eye", "horn", "mark"),
    "flower": ("heart", "leaf", "bud"),
    "teapot": ("emblem", "tag", "knob"),
    "truck": ("window", "lamp", "sign", "flag"),
    "snail": ("eye", "mark", "swirl"),
    "mushroom": ("grub", "knob", "spots"),
}


@dataclass
class Motion:
    """Changes of the pose and of parts, every field a float32 array of one shape.

    dx, dy: body units in the picture (right, down); turn: degrees, forward positive; azimuth: degrees; grow_x, grow_y: added
    to the scale along the body and across it; head_x, head_y: the head group's shift in body units, forward and down; swing:
    the legs' shift forward; shut: how far the face part is closed, 0 to 1.
    """

    dx: np.ndarray = field(default_factory=lambda: np.zeros((), np.float32))
    dy: np.ndarray = field(default_factory=lambda: np.zeros((), np.float32))
    turn: np.ndarray = field(default_factory=lambda: np.zeros((), np.float32))
    azimuth: np.ndarray = field(default_factory=lambda: np.zeros((), np.float32))
    grow_x: np.ndarray = field(default_factory=lambda: np.zeros((), np.float32))
    grow_y: np.ndarray = field(default_factory=lambda: np.zeros((), np.float32))
    head_x: np.ndarray = field(default_factory=lambda: np.zeros((), np.float32))
    head_y: np.ndarray = field(default_factory=lambda: np.zeros((), np.float32))
    swing: np.ndarray = field(default_factory=lambda: np.zeros((), np.float32))
    shut: np.ndarray = field(default_factory=lambda: np.zeros((), np.float32))


def _bump(p: np.ndarray) -> np.ndarray:
    """0 at both ends, 1 in the middle."""
    return 4 * p * (1 - p)


def _smooth(p: np.ndarray) -> np.ndarray:
    """From 0 to 1, slow at both ends."""
    return p * p * (3 - 2 * p)


def _wave(p: np.ndarray) -> np.ndarray:
    """One period of a sine."""
    return cos_sin(360 * p)[1]


def _walk(sign: float) -> Callable[[np.ndarray], Motion]:
    def motion(p: np.ndarray) -> Motion:
        step = _wave(p)
        return Motion(dx=np.float32(0.45 * sign) * _smooth(p), dy=np.float32(-0.08) * _bump(p), swing=np.float32(0.14) * step)

    return motion


def _roll(sign: float) -> Callable[[np.ndarray], Motion]:
    return lambda p: Motion(turn=np.float32(360 * sign) * _smooth(p))


def _nod(p: np.ndarray) -> Motion:
    bump = _bump(p)
    return Motion(turn=np.float32(16) * bump, head_x=np.float32(0.08) * bump, head_y=np.float32(0.2) * bump)


def _grow(x: float, y: float) -> Callable[[np.ndarray], Motion]:
    """Grow or shrink about the feet, which stand about 0.9 units below the centre."""

    def motion(p: np.ndarray) -> Motion:
        bump = _bump(p)
        return Motion(grow_x=np.float32(x) * bump, grow_y=np.float32(y) * bump, dy=np.float32(-0.9 * y) * bump)

    return motion


@dataclass(frozen=True)
class SubAction:
    """One movement: its verb in the third person, and its motion as a function of progress."""

    name: str
    verb: str
    motion: Callable[[np.ndarray], Motion]


SUB_ACTIONS: dict[str, SubAction] = {
    one.name: one
    for one in (
        SubAction("hop", "hops", lambda p: Motion(dy=np.float32(-0.75) * _bump(p))),
        SubAction("nod", "nods", _nod),
        SubAction("spin", "spins", lambda p: Motion(azimuth=np.float32(360) * _smooth(p))),
        SubAction("roll forward", "rolls forward", _roll(1)),
        SubAction("roll backward", "rolls backward", _roll(-1)),
        SubAction("stretch", "stretches", _grow(-0.2, 0.45)),
        SubAction("crouch", "crouches", _grow(0.22, -0.42)),
        SubAction("swell", "swells", _grow(0.35, 0.35)),
        SubAction("shake", "shakes", lambda p: Motion(dx=np.float32(0.26) * _wave(p))),
        SubAction("sway", "sways", lambda p: Motion(turn=np.float32(20) * _wave(p))),
        SubAction("walk left", "walks left", _walk(-1)),
        SubAction("walk right", "walks right", _walk(1)),
        SubAction("blink", "blinks", lambda p: Motion(shut=_bump(p))),
    )
}
SUB_NAMES = tuple(SUB_ACTIONS)


@dataclass(frozen=True)
class Step:
    """A sub-action, how often it happens in a row, and whether each time takes twice as long."""

    sub: str
    count: int = 1
    slow: bool = False

    def phrase(self, *, fine: bool = True) -> str:
        """ "hops twice", "slowly nods once"; without `fine`, "hops"."""
        verb = SUB_ACTIONS[self.sub].verb
        if not fine:
            return verb
        return f"{'slowly ' if self.slow else ''}{verb} {'once' if self.count == 1 else 'twice'}"

    @property
    def units(self) -> int:
        """How many units of time it takes."""
        return self.count * (2 if self.slow else 1)


FAMILIES: tuple[tuple[str, str], ...] = (
    ("hop", "nod"),
    ("spin", "stretch"),
    ("shake", "crouch"),
    ("sway", "blink"),
    ("walk left", "nod"),
    ("walk right", "nod"),
    ("roll forward", "swell"),
    ("roll backward", "swell"),
)
VARIANTS = ("base", "order", "first twice", "second twice", "first slow", "second slow")


@dataclass(frozen=True)
class Action:
    """One fine-grained class: `family` indexes `FAMILIES`, `variant` says how it differs from the family's base."""

    index: int
    family: int
    variant: str

    @cached_property
    def steps(self) -> tuple[Step, Step]:
        """The two steps in the order in which they happen."""
        first, second = FAMILIES[self.family]
        one = Step(first, 2 if self.variant == "first twice" else 1, self.variant == "first slow")
        two = Step(second, 2 if self.variant == "second twice" else 1, self.variant == "second slow")
        return (two, one) if self.variant == "order" else (one, two)

    def phrase(self, level: str = "fine") -> str:
        """What is done, at one granularity.

        coarse: the first sub-action of the family alone; medium: both, without order, count or pace; fine: everything.
        """
        if level == "coarse":
            return SUB_ACTIONS[FAMILIES[self.family][0]].verb
        if level == "medium":
            return " and ".join(SUB_ACTIONS[name].verb for name in FAMILIES[self.family])
        if level != "fine":
            raise ValueError(f"level is {level!r}; choose one of coarse, medium, fine")
        return f"{self.steps[0].phrase()}, then {self.steps[1].phrase()}"

    @property
    def siblings(self) -> tuple[Action, ...]:
        """The other actions of the family."""
        return tuple(one for one in ACTIONS if one.family == self.family and one.index != self.index)

    def unlike(self, other: Action) -> str:
        """The contrast with a sibling: "it hops once, then nods once, not hops twice, then nods once"."""
        if other.family != self.family or other.index == self.index:
            raise ValueError(
                f"{other.phrase()!r} is no sibling of {self.phrase()!r}; contrasts are between two actions of one family"
            )
        return f"it {self.phrase()}, not {other.phrase()}"


ACTIONS: tuple[Action, ...] = tuple(
    Action(number * len(VARIANTS) + place, number, variant)
    for number in range(len(FAMILIES))
    for place, variant in enumerate(VARIANTS)
)
MOST_UNITS = max(sum(step.units for step in action.steps) for action in ACTIONS)


@dataclass(frozen=True)
class Expression:
    """How one part deforms at full strength: its shift in body units and the factors on its half sizes."""

    index: int
    name: str
    shift: tuple[float, float] = (0.0, 0.0)
    scale: tuple[float, float] = (1.0, 1.0)


EXPRESSIONS: tuple[Expression, ...] = (
    Expression(0, "raised", (0.0, -0.2)),
    Expression(1, "lowered", (0.0, 0.2)),
    Expression(2, "raised and widened", (0.0, -0.2), (1.7, 1.0)),
    Expression(3, "lowered and widened", (0.0, 0.2), (1.7, 1.0)),
    Expression(4, "swollen", scale=(1.7, 1.7)),
    Expression(5, "shrunken", scale=(0.45, 0.45)),
    Expression(6, "pushed forward", (0.2, 0.0)),
    Expression(7, "pulled back", (-0.2, 0.0)),
)
INTENSITIES: dict[str, float] = {"slightly": 0.45, "clearly": 0.7, "strongly": 1.0}
PHASES = ("neutral", "onset", "apex", "offset")


@dataclass(frozen=True)
class Groups:
    """Which stamps of a species move together, bool (species, copies) each.

    `face` marks the part that blinks and shows expressions; `face_part` is its number in each species, from 1.
    """

    head: np.ndarray
    legs: np.ndarray
    face: np.ndarray
    face_part: tuple[int, ...]


@lru_cache(maxsize=16)
def groups_of(world: World) -> Groups:
    """The groups of a world's species (made once)."""
    part = species_table(world).part
    head, legs, face = (np.zeros(part.shape, bool) for _ in range(3))
    chosen = []
    for species in world.species:
        names, own = [one.name for one in species.parts], part[species.index]
        head[species.index] = np.isin(own, [k for k, name in enumerate(names, 1) if name in HEADS[species.kind]])
        legs[species.index] = np.isin(own, [k for k, name in enumerate(names, 1) if name in LEGS])
        chosen.append(1 + next(names.index(name) for name in FACES[species.kind] if name in names))
        face[species.index] = own == chosen[-1]
    return Groups(head, legs, face, tuple(chosen))


def total_motion(subs: np.ndarray, progress: np.ndarray) -> Motion:
    """Add up what sub-actions do.

    Args:
        subs: int (n, slots), index into `SUB_NAMES`, -1 for an empty slot.
        progress: float32 (n, frames, slots) in [0, 1]: how far each one is.

    Returns:
        A `Motion` of arrays (n, frames). What a finished sub-action leaves behind (a step to the left) stays.
    """
    shape = progress.shape[:2]
    total = {name: np.zeros(shape, np.float32) for name in Motion.__dataclass_fields__}
    for index in np.unique(subs[subs >= 0]):
        row, slot = np.nonzero(subs == index)
        motion = SUB_ACTIONS[SUB_NAMES[index]].motion(progress[row, :, slot])
        for name, channel in total.items():
            value = getattr(motion, name)
            if value.ndim:
                np.add.at(channel, row, value)
    return Motion(**total)


def schedule(draws: Draws, actions: np.ndarray, frames: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """When everything happens: sub-action, first frame and length of every repetition, int64 (n, a, repetitions) each.

    A unit lasts about a quarter of the clip, the same within one actor; what is left is shared at random between the rest
    before the first step, the pause between the two and the rest at the end.
    """
    most = actions.shape[1]
    slots = max(sum(step.count for step in action.steps) for action in ACTIONS)
    table = np.full((len(ACTIONS) + 1, slots, 3), -1)  # sub-action, units, step; the last row is "stands still"
    for action in ACTIONS:
        rows = [(SUB_NAMES.index(s.sub), 2 if s.slow else 1, k) for k, s in enumerate(action.steps) for _ in range(s.count)]
        table[action.index, : len(rows)] = rows
    subs, units, step = (table[actions][..., k] for k in range(3))
    unit = np.maximum(2, np.floor(frames / 4 * draws.uniform("unit", 0.85, 1.1, (most,)))).astype(np.int64)
    unit = np.minimum(unit, frames // MOST_UNITS)
    lengths = np.where(units > 0, units * unit[..., None], 1)
    used = np.where(units > 0, lengths, 0)
    spare = frames - used.sum(-1)
    cuts = np.sort(draws.uniform("rest", size=(most, 2)), -1)
    lead = np.floor(cuts[..., 0] * (spare + 1)).astype(np.int64)
    pause = np.floor(cuts[..., 1] * (spare + 1)).astype(np.int64) - lead
    starts = lead[..., None] + np.cumsum(used, -1) - used + pause[..., None] * (step == 1)
    return subs, starts, lengths


def expression_edges(draws: Draws, frames: int) -> np.ndarray:
    """int64 (n, 4): where onset, apex and offset begin and where offset ends; at least one neutral frame before."""

    def lasting(name: str, low: float, high: float) -> np.ndarray:
        return np.maximum(2, np.floor(frames * draws.uniform(name, low, high))).astype(np.int64)

    onset, apex, offset = lasting("onset", 0.12, 0.25), lasting("apex", 0.12, 0.3), lasting("offset", 0.12, 0.25)
    spare = frames - 1 - onset - apex - offset
    start = 1 + np.floor(draws.uniform("start") * (spare + 1)).astype(np.int64)
    return np.stack([start, start + onset, start + onset + apex, start + onset + apex + offset], 1)
