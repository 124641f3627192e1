"""A picture of an explanation: the image, the map over it, what the best regions show, and the two curves."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from grainwise.explain.faithfulness import Curve
from grainwise.explain.smdl import Attribution

PANEL = 224
INSERTION, DELETION, AXIS, PAPER = (33, 102, 172), (178, 24, 43), (110, 110, 110), (255, 255, 255)


def picture(image: Tensor, found: Attribution) -> Image.Image:
    """Four panels side by side. image: float (3, height, width) in [0, 1]."""
    pixels = image.permute(1, 2, 0).double().cpu().numpy()
    heat = found.map.double().numpy()[..., None]
    cold, hot = np.array([0.1, 0.2, 0.55]), np.array([1.0, 0.85, 0.1])
    overlay = 0.45 * pixels + 0.55 * (cold + heat * (hot - cold))
    best = found.masks[found.explanation].any(0).double().numpy()[..., None]
    panels = [_panel(p) for p in (pixels, overlay, pixels * best)] + [_curves(found.insertion, found.deletion)]
    sheet = Image.new("RGB", (PANEL * len(panels), PANEL), PAPER)
    for i, panel in enumerate(panels):
        sheet.paste(panel, (i * PANEL, 0))
    return sheet


def save_picture(path: str | os.PathLike[str], image: Tensor, found: Attribution) -> None:
    """Write `picture` as PNG, whole or not at all."""
    temporary = Path(f"{os.fspath(path)}.partial")
    picture(image, found).save(temporary, format="PNG")
    temporary.replace(path)


def _panel(pixels: np.ndarray) -> Image.Image:
    small = Image.fromarray((255 * pixels.clip(0, 1)).round().astype(np.uint8))
    return small.resize((PANEL, PANEL), Image.Resampling.NEAREST)


def _curves(insertion: Curve, deletion: Curve) -> Image.Image:
    panel = Image.new("RGB", (PANEL, PANEL), PAPER)
    draw = ImageDraw.Draw(panel)
    left, top, right, bottom = 26, 30, PANEL - 10, PANEL - 24
    draw.line([(left, top), (left, bottom), (right, bottom)], fill=AXIS)
    named = (("insertion", insertion, INSERTION), ("deletion", deletion, DELETION))
    for row, (name, curve, colour) in enumerate(named):
        x = left + curve.share.double().numpy() * (right - left)
        y = bottom - curve.score.double().numpy() * (bottom - top)
        draw.line(list(zip(x.tolist(), y.tolist())), fill=colour, width=2)
        draw.text((left, 2 + 12 * row), f"{name} {curve.area:.3f}", fill=colour)
    draw.text((left, bottom + 6), "share of pixels", fill=AXIS)
    return panel
