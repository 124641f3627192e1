"""The judge protocol: both orders, Elo, tournaments over shuffles, percent of a reference."""

from __future__ import annotations

import pytest

from grainwise.evaluate.pairwise_judge import Game, compare, elo, percent_of, play, tournament


def longer(prompt: str, first: str, second: str) -> float:
    return 1.0 if len(first) > len(second) else 0.0 if len(first) < len(second) else 0.5


def first_place(prompt: str, first: str, second: str) -> float:
    return 1.0


def test_a_judge_that_favours_a_position_decides_nothing():
    assert play("p", ("a", "bb"), first_place) == 0.5
    assert play("p", ("a", "bb"), longer) == 0.0


def test_elo_moves_by_k_times_the_surprise():
    ratings = elo([Game("a", "b", 1.0)])
    assert ratings == {"a": 1016.0, "b": 984.0}
    again = elo([Game("a", "b", 1.0)] * 200)
    assert sum(again.values()) == pytest.approx(2000.0)
    assert again["a"] > 1300


def test_one_shuffle_of_a_tournament_is_plain_elo():
    games = [Game("a", "b", 1.0)] * 7
    ratings = tournament(games, shuffles=3, seed=1)
    assert ratings["a"][0] == pytest.approx(elo(games)["a"])
    assert ratings["a"][1] == pytest.approx(0.0)


def test_tournament_orders_systems_and_repeats_under_a_seed():
    prompts = ["p1", "p2", "p3"]
    games = compare(prompts, {"short": ["a"] * 3, "long": ["aaa"] * 3, "middle": ["aa"] * 3}, longer)
    assert len(games) == 9
    ratings = tournament(games, shuffles=200, seed=4)
    assert ratings["long"][0] > ratings["middle"][0] > ratings["short"][0]
    assert sum(mean for mean, _ in ratings.values()) == pytest.approx(3000.0)
    assert ratings == tournament(games, shuffles=200, seed=4)


def test_percent_of_a_reference():
    def points(prompt: str, first: str, second: str) -> tuple[float, float]:
        return len(first) + 1.0, float(len(second))  # the first place gets a point too many

    assert percent_of(["p"], ["aaa"], ["aaa"], points) == pytest.approx(100.0)
    assert percent_of(["p"], ["a" * 8], ["a" * 10], points) == pytest.approx(100 * 17 / 21)
    with pytest.raises(ValueError, match="undefined"):
        percent_of(["p"], ["a"], ["b"], lambda *_: (0.0, 0.0))


def test_wrong_input_is_refused():
    with pytest.raises(ValueError, match="between 0"):
        play("p", ("a", "b"), lambda *_: 7.0)
    with pytest.raises(ValueError, match="at least two systems"):
        compare(["p"], {"a": ["x"]}, longer)
    with pytest.raises(ValueError, match="2 answers for 1 prompts"):
        compare(["p"], {"a": ["x", "y"], "b": ["x"]}, longer)
    with pytest.raises(ValueError, match="needs games"):
        tournament([])
