"""How the kinds of things in the world are built: named parts with a place, a size and a way to repeat.

Coordinates are in units of the body's scale, x to the front, y down, z towards the viewer of the left side. A slot's `step`
is the offset between the copies of a repeated part; `ring` puts the copies on a circle of that radius instead. Parts come in
order of
importance: a genus keeps the first four to eight.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Slot:
    """One part of a plan.

    place: (x, y, z) of its centre; half: half sizes (x, y, z); shapes: outlines it may take; counts: how often it may repeat;
    small: whether it may be the part that decides between sibling species; tilt: degrees.
    """

    name: str
    place: tuple[float, float, float]
    half: tuple[float, float, float]
    shapes: tuple[str, ...]
    counts: tuple[int, ...] = (1,)
    step: tuple[float, float, float] = (0.0, 0.0, 0.0)
    ring: float = 0.0
    small: bool = False
    tilt: float = 0.0


BULKY = ("round", "square", "diamond", "leaf-shaped")
SMALL = ("round", "square", "diamond", "triangular", "crescent", "cross-shaped", "ring-shaped")

PLANS: dict[str, tuple[Slot, ...]] = {
    "bird": (
        Slot("body", (0, 0, 0), (0.62, 0.44, 0.36), ("round", "leaf-shaped")),
        Slot("head", (0.62, -0.42, 0), (0.29, 0.28, 0.26), ("round", "square")),
        Slot("eye", (0.68, -0.48, 0.24), (0.11, 0.11, 0.06), ("round", "diamond"), small=True),
        Slot("beak", (0.99, -0.38, 0), (0.22, 0.13, 0.1), ("leaf-shaped", "triangular", "diamond", "square"), small=True),
        Slot(
            "tail",
            (-0.82, -0.1, 0),
            (0.34, 0.17, 0.1),
            ("leaf-shaped", "triangular", "square", "crescent"),
            small=True,
            tilt=12,
        ),
        Slot("legs", (0.04, 0.66, 0), (0.07, 0.28, 0.07), ("square", "leaf-shaped"), (2, 3, 4), (0.24, 0, 0.05)),
        Slot("wing", (-0.12, -0.04, 0.33), (0.4, 0.22, 0.08), ("leaf-shaped", "round", "triangular"), tilt=-8),
        Slot("crest", (0.56, -0.8, 0), (0.13, 0.17, 0.08), SMALL, (1, 2, 3), (0.2, 0.03, 0), small=True),
    ),
    "fish": (
        Slot("body", (0, 0, 0), (0.78, 0.42, 0.28), ("leaf-shaped", "round", "diamond")),
        Slot("tail", (-0.9, 0, 0), (0.26, 0.36, 0.08), ("triangular", "crescent", "diamond", "square"), tilt=90),
        Slot("eye", (0.48, -0.1, 0.22), (0.11, 0.11, 0.06), ("round", "diamond", "ring-shaped"), small=True),
        Slot("back fin", (-0.05, -0.5, 0), (0.3, 0.19, 0.06), ("triangular", "leaf-shaped", "square"), small=True),
        Slot(
            "belly fin",
            (0.0, 0.46, 0),
            (0.2, 0.16, 0.06),
            ("triangular", "crescent", "square"),
            (1, 2),
            (0.42, 0, 0),
            small=True,
        ),
        Slot("spot", (-0.12, 0.0, 0.27), (0.12, 0.12, 0.05), SMALL, (1, 2, 3, 4), (0.27, 0, 0), small=True),
        Slot("mouth", (0.8, 0.08, 0), (0.12, 0.09, 0.1), ("round", "square", "crescent"), small=True),
        Slot("whisker", (0.74, 0.32, 0.1), (0.05, 0.2, 0.05), ("leaf-shaped", "square"), (1, 2, 3), (0.15, 0, -0.1)),
    ),
    "beetle": (
        Slot("shell", (-0.12, 0, 0), (0.62, 0.52, 0.4), ("round", "leaf-shaped", "square")),
        Slot("head", (0.62, 0.08, 0), (0.25, 0.25, 0.22), ("round", "diamond", "square")),
        Slot("legs", (-0.1, 0.6, 0.12), (0.06, 0.26, 0.06), ("square", "leaf-shaped"), (2, 3, 4), (0.3, 0, 0)),
        Slot("mark", (-0.14, -0.06, 0.39), (0.15, 0.15, 0.05), SMALL, (1, 2, 3), (0.34, 0, 0), small=True),
        Slot(
            "horn",
            (0.86, -0.24, 0),
            (0.1, 0.22, 0.08),
            ("triangular", "crescent", "leaf-shaped", "square"),
            small=True,
            tilt=25,
        ),
        Slot("eye", (0.68, 0.02, 0.2), (0.1, 0.1, 0.05), ("round", "square", "ring-shaped"), small=True),
        Slot("antennae", (0.62, -0.32, 0.05), (0.05, 0.24, 0.05), ("leaf-shaped", "square"), (1, 2, 3), (-0.16, 0, -0.05)),
        Slot("sting", (-0.86, 0.04, 0), (0.17, 0.1, 0.08), ("leaf-shaped", "triangular", "diamond"), small=True),
    ),
    "flower": (
        Slot("stem", (0, 0.62, 0), (0.07, 0.58, 0.07), ("square",)),
        Slot(
            "petals", (0, -0.3, 0.06), (0.27, 0.27, 0.08), ("round", "leaf-shaped", "diamond", "square"), (4, 5, 6), ring=0.42
        ),
        Slot("disc", (0, -0.3, 0.16), (0.26, 0.26, 0.1), ("round", "square", "diamond")),
        Slot("leaf", (0.3, 0.62, 0.02), (0.3, 0.15, 0.04), ("leaf-shaped", "round", "triangular"), small=True, tilt=-25),
        Slot("heart", (0, -0.3, 0.27), (0.13, 0.13, 0.05), SMALL, small=True),
        Slot("bud", (-0.32, 0.42, 0.02), (0.15, 0.18, 0.1), ("round", "leaf-shaped", "diamond", "triangular"), small=True),
        Slot(
            "thorn",
            (0.14, 0.98, 0),
            (0.11, 0.08, 0.05),
            ("triangular", "round", "diamond"),
            (1, 2, 3),
            (0, -0.2, 0),
            small=True,
        ),
        Slot("pot", (0, 1.16, 0.1), (0.3, 0.18, 0.2), ("square", "round")),
    ),
    "teapot": (
        Slot("body", (0, 0.1, 0), (0.62, 0.56, 0.5), ("round", "square", "diamond")),
        Slot("spout", (0.78, -0.04, 0), (0.3, 0.13, 0.12), ("leaf-shaped", "square", "triangular"), tilt=-35),
        Slot("handle", (-0.76, 0.06, 0), (0.27, 0.32, 0.08), ("ring-shaped", "square", "crescent")),
        Slot("knob", (0, -0.72, 0), (0.14, 0.14, 0.14), SMALL, small=True),
        Slot("lid", (0, -0.52, 0.04), (0.4, 0.12, 0.36), ("round", "square", "leaf-shaped")),
        Slot("emblem", (0.05, 0.08, 0.5), (0.17, 0.17, 0.05), SMALL, (1, 2, 3), (0.4, 0, 0), small=True),
        Slot("feet", (0, 0.72, 0.05), (0.11, 0.12, 0.1), ("square", "round", "triangular"), (2, 3, 4), (0.3, 0, 0), small=True),
        Slot("tag", (-0.44, 0.5, 0.36), (0.12, 0.14, 0.04), ("square", "diamond", "triangular", "round"), small=True),
    ),
    "truck": (
        Slot("box", (-0.24, -0.1, 0), (0.66, 0.42, 0.34), ("square",)),
        Slot("cab", (0.64, 0.06, 0), (0.29, 0.3, 0.32), ("square", "round")),
        Slot("wheels", (0.05, 0.44, 0.22), (0.18, 0.18, 0.06), ("round", "ring-shaped"), (2, 3, 4), (0.42, 0, 0)),
        Slot("window", (0.7, -0.02, 0.31), (0.14, 0.13, 0.03), ("square", "round", "diamond"), small=True),
        Slot("sign", (-0.24, -0.1, 0.33), (0.18, 0.18, 0.03), SMALL, (1, 2, 3), (0.38, 0, 0), small=True),
        Slot("lamp", (0.93, 0.2, 0), (0.1, 0.1, 0.1), ("round", "square", "triangular"), small=True),
        Slot(
            "chimney",
            (0.5, -0.42, 0),
            (0.09, 0.24, 0.09),
            ("square", "leaf-shaped", "triangular"),
            (1, 2),
            (0.22, 0, 0),
            small=True,
        ),
        Slot("flag", (-0.8, -0.64, 0), (0.15, 0.14, 0.04), ("square", "triangular", "diamond", "crescent"), small=True),
    ),
    "snail": (
        Slot("shell", (-0.18, -0.18, 0), (0.5, 0.5, 0.36), ("round", "diamond", "square")),
        Slot("foot", (0.05, 0.42, 0), (0.82, 0.17, 0.2), ("leaf-shaped", "round", "square")),
        Slot("head", (0.74, 0.16, 0), (0.22, 0.24, 0.18), ("round", "square", "diamond")),
        Slot("swirl", (-0.18, -0.18, 0.34), (0.2, 0.2, 0.05), SMALL, small=True),
        Slot("feelers", (0.72, -0.26, 0), (0.05, 0.24, 0.05), ("square", "leaf-shaped"), (1, 2, 3), (0.16, 0, 0.05)),
        Slot("eye", (0.8, 0.1, 0.17), (0.1, 0.1, 0.04), ("round", "ring-shaped", "square"), small=True),
        Slot("tail", (-0.82, 0.3, 0), (0.15, 0.17, 0.1), ("triangular", "round", "diamond", "crescent"), small=True),
        Slot("mark", (-0.02, 0.44, 0.2), (0.1, 0.1, 0.04), SMALL, (1, 2, 3), (0.3, 0, 0), small=True),
    ),
    "mushroom": (
        Slot("stalk", (0, 0.44, 0), (0.2, 0.5, 0.2), ("square", "leaf-shaped", "round")),
        Slot("cap", (0, -0.24, 0.02), (0.76, 0.38, 0.7), ("round", "triangular", "leaf-shaped")),
        Slot("spots", (0, -0.26, 0.68), (0.12, 0.12, 0.04), SMALL, (1, 2, 3, 4), (0.28, 0, 0), small=True),
        Slot("skirt", (0, 0.22, 0.05), (0.32, 0.1, 0.3), ("round", "square", "triangular"), small=True),
        Slot("knob", (0, -0.68, 0), (0.14, 0.15, 0.14), SMALL, small=True),
        Slot(
            "grub",
            (0.12, 0.56, 0.2),
            (0.12, 0.1, 0.05),
            ("round", "leaf-shaped", "crescent", "square"),
            (1, 2),
            (-0.02, 0.25, 0),
            small=True,
        ),
        Slot("sprout", (-0.42, 0.72, 0.02), (0.15, 0.2, 0.1), ("round", "triangular", "leaf-shaped", "diamond"), small=True),
        Slot("base", (0, 0.96, 0), (0.42, 0.11, 0.3), ("round", "square", "leaf-shaped")),
    ),
}
