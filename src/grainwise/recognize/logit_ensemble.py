"""`LogitEnsemble`: base logits plus weighted extra terms, and the exact search of their weights.

Training-free adapters add evidence to zero-shot logits: z + α A + γ B. Along one weight the logits of a row are straight
lines, so the weights at which its label wins form one interval; the search intersects lines instead of trying every
weight, and costs rows · classes for a whole grid of that weight.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LogitEnsemble:
    """base + Σ weight · term. weights: by the name of the term."""

    weights: Mapping[str, float]

    def __call__(self, base: Tensor, terms: Mapping[str, Tensor]) -> Tensor:
        """float (rows, classes). Terms of weight zero are left out, so that their absence is exact."""
        total = base
        for name, weight in self.weights.items():
            if weight:
                total = total + weight * terms[name]
        return total


@dataclass(frozen=True)
class GridResult:
    """The best point of a grid: weights by term, how many rows it gets right, of how many."""

    weights: dict[str, float]
    correct: int
    rows: int

    @property
    def accuracy(self) -> float:
        """Share of rows whose label has the highest logit."""
        return self.correct / self.rows


def search(base: Tensor, terms: Mapping[str, Tensor], grids: Mapping[str, Sequence[float]], labels: Tensor) -> GridResult:
    """The point of the grid with the most rows right; of equals the first in lexicographic order of `grids`.

    base and terms: (rows, classes). grids: values for each term; the last one is swept at once by `correct_along`, so it
    must ascend. Raises ValueError for no rows, names that differ, or a grid that does not ascend.
    """
    _check(base, terms, grids, labels)
    names = list(grids)
    best: GridResult | None = None
    for outer in itertools.product(*(grids[n] for n in names[:-1])):
        fixed = dict(zip(names[:-1], outer))
        start = LogitEnsemble(fixed)(base, terms)
        counts = correct_along(start, terms[names[-1]], grids[names[-1]], labels)
        at = int(counts.argmax())
        if best is None or int(counts[at]) > best.correct:
            best = GridResult(fixed | {names[-1]: float(grids[names[-1]][at])}, int(counts[at]), len(labels))
    assert best is not None
    return best


def correct_along(base: Tensor, term: Tensor, grid: Sequence[float], labels: Tensor) -> Tensor:
    """int64 (..., len(grid)): how many rows have their label strictly on top of base + w · term, for every w of the grid.

    base, term: float (..., rows, classes). A tie counts as wrong. The label of a row beats class k where c + w s > 0, with c
    and s the label's lead in base and term; so it beats all of them for w in an open interval.
    """
    base, term = torch.broadcast_tensors(base.double(), term.double())
    own = labels[:, None].expand(*base.shape[:-1], 1)
    lead = base.gather(-1, own) - base
    slope = term.gather(-1, own) - term
    cross = -lead / slope
    low = torch.where(slope > 0, cross, -math.inf).scatter(-1, own, -math.inf).amax(-1)
    high = torch.where(slope < 0, cross, math.inf).scatter(-1, own, math.inf).amin(-1)
    level = ((slope == 0) & (lead <= 0)).scatter(-1, own, False).any(-1)
    values = torch.tensor(list(grid), dtype=torch.float64, device=base.device)
    first = torch.searchsorted(values, low, right=True)
    end = torch.searchsorted(values, high, right=False)
    wins = ((end > first) & ~level).long()
    change = torch.zeros(*low.shape[:-1], len(values) + 1, dtype=torch.long, device=base.device)
    change.scatter_add_(-1, first, wins)
    change.scatter_add_(-1, end, -wins)
    return change.cumsum(-1)[..., :-1]


def stratified_folds(labels: Tensor, groups: Tensor, folds: int) -> Tensor:
    """int64 (rows,): the fold in which each row is held out, or -1 for rows of a class with a single group.

    Rows of one group (the views of one image) stay together. A class with several groups is dealt out in turn, starting
    at another fold for every class. Raises ValueError when a group has two labels.
    """
    _, member = torch.unique(groups, return_inverse=True)
    count = int(member.max()) + 1
    label = torch.empty(count, dtype=torch.long)
    label[member] = labels
    if (label[member] != labels).any():
        raise ValueError("rows of one group have different labels: a group is one image, with one label")
    fold = torch.full((count,), -1, dtype=torch.long)
    for k in label.unique():
        own = torch.nonzero(label == k)[:, 0]
        if len(own) > 1:
            fold[own] = (torch.arange(len(own)) + int(k)) % folds
    return fold[member]


def _check(base: Tensor, terms: Mapping[str, Tensor], grids: Mapping[str, Sequence[float]], labels: Tensor) -> None:
    if not len(labels):
        raise ValueError("there are no rows to search on")
    if set(terms) != set(grids) or not grids:
        raise ValueError(f"terms {sorted(terms)} and grids {sorted(grids)} must have the same names, at least one")
    for name, term in terms.items():
        if term.shape != base.shape or len(labels) != len(base):
            shapes = f"{name} is {tuple(term.shape)}, base {tuple(base.shape)}"
            raise ValueError(f"{shapes}, with {len(labels)} labels: they must agree")
    for name, grid in grids.items():
        if not len(grid) or any(b <= a for a, b in zip(grid, list(grid)[1:])):
            raise ValueError(f"the grid of {name} must hold ascending values, got {list(grid)}")
