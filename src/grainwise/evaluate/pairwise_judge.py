"""Comparing chat systems with a judge, the protocol of QLoRA (arXiv 2305.14314, section 5).

The judge is any callable: a person, a language model behind an API, a rule. Every pair of answers is judged in both orders,
because judges favour one position, and counts as won only by the average. `tournament` turns the outcomes into Elo ratings,
whose dependence on the order of the games is averaged away over many shuffles (10,000 in the paper's setting; the source of
that number is not certain).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

Judge = Callable[[str, str, str], float]
"""judge(prompt, first answer, second answer) -> how much the first wins: 1 win, 0.5 draw, 0 loss."""
Scorer = Callable[[str, str, str], tuple[float, float]]
"""scorer(prompt, first answer, second answer) -> points of the two."""
START, SPREAD = 1000.0, 400.0


@dataclass(frozen=True)
class Game:
    """One comparison: `score` is what `first` won, from 0 to 1, averaged over both orders."""

    first: str
    second: str
    score: float


def play(prompt: str, answers: tuple[str, str], judge: Judge) -> float:
    """What the first answer wins against the second, averaged over both orders.

    Raises ValueError for a verdict outside 0 to 1.
    """
    one, two = judge(prompt, answers[0], answers[1]), judge(prompt, answers[1], answers[0])
    for verdict in (one, two):
        if not 0.0 <= verdict <= 1.0:
            raise ValueError(f"a judge must answer between 0 (loss) and 1 (win of the first answer), got {verdict}")
    return (one + 1.0 - two) / 2.0


def compare(prompts: Sequence[str], answers: Mapping[str, Sequence[str]], judge: Judge) -> list[Game]:
    """All pairs of systems on all prompts. answers: system -> one answer for each prompt.

    Raises ValueError for fewer than two systems or a system with another number of answers than prompts.
    """
    if len(answers) < 2:
        raise ValueError(f"a comparison needs at least two systems, got {sorted(answers)}")
    for name, given in answers.items():
        if len(given) != len(prompts):
            raise ValueError(f"{name!r} has {len(given)} answers for {len(prompts)} prompts")
    return [
        Game(a, b, play(prompt, (answers[a][i], answers[b][i]), judge))
        for a, b in combinations(sorted(answers), 2)
        for i, prompt in enumerate(prompts)
    ]


def elo(games: Sequence[Game], *, k: float = 32.0) -> dict[str, float]:
    """Ratings after the games in this order; everyone starts at 1000, the sum stays constant."""
    ratings: dict[str, float] = {}
    for game in games:
        a, b = ratings.setdefault(game.first, START), ratings.setdefault(game.second, START)
        expected = 1.0 / (1.0 + 10.0 ** ((b - a) / SPREAD))
        gained = k * (game.score - expected)
        ratings[game.first], ratings[game.second] = a + gained, b - gained
    return ratings


def tournament(
    games: Sequence[Game], *, k: float = 32.0, shuffles: int = 10_000, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """system -> (mean rating, half width of its 95% interval) over `shuffles` random orders of the games.

    All orders are played at once, one game of each at a time. Raises ValueError for no games.
    """
    if not games or shuffles < 1:
        raise ValueError(f"a tournament needs games and at least one shuffle, got {len(games)} games and {shuffles}")
    names = sorted({name for game in games for name in (game.first, game.second)})
    number = {name: i for i, name in enumerate(names)}
    first, second = (np.array([number[getattr(g, side)] for g in games]) for side in ("first", "second"))
    score = np.array([game.score for game in games])
    orders = np.random.default_rng(seed).permuted(np.tile(np.arange(len(games)), (shuffles, 1)), axis=1)
    ratings = np.full((shuffles, len(names)), START)
    every = np.arange(shuffles)
    for game in orders.T:
        a, b = first[game], second[game]
        expected = 1.0 / (1.0 + 10.0 ** ((ratings[every, b] - ratings[every, a]) / SPREAD))
        gained = k * (score[game] - expected)
        ratings[every, a] += gained
        ratings[every, b] -= gained
    low, high = np.quantile(ratings, [0.025, 0.975], axis=0)
    return {n: (float(ratings[:, i].mean()), float(high[i] - low[i]) / 2) for i, n in enumerate(names)}


def percent_of(prompts: Sequence[str], answers: Sequence[str], reference: Sequence[str], scorer: Scorer) -> float:
    """Points of `answers` in percent of the points of `reference` over all prompts, averaged over both orders.

    Raises ValueError if the lengths differ or the reference gets no points.
    """
    if not len(prompts) == len(answers) == len(reference) or not prompts:
        raise ValueError(
            f"{len(prompts)} prompts, {len(answers)} answers, {len(reference)} reference answers: need equal, not 0"
        )
    ours = theirs = 0.0
    for prompt, answer, other in zip(prompts, answers, reference):
        a, b = scorer(prompt, answer, other)
        c, d = scorer(prompt, other, answer)
        ours, theirs = ours + a + d, theirs + b + c
    if theirs <= 0:
        raise ValueError("the scorer gave the reference no points: the percentage is undefined")
    return 100.0 * ours / theirs
