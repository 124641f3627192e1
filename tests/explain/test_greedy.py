from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grainwise.explain import greedy, lazy_greedy, stochastic_greedy


class OfSets:
    """A set function from a plain Python function."""

    def __init__(self, size, value):
        self.size, self.value, self.asked = size, value, 0

    def empty(self):
        return self.value(frozenset())

    def values(self, chosen, candidates):
        self.asked += len(candidates)
        return torch.tensor([self.value(frozenset([*chosen, c])) for c in candidates], dtype=torch.float64)


def coverage(seed, size=9, universe=30):
    """How much of a weighted universe the chosen subsets cover: monotone and submodular."""
    g = torch.Generator().manual_seed(seed)
    sets = torch.rand(size, universe, generator=g) < 0.2
    weight = torch.rand(universe, generator=g, dtype=torch.float64)
    return OfSets(size, lambda s: float(weight[sets[list(s)].any(0)].sum()) if s else 0.0)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 6))
def test_greedy_keeps_its_bound_and_lazy_equals_it_on_coverage(seed, k):
    function = coverage(seed)
    found = greedy(function, k)
    best = max(function.value(frozenset(s)) for s in itertools.combinations(range(function.size), k))
    assert found.values[-1] >= (1 - 1 / math.e) * best - 1e-12
    for block in (1, 3):
        lazy = lazy_greedy(coverage(seed), k, block=block)
        assert lazy.values == pytest.approx(found.values)
        assert lazy.evaluations <= found.evaluations + k * block


def test_greedy_is_optimal_and_sorted_on_a_modular_function():
    weights = [0.3, 0.9, 0.1, 0.5, 0.7]
    function = OfSets(5, lambda s: sum(weights[i] for i in s))
    assert greedy(function, 5).order == lazy_greedy(function, 5).order == [1, 4, 3, 0, 2]
    assert greedy(function, 3).values == pytest.approx([0.9, 1.6, 2.1])


def test_greedy_equals_a_loop_that_evaluates_everything_anew():
    function = OfSets(7, lambda s: math.sin(sum(3.0 * i + 1 for i in s)) + len(s))  # neither monotone nor submodular
    chosen = []
    for _ in range(5):
        chosen.append(max((i for i in range(7) if i not in chosen), key=lambda i: function.value(frozenset([*chosen, i]))))
    found = greedy(function, 5)
    assert found.order == chosen
    assert found.evaluations == 7 + 6 + 5 + 4 + 3


def test_laziness_saves_evaluations():
    assert (
        lazy_greedy(coverage(0, size=40, universe=300), 10, block=1).evaluations
        < 0.7 * greedy(coverage(0, 40, 300), 10).evaluations
    )


def test_stochastic_greedy_looks_at_part_of_the_candidates():
    function = coverage(3, size=40, universe=200)
    full, some = greedy(function, 8), stochastic_greedy(function, 8, epsilon=0.2, seed=1)
    assert some.evaluations == 8 * math.ceil(40 / 8 * math.log(5))
    assert some.values[-1] >= (1 - 1 / math.e - 0.2) * full.values[-1]
    assert some.order == stochastic_greedy(function, 8, epsilon=0.2, seed=1).order


def test_wrong_calls():
    for search in (greedy, lazy_greedy, stochastic_greedy):
        with pytest.raises(ValueError, match="between 1 and the 9 items"):
            search(coverage(0), 10)
    with pytest.raises(ValueError, match="block"):
        lazy_greedy(coverage(0), 2, block=0)
    with pytest.raises(ValueError, match="epsilon"):
        stochastic_greedy(coverage(0), 2, epsilon=1.0)
