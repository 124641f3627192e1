"""What is said of scenes: expressions mean whom they say, answers are true, captions differ where they should."""

from collections import Counter
from itertools import combinations

import numpy as np
import pytest

from grainwise.world import World
from grainwise.world.backgrounds import STUFF_NAMES
from grainwise.world.captions import caption, describe, near_duplicates, regions
from grainwise.world.expressions import Facts, absent, groups, refer, shortest, usable
from grainwise.world.questions import FORMS, answer, ask
from grainwise.world.scenes import Scenes
from grainwise.world.words import counted, listed, part_noun, with_part

WORLD = World(seed=3)
BATCH = Scenes(WORLD, seed=21).draw(np.arange(48))


def true_of(scene, predicate, individual):
    """A predicate evaluated from masks and species, without the code under test."""
    family, terms = predicate
    species = scene.species[individual]
    boxes = scene.amodal_boxes / scene.size
    x, y = boxes[:, [0, 2]].mean(1), boxes[:, [1, 3]].mean(1)
    if family == "kind":
        return species.kind == terms[0]
    if family == "part":
        return any(
            part.name == terms[0] and part.attribute(terms[1]) == terms[2] and part.count == terms[3] for part in species.parts
        )
    if family == "on":
        under = scene.stuff[scene.amodal[individual]] == STUFF_NAMES.index(terms[0])
        return under.mean() >= 0.6
    if family == "at":
        away = {"left": x, "right": 1 - x, "top": y, "bottom": 1 - y}[terms[0]]
        return away[individual] < 0.3
    if family == "most":
        order = {
            "leftmost": x,
            "rightmost": -x,
            "highest": y,
            "lowest": -y,
            "largest": -scene.amodal_areas,
            "smallest": scene.amodal_areas,
        }
        same = [i for i, other in enumerate(scene.species) if other.kind == terms[1]]
        return individual == min(same, key=lambda i: order[terms[0]][i])
    related = scene.relation(terms[0])[individual]
    return any(related[b] and scene.species[b].kind == terms[1] for b in range(len(scene)))


def meant(scene, predicates):
    return tuple(i for i in range(len(scene)) if all(true_of(scene, predicate, i) for predicate in predicates))


def test_expressions_mean_exactly_whom_they_say():
    forms = Counter()
    for scene in BATCH:
        facts = Facts(scene)
        named = refer(scene, facts)
        assert len(named) == len(scene)
        for target, expression in enumerate(named):
            if expression is not None:
                assert expression.targets == (target,)
        for expression in [*filter(None, named), *groups(scene, facts), *absent(scene, facts)]:
            assert meant(scene, expression.predicates) == expression.targets, expression.text
            assert {"one": 1, "none": 0}.get(expression.form, len(expression.targets)) == len(expression.targets)
            assert expression.form != "group" or len(expression.targets) > 1
            forms[expression.form] += 1
    assert min(forms[form] for form in ("one", "group", "none")) > 40


def test_no_shorter_expression_would_do():
    lengths = Counter()
    for scene in BATCH.scenes[:16]:
        facts = Facts(scene)
        for target, expression in enumerate(refer(scene, facts)):
            if expression is None:
                continue
            noun, rest = expression.predicates[0], usable(facts, target)
            for size in range(len(expression.predicates) - 1):
                for chosen in combinations(rest, size):
                    assert meant_fast(facts, (noun, *chosen)) != 1 << target
            lengths[len(expression.predicates)] += 1
    assert set(lengths) >= {1, 2, 3}


def meant_fast(facts, predicates):
    found = (1 << len(facts.scene)) - 1
    for predicate in predicates:
        found &= facts.true[predicate]
    return found


def test_shortest_lists_all_and_refer_picks_one_of_them():
    for scene in BATCH.scenes[:12]:
        for target, expression in enumerate(refer(scene)):
            found = shortest(scene, target)
            assert (expression is None) == (not found)
            assert expression is None or expression.text in {one.text for one in found}
            assert len({len(one.predicates) for one in found}) <= 1
    with pytest.raises(ValueError, match="not in a scene"):
        shortest(BATCH[0], 99)


def test_nearly_everybody_has_a_name_and_names_in_a_scene_differ():
    named = [refer(scene) for scene in BATCH]
    assert sum(e is None for one in named for e in one) <= 0.01 * sum(map(len, named))
    for one in named:
        texts = [e.text for e in one if e is not None]
        assert len(set(texts)) == len(texts)


