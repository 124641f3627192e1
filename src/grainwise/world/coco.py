"""Scenes as COCO files: instances, panoptic segmentation, captions, and the fields of COCO result files.

Masks are compressed run lengths (column by column, as pycocotools writes and reads them), panoptic maps are PNG files whose
colour is the segment's id, R + 256 G + 65536 B. Category ids: 1 + species for things; 1 + number of species + stuff for
stuff.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from grainwise.world.backgrounds import STUFF_NAMES
from grainwise.world.captions import caption
from grainwise.world.scenes import FIRST_INSTANCE, Scene
from grainwise.world.taxonomy import LEVELS, World

Rle = dict[str, Any]


def encode(mask: np.ndarray) -> Rle:
    """{"size": [height, width], "counts": text}: run lengths of a bool mask (height, width), zeros first."""
    flat = np.concatenate([[False], mask.ravel(order="F"), [not mask[-1, -1]]])
    runs = np.diff(np.flatnonzero(flat[1:] != flat[:-1]), prepend=0).tolist()
    text = []
    for position, run in enumerate(runs):
        value = run - runs[position - 2] if position > 2 else run
        more = True
        while more:
            digit, value = value & 31, value >> 5
            more = value != (-1 if digit & 16 else 0)
            text.append(chr(48 + digit + 32 * more))
    return {"size": list(mask.shape), "counts": "".join(text)}


def decode(rle: Rle) -> np.ndarray:
    """bool (height, width): the mask of `encode`, or of uncompressed counts."""
    height, width = rle["size"]
    runs = rle["counts"] if isinstance(rle["counts"], list) else _runs(rle["counts"])
    if sum(runs) != height * width:
        raise ValueError(f"run lengths cover {sum(runs)} pixels of a mask of {height} x {width}")
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(height, width, order="F")


def _runs(text: str) -> list[int]:
    runs: list[int] = []
    value = shift = 0
    for character in text:
        digit = ord(character) - 48
        value |= (digit & 31) << shift
        shift += 5
        if not digit & 32:
            value -= (1 << shift) if digit & 16 else 0
            runs.append(value + runs[-2] if len(runs) > 2 else value)
            value = shift = 0
    return runs


def categories(world: World, *, stuff: bool = False) -> list[dict[str, Any]]:
    """Species as things and, if asked, the kinds of stuff."""
    things = [{"id": 1 + one.index, "name": one.name, "supercategory": one.kind, "isthing": 1} for one in world.species]
    ground = [{"id": 1 + len(world) + i, "name": n, "supercategory": "stuff", "isthing": 0} for i, n in enumerate(STUFF_NAMES)]
    return things + ground if stuff else things


def instances(scenes: Iterable[Scene], first_image: int = 1) -> dict[str, Any]:
    """The object of an instances file; an annotation also has "amodal" (run lengths of all that lies in the picture), "depth",
    and "parts" (name, run lengths and box of each part that is seen)."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    scenes = _some(scenes)
    for image_id, scene in enumerate(scenes, first_image):
        images.append(_image(scene, image_id))
        masks, boxes = scene.masks, _xywh(scene.boxes)
        for i, species in enumerate(scene.species):
            parts = [
                {"name": part.name, "segmentation": encode(scene.part_mask(i, p)), "bbox": _xywh(scene.part_boxes[i])[p]}
                for p, part in enumerate(species.parts)
                if scene.part_areas[i, p]
            ]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": 1 + species.index,
                    "bbox": boxes[i],
                    "area": int(scene.areas[i]),
                    "iscrowd": 0,
                    "segmentation": encode(masks[i]),
                    "amodal": encode(scene.amodal[i]),
                    "depth": int(scene.depths[i]),
                    "parts": parts,
                }
            )
    return {
        "info": INFO,
        "licenses": [],
        "images": images,
        "annotations": annotations,
        "categories": categories(scenes[0].world),
    }


