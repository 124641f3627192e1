"""Average precision of detections by COCO's rules, computed by faster-coco-eval (extra `vision`)."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from grainwise.extras import require


def average_precision(found: Sequence[dict[str, np.ndarray]], truth: Sequence[dict[str, np.ndarray]]) -> dict[str, float]:
    """{"ap", "ap50", "ap75", "ar100"} over all classes.

    Args:
        found: one a picture: scores float (n,), labels int (n,), boxes float (n, 4) x0 y0 x1 y1 in pixels.
        truth: one a picture: labels int (m,), boxes float (m, 4).

    Raises:
        ValueError: the two have different lengths, or there is no true box at all.
    """
    if len(found) != len(truth):
        raise ValueError(
            f"{len(found)} pictures with detections and {len(truth)} with truth; give one of each for every picture"
        )
    if not any(len(one["boxes"]) for one in truth):
        raise ValueError("no picture has a true box: average precision is undefined")
    kit = require("faster_coco_eval", extra="vision")
    classes = sorted({int(label) for one in truth for label in one["labels"]})
    dataset = {
        "images": [{"id": index} for index in range(1, len(truth) + 1)],
        "categories": [{"id": label + 1, "name": str(label)} for label in classes],
        "annotations": _annotations(truth),
    }
    with contextlib.redirect_stdout(io.StringIO()):
        coco = kit.COCO(dataset)
        results = coco.loadRes(_annotations(found)) if any(len(one["boxes"]) for one in found) else coco.loadRes([])
        judge = kit.COCOeval_faster(coco, results, "bbox")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return {name: float(judge.stats[index]) for name, index in (("ap", 0), ("ap50", 1), ("ap75", 2), ("ar100", 8))}


def _annotations(pictures: Sequence[dict[str, np.ndarray]]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for index, picture in enumerate(pictures, 1):
        for position, (label, (x0, y0, x1, y1)) in enumerate(
            zip(picture["labels"].tolist(), np.asarray(picture["boxes"], float).tolist(), strict=True)
        ):
            row = {"id": len(rows) + 1, "image_id": index, "category_id": int(label) + 1, "bbox": [x0, y0, x1 - x0, y1 - y0]}
            row |= {"area": (x1 - x0) * (y1 - y0), "iscrowd": 0}
            if "scores" in picture:
                row["score"] = float(picture["scores"][position])
            rows.append(row)
    return rows
