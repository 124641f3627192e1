"""Where pixels go: resizing, cropping, flipping, and sampling by boxes."""

from __future__ import annotations

import math
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

Size: TypeAlias = int | tuple[int, int]  # one side of a square, or (height, width)
CROP_TRIES = 10  # candidate rectangles an image draws before it takes the largest central one


def from_uint8(images: Tensor | np.ndarray) -> Tensor:
    """Pixels as numbers: uint8 (batch, height, width, channels), or (batch, channels, height, width), to float in [0, 1].

    The channels (1, 3 or 4) are looked for in the last place first. Raises TypeError unless uint8.
    """
    tensor = torch.as_tensor(images)
    if tensor.dtype != torch.uint8 or tensor.ndim != 4:
        raise TypeError(f"expected uint8 images (batch, height, width, channels), got {tensor.dtype} {tuple(tensor.shape)}")
    if tensor.shape[3] in (1, 3, 4):
        tensor = tensor.permute(0, 3, 1, 2)
    elif tensor.shape[1] not in (1, 3, 4):
        raise TypeError(f"expected 1, 3 or 4 channels in the last or second place, got shape {tuple(tensor.shape)}")
    return tensor.to(torch.float32, memory_format=torch.contiguous_format).div_(255)


def resize(images: Tensor, size: Size, *, antialias: bool = True) -> Tensor:
    """Bilinear resize to `size`; antialias: average over the source pixels that a smaller image merges."""
    checked(images)
    return functional.interpolate(images, sides(size), mode="bilinear", align_corners=False, antialias=antialias)


def centre_crop(images: Tensor, size: Size) -> Tensor:
    """The middle of every image. Raises ValueError where the images are smaller than `size`."""
    height, width = _fitting(images, size)
    top, left = (images.shape[2] - height) // 2, (images.shape[3] - width) // 2
    return images[:, :, top : top + height, left : left + width]


def random_crop(images: Tensor, generator: torch.Generator, *, size: Size, padding: int = 0) -> Tensor:
    """A crop at a random place of each image, after `padding` black pixels on every side."""
    padded = functional.pad(checked(images), [padding] * 4) if padding else images
    height, width = _fitting(padded, size)
    count, device = len(images), images.device
    top = torch.randint(padded.shape[2] - height + 1, (count, 1), generator=generator, device=generator.device).to(device)
    left = torch.randint(padded.shape[3] - width + 1, (count, 1), generator=generator, device=generator.device).to(device)
    rows, columns = top + torch.arange(height, device=device), left + torch.arange(width, device=device)
    batch, channels = torch.arange(count, device=device), torch.arange(images.shape[1], device=device)
    return padded[batch[:, None, None, None], channels[:, None, None], rows[:, None, :, None], columns[:, None, None, :]]


def random_flip(images: Tensor, generator: torch.Generator, *, p: float = 0.5) -> Tensor:
    """Mirror each image left to right with probability `p`."""
    return torch.where(_coin(images, generator, p), checked(images).flip(3), images)


def random_vertical_flip(images: Tensor, generator: torch.Generator, *, p: float = 0.5) -> Tensor:
    """Mirror each image top to bottom with probability `p`."""
    return torch.where(_coin(images, generator, p), checked(images).flip(2), images)


def crop_resize(images: Tensor, boxes: Tensor, size: Size) -> Tensor:
    """One box of each image, sampled bilinearly at `size`, corner pixel to corner pixel.

    images: float (batch, channels, H, W). boxes: (batch, 4), x0 y0 x1 y1 in pixels, far edges excluded, fractions allowed;
    at least one pixel wide and high, inside the image. Equals
    `interpolate(image[:, y0:y1, x0:x1], size, mode="bilinear", align_corners=True)` for every image, in one batched
    sampling, without anti-aliasing; gradients flow to the images. Returns (batch, channels, *size).

    Raises ValueError for boxes of a wrong shape, and, where looking costs no wait for a device, outside the image.
    """
    height, width = sides(size)
    if boxes.shape != (len(checked(images)), 4):
        raise ValueError(f"expected one box (x0, y0, x1, y1) for each of {len(images)} images, got shape {tuple(boxes.shape)}")
    boxes = boxes.to(torch.float32)
    if boxes.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_boxes(boxes, *images.shape[2:])
    count, channels, full_height, full_width = images.shape
    low, high, share = _taps(boxes[:, 1], boxes[:, 3], height, full_height)
    first = torch.arange(count, device=images.device)[:, None] * full_height  # rows of all channels lie together: copied whole
    lines = images.transpose(1, 2).reshape(count * full_height, channels * full_width)
    above, below = (lines.index_select(0, (first + i).flatten()) for i in (low, high))
    rows = torch.lerp(above, below, share.to(images.dtype).reshape(-1, 1)).view(count, height, channels, full_width)
    low, high, share = _taps(boxes[:, 0], boxes[:, 2], width, full_width)
    left, right = (rows.gather(3, i[:, None, None].expand(count, height, channels, width)) for i in (low, high))
    return torch.lerp(left, right, share.to(images.dtype)[:, None, None]).transpose(1, 2).contiguous()


