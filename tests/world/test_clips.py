"""Clips: exact ground truth, the order of events, fine-grained classes, expressions, and both data set forms."""

import hashlib
import subprocess
import sys

import numpy as np
import pytest
import torch

from grainwise.world import World
from grainwise.world.actions import ACTIONS, EXPRESSIONS, FAMILIES, PHASES, SUB_ACTIONS, SUB_NAMES, groups_of, total_motion
from grainwise.world.clips import Clips, clip_sheet
from grainwise.world.individuals import boxes_of
from grainwise.world.record_views import RecordDataset, to_dataset

WORLD = World(seed=11)
PERSISTENT = {"walk left": -0.45, "walk right": 0.45}


@pytest.fixture(scope="module")
def batch():
    return Clips(WORLD, seed=10, frames=16, size=64).draw(np.arange(40))


def test_a_clip_is_the_same_in_any_batch(batch):
    again = Clips(WORLD, seed=10, frames=16, size=64).draw([7, 3])
    for row, index in enumerate([7, 3]):
        for name in ("frames", "owners", "parts", "boxes", "species", "actions", "backgrounds"):
            np.testing.assert_array_equal(getattr(again, name)[row], getattr(batch, name)[index])
        assert again.moments[row] == batch.moments[index]
        assert again.captions[row] == batch.captions[index]


def test_a_clip_is_the_same_in_another_process():
    code = (
        "import hashlib; from grainwise.world import World; from grainwise.world.clips import Clips;"
        "b = Clips(World(seed=11), 10, 8, 32).draw([5]); print(hashlib.sha256(b.frames.tobytes() + b.owners.tobytes()).hexdigest())"
    )
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    here = Clips(WORLD, 10, 8, 32).draw([5])
    assert there == hashlib.sha256(here.frames.tobytes() + here.owners.tobytes()).hexdigest()


def test_large_batches_are_drawn_in_pieces(monkeypatch, batch):
    monkeypatch.setattr("grainwise.world.clips.PIXELS_AT_ONCE", 3 * 16 * 64 * 64)
    pieces = Clips(WORLD, seed=10, frames=16, size=64).draw(np.arange(8))
    np.testing.assert_array_equal(pieces.frames, batch.frames[:8])
    assert pieces.captions == batch.captions[:8]


def test_boxes_are_tight_and_actors_are_seen(batch):
    seen = 0
    for actor in range(batch.species.shape[1]):
        masks = batch.masks(actor).reshape(-1, 64, 64)
        np.testing.assert_array_equal(boxes_of(masks).reshape(40, 16, 4), batch.boxes[:, actor])
        here = batch.species[:, actor] >= 0
        assert not batch.masks(actor)[~here].any()
        seen += (batch.masks(actor)[here].any((2, 3))).mean() * here.sum()
    assert seen / (batch.species >= 0).sum() > 0.99
    assert ((batch.parts > 0) == (batch.owners > 0)).all()


def test_actors_of_a_clip_are_of_different_kinds(batch):
    for row in batch.species:
        kinds = [WORLD.species[index].kind for index in row if index >= 0]
        assert len(set(kinds)) == len(kinds) >= 1
    assert (batch.actions[:, 0] >= 0).all()
    assert (batch.actions[batch.species < 0] == -1).all()


def test_moments_follow_the_action(batch):
    for i, moments in enumerate(batch.moments):
        for actor, action in enumerate(batch.actions[i]):
            mine = [one for one in moments if one.actor == actor]
            if action < 0:
                assert not mine
                continue
            steps = ACTIONS[action].steps
            assert [
                one.captions["fine"].split("with")[-1].endswith(step.phrase()) for one, step in zip(mine, steps, strict=True)
            ] == [True, True]
            assert 0 <= mine[0].start < mine[0].end <= mine[1].start < mine[1].end <= 16
            units = [(one.end - one.start) / step.units for one, step in zip(mine, steps, strict=True)]
            assert units[0] == units[1] >= 2


@pytest.mark.parametrize("frames", [8, 9, 12, 24, 64])
def test_every_length_holds_every_action(frames):
    drawn = Clips(WORLD, 10, frames, 32, actors=(1, 1)).draw(np.arange(100 if frames < 20 else 30))
    assert drawn.frames.shape[1] == frames
    assert all(one.start >= 0 and one.start + 2 <= one.end <= frames for moments in drawn.moments for one in moments)


