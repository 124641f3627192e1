"""Stuff: textured surfaces that fill a canvas or a region of it."""

from __future__ import annotations

import numpy as np

from grainwise.world.counter_random import Draws

STUFF: dict[str, tuple[tuple[int, int, int], tuple[int, int, int]]] = {
    "grass": ((96, 140, 70), (128, 168, 90)),
    "sand": ((214, 190, 140), (230, 210, 168)),
    "water": ((92, 140, 178), (128, 172, 204)),
    "snow": ((222, 228, 234), (242, 244, 248)),
    "rock": ((120, 116, 112), (156, 150, 144)),
    "soil": ((110, 82, 60), (142, 110, 84)),
    "cloth": ((168, 130, 150), (190, 156, 172)),
    "sky": ((168, 198, 226), (206, 222, 238)),
}
STUFF_NAMES = tuple(STUFF)


def smooth_noise(draws: Draws, name: str, size: int, cells: int) -> np.ndarray:
    """float32 (n, size, size) in [0, 1]: values on a grid of `cells` + 1 points a side, interpolated linearly between them."""
    grid = draws.uniform(name, size=(cells + 1, cells + 1))
    place = (np.arange(size, dtype=np.float32) + np.float32(0.5)) * np.float32(cells / size)
    low = place.astype(np.int64)
    part = place - low
    rows = grid[:, low] + part[None, :, None] * (grid[:, low + 1] - grid[:, low])
    return rows[:, :, low] + part * (rows[:, :, low + 1] - rows[:, :, low])


def surface(draws: Draws, kinds: np.ndarray, size: int, name: str = "stuff") -> np.ndarray:
    """float32 (n, size, size, 3): item i covered with stuff `STUFF_NAMES[kinds[i]]`, its two colours mixed by noise of its
    own.
    """
    colours = np.array([STUFF[kind] for kind in STUFF_NAMES], np.float32)[kinds] / 255
    coarse = smooth_noise(draws, name + " coarse", size, 4)
    fine = smooth_noise(draws, name + " fine", size, max(size // 4, 1))
    tint = 1 + np.float32(0.12) * (draws.uniform(name + " tint", size=(3,)) - np.float32(0.5))
    mixed = np.float32(0.6) * coarse + np.float32(0.4) * fine
    low, high = colours[:, 0] * tint, colours[:, 1] * tint
    return np.clip(low[:, None, None] + mixed[..., None] * (high - low)[:, None, None], 0, 1)
