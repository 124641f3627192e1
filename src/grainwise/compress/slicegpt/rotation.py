"""Bases of the residual stream: principal axes, and the final orientation of the coordinates that are kept."""

from __future__ import annotations

import torch
from torch import Tensor

ORIENTATIONS = ("random", "pca")


def principal_axes(moment: Tensor) -> tuple[Tensor, Tensor]:
    """(eigenvalues (D,) descending, orthogonal Q (D, D) with the axes as columns) of a second moment, in float64.

    The moment is uncentred on purpose: the norms allow rotations of the stream, not shifts.
    """
    values, vectors = torch.linalg.eigh(moment.double())
    return values.flip(0), vectors.flip(1)


def random_rotation(width: int, generator: torch.Generator) -> Tensor:
    """An orthogonal matrix (width, width), uniformly distributed, float64."""
    q, r = torch.linalg.qr(torch.randn(width, width, dtype=torch.float64, generator=generator))
    return q * r.diagonal().sign()  # without the signs, QR's convention would favour some matrices


def oriented(axes: Tensor, width: int, orientation: str, generator: torch.Generator) -> Tensor:
    """The basis Q (D, D) with its first `width` columns re-mixed (`random`) or as they are (`pca`).

    Re-mixing keeps the space they span, hence the function; it spreads the energy evenly over the coordinates, which
    half precision and later quantisation prefer.
    """
    if orientation == "pca":
        return axes
    mixed = axes.clone()
    mixed[:, :width] = axes[:, :width] @ random_rotation(width, generator).to(axes.device)
    return mixed
