from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.base import clone
from sklearn.exceptions import NotFittedError

from grainwise.select import KMQ, DataSelector, EmbeddedPool, KCenter, LengthScorer, Selection, TransformerEncoder, select_rows
from grainwise.select.kmq import recipe_step

SELECTORS = {
    "kmq": KMQ(6),
    "km_random": KMQ(6),
    "softmax": KMQ(6, draw="softmax", temperature=0.5),
    "km_closest": KMQ(6, within="closest"),
    "k_center": KCenter(),
}


def quality_for(name, rows):
    return np.random.default_rng(9).random(rows) if name in ("kmq", "softmax") else None


@pytest.fixture(params=SELECTORS)
def fitted(request, blobs):
    return clone(SELECTORS[request.param]).fit(blobs[0], quality_for(request.param, len(blobs[0])))


def test_every_selector_keeps_the_contract(fitted, blobs):
    assert isinstance(fitted, DataSelector)
    assert clone(fitted).get_params() == fitted.get_params()
    for budget in (6, 7, 100, 239, 240):
        chosen = fitted.select(budget, seed=3)
        assert isinstance(chosen, Selection)
        assert len(chosen) == budget
        assert len(np.unique(chosen.indices)) == budget
        assert chosen.indices.min() >= 0
        assert chosen.indices.max() < len(blobs[0])
    assert fitted.select(20, seed=4).indices.tolist() == fitted.select(20, seed=4).indices.tolist()
    assert fitted.n_features_in_ == 8


def test_every_selector_refuses_impossible_budgets(fitted):
    with pytest.raises(ValueError, match=r"241 rows, but the pool has only 240"):
        fitted.select(241)
    with pytest.raises(ValueError, match="at least 1"):
        fitted.select(0)


@pytest.mark.parametrize("name", SELECTORS)
def test_every_selector_wants_to_be_fitted_first(name):
    with pytest.raises(NotFittedError):
        clone(SELECTORS[name]).select(5)


@pytest.mark.parametrize("name", SELECTORS)
def test_every_selector_names_broken_rows(name, blobs):
    broken = blobs[0].copy()
    broken[[3, 8]] = np.nan
    with pytest.raises(ValueError, match=r"rows \[3, 8\] are NaN"):
        clone(SELECTORS[name]).fit(broken)


@settings(max_examples=20, deadline=None)
@given(st.integers(6, 240), st.integers(0, 1000))
def test_cluster_counts_are_proportional_to_cluster_sizes(budget, seed):
    selector = test_cluster_counts_are_proportional_to_cluster_sizes.selector
    sizes = selector.clustering_.sizes
    chosen = selector.select(budget, seed=seed)
    counts = np.bincount(chosen.details["cluster"], minlength=6)
    assert (np.abs(counts - sizes * budget / 240) < 1 + 1e-9).all()
    np.testing.assert_allclose(chosen.weights, sizes[chosen.details["cluster"]] / 240)


@pytest.fixture(autouse=True, scope="module")
def _selector_for_the_law(blobs):
    test_cluster_counts_are_proportional_to_cluster_sizes.selector = KMQ(6).fit(blobs[0])


def test_inside_a_cluster_rows_are_drawn_by_quality():
    vectors = np.array([[1.0, 0]] * 4 + [[0, 9.0]] * 4)
    selector = KMQ(2).fit(vectors, [1, 2, 3, 4, 5, 0, 0, 5])
    draws = 3000
    counts = sum(np.bincount(selector.select(2, seed=s).indices, minlength=8) for s in range(draws)) / draws
    expected = np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0, 0, 0.5])
    assert (np.abs(counts - expected) <= 4 * np.sqrt(expected * (1 - expected) / draws)).all()


def test_softmax_drawing_accepts_negative_quality():
    vectors = np.ones((3, 2)) + np.arange(3)[:, None] * 1e-3
    quality, draws = np.array([-1.0, 0.0, 1.0]), 2000
    selector = KMQ(1, draw="softmax", temperature=0.5).fit(vectors, quality)
    counts = sum(np.bincount(selector.select(1, seed=s).indices, minlength=3) for s in range(draws)) / draws
    expected = np.exp(quality / 0.5) / np.exp(quality / 0.5).sum()
    assert (np.abs(counts - expected) <= 4 * np.sqrt(expected * (1 - expected) / draws)).all()


def test_one_cluster_without_quality_is_uniform_sampling_also_of_repeated_rows():
    vectors = np.array([[1.0, 2]] * 5 + [[3.0, 1]] * 3)
    selector, draws = KMQ(1).fit(vectors, np.full(8, 0.7)), 2000
    counts = sum(np.bincount(selector.select(3, seed=s).indices, minlength=8) for s in range(draws)) / draws
    assert (np.abs(counts - 3 / 8) <= 4 * np.sqrt(3 / 8 * 5 / 8 / draws)).all()


def test_as_many_clusters_as_rows_takes_one_of_each():
    vectors = np.random.default_rng(0).standard_normal((15, 3))
    chosen = KMQ(15).fit(vectors).select(15)
    assert sorted(chosen.details["cluster"].tolist()) == list(range(15))


def test_the_closest_rows_are_taken(blobs):
    selector = KMQ(6, within="closest").fit(blobs[0])
    chosen = selector.select(24)
    found = selector.clustering_
    for cluster in range(6):
        inside = np.flatnonzero(found.assignment == cluster)
        taken = chosen.indices[chosen.details["cluster"] == cluster]
        assert set(taken) == set(inside[np.argsort(found.distances[inside])][: len(taken)])


