"""The largest entries of a whole update, found exactly in passes over its tensors.

Memory is bounded by the largest tensor and two tables of counts, whatever the length of the update.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor

from grainwise.merge import bit_masks

INFINITE = 0x7F80  # upper half of the bit patterns of infinity and of the NaNs, which lie above it


class Update(Protocol):
    """A vector of `numel` entries in named float32 tensors, read in sorted order; every pass gives the same values."""

    @property
    def numel(self) -> int:
        """The number of entries."""

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor), one in memory at a time."""


@dataclass(frozen=True)
class Survey:
    """Statistics of the whole update: length d, sum, sum of squares, and magnitudes counted by the upper half of their bits."""

    numel: int
    total: float
    squares: float
    counts: np.ndarray

    @property
    def sigma(self) -> float:
        """The unbiased standard deviation, as `torch.std` gives it."""
        return math.sqrt(max(0.0, self.squares - self.total**2 / self.numel) / (self.numel - 1))

    @property
    def norm(self) -> float:
        """The Euclidean norm."""
        return math.sqrt(self.squares)


def survey(delta: Update) -> Survey:
    """One pass over the update. Raises ValueError naming the first tensor with NaN or infinite entries."""
    counts = np.zeros(1 << 15, dtype=np.int64)
    total = squares = 0.0
    for key, update in delta.items():
        part = bit_masks.survey(*bit_masks.bits_and_values(update), counts)
        if counts[INFINITE:].any():
            raise ValueError(f"tensor {key!r} has NaN or infinite entries in its update: check the training that made it")
        total, squares = total + part[0], squares + part[1]
        del update
    return Survey(delta.numel, total, squares, counts)


@dataclass(frozen=True)
class Selection:
    """The entries largest in magnitude over the whole update; among equals those that come first.

    count: how many, floor(density * d). threshold: bit pattern of the smallest chosen magnitude. quota: how many entries
    equal to it each tensor may take; None if all of them belong to the selection. nonzeros: the chosen entries that are not
    zero. mean: of the chosen magnitudes. sigma: standard deviation of the whole update, before selecting.
    """

    count: int
    threshold: int
    quota: Mapping[str, int] | None
    nonzeros: int
    mean: float
    sigma: float

    def masks(self, key: str, update: Tensor) -> tuple[bit_masks.Words, bit_masks.Words]:
        """(positive, negative) bit masks of the chosen entries of one tensor; zeros are in neither."""
        bits, _ = bit_masks.bits_and_values(update)
        positive, negative = (np.zeros(bit_masks.words_for(bits.size), dtype=np.uint64) for _ in range(2))
        allowed = bits.size if self.quota is None else self.quota[key]
        bit_masks.mark(bits, self.threshold, allowed, positive, negative)
        return positive, negative


def check_density(density: float) -> None:
    """Raise ValueError unless density is a fraction in (0, 1]."""
    if not 0 < density <= 1:
        hint = f"; did you mean {density / 100:g}?" if 1 < density <= 100 else ""
        raise ValueError(f"density is a fraction in (0, 1], got {density:g}{hint}")


def select(delta: Update, density: float) -> Selection:
    """The exact global top-k in two passes over the tensors (a third only if the threshold cuts through equal magnitudes).

    A float32 without its sign is a 31-bit number ordered as its magnitude. The first pass counts upper halves, which tells
    in which of 2^15 bins the k-th largest lies; the second counts lower halves within that bin, which tells its value.
    """
    check_density(density)
    seen = survey(delta)
    count = math.floor(density * seen.numel)
    sigma = seen.sigma if seen.numel > 1 else 0.0
    if count == 0:
        return Selection(0, INFINITE << 16, None, 0, 0.0, sigma)
    high, above = _from_the_top(seen.counts, count)
    low_counts = np.zeros(1 << 16, dtype=np.int64)
    total = 0.0
    for _, update in delta.items():
        total += bit_masks.refine(*bit_masks.bits_and_values(update), high, low_counts)
        del update
    low, above_in_bin = _from_the_top(low_counts, count - above)
    threshold = (high << 16) | low
    ties, equal = count - above - above_in_bin, int(low_counts[low])
    patterns = ((high << 16) | np.arange(low, 1 << 16)).astype(np.uint32).view(np.float32).astype(np.float64)
    taken = low_counts[low:].copy()
    taken[0] = ties
    total += float(patterns[taken > 0] @ taken[taken > 0])
    return Selection(
        count=count,
        threshold=threshold,
        quota=_quota(delta, threshold, ties) if threshold and ties < equal else None,  # zeros are never chosen
        nonzeros=count - (ties if threshold == 0 else 0),
        mean=total / count,
        sigma=sigma,
    )


def _from_the_top(counts: np.ndarray, wanted: int) -> tuple[int, int]:
    """(the bin that holds the `wanted`-th largest entry, how many entries lie in higher bins)."""
    from_top = np.cumsum(counts[::-1])
    place = int(np.searchsorted(from_top, wanted))
    return len(counts) - 1 - place, int(from_top[place] - counts[::-1][place])


def _quota(delta: Update, threshold: int, ties: int) -> dict[str, int]:
    quota = {}
    for key, update in delta.items():
        quota[key] = min(ties, int(bit_masks.count_equal(bit_masks.bits_and_values(update)[0], threshold)))
        ties -= quota[key]
        del update
    return quota