def true_answer(scene, program):
    """The answer from masks and species, without the code under test."""
    operation, *terms = program
    kinds = Counter(species.kind for species in scene.species)
    yes = {True: "yes", False: "no"}
    if operation == "count":
        return str(len(meant(scene, terms[0])))
    if operation == "exists":
        return yes[bool(meant(scene, terms[0]))]
    if operation == "part":
        part = scene.species[terms[0]].parts[terms[1]]
        assert scene.part_mask(terms[0], terms[1]).any()
        return str(getattr(part, terms[2]))
    if operation == "more":
        return yes[kinds[terms[0]] > kinds[terms[1]]]
    if operation == "larger":
        return yes[bool(scene.amodal[terms[0]].sum() > scene.amodal[terms[1]].sum())]
    if operation == "relation":
        return yes[bool(scene.relation(terms[0])[terms[1], terms[2]])]
    return STUFF_NAMES[np.bincount(scene.stuff[scene.amodal[terms[0]]]).argmax()]


def test_answers_are_true_and_among_the_choices():
    asked, said = Counter(), Counter()
    for scene in BATCH:
        for question in ask(scene):
            assert question.answer == true_answer(scene, question.program) == answer(scene, question.program), question.text
            assert len(set(question.options)) == len(question.options) <= 4
            assert question.options["ABCD".index(question.letter)] == question.answer
            assert question.choices.splitlines()["ABCD".index(question.letter)] == f"{question.letter}. {question.answer}"
            asked[question.form] += 1
            said[question.form, question.answer] += 1
    assert set(asked) == set(FORMS)
    for form in ("existence", "comparison", "relation"):  # neither answer is a safe guess
        assert 0.2 < said[form, "yes"] / asked[form] < 0.8


def test_texts_are_the_scenes_own():
    again = Scenes(WORLD, seed=21).draw([40, 3])
    for one, other in ((again[0], BATCH[40]), (again[1], BATCH[3])):
        assert ask(one) == ask(other)
        assert refer(one) == refer(other)
        assert [caption(one, level) for level in ("coarse", "medium", "fine")] == [
            caption(other, level) for level in ("coarse", "medium", "fine")
        ]


def test_captions_tell_more_and_more():
    for scene in BATCH:
        kinds = Counter(species.kind for species in scene.species)
        coarse, medium, fine = (caption(scene, level) for level in ("coarse", "medium", "fine"))
        for kind, number in kinds.items():
            assert counted(number, kind) in coarse
        assert all(stuff in medium for stuff in scene.stuff_seen)
        assert len(fine.split("; ")) == len(scene)
        for i, species in enumerate(scene.species):
            sentence = describe(scene, i)
            assert sentence in fine
            for part, area in zip(species.parts, scene.part_areas[i], strict=False):
                if area >= 3:
                    assert f"{part.shape} {part_noun(part.name, part.count)}" in sentence
    with pytest.raises(ValueError, match="level is 'poetic'"):
        caption(BATCH[0], "poetic")


def test_regions_carry_the_attributes_of_what_they_frame():
    for scene in BATCH.scenes[:12]:
        found = list(regions(scene))
        assert sum(region.part < 0 for region in found) == len(scene)
        for region in found:
            mask = scene.masks[region.individual] if region.part < 0 else scene.part_mask(region.individual, region.part)
            x0, y0, x1, y1 = map(int, region.box)
            assert mask[y0:y1, x0:x1].sum() == mask.sum() > 0
            if region.part >= 0:
                assert region.attributes["colour"] in region.text
                assert region.attributes["part"] == scene.species[region.individual].parts[region.part].name


def test_bags_agree_coarsely_and_differ_finely():
    scenes = Scenes(WORLD, seed=21, individuals=(1, 3))
    for bag in range(4):
        batch = near_duplicates(scenes, bag, 6)
        assert len({caption(scene, "coarse") for scene in batch}) == 1
        assert len({caption(scene, "fine") for scene in batch}) == 6
        np.testing.assert_array_equal(batch.images[4], batch[4].image)
        np.testing.assert_array_equal(batch[2].image, near_duplicates(scenes, bag, 3)[2].image)


def test_a_bag_too_large_for_its_world_is_refused():
    class Same(Scenes):
        def draw_bags(self, bags, members):
            return super().draw_bags(bags, np.zeros_like(np.atleast_1d(members)))

    with pytest.raises(ValueError, match="fewer than 2 scenes"):
        near_duplicates(Same(WORLD, individuals=(1, 1)), 0, 2)


def test_words():
    assert counted(1, "orange fish") == "an orange fish"
    assert counted(3, "red fish") == "three red fish"
    assert listed(["a", "b", "c"]) == "a, b and c"
    assert with_part("legs", 1, "colour", "red") == "with a red leg"
    assert with_part("mark", 3, "count", 3) == "with three marks"
    assert with_part("antennae", 2, "shape", "square") == "with square antennae"
