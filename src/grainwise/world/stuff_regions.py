"""Ground with several kinds of stuff: two to four textured regions with wavy borders, as bands or as patches.

Every pixel belongs to the nearest of a few sites. Stretching the distance turns patches (Voronoi cells) into bands; moving the
pixel by smooth noise before measuring makes the borders wavy. Region r of an item has the same extent at every picture size.
"""

from __future__ import annotations

import numpy as np

from grainwise.world.backgrounds import STUFF, STUFF_NAMES, smooth_noise
from grainwise.world.counter_random import Draws

# How much of each noise a stuff shows: clouds, grains, upright blades, level waves; and how strongly its two colours differ.
LOOK: dict[str, tuple[float, float, float, float, float]] = {
    "grass": (0.25, 0.15, 0.6, 0.0, 1.7),
    "sand": (0.3, 0.7, 0.0, 0.0, 1.5),
    "water": (0.3, 0.0, 0.0, 0.7, 1.7),
    "snow": (0.8, 0.2, 0.0, 0.0, 1.2),
    "rock": (0.5, 0.5, 0.0, 0.0, 2.0),
    "soil": (0.2, 0.6, 0.0, 0.2, 1.8),
    "cloth": (0.2, 0.0, 0.4, 0.4, 1.8),
    "sky": (0.75, 0.0, 0.0, 0.25, 1.2),
}


def stretched_noise(draws: Draws, name: str, size: int, rows: int, columns: int) -> np.ndarray:
    """float32 (n, size, size) in [0, 1]: like `smooth_noise`, with a grid of its own number of cells down and across."""
    grid = draws.uniform(name, size=(rows + 1, columns + 1))
    pixel = np.arange(size, dtype=np.float32) + np.float32(0.5)
    down, across = pixel * np.float32(rows / size), pixel * np.float32(columns / size)
    i, j = down.astype(np.int64), across.astype(np.int64)
    upper = grid[:, i]
    lines = upper + (down - i)[None, :, None] * (grid[:, i + 1] - upper)
    left = lines[:, :, j]
    return left + (across - j) * (lines[:, :, j + 1] - left)


def region_map(draws: Draws, count: np.ndarray, size: int) -> np.ndarray:
    """uint8 (n, size, size): which of its `count` (n,) regions each pixel lies in. Every second item has bands."""
    n, most = draws.count, int(count.max())
    axis = (np.arange(size, dtype=np.float32) + np.float32(0.5)) / np.float32(size)
    waves = np.float32(0.3)
    x = axis + waves * (smooth_noise(draws, "border x", size, 5) - np.float32(0.5))
    y = axis[:, None] + waves * (smooth_noise(draws, "border y", size, 5) - np.float32(0.5))
    stretch = np.where(draws.chance("bands", 0.5), np.float32(0.02), np.float32(1))[:, None, None]
    site = np.arange(most)
    at_y = (site + draws.uniform("site y", 0.25, 0.75, (most,))) / count[:, None].astype(np.float32)
    at_y = np.where(site < count[:, None], at_y, 99).astype(np.float32)  # sites there are not lie far away
    at_x = draws.uniform("site x", 0.1, 0.9, (most,))
    best = np.full((n, size, size), np.inf, np.float32)
    region = np.zeros((n, size, size), np.uint8)
    for number in range(most):
        dx, dy = x - at_x[:, number, None, None], y - at_y[:, number, None, None]
        far = stretch * (dx * dx) + dy * dy
        region = np.where(far < best, np.uint8(number), region)
        best = np.minimum(best, far)
    return region


def textured_ground(draws: Draws, low: int, high: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Ground of `low` to `high` regions: float32 (n, size, size, 3), and uint8 (n, size, size), index into `STUFF_NAMES`.

    The regions of one item are of different stuff, so a stuff names a region.
    """
    count = low + draws.integers("region count", high - low + 1)
    region = region_map(draws, count, size)
    kinds = draws.order("region stuff", len(STUFF_NAMES))[:, : int(count.max())]
    stuff = np.take_along_axis(kinds, region.reshape(len(region), -1).astype(np.intp), 1).reshape(region.shape)
    noises = (
        smooth_noise(draws, "stuff clouds", size, 4),
        smooth_noise(draws, "stuff grains", size, size // 2),
        stretched_noise(draws, "stuff blades", size, size // 6, size // 2),
        stretched_noise(draws, "stuff waves", size, size // 2, 6),
    )
    look = np.array([LOOK[name] for name in STUFF_NAMES], np.float32)
    mixed = np.zeros(stuff.shape, np.float32)
    for number, noise in enumerate(noises):
        mixed += look[:, number].take(stuff) * (noise - np.float32(0.5))
    mixed = mixed * look[:, 4].take(stuff) + np.float32(0.5)
    colours = np.array([STUFF[name] for name in STUFF_NAMES], np.float32) / 255
    tint = 1 + np.float32(0.1) * (draws.uniform("stuff tint", size=(3,)) - np.float32(0.5))
    ground = colours[:, 0].take(stuff, 0) + mixed[..., None] * (colours[:, 1] - colours[:, 0]).take(stuff, 0)
    return np.clip(ground * tint[:, None, None], 0, 1), stuff.astype(np.uint8)
