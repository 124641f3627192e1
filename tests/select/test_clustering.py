from __future__ import annotations

import itertools

import numpy as np
import pytest
from sklearn.metrics import adjusted_rand_score, silhouette_score

from grainwise.select import clustering
from grainwise.select.clustering import Clustering, KScore, assign, choose_k, elbow, k_curve, kmeans
from grainwise.select.embedded_pool import EmbeddedPool

ENGINES = ["lloyd", "minibatch", "faiss"]


@pytest.fixture(params=ENGINES)
def engine(request):
    if request.param == "faiss":
        pytest.importorskip("faiss")
    return request.param


def test_separated_blobs_are_recovered(blobs, engine):
    found = kmeans(blobs[0], 6, engine=engine, restarts=5, seed=1)
    assert adjusted_rand_score(blobs[1], found.assignment) == 1.0
    assert sorted(found.sizes.tolist()) == [10, 20, 30, 40, 60, 80]
    assert found.engine == engine


def test_every_row_is_with_its_nearest_center(blobs, engine, tmp_path):
    vectors = np.random.default_rng(3).standard_normal((300, 5)).astype(np.float32)
    pool = EmbeddedPool.from_batches(np.array_split(vectors, 3), tmp_path, dtype="float32")
    found = kmeans(pool, 9, engine=engine)
    squared = ((vectors[:, None] - found.centers[None]) ** 2).sum(-1)
    assert (found.assignment == squared.argmin(1)).all()
    np.testing.assert_allclose(found.distances, squared.min(1), rtol=1e-5, atol=1e-6)
    assert found.inertia == pytest.approx(squared.min(1).sum(), rel=1e-5)
    assert found.k == 9
    assert (found.sizes > 0).all()


@pytest.mark.parametrize("engine", ["lloyd", "faiss"])  # mini-batches promise it only on average
def test_the_cost_never_rises_between_iterations(engine):
    if engine == "faiss":
        pytest.importorskip("faiss")
    vectors = np.random.default_rng(4).standard_normal((400, 6)).astype(np.float32)
    costs = [kmeans(vectors, 12, engine=engine, iterations=i).inertia for i in (1, 2, 3, 5, 10, 20)]
    assert all(b <= a * (1 + 1e-6) for a, b in itertools.pairwise(costs))
    assert costs[-1] < costs[0]


def test_the_same_seed_gives_the_same_clusters(blobs, engine):
    first, second = (kmeans(blobs[0], 7, engine=engine, seed=5).assignment for _ in range(2))
    assert (first == second).all()


def test_centers_fitted_on_a_part_serve_the_whole_pool(blobs, monkeypatch):
    monkeypatch.setattr(clustering, "SMALL_POOL", 10)
    monkeypatch.setattr(clustering, "POINTS_PER_CENTER", 20)
    found = kmeans(blobs[0], 6, engine="lloyd", restarts=5)
    assert len(found.assignment) == 240
    assert adjusted_rand_score(blobs[1], found.assignment) == 1.0


def test_auto_takes_an_engine_for_large_pools(monkeypatch):
    monkeypatch.setattr(clustering, "SMALL_POOL", 10)
    monkeypatch.setattr(clustering.importlib.util, "find_spec", lambda name: None)
    assert kmeans(np.random.default_rng(0).standard_normal((50, 3)), 4).engine == "minibatch"


def test_empty_clusters_are_reseeded_and_reported():
    vectors = np.array([[0.0, 1], [0, 1], [5, 0], [9, 0]], np.float32)
    centers = np.array([[0, 1], [5, 0], [100, 100], [101, 100]], np.float32)
    with pytest.raises(ValueError, match="too few distinct rows"):
        clustering._without_empty_clusters(EmbeddedPool.from_array(vectors), centers)
    with pytest.warns(UserWarning, match="1 empty clusters were re-seeded"):
        found, assignment, _, reseeded = clustering._without_empty_clusters(EmbeddedPool.from_array(vectors), centers[:3])
    assert reseeded == 1
    assert found[2].tolist() == [9, 0]
    assert assignment.tolist() == [0, 0, 1, 2]


def test_as_many_clusters_as_rows_gives_each_its_own():
    vectors = np.random.default_rng(6).standard_normal((12, 3)).astype(np.float32)
    assert kmeans(vectors, 12).sizes.tolist() == [1] * 12
    with pytest.raises(ValueError, match="too few distinct rows; lower k"):
        kmeans(np.ones((5, 2)), 3)


def test_the_silhouette_is_scikit_learns(blobs):
    (score,) = k_curve(blobs[0], [5])
    assert score.silhouette == pytest.approx(silhouette_score(blobs[0], kmeans(blobs[0], 5).assignment), abs=1e-6)


def test_the_number_of_blobs_is_chosen(blobs):
    assert choose_k(blobs[0], (3, 6, 12, 24)) == 6
    assert choose_k(blobs[0], (3, 6, 12, 24), sample=150, seed=2) == 6
    assert choose_k(blobs[0], (3, 6, 12, 24), criterion="elbow") == 6
    assert elbow([KScore(2, 0, 100.0), KScore(4, 0, 20.0), KScore(8, 0, 15.0), KScore(16, 0, 12.0)]) == 4


def test_a_clustering_survives_saving(blobs, tmp_path):
    found = kmeans(blobs[0], 4)
    found.save(tmp_path / "clusters.safetensors")
    again = Clustering.load(tmp_path / "clusters.safetensors")
    np.testing.assert_array_equal(again.centers, found.centers)
    np.testing.assert_array_equal(again.assignment, found.assignment)
    assert (again.engine, again.reseeded) == ("lloyd", 0)
    (tmp_path / "torn").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="no saved clustering"):
        Clustering.load(tmp_path / "torn")


def test_assignment_does_not_depend_on_the_batches(blobs, monkeypatch):
    centers = blobs[0][:5]
    whole = assign(blobs[0], centers)
    pool = EmbeddedPool([blobs[0][:7], blobs[0][7:100], blobs[0][100:]])
    np.testing.assert_array_equal(assign(pool, centers)[0], whole[0])
    np.testing.assert_array_equal(assign(pool, centers)[1], whole[1])


def test_wrong_arguments_are_refused(blobs):
    with pytest.raises(ValueError, match=r"unknown engine 'fais'. Did you mean 'faiss'"):
        kmeans(blobs[0], 3, engine="fais")
    for k in (0, 241):
        with pytest.raises(ValueError, match="between 1 and the pool's 240 rows"):
            kmeans(blobs[0], k)
    with pytest.raises(ValueError, match="k between 2 and 239"):
        k_curve(blobs[0], (1, 5))
    with pytest.raises(ValueError, match="unknown criterion"):
        choose_k(blobs[0], (3, 6), criterion="best")
    with pytest.raises(ValueError, match="three values"):
        elbow([KScore(2, 0, 1.0)])
