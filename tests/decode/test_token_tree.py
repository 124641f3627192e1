import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grainwise.decode import TokenTree

PATHS = st.lists(st.lists(st.integers(0, 3), max_size=5), max_size=12)


def padded(paths):
    table = np.full((len(paths), max((len(p) for p in paths), default=0)), -1)
    for row, path in zip(table, paths):
        row[: len(path)] = path
    return table


def spelled(tree):
    """The token path of every node, root left out."""
    return [tuple(tree.tokens[tree.path(node)[1:]].tolist()) for node in range(len(tree))]


@settings(max_examples=50)
@given(PATHS)
def test_merging_keeps_every_prefix_once(paths):
    tree = TokenTree.from_paths(7, padded(paths), budget=100)
    expected = {tuple(p[:n]) for p in paths for n in range(len(p) + 1)} | {()}
    assert sorted(spelled(tree)) == sorted(expected)


@settings(max_examples=50)
@given(PATHS, st.integers(0, 12))
def test_a_budget_cuts_the_last_paths_first(paths, budget):
    wanted: list[tuple[int, ...]] = []  # prefixes in the order in which the paths name them
    for path in paths:
        wanted += [p for n in range(1, len(path) + 1) if (p := tuple(path[:n])) not in wanted]
    tree = TokenTree.from_paths(7, padded(paths), budget)
    assert sorted(spelled(tree)) == sorted([(), *wanted[:budget]])


@settings(max_examples=50)
@given(PATHS)
def test_buffers_against_a_walk_from_node_to_node(paths):
    tree = TokenTree.from_paths(7, padded(paths), budget=100)
    routes = [tree.path(node) for node in range(len(tree))]
    assert tree.depths.tolist() == [len(r) - 1 for r in routes]
    assert tree.ancestor_mask.sum(axis=1).tolist() == [len(r) for r in routes]
    for node, route in enumerate(routes):
        assert np.flatnonzero(tree.ancestor_mask[node]).tolist() == sorted(route)
    rows = [[n for n in row if n >= 0] for row in tree.retrieve_table.tolist()]
    assert {tuple(row[:n]) for row in rows for n in range(1, len(row) + 1)} == {tuple(r) for r in routes}
    assert len({row[-1] for row in rows}) == len(rows)


@settings(max_examples=50)
@given(PATHS, st.integers(0, 5))
def test_within_is_the_tree_of_the_cut_paths(paths, depth):
    cut = TokenTree.from_paths(7, padded(paths), budget=100).within(depth)
    assert sorted(spelled(cut)) == sorted({tuple(p[:n]) for p in paths for n in range(min(len(p), depth) + 1)} | {()})


def test_children_come_in_path_order():
    tree = TokenTree.from_paths(7, np.array([[9, 1], [3, 2], [9, 0]]), budget=10)
    assert tree.tokens[tree.children(0)].tolist() == [9, 3]
    assert tree.tokens[tree.children(tree.child(0, 9))].tolist() == [1, 0]
    assert tree.child(0, 4) is None


@pytest.mark.parametrize(
    "tokens, parents, message",
    [
        ([], [], "n >= 1"),
        ([1, 2], [-1], "n >= 1"),
        ([1, 2], [0, 0], "-1 for node 0"),
        ([1, 2, 3], [-1, 2, 0], "earlier node"),
        ([1, -2], [-1, 0], "negative"),
        ([1, 2, 2], [-1, 0, 0], "same token"),
    ],
)
def test_broken_trees_are_refused(tokens, parents, message):
    with pytest.raises(ValueError, match=message):
        TokenTree(np.array(tokens, dtype=np.int64), np.array(parents, dtype=np.int64))


def test_negative_budget_is_refused():
    with pytest.raises(ValueError, match="budget"):
        TokenTree.from_paths(7, padded([[1]]), budget=-1)
