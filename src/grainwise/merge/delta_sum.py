"""Weighted sums of ComPEFT's ternary deltas, kept as their terms: products are counted on the masks, values made when read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from grainwise.merge.task_delta import Delta
from grainwise.merge.tensor_store import differences

if TYPE_CHECKING:
    from grainwise.merge.compeft import TernaryDelta


class DeltaSum(Delta):
    """A weighted sum of ternary deltas, never added up: values are summed as a tensor is read, products term by term.

    Tensors kept outside the updates belong to one expert each; a sum keeps those that all its terms have alike.
    """

    def __init__(self, terms: Sequence[tuple[float, TernaryDelta]]) -> None:
        """terms: (weight, delta), all of one layout, reference and base."""
        self.terms = list(terms)
        first = self.terms[0][1]
        for _, other in self.terms[1:]:
            check_alike(first, other)
        self.layout, self.reference, self.base = first.layout, first.reference, first.base
        self.adapter_config = first.adapter_config
        self.kept = {
            key: tensor
            for key, tensor in first.kept.items()
            if all(key in d.kept and torch.equal(tensor, d.kept[key]) for _, d in self.terms[1:])
        }

    def read(self, key: str) -> Tensor:
        """The summed update of one tensor, float32."""
        total = torch.zeros(self.layout[key].shape)
        for weight, delta in self.terms:
            total.add_(delta.read(key), alpha=weight)
        return total

    def dot(self, other: TernaryDelta | DeltaSum) -> float:
        """The inner product, from the masks of every pair of terms."""
        others = other.terms if isinstance(other, DeltaSum) else [(1.0, other)]
        return math.fsum(a * b * x.dot(y) for a, x in self.terms for b, y in others)

    def norm(self) -> float:
        """The Euclidean norm."""
        return math.sqrt(max(0.0, self.dot(self)))

    def __add__(self, other: TernaryDelta | DeltaSum) -> DeltaSum:
        return DeltaSum([*self.terms, *(other.terms if isinstance(other, DeltaSum) else [(1.0, other)])])

    def __sub__(self, other: TernaryDelta | DeltaSum) -> DeltaSum:
        return self + -1.0 * other

    def __mul__(self, factor: float) -> DeltaSum:
        return DeltaSum([(factor * weight, delta) for weight, delta in self.terms])

    __rmul__ = __mul__


def check_alike(first: Delta, other: Delta) -> None:
    """Raise ValueError unless two updates have one layout and belong to the same reference and base."""
    apart = differences(first.layout, other.layout)
    shapes = [k for k in first.layout if k in other.layout and first.layout[k].shape != other.layout[k].shape]
    if apart or shapes:
        raise ValueError(f"updates of different models cannot be joined: {apart or 'other shapes in ' + ', '.join(shapes[:5])}")
    if first.reference != other.reference:
        raise ValueError(f"updates relative to {first.reference!r} and {other.reference!r} cannot be joined")
    if first.base is not None and other.base is not None and first.base != other.base:
        raise ValueError(
            f"the updates belong to different bases (fingerprints {first.base[:12]} and {other.base[:12]}): "
            "only experts of one base can be joined"
        )
