"""Which region to look at again: similarity of patches to the global token, the box around the top ones, and controls."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from grainwise.images.geometry import Size, sides
from grainwise.naming import did_you_mean

DOMINANT = 0.5  # a channel with more of the squared norm than this decides every cosine


def global_local_similarity(
    hidden: Tensor, metric: str = "cos", *, prefix: int = 1, global_token: Tensor | None = None
) -> Tensor:
    """How close each patch token is to the global one: float32 (batch, patches); larger is closer.

    hidden: (batch, prefix + patches, width), after the final norm. prefix: class, distillation and register tokens; the first
    is the global token unless `global_token` (batch, width) is given. metric: `cos` gives the cosine, `l1` and `l2` the
    negative mean absolute and squared difference. The sums run in float32.
    """
    if hidden.ndim != 3 or hidden.shape[1] <= prefix:
        raise ValueError(f"expected hidden states (batch, {prefix} + patches, width), got {tuple(hidden.shape)}")
    if prefix < 1 and global_token is None:
        raise ValueError("GLS needs a global token: pass global_token, for example the patch mean")
    whole = (hidden[:, 0] if global_token is None else global_token).float()[:, None]
    patches = hidden[:, prefix:].float()
    if metric == "cos":
        return functional.cosine_similarity(whole, patches, dim=-1, eps=1e-12).clamp(-1, 1)
    if metric == "l1":
        return -(whole - patches).abs().mean(-1)
    if metric == "l2":
        return -(whole - patches).square().mean(-1)
    raise ValueError(f"metric {metric!r} is unknown. {did_you_mean(metric, ('cos', 'l1', 'l2'))}")


def topk_box(scores: Tensor, k: int, grid: tuple[int, int], patch: int, size: Size, *, inclusive: bool) -> Tensor:
    """Pixel boxes (batch, 4) around the `k` best patches, x0 y0 x1 y1 with the far edges excluded.

    scores: (batch, rows * columns) of `grid`. inclusive: reach to the far edge of the last selected patch; otherwise to its
    near edge, as in the authors' code, but never less than one patch. Raises ValueError for k outside 1..patches and a
    grid that does not fit the scores or the image.
    """
    rows, columns = grid
    if scores.shape[1] != rows * columns:
        raise ValueError(f"{scores.shape[1]} patches do not form a grid of {rows} x {columns}")
    if not 1 <= k <= rows * columns:
        raise ValueError(f"k must lie in 1..{rows * columns} (the patches), got {k}")
    if sides(size) != (rows * patch, columns * patch):
        raise ValueError(f"a grid of {rows} x {columns} patches of {patch} does not cover an image of size {size}")
    best = scores.topk(k, dim=1).indices
    row, column = best // columns, best % columns
    low = torch.stack([column.amin(1), row.amin(1)], 1)
    high = torch.stack([column.amax(1), row.amax(1)], 1) + int(inclusive)
    return torch.cat([low, torch.maximum(high, low + 1)], 1) * patch


@torch.no_grad()
def select_crops(
    hidden: Tensor,
    *,
    k: int = 8,
    grid: tuple[int, int] | None = None,
    patch: int,
    image_size: Size,
    metric: str = "cos",
    prefix: int = 1,
    inclusive: bool = False,
) -> Tensor:
    """Pixel boxes (batch, 4) around the `k` patches most similar to the class token, from any ViT's hidden states.

    hidden: (batch, prefix + rows * columns, width), after the final norm. grid: (rows, columns), needed where the patches
    form no square. Warns where one channel dominates the tokens, which is how states before the norm look.
    """
    scores = global_local_similarity(hidden, metric, prefix=prefix)
    _warn_if_dominated(hidden)
    return topk_box(scores, k, grid or square_grid(scores.shape[1]), patch, image_size, inclusive=inclusive)


def square_grid(patches: int) -> tuple[int, int]:
    """(side, side). Raises ValueError where the patches form no square."""
    side = math.isqrt(patches)
    if side * side != patches:
        raise ValueError(f"{patches} patches form no square: pass grid=(rows, columns)")
    return side, side


def attention_rollout(attentions: Sequence[Tensor], *, prefix: int = 1) -> Tensor:
    """How much of each patch reaches the class token through all layers: (batch, patches). The usual rival selector.

    attentions: one (batch, heads, tokens, tokens) a layer. Rollout (arXiv 2005.00928) multiplies the head means, each
    averaged with the identity; only the class token's row is wanted, so a row is multiplied through, last layer first.
    """
    row = _with_skip(attentions[-1])[:, :1]
    for attention in reversed(attentions[:-1]):
        row = row @ _with_skip(attention)
    return row[:, 0, prefix:]


def placed_at_random(boxes: Tensor, size: Size, generator: torch.Generator | None = None) -> Tensor:
    """Boxes of the same sizes at even random whole-pixel places. The control for "is it the place that matters?"."""
    device = generator.device if generator is not None else boxes.device
    draw = torch.rand((len(boxes), 2), generator=generator, device=device).to(boxes.device)
    extent = boxes[:, 2:] - boxes[:, :2]
    corner = (draw * (_room(boxes, size) - extent + 1)).floor().to(boxes.dtype)
    return torch.cat([corner, corner + extent], 1)


def placed_at_centre(boxes: Tensor, size: Size) -> Tensor:
    """Boxes of the same sizes in the middle of the image."""
    extent = boxes[:, 2:] - boxes[:, :2]
    corner = torch.div(_room(boxes, size) - extent, 2, rounding_mode="floor")
    return torch.cat([corner, corner + extent], 1)


def _room(boxes: Tensor, size: Size) -> Tensor:
    height, width = sides(size)
    return torch.tensor([width, height], device=boxes.device, dtype=boxes.dtype)


def _with_skip(attention: Tensor) -> Tensor:
    """(batch, tokens, tokens): the head mean, averaged with the identity that stands for the residual path."""
    mean = attention.float().mean(1)
    return (mean + torch.eye(mean.shape[-1], device=mean.device)) / 2


def _warn_if_dominated(hidden: Tensor) -> None:
    energy = hidden.float().square().mean((0, 1))
    share = float(energy.max() / energy.sum().clamp(min=1e-30))
    if hidden.shape[2] >= 8 and share > DOMINANT:
        warnings.warn(
            f"one channel holds {share:.0%} of the tokens' squared norm and decides the similarity: these look like hidden "
            "states before the final norm; pass them through it first",
            stacklevel=3,
        )
