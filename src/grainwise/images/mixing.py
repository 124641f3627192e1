"""Images made from two: blending, pasting, and mixup and cutmix with their soft labels; and erasing.

mixup (arXiv 1710.09412) blends an image with another of the batch, cutmix (arXiv 1905.04899) pastes a rectangle of the
other into it; the label is shared out by weight or by area. Random erasing (arXiv 1708.04896) fills a rectangle.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from grainwise.images.geometry import checked, inside, random_boxes


def blend(images: Tensor, others: Tensor, weight: Tensor) -> Tensor:
    """weight * images + (1 - weight) * others; weight: (batch,) or (1,)."""
    _alike(images, others)
    return torch.lerp(others, images, weight.to(images)[:, None, None, None])


def paste(images: Tensor, others: Tensor, boxes: Tensor) -> Tensor:
    """`others` inside the boxes, `images` outside; boxes: (batch, 4), or (1, 4) for the same box everywhere."""
    _alike(images, others)
    return torch.where(inside(boxes, *images.shape[2:])[:, None], others, images)


def cut_boxes(weight: Tensor, height: int, width: int, generator: torch.Generator) -> Tensor:
    """Whole-pixel boxes (n, 4) of sides sqrt(1 - weight) of the image's, evenly placed centres, cut off at its border.

    weight: (n,), what should remain of the image; `kept_share` says what does. Boxes may be empty.
    """
    side = (1 - weight).sqrt()
    wide, high = (width * side).floor(), (height * side).floor()
    place = torch.rand((2, len(weight)), generator=generator, device=generator.device).to(weight.device)
    x0 = (place[0] * width).floor() - (wide / 2).floor()
    y0 = (place[1] * height).floor() - (high / 2).floor()
    return torch.stack([x0.clamp(0, width), y0.clamp(0, height), (x0 + wide).clamp(0, width), (y0 + high).clamp(0, height)], 1)


def kept_share(boxes: Tensor, height: int, width: int) -> Tensor:
    """(n,): the share of an image's pixels outside whole-pixel boxes (n, 4)."""
    area = (boxes[:, 2] - boxes[:, 0]).clamp(min=0) * (boxes[:, 3] - boxes[:, 1]).clamp(min=0)
    return 1 - area / (height * width)


def soft_labels(labels: Tensor, num_labels: int) -> Tensor:
    """float (batch, num_labels): class indices as one-hot rows; rows that are soft already stay as they are."""
    if labels.ndim == 2 and labels.is_floating_point():
        if labels.shape[1] != num_labels:
            raise ValueError(f"soft labels have {labels.shape[1]} classes, expected {num_labels}")
        return labels
    if labels.ndim != 1 or labels.is_floating_point():
        raise TypeError(f"labels must be class indices (batch,) or rows (batch, classes), got {labels.dtype} {labels.shape}")
    return functional.one_hot(labels.long(), num_labels).float()


def draw_beta(alpha: float, count: int, generator: torch.Generator) -> Tensor:
    """float (count,): draws from Beta(alpha, alpha), on the generator's device."""
    if not alpha > 0:
        raise ValueError(f"alpha must be positive, got {alpha}; Beta(alpha, alpha) is undefined otherwise")
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    drawn = np.random.default_rng(seed).beta(alpha, alpha, count)
    return torch.as_tensor(drawn, dtype=torch.float32, device=generator.device)


def mixup(
    images: Tensor,
    labels: Tensor,
    generator: torch.Generator,
    *,
    num_labels: int,
    alpha: float = 0.2,
    per_sample: bool = False,
) -> tuple[Tensor, Tensor]:
    """Blend every image with another of the batch: (images, soft labels (batch, num_labels)).

    The weight comes from Beta(alpha, alpha): one for the batch, or one for each image with `per_sample`.
    """
    partner, weight = _partners(images, alpha, per_sample, generator)
    targets = soft_labels(labels, num_labels)
    share = weight[:, None].to(targets)
    return blend(images, images[partner], weight), torch.lerp(targets[partner], targets, share)


def cutmix(
    images: Tensor,
    labels: Tensor,
    generator: torch.Generator,
    *,
    num_labels: int,
    alpha: float = 1.0,
    per_sample: bool = False,
) -> tuple[Tensor, Tensor]:
    """Paste a rectangle of another image of the batch into each: (images, soft labels (batch, num_labels)).

    The label is shared out by the pixels that are left after the rectangle was cut off at the border.
    """
    partner, weight = _partners(images, alpha, per_sample, generator)
    height, width = images.shape[2:]
    boxes = cut_boxes(weight, height, width, generator)
    targets = soft_labels(labels, num_labels)
    share = kept_share(boxes, height, width)[:, None].to(targets)
    return paste(images, images[partner], boxes), torch.lerp(targets[partner], targets, share)


def random_erasing(
    images: Tensor,
    generator: torch.Generator,
    *,
    p: float = 0.5,
    scale: tuple[float, float] = (0.02, 0.33),
    ratio: tuple[float, float] = (0.3, 3.3),
    fill: float | Literal["noise"] = 0.0,
) -> Tensor:
    """Fill a random rectangle of each image, with probability `p`, by a constant or by Gaussian noise.

    scale: range of its share of the area; ratio: range of width / height. Meant for normalised images (0 is the mean).
    """
    boxes = random_boxes(checked(images), generator, scale=scale, ratio=ratio)
    chosen = (torch.rand(len(images), generator=generator, device=generator.device) < p).to(images.device)
    erased = inside(boxes, *images.shape[2:]) & chosen[:, None, None]
    if fill == "noise":
        filling = torch.randn(images.shape, generator=generator, device=generator.device).to(images)
        return torch.where(erased[:, None], filling, images)
    return images.masked_fill(erased[:, None], fill)


def _partners(images: Tensor, alpha: float, per_sample: bool, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A permutation of the batch, and weights (batch,) or (1,)."""
    count = len(checked(images))
    weight = draw_beta(alpha, count if per_sample else 1, generator).to(images.device)
    return torch.randperm(count, generator=generator, device=generator.device).to(images.device), weight


def _alike(images: Tensor, others: Tensor) -> None:
    if checked(images).shape != checked(others).shape:
        raise ValueError(f"both batches must have one shape, got {tuple(images.shape)} and {tuple(others.shape)}")
