"""Scenes as torch and `datasets` data, as records, and on contact sheets."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from typer.testing import CliRunner

from grainwise.cli import app
from grainwise.world import World, sheets
from grainwise.world.backgrounds import STUFF_NAMES
from grainwise.world.scene_sets import SceneImages, scene_records, texts
from grainwise.world.scenes import FIRST_INSTANCE, Scenes

SCENES = Scenes(World(seed=3), seed=21, individuals=(1, 5))


def test_torch_form_gives_whole_scenes():
    data = SceneImages(SCENES, 6, first=10)
    drawn = SCENES.draw(np.arange(10, 16))
    items = [item for batch in DataLoader(data, batch_size=4, collate_fn=list) for item in batch]
    assert len(items) == len(data) == 6
    for item, scene in zip(items, drawn, strict=True):
        np.testing.assert_array_equal(item["image"].permute(1, 2, 0).numpy(), scene.image)
        np.testing.assert_array_equal(item["boxes"].numpy(), scene.boxes)
        np.testing.assert_array_equal(item["masks"].numpy(), scene.masks)
        assert item["labels"].dtype == torch.int64
        assert item["captions"] == texts(scene)["captions"]
    with pytest.raises(IndexError):
        data[6]


def test_datasets_form_has_typed_columns():
    rows = SceneImages(SCENES, 5).to_datasets()
    scene = SCENES.draw(2)[0]
    row = rows[2]
    np.testing.assert_array_equal(np.asarray(row["image"]), scene.image)
    np.testing.assert_array_equal(np.asarray(row["panoptic"]), scene.panoptic)
    x, y, w, h = np.array(row["objects"]["bbox"], np.float32).T
    np.testing.assert_array_equal(np.stack([x, y, x + w, y + h], 1), scene.boxes)
    assert row["objects"]["category"] == scene.labels.tolist()
    said = texts(scene)
    assert [row[name] for name in ("captions", "expressions", "questions")] == [
        said[name] for name in ("captions", "expressions", "questions")
    ]


def test_texts_are_plain_json():
    said = texts(SCENES.draw(3)[0])
    assert json.loads(json.dumps(said)) == said


def test_records_agree_with_the_scenes():
    records = scene_records(SCENES, 4, first=2)
    record, scene = records[1], SCENES.draw(3)[0]
    np.testing.assert_array_equal(record.boxes, scene.boxes)
    np.testing.assert_array_equal(record.masks, scene.masks)
    names = np.array(records.region_names)[record.regions]
    for i, species in enumerate(scene.species):
        assert set(names[scene.masks[i]]) == {species.name}
    ground = scene.panoptic < FIRST_INSTANCE
    np.testing.assert_array_equal(names[ground], np.array(STUFF_NAMES)[scene.stuff[ground]])
    assert len(record.captions) == 3


@pytest.mark.parametrize("kind", sorted(set(sheets.SHEETS) - {"video", "documents"}))
def test_every_sheet_is_drawn(kind):
    cells = sheets.sheet(kind, 7)
    assert len(cells) >= 4
    assert all(isinstance(picture, Image.Image) and lines for picture, lines in cells)
    drawn = sheets.draw_sheet(cells[:2], width=900)
    assert drawn.width >= cells[0][0].width
    x = y = sheets.GAP
    np.testing.assert_array_equal(
        np.asarray(drawn)[y : y + cells[0][0].height, x : x + cells[0][0].width], np.asarray(cells[0][0].convert("RGB"))
    )


def test_registered_sheets_exist():
    import importlib

    for place in sheets.SHEETS.values():
        module, function = place.split(":")
        assert callable(getattr(importlib.import_module(module), function))


def test_the_command_writes_a_picture(tmp_path):
    out = tmp_path / "x.png"
    done = CliRunner().invoke(app, ["world", "sample", "--kind", "scene", "--seed", "7", "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert Image.open(out).width > 600
    assert [path.name for path in tmp_path.iterdir()] == ["x.png"]
    with pytest.raises(ValueError, match="Did you mean 'scene'"):
        sheets.sheet("scenes", 7)
