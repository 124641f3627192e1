"""SimCore: from a large generic pool, the part that resembles a small fine-grained target set.

Kim, Bae, Yun: "Coreset Sampling from Open-Set for Fine-Grained Self-Supervised Learning", arXiv 2303.11101. The target's
features are replaced by k centroids; in every round each centroid takes the nearest pool row that nobody took before, and
the rounds go on while their mean similarity stays above tau times that of the reference round. So the budget adapts to what
the pool holds. Self-supervised training then starts anew on target and coreset together.

Departures: the pool is read once, in batches, and each centroid keeps only its best rows (it reads again when they run out),
where the released code sorts the whole pool for every centroid. `reference_round=20` is that code's patience. Ties go to
the lowest row number.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted

from grainwise.select.clustering import kmeans
from grainwise.select.embedded_pool import EmbeddedPool, as_pool
from grainwise.select.selection import Selection
from grainwise.tensor_file import read_tensors, write_tensors

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

BATCH_ROWS = 16_384
SHORTEST, LONGEST = 64, 4096  # rows that a centroid keeps, at least and at most


class SimCore(BaseEstimator):
    """Rounds of nearest neighbours of the target's centroids, with an adaptive budget.

    k: centroids; with k at or above the target's rows, each row is one. tau: stop when a round's mean similarity falls below
    tau times that of `reference_round`. cap: at most so many times the target's rows. engine, random_state: see
    `clustering.kmeans`.

    After `fit`: `centroids_` float32 (k, dimension), unit rows; `similarity_`, the mean similarity of each kept round;
    `stopped_`: `threshold`, `cap`, or `pool` when it ran empty; `selection_`.
    """

    def __init__(
        self,
        k: int = 100,
        *,
        tau: float = 0.95,
        reference_round: int = 1,
        cap: float = 50.0,
        engine: str = "auto",
        random_state: int = 0,
    ) -> None:
        self.k = k
        self.tau = tau
        self.reference_round = reference_round
        self.cap = cap
        self.engine = engine
        self.random_state = random_state

    def fit(
        self, pool: EmbeddedPool | ArrayLike, target: EmbeddedPool | ArrayLike, *, exclude: ArrayLike | None = None
    ) -> Self:
        """Find the coreset of the pool (rows, dimension) for the target (rows, dimension), features of one encoder.

        exclude: pool rows that must not be chosen, for example `near_duplicates` of a test set. Rows are scaled to unit
        length here. Raises ValueError for other dimensions, and for NaN or zero rows, saying where.
        """
        if self.k < 1 or self.reference_round < 1 or not self.cap > 0 or self.tau < 0:
            raise ValueError(
                "k and reference_round must be at least 1, cap positive and tau at least 0, got "
                f"k={self.k}, reference_round={self.reference_round}, cap={self.cap}, tau={self.tau}"
            )
        candidates, wanted = _named(pool, "pool"), _named(target, "target")
        if candidates.dimension != wanted.dimension:
            raise ValueError(f"the pool's features have dimension {candidates.dimension}, the target's {wanted.dimension}")
        self.pool_: EmbeddedPool | None = candidates
        self.excluded_ = np.zeros(len(candidates), bool)
        if exclude is not None:
            self.excluded_[np.asarray(exclude, dtype=np.int64)] = True
        if self.excluded_.all():
            raise ValueError("every row of the pool is excluded")
        self.n_features_in_ = candidates.dimension
        self.centroids_ = self._centroids(wanted)
        limit = max(1, int(self.cap * len(wanted)))
        self._keep(self._run(limit, self.tau, np.random.default_rng(self.random_state), "cap"))
        return self

    def select(self, budget: int | None = None, *, seed: int = 0) -> Selection:
        """The coreset where similarity stopped it, or exactly `budget` rows from as many rounds as they take.

        `details` has each row's `round` (from 1) and `similarity` to the centroid that took it; `provenance` the curve
        and what stopped it. Of a last round that does not fit, a random part is taken, drawn by `seed`.
        """
        check_is_fitted(self, "selection_")
        if budget is None:
            return self.selection_
        if self.pool_ is None:
            raise ValueError("another budget needs the pool: give it to SimCore.load")
        free = int((~self.excluded_).sum())
        if not 1 <= budget <= free:
            raise ValueError(f"the budget must lie between 1 and the {free} rows that may be chosen, got {budget}")
        return self._run(budget, 0.0, np.random.default_rng(seed), "budget")

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `coreset.json` (the selection, its curve and settings) and `centroids.safetensors` into the folder."""
        check_is_fitted(self, "selection_")
        home = Path(folder)
        home.mkdir(parents=True, exist_ok=True)
        tensors = {"centroids": torch.from_numpy(self.centroids_)}
        write_tensors(home / "centroids.safetensors", tensors, "SimCore", self.get_params())
        self.selection_.save(home / "coreset.json")

    @classmethod
    def load(cls, folder: str | os.PathLike[str], pool: EmbeddedPool | ArrayLike | None = None) -> SimCore:
        """Read what `save` wrote. pool: needed to select another budget. Raises ValueError for other files."""
        tensors, options = read_tensors(Path(folder) / "centroids.safetensors", "SimCore")
        model = cls(**options)
        model.centroids_ = tensors["centroids"].numpy()
        model._keep(Selection.load(Path(folder) / "coreset.json"))
        model.n_features_in_ = model.centroids_.shape[1]
        model.pool_ = None if pool is None else _named(pool, "pool")
        model.excluded_ = np.zeros(0 if model.pool_ is None else len(model.pool_), bool)
        return model

    def _keep(self, selection: Selection) -> None:
        self.selection_ = selection
        self.similarity_ = np.array(selection.provenance["similarity"])
        self.stopped_ = selection.provenance["stopped"]

    def _centroids(self, target: EmbeddedPool) -> np.ndarray:
        """float32 (k, dimension): unit k-means centers of the unit target rows, or the rows themselves."""
        rows = _unit(target.embeddings)
        if self.k >= len(rows):
            if self.k > len(rows):
                warnings.warn(f"k is {self.k}, but the target has {len(rows)} rows: each of them is a centroid", stacklevel=3)
            return rows
        centers = kmeans(rows, self.k, seed=self.random_state, engine=self.engine).centers
        lost = np.flatnonzero(np.linalg.norm(centers, axis=1) < 1e-6)
        if len(lost):
            raise ValueError(f"centroids {lost[:10].tolist()} are zero, their rows cancel out: raise k")
        return _unit(centers)

    def _run(self, limit: int, tau: float, generator: np.random.Generator, at_limit: str) -> Selection:
        """Rounds until the similarity falls below tau, `limit` rows are taken, or the pool is empty."""
        centroids = len(self.centroids_)
        length = min(LONGEST, max(SHORTEST, 2 * -(-limit // centroids)))
        assert self.pool_ is not None
        queues = NearestQueues(self.pool_, self.centroids_, self.excluded_, length)
        indices: list[np.ndarray] = []
        similarity: list[np.ndarray] = []
        curve: list[float] = []
        count, stopped = 0, "pool"
        while (found := queues.round()) is not None:
            rows, values = found
            mean = float(values.mean(dtype=np.float64))
            if tau > 0 and len(curve) >= self.reference_round and mean < tau * curve[self.reference_round - 1]:
                stopped = "threshold"
                break
            taken, first = _once(rows, values)
            if count + len(taken) > limit:
                some = np.sort(generator.choice(len(taken), limit - count, replace=False))
                taken, first = taken[some], first[some]
            if len(taken):
                indices.append(taken)
                similarity.append(first)
                curve.append(mean)
                count += len(taken)
            queues.take(taken)
            if count >= limit:
                stopped = at_limit
                break
        if tau > 0 and len(curve) < self.reference_round:
            warnings.warn(
                f"selection ended after {len(curve)} rounds ({stopped}), before the reference round {self.reference_round}: "
                "the stopping criterion (patience) never applied",
                stacklevel=4,
            )
        details = {
            "round": np.repeat(np.arange(1, len(indices) + 1), [len(i) for i in indices]),
            "similarity": np.concatenate(similarity),
        }
        about: dict[str, Any] = {"selector": "simcore", "k": centroids, "tau": tau, "reference_round": self.reference_round}
        about |= {"stopped": stopped, "similarity": curve, "passes": queues.passes}
        chosen = np.concatenate(indices)
        return Selection(chosen, np.ones(len(chosen)), details, about)


class NearestQueues:
    """For each centroid its most similar free rows of the pool, best first, at most `length` of them at a time.

    A pass over the pool costs one matrix product and one comparison a batch; only rows above a centroid's present worst
    are looked at again. When a queue has been used up, another pass fills all of them with rows that are still free.
    """

    def __init__(self, pool: EmbeddedPool, centroids: np.ndarray, taken: np.ndarray, length: int) -> None:
        self.pool, self.centroids, self.taken, self.length = pool, centroids, taken.copy(), length
        self.passes = 0
        self._fill()

    def round(self) -> tuple[np.ndarray, np.ndarray] | None:
        """(row, similarity) of the nearest free row of every centroid, int64 and float32 (k,); None when none is free."""
        every = np.arange(len(self.centroids))
        while True:
            here = self.rows[every, self.at]
            blocked = (here >= 0) & self.taken[here]
            if not blocked.any():
                break
            self.at[blocked] += 1
        if (here < 0).any():
            if self.taken.all():
                return None
            self._fill()
            return self.round()
        return here, self.values[every, self.at]

    def take(self, rows: np.ndarray) -> None:
        """These rows are no longer free."""
        self.taken[rows] = True

    def _fill(self) -> None:
        """One pass: the best `length` free rows of every centroid; `rows` ends with -1, the end of the queue."""
        k, room = len(self.centroids), 4 * self.length
        rows = np.full((k, room), -1, np.int64)
        values = np.full((k, room), -np.inf, np.float32)
        used = np.zeros(k, np.int64)
        worst = np.full(k, -np.inf, np.float32)
        for start, scores in self._similarities():
            scores[:, self.taken[start : start + scores.shape[1]]] = -np.inf
            owner, at = np.nonzero(scores > worst[:, None])
            bounds = np.searchsorted(owner, np.arange(k + 1))
            for c in np.flatnonzero(np.diff(bounds)).tolist():
                new = at[bounds[c] : bounds[c + 1]]
                if used[c] + len(new) > room:
                    self._merge(rows, values, used, worst, c, start + new, scores[c, new])
                else:
                    place = slice(used[c], used[c] + len(new))
                    rows[c, place], values[c, place] = start + new, scores[c, new]
                    used[c] += len(new)
        for c in range(k):
            self._merge(rows, values, used, worst, c, np.empty(0, np.int64), np.empty(0, np.float32))
        self.rows = np.concatenate([rows[:, : self.length], np.full((k, 1), -1)], 1)
        self.values = values[:, : self.length]
        self.at = np.zeros(k, np.int64)
        self.passes += 1

    def _merge(
        self,
        rows: np.ndarray,
        values: np.ndarray,
        used: np.ndarray,
        worst: np.ndarray,
        c: int,
        new_rows: np.ndarray,
        new_values: np.ndarray,
    ) -> None:
        """Keep the best `length` of what centroid c holds and the new rows, by similarity, then by row number."""
        number = np.concatenate([rows[c, : used[c]], new_rows])
        value = np.concatenate([values[c, : used[c]], new_values])
        if len(value) > self.length:
            close = value >= np.partition(value, -self.length)[-self.length]
            number, value = number[close], value[close]
        best = np.lexsort((number, -value))[: self.length]
        rows[c], values[c] = -1, -np.inf
        rows[c, : len(best)], values[c, : len(best)] = number[best], value[best]
        used[c] = len(best)
        worst[c] = value[best[-1]] if len(best) == self.length else -np.inf

    def _similarities(self) -> Iterator[tuple[int, np.ndarray]]:
        """(first row, float32 (k, rows)) of cosine similarities, batch by batch."""
        for start, vectors in self.pool.batches(BATCH_ROWS):
            scores = self.centroids @ vectors.T
            scores /= np.linalg.norm(vectors, axis=1)
            yield start, scores


def near_duplicates(
    pool: EmbeddedPool | ArrayLike, others: EmbeddedPool | ArrayLike, *, threshold: float = 0.999
) -> np.ndarray:
    """int64: rows of the pool whose cosine similarity to some row of `others` (a test set) exceeds the threshold."""
    pool, rows = _named(pool, "pool"), _unit(_named(others, "others").embeddings)
    found = []
    for start, vectors in pool.batches(BATCH_ROWS):
        found.append(start + np.flatnonzero((_unit(vectors) @ rows.T).max(1) > threshold))
    return np.concatenate(found)


def _once(rows: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct rows in the order of the centroids, each with its highest similarity."""
    distinct, first, number = np.unique(rows, return_index=True, return_inverse=True)
    best = np.full(len(distinct), -np.inf, np.float32)
    np.maximum.at(best, number, values)
    order = np.argsort(first)
    return distinct[order], best[order]


def _unit(rows: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), dtype=np.float32)


def _named(features: EmbeddedPool | ArrayLike, what: str) -> EmbeddedPool:
    """The features as a pool; errors say which of the two data sets they are about."""
    try:
        return as_pool(features)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error
