"""What a part can look like: its outline, colour and texture, as functions of local coordinates.

An outline is a function f(u, v) of float32 arrays that is negative inside, with the part's box at [-1, 1] x [-1, 1].
Only +, -, *, /, min, max, floor and square root occur: IEEE 754 fixes their results, so pictures agree between machines.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Outline = Callable[[np.ndarray, np.ndarray], np.ndarray]


def _round(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.sqrt(u * u + v * v) - 1


def _square(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.maximum(np.abs(u), np.abs(v)) - np.float32(0.9)


def _diamond(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return (np.abs(u) + np.abs(v) - 1) * np.float32(0.7)


def _triangle(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.maximum(v - np.float32(0.85), np.abs(u) * np.float32(0.87) - v * np.float32(0.5) - np.float32(0.45))


def _ring(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.abs(np.sqrt(u * u + v * v) - np.float32(0.7)) - np.float32(0.3)


def _crescent(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    bite = np.sqrt((u - np.float32(0.55)) ** 2 + v * v)
    return np.maximum(np.sqrt(u * u + v * v) - 1, np.float32(0.75) - bite)


def _cross(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    a, b = np.abs(u), np.abs(v)
    arm = np.float32(0.36)
    return np.minimum(np.maximum(a - 1, b - arm), np.maximum(a - arm, b - 1))


def _leaf(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Two circles' common part: pointed at both ends of u."""
    return np.sqrt(u * u + (np.abs(v) * np.float32(0.5) + np.float32(0.75)) ** 2) - np.float32(1.25)


OUTLINES: dict[str, Outline] = {
    "round": _round,
    "square": _square,
    "diamond": _diamond,
    "triangular": _triangle,
    "ring-shaped": _ring,
    "crescent": _crescent,
    "cross-shaped": _cross,
    "leaf-shaped": _leaf,
}
SHAPES = tuple(OUTLINES)

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (208, 42, 40),
    "orange": (240, 134, 30),
    "yellow": (246, 214, 54),
    "green": (58, 150, 62),
    "teal": (36, 168, 168),
    "blue": (44, 82, 204),
    "purple": (132, 56, 168),
    "pink": (240, 140, 186),
    "brown": (122, 78, 44),
    "white": (240, 240, 236),
    "black": (34, 34, 38),
    "grey": (136, 138, 142),
}

TEXTURES = ("plain", "striped", "banded", "dotted", "checked")
SIZES: dict[str, float] = {"small": 0.72, "medium": 1.0, "large": 1.36}


def texture(kind: int, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Where the second colour of a texture shows: bool, the shape of `u`."""
    name = TEXTURES[kind]
    if name == "striped":
        return np.floor(u * np.float32(2.5) + np.float32(0.25)) % 2 == 1
    if name == "banded":
        return np.floor(v * np.float32(2.5) + np.float32(0.25)) % 2 == 1
    if name == "checked":
        return (np.floor(u * np.float32(2.2)) + np.floor(v * np.float32(2.2))) % 2 == 1
    if name == "dotted":
        a, b = u * 2, v * 2
        a, b = a - np.floor(a) - np.float32(0.5), b - np.floor(b) - np.float32(0.5)
        return a * a + b * b < np.float32(0.075)
    return np.zeros(u.shape, bool)
