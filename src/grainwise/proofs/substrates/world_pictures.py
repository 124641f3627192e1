"""Pictures of microworld species as tensors."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from grainwise.world import World


def pictures(world: World, labels: np.ndarray, first: int, size: int, **options: object) -> Tensor:
    """float32 (n, 3, size, size) in [0, 1]; individuals are numbered from `first`."""
    drawn = world.draw(labels, first + np.arange(len(labels)), size=size, **options)
    return torch.from_numpy(drawn.images).permute(0, 3, 1, 2).float().div_(255)
