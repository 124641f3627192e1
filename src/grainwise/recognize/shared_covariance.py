"""One covariance for all classes: its estimates, and solving linear systems with it."""

from __future__ import annotations

import torch
from torch import Tensor

from grainwise.naming import did_you_mean
from grainwise.recognize.class_statistics import ClassStatistics

SHRINKAGES = ("ks", "ledoit_wolf", "oas", "glasso", "none", "identity")
GLASSO_PENALTY = 0.1  # of the mean variance


def shared_covariance(statistics: ClassStatistics, shrinkage: str) -> tuple[Tensor, float]:
    """(Σ, scale), float64 (dimension, dimension): the classifier uses Σ; Σ · scale is in the units of the data.

    `ks` is the empirical-Bayes ridge of Kubokawa and Srivastava, Σ = [(N-1) S + tr(S) I] / dimension: smaller shrinkage with
    more rows, at a scale of its own. The others estimate the covariance itself, so their scale is 1.
    """
    scatter, rows, dimension = statistics.scatter, statistics.rows, len(statistics.scatter)
    identity = torch.eye(dimension, dtype=torch.float64, device=scatter.device)
    if shrinkage == "ks":
        return (scatter + statistics.variance * identity) / dimension, dimension / rows
    if shrinkage == "identity":
        return identity, 1.0
    sample = scatter / rows
    mean_variance = float(sample.trace()) / dimension
    if shrinkage == "none":
        return sample, 1.0
    if shrinkage == "glasso":
        from sklearn.covariance import graphical_lasso

        found, _ = graphical_lasso((sample / mean_variance).cpu().numpy(), alpha=GLASSO_PENALTY)
        return torch.as_tensor(found, device=scatter.device) * mean_variance, 1.0
    if shrinkage == "ledoit_wolf":
        share = _ledoit_wolf(statistics, sample)
    elif shrinkage == "oas":
        share = _oas(sample, rows)
    else:
        raise ValueError(f"unknown shrinkage {shrinkage!r}. {did_you_mean(shrinkage, SHRINKAGES)}")
    return (1 - share) * sample + share * mean_variance * identity, 1.0


def _ledoit_wolf(statistics: ClassStatistics, sample: Tensor) -> float:
    """How far to shrink to a multiple of the identity (Ledoit and Wolf, 2004)."""
    if statistics.fourth != statistics.fourth:
        raise ValueError('Ledoit-Wolf shrinkage reads all rows at once: use fit, or shrinkage="ks" or "oas" for merged parts')
    rows, dimension = statistics.rows, len(sample)
    squared = float(sample.square().sum())
    distance = squared - float(sample.trace()) ** 2 / dimension
    noise = (statistics.fourth / rows - squared) / rows
    return min(noise, distance) / distance if distance > 0 else 1.0


def _oas(sample: Tensor, rows: float) -> float:
    """The oracle-approximating share for Gaussian data (Chen, Wiesel, Eldar, Hero, 2010)."""
    dimension = len(sample)
    mean_square = float(sample.square().mean())
    level = (float(sample.trace()) / dimension) ** 2
    distance = (rows + 1) * (mean_square - level / dimension)
    return min(1.0, (mean_square + level) / distance) if distance > 0 else 1.0


def solve(covariance: Tensor, rows: Tensor, *, pseudo: bool = False) -> Tensor:
    """Σ⁻¹ applied to each row, float64 (count, dimension), by Cholesky, or by the pseudo-inverse."""
    if pseudo:
        values, vectors = torch.linalg.eigh(covariance)
        kept = values > values.max() * len(values) * torch.finfo(values.dtype).eps
        inverse = torch.where(kept, 1 / values, 0.0)
        return (rows @ vectors * inverse) @ vectors.T
    return torch.cholesky_solve(rows.T, torch.linalg.cholesky(covariance)).T


def new_class_precision(spread: Tensor) -> Tensor:
    """The mean over classes of D [(k-1) C + tr(C) I]⁻¹, C = VᵀV / (k-1): float64 (dimension, dimension).

    spread V: float64 (classes, k, dimension), differences from the text weight. By Woodbury's identity the k x k system is
    solved instead, with t = tr(C): [t I + VᵀV]⁻¹ = (I - Vᵀ (t I + V Vᵀ)⁻¹ V) / t; k is far below the dimension.
    """
    classes, k, dimension = spread.shape
    trace = spread.square().sum((1, 2)) / (k - 1)
    small = spread @ spread.mT + trace[:, None, None] * torch.eye(k, dtype=spread.dtype, device=spread.device)
    half = torch.linalg.solve_triangular(torch.linalg.cholesky(small), spread, upper=False) / trace.sqrt()[:, None, None]
    flat = half.reshape(-1, dimension)
    total = (1 / trace).sum() * torch.eye(dimension, dtype=spread.dtype, device=spread.device) - flat.T @ flat
    return total * dimension / classes