def test_nothing_moves_outside_moments_and_something_does_inside(batch):
    changed = (batch.frames[:, 1:] != batch.frames[:, :-1]).any((2, 3, 4))
    busy = np.zeros((40, 17), bool)
    for i, moments in enumerate(batch.moments):
        for one in moments:
            busy[i, one.start : one.end] = True
    still = ~busy[:, :-2] & ~busy[:, 1:-1]
    assert not changed[still].any()
    inside = [changed[i, max(one.start - 1, 0) : one.end].any() for i, moments in enumerate(batch.moments) for one in moments]
    assert np.mean(inside) > 0.97


def test_classes_of_a_family_differ_in_order_count_or_duration_only():
    assert len({action.steps for action in ACTIONS}) == len(ACTIONS) == 6 * len(FAMILIES)
    for action in ACTIONS:
        for other in action.siblings:
            assert {step.sub for step in action.steps} == {step.sub for step in other.steps}
            assert action.phrase("medium") == other.phrase("medium")
            assert action.phrase("fine") != other.phrase("fine")
            assert action.phrase() in action.unlike(other)
    with pytest.raises(ValueError, match="no sibling"):
        ACTIONS[0].unlike(ACTIONS[-1])


@pytest.mark.parametrize("name", SUB_NAMES)
def test_sub_actions_begin_at_rest_and_end_as_they_should(name):
    ends = SUB_ACTIONS[name].motion(np.array([0, 1], np.float32))
    middle = SUB_ACTIONS[name].motion(np.array([0.25], np.float32))
    for channel, value in vars(ends).items():
        if not value.ndim:
            continue
        assert abs(value[0]) < 1e-6
        left = value[1] % 360 if channel in ("turn", "azimuth") else value[1]
        assert left == pytest.approx(PERSISTENT.get(name, 0.0) if channel == "dx" else 0.0, abs=1e-6)
    assert any(value.ndim and abs(value[0]) > 0.01 for value in vars(middle).values())


def test_motions_add_up():
    walk = SUB_NAMES.index("walk right")
    total = total_motion(np.array([[walk, walk, -1]]), np.array([[[0, 0, 0], [1, 0, 0], [1, 1, 0]]], np.float32))
    np.testing.assert_allclose(total.dx[0], [0, 0.45, 0.9], atol=1e-6)


def test_walking_moves_the_box_the_right_way():
    chosen = [a.index for a in ACTIONS if "walk right" in {s.sub for s in a.steps}]
    drawn = Clips(WORLD, 10, 16, 64, actors=(1, 1), actions=chosen).draw(np.arange(10))
    centre = (drawn.boxes[:, 0, :, 0] + drawn.boxes[:, 0, :, 2]) / 2
    assert (centre[:, -1] - centre[:, 0] > 4).all()


def test_blinking_closes_the_face_part():
    chosen = [action.index for action in ACTIONS if action.variant == "base" and action.steps[1].sub == "blink"]
    drawn = Clips(WORLD, 10, 16, 64, actors=(1, 1), actions=chosen).draw(np.arange(16))
    part = np.array(groups_of(WORLD).face_part)[drawn.species[:, 0]]
    area = (drawn.parts == part[:, None, None, None]).sum((2, 3))
    for seen, moments in zip(area, drawn.moments, strict=True):
        blink, busy = moments[1], [range(one.start, one.end) for one in moments]
        rest = [t for t in range(16) if not any(t in span for span in busy)]
        assert seen[blink.start : blink.end].min() < 0.7 * seen[rest].mean()


def test_expressions_change_one_part_through_its_phases():
    clips = Clips(WORLD, 10, 16, 96, kind="expression")
    drawn = clips.draw(np.arange(40))
    assert set(np.unique(drawn.phases)) == set(range(len(PHASES)))
    shows = 0
    for i in range(40):
        phases = drawn.phases[i]
        order = phases[np.r_[True, phases[1:] != phases[:-1]]].tolist()
        assert order in ([0, 1, 2, 3, 0], [0, 1, 2, 3])
        for one, phase in zip(drawn.moments[i], (1, 2, 3), strict=True):
            assert np.flatnonzero(phases == phase).tolist() == list(range(one.start, one.end))
        face = drawn.parts[i] == drawn.face_parts[i]
        apex, rest = np.flatnonzero(phases == 2)[0], 0
        shows += (face[apex] != face[rest]).any()
        assert (drawn.frames[i][phases == 0] == drawn.frames[i][0]).all()
    assert shows >= 38
    strength = clips._strength(clips._plan(np.arange(40)))
    assert (strength[drawn.phases == 0] == 0).all()
    assert (strength[drawn.phases == 2] >= 0.44).all()


