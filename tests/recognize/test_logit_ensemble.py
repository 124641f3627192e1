from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grainwise.recognize.logit_ensemble import LogitEnsemble, correct_along, search, stratified_folds


def blocks(seed, rows=40, classes=5, count=2):
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randn(rows, classes, generator=generator) for _ in range(count + 1)]
    return parts[0], parts[1:], torch.randint(classes, (rows,), generator=generator)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.lists(st.floats(0, 50), min_size=1, max_size=9, unique=True))
def test_intersecting_lines_counts_what_trying_every_weight_counts(seed, grid):
    base, (term,), labels = blocks(seed, count=1)
    grid = sorted(grid)
    tried = [int(((base.double() + w * term.double()).argmax(1) == labels).sum()) for w in grid]
    assert correct_along(base, term, grid, labels).tolist() == tried


@pytest.mark.parametrize("seed", range(5))
def test_the_search_is_the_first_best_of_nested_loops(seed):
    base, (a, b), labels = blocks(seed)
    grids = {"a": (0.0, 0.3, 1.0, 4.0), "b": (0.0, 0.2, 2.0)}
    best, where = -1, None
    for one, two in itertools.product(*grids.values()):
        right = int(((base + one * a + two * b).argmax(1) == labels).sum())
        if right > best:
            best, where = right, {"a": one, "b": two}
    found = search(base, {"a": a, "b": b}, grids, labels)
    assert (found.correct, found.weights) == (best, where)
    assert found.accuracy == best / len(labels)


def test_level_lines_and_ties():
    base = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]])
    labels = torch.tensor([0, 0, 0])
    assert correct_along(base, torch.zeros(3, 2), (0.0, 1.0, 7.0), labels).tolist() == [1, 1, 1]  # a tie counts as wrong


def test_a_weight_of_zero_leaves_the_base_exactly_alone():
    base = torch.randn(3, 4)
    assert torch.equal(LogitEnsemble({"x": 0.0})(base, {"x": torch.full((3, 4), torch.inf)}), base)


def test_folds_keep_images_together_and_hold_out_each_once():
    labels = torch.tensor([0] * 12 + [1] * 6 + [2] * 2)
    groups = torch.arange(20) // 2  # two views an image: 6, 3 and 1 images
    folds = stratified_folds(labels, groups, 3)
    assert (folds[::2] == folds[1::2]).all()
    assert folds[labels == 2].tolist() == [-1, -1]  # a class keeps its only image
    assert sorted(folds[labels == 0][::2].tolist()) == [0, 0, 1, 1, 2, 2]
    with pytest.raises(ValueError, match="different labels"):
        stratified_folds(torch.tensor([0, 1]), torch.tensor([5, 5]), 2)


def test_wrong_calls():
    base, (term,), labels = blocks(0, count=1)
    with pytest.raises(ValueError, match="no rows"):
        search(base[:0], {"a": term[:0]}, {"a": (1.0,)}, labels[:0])
    with pytest.raises(ValueError, match="same names"):
        search(base, {"a": term}, {"b": (1.0,)}, labels)
    with pytest.raises(ValueError, match="must agree"):
        search(base, {"a": term[:, :2]}, {"a": (1.0,)}, labels)
    with pytest.raises(ValueError, match="ascending"):
        search(base, {"a": term}, {"a": (1.0, 0.5)}, labels)
