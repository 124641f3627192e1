from __future__ import annotations

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from grainwise.select.selection import Selection, apportion, budget_of, checked_budget, drawing_keys, take_lowest

groups = st.lists(st.tuples(st.floats(0, 100), st.integers(0, 40)), min_size=1, max_size=12)


@given(groups, st.floats(0, 1))
def test_a_budget_is_divided_exactly_and_within_the_capacities(pairs, part):
    weights, capacities = np.array(pairs).T
    budget = int(part * capacities.sum())
    counts = apportion(weights, capacities.astype(int), budget)
    assert counts.sum() == budget
    assert (counts >= 0).all()
    assert (counts <= capacities).all()


@given(st.lists(st.integers(1, 60), min_size=1, max_size=12), st.floats(0, 0.9))
def test_without_saturation_a_share_is_within_one_of_the_proportion(sizes, part):
    sizes = np.array(sizes)
    budget = int(part * sizes.sum())
    counts = apportion(sizes / sizes.sum(), sizes, budget)
    assert (np.abs(counts - sizes * budget / sizes.sum()) < 1 + 1e-9).all()


def test_full_groups_pass_their_rest_on_in_proportion():
    assert apportion([8, 1, 1], [2, 50, 50], 10).tolist() == [2, 4, 4]
    assert apportion([8, 3, 1], [2, 50, 50], 10).tolist() == [2, 6, 2]


def test_groups_of_weight_zero_are_used_only_when_the_others_are_full():
    assert apportion([1, 0, 1], [5, 9, 5], 10).tolist() == [5, 0, 5]
    assert apportion([1, 0, 1], [5, 9, 5], 12).tolist() == [5, 2, 5]


@pytest.mark.parametrize(
    "weights, capacities, budget, words",
    [
        ([1, 1], [3, 3], 7, "budget of 7"),
        ([1, -1], [3, 3], 2, "not negative"),
        ([1, np.nan], [3, 3], 2, "finite"),
        ([1], [3, 3], 2, "one length"),
    ],
)
def test_an_impossible_division_is_refused(weights, capacities, budget, words):
    with pytest.raises(ValueError, match=words):
        apportion(weights, capacities, budget)


def test_single_draws_follow_the_probabilities_within_four_standard_errors():
    quality = np.array([1.0, 2.0, 3.0, 4.0, 0.0])
    generator, draws = np.random.default_rng(0), 10_000
    counts = np.zeros(5)
    for _ in range(draws):
        counts[drawing_keys(quality, generator).argmin()] += 1
    expected = quality / quality.sum()
    assert counts[4] == 0
    assert (np.abs(counts / draws - expected) <= 4 * np.sqrt(expected * (1 - expected) / draws)).all()


def test_several_draws_equal_drawing_one_by_one_without_replacement():
    quality = np.array([1.0, 2.0, 5.0])
    generator, draws = np.random.default_rng(1), 10_000
    counts = np.zeros(3)
    for _ in range(draws):
        counts[take_lowest(drawing_keys(quality, generator), np.zeros(3, int), np.array([2]), generator)] += 1
    p = quality / 8
    left_out = np.array([p[1] * p[2] * (1 / (1 - p[1]) + 1 / (1 - p[2]))] + [0, 0])
    left_out[1] = p[0] * p[2] * (1 / (1 - p[0]) + 1 / (1 - p[2]))
    left_out[2] = p[0] * p[1] * (1 / (1 - p[0]) + 1 / (1 - p[1]))
    expected = 1 - left_out
    assert (np.abs(counts / draws - expected) <= 4 * np.sqrt(expected * (1 - expected) / draws)).all()


def test_the_lowest_keys_of_each_group_are_taken():
    keys = np.array([0.3, 0.1, 0.2, 0.9, 0.5])
    taken = take_lowest(keys, np.array([0, 0, 0, 2, 2]), np.array([2, 0, 1]), np.random.default_rng(0))
    assert taken.tolist() == [1, 2, 4]


def test_a_selection_survives_saving(tmp_path):
    selection = Selection(np.array([4, 1]), np.array([0.5, 0.25]), {"cluster": np.array([1, 0])}, {"selector": "x", "seed": 3})
    selection.save(tmp_path / "selection.json")
    again = Selection.load(tmp_path / "selection.json")
    assert again.indices.tolist() == [4, 1]
    assert again.weights.tolist() == [0.5, 0.25]
    assert again.details["cluster"].tolist() == [1, 0]
    assert again.provenance == {"selector": "x", "seed": 3}
    assert [p.name for p in tmp_path.iterdir()] == ["selection.json"]
    assert again.apply(Dataset.from_dict({"text": list("abcde")}))["text"] == ["e", "b"]


@pytest.mark.parametrize("content", ["{", "[]", '{"indices": [1]}', '{"indices": ["x"], "weights": [1], "details": {}}'])
def test_a_file_that_is_no_selection_is_refused(tmp_path, content):
    (tmp_path / "s.json").write_text(content)
    with pytest.raises(ValueError, match="no saved selection"):
        Selection.load(tmp_path / "s.json")


def test_impossible_selections_are_refused():
    with pytest.raises(ValueError, match="twice"):
        Selection(np.array([1, 1]), np.ones(2))
    with pytest.raises(ValueError, match="cluster has 1 entries"):
        Selection(np.array([1, 2]), np.ones(2), {"cluster": np.zeros(1)})
    with pytest.raises(ValueError, match="not negative"):
        Selection(np.array([1, 2]), np.array([1.0, -1.0]))
    with pytest.raises(ValueError, match="is it the pool's"):
        Selection(np.array([7]), np.ones(1)).apply(Dataset.from_dict({"text": ["a"]}))


def test_a_budget_comes_from_a_count_or_a_fraction():
    assert budget_of(200, 7, None) == 7
    assert budget_of(200, None, 0.3) == 60
    assert budget_of(10, None, 0.001) == 1
    for budget, fraction in ((None, None), (3, 0.5)):
        with pytest.raises(ValueError, match="either"):
            budget_of(10, budget, fraction)
    with pytest.raises(ValueError, match=r"\(0, 1\]"):
        budget_of(10, None, 1.5)


def test_a_wrong_budget_says_what_was_given_and_what_to_do():
    with pytest.raises(ValueError, match=r"11 rows, but the pool has only 10: lower the budget"):
        checked_budget(11, 10)
    with pytest.raises(ValueError, match=r"3 rows for 4 clusters.*lower k"):
        checked_budget(3, 10, 4)
    with pytest.raises(ValueError, match="at least 1"):
        checked_budget(0, 10)
    with pytest.raises(ValueError, match="whole number"):
        checked_budget(2.5, 10)
