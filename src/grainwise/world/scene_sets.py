"""Scenes with their texts as a torch data set, as a `datasets.Dataset`, and as the records that real data has too."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image, Value
from datasets import Sequence as Many
from PIL import Image as Picture

from grainwise.world.backgrounds import STUFF_NAMES
from grainwise.world.captions import caption, regions
from grainwise.world.expressions import Facts, absent, groups, refer
from grainwise.world.questions import ask
from grainwise.world.record_views import RecordDataset
from grainwise.world.records import ImageRecord, RecordSet
from grainwise.world.scenes import Scene, Scenes
from grainwise.world.taxonomy import LEVELS

BATCH = 64


def texts(scene: Scene) -> dict[str, Any]:
    """All that is said of a scene: captions (coarse, medium, fine), expressions, questions, and regions with attributes."""
    facts = Facts(scene)
    named = [found for found in refer(scene, facts) if found is not None]
    return {
        "captions": [caption(scene, level) for level in LEVELS],
        "expressions": [
            {"text": e.text, "form": e.form, "targets": list(e.targets)}
            for e in (*named, *groups(scene, facts), *absent(scene, facts))
        ],
        "questions": [
            {"form": q.form, "text": q.text, "answer": q.answer, "options": list(q.options), "letter": q.letter}
            for q in ask(scene, facts)
        ],
        "regions": [
            {"individual": r.individual, "part": r.part, "box": list(r.box), "text": r.text, "attributes": r.attributes}
            for r in regions(scene)
        ],
    }


class SceneSource:
    """Scenes by index as dictionaries: arrays of the picture, then the texts."""

    def __init__(self, scenes: Scenes) -> None:
        self.scenes = scenes

    def records(self, indices: Sequence[int] | np.ndarray) -> list[dict[str, Any]]:
        """One dictionary a scene: image, panoptic, parts, masks, amodal, boxes, labels, depths, relations, light, and
        `texts`."""
        names = ("image", "panoptic", "parts", "masks", "amodal", "boxes", "labels", "depths", "relations", "light")
        drawn = self.scenes.draw(np.asarray(indices, int))
        return [{name: getattr(scene, name) for name in names} | texts(scene) for scene in drawn]


class SceneImages(RecordDataset):
    """Scenes first to first + count - 1 as a torch data set: tensors (image uint8 (3, size, size), boxes (k, 4) ...) and texts.

    The numbers of individuals differ, so a DataLoader needs a `collate_fn`, for example `list`.
    """

    def __init__(self, scenes: Scenes, count: int, first: int = 0) -> None:
        super().__init__(SceneSource(scenes), count, first)
        self.scenes = scenes

    def to_datasets(self) -> Dataset:
        """Columns image, panoptic (PNG images), objects (bbox as x y width height, category, area, depth), captions,
        expressions and questions."""
        features = Features(
            {
                "image": Image(),
                "panoptic": Image(),
                "objects": {
                    "bbox": Many(Many(Value("float32"), length=4)),
                    "category": Many(ClassLabel(names=[species.name for species in self.scenes.world.species])),
                    "area": Many(Value("int64")),
                    "depth": Many(Value("int64")),
                },
                "captions": Many(Value("string")),
                "expressions": [{"text": Value("string"), "form": Value("string"), "targets": Many(Value("int64"))}],
                "questions": [
                    dict.fromkeys(("form", "text", "answer", "letter"), Value("string")) | {"options": Many(Value("string"))}
                ],
            }
        )
        return Dataset.from_list(list(self._rows()), features=features)

    def _rows(self) -> Iterator[dict[str, Any]]:
        for start in range(self.first, self.first + self.count, BATCH):
            for scene in self.scenes.draw(np.arange(start, min(start + BATCH, self.first + self.count))):
                boxes = np.concatenate([scene.boxes[:, :2], scene.boxes[:, 2:] - scene.boxes[:, :2]], 1)
                said = texts(scene)
                yield {
                    "image": Picture.fromarray(scene.image),
                    "panoptic": Picture.fromarray(scene.panoptic),
                    "objects": {
                        "bbox": boxes.tolist(),
                        "category": scene.labels.tolist(),
                        "area": scene.areas.tolist(),
                        "depth": scene.depths.tolist(),
                    },
                    **{name: said[name] for name in ("captions", "expressions", "questions")},
                }


def scene_records(scenes: Scenes, count: int, first: int = 0) -> RecordSet:
    """Scenes as records: boxes, species, masks, the kind of every pixel (stuff, then species) and three captions."""
    stuff = len(STUFF_NAMES)

    def read(index: int) -> ImageRecord:
        scene = scenes.draw(first + index)[0]
        values = np.concatenate([[0], np.arange(stuff), stuff + scene.labels])  # of panoptic ids 0, stuff, individuals
        return ImageRecord(
            image=scene.image,
            boxes=scene.boxes,
            classes=scene.labels,
            masks=scene.masks,
            regions=values[scene.panoptic],
            captions=tuple(caption(scene, level) for level in LEVELS),
            name=f"scene {first + index}",
            extra={"scene": scene},
        )

    names = [species.name for species in scenes.world.species]
    return RecordSet(read, count, names, [*STUFF_NAMES, *names])
