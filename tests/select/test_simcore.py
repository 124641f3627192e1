from __future__ import annotations

import itertools

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.exceptions import NotFittedError

from grainwise.select.embedded_pool import EmbeddedPool
from grainwise.select.selection import DataSelector, Selection
from grainwise.select.simcore import NearestQueues, SimCore, near_duplicates


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def data(seed=0, pool=200, target=40, dimension=6):
    rng = np.random.default_rng(seed)
    return tuple(rng.standard_normal((rows, dimension)).astype(np.float32) for rows in (pool, target))


def naive_rounds(pool, centroids, rounds):
    """Every centroid's most similar row that no earlier round took; the lowest row number of equals."""
    scores = unit(centroids) @ unit(pool).T
    taken, found = set(), []
    for _ in range(rounds):
        left = [i for i in range(len(pool)) if i not in taken]
        if not left:
            break
        best = [left[int(np.argmax(row[left]))] for row in scores]
        found.append((best, [float(row[b]) for row, b in zip(scores, best)]))
        taken |= set(best)
    return found


@pytest.mark.parametrize("length", [1, 3, 500])
def test_queues_take_what_a_naive_loop_takes(length):
    pool, centroids = data()
    queues = NearestQueues(EmbeddedPool.from_array(pool), unit(centroids), np.zeros(200, bool), length)
    for best, values in naive_rounds(pool, centroids, 50):
        rows, similarity = queues.round()
        assert rows.tolist() == best
        np.testing.assert_allclose(similarity, values, atol=1e-5)
        queues.take(rows)
    assert queues.round() is None
    assert queues.passes > 1 if length < 500 else queues.passes == 1


def test_ties_go_to_the_lowest_row_also_across_batches(tmp_path):
    directions = np.eye(4, dtype=np.float32)[np.arange(400) % 4]  # a hundred equal rows for each direction
    pool = EmbeddedPool.from_batches(np.split(directions, 8), tmp_path / "pool")
    queues = NearestQueues(pool, np.eye(4, dtype=np.float32), np.zeros(400, bool), 5)
    for step in range(20):
        rows, _ = queues.round()
        assert rows.tolist() == [4 * step, 4 * step + 1, 4 * step + 2, 4 * step + 3]
        queues.take(rows)


def test_rounds_are_distinct_bounded_and_of_falling_similarity():
    pool, target = data(1)
    model = SimCore(k=12, tau=0.0, cap=3).fit(pool, target)
    chosen = model.select()
    assert isinstance(model, DataSelector)
    assert len(np.unique(chosen.indices)) == len(chosen) == 120
    sizes = np.bincount(chosen.details["round"])[1:]
    assert sizes.min() >= 1
    assert sizes.max() <= 12
    assert (np.diff(model.similarity_) <= 1e-7).all()
    best = (unit(pool) @ model.centroids_.T).max(0)
    assert model.similarity_[0] == pytest.approx(best.mean(), abs=1e-6)
    per_round = naive_rounds(pool, model.centroids_, len(sizes))
    for step, (rows, _) in enumerate(per_round[:-1], 1):
        assert set(chosen.indices[chosen.details["round"] == step]) == set(rows)
    values = np.array([v for _, v in per_round])
    assert (np.diff(values, axis=0) <= 1e-6).all()  # for every centroid


def test_the_order_of_the_target_does_not_matter():
    pool, target = data(2)
    one = SimCore(k=40, tau=0.0, cap=1).fit(pool, target).select(80)
    two = SimCore(k=40, tau=0.0, cap=1).fit(pool, target[::-1]).select(80)
    for step in range(1, int(one.details["round"].max())):
        assert set(one.indices[one.details["round"] == step]) == set(two.indices[two.details["round"] == step])


def test_round_one_is_the_optimum_of_facility_location():
    pool, target = data(3, pool=9, target=3)
    scores = unit(target) @ unit(pool).T
    optimum = max(scores[:, list(s)].max(1).sum() for s in itertools.combinations(range(9), 3))
    model = SimCore(k=3, tau=2.0).fit(pool, target)
    assert model.similarity_[0] * 3 == pytest.approx(optimum, abs=1e-5)
    np.testing.assert_allclose(model.centroids_, unit(target), atol=1e-6)  # no clustering


def test_tau_zero_and_above_one():
    pool, target = data(4)
    empty = SimCore(k=10, tau=0.0).fit(pool, target)
    assert empty.stopped_ == "pool"
    assert sorted(empty.select().indices.tolist()) == list(range(200))
    capped = SimCore(k=10, tau=0.0, cap=1.5).fit(pool, target)
    assert (capped.stopped_, len(capped.select())) == ("cap", 60)
    for reference in (1, 4):
        strict = SimCore(k=10, tau=2.0, reference_round=reference).fit(pool, target)
        assert strict.stopped_ == "threshold"
        assert len(strict.similarity_) == reference


