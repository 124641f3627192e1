"""Greedy maximisation of a set function, one item at a time, evaluated in batches of candidates."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class SetFunction(Protocol):
    """A function of sets of items 0..size-1, evaluated for many candidates at once."""

    size: int

    def empty(self) -> float:
        """The value of the empty set."""

    def values(self, chosen: Sequence[int], candidates: Sequence[int]) -> Tensor:
        """float (len(candidates),): the value of `chosen` with each candidate added to it alone."""


@dataclass(frozen=True)
class GreedyResult:
    """order: items as chosen. values: the function after each. evaluations: how many sets were evaluated."""

    order: list[int]
    values: list[float]
    evaluations: int


def greedy(function: SetFunction, k: int) -> GreedyResult:
    """In every step the item that raises the function most; of equals the first."""
    return _greedy(function, k, lambda left: left)


def stochastic_greedy(function: SetFunction, k: int, *, epsilon: float = 0.1, seed: int = 0) -> GreedyResult:
    """Greedy over a random part of the candidates in every step, (size / k) · log(1 / epsilon) of them.

    For monotone submodular functions the expected value is at least (1 - 1/e - epsilon) of the best
    (Mirzasoleiman et al., 2015).
    """
    if not 0 < epsilon < 1:
        raise ValueError(f"epsilon must lie between 0 and 1, got {epsilon}")
    generator = torch.Generator().manual_seed(seed)
    share = math.ceil(function.size / max(k, 1) * math.log(1 / epsilon))

    def some(left: list[int]) -> list[int]:
        chosen = torch.randperm(len(left), generator=generator)[:share].sort().values
        return [left[i] for i in chosen.tolist()]

    return _greedy(function, k, some)


def _greedy(function: SetFunction, k: int, offered: Callable[[list[int]], list[int]]) -> GreedyResult:
    _check(function, k)
    order: list[int] = []
    values: list[float] = []
    evaluations = 0
    for _ in range(k):
        candidates = offered([i for i in range(function.size) if i not in order])
        found = function.values(order, candidates)
        evaluations += len(candidates)
        best = int(found.argmax())
        order.append(candidates[best])
        values.append(float(found[best]))
    return GreedyResult(order, values, evaluations)


def lazy_greedy(function: SetFunction, k: int, *, block: int = 8) -> GreedyResult:
    """Greedy that re-evaluates only candidates whose last known gain could still win, `block` at a time (Minoux, 1978).

    Equal to `greedy` when gains never grow as the set does (submodularity). Otherwise an item whose gain has grown may be
    taken later than greedy would take it; compare the values to see what that cost.
    """
    _check(function, k)
    if block < 1:
        raise ValueError(f"block must be at least 1, got {block}")
    gain = [math.inf] * function.size
    order: list[int] = []
    values: list[float] = []
    now, evaluations = function.empty(), 0
    for step in range(k):
        left = [i for i in range(function.size) if i not in order]
        fresh: set[int] = set()
        while True:
            best = max(left, key=lambda i: (gain[i], i in fresh, -i))
            if best in fresh:
                break
            stale = sorted((i for i in left if i not in fresh), key=lambda i: (-gain[i], i))
            batch = stale if step == 0 else stale[:block]
            for i, value in zip(batch, function.values(order, batch).tolist()):
                gain[i] = value - now
            fresh.update(batch)
            evaluations += len(batch)
        order.append(best)
        now += gain[best]
        values.append(now)
    return GreedyResult(order, values, evaluations)


def _check(function: SetFunction, k: int) -> None:
    if not 1 <= k <= function.size:
        raise ValueError(f"k must lie between 1 and the {function.size} items, got {k}")
