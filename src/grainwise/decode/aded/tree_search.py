"""Monte-Carlo tree search over a tri-gram table: which continuations deserve a place in the draft tree.

A state is a pair of tokens; the root is the last two of the text. Each iteration selects a path by PUCT, expands its end
with all successors, finishes it by a random rollout and credits the path with its reward. The most visited prefixes,
each prolonged by its likeliest successor, become the drafts.
"""

from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

from grainwise.decode.aded.trigram_table import Rows, find_row


class SearchTree(NamedTuple):
    """The nodes of one search, the root first, children of a node side by side.

    tokens int32, parents int32, depths int32 (the root has 1), priors float32 (table scores), first_children int32,
    child_counts int32, visits int32, rewards float64 (summed), all of shape (nodes,).
    """

    tokens: NDArray[np.int32]
    parents: NDArray[np.int32]
    depths: NDArray[np.int32]
    priors: NDArray[np.float32]
    first_children: NDArray[np.int32]
    child_counts: NDArray[np.int32]
    visits: NDArray[np.int32]
    rewards: NDArray[np.float64]


def search(
    rows: Rows, first: int, second: int, *, iterations: int, depth: int, c1: float, c2: float, generator: np.random.Generator
) -> SearchTree:
    """Search from the context (first, second) for continuations of up to `depth` - 1 tokens."""
    room = 1 + iterations * int(rows.used[2])
    kinds = (np.int32, np.int32, np.int32, np.float32, np.int32, np.int32, np.int32, np.float64)
    tree = SearchTree._make(np.zeros(room, kind) for kind in kinds)
    count = run_search(rows, tree, first, second, iterations, depth, c1, c2, generator)
    return SearchTree._make(a[:count] for a in tree)


def best_paths(rows: Rows, tree: SearchTree, first: int, paths: int) -> NDArray[np.int64]:
    """The `paths` most visited prefixes, each with the likeliest next token appended.

    Returns tokens (paths, longest), the most visited first, padded with -1; ties go to the older node. An unknown
    context adds nothing, so a row can be empty.
    """
    order = np.argsort(-tree.visits, kind="stable")[:paths]
    return write_paths(rows, tree, first, order, int(tree.depths[order].max()))


@numba.njit(cache=True)
def puct(reward, visits, prior, parent_visits, c1, c2):  # type: ignore[no-untyped-def]
    """Mean reward plus exploration: prior * (c1 + ln((N + c2 + 1) / c2)) * sqrt(N) / (1 + n); infinite when unvisited."""
    if visits == 0:
        return np.inf
    breadth = (c1 + np.log((parent_visits + c2 + 1.0) / c2)) * np.sqrt(parent_visits)
    return reward / visits + prior * breadth / (1.0 + visits)


@numba.njit(cache=True)
def run_search(rows, tree, first, second, iterations, depth, c1, c2, generator):  # type: ignore[no-untyped-def]
    """Fill `tree`; returns the number of its nodes."""
    tree.tokens[0], tree.parents[0], tree.depths[0], tree.priors[0] = second, -1, 1, 0.0
    count = 1
    for _ in range(iterations):
        node = 0
        reward = 1.0
        while tree.child_counts[node] > 0 and tree.depths[node] < depth:
            node = best_child(tree, node, c1, c2)
            reward += tree.priors[node]
        before = first if tree.parents[node] < 0 else tree.tokens[tree.parents[node]]
        if tree.depths[node] < depth:
            added = expand(rows, tree, node, before, count)
            if added > 0:
                before, node = tree.tokens[node], count
                count += added
                reward += tree.priors[node]
        reward += rollout(rows, before, tree.tokens[node], depth - tree.depths[node], generator)
        while node >= 0:
            tree.visits[node] += 1
            tree.rewards[node] += reward
            node = tree.parents[node]
    return count


@numba.njit(cache=True)
def best_child(tree, node, c1, c2):  # type: ignore[no-untyped-def]
    """The child of largest PUCT; of equals the first, which is the one of the higher table score."""
    best, best_value = -1, -np.inf
    start = tree.first_children[node]
    for child in range(start, start + tree.child_counts[node]):
        value = puct(tree.rewards[child], tree.visits[child], tree.priors[child], tree.visits[node], c1, c2)
        if value > best_value:
            best, best_value = child, value
    return best


@numba.njit(cache=True)
def expand(rows, tree, node, before, count):  # type: ignore[no-untyped-def]
    """Append all successors of `node` as its children from index `count` on; returns how many."""
    start, length = find_row(rows, (np.int64(before) << 32) | np.int64(tree.tokens[node]))
    tree.first_children[node], tree.child_counts[node] = count, length
    for i in range(length):
        tree.tokens[count + i] = rows.tokens[start + i]
        tree.priors[count + i] = rows.scores[start + i]
        tree.parents[count + i] = node
        tree.depths[count + i] = tree.depths[node] + 1
    return length


@numba.njit(cache=True)
def rollout(rows, first, second, steps, generator):  # type: ignore[no-untyped-def]
    """Summed scores of `steps` tokens drawn in proportion to their scores, fewer if a context is unknown."""
    gained = 0.0
    for _ in range(steps):
        start, length = find_row(rows, (np.int64(first) << 32) | np.int64(second))
        if length == 0:
            break
        total = 0.0
        for at in range(start, start + length):
            total += rows.scores[at]
        left = generator.random() * total
        chosen = start
        while chosen < start + length - 1 and left >= rows.scores[chosen]:
            left -= rows.scores[chosen]
            chosen += 1
        gained += rows.scores[chosen]
        first, second = second, np.int64(rows.tokens[chosen])
    return gained


@numba.njit(cache=True)
def write_paths(rows, tree, first, nodes, longest):  # type: ignore[no-untyped-def]
    """The tokens on the way to each node, and the likeliest token behind it; int64 (nodes, longest), padded with -1."""
    paths = np.full((len(nodes), longest), -1)
    for i in range(len(nodes)):
        node = nodes[i]
        before = first if tree.parents[node] < 0 else tree.tokens[tree.parents[node]]
        start, length = find_row(rows, (np.int64(before) << 32) | np.int64(tree.tokens[node]))
        if length > 0:
            paths[i, tree.depths[node] - 1] = rows.tokens[start]
        while tree.parents[node] >= 0:
            paths[i, tree.depths[node] - 2] = tree.tokens[node]
            node = tree.parents[node]
    return paths
