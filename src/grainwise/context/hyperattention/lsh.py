"""Angular hashing: vectors with a small angle get equal or neighbouring bucket numbers.

A vector's code has one bit per random direction: on which side of the plane it lies. Buckets are numbered in the
reflected Gray order, so that codes of neighbouring buckets differ in exactly one bit, which makes sorting by bucket
keep near vectors near. Source: HyperAttention (arXiv 2310.05869), section on sortLSH.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

MOST_PROJECTIONS = 16  # bucket numbers stay within 16 bits, which sort in linear time


def random_directions(dim: int, projections: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """Normal directions, float32 (dim, projections); queries and keys must share them."""
    return torch.randn(dim, projections, generator=generator, device=device)


def gray_ranks(bits: int) -> Tensor:
    """Rank of every `bits`-bit code in the reflected Gray order, long (2 ** bits,), a bijection.

    The code at rank i is i XOR (i >> 1), so the codes at ranks i and i + 1 differ in one bit.
    """
    if not 1 <= bits <= MOST_PROJECTIONS:
        raise ValueError(f"projections must lie in 1..{MOST_PROJECTIONS}, got {bits}")
    rank = torch.arange(2**bits)
    ranks = torch.empty_like(rank)
    ranks[rank ^ (rank >> 1)] = rank
    return ranks


def bucket_numbers(vectors: Tensor, directions: Tensor) -> Tensor:
    """Bucket of each vector, int32 (...), from vectors (..., d) and directions (d, r): 0 <= bucket < 2 ** r."""
    bits = directions.shape[1]
    ranks = gray_ranks(bits).to(vectors.device, torch.int32)
    powers = 2.0 ** torch.arange(bits, device=vectors.device)
    sides = (vectors @ directions.to(vectors.dtype) > 0).float()
    return ranks[(sides @ powers).long()]


def stable_order(numbers: Tensor) -> Tensor:
    """The stable ascending order of small non-negative integers (< 65536) along the last axis, long, same shape."""
    if numbers.device.type == "cpu":  # NumPy sorts 16-bit integers by radix, about 15 times faster than torch's stable sort
        return torch.from_numpy(np.argsort(numbers.numpy().astype(np.uint16), axis=-1, kind="stable"))
    return torch.sort(numbers, dim=-1, stable=True).indices


def bucket_starts(numbers: Tensor, buckets: int) -> Tensor:
    """Where each bucket begins in the sorted order: long (rows, buckets + 1), from numbers (rows, n)."""
    counts = torch.zeros(numbers.shape[0], buckets + 1, dtype=torch.long, device=numbers.device)
    counts.scatter_add_(1, numbers.long() + 1, torch.ones_like(numbers, dtype=torch.long))
    return counts.cumsum(1)
