"""The taxonomy keeps its promise: siblings differ in exactly one attribute of one small part."""

import itertools

import pytest

from grainwise.world import World

WORLD = World(seed=3, genera=16, species_per_genus=4)


@pytest.mark.parametrize("seed", range(5))
def test_siblings_differ_in_exactly_one_attribute_of_one_small_part(seed):
    world = World(seed=seed, genera=16, species_per_genus=5)
    for genus in range(world.genera):
        members = [species for species in world.species if species.genus == genus]
        for one, other in itertools.combinations(members, 2):
            mine, its = one.attributes(), other.attributes()
            different = [name for name in mine if mine[name] != its[name]]
            part, attribute = one.key
            assert different == [f"{one.parts[part].name} {attribute}"]
            assert one.parts[part].slot.small


def test_names_and_fine_descriptions_are_unique():
    assert len({species.name for species in WORLD.species}) == len(WORLD)
    assert len({species.describe("fine") for species in WORLD.species}) == len(WORLD)


def test_coarse_descriptions_hide_what_fine_ones_say():
    one, other = WORLD.species[0], WORLD.siblings(0)[0]
    assert one.describe("coarse") == other.describe("coarse")
    assert one.describe("fine") != other.describe("fine")


def test_contrast_names_the_difference():
    one = WORLD.species[0]
    for other in WORLD.siblings(0):
        part, attribute = one.key
        text = one.unlike(other)
        assert other.name in text
        assert one.parts[part].name in text
        if attribute != "count":
            assert str(one.parts[part].attribute(attribute)) in text
            assert str(other.parts[part].attribute(attribute)) in text


def test_the_same_seed_gives_the_same_world_and_another_seed_another():
    assert World(seed=3, genera=16).species == WORLD.species
    assert World(seed=4, genera=16).species != WORLD.species


def test_more_genera_leave_the_first_ones_as_they_are():
    assert World(seed=3, genera=40).species[:64] == WORLD.species


def test_varieties_differ_in_shade_only():
    world = World(varieties=3)
    shades = [world.variety(0, k).shade for k in range(3)]
    assert shades == [-1.0, 0.0, 1.0]
    assert len({world.variety(0, k).name for k in range(3)}) == 3
    with pytest.raises(ValueError, match="variety 3 of 3"):
        world.variety(0, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kinds": ("bird", "dragon")}, "dragon.*choose from bird"),
        ({"species_per_genus": 12}, "species_per_genus is 12"),
        ({"species_per_genus": 0}, "species_per_genus is 0"),
        ({"genera": 0}, "at least one genus"),
    ],
)
def test_wrong_worlds_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        World(**arguments)


def test_wrong_words_are_refused():
    with pytest.raises(ValueError, match="coarse, medium, fine"):
        WORLD.species[0].describe("finest")
    with pytest.raises(ValueError, match="no sibling"):
        WORLD.species[0].unlike(WORLD.species[4])
