"""COCO files of scenes: exact round trips, and read by a pycocotools-compatible reader where it is installed."""

import json

import numpy as np
import pytest
from PIL import Image

from grainwise.world import World, coco
from grainwise.world.scenes import Scenes

WORLD = World(seed=3)
BATCH = Scenes(WORLD, seed=21, individuals=(1, 6)).draw(np.arange(6))


def some_masks():
    generator = np.random.default_rng(0)
    yield from (generator.random((h, w)) < share for h, w, share in ((1, 1, 0.5), (3, 5, 0.5), (40, 30, 0.02), (33, 70, 0.98)))
    yield from (np.zeros((4, 7), bool), np.ones((4, 7), bool), np.zeros((300, 400), bool))
    for scene in BATCH:
        yield from scene.masks
        yield from scene.amodal


def test_run_lengths_round_trip():
    for mask in some_masks():
        np.testing.assert_array_equal(coco.decode(json.loads(json.dumps(coco.encode(mask)))), mask)
    np.testing.assert_array_equal(coco.decode({"size": [2, 2], "counts": [1, 2, 1]}), [[False, True], [True, False]])
    with pytest.raises(ValueError, match="cover 3 pixels of a mask of 2 x 2"):
        coco.decode({"size": [2, 2], "counts": [1, 2]})


def test_instances_hold_the_truth():
    found = coco.instances(BATCH, first_image=10)
    ids = [row["id"] for row in found["annotations"]]
    assert len(set(ids)) == len(ids) == sum(len(scene) for scene in BATCH)
    names = {row["id"]: row["name"] for row in found["categories"]}
    rows = iter(found["annotations"])
    for image_id, scene in enumerate(BATCH, 10):
        for i, mask in enumerate(scene.masks):
            row = next(rows)
            assert row["image_id"] == image_id
            assert names[row["category_id"]] == scene.species[i].name
            np.testing.assert_array_equal(coco.decode(row["segmentation"]), mask)
            np.testing.assert_array_equal(coco.decode(row["amodal"]), scene.amodal[i])
            assert row["area"] == mask.sum()
            x, y, w, h = map(int, row["bbox"])
            assert mask[y : y + h, x : x + w].sum() == mask.sum()
            together = sum(coco.decode(part["segmentation"]).astype(int) for part in row["parts"])
            np.testing.assert_array_equal(together, mask)


def test_panoptic_files_round_trip(tmp_path):
    coco.export(BATCH, tmp_path)
    found = json.loads((tmp_path / "panoptic.json").read_text())
    things = {row["id"]: row["isthing"] for row in found["categories"]}
    for row, scene in zip(found["annotations"], BATCH, strict=True):
        ids = coco.id_of_colour(np.asarray(Image.open(tmp_path / "panoptic" / row["file_name"])))
        np.testing.assert_array_equal(ids, scene.panoptic)
        assert sum(segment["area"] for segment in row["segments_info"]) == scene.size**2
        assert sum(things[segment["category_id"]] for segment in row["segments_info"]) == len(scene)
        for segment in row["segments_info"]:
            x, y, w, h = segment["bbox"]
            assert (ids[y : y + h, x : x + w] == segment["id"]).sum() == segment["area"] == (ids == segment["id"]).sum()
    image = np.asarray(Image.open(tmp_path / "images" / found["images"][2]["file_name"]))
    np.testing.assert_array_equal(image, BATCH[2].image)
    assert not list(tmp_path.rglob(".*"))


def test_colours_of_ids_are_exact():
    ids = np.array([[0, 255, 256, 65536, 16777215]])
    np.testing.assert_array_equal(coco.id_of_colour(coco.colour_of_id(ids)), ids)


def test_captions_have_three_granularities():
    found = coco.captions(BATCH)
    assert len(found["annotations"]) == 3 * len(BATCH)
    assert {row["granularity"] for row in found["annotations"]} == {"coarse", "medium", "fine"}
    assert coco.caption_results([4], ["a bird"]) == [{"image_id": 4, "caption": "a bird"}]


def test_nothing_to_write_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no scenes"):
        coco.export([], tmp_path)


def test_a_pycocotools_compatible_reader_agrees(tmp_path):
    reader = pytest.importorskip("faster_coco_eval", reason="faster-coco-eval is not installed (extra: vision)")
    from faster_coco_eval.core import mask as reader_mask

    for mask in some_masks():
        ours, theirs = coco.encode(mask), reader_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
        text = theirs["counts"].decode() if isinstance(theirs["counts"], bytes) else theirs["counts"]
        assert ours["counts"] == text
    coco.export(BATCH, tmp_path)
    truth = reader.COCO(str(tmp_path / "instances.json"))
    image_ids = truth.getImgIds()
    assert len(image_ids) == len(BATCH)
    for image_id, scene in zip(image_ids, BATCH, strict=True):
        rows = truth.loadAnns(truth.getAnnIds(imgIds=[image_id]))
        for row, mask in zip(rows, scene.masks, strict=True):
            np.testing.assert_array_equal(truth.annToMask(row), mask)
    scores = [np.linspace(0.9, 0.5, len(scene)) for scene in BATCH]
    rows = coco.results(image_ids, BATCH.labels, scores, BATCH.boxes, BATCH.masks)
    for kind in ("bbox", "segm"):
        judge = reader.COCOeval_faster(truth, truth.loadRes(json.loads(json.dumps(rows))), kind)
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
        assert judge.stats[0] == pytest.approx(1.0)  # the truth as a prediction is perfect
