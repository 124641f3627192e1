"""An n-gram language model with interpolated, modified Kneser-Ney smoothing: the classical yardstick for small models.

Chen and Goodman, "An empirical study of smoothing techniques for language modeling" (1999). The highest order counts
occurrences, lower orders count distinct left contexts; each order takes three discounts (for counts 1, 2, and 3 or more)
estimated from its counts of counts, and interpolates with the order below, the lowest with the uniform distribution.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass
class _Order:
    """One order: sorted n-gram keys (prefix id x vocabulary + token), adjusted counts, and sums per context."""

    keys: Ints
    counts: Floats
    discounts: Floats  # indexed by min(count, 3); index 0 is 0
    totals: Floats  # per context id
    backoff: Floats  # probability mass per context id that goes to the order below


class KneserNey:
    """`KneserNey(order, vocabulary).fit(tokens)`, then `log2_probabilities(tokens)`.

    tokens: one-dimensional integer arrays of ids below `vocabulary`. Raises ValueError for ids outside it, order < 2, or
    fewer tokens than the order.
    """

    def __init__(self, order: int, vocabulary: int) -> None:
        if order < 2 or vocabulary < 1:
            raise ValueError(f"order must be at least 2 and vocabulary at least 1, got {order} and {vocabulary}")
        self.order, self.vocabulary = order, vocabulary
        self.orders_: list[_Order] = []

    def fit(self, tokens: Ints) -> KneserNey:
        """Count the n-grams of one stream."""
        tokens = self._checked(tokens)
        ids, uniques = [tokens], [np.arange(self.vocabulary, dtype=np.int64)]
        raw = [np.bincount(tokens, minlength=self.vocabulary)]
        suffix: list[Ints] = []
        for _ in range(2, self.order + 1):
            keys = ids[-1][:-1] * self.vocabulary + tokens[len(tokens) - len(ids[-1]) + 1 :]
            unique, first, inverse, count = np.unique(keys, return_index=True, return_inverse=True, return_counts=True)
            suffix.append(ids[-1][1:][first])  # of each distinct n-gram, the id of its last n - 1 tokens
            ids.append(inverse.astype(np.int64))
            uniques.append(unique)
            raw.append(count)
        adjusted = [np.bincount(suffix[n], minlength=len(uniques[n])) for n in range(self.order - 1)] + [raw[-1]]
        contexts = [1, *(len(u) for u in uniques[:-1])]
        self.orders_ = [self._order(uniques[n], adjusted[n], contexts[n], lowest=n == 0) for n in range(self.order)]
        return self

    def _order(self, keys: Ints, counts: Ints, contexts: int, *, lowest: bool) -> _Order:
        tops = np.bincount(np.minimum(counts, 5), minlength=6).astype(float)
        discounts = _discounts(tops)
        context = np.zeros(len(keys), dtype=np.int64) if lowest else keys // self.vocabulary
        totals = np.bincount(context, weights=counts, minlength=contexts)
        removed = np.bincount(context, weights=discounts[np.minimum(counts, 3)], minlength=contexts)
        with np.errstate(invalid="ignore", divide="ignore"):
            backoff = np.where(totals > 0, removed / totals, 1.0)
        return _Order(keys, counts.astype(float), discounts, totals.astype(float), backoff)

    def log2_probabilities(self, tokens: Ints) -> Floats:
        """log2 P(token | the tokens before it) for each token, float array (length,)."""
        tokens = self._checked(tokens)
        lowest = self.orders_[0]
        p = self._discounted(lowest, tokens, np.zeros_like(tokens)) + lowest.backoff[0] / self.vocabulary
        ids = tokens
        for n, order in enumerate(self.orders_[1:], start=2):
            context = ids[:-1]
            keys = np.where(context >= 0, context * self.vocabulary + tokens[n - 1 :], -1)
            place = np.minimum(np.searchsorted(order.keys, keys), len(order.keys) - 1)
            ids = np.where((order.keys[place] == keys) & (context >= 0), place, -1)
            known = (context >= 0) & (order.totals[np.maximum(context, 0)] > 0)
            seen = self._discounted(order, ids, context)
            p[n - 1 :] = np.where(known, seen + order.backoff[np.maximum(context, 0)] * p[n - 1 :], p[n - 1 :])
        return np.log2(p)

    @staticmethod
    def _discounted(order: _Order, ids: Ints, context: Ints) -> Floats:
        """(count - discount) / total of the context; 0 for n-grams that were not seen (id -1)."""
        counts = np.where(ids >= 0, order.counts[np.maximum(ids, 0)], 0.0)
        left = np.maximum(counts - order.discounts[np.minimum(counts, 3).astype(int)], 0.0)
        return left / np.maximum(order.totals[np.maximum(context, 0)], 1e-300) * (counts > 0)

    def _checked(self, tokens: Ints) -> Ints:
        tokens = np.asarray(tokens, dtype=np.int64)
        if tokens.ndim != 1 or len(tokens) < self.order:
            raise ValueError(f"tokens must be one stream of at least {self.order}, got shape {tokens.shape}")
        if tokens.min() < 0 or tokens.max() >= self.vocabulary:
            raise ValueError(f"token ids must lie in [0, {self.vocabulary}), got {tokens.min()} to {tokens.max()}")
        return tokens


def _discounts(tops: Floats) -> Floats:
    """Discounts for counts 0, 1, 2, 3+ from the counts of counts 1..4; 0.5, 1, 1.5 where those are missing."""
    fallback = np.array([0.0, 0.5, 1.0, 1.5])
    if (tops[1:5] == 0).any():
        return fallback
    y = tops[1] / (tops[1] + 2 * tops[2])
    found = np.array([0.0, *(k - (k + 1) * y * tops[k + 1] / tops[k] for k in (1, 2, 3))])
    return np.where((found >= 0) & (found <= np.arange(4)), found, fallback)