def panoptic(scenes: Iterable[Scene], first_image: int = 1) -> dict[str, Any]:
    """The object of a panoptic file; segment ids are the values of `Scene.panoptic`."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    scenes = _some(scenes)
    for image_id, scene in enumerate(scenes, first_image):
        images.append(_image(scene, image_id))
        segments = []
        for value in np.unique(scene.panoptic).tolist():
            thing = value - FIRST_INSTANCE
            mask = scene.panoptic == value
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            x, y = int(columns[0]), int(rows[0])
            segments.append(
                {
                    "id": value,
                    "category_id": 1 + int(scene.labels[thing]) if thing >= 0 else len(scene.world) + value,
                    "area": int(mask.sum()),
                    "bbox": [x, y, int(columns[-1]) + 1 - x, int(rows[-1]) + 1 - y],
                    "iscrowd": 0,
                }
            )
        annotations.append({"image_id": image_id, "file_name": f"{image_id:012}.png", "segments_info": segments})
    found = {"info": INFO, "licenses": [], "images": images, "annotations": annotations}
    return found | {"categories": categories(scenes[0].world, stuff=True)}


def captions(scenes: Iterable[Scene], first_image: int = 1) -> dict[str, Any]:
    """The object of a captions file: each image has three, "granularity" coarse, medium and fine."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id, scene in enumerate(_some(scenes), first_image):
        images.append(_image(scene, image_id))
        for level in LEVELS:
            row = {"id": len(annotations) + 1, "image_id": image_id, "caption": caption(scene, level), "granularity": level}
            annotations.append(row)
    return {"info": INFO, "licenses": [], "images": images, "annotations": annotations, "type": "captions"}


def results(
    image_ids: Sequence[int],
    labels: Sequence[np.ndarray],
    scores: Sequence[np.ndarray],
    boxes: Sequence[np.ndarray],
    masks: Sequence[np.ndarray] | None = None,
) -> list[dict[str, Any]]:
    """Rows of a detection result file from predictions per image: species (k,), scores (k,), boxes (k, 4) x0 y0 x1 y1,
    masks."""
    rows = []
    for which, image_id in enumerate(image_ids):
        for i, (label, score, box) in enumerate(zip(labels[which], scores[which], _xywh(boxes[which]), strict=True)):
            row = {"image_id": int(image_id), "category_id": 1 + int(label), "bbox": box, "score": float(score)}
            if masks is not None:
                row["segmentation"] = encode(np.asarray(masks[which][i], bool))
            rows.append(row)
    return rows


def caption_results(image_ids: Sequence[int], texts: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of a caption result file."""
    return [{"image_id": int(one), "caption": text} for one, text in zip(image_ids, texts, strict=True)]


def colour_of_id(ids: np.ndarray) -> np.ndarray:
    """uint8 (height, width, 3): the colours of panoptic ids."""
    ids = ids.astype(np.uint32)
    return np.stack([ids & 255, ids >> 8 & 255, ids >> 16 & 255], -1).astype(np.uint8)


def id_of_colour(colours: np.ndarray) -> np.ndarray:
    """uint32 (height, width): the inverse of `colour_of_id`."""
    wide = colours.astype(np.uint32)
    return wide[..., 0] + (wide[..., 1] << 8) + (wide[..., 2] << 16)


def export(scenes: Iterable[Scene], folder: Path, first_image: int = 1) -> None:
    """Write `images/`, `panoptic/`, `instances.json`, `panoptic.json` and `captions.json`."""
    scenes = _some(scenes)
    for name in ("images", "panoptic"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for image_id, scene in enumerate(scenes, first_image):
        file = f"{image_id:012}.png"
        _write(folder / "images" / file, Image.fromarray(scene.image).save)
        _write(folder / "panoptic" / file, Image.fromarray(colour_of_id(scene.panoptic)).save)
    for name, make in (("instances", instances), ("panoptic", panoptic), ("captions", captions)):
        text = json.dumps(make(scenes, first_image))
        _write(folder / f"{name}.json", lambda path, text=text: path.write_text(text))  # type: ignore[misc]


INFO = {"description": "Scenes of Grainwise's microworld", "version": "1"}


def _write(path: Path, save: Callable[[Path], Any]) -> None:
    """Save under a temporary name and rename, so that nobody reads half a file."""
    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    save(temporary)
    os.replace(temporary, path)


def _some(scenes: Iterable[Scene]) -> list[Scene]:
    found = list(scenes)
    if not found:
        raise ValueError("there are no scenes to write")
    return found


def _image(scene: Scene, image_id: int) -> dict[str, Any]:
    return {"id": image_id, "file_name": f"{image_id:012}.png", "height": scene.size, "width": scene.size}


def _xywh(boxes: np.ndarray) -> list[list[float]]:
    corner = np.array(boxes, np.float64).reshape(-1, 4)
    return np.concatenate([corner[:, :2], corner[:, 2:] - corner[:, :2]], 1).tolist()
