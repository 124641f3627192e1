"""Random numbers by name and index: item i is the same on every machine, in every process and in any batch.

A generator with a state gives item 7 only after items 0 to 6. Here every number is a hash of (seed, item, name, position),
so a whole batch is drawn at once and in any order. The hash is the finaliser of SplitMix64 (Steele, Lea and Flood, 2014).
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
FIRST = np.uint64(0xBF58476D1CE4E5B9)
SECOND = np.uint64(0x94D049BB133111EB)


def mix(state: np.ndarray) -> np.ndarray:
    """Scramble 64-bit words; any shape in, the same shape out."""
    with np.errstate(over="ignore"):
        state = state + GOLDEN
        state = (state ^ (state >> np.uint64(30))) * FIRST
        state = (state ^ (state >> np.uint64(27))) * SECOND
    return state ^ (state >> np.uint64(31))


class Draws:
    """Random numbers for a batch of n items.

    `keys` are integers or integer arrays of shape (n,) that together name an item, for example (seed, species, individual).
    Every method takes the name of what is drawn first; two names give independent numbers.
    """

    def __init__(self, *keys: int | np.ndarray) -> None:
        arrays = np.broadcast_arrays(*[np.atleast_1d(np.asarray(key)) for key in keys])
        state = np.zeros(arrays[0].shape, np.uint64)
        for key in arrays:
            state = mix(state ^ key.astype(np.int64).view(np.uint64))
        self.state = state
        self.count = len(state)

    def words(self, name: str, size: tuple[int, ...] = ()) -> np.ndarray:
        """uint64 (n, *size), uniform."""
        stream = mix(self.state ^ np.uint64(zlib.crc32(name.encode())))
        positions = np.arange(int(np.prod(size, dtype=int)), dtype=np.uint64)
        return mix(stream[:, None] ^ mix(positions)[None]).reshape(self.count, *size)

    def uniform(self, name: str, low: float = 0.0, high: float = 1.0, size: tuple[int, ...] = ()) -> np.ndarray:
        """float32 (n, *size) in [low, high)."""
        unit = (self.words(name, size) >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)
        return np.float32(low) + unit * np.float32(high - low)

    def integers(self, name: str, high: int, size: tuple[int, ...] = ()) -> np.ndarray:
        """int64 (n, *size) in [0, high)."""
        return ((self.words(name, size) >> np.uint64(32)) * np.uint64(high) >> np.uint64(32)).astype(np.int64)

    def chance(self, name: str, probability: float, size: tuple[int, ...] = ()) -> np.ndarray:
        """bool (n, *size), true with the given probability."""
        return self.uniform(name, size=size) < np.float32(probability)

    def normal(self, name: str, size: tuple[int, ...] = ()) -> np.ndarray:
        """float32 (n, *size), nearly Gaussian with variance 1: the sum of four uniform numbers (exact on every machine)."""
        total = self.uniform(name, -1.0, 1.0, (*size, 4)).sum(-1)
        return total * np.float32(0.8660254)

    def order(self, name: str, length: int) -> np.ndarray:
        """int64 (n, length): a permutation of 0..length-1 for each item."""
        return np.argsort(self.words(name, (length,)), axis=1, kind="stable")

    def choice(self, name: str, options: Sequence[object]) -> list[object]:
        """One of `options` for each item."""
        return [options[index] for index in self.integers(name, len(options))]
