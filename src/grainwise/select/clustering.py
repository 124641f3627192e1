"""k-means over an embedded pool, streamed, and the choice of the number of clusters.

Centers are fitted by FAISS or scikit-learn on a random part of the pool (at most `POINTS_PER_CENTER` rows for each
center); then the whole pool is assigned to them in batches, one matrix product each, so memory does not grow with the
pool. Clusters that stay empty are re-seeded at the rows farthest from their centers.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from grainwise.naming import did_you_mean
from grainwise.select.embedded_pool import EmbeddedPool, as_pool

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

ENGINES = ("auto", "faiss", "lloyd", "minibatch")
CRITERIA = ("silhouette", "elbow")
POINTS_PER_CENTER = 256  # more rows hardly move a center; FAISS trains on as many
SMALL_POOL = 20_000  # up to here `auto` is scikit-learn's Lloyd: quick enough, and the same with or without FAISS
RESEEDING_ROUNDS = 20


@dataclass(frozen=True)
class Clustering:
    """A pool divided by k-means.

    centers: float32 (k, dimension). assignment: int64 (rows,), the nearest center of each row. distances: float32
    (rows,), squared distance to it. reseeded: how many centers were re-seeded because they stayed empty.
    """

    centers: np.ndarray
    assignment: np.ndarray
    distances: np.ndarray
    engine: str
    reseeded: int = 0

    @property
    def k(self) -> int:
        """The number of clusters."""
        return len(self.centers)

    @property
    def sizes(self) -> np.ndarray:
        """Rows in each cluster, int64 (k,)."""
        return np.bincount(self.assignment, minlength=self.k)

    @property
    def inertia(self) -> float:
        """Sum over the pool of the squared distances to the nearest center."""
        return float(self.distances.sum(dtype=np.float64))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write centers, assignment and distances as safetensors."""
        from safetensors.numpy import save_file

        temporary = Path(f"{os.fspath(path)}.partial")
        arrays = {"centers": self.centers, "assignment": self.assignment, "distances": self.distances}
        save_file(arrays, temporary, metadata={"engine": self.engine, "reseeded": str(self.reseeded)})
        temporary.replace(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Clustering:
        """Read what `save` wrote. Raises ValueError for another kind of file."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="numpy") as file:
                arrays = {name: file.get_tensor(name) for name in ("centers", "assignment", "distances")}
                about = file.metadata()
            return cls(**arrays, engine=about["engine"], reseeded=int(about["reseeded"]))
        except (SafetensorError, KeyError, TypeError) as error:
            raise ValueError(f"{path} holds no saved clustering: {error}") from error


def kmeans(
    pool: EmbeddedPool | ArrayLike,
    k: int,
    *,
    seed: int = 0,
    engine: str = "auto",
    iterations: int = 25,
    restarts: int = 1,
) -> Clustering:
    """Divide the pool into `k` clusters that minimise the summed squared distance to the centers.

    engine: `faiss`, `lloyd` (`sklearn.cluster.KMeans`), `minibatch` (`sklearn.cluster.MiniBatchKMeans`), or `auto`: Lloyd
    for small pools, else FAISS if installed, else mini-batches. iterations: at most so many; restarts: the best of so
    many is kept. Raises ValueError for k outside 1..rows or when there are fewer than k distinct rows.
    """
    pool = as_pool(pool)
    if engine not in ENGINES:
        raise ValueError(f"unknown engine {engine!r}. {did_you_mean(engine, ENGINES)}")
    if not 1 <= k <= len(pool):
        raise ValueError(f"k must lie between 1 and the pool's {len(pool)} rows, got {k}")
    engine = _engine_for(len(pool)) if engine == "auto" else engine
    generator = np.random.default_rng(seed)
    sample = min(len(pool), max(POINTS_PER_CENTER * k, SMALL_POOL))
    rows = np.arange(len(pool)) if sample == len(pool) else np.sort(generator.choice(len(pool), sample, replace=False))
    centers = _fit_centers(pool.rows(rows), k, seed, engine, iterations, restarts)
    centers, assignment, distances, reseeded = _without_empty_clusters(pool, centers)
    return Clustering(centers, assignment, distances, engine, reseeded)


def _engine_for(rows: int) -> str:
    if rows <= SMALL_POOL:
        return "lloyd"
    return "faiss" if importlib.util.find_spec("faiss") is not None else "minibatch"


def _fit_centers(vectors: np.ndarray, k: int, seed: int, engine: str, iterations: int, restarts: int) -> np.ndarray:
    """float32 (k, dimension)."""
    if engine == "faiss":
        from grainwise.extras import require

        trainer = require("faiss", extra="index").Kmeans(
            vectors.shape[1],
            k,
            niter=iterations,
            nredo=restarts,
            seed=seed + 1,  # FAISS reads 0 as "draw one"
            min_points_per_centroid=1,
            max_points_per_centroid=-(-len(vectors) // k),
        )
        trainer.train(vectors)
        return np.ascontiguousarray(trainer.centroids, dtype=np.float32)
    from sklearn.cluster import KMeans, MiniBatchKMeans
    from sklearn.exceptions import ConvergenceWarning

    kind = KMeans if engine == "lloyd" else MiniBatchKMeans
    options = {} if engine == "lloyd" else {"batch_size": max(1024, 4 * k)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # repeated rows: empty clusters are dealt with below
        model = kind(n_clusters=k, n_init=restarts, max_iter=iterations, random_state=seed, **options).fit(vectors)
    return model.cluster_centers_.astype(np.float32)


def assign(pool: EmbeddedPool | ArrayLike, centers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The nearest center of each row, int64 (rows,), and the squared distance to it, float32 (rows,)."""
    pool = as_pool(pool)
    assignment = np.empty(len(pool), np.int64)
    distances = np.empty(len(pool), np.float32)
    lengths = (centers**2).sum(1)
    batch = max(256, min(16_384, 2**24 // len(centers)))  # at most 64 MB of distances at a time
    for start, vectors in pool.batches(batch):
        place = slice(start, start + len(vectors))
        scores = vectors @ centers.T
        scores *= -2
        scores += lengths
        assignment[place] = nearest = scores.argmin(1)
        distances[place] = ((vectors - centers[nearest]) ** 2).sum(1)
    return assignment, distances


def _without_empty_clusters(pool: EmbeddedPool, centers: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """(centers, assignment, distances, how many were re-seeded): empty clusters move to the farthest rows."""
    reseeded = 0
    for _ in range(RESEEDING_ROUNDS):
        assignment, distances = assign(pool, centers)
        empty = np.flatnonzero(np.bincount(assignment, minlength=len(centers)) == 0)
        if not len(empty):
            if reseeded:
                warnings.warn(f"{reseeded} empty clusters were re-seeded at the rows farthest from their centers", stacklevel=4)
            return centers, assignment, distances, reseeded
        farthest = np.argsort(-distances, kind="stable")[: len(empty)]
        farthest = farthest[distances[farthest] > 0]
        if not len(farthest):
            break
        centers = centers.copy()
        centers[empty[: len(farthest)]] = pool.rows(farthest)
        reseeded += len(farthest)
    raise ValueError(
        f"{len(empty)} of {len(centers)} clusters stay empty: the pool has too few distinct rows; lower k or drop duplicates"
    )


@dataclass(frozen=True)
class KScore:
    """How well a number of clusters fits: mean silhouette (-1 to 1, higher is better) and inertia (lower is tighter)."""

    k: int
    silhouette: float
    inertia: float


def k_curve(
    pool: EmbeddedPool | ArrayLike, grid: Sequence[int], *, sample: int = 5000, seed: int = 0, engine: str = "auto"
) -> list[KScore]:
    """Cluster the pool for every k of `grid`; silhouettes are taken over `sample` random rows."""
    from sklearn.metrics import silhouette_score

    pool = as_pool(pool)
    count = min(sample, len(pool))
    if not grid or min(grid) < 2 or max(grid) >= count:
        raise ValueError(f"the grid must hold k between 2 and {count - 1} (the sampled rows less one), got {list(grid)}")
    generator = np.random.default_rng(seed)
    rows = np.arange(len(pool)) if count == len(pool) else np.sort(generator.choice(len(pool), count, replace=False))
    vectors = pool.rows(rows)
    curve = []
    for k in sorted(grid):
        found = kmeans(pool, k, seed=seed, engine=engine)
        labels = found.assignment[rows]
        present = len(np.unique(labels))  # few rows of one cluster may be in the sample
        score = float(silhouette_score(vectors, labels)) if 2 <= present < count else -1.0
        curve.append(KScore(k, score, found.inertia))
    return curve


def choose_k(
    pool: EmbeddedPool | ArrayLike,
    grid: Sequence[int],
    *,
    criterion: str = "silhouette",
    sample: int = 5000,
    seed: int = 0,
    engine: str = "auto",
) -> int:
    """The k of `grid` with the highest silhouette, or at the `elbow` of the inertia; the smallest of equals."""
    if criterion not in CRITERIA:
        raise ValueError(f"unknown criterion {criterion!r}. {did_you_mean(criterion, CRITERIA)}")
    curve = k_curve(pool, grid, sample=sample, seed=seed, engine=engine)
    return elbow(curve) if criterion == "elbow" else max(curve, key=lambda s: (s.silhouette, -s.k)).k


def elbow(curve: Sequence[KScore]) -> int:
    """The k whose inertia lies farthest below the straight line between the curve's ends."""
    k = np.array([s.k for s in curve], dtype=np.float64)
    inertia = np.array([s.inertia for s in curve])
    if len(k) < 3:
        raise ValueError(f"an elbow needs at least three values of k, got {len(k)}")
    line = inertia[0] + (k - k[0]) / (k[-1] - k[0]) * (inertia[-1] - inertia[0])
    return int(k[np.argmax(line - inertia)])
