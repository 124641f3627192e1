"""Partitions of an image into regions: bool tensors (regions, height, width) that cover every pixel exactly once."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from grainwise.extras import require


def split_grid(height: int, width: int, grid: int) -> Tensor:
    """grid x grid patches, row by row: bool (grid², height, width)."""
    return _as_masks(patch_numbers(height, width, grid), grid * grid)


def split_by_saliency(saliency: Tensor, grid: int = 10, per_region: int = 4) -> Tensor:
    """The paper's own division: patches of a grid, sorted by a saliency map, in groups of `per_region`.

    saliency: float (height, width), from any explainer. A region is a set of about equally salient, possibly scattered
    patches; the first is the most salient, and left-over patches form a last, smaller region. bool (regions, height, width).
    Warns when the map is constant, since then the order of patches says nothing.
    """
    if saliency.ndim != 2 or not torch.isfinite(saliency).all():
        raise ValueError(f"a saliency map must be finite and (height, width), got {tuple(saliency.shape)}")
    if per_region < 1:
        raise ValueError(f"per_region must be at least 1, got {per_region}")
    height, width = saliency.shape
    numbers = patch_numbers(height, width, grid)
    level = interpolate(saliency[None, None].float(), size=(grid, grid), mode="area").flatten()
    if float(level.max() - level.min()) == 0:
        warnings.warn("the saliency map is constant: the division into regions follows the grid", stacklevel=2)
    rank = torch.empty(grid * grid, dtype=torch.long)
    rank[torch.argsort(level, descending=True, stable=True)] = torch.arange(grid * grid)
    region = rank // per_region
    return _as_masks(region[numbers], int(region.max()) + 1)


def split_superpixels(image: Tensor, segments: int = 50, *, compactness: float = 10.0) -> Tensor:
    """Superpixels of SLIC with zero-parameter compactness (scikit-image, extra `vision`): bool (regions, height, width).

    image: float (3, height, width) in [0, 1].
    """
    if image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(f"superpixels need one image (3, height, width), got {tuple(image.shape)}")
    slic = require("skimage.segmentation", extra="vision").slic
    pixels = image.permute(1, 2, 0).double().cpu().numpy()
    found = slic(pixels, n_segments=segments, compactness=compactness, slic_zero=True, start_label=0)
    return from_numbers(torch.as_tensor(found))


def split_by_masks(masks: Tensor) -> Tensor:
    """Overlapping masks (such as SAM's) made disjoint: bool (regions, height, width).

    Smaller masks lie on top of larger ones; what no mask covers is the last region; masks that vanish are dropped.
    """
    if masks.ndim != 3 or masks.dtype != torch.bool:
        raise ValueError(f"masks must be bool (masks, height, width), got {masks.dtype} {tuple(masks.shape)}")
    numbers = torch.full(masks.shape[1:], len(masks), dtype=torch.long)
    for i in torch.argsort(masks.flatten(1).sum(1), descending=True, stable=True).tolist():
        numbers[masks[i]] = i
    return from_numbers(numbers)


def from_numbers(numbers: Tensor) -> Tensor:
    """Region numbers (height, width), any integers, as bool masks (regions, height, width) in ascending order."""
    values, dense = torch.unique(numbers, return_inverse=True)
    return _as_masks(dense, len(values))


def check_partition(masks: Tensor, height: int, width: int) -> Tensor:
    """The masks. Raises ValueError, naming regions, unless they are a partition of height x width pixels."""
    if masks.ndim != 3 or masks.dtype != torch.bool:
        raise ValueError(f"regions must be bool (regions, height, width), got {masks.dtype} {tuple(masks.shape)}")
    if masks.shape[1:] != (height, width):
        raise ValueError(f"regions are {tuple(masks.shape[1:])} pixels, the image {(height, width)}")
    empty = torch.nonzero(~masks.flatten(1).any(1))[:, 0].tolist()
    if empty:
        raise ValueError(f"regions {empty[:10]} are empty: drop them")
    cover = masks.sum(0)
    if (cover > 1).any():
        row, column = torch.nonzero(cover > 1)[0].tolist()
        both = torch.nonzero(masks[:, row, column])[:, 0].tolist()
        raise ValueError(f"regions {both} overlap, for example at row {row}, column {column}: use split_by_masks")
    if (cover == 0).any():
        raise ValueError(f"{int((cover == 0).sum())} pixels belong to no region: add a region for the rest")
    return masks


def patch_numbers(height: int, width: int, grid: int) -> Tensor:
    """int64 (height, width): the number of the grid's patch that each pixel is in, row by row."""
    if not 1 <= grid <= min(height, width):
        raise ValueError(f"grid must lie in 1..{min(height, width)} for {height} x {width} pixels, got {grid}")
    rows = torch.arange(height) * grid // height
    columns = torch.arange(width) * grid // width
    return rows[:, None] * grid + columns


def _as_masks(numbers: Tensor, count: int) -> Tensor:
    return numbers[None] == torch.arange(count)[:, None, None]