def test_raised_and_lowered_parts_move_the_right_way():
    drawn = Clips(WORLD, 10, 16, 96, kind="expression").draw(np.arange(60))
    checked = 0
    for i in range(60):
        dy = EXPRESSIONS[drawn.expressions[i]].shift[1]
        face = drawn.parts[i] == drawn.face_parts[i]
        apex = np.flatnonzero(drawn.phases[i] == 2)[0]
        if dy and face[0].sum() > 30 and face[apex].sum() > 0.8 * face[0].sum():
            middle = [np.nonzero(face[t])[0].mean() for t in (0, apex)]
            assert np.sign(middle[1] - middle[0]) == np.sign(dy)
            checked += 1
    assert checked >= 5


def test_captions_grow_finer(batch):
    for i, captions in enumerate(batch.captions):
        assert len(captions["coarse"]) < len(captions["medium"]) < len(captions["fine"])
        assert ACTIONS[batch.actions[i, 0]].phrase() in captions["fine"]
        assert " with " not in captions["coarse"]


def test_chosen_species_and_actions_only():
    drawn = Clips(WORLD, 10, 8, 32, actors=(1, 2), actions=[4, 9], species=[0, 1, 5]).draw(np.arange(50))
    assert set(np.unique(drawn.species)) <= {-1, 0, 1, 5}
    assert set(np.unique(drawn.actions)) <= {-1, 4, 9}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"frames": 7}, "8 to 64"),
        ({"frames": 65}, "8 to 64"),
        ({"size": 33}, "even"),
        ({"size": 1024}, "even"),
        ({"kind": "dance"}, "action, expression"),
        ({"actors": (0, 2)}, "1 to 3"),
        ({"actors": (1, 4)}, "1 to 3"),
        ({"actions": [99]}, "0..47"),
        ({"species": [0], "actors": (1, 2)}, "as many kinds"),
        ({"style": "oil"}, "unknown"),
        ({"still": 2.0}, "probability"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        Clips(WORLD, **settings)


def test_wrong_indices_are_named():
    with pytest.raises(ValueError, match="from 0"):
        Clips(WORLD).draw([-1])
    with pytest.raises(ValueError, match="from 0"):
        Clips(WORLD).draw([])
    with pytest.raises(TypeError, match="World"):
        Clips("a world")


def test_torch_form_draws_batches():
    clips = Clips(WORLD, 10, 8, 32)
    data = RecordDataset(clips, 6)
    loader = torch.utils.data.DataLoader(
        data, batch_size=3, collate_fn=lambda rows: torch.stack([row["frames"] for row in rows])
    )
    frames = torch.cat(list(loader))
    assert frames.shape == (6, 8, 3, 32, 32)
    assert torch.equal(frames[4], torch.from_numpy(clips.draw([4]).frames[0]).permute(0, 3, 1, 2))
    assert data[-1]["index"] == 5
    with pytest.raises(IndexError, match="6 records"):
        data[6]
    with pytest.raises(ValueError, match="at least one"):
        RecordDataset(clips, 0)


def test_datasets_form_keeps_pixels_and_moments():
    clips = Clips(WORLD, 10, 8, 32)
    table = to_dataset(clips, 3)
    truth = clips.draw([2])
    np.testing.assert_array_equal(np.stack([np.asarray(one) for one in table[2]["frames"]]), truth.frames[0])
    np.testing.assert_array_equal(np.stack([np.asarray(one) for one in table[2]["owners"]]), truth.owners[0])
    assert table[2]["fine_caption"] == truth.captions[0]["fine"]
    assert [(m["start"], m["end"]) for m in table[2]["moments"]] == [(m.start, m.end) for m in truth.moments[0]]


def test_sheet_has_pictures_with_labels():
    rows = clip_sheet(10)
    assert len(rows) == 8
    assert len({picture.size for picture, _ in rows}) == 1
    assert all(lines and all(isinstance(line, str) for line in lines) for _, lines in rows)
