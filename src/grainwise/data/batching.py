"""Which rows each training step sees."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def shuffled_rows(count: int, batch_size: int, steps: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Row numbers below `count`, int64 (batch_size,), of `steps` batches; every row once an epoch, in an order drawn anew.

    A batch may span epochs, and holds rows of small sets several times.
    """
    left = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        while len(left) < batch_size:
            left = torch.cat([left, torch.randperm(count, generator=generator)])
        yield left[:batch_size]
        left = left[batch_size:]
