"""One record type for drawn and real pictures."""

import json
import os
import zipfile

import numpy as np
import pytest
from PIL import Image

from grainwise.data.sources import shared_folder
from grainwise.world import World, real, splits
from grainwise.world.records import ImageRecord, RecordSet, species_records

WORLD = World(genera=2, species_per_genus=2)


def test_species_records_match_what_is_drawn():
    table = splits.balanced(WORLD, 3)
    records = species_records(WORLD, table)
    assert len(records) == 12
    assert list(records.labels()) == table.labels.tolist()
    np.testing.assert_array_equal(records[4].image, WORLD.draw(table.labels[4], table.individuals[4]).images[0])
    assert records[4].captions[2] == WORLD.species[records[4].label].describe("fine")
    np.testing.assert_array_equal(records[-1].image, records[11].image)
    with pytest.raises(IndexError, match="record 12 of 12"):
        records[12]


def test_torch_and_datasets_forms_hold_the_same_pictures():
    records = species_records(WORLD, splits.balanced(WORLD, 2))
    item = records.to_torch()[3]
    np.testing.assert_array_equal((item["pixel_values"] * 255).round().byte().permute(1, 2, 0).numpy(), records[3].image)
    rows = records.to_datasets()
    assert rows.features["label"].names == [species.name for species in WORLD.species]
    np.testing.assert_array_equal(np.array(rows[3]["image"]), records[3].image)
    x, y, w, h = rows[3]["objects"]["bbox"][0]
    assert (x, y, x + w, y + h) == tuple(records[3].boxes[0])


def test_image_folder_reads_classes_from_names(tmp_path):
    for name in ("wren", "robin"):
        (tmp_path / name).mkdir()
        Image.fromarray(np.full((5, 4, 3), 90, np.uint8)).save(tmp_path / name / "a.png")
    records = real.image_folder(tmp_path)
    assert records.class_names == ("robin", "wren")
    assert [record.label for record in records] == [0, 1]
    (tmp_path / "wren" / "b.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"b\.png is not a readable picture"):
        list(real.image_folder(tmp_path))
    with pytest.raises(ValueError, match="is no folder"):
        real.image_folder(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no pictures"):
        real.image_folder(tmp_path / "empty")


def test_coco_json_gives_boxes_masks_and_captions(tmp_path):
    Image.fromarray(np.zeros((6, 8, 3), np.uint8)).save(tmp_path / "1.png")
    mask = np.zeros((6, 8), bool)
    mask[1:4, 2:5] = True
    counts = np.flatnonzero(np.diff(np.r_[[False], mask.T.reshape(-1), [not mask.T.reshape(-1)[-1]]]))
    runs = np.diff(np.r_[0, counts]).tolist()
    content = {
        "images": [{"id": 9, "file_name": "1.png"}],
        "categories": [{"id": 5, "name": "bird"}],
        "annotations": [
            {"image_id": 9, "category_id": 5, "bbox": [2, 1, 3, 3], "segmentation": {"size": [6, 8], "counts": runs}},
            {"image_id": 9, "category_id": 5, "bbox": [2, 1, 3, 3], "segmentation": [[2, 1, 4, 1, 4, 3, 2, 3]]},
            {"image_id": 9, "caption": "a bird"},
        ],
    }
    (tmp_path / "c.json").write_text(json.dumps(content))
    record = real.coco(tmp_path / "c.json", tmp_path)[0]
    assert record.boxes.tolist() == [[2, 1, 5, 4]] * 2
    assert record.classes.tolist() == [0, 0]
    assert record.captions == ("a bird",)
    np.testing.assert_array_equal(record.masks[0], mask)
    np.testing.assert_array_equal(record.masks[1], mask)
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ValueError, match="no COCO JSON"):
        real.coco(tmp_path / "bad.json", tmp_path)


def test_digits_are_there_without_any_data_folder():
    records = real.digits()
    assert len(records) == 1797
    assert records[0].image.shape == (8, 8, 3)
    assert len(set(records.labels())) == 10


def test_scikit_image_samples():
    pytest.importorskip("skimage", reason="the extra vision is not installed")
    records = real.samples(("chelsea", "camera"))
    assert [record.label for record in records] == [0, 1]
    assert not np.array_equal(records[0].image[..., 0], records[0].image[..., 1])  # chelsea is in colour
    np.testing.assert_array_equal(records[1].image[..., 0], records[1].image[..., 1])
    with pytest.raises(ValueError, match="unknown"):
        real.samples(("mona lisa",))


@pytest.mark.skipif(shared_folder() is None, reason="the shared data folder is not here (GRAINWISE_DATA)")
def test_omniglot_and_camvid_of_the_shared_folder():
    characters = real.omniglot()
    assert len(characters) == 2720
    assert len(characters.class_names) == 136
    assert characters[0].image.shape == (105, 105, 3)
    assert characters[0].extra["alphabet"] == characters.class_names[0].split("/")[0]
    streets = real.camvid("val")
    assert streets[0].regions.shape == streets[0].image.shape[:2]
    assert streets[0].regions.max() <= 11
    with pytest.raises(ValueError, match="train or val"):
        real.camvid("test")


def test_missing_or_corrupt_archives_are_named(tmp_path):
    (tmp_path / "omniglot").mkdir()
    with pytest.raises(ValueError, match="not a readable archive"):
        real.omniglot(folder=tmp_path)
    (tmp_path / "omniglot" / "images_background_small1.zip").write_bytes(b"x")
    with pytest.raises(ValueError, match="not a readable archive"):
        real.omniglot(folder=tmp_path)
    with zipfile.ZipFile(tmp_path / "omniglot" / "images_background_small1.zip", "w") as archive:
        archive.writestr("r/Greek/character01/1.png", b"x")
    with pytest.raises(ValueError, match=r"1\.png is not a readable picture"):
        real.omniglot(folder=tmp_path)[0]
    assert os.path.exists(tmp_path)


def test_records_refuse_what_does_not_fit():
    image = np.zeros((4, 4, 3), np.uint8)
    with pytest.raises(ValueError, match="uint8"):
        ImageRecord(image.astype(float))
    with pytest.raises(ValueError, match="1 boxes and 0 classes"):
        ImageRecord(image, boxes=np.zeros((1, 4), np.float32))
    with pytest.raises(ValueError, match="masks"):
        ImageRecord(image, masks=np.zeros((1, 5, 4), bool))
    assert RecordSet(lambda index: ImageRecord(image, name=str(index)), 3, ())[1:][0].name == "1"
