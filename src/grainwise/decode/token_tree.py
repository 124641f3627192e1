"""Draft trees: guessed continuations that share their common beginnings.

A tree of n nodes holds many guessed continuations of a text at once. Node 0, the root, is the last token of the text
itself (chosen already, never a guess); every other node is a drafted token whose path from the root reads as a
continuation. All nodes are checked in one forward pass: a node sees the text before the root, its ancestors and itself,
and stands at the position of its depth.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

Integers = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class TokenTree:
    """Drafted tokens and who follows whom.

    tokens: int64 (n,); `tokens[0]` is the last token of the text.
    parents: int64 (n,); `parents[0]` is -1, every other parent stands before its children. Children of one node stand in
        the order in which they were drawn.
    proposals: float tensor (n, vocabulary) or None; row u is the distribution that the first child of u was drawn from.
        Needed by tree rejection sampling only; drafts without probabilities leave it out.
    Raises ValueError for a tree that breaks one of these rules or in which two children of a node hold the same token.
    """

    tokens: Integers
    parents: Integers
    proposals: Tensor | None = None

    def __post_init__(self) -> None:
        tokens, parents = self.tokens, self.parents
        if tokens.ndim != 1 or tokens.shape != parents.shape or not len(tokens):
            raise ValueError(f"tokens and parents must be (n >= 1,) each, got {tokens.shape} and {parents.shape}")
        if parents[0] != -1 or (parents[1:] < 0).any() or (parents >= np.arange(len(parents))).any():
            raise ValueError(f"parents must be -1 for node 0 and an earlier node for all others, got {parents.tolist()}")
        if tokens.min() < 0:
            raise ValueError(f"token ids must not be negative, got {tokens.min()}")
        if len(np.unique((parents << 32) | tokens)) < len(tokens):
            raise ValueError("two children of one node hold the same token: merge them")
        if self.proposals is not None and (self.proposals.ndim != 2 or len(self.proposals) != len(tokens)):
            raise ValueError(f"proposals must be ({len(tokens)}, vocabulary), got {tuple(self.proposals.shape)}")

    def __len__(self) -> int:
        return len(self.tokens)

    @classmethod
    def single(cls, root: int) -> TokenTree:
        """The tree without a guess: verifying it is one plain decoding step."""
        return cls(np.array([root]), np.array([-1]))

    @classmethod
    def from_paths(cls, root: int, paths: Integers, budget: int) -> TokenTree:
        """Merge paths into a prefix tree of at most `budget` drafted nodes.

        paths: integers (count, length), the most promising path first, each padded behind with -1. Nodes come in as the
        paths name them, so a full tree holds whole paths of high rank and at most one cut short. Nodes are ordered by
        depth, and within a depth by the rank of the first path through them.
        """
        if budget < 0:
            raise ValueError(f"the budget of drafted nodes must not be negative, got {budget}")
        at = np.zeros(len(paths), dtype=np.int64)  # the node where each path stands so far
        tokens, parents, ranks = [np.array([root])], [np.array([-1])], [np.array([-1])]
        size = 1
        for column in paths.T:
            rows = np.flatnonzero((column >= 0) & (at >= 0))
            if not len(rows):
                break
            step, first, which = np.unique((at[rows] << 32) | column[rows], return_index=True, return_inverse=True)
            order = np.argsort(first)
            place = np.empty_like(order)
            place[order] = np.arange(size, size + len(order))
            at[:] = -1
            at[rows] = place[which]
            tokens.append(step[order] & 0xFFFFFFFF)
            parents.append(step[order] >> 32)
            ranks.append(rows[first[order]])
            size += len(order)
        whole = cls(np.concatenate(tokens), np.concatenate(parents))
        return whole if size <= budget + 1 else whole.first(np.concatenate(ranks), budget + 1)

    def first(self, ranks: Integers, count: int) -> TokenTree:
        """The `count` nodes of lowest rank, ancestors before descendants of equal rank; no node may outrank its parent."""
        chosen = np.sort(np.lexsort((np.arange(len(self)), ranks))[:count])
        return self.subtree(chosen)

    def within(self, depth: int) -> TokenTree:
        """The nodes at most `depth` below the root."""
        return self if self.depths.max() <= depth else self.subtree(np.flatnonzero(self.depths <= depth))

    def subtree(self, nodes: Integers) -> TokenTree:
        """The tree of the given nodes (ascending, closed under parents)."""
        renumbered = np.full(len(self) + 1, -1)  # the last entry answers for the root's parent, -1
        renumbered[nodes] = np.arange(len(nodes))
        proposals = None if self.proposals is None else self.proposals[nodes]
        return TokenTree(self.tokens[nodes], renumbered[self.parents[nodes]], proposals)

    @cached_property
    def depths(self) -> Integers:
        """Depth of each node, int64 (n,): 0 at the root."""
        depths, above = np.zeros(len(self), dtype=np.int64), self.parents
        while (alive := above >= 0).any():
            depths += alive
            above = np.where(alive, self.parents[above], -1)
        return depths

    @cached_property
    def ancestor_mask(self) -> NDArray[np.bool_]:
        """bool (n, n): row i is true at i, at the root and at everything between."""
        nodes = np.arange(len(self))
        mask = np.eye(len(self), dtype=bool)
        above = self.parents
        for _ in range(int(self.depths.max())):
            above = np.maximum(above, 0)
            mask[nodes, above] = True
            above = self.parents[above]
        return mask

    @cached_property
    def retrieve_table(self) -> Integers:
        """int64 (leaves, greatest depth + 1): the nodes from the root to each leaf, padded behind with -1."""
        is_leaf = np.ones(len(self), dtype=bool)
        is_leaf[self.parents[1:]] = False
        leaves = np.flatnonzero(is_leaf)
        table = np.full((len(leaves), int(self.depths.max()) + 1), -1)
        rows, at = np.arange(len(leaves)), leaves
        while len(rows):
            table[rows, self.depths[at]] = at
            above = self.parents[at]
            rows, at = rows[above >= 0], above[above >= 0]
        return table

    def path(self, node: int) -> list[int]:
        """The nodes from the root to `node`, both included."""
        found = [node]
        while (above := int(self.parents[found[-1]])) >= 0:
            found.append(above)
        return found[::-1]

    def children(self, node: int) -> Integers:
        """The children of `node` in draw order."""
        return np.flatnonzero(self.parents == node)

    def child(self, node: int, token: int) -> int | None:
        """The child of `node` that holds `token`, or None."""
        found = np.flatnonzero((self.parents == node) & (self.tokens == token))
        return int(found[0]) if len(found) else None
