"""Scenes: the maps agree with each other, nobody is hidden, and a scene is the same wherever it is drawn."""

import hashlib
import subprocess
import sys

import numpy as np
import pytest

from grainwise.world import World
from grainwise.world.backgrounds import STUFF_NAMES
from grainwise.world.individuals import boxes_of
from grainwise.world.relations import RELATIONS
from grainwise.world.scenes import FIRST_INSTANCE, Scenes

WORLD = World(seed=3)
SCENES = Scenes(WORLD, seed=21)
BATCH = SCENES.draw(np.arange(48))


def test_every_pixel_belongs_to_one_segment():
    for scene in BATCH:
        masks = scene.masks
        assert masks.shape == (len(scene), 64, 64)
        assert masks.sum(0).max() <= 1
        ground = scene.panoptic < FIRST_INSTANCE
        assert (masks.any(0) ^ ground).all()
        assert scene.panoptic.min() >= 1
        assert scene.panoptic.max() < FIRST_INSTANCE + len(scene)
        np.testing.assert_array_equal(scene.panoptic[ground], scene.stuff[ground] + 1)
        assert 2 <= len(np.unique(scene.stuff)) <= 4


def test_what_is_seen_lies_inside_the_whole_and_is_enough():
    for scene in BATCH:
        assert not (scene.masks & ~scene.amodal).any()
        np.testing.assert_array_equal(scene.areas, scene.masks.sum((1, 2)))
        np.testing.assert_array_equal(scene.amodal_areas, scene.amodal.sum((1, 2)))
        assert (scene.areas >= np.float32(SCENES.seen) * scene.amodal_areas).all()
        assert (scene.areas > 0).all()


def test_boxes_are_tight():
    for scene in BATCH:
        np.testing.assert_array_equal(scene.boxes, boxes_of(scene.masks))
        np.testing.assert_array_equal(scene.amodal_boxes, boxes_of(scene.amodal))


def test_parts_tile_the_individuals():
    for scene in BATCH:
        np.testing.assert_array_equal(scene.parts > 0, scene.masks.any(0))
        for i, species in enumerate(scene.species):
            parts = np.stack([scene.part_mask(i, p) for p in range(scene.part_areas.shape[1])])
            np.testing.assert_array_equal(parts.any(0), scene.masks[i])
            np.testing.assert_array_equal(scene.part_areas[i], parts.sum((1, 2)))
            np.testing.assert_array_equal(scene.part_boxes[i], boxes_of(parts))
            assert not scene.part_areas[i, len(species.parts) :].any()


def test_the_nearer_hides_the_farther():
    hidden = 0
    for scene in BATCH:
        assert sorted(scene.depths) == list(range(len(scene)))
        for a, b in np.argwhere(scene.relation("in front of")):
            both = scene.amodal[a] & scene.amodal[b]
            assert both.any()
            assert scene.depths[a] > scene.depths[b]
            assert not scene.masks[b][both].any()
            hidden += 1
        everybody = scene.amodal.any(0)
        np.testing.assert_array_equal(everybody, scene.masks.any(0))
        nearest = np.where(scene.amodal, scene.depths[:, None, None], -1).argmax(0)
        np.testing.assert_array_equal(nearest[everybody], (scene.panoptic - FIRST_INSTANCE)[everybody])
    assert hidden > 10


def test_relations_by_their_definitions():
    name = {relation: i for i, relation in enumerate(RELATIONS)}
    for scene in BATCH:
        found = scene.relations
        assert found.shape == (len(RELATIONS), len(scene), len(scene))
        assert not found[:, np.arange(len(scene)), np.arange(len(scene))].any()
        for one, other in zip(RELATIONS[:6:2], RELATIONS[1:6:2], strict=True):
            np.testing.assert_array_equal(found[name[one]], found[name[other]].T)
        np.testing.assert_array_equal(found[name["larger than"]], found[name["smaller than"]].T)
        np.testing.assert_array_equal(found[name["touching"]], found[name["touching"]].T)
        x = scene.amodal_boxes[:, [0, 2]].mean(1)
        y = scene.amodal_boxes[:, [1, 3]].mean(1)
        for a in range(len(scene)):
            for b in range(len(scene)):
                dx, dy = x[b] - x[a], y[b] - y[a]
                assert found[name["left of"], a, b] == (dx >= 6.4 and 2 * dx >= abs(dy))
                assert found[name["above"], a, b] == (dy >= 6.4 and 2 * dy >= abs(dx))
                if a != b:
                    grown = np.zeros((66, 66), bool)
                    for i, j in ((0, 1), (2, 1), (1, 0), (1, 2)):
                        grown[i : i + 64, j : j + 64] |= scene.masks[a]
                    assert found[name["touching"], a, b] == (grown[1:-1, 1:-1] & scene.masks[b]).any()
                    assert found[name["larger than"], a, b] == (2 * scene.amodal_areas[a] >= 3 * scene.amodal_areas[b])


