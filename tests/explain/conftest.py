"""Fixtures of the room: a small linear classifier on pixels, and an image."""

from __future__ import annotations

import pytest
import torch
from torch import nn


class PixelClassifier(nn.Module):
    """Logits of four classes from 16x16 images; class c looks at quadrant c alone. Features are pooled colours."""

    def __init__(self, sharpness=6.0):
        super().__init__()
        self.sharpness = sharpness
        self.head = nn.Linear(12, 4, bias=False)
        with torch.no_grad():
            self.head.weight.copy_(torch.eye(4).repeat_interleave(3, dim=1))

    def forward(self, pixel_values):
        quadrants = nn.functional.adaptive_avg_pool2d(pixel_values + 1, 2)  # (n, 3, 2, 2); black is 0 here
        return self.sharpness * self.head(quadrants.flatten(2).mT.flatten(1))


@pytest.fixture
def quadrants():
    return PixelClassifier().eval()


@pytest.fixture
def image():
    return 0.2 + 0.6 * torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="session")
def small_vit():
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(
        image_size=16,
        patch_size=4,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_labels=5,
    )
    model = ViTForImageClassification(config)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(6) if p.ndim > 1 else None
    return model.eval()
