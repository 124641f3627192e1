"""Paint many small shapes on many canvases at once.

A stamp is one shape at one place on one canvas. Stamps of a canvas are painted back to front; stamps of different canvases with
the same rank, outline and window are painted together, so that a thousand pictures cost a few hundred array operations.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from grainwise.world.shapes import OUTLINES, SHAPES, texture

WINDOWS = (8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024)


@dataclass
class Stamps:
    """Shapes to paint, one row each.

    canvas, shape, texture, owner, part: integers (m,); rank: what is painted later lies in front; x, y: the centre in pixels;
    a, b: half sizes in pixels; cos, sin: the rotation; colour, second: float32 (m, 3) in [0, 1]. `owner` and `part` are what
    the label maps show where the stamp is seen (owner -1: leave the maps as they are; owner 0: background again, as an
    occluder).
    """

    canvas: np.ndarray
    rank: np.ndarray
    x: np.ndarray
    y: np.ndarray
    a: np.ndarray
    b: np.ndarray
    cos: np.ndarray
    sin: np.ndarray
    shape: np.ndarray
    texture: np.ndarray
    colour: np.ndarray
    second: np.ndarray
    owner: np.ndarray
    part: np.ndarray

    def __len__(self) -> int:
        return len(self.canvas)

    def take(self, which: np.ndarray) -> Stamps:
        """The chosen rows."""
        return Stamps(**{field.name: getattr(self, field.name)[which] for field in fields(self)})

    @staticmethod
    def join(parts: list[Stamps]) -> Stamps:
        """All rows of several."""
        return Stamps(**{field.name: np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(Stamps)})


@dataclass(frozen=True)
class Style:
    """How a picture is made: `outline` darkens the rim (pixels wide), `grain` is the noise of the surface, `softness` blurs
    edges (pixels), `saturation` scales colours towards grey, `shade` is the strength of the light on each part."""

    name: str
    outline: float = 0.0
    grain: float = 0.0
    softness: float = 1.0
    saturation: float = 1.0
    shade: float = 0.28
    paper: tuple[float, float, float] | None = None


STYLES: dict[str, Style] = {
    "plain": Style("plain"),
    "ink": Style("ink", outline=1.3, saturation=0.55, shade=0.0, softness=0.8, paper=(0.94, 0.9, 0.8)),
    "felt": Style("felt", grain=0.16, softness=2.2, saturation=0.85, shade=0.1),
}


class Canvases:
    """n canvases of size x size pixels with their label maps.

    image: float32 (n, size, size, 3) in [0, 1]; owner: uint8 (n, size, size), which thing is seen (0: none); part: uint8,
    which of its parts.
    """

    def __init__(self, image: np.ndarray) -> None:
        self.image = np.ascontiguousarray(image, np.float32)
        self.count, self.size = image.shape[:2]
        self.owner = np.zeros(image.shape[:3], np.uint8)
        self.part = np.zeros(image.shape[:3], np.uint8)

    def paint(self, stamps: Stamps, style: Style, light: np.ndarray, amodal: np.ndarray | None = None) -> None:
        """Paint the stamps, the lowest rank of each canvas first.

        Args:
            stamps: what to paint.
            style: how.
            light: float32 (n, 2), the direction that light comes from on each canvas, in pixels' axes.
            amodal: bool (n, things, size, size) or None; filled with each owner's whole extent, hidden or not (owner 1 in
            plane 0).
        """
        turn = _turns(stamps)
        window = _windows(stamps, self.size)
        order = np.lexsort((stamps.shape, window, turn))
        stamps, turn, window = stamps.take(order), turn[order], window[order]
        key = (turn * len(WINDOWS) + window) * len(SHAPES) + stamps.shape
        starts = np.flatnonzero(np.r_[True, key[1:] != key[:-1]]) if len(key) else np.zeros(0, int)
        for start, end in zip(starts, np.r_[starts[1:], len(key)], strict=True):
            group = stamps.take(slice(start, end))  # type: ignore[arg-type]
            self._paint_group(group, min(WINDOWS[window[start]], self.size), style, light, amodal)

    def _paint_group(self, s: Stamps, side: int, style: Style, light: np.ndarray, amodal: np.ndarray | None) -> None:
        """Paint stamps of one outline and one window size, on different canvases."""
        left = np.minimum(np.maximum(np.floor(s.x - side / 2).astype(np.int64), 0), self.size - side)
        top = np.minimum(np.maximum(np.floor(s.y - side / 2).astype(np.int64), 0), self.size - side)
        steps = np.arange(side)
        dx = (left[:, None] + steps).astype(np.float32) + np.float32(0.5) - s.x[:, None]
        dy = (top[:, None] + steps).astype(np.float32) + np.float32(0.5) - s.y[:, None]
        u = ((s.cos / s.a)[:, None] * dx)[:, None, :] + ((s.sin / s.a)[:, None] * dy)[:, :, None]
        v = ((s.cos / s.b)[:, None] * dy)[:, :, None] - ((s.sin / s.b)[:, None] * dx)[:, None, :]
        thickness = np.minimum(s.a, s.b)[:, None, None] / np.float32(style.softness)
        inside = OUTLINES[SHAPES[s.shape[0]]](u, v) * thickness  # in pixels of softness, negative inside
        row, i, j = np.nonzero(inside < np.float32(0.5))
        if not len(row):
            return
        seen = (row, i, j)
        u, v, inside = u[seen], v[seen], inside[seen]
        cover = np.minimum(np.float32(0.5) - inside, 1)
        place = (s.canvas[row] * self.size + top[row] + i) * self.size + left[row] + j
        colour = _colours(s, row, u, v, inside, style, light)
        pixels = self.image.reshape(-1, 3)
        under = pixels[place]
        pixels[place] = under + cover[:, None] * (colour - under)
        solid = (cover >= np.float32(0.5)) & (s.owner[row] >= 0)
        place, row = place[solid], row[solid]
        self.owner.reshape(-1)[place] = s.owner[row]
        self.part.reshape(-1)[place] = s.part[row]
        if amodal is not None:
            square = self.size * self.size
            plane = s.canvas[row] * amodal.shape[1] + s.owner[row] - 1
            own = s.owner[row] > 0
            amodal.reshape(-1)[(plane * square + place % square)[own]] = True


def _colours(
    s: Stamps, row: np.ndarray, u: np.ndarray, v: np.ndarray, inside: np.ndarray, style: Style, light: np.ndarray
) -> np.ndarray:
    """float32 (pixels, 3): base colour, texture, light, outline and saturation of each pixel of a group."""
    colour = s.colour[row]
    for kind in np.unique(s.texture):
        if kind:
            here = (s.texture[row] == kind) & texture(int(kind), u, v)
            colour[here] = s.second[row[here]]
    if style.saturation != 1:
        grey = colour.mean(1, keepdims=True)
        colour = grey + (colour - grey) * np.float32(style.saturation)
    if style.shade:
        towards = light[s.canvas]
        local_u = (towards[:, 0] * s.cos + towards[:, 1] * s.sin)[row]
        local_v = (towards[:, 1] * s.cos - towards[:, 0] * s.sin)[row]
        colour = colour * (1 + np.float32(style.shade) * (local_u * u + local_v * v))[:, None]
    if style.outline:
        rim = np.clip(inside + np.float32(style.outline), 0, 1)[:, None]
        colour = colour * (1 - np.float32(0.8) * rim)
    return np.minimum(np.maximum(colour, 0), 1)


def _turns(stamps: Stamps) -> np.ndarray:
    """Each stamp's position in the painting order of its own canvas."""
    order = np.lexsort((stamps.rank, stamps.canvas))
    canvas = stamps.canvas[order]
    first = np.flatnonzero(np.r_[True, canvas[1:] != canvas[:-1]]) if len(canvas) else np.zeros(0, int)
    begin = np.repeat(first, np.diff(np.r_[first, len(canvas)]))
    turn = np.empty(len(canvas), np.int64)
    turn[order] = np.arange(len(canvas)) - begin
    return turn


def _windows(stamps: Stamps, size: int) -> np.ndarray:
    """Index into `WINDOWS` of the smallest square that holds each stamp."""
    reach = np.sqrt((stamps.a * stamps.cos) ** 2 + (stamps.b * stamps.sin) ** 2)
    reach = np.maximum(reach, np.sqrt((stamps.a * stamps.sin) ** 2 + (stamps.b * stamps.cos) ** 2))
    corner = np.isin(stamps.shape, [SHAPES.index("square"), SHAPES.index("triangular"), SHAPES.index("cross-shaped")])
    reach = np.where(corner, np.abs(stamps.a * stamps.cos) + np.abs(stamps.b * stamps.sin), reach)
    reach = np.maximum(reach, np.where(corner, np.abs(stamps.a * stamps.sin) + np.abs(stamps.b * stamps.cos), 0))
    needed = np.minimum(2 * reach + 3, size)
    return np.searchsorted(np.array(WINDOWS), needed)