def test_k_center_is_the_farthest_first_traversal(blobs):
    vectors = np.vstack([blobs[0][:60], blobs[0][:3]])  # with repeated rows
    chosen = KCenter().fit(vectors).select(63, seed=1)
    taken = [int(chosen.indices[0])]
    for i in range(1, 20):
        distance = np.min([np.linalg.norm(vectors - vectors[t], axis=1) for t in taken], axis=0)
        assert distance[chosen.indices[i]] == pytest.approx(distance.max(), rel=1e-5)
        assert chosen.details["radius"][i] == pytest.approx(distance.max(), rel=1e-5)
        taken.append(int(chosen.indices[i]))
    assert sorted(chosen.indices.tolist()) == list(range(63))


def test_without_k_the_silhouette_chooses(blobs):
    assert KMQ(grid=(3, 6, 12, 500)).fit(blobs[0]).clustering_.k == 6
    with pytest.raises(ValueError, match=r"no k of the grid \[500\]"):
        KMQ(grid=(500,)).fit(blobs[0])


def test_a_budget_below_the_clusters_is_refused(blobs):
    with pytest.raises(ValueError, match=r"5 rows for 6 clusters.*lower k"):
        KMQ(6).fit(blobs[0]).select(5)


def test_bad_quality_is_named_with_the_remedy(blobs):
    quality = np.ones(240)
    quality[[2, 5]] = np.nan
    with pytest.raises(ValueError, match=r"rows \[2, 5\] is missing"):
        KMQ(6).fit(blobs[0], quality)
    quality[[2, 5]] = -1
    with pytest.raises(ValueError, match=r'rows \[2, 5\] is negative.*draw="softmax"'):
        KMQ(6).fit(blobs[0], quality)
    with pytest.raises(ValueError, match="each of the 240 rows"):
        KMQ(6).fit(blobs[0], np.ones(3))
    for selector in (KMQ(6, within="closest"), KCenter()):
        with pytest.raises(ValueError, match="leave the quality out"):
            selector.fit(blobs[0], np.ones(240))


@pytest.mark.parametrize("options", [{"within": "nearest"}, {"draw": "proportion"}])
def test_unknown_options_are_refused(blobs, options):
    with pytest.raises(ValueError, match="unknown option"):
        KMQ(6, **options).fit(blobs[0])
    with pytest.raises(ValueError, match="temperature"):
        KMQ(6, temperature=0).fit(blobs[0])


@pytest.fixture
def corpus():
    rng = np.random.default_rng(0)
    words = ["alpha beta gamma", "one two three", "red green blue"]
    rows = [f"{words[i % 3]} {''.join(rng.choice(list('xyz'), 4))}" for i in range(60)]
    return Dataset.from_dict({"prompt": rows, "response": [r[: 5 + i % 9] for i, r in enumerate(rows)]})


def test_one_call_selects_from_a_data_set(tiny_llama, characters, corpus, tmp_path):
    encoder = TransformerEncoder(tiny_llama, characters)
    rows, chosen = select_rows(
        corpus, KMQ(3), encoder=encoder, fraction=0.2, quality=LengthScorer(), folder=tmp_path, seed=1, progress=False
    )
    assert len(rows) == len(chosen) == 12
    assert rows["prompt"] == [corpus[int(i)]["prompt"] for i in chosen.indices]
    assert len(EmbeddedPool.open(tmp_path, encoder=encoder)) == 60


def recipe_state(model, tokenizer, train, folder):
    return SimpleNamespace(model=model, tokenizer=tokenizer, train=train, seed=0, folder=folder, progress=lambda *_: None)


@pytest.mark.parametrize(
    "options", [{}, {"quality": "length"}, {"quality": "likelihood"}, {"method": "km_closest"}, {"method": "k_center"}]
)
def test_a_recipe_step_replaces_the_training_rows(tiny_llama, characters, tmp_path, options):
    text = "\n\n".join(f"Paragraph {i} " + "about something " * 60 for i in range(30))
    state = recipe_state(tiny_llama, characters, Dataset.from_dict({"text": [text, text[::-1]]}), tmp_path)
    figures = recipe_step(state, fraction=0.25, k=4, **options)
    assert figures["rows_before"] == 30  # two paragraphs make a passage
    assert len(state.train) == figures["rows_after"] == round(0.25 * figures["rows_before"])
    assert max(len(t) for t in state.train["text"]) < 2100
    assert len(Selection.load(tmp_path / "selection.json")) == len(state.train)
    assert figures.get("clusters", 4) == 4


def test_a_recipe_step_takes_a_budget_and_chooses_k(tiny_llama, characters, corpus, tmp_path):
    state = recipe_state(tiny_llama, characters, corpus, tmp_path)
    figures = recipe_step(state, budget=20)
    assert figures["rows_after"] == len(state.train) == 20
    assert figures["clusters"] in (8, 16)
    assert state.train.column_names == ["prompt", "response"]


@pytest.mark.parametrize(
    "options, words",
    [
        ({"method": "kmg"}, "unknown method 'kmg'. Did you mean 'kmq'"),
        ({"quality": "lenght"}, "unknown quality 'lenght'. Did you mean 'length'"),
        ({"method": "km_random", "quality": "length"}, "uses no quality"),
    ],
)
def test_a_wrong_recipe_step_is_refused(tiny_llama, characters, corpus, tmp_path, options, words):
    with pytest.raises(ValueError, match=words):
        recipe_step(recipe_state(tiny_llama, characters, corpus, tmp_path), **options)
