"""kMQ: choose instruction data by k-means and quality.

Yu, Chen, Ahmadian, Fadaee: "Diversify and Conquer: Diversity-Centric Data Selection with Iterative Refinement",
arXiv 2409.11378. The pool is divided into K clusters by its embeddings, each cluster gets a share of the budget equal to
its share of the pool, and inside a cluster rows are drawn with probability proportional to their quality. Without quality
values it is the paper's kM-Random; `within="closest"` is kM-Closest; `KCenter` is the k-center baseline. The form that
re-weights clusters while the model learns is in `iterative_kmq.py`.

Departures: shares are rounded by largest remainder and full clusters pass their rest on, so that exactly the budget comes
out (the released code rounds down and loses the rest); rows are drawn without replacement, since a row drawn twice is one
row of data (the text says multinomial with replacement). The released code's softmax of the quality is `draw="softmax"`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Self

import numpy as np
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted

from grainwise.data import row_text
from grainwise.data.sources import passages
from grainwise.naming import did_you_mean
from grainwise.select.clustering import choose_k, kmeans
from grainwise.select.embedded_pool import EmbeddedPool, as_pool
from grainwise.select.quality import LengthScorer, LikelihoodScorer
from grainwise.select.selection import (
    DataSelector,
    Selection,
    apportion,
    budget_of,
    checked_budget,
    drawing_keys,
    take_lowest,
)
from grainwise.select.text_encoder import TransformerEncoder

if TYPE_CHECKING:
    from datasets import Dataset
    from numpy.typing import ArrayLike

    from grainwise.recipe_state import RecipeState

WITHIN = ("draw", "closest")
DRAWS = ("proportional", "softmax")
K_GRID = (8, 16, 32, 64, 128, 256)


class KMQ(BaseEstimator):
    """k-means-quality selection, and its variants kM-Random and kM-Closest.

    k: clusters; None takes the value of `grid` with the highest silhouette. within: `draw` rows at random by quality
    (uniformly when `fit` gets none), or take those `closest` to the center. draw: probabilities `proportional` to the
    quality, or its `softmax` at `temperature`. engine, random_state: see `clustering.kmeans`.

    After `fit`: `clustering_`, `quality_` (float64 (rows,) or None), `n_features_in_`.
    """

    def __init__(
        self,
        k: int | None = None,
        *,
        within: str = "draw",
        draw: str = "proportional",
        temperature: float = 1.0,
        grid: Sequence[int] = K_GRID,
        engine: str = "auto",
        random_state: int = 0,
    ) -> None:
        self.k = k
        self.within = within
        self.draw = draw
        self.temperature = temperature
        self.grid = grid
        self.engine = engine
        self.random_state = random_state

    def fit(self, pool: EmbeddedPool | ArrayLike, quality: ArrayLike | None = None) -> Self:
        """Cluster the pool (rows, dimension). quality: a value per row, higher is better.

        Raises ValueError for unknown options and for quality values that are missing, or negative where probabilities
        are proportional to them, naming the rows.
        """
        for value, known in ((self.within, WITHIN), (self.draw, DRAWS)):
            if value not in known:
                raise ValueError(f"unknown option {value!r}. {did_you_mean(value, known)}")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}")
        if quality is not None and self.within == "closest":
            raise ValueError('within="closest" looks at distances only: leave the quality out, or use within="draw"')
        pool = as_pool(pool)
        values = None if quality is None else checked_quality(quality, len(pool), self.draw)
        k = self.k
        if k is None:
            k = choose_k(pool, _grid_for(len(pool), self.grid), seed=self.random_state, engine=self.engine)
        self.clustering_ = kmeans(pool, k, seed=self.random_state, engine=self.engine)
        self.quality_ = values
        self.n_features_in_ = pool.dimension
        return self

    def select(self, budget: int, *, seed: int = 0) -> Selection:
        """Exactly `budget` distinct rows, by cluster; `details` has `cluster`, `weights` the cluster's share.

        Raises ValueError when the budget exceeds the pool or is below the number of clusters.
        """
        check_is_fitted(self)
        budget = checked_budget(budget, len(self.clustering_.assignment), self.clustering_.k)
        shares = self.clustering_.sizes / len(self.clustering_.assignment)
        chosen = self.draw_rows(shares, budget, np.random.default_rng(seed))
        cluster = self.clustering_.assignment[chosen]
        provenance = {"selector": "kmq", "seed": seed, "k": self.clustering_.k, "quality": self.quality_ is not None}
        provenance |= {"within": self.within, "draw": self.draw, "engine": self.clustering_.engine}
        return Selection(chosen, shares[cluster], {"cluster": cluster}, provenance)

    def draw_rows(
        self, shares: np.ndarray, budget: int, generator: np.random.Generator, taken: Sequence[int] | np.ndarray = ()
    ) -> np.ndarray:
        """`budget` rows that are not yet `taken`, cluster counts by `shares` (k,): int64 (budget,), by cluster."""
        clustering = self.clustering_
        free = np.ones(len(clustering.assignment), bool)
        free[np.asarray(taken, dtype=np.int64)] = False
        left = np.flatnonzero(free)
        counts = apportion(shares, np.bincount(clustering.assignment[left], minlength=clustering.k), budget)
        if self.within == "closest":
            keys = clustering.distances[left].astype(np.float64)
        else:
            keys = drawing_keys(self._propensity()[left], generator)
        return left[take_lowest(keys, clustering.assignment[left], counts, generator)]

    def _propensity(self) -> np.ndarray:
        """float64 (rows,): what the probabilities inside a cluster are proportional to."""
        clusters = self.clustering_.assignment
        if self.quality_ is None:
            return np.ones(len(clusters))
        if self.draw == "proportional":
            return self.quality_
        best = np.full(self.clustering_.k, -np.inf)
        np.maximum.at(best, clusters, self.quality_)
        return np.exp((self.quality_ - best[clusters]) / self.temperature)


class KCenter(BaseEstimator):
    """The k-center baseline: rows that make the largest distance to the nearest chosen row small.

    Greedy farthest-first traversal from a random row, within twice the optimum (Gonzalez, 1985). The paper includes it
    as a warning: it prefers outliers. Time O(rows · budget · dimension), with the pool in memory.
    """

    def fit(self, pool: EmbeddedPool | ArrayLike, quality: ArrayLike | None = None) -> Self:
        """Keep the pool (rows, dimension). Quality is not used and must be left out."""
        if quality is not None:
            raise ValueError("k-center looks at distances only: leave the quality out")
        self.embeddings_ = as_pool(pool).embeddings
        self.n_features_in_ = self.embeddings_.shape[1]
        return self

    def select(self, budget: int, *, seed: int = 0) -> Selection:
        """Exactly `budget` distinct rows in the order of the traversal; `details` has the `radius` each was added at."""
        check_is_fitted(self)
        vectors = self.embeddings_
        budget = checked_budget(budget, len(vectors))
        chosen = np.empty(budget, np.int64)
        radius = np.full(budget, np.inf)
        nearest = np.full(len(vectors), np.inf)
        chosen[0] = np.random.default_rng(seed).integers(len(vectors))
        for i in range(budget):
            if i:
                chosen[i] = nearest.argmax()
                radius[i] = nearest[chosen[i]] ** 0.5
            nearest = np.minimum(nearest, ((vectors - vectors[chosen[i]]) ** 2).sum(1))
            nearest[chosen[: i + 1]] = -1.0  # never again, also among equal rows
        radius[0] = radius[1] if budget > 1 else 0.0  # the first row stands for the whole pool
        return Selection(chosen, np.ones(budget), {"radius": radius}, {"selector": "k_center", "seed": seed})


def checked_quality(quality: ArrayLike, rows: int, draw: str) -> np.ndarray:
    """float64 (rows,). Raises ValueError for a wrong count, missing values, or negative ones with proportional drawing."""
    values = np.asarray(quality, dtype=np.float64)
    if values.shape != (rows,):
        raise ValueError(f"quality must hold one value for each of the {rows} rows, got shape {values.shape}")
    missing = np.flatnonzero(~np.isfinite(values))
    if len(missing):
        raise ValueError(f"the quality of rows {missing[:10].tolist()} is missing or infinite: score them or drop them")
    negative = np.flatnonzero(values < 0)
    if draw == "proportional" and len(negative):
        raise ValueError(
            f"the quality of rows {negative[:10].tolist()} is negative, so it cannot be a probability: "
            'use draw="softmax", or a scorer with values from 0 up'
        )
    return values


def _grid_for(rows: int, grid: Sequence[int]) -> list[int]:
    fitting = [k for k in grid if 2 <= k < rows // 2]
    if not fitting:
        raise ValueError(f"no k of the grid {list(grid)} suits a pool of {rows} rows: give k, or a grid of smaller values")
    return fitting


PASSAGE_CHARACTERS = 1000  # of long rows in a recipe: selection works on passages, not on whole documents
RECIPE_TOKENS = 64  # of each passage that are embedded and scored: enough to tell what it is about
METHODS = ("kmq", "km_random", "km_closest", "k_center")
QUALITIES = ("none", "likelihood", "length")


def recipe_step(
    state: RecipeState,
    *,
    fraction: float = 0.3,
    budget: int = 0,
    k: int = 0,
    quality: str = "none",
    method: str = "kmq",
) -> dict[str, float | int | str]:
    """Replace `state.train` by a selection from it; long texts are cut into passages first.

    fraction of the rows, or `budget` rows when that is above 0; k clusters, 0 for the best silhouette. Rows are embedded
    by the mean hidden state of `state.model`.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}. {did_you_mean(method, METHODS)}")
    if quality not in QUALITIES:
        raise ValueError(f"unknown quality {quality!r}. {did_you_mean(quality, QUALITIES)}")
    if quality != "none" and method != "kmq":
        raise ValueError(f"method {method!r} uses no quality: set quality to none, or method to kmq")
    rows = as_passages(state.train)
    count = budget_of(len(rows), budget or None, None if budget else fraction)
    encoder = TransformerEncoder(state.model, state.tokenizer, length=RECIPE_TOKENS, windows=1)
    pool = EmbeddedPool.from_dataset(rows, encoder=encoder, progress=state.progress)
    values = None
    if quality == "likelihood":
        values = LikelihoodScorer(state.model, state.tokenizer, prompt_length=RECIPE_TOKENS, response_length=RECIPE_TOKENS)(
            rows
        )
    elif quality == "length":
        values = LengthScorer()(rows)
    selector: DataSelector = KCenter()
    if method != "k_center":
        grid = [g for g in K_GRID if g <= count]
        within = "closest" if method == "km_closest" else "draw"
        selector = KMQ(k or None, within=within, grid=grid, random_state=state.seed)
    chosen = selector.fit(pool, values).select(count, seed=state.seed)
    state.train = chosen.apply(rows)
    chosen.save(state.folder / "selection.json")
    figures: dict[str, float | int | str] = {"rows_before": len(rows), "rows_after": count}
    if isinstance(selector, KMQ):
        selector.clustering_.save(state.folder / "clusters.safetensors")
        figures["clusters"] = selector.clustering_.k
    return figures


def as_passages(rows: Dataset, size: int = PASSAGE_CHARACTERS) -> Dataset:
    """Rows of text cut into passages of about `size` characters; prompt/response rows as they are; empty rows dropped."""
    from datasets import Dataset

    if "text" not in rows.column_names:
        return rows.filter(lambda row: bool(row_text(row).strip()))
    return Dataset.from_dict({"text": [p for text in rows["text"] for p in passages(text, size)]})