def _taps(start: Tensor, stop: Tensor, count: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Linear sampling of `count` even places from pixel `start` to pixel `stop` - 1, both (batch,), among `length`.

    Returns (batch, count) each: the pixel before the place, the pixel after it, and how far from the first to the second.
    """
    whole = start.floor()
    step = (stop - 1 - start) / max(count - 1, 1)
    place = (start - whole)[:, None] + step[:, None] * torch.arange(count, device=start.device)  # small, so exact enough
    before = place.floor()
    low = (whole[:, None] + before).long().clamp(0, length - 1)
    return low, (low + 1).clamp(max=length - 1), place - before


def random_resized_crop(
    images: Tensor,
    generator: torch.Generator,
    *,
    size: Size,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Tensor:
    """A random part of each image, resized to `size`.

    scale: range of its share of the area. ratio: range of width / height, drawn evenly in the logarithm. An image whose
    ten candidates all stick out takes the largest central part of an allowed ratio.
    """
    return crop_resize(images, random_boxes(checked(images), generator, scale=scale, ratio=ratio), size)


def random_boxes(
    images: Tensor, generator: torch.Generator, *, scale: tuple[float, float], ratio: tuple[float, float]
) -> Tensor:
    """(batch, 4) whole-pixel boxes inside the images, with shares of the area in `scale` and width / height in `ratio`."""
    height, width = images.shape[2:]
    count = len(images)
    draw = torch.rand((4, count, CROP_TRIES), generator=generator, device=generator.device).to(images.device)
    area = height * width * (scale[0] + (scale[1] - scale[0]) * draw[0])
    shape = torch.exp(math.log(ratio[0]) + (math.log(ratio[1]) - math.log(ratio[0])) * draw[1])
    wide, high = (area * shape).sqrt().round(), (area / shape).sqrt().round()
    fits = (wide >= 1) & (high >= 1) & (wide <= width) & (high <= height)
    chosen = fits.int().argmax(1, keepdim=True)  # the first candidate that fits
    wide, high = wide.gather(1, chosen)[:, 0], high.gather(1, chosen)[:, 0]
    left, top = (draw[i].gather(1, chosen)[:, 0] for i in (2, 3))
    central = min(width, round(height * ratio[1])), min(height, round(width / ratio[0]))
    none = ~fits.any(1)
    wide, high = torch.where(none, central[0], wide), torch.where(none, central[1], high)
    left, top = torch.where(none, 0.5, left), torch.where(none, 0.5, top)
    left, top = (
        (left * (width - wide + 1)).floor().clamp(max=width - wide),
        (top * (height - high + 1)).floor().clamp(max=height - high),
    )
    return torch.stack([left, top, left + wide, top + high], 1)


def inside(boxes: Tensor, height: int, width: int) -> Tensor:
    """bool (batch, height, width): the pixels of each box (batch, 4); a pixel belongs to a box if its centre does."""
    y = torch.arange(height, device=boxes.device) + 0.5
    x = torch.arange(width, device=boxes.device) + 0.5
    x0, y0, x1, y1 = boxes.unbind(1)
    rows = (y >= y0[:, None]) & (y < y1[:, None])
    columns = (x >= x0[:, None]) & (x < x1[:, None])
    return rows[:, :, None] & columns[:, None, :]


def checked(images: Tensor) -> Tensor:
    """The images, or an error that says what an image batch is."""
    if not isinstance(images, Tensor) or images.ndim != 4 or not images.is_floating_point():
        found = f"{images.dtype} {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"expected a float tensor (batch, channels, height, width), got {found}; pixels go through from_uint8")
    return images


def sides(size: Size) -> tuple[int, int]:
    """(height, width) of a size."""
    height, width = (size, size) if isinstance(size, int) else size
    if height < 1 or width < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    return height, width


def _fitting(images: Tensor, size: Size) -> tuple[int, int]:
    height, width = sides(size)
    if checked(images).shape[2] < height or images.shape[3] < width:
        raise ValueError(f"cannot crop {height} x {width} from images of {images.shape[2]} x {images.shape[3]}: resize first")
    return height, width


def _coin(images: Tensor, generator: torch.Generator, p: float) -> Tensor:
    """bool (batch, 1, 1, 1), true with probability `p`."""
    return (torch.rand(len(images), generator=generator, device=generator.device) < p).to(images.device)[:, None, None, None]


def _check_boxes(boxes: Tensor, height: int, width: int) -> None:
    x0, y0, x1, y1 = boxes.unbind(1)
    good = (x0 >= 0) & (y0 >= 0) & (x1 <= width) & (y1 <= height) & (x1 - x0 >= 1) & (y1 - y0 >= 1)
    if not bool(good.all()):
        wrong = int((~good).int().argmax())
        raise ValueError(
            f"box {boxes[wrong].tolist()} of image {wrong} must lie inside {width} x {height} (x0 y0 x1 y1) and hold a pixel"
        )
