"""Kneser-Ney: a proper distribution, equal to a direct reading of the formula."""

from collections import defaultdict

import numpy as np
import pytest

from grainwise.evaluate.ngram import KneserNey


def reference(stream, discounts, vocabulary, order):
    """P(w | h) by the recursive formula over dictionaries; discounts per order as fitted."""
    counts = [defaultdict(float) for _ in range(order + 1)]
    for i in range(len(stream) - order + 1):
        counts[order][tuple(stream[i : i + order])] += 1
    for n in range(order - 1, 0, -1):
        longer = {tuple(stream[i : i + n + 1]) for i in range(len(stream) - n)}
        for gram in longer:
            counts[n][gram[1:]] += 1

    def p(word, history):
        n = len(history) + 1
        lower = 1 / vocabulary if n == 1 else p(word, history[1:])
        row = {g[-1]: c for g, c in counts[n].items() if g[:-1] == history}
        total = sum(row.values())
        if not total:
            return lower
        d = discounts[n - 1]
        mass = sum(d[int(min(c, 3))] for c in row.values()) / total
        own = max(row.get(word, 0) - d[int(min(row.get(word, 0), 3))], 0) / total
        return own + mass * lower

    return p


@pytest.fixture(scope="module")
def stream():
    rng = np.random.default_rng(0)
    return (rng.integers(0, 7, 400) * rng.integers(0, 2, 400)).astype(np.int64)


def test_matches_the_formula(stream):
    model = KneserNey(3, 7).fit(stream)
    p = reference(stream.tolist(), [o.discounts for o in model.orders_], 7, 3)
    test = np.array([0, 3, 0, 6, 6, 1, 0, 0, 2, 5, 5, 4])
    found = 2 ** model.log2_probabilities(test)
    expected = [p(w, tuple(test[max(0, i - 2) : i])) for i, w in enumerate(test.tolist())]
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_probabilities_of_a_context_sum_to_one(stream):
    model = KneserNey(4, 7).fit(stream)
    for context in ([0, 0, 3], [6, 5, 6], [1, 0, 0]):
        total = sum(2 ** model.log2_probabilities(np.array([*context, w]))[-1] for w in range(7))
        assert total == pytest.approx(1.0, abs=1e-9)


def test_more_context_codes_a_markov_source_better():
    rng = np.random.default_rng(1)
    table = rng.permuted(np.tile(np.arange(5), (5, 1)), axis=1)
    chain = [0, 1]
    for _ in range(3000):
        chain.append(int(table[chain[-2], chain[-1]]) if rng.random() < 0.9 else int(rng.integers(5)))
    train, test = np.array(chain[:2500]), np.array(chain[2500:])
    cost = {n: -KneserNey(n, 5).fit(train).log2_probabilities(test).mean() for n in (2, 3)}
    assert cost[3] < 0.7 * cost[2]


def test_bad_input():
    with pytest.raises(ValueError, match=r"lie in \[0, 4\)"):
        KneserNey(2, 4).fit(np.array([0, 1, 9]))
    with pytest.raises(ValueError, match="at least 3"):
        KneserNey(3, 4).fit(np.array([0, 1]))
    with pytest.raises(ValueError, match="order must be"):
        KneserNey(1, 4)
