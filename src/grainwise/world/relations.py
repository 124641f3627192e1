"""What the pixels of a scene say: areas, boxes, who stands on what, and how individuals stand to each other.

Relations are defined on everything of an individual that lies in the picture, hidden or not:
left of / right of / above / below: the boxes' centres differ by a tenth of the picture's side, and by half as much as the
other way; in front of / behind: the two overlap, and the first is nearer / farther; touching: what is seen of both meets
along an edge of a pixel; larger than / smaller than: one and a half times the area.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from grainwise.world.backgrounds import STUFF_NAMES
from grainwise.world.body_plans import PLANS
from grainwise.world.individuals import boxes_of

RELATIONS = ("left of", "right of", "above", "below", "in front of", "behind", "touching", "larger than", "smaller than")
PARTS = max(map(len, PLANS.values()))
STANDS = 0.6


@dataclass
class Pixels:
    """Measurements of n scenes with room for m individuals.

    amodal: bool (n, m, size, size); areas, amodal_areas, on: int64 (n, m); boxes, amodal_boxes: float32 (n, m, 4);
    part_areas: int64 (n, m, PARTS); part_boxes: float32 (n, m, PARTS, 4); shared, meeting: bool (n, m, m), overlap and a
    common border.
    """

    amodal: np.ndarray
    areas: np.ndarray
    amodal_areas: np.ndarray
    on: np.ndarray
    boxes: np.ndarray
    amodal_boxes: np.ndarray
    part_areas: np.ndarray
    part_boxes: np.ndarray
    shared: np.ndarray
    meeting: np.ndarray


def measure(owner: np.ndarray, part: np.ndarray, stuff: np.ndarray, amodal: np.ndarray) -> Pixels:
    """Measure scenes from their maps: owner, part, stuff uint8 (n, size, size); amodal bool (n, m, size, size)."""
    n, most = amodal.shape[:2]
    part_areas, part_boxes = _parts(owner, part, most)
    flat = amodal.reshape(n, most, -1).astype(np.float32)
    ground = (stuff.reshape(n, -1, 1) == np.arange(len(STUFF_NAMES))).astype(np.float32)
    under = np.matmul(flat, ground)
    amodal_areas = under.sum(-1).astype(np.int64)
    on = np.where(under.max(-1) >= np.float32(STANDS) * amodal_areas, under.argmax(-1), -1)
    low = np.where(part_areas[..., None] > 0, part_boxes[..., :2], np.inf).min(2)
    areas = part_areas.sum(-1)
    boxes = np.concatenate([low, part_boxes[..., 2:].max(2)], -1)
    return Pixels(
        amodal=amodal,
        areas=areas,
        amodal_areas=amodal_areas,
        on=np.where(amodal_areas > 0, on, -1),
        boxes=np.where(areas[..., None] > 0, boxes, 0).astype(np.float32),
        amodal_boxes=_boxes(amodal),
        part_areas=part_areas,
        part_boxes=part_boxes,
        shared=np.matmul(flat, flat.transpose(0, 2, 1)) * (1 - np.eye(most, dtype=np.float32)) > 0,
        meeting=_meeting(owner, most),
    )


def relate(pixels: Pixels, depth: np.ndarray, size: int) -> np.ndarray:
    """bool (n, len(RELATIONS), m, m): [r, a, b], whether a is in relation r to b. depth (n, m): larger is nearer."""
    centre = (pixels.amodal_boxes[..., :2] + pixels.amodal_boxes[..., 2:]) / 2
    x, y = centre[..., 0], centre[..., 1]
    right, down = x[:, None] - x[..., None], y[:, None] - y[..., None]  # of b, as seen from a
    left = (right >= np.float32(size / 10)) & (2 * right >= np.abs(down))
    above = (down >= np.float32(size / 10)) & (2 * down >= np.abs(right))
    front = pixels.shared & (depth[..., None] > depth[:, None])
    area = pixels.amodal_areas
    larger = 2 * area[..., None] >= 3 * area[:, None]

    def inverse(relation: np.ndarray) -> np.ndarray:
        return relation.transpose(0, 2, 1)

    found = (left, inverse(left), above, inverse(above), front, inverse(front), pixels.meeting, larger, inverse(larger))
    return np.stack(found, 1)


def _parts(owner: np.ndarray, part: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixels seen of each part and its tight box: int64 (n, m, PARTS) and float32 (n, m, PARTS, 4), zeros where nothing is
    seen.
    """
    n = len(owner)
    item, row, column = np.nonzero(owner)
    key = (item * most + owner[item, row, column] - 1) * PARTS + part[item, row, column] - 1
    slots = n * most * PARTS
    areas = np.bincount(key, minlength=slots)
    boxes = np.zeros((slots, 4), np.float32)
    lines = (column, row)
    for axis in (0, 1):
        least, greatest = np.full(slots, 1 << 30), np.full(slots, -1)
        np.minimum.at(least, key, lines[axis])
        np.maximum.at(greatest, key, lines[axis])
        boxes[:, axis], boxes[:, 2 + axis] = least, greatest + 1
    boxes[areas == 0] = 0
    return areas.reshape(n, most, PARTS), boxes.reshape(n, most, PARTS, 4)


def _boxes(masks: np.ndarray) -> np.ndarray:
    """float32 (n, m, 4): tight boxes of masks (n, m, height, width), zeros where a mask is empty."""
    return boxes_of(masks.reshape(-1, *masks.shape[2:])).reshape(*masks.shape[:2], 4)


def _meeting(owner: np.ndarray, most: int) -> np.ndarray:
    """bool (n, m, m): whether the visible pixels of two individuals lie side by side anywhere."""
    n, wide = len(owner), most + 1
    found = np.zeros((n, wide, wide), bool)
    for one, other in ((owner[:, 1:], owner[:, :-1]), (owner[:, :, 1:], owner[:, :, :-1])):
        item, row, column = np.nonzero((one != other) & (one > 0) & (other > 0))
        a, b = one[item, row, column], other[item, row, column]
        found[item, a, b] = found[item, b, a] = True
    return found[:, 1:, 1:]
