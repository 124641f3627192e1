"""Pictures for the report: kept in a step's folder, and put into the page as data."""

from __future__ import annotations

import base64
import html
import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from grainwise.recipe.folders import write_text
from grainwise.vision_state import Picture

QUALITY = 88


def save_pictures(pictures: list[Picture], folder: Path) -> None:
    """Write the panels as PNG files and the captions as JSON; nothing for no pictures."""
    if not pictures:
        return
    folder.mkdir(parents=True)
    record = []
    for number, picture in enumerate(pictures, 1):
        files = []
        for letter, (what, pixels) in zip("abcdefgh", picture.panels):
            name = f"{number:02d}{letter}.png"
            Image.fromarray(pixels).save(folder / name)
            files.append([what, name])
        record.append({"caption": picture.caption, "panels": files, "curves": dict(picture.curves)})
    write_text(folder / "pictures.json", json.dumps(record, indent=1))


def read_pictures(folder: Path) -> list[Picture]:
    """What `save_pictures` wrote."""
    file = folder / "pictures.json"
    if not file.is_file():
        return []
    found = []
    for entry in json.loads(file.read_text(encoding="utf-8")):
        panels = tuple((what, np.asarray(Image.open(folder / name).convert("RGB"))) for what, name in entry["panels"])
        found.append(Picture(entry["caption"], panels, {k: tuple(v) for k, v in entry["curves"].items()}))
    return found


def as_image(pixels: np.ndarray, text: str = "", width: int | None = None) -> str:
    """An `img` element that holds the picture, uint8 (height, width, 3), as JPEG; text: for those who do not see it."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="JPEG", quality=QUALITY)
    data = base64.b64encode(stream.getvalue()).decode()
    height = round(pixels.shape[0] * (width or pixels.shape[1]) / pixels.shape[1])
    return (
        f'<img src="data:image/jpeg;base64,{data}" width="{width or pixels.shape[1]}" height="{height}" '
        f'alt="{html.escape(text, quote=True)}">'
    )
