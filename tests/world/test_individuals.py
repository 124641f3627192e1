"""Drawn individuals: deterministic by (seed, species, number), with ground truth that agrees with the pixels."""

import hashlib
import subprocess
import sys

import numpy as np
import pytest

from grainwise.world import CALM, Nuisance, World
from grainwise.world.counter_random import Draws

WORLD = World(seed=1, genera=8, species_per_genus=3)


def test_an_item_is_the_same_alone_and_in_any_batch():
    labels, numbers = np.arange(12) * 2, np.arange(12) + 5
    together = WORLD.draw(labels, numbers)
    backwards = WORLD.draw(labels[::-1], numbers[::-1])
    np.testing.assert_array_equal(together.images, backwards.images[::-1])
    np.testing.assert_array_equal(together.parts, backwards.parts[::-1])
    alone = WORLD.draw(labels[7], numbers[7])
    np.testing.assert_array_equal(together.images[7], alone.images[0])
    assert len(np.unique(together.images.reshape(12, -1), axis=0)) == 12


def test_an_item_is_the_same_in_another_process():
    program = (
        "import hashlib, numpy as np; from grainwise.world import World; "
        "b = World(seed=1, genera=8, species_per_genus=3).draw(np.arange(6), 3, style='felt'); "
        "print(hashlib.sha256(b.images.tobytes() + b.parts.tobytes()).hexdigest())"
    )
    other = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip()
    here = WORLD.draw(np.arange(6), 3, style="felt")
    assert hashlib.sha256(here.images.tobytes() + here.parts.tobytes()).hexdigest() == other


def test_siblings_in_one_pose_differ_only_where_either_shows_its_key_part():
    different = 0
    for genus in range(WORLD.genera):
        drawn = WORLD.draw([3 * genus, 3 * genus + 1], 0, nuisance=CALM, size=96)
        key = drawn.key_parts.any(0)
        assert key.any()
        np.testing.assert_array_equal(drawn.parts[0][~key], drawn.parts[1][~key])
        different += int(np.abs(drawn.images[0].astype(int) - drawn.images[1])[key].max() > 60)
    assert different == WORLD.genera  # and there a person sees it


def test_boxes_are_tight_and_masks_fit():
    drawn = WORLD.draw(np.arange(24), np.arange(24))
    for mask, (x0, y0, x1, y1) in zip(drawn.masks, drawn.boxes.astype(int), strict=True):
        inside = mask[y0:y1, x0:x1]
        assert inside.sum() == mask.sum()
        assert inside[0].any()
        assert inside[-1].any()
        assert inside[:, 0].any()
        assert inside[:, -1].any()
    for index, label in enumerate(drawn.labels):
        assert drawn.parts[index].max() <= len(WORLD.species[label].parts)
        np.testing.assert_array_equal(drawn.key_parts[index], drawn.parts[index] == WORLD.species[label].key[0] + 1)


def test_part_pixels_have_the_colour_of_the_part():
    """The median colour of a plain part's pixels is nearest to the colour its species says."""
    from grainwise.world.shapes import COLOURS

    palette = np.array(list(COLOURS.values()), float)
    right = total = 0
    drawn = WORLD.draw(np.arange(24), 0, size=128, nuisance=CALM)
    for image, parts, label in zip(drawn.images, drawn.parts, drawn.labels, strict=True):
        for number, part in enumerate(WORLD.species[label].parts, 1):
            pixels = image[parts == number]
            if part.texture != "plain" or len(pixels) < 80 or WORLD.species[label].shaded == number - 1:
                continue
            nearest = list(COLOURS)[((palette - np.median(pixels, 0)) ** 2).sum(1).argmin()]
            right, total = right + (nearest == part.colour), total + 1
    assert total > 40
    assert right / total > 0.9


def test_varieties_change_only_the_shaded_part():
    world = World(seed=1, genera=8, species_per_genus=3, varieties=2)
    shades = []
    for label in range(0, 24, 3):
        dark, light = (world.draw(label, number, nuisance=CALM, size=96) for number in (0, 1))
        part = world.species[label].shaded + 1
        if (dark.parts == part).any() and (light.parts == part).any():
            shades.append(light.images[light.parts == part].mean() - dark.images[dark.parts == part].mean())
    assert len(shades) >= 6
    assert min(shades) > 10


def test_nuisance_does_what_it_says():
    still = Nuisance(place=0.0, scale=(0.3, 0.3), turn=0.0, azimuth=0.0, flip=False, occlusion=0.0, clutter=0)
    boxes = WORLD.draw(np.zeros(8, int), np.arange(8), nuisance=still).boxes
    assert (boxes == boxes[0]).all()
    moved = WORLD.draw(np.zeros(8, int), np.arange(8)).boxes
    assert len(np.unique(moved, axis=0)) == 8
    water = WORLD.draw(np.zeros(8, int), np.arange(8), nuisance=Nuisance(backgrounds=("water",)))
    assert len(set(water.backgrounds.tolist())) == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: WORLD.draw(0, 0, style="oil"), "style 'oil'.*plain"),
        (lambda: WORLD.draw(99, 0), "not all in a world of 24"),
        (lambda: WORLD.draw(0, 0, size=8), "size is 8"),
        (lambda: WORLD.draw([0, 1], 0, azimuth=np.zeros(3)), "azimuth has shape"),
        (lambda: Nuisance(backgrounds=("lava",)), "lava"),
        (lambda: Nuisance(scale=(0.5, 0.2)), "scale"),
    ],
)
def test_wrong_drawings_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_counter_random_numbers_are_uniform_and_independent_of_the_batch():
    draws = Draws(5, np.arange(4000))
    values = draws.uniform("a", size=(3,))
    assert abs(values.mean() - 0.5) < 0.01
    assert abs(values.std() - 12**-0.5) < 0.01
    assert abs(np.corrcoef(values[:, 0], values[:, 1])[0, 1]) < 0.05
    assert abs(np.corrcoef(values[:, 0], draws.uniform("b"))[0, 1]) < 0.05
    assert abs(np.corrcoef(values[1:, 0], values[:-1, 0])[0, 1]) < 0.05
    np.testing.assert_array_equal(Draws(5, 17).uniform("a", size=(3,))[0], values[17])
    assert np.array_equal(np.sort(draws.order("c", 7), axis=1), np.tile(np.arange(7), (4000, 1)))
    assert np.bincount(draws.integers("d", 5)).min() > 700
    assert abs(draws.normal("e").std() - 1) < 0.05