@pytest.mark.parametrize("reference", [1, 5])
def test_the_criterion_is_read_off_the_curve(reference):
    pool, target = data(5)
    curve = SimCore(k=10, tau=0.0).fit(pool, target).similarity_
    model = SimCore(k=10, tau=0.9, reference_round=reference).fit(pool, target)
    below = [t for t in range(reference, len(curve)) if curve[t] < 0.9 * curve[reference - 1]]
    assert len(model.similarity_) == below[0]  # the round that breaks it is not added
    np.testing.assert_array_equal(model.similarity_, curve[: below[0]])


def test_copies_are_found_first():
    pool, target = data(6)
    pool[60:100] = 3.0 * target  # rows need not have unit length
    model = SimCore(k=40, tau=2.0).fit(pool, target)
    assert sorted(model.select().indices.tolist()) == list(range(60, 100))
    assert model.similarity_[0] == pytest.approx(1.0, abs=1e-6)


def test_row_lengths_and_shards_change_nothing(tmp_path):
    pool, target = data(7)
    lengths = np.random.default_rng(0).uniform(0.1, 10, (200, 1)).astype(np.float32)
    one = SimCore(k=15, tau=0.8).fit(pool, target).select()
    two = SimCore(k=15, tau=0.8).fit(pool * lengths, target * 7).select()
    shards = EmbeddedPool.from_batches(np.split(pool, 10), tmp_path / "pool", dtype="float32")
    three = SimCore(k=15, tau=0.8).fit(shards, target).select()
    assert one.indices.tolist() == two.indices.tolist() == three.indices.tolist()


def test_a_separated_family_is_exhausted_before_noise_comes_in():
    rng = np.random.default_rng(8)
    centers = np.eye(8)[:3]
    family = centers[np.arange(120) % 3] + 0.05 * rng.standard_normal((120, 8))
    noise = np.eye(8)[3 + np.arange(400) % 5] + 0.05 * rng.standard_normal((400, 8))
    target = centers[np.arange(30) % 3] + 0.05 * rng.standard_normal((30, 8))
    model = SimCore(k=3).fit(np.concatenate([noise, family]), target)
    assert sorted(model.select().indices.tolist()) == list(range(400, 520))
    assert model.stopped_ == "threshold"


def test_a_budget_overrides_the_criterion():
    pool, target = data(9)
    model = SimCore(k=10).fit(pool, target)
    chosen = model.select(33, seed=4)
    assert len(np.unique(chosen.indices)) == 33
    assert chosen.indices.tolist() == model.select(33, seed=4).indices.tolist()
    assert len(model.select(200)) == 200
    assert clone(model).get_params() == model.get_params()


def test_test_images_are_kept_out():
    pool, target = data(10)
    test = np.concatenate([pool[[5, 17]] * 2, -pool[[3]]])
    leaked = near_duplicates(pool, test)
    assert leaked.tolist() == [5, 17]
    chosen = SimCore(k=10, tau=0.0).fit(pool, target, exclude=leaked).select()
    assert sorted(set(range(200)) - set(chosen.indices.tolist())) == [5, 17]


def test_saving_and_reloading(tmp_path):
    pool, target = data(11)
    model = SimCore(k=10, tau=0.9).fit(pool, target)
    model.save(tmp_path)
    again = SimCore.load(tmp_path, pool)
    assert again.get_params() == model.get_params()
    assert again.select().indices.tolist() == model.select().indices.tolist()
    assert again.select(50).indices.tolist() == model.select(50).indices.tolist()
    assert Selection.load(tmp_path / "coreset.json").provenance["stopped"] == model.stopped_
    with pytest.raises(ValueError, match="needs the pool"):
        SimCore.load(tmp_path).select(5)


def test_bad_input_is_named():
    pool, target = data(12)
    with pytest.raises(ValueError, match="dimension 6, the target's 5"):
        SimCore(k=5).fit(pool, target[:, :5])
    broken = target.copy()
    broken[3] = 0
    with pytest.raises(ValueError, match=r"target: .*rows \[3\] are zero"):
        SimCore(k=5).fit(pool, broken)
    with pytest.raises(ValueError, match=r"pool: .*rows \[0\] are NaN"):
        SimCore(k=5).fit(np.full((1, 6), np.nan), target)
    with pytest.raises(ValueError, match="pool: "):
        SimCore(k=5).fit(pool[:0], target)
    with pytest.warns(UserWarning, match="k is 99, but the target has 40 rows"):
        SimCore(k=99).fit(pool, target)
    with pytest.warns(UserWarning, match="before the reference round 20"):
        SimCore(k=40, reference_round=20, cap=1).fit(pool, target)
    with pytest.raises(ValueError, match="every row of the pool is excluded"):
        SimCore(k=5).fit(pool, target, exclude=np.arange(200))
    with pytest.raises(ValueError, match="between 1 and the 200"):
        SimCore(k=5).fit(pool, target).select(201)
    with pytest.raises(ValueError, match="are zero, their rows cancel out"):
        SimCore(k=1).fit(pool, np.concatenate([target, -target]))
    for options in ({"k": 0}, {"reference_round": 0}, {"cap": 0}, {"tau": -1}):
        with pytest.raises(ValueError, match="k and reference_round"):
            SimCore(**options).fit(pool, target)
    with pytest.raises(NotFittedError):
        SimCore().select()
