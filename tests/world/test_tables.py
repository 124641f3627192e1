"""Splits, meta-data, views, defects, label spaces, composed pairs: what their ground truth promises."""

import numpy as np
import pytest

from grainwise.world import World, splits
from grainwise.world.composed import change_text, composed_pairs
from grainwise.world.defects import DEFECTS, draw_defects
from grainwise.world.label_spaces import SPACES, label_space
from grainwise.world.metadata import law_of, log_likelihood, metadata
from grainwise.world.viewpoints import draw_views

WORLD = World(seed=2, genera=8, species_per_genus=4)


def rows(table):
    return set(zip(table.labels.tolist(), table.individuals.tolist(), strict=True))


def test_parts_of_a_split_share_no_individual():
    parts = [rows(splits.balanced(WORLD, 50, part)) for part in ("train", "val", "test")]
    assert all(len(part) == 50 * len(WORLD) for part in parts)
    assert not parts[0] & parts[1]
    assert not parts[0] & parts[2]
    assert not parts[1] & parts[2]
    assert not rows(splits.few_shot(WORLD, 5)) & parts[2]


def test_long_tail_falls_geometrically_to_the_stated_imbalance():
    counts = np.sort(np.bincount(splits.long_tail(WORLD, 400, 100).labels, minlength=len(WORLD)))[::-1]
    assert counts[0] == 400
    assert counts[-1] == 4
    ratio = counts[:-1] / counts[1:]
    assert np.median(ratio) == pytest.approx(100 ** (1 / (len(WORLD) - 1)), rel=0.05)


def test_few_shot_episodes_have_their_shots_and_differ():
    first, second = (splits.few_shot(WORLD, 3, episode=k) for k in (0, 1))
    assert (np.bincount(first.labels) == 3).all()
    assert len(rows(first)) == 3 * len(WORLD)
    assert rows(first) != rows(second)
    assert rows(first) == rows(splits.few_shot(WORLD, 3, episode=0))


def test_open_set_near_are_siblings_of_known_and_far_are_not():
    parts = splits.open_set(WORLD)
    assert sorted(parts.known + parts.near + parts.far) == list(range(len(WORLD)))
    genera = {name: {WORLD.species[i].genus for i in getattr(parts, name)} for name in ("known", "near", "far")}
    assert genera["near"] <= genera["known"]
    assert not genera["far"] & genera["known"]
    assert splits.open_set(WORLD, split=1) != parts


def test_base_and_novel_halve_every_genus():
    base, novel = splits.base_novel(WORLD)
    assert sorted(base + novel) == list(range(len(WORLD)))
    assert (np.bincount([WORLD.species[i].genus for i in base]) == 2).all()


def test_cross_domain_keeps_individuals_apart():
    tables = splits.cross_domain(WORLD, 8)
    assert tables["shifted"].style == "ink"
    assert tables["train"].style == "plain"
    assert rows(tables["shifted"]) == rows(tables["test"])
    assert not rows(tables["train"]) & rows(tables["test"])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: splits.balanced(WORLD, 5, "dev"), "part 'dev'"),
        (lambda: splits.few_shot(WORLD, 0), "shots is 0"),
        (lambda: splits.long_tail(WORLD, 5, 100), "rarest species"),
        (lambda: splits.open_set(World(genera=1)), "two genera"),
        (lambda: splits.rows([0], -1), "counts"),
    ],
)
def test_impossible_splits_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_metadata_follow_the_stated_law():
    labels, numbers = np.repeat(np.arange(len(WORLD)), 60), np.tile(np.arange(60), len(WORLD))
    data, law = metadata(WORLD, labels, numbers), law_of(WORLD)
    for species in range(len(WORLD)):
        own = labels == species
        assert np.abs(data.places[own].mean(0) - law.homes[species]).max() < 0.06
        assert set(data.habitats[own].tolist()) <= set(law.habitats[species].tolist())
    accuracy = (log_likelihood(WORLD, data).argmax(1) == labels).mean()
    assert accuracy > 0.7  # place, day and habitat together nearly name the species
    alone = metadata(WORLD, labels[100], numbers[100:101])
    assert alone.texts[0] == data.texts[100]


def test_views_show_one_individual_and_some_hide_the_deciding_part():
    views = draw_views(WORLD, np.arange(len(WORLD)), 0)
    assert views.images.shape == (len(WORLD), 8, 64, 64, 3)
    assert (views.decisive == (views.key_pixels >= 4)).all()
    assert views.decisive.any(1).all()
    assert not views.decisive.all()
    front = WORLD.draw(5, 0, nuisance=None, azimuth=np.array([0.0]))
    assert front.labels[0] == views.individuals.labels[5 * 8]
    with pytest.raises(ValueError, match="start at two"):
        draw_views(WORLD, 0, 0, views=1)


def test_defects_have_masks_names_and_a_whole_twin():
    kinds = np.arange(40) % 5
    found = draw_defects(WORLD, np.arange(40) % len(WORLD), np.arange(40), kinds)
    area = found.masks.sum((1, 2))
    assert (area[kinds == 0] == 0).all()
    assert all(name == "good" for name, kind in zip(found.names, kinds, strict=True) if kind == 0)
    assert (area[kinds > 0] > 0).mean() > 0.95
    np.testing.assert_array_equal(
        found.images[~found.masks.any((1, 2))][kinds[~found.masks.any((1, 2))] == 0], found.whole[kinds == 0]
    )
    for index, kind in enumerate(kinds):
        species, name = WORLD.species[found.drawn.labels[index]], found.names[index]
        if kind and DEFECTS[kind - 1] == "missing part":
            assert "missing" in name
            assert any(part.noun in name for part in species.parts)
        if kind and DEFECTS[kind - 1] == "wrong colour":
            assert "instead of" in name
    again = draw_defects(WORLD, 7, 7, kinds[7])
    np.testing.assert_array_equal(again.images[0], found.images[7])
    with pytest.raises(ValueError, match="kinds"):
        draw_defects(WORLD, 0, 0, 9)


def test_label_spaces_partition_the_same_pictures_differently():
    drawn = WORLD.draw(np.arange(32), np.arange(32) % 2)
    spaces = {name: label_space(WORLD, drawn, name) for name in SPACES}
    for labels, names in spaces.values():
        assert labels.shape == (32,)
        assert labels.min() >= 0
        assert labels.max() < len(names)
    assert len({tuple(labels.tolist()) for labels, _ in spaces.values()}) == len(SPACES)
    assert (spaces["species"][0] // 4 == spaces["genus"][0]).all()
    with pytest.raises(ValueError, match="choose from kind"):
        label_space(WORLD, drawn, "mood")


def test_composed_pairs_ask_for_the_sibling():
    pairs = composed_pairs(WORLD, np.arange(30))
    for reference, target, change in zip(pairs.references.labels, pairs.targets.labels, pairs.changes, strict=True):
        one, other = WORLD.species[reference], WORLD.species[target]
        assert one.genus == other.genus
        assert one.index != other.index
        part, attribute = other.key
        if attribute != "count":
            assert str(other.parts[part].attribute(attribute)) in change
        assert one.parts[part].name in change
        fitting = [s for s in WORLD.siblings(one.index) if change in {change_text(one, s, k) for k in range(3)}]
        assert fitting == [other]  # the text names exactly one sibling
    with pytest.raises(ValueError, match="no sibling"):
        change_text(WORLD.species[0], WORLD.species[5])
