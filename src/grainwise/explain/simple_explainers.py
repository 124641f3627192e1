"""Well-known explainers to compare with: RISE, occlusion, Grad-CAM, Kernel SHAP and HSIC, as maps float (height, width).

The black-box ones take a scorer and say how many images they may look at, so that they compare at equal cost.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from grainwise.explain.regions import patch_numbers
from grainwise.explain.set_scorer import SetScorer, logits_of


def rise(scorer: SetScorer, image: Tensor, target: int, *, images: int = 650, grid: int = 7, seed: int = 0) -> Tensor:
    """The mean of random smooth masks, weighted by the target's probability (Petsiuk, Das, Saenko, arXiv 1806.07421)."""
    generator = torch.Generator().manual_seed(seed)
    height, width = image.shape[1:]
    cell_h, cell_w = math.ceil(height / grid), math.ceil(width / grid)
    drawn = (torch.rand(images, 1, grid + 1, grid + 1, generator=generator) < 0.5).float()
    large = interpolate(drawn, size=((grid + 1) * cell_h, (grid + 1) * cell_w), mode="bilinear", align_corners=False)
    top = torch.randint(cell_h, (images,), generator=generator).tolist()
    left = torch.randint(cell_w, (images,), generator=generator).tolist()
    masks = torch.stack([m[:, t : t + height, s : s + width] for m, t, s in zip(large, top, left)]).to(image)
    scores = scorer(image * masks).probabilities[:, target].to(image)
    return (scores[:, None, None] * masks[:, 0]).sum(0) / masks[:, 0].sum(0).clamp(min=1e-6)


def occlusion(scorer: SetScorer, image: Tensor, target: int, *, images: int = 650) -> Tensor:
    """How much the target loses where a black window stands: windows of a fifth of each side, on an even lattice."""
    height, width = image.shape[1:]
    lattice = max(2, math.isqrt(images - 1))
    size_h, size_w = max(1, height // 5), max(1, width // 5)
    tops = torch.linspace(0, height - size_h, lattice).round().long()
    lefts = torch.linspace(0, width - size_w, lattice).round().long()
    row, column = torch.arange(height), torch.arange(width)
    in_rows = (row >= tops[:, None]) & (row < tops[:, None] + size_h)
    in_columns = (column >= lefts[:, None]) & (column < lefts[:, None] + size_w)
    windows = (in_rows[:, None, :, None] & in_columns[None, :, None, :]).flatten(0, 1).to(image)
    full = scorer(image[None]).probabilities[0, target]
    loss = (full - scorer(image * (1 - windows[:, None])).probabilities[:, target]).to(image)
    return (loss[:, None, None] * windows).sum(0) / windows.sum(0).clamp(min=1)


def kernel_shap(scorer: SetScorer, image: Tensor, target: int, *, images: int = 650, grid: int = 7, seed: int = 0) -> Tensor:
    """Shapley values of the grid's patches by weighted regression on random coalitions (Lundberg, Lee, arXiv 1705.07874)."""
    generator = torch.Generator().manual_seed(seed)
    patches = grid * grid
    sizes = torch.arange(1, patches)
    chosen = torch.multinomial(1 / (sizes * (patches - sizes)).double(), images - 2, replacement=True, generator=generator)
    order = torch.rand(images - 2, patches, generator=generator).argsort(1).argsort(1)
    coalition = (order < sizes[chosen][:, None]).double()
    numbers = patch_numbers(image.shape[1], image.shape[2], grid)
    shown = coalition[:, numbers].to(image)
    ends = scorer(torch.stack([torch.zeros_like(image), image])).probabilities[:, target].double().cpu()
    values = scorer(image * shown[:, None]).probabilities[:, target].double().cpu()
    # drawn by the Shapley kernel, so every coalition weighs the same; the sum of all values is fixed by the two ends
    last = coalition[:, -1:]
    right = values - ends[0] - last[:, 0] * (ends[1] - ends[0])
    found = torch.linalg.lstsq(coalition[:, :-1] - last, right[:, None], driver="gelsd").solution[:, 0]
    shares = torch.cat([found, (ends[1] - ends[0] - found.sum())[None]])
    return shares[numbers].to(image)


def hsic(scorer: SetScorer, image: Tensor, target: int, *, images: int = 650, grid: int = 7, seed: int = 0) -> Tensor:
    """Dependence between each patch's visibility and the score (Novello, Fel, Vigouroux, arXiv 2206.06219)."""
    generator = torch.Generator().manual_seed(seed)
    shown = (torch.rand(images, grid * grid, generator=generator) < 0.5).double()
    numbers = patch_numbers(image.shape[1], image.shape[2], grid)
    values = scorer(image * shown[:, numbers][:, None].to(image)).probabilities[:, target].double().cpu()
    gap = (values[:, None] - values[None]).square()
    output = torch.exp(-gap / (2 * gap.median().clamp(min=1e-12)))
    centred = output - output.mean(0) - output.mean(1, keepdim=True) + output.mean()
    sign = shown - 0.5  # for a binary input the kernel x x' is characteristic, and HSIC is this quadratic form
    return ((sign * (centred @ sign)).sum(0) / images**2)[numbers].to(image)


def gradcam(model: nn.Module, image: Tensor, target: int, *, layer: nn.Module | None = None, **normalisation: object) -> Tensor:
    """Grad-CAM (Selvaraju et al., arXiv 1610.02391) of one image (3, height, width) in [0, 1]: one pass and its gradient.

    layer: whose output is read, feature maps (1, channels, h, w) or tokens (1, [class +] h · w, channels); default: the last
    `layernorm_before` of a transformers ViT, otherwise the last convolution. mean, std: as in `ClassifierScorer`.
    """
    mean = torch.tensor(normalisation.pop("mean", (0.5, 0.5, 0.5)), dtype=torch.float32)[:, None, None]
    std = torch.tensor(normalisation.pop("std", (0.5, 0.5, 0.5)), dtype=torch.float32)[:, None, None]
    if normalisation:
        raise TypeError(f"unknown arguments {sorted(normalisation)}; expected mean and std")
    kept: list[Tensor] = []
    handle = (layer or default_layer(model)).register_forward_hook(lambda m, i, o: kept.append(o))
    try:
        with torch.enable_grad():
            pixels = ((image[None] - mean.to(image)) / std.to(image)).requires_grad_()
            score = logits_of(model(pixels))[0, target]
            slope = torch.autograd.grad(score, kept[-1])[0]
    finally:
        handle.remove()
    activation, slope = as_map(kept[-1].detach()), as_map(slope)
    heat = (slope.mean((1, 2), keepdim=True) * activation).sum(0).relu()
    return interpolate(heat[None, None], size=image.shape[1:], mode="bilinear", align_corners=False)[0, 0]


def default_layer(model: nn.Module) -> nn.Module:
    """The layer that Grad-CAM reads. Raises ValueError when there is none."""
    norms = [m for name, m in model.named_modules() if name.endswith("layernorm_before")]
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    if not norms and not convolutions:
        raise ValueError(f"{type(model).__name__} has neither ViT blocks nor convolutions: give layer=")
    return norms[-1] if norms else convolutions[-1]


def as_map(values: Tensor) -> Tensor:
    """(1, channels, h, w), or tokens (1, [class +] h · w, channels), as (channels, h, w)."""
    if values.ndim == 4:
        return values[0]
    side = math.isqrt(values.shape[1])
    tokens = values[0, -side * side :]
    if values.shape[1] - side * side not in (0, 1):
        raise ValueError(f"{values.shape[1]} tokens are no square grid, with or without a class token")
    return tokens.T.reshape(-1, side, side)
