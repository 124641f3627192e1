"""Sufficient statistics of labelled features: counts, class means and the scatter around them, mergeable exactly."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK_ROWS = 16_384  # centred rows in memory at a time


@dataclass(frozen=True)
class ClassStatistics:
    """What a shared-covariance Gaussian model needs of its data, all float64.

    counts: (classes,). means: (classes, dimension), zero for classes without rows. scatter: (dimension, dimension), the sum
    over all rows of the outer product of their difference from the class mean. fourth: the sum of the fourth powers of the
    lengths of those differences, NaN after a merge (Ledoit-Wolf shrinkage reads it).
    """

    counts: Tensor
    means: Tensor
    scatter: Tensor
    fourth: float = math.nan

    @property
    def rows(self) -> float:
        """How many rows were counted (a sum of responsibilities for soft labels)."""
        return float(self.counts.sum())

    @property
    def variance(self) -> float:
        """tr(S), the summed variance, with S = scatter / (rows - 1)."""
        return float(self.scatter.trace()) / max(self.rows - 1, 1.0)

    @classmethod
    def of(cls, x: Tensor, y: Tensor, classes: int) -> ClassStatistics:
        """Statistics of rows x (rows, dimension) with labels y (rows,), by one matrix product on centred rows.

        Products are made in the type of x (float32 or float64) chunk by chunk and added in float64.
        """
        counts = torch.bincount(y, minlength=classes).double()
        sums = torch.zeros(classes, x.shape[1], dtype=torch.float64, device=x.device)
        for rows, labels in zip(x.split(CHUNK_ROWS), y.split(CHUNK_ROWS)):
            sums.index_add_(0, labels, rows.double())
        means = sums / counts.clamp(min=1)[:, None]
        centres = means.to(x.dtype)
        scatter, fourth = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64, device=x.device), 0.0
        for rows, labels in zip(x.split(CHUNK_ROWS), y.split(CHUNK_ROWS)):
            centred = rows - centres[labels]
            scatter += centred.T @ centred
            fourth += float(centred.square().sum(1).square().sum())
        return cls(counts, means, scatter, fourth)

    @classmethod
    def soft(cls, x: Tensor, responsibility: Tensor) -> ClassStatistics:
        """Statistics of rows x (rows, dimension) that belong to classes by shares (rows, classes) that sum to 1."""
        x, share = x.double(), responsibility.double()
        counts = share.sum(0)
        means = (share.T @ x) / counts.clamp(min=1e-12)[:, None]
        pivot = x.mean(0)  # both products are taken around it, so that their difference keeps its digits
        centred, offset = x - pivot, means - pivot
        scatter = centred.T @ centred - (offset * counts[:, None]).T @ offset
        return cls(counts, means, scatter)

    def merged(self, other: ClassStatistics) -> ClassStatistics:
        """Statistics of the rows of both."""
        counts = self.counts + other.counts
        total = counts.clamp(min=1)[:, None]
        means = (self.means * self.counts[:, None] + other.means * other.counts[:, None]) / total
        return ClassStatistics(counts, means, self.scatter + other.scatter + self._between(other, total[:, 0]))

    def without(self, part: ClassStatistics) -> ClassStatistics:
        """Statistics of what is left when the rows of `part` are taken out."""
        counts = self.counts - part.counts
        left = counts.clamp(min=1)[:, None]
        means = (self.means * self.counts[:, None] - part.means * part.counts[:, None]) / left
        means[counts == 0] = 0
        rest = ClassStatistics(counts, means, self.scatter)
        return ClassStatistics(counts, means, self.scatter - part.scatter - rest._between(part, self.counts.clamp(min=1)))

    def _between(self, other: ClassStatistics, total: Tensor) -> Tensor:
        """(dimension, dimension): scatter of two groups of means around their common mean (Chan et al., 1979)."""
        gap = self.means - other.means
        weight = self.counts * other.counts / total
        return (gap * weight[:, None]).T @ gap