def test_on_names_the_ground_behind_most_of_an_individual():
    for scene in BATCH:
        for i, on in enumerate(scene.on):
            shares = np.bincount(scene.stuff[scene.amodal[i]], minlength=len(STUFF_NAMES)) / scene.amodal_areas[i]
            assert on == (shares.argmax() if shares.max() >= 0.6 else -1)


def digest(scene):
    arrays = (scene.image, scene.panoptic, scene.parts, scene.amodal, scene.boxes, scene.labels, scene.relations)
    return hashlib.sha256(b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)).hexdigest()


def test_a_scene_is_the_same_in_another_batch_and_alone():
    mixed = SCENES.draw([31, 5, 1_000_000, 31])
    assert digest(mixed[0]) == digest(mixed[3]) == digest(BATCH[31])
    assert digest(mixed[1]) == digest(BATCH[5]) == digest(SCENES.draw(5)[0])
    backwards = np.arange(47, -1, -3)
    assert [digest(scene) for scene in SCENES.draw(backwards)] == [digest(BATCH[i]) for i in backwards]
    assert len({digest(scene) for scene in BATCH}) == len(BATCH)
    other = Scenes(WORLD, seed=22).draw(5)[0]
    assert digest(other) != digest(BATCH[5])
    assert len(SCENES.draw([])) == 0


def test_a_scene_is_the_same_in_another_process():
    code = (
        "import hashlib, numpy as np\nfrom grainwise.world import World\nfrom grainwise.world.scenes import Scenes\n"
        "s = Scenes(World(seed=3), seed=21).draw([7])[0]\n"
        "a = (s.image, s.panoptic, s.parts, s.amodal, s.boxes, s.labels, s.relations)\n"
        "print(hashlib.sha256(b''.join(np.ascontiguousarray(x).tobytes() for x in a)).hexdigest())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == digest(BATCH[7]), done.stderr


def test_counts_species_and_styles_are_as_asked():
    few = Scenes(WORLD, individuals=(3, 6), regions=(1, 1), species=(1, 9, 10), size=32).draw(np.arange(40))
    assert {len(scene) for scene in few} == {3, 4, 5, 6}
    assert {int(label) for labels in few.labels for label in labels} == {1, 9, 10}
    assert all(len(np.unique(scene.stuff)) == 1 for scene in few)
    styles = [Scenes(WORLD, style=style).draw(0).images for style in ("plain", "ink", "felt")]
    assert not np.array_equal(styles[0], styles[1])
    assert not np.array_equal(styles[0], styles[2])


def test_scenes_hold_siblings_and_twins():
    siblings = twins = 0
    for scene in BATCH:
        genera = [species.genus for species in scene.species]
        siblings += len(set(genera)) < len(set(scene.labels.tolist()))
        twins += len(set(scene.labels.tolist())) < len(scene)
    assert siblings > 10
    assert twins > 10


def test_a_larger_picture_has_its_own_pixels_but_the_same_company():
    large = Scenes(WORLD, seed=21, size=128).draw(np.arange(4))
    assert large.images.shape == (4, 128, 128, 3)
    for one, other in zip(BATCH, large, strict=False):
        np.testing.assert_array_equal(one.labels, other.labels)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"size": 8}, "32 to 512"),
        ({"individuals": (0, 3)}, "within 1 to 12"),
        ({"individuals": (4, 13)}, "within 1 to 12"),
        ({"regions": (3, 2)}, "within 1 to 8"),
        ({"style": "oil"}, "style 'oil' is unknown"),
        ({"species": (99,)}, r"species \[99\]"),
        ({"species": ()}, "species none"),
        ({"seen": 1.0}, "0 to 0.9"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        Scenes(WORLD, **options)


def test_indices_are_integers():
    with pytest.raises(ValueError, match="indices must be an integer"):
        SCENES.draw([0.5])
