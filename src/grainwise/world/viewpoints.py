"""Several views of one individual: the same thing from eight sides, some of which hide the part that decides its species."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from grainwise.world.individuals import Individuals, Nuisance
from grainwise.world.taxonomy import World

TURNTABLE = Nuisance(place=0.03, turn=4.0, azimuth=0.0, flip=False, clutter=0, occlusion=0.0)


@dataclass(frozen=True)
class Views:
    """n individuals seen from v sides.

    images: uint8 (n, v, size, size, 3); azimuths: float32 (v,), degrees; decisive: bool (n, v), whether at least `seen`
    pixels of the deciding part show; key_pixels: int64 (n, v); individuals: the n x v drawings in full, view by view.
    """

    images: np.ndarray
    azimuths: np.ndarray
    decisive: np.ndarray
    key_pixels: np.ndarray
    individuals: Individuals


def draw_views(
    world: World,
    labels: np.ndarray,
    numbers: np.ndarray,
    *,
    views: int = 8,
    size: int = 64,
    style: str = "plain",
    seen: int = 4,
) -> Views:
    """Draw each individual from `views` sides, evenly around the vertical axis.

    Light, background and colours of an individual are the same in all its views. Raises ValueError for fewer than two views.
    """
    if views < 2:
        raise ValueError(f"views is {views}; several views start at two")
    labels, numbers = (np.array(a) for a in np.broadcast_arrays(np.atleast_1d(labels), np.atleast_1d(numbers)))
    azimuths = (360 * np.arange(views) / views).astype(np.float32)
    drawn = world.draw(
        np.repeat(labels, views),
        np.repeat(numbers, views),
        size=size,
        style=style,
        nuisance=TURNTABLE,
        azimuth=np.tile(azimuths, len(labels)),
    )
    pixels = drawn.key_parts.sum((1, 2)).reshape(len(labels), views)
    return Views(drawn.images.reshape(len(labels), views, size, size, 3), azimuths, pixels >= seen, pixels, drawn)
