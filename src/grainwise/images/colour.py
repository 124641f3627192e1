"""What pixels are worth: brightness, contrast, saturation, hue, and normalisation.

The four adjustments take images in [0, 1] and one factor an image; a factor of 1 (hue: 0) changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from grainwise.images.geometry import checked

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
LUMA = (0.299, 0.587, 0.114)  # weights of red, green, blue in the grey value (ITU-R BT.601)
Factor: TypeAlias = float | Tensor  # one number, or (batch,)


def adjust_brightness(images: Tensor, factor: Factor) -> Tensor:
    """Multiply by `factor`: 0 is black."""
    return (checked(images) * _each(factor, images)).clamp(0, 1)


def adjust_contrast(images: Tensor, factor: Factor) -> Tensor:
    """Move away from the mean grey value of the image by `factor`: 0 is that grey."""
    mean = grey(images).mean((2, 3), keepdim=True)
    return torch.lerp(mean.expand_as(images), images, _each(factor, images)).clamp(0, 1)


def adjust_saturation(images: Tensor, factor: Factor) -> Tensor:
    """Move away from the grey value of each pixel by `factor`: 0 is a grey image."""
    return torch.lerp(grey(images).expand_as(images), images, _each(factor, images)).clamp(0, 1)


def adjust_hue(images: Tensor, turn: Factor) -> Tensor:
    """Turn the colour circle by `turn` (1 is a whole turn); value and saturation stay."""
    _three(images)
    top, low = images.amax(1), images.amin(1)
    spread = top - low
    red, green, blue = images.unbind(1)
    safe = torch.where(spread > 0, spread, 1)
    hue = torch.where(
        top == red, (green - blue) / safe, torch.where(top == green, 2 + (blue - red) / safe, 4 + (red - green) / safe)
    )
    hue = (hue / 6 + _each(turn, images)[:, 0]) % 1.0
    # each channel is the value, lowered by the spread as far as its place on the circle is from the hue
    places = torch.tensor([5.0, 3.0, 1.0], device=images.device, dtype=images.dtype)[:, None, None]
    distance = (places + hue[:, None] * 6) % 6
    return top[:, None] - spread[:, None] * torch.minimum(distance, 4 - distance).clamp(0, 1)


def colour_jitter(
    images: Tensor,
    generator: torch.Generator,
    *,
    brightness: float = 0.0,
    contrast: float = 0.0,
    saturation: float = 0.0,
    hue: float = 0.0,
) -> Tensor:
    """The four adjustments with random factors for each image, in a random order for the batch.

    brightness, contrast, saturation: factors from [max(0, 1 - s), 1 + s]. hue: turns from [-hue, hue], at most 0.5.
    """
    if min(brightness, contrast, saturation, hue) < 0 or hue > 0.5:
        raise ValueError(f"strengths must not be negative and hue at most 0.5, got {brightness, contrast, saturation, hue}")
    strengths = (brightness, contrast, saturation, hue)
    adjustments = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)
    order = torch.randperm(4, generator=generator, device=generator.device).tolist()
    draws = torch.rand((4, len(images)), generator=generator, device=generator.device).to(images.device)
    for i in order:
        strength = strengths[i]
        if strength:
            middle = 0.0 if adjustments[i] is adjust_hue else 1.0
            low = middle - strength if middle == 0.0 else max(0.0, middle - strength)
            images = adjustments[i](images, low + (middle + strength - low) * draws[i])
    return images


def normalise(images: Tensor, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD) -> Tensor:
    """(image - mean) / std, channel by channel."""
    centre, width = _statistics(images, mean, std)
    return (images - centre) / width


def denormalise(images: Tensor, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD) -> Tensor:
    """The inverse of `normalise`."""
    centre, width = _statistics(images, mean, std)
    return images * width + centre


def grey(images: Tensor) -> Tensor:
    """(batch, 1, height, width): the grey value of each pixel."""
    weights = torch.tensor(LUMA, device=images.device, dtype=images.dtype)
    return torch.einsum("bchw,c->bhw", _three(images), weights)[:, None]


def _each(factor: Factor, images: Tensor) -> Tensor:
    """(batch or 1, 1, 1, 1) from one number or (batch,)."""
    return torch.as_tensor(factor, device=images.device, dtype=images.dtype).reshape(-1, 1, 1, 1)


def _statistics(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> tuple[Tensor, Tensor]:
    channels = checked(images).shape[1]
    if len(mean) != channels or len(std) != channels or min(std) <= 0:
        raise ValueError(f"images have {channels} channels: give as many means and positive stds, got {mean} and {std}")
    centre, width = (torch.tensor(v, device=images.device, dtype=images.dtype)[:, None, None] for v in (mean, std))
    return centre, width


def _three(images: Tensor) -> Tensor:
    if checked(images).shape[1] != 3:
        raise ValueError(f"colour needs red, green and blue, got {images.shape[1]} channels")
    return images
