"""kMQ: selecting 10,000 of a million embeddings of dimension 384, and k-means alone, against scikit-learn and FAISS.

Every method of the large setting runs in a process of its own, from the same shards on disk (float16, 768 MB), so that its
peak memory (VmHWM) is its own. Quality is the k-means inertia over all rows, computed the same way for all.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from grainwise.bench import Benchmark, Setting, alternate

ROWS, DIMENSION, CLUSTERS, BUDGET = 1_000_000, 384, 256, 10_000
SHARD = 62_500
ITERATIONS = 25  # of Lloyd's algorithm for all; scikit-learn's own limit of 300 would take most of an hour here
MEMORY_LIMIT = 1.5  # GB, for ours


def mixture(rows: int, dimension: int, seed: int) -> np.ndarray:
    """float32 (rows, dimension): unit vectors around 1,000 directions whose sizes fall as 1/rank."""
    centers = np.random.default_rng(0).standard_normal((1000, dimension)).astype(np.float32)
    rng = np.random.default_rng(seed)
    share = 1 / np.arange(1, 1001)
    vectors = centers[rng.choice(1000, rows, p=share / share.sum())]
    vectors += 1.5 * rng.standard_normal((rows, dimension), dtype=np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def proportional_draw(assignment: np.ndarray) -> np.ndarray:
    """The selection step as one writes it by hand: each cluster's share, drawn uniformly."""
    rng, chosen = np.random.default_rng(0), []
    for cluster in range(CLUSTERS):
        inside = np.flatnonzero(assignment == cluster)
        chosen.append(rng.choice(inside, round(BUDGET * len(inside) / len(assignment)), replace=False))
    return np.concatenate(chosen)


def selected_by(method: str, folder: str) -> np.ndarray:
    """Run one method on the pool in `folder` and return its centers (clusters, dimension)."""
    from grainwise.select.embedded_pool import EmbeddedPool
    from grainwise.select.kmq import KMQ

    pool = EmbeddedPool.open(folder)
    if method.startswith("ours"):
        selector = KMQ(CLUSTERS, engine=method.split()[1]).fit(pool)
        selector.select(BUDGET)
        return selector.clustering_.centers
    vectors = pool.embeddings
    if method == "faiss":
        import faiss

        trainer = faiss.Kmeans(DIMENSION, CLUSTERS, niter=ITERATIONS, seed=1)
        trainer.train(vectors)
        proportional_draw(trainer.index.search(vectors, 1)[1][:, 0])
        return trainer.centroids
    from sklearn.cluster import KMeans, MiniBatchKMeans

    if method == "sklearn":
        model = KMeans(CLUSTERS, n_init=1, max_iter=ITERATIONS, random_state=0).fit(vectors)
    else:
        model = MiniBatchKMeans(CLUSTERS, n_init=1, batch_size=1024, random_state=0).fit(vectors)
    proportional_draw(model.labels_)
    return model.cluster_centers_.astype(np.float32)


def worker(method: str, folder: str, out: str) -> None:
    """In a process of its own: one method; prints seconds and peak memory."""
    started = time.perf_counter()
    centers = selected_by(method, folder)
    seconds = time.perf_counter() - started
    status = Path("/proc/self/status").read_text()
    peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    np.save(out, centers)
    print(json.dumps({"seconds": seconds, "peak_gb": peak * 1024 / 1e9}))


def measured(method: str, folder: Path) -> dict[str, float]:
    """Seconds, peak memory and inertia of one method."""
    from grainwise.select.clustering import assign
    from grainwise.select.embedded_pool import EmbeddedPool

    out = folder.parent / "centers.npy"
    command = [sys.executable, __file__, method, str(folder), str(out)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    inertia = assign(EmbeddedPool.open(folder), np.load(out))[1].sum(dtype=np.float64)
    return json.loads(done.stdout.splitlines()[-1]) | {"inertia": float(inertia)}


def large_pool() -> list[Setting]:
    """A million rows: time and peak memory, one run of each method."""
    from grainwise.select.embedded_pool import EmbeddedPool

    def batches() -> Iterator[np.ndarray]:
        for i in range(ROWS // SHARD):
            yield mixture(SHARD, DIMENSION, seed=i + 1)

    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "pool"
        EmbeddedPool.from_batches(batches(), folder)
        for method in ("ours faiss", "ours minibatch", "faiss", "minibatch", "sklearn"):
            found[method] = measured(method, folder)
    seconds, peak, inertia = ({m: r[what] for m, r in found.items()} for what in ("seconds", "peak_gb", "inertia"))
    names = {"faiss": "faiss.Kmeans in memory", "minibatch": "sklearn MiniBatchKMeans in memory"}
    extra: dict[str, Any] = {"inertia relative to ours": {m: round(v / inertia["ours faiss"], 4) for m, v in inertia.items()}}
    size = f"{ROWS} x {DIMENSION}, K = {CLUSTERS}"
    settings = []
    for what, values in (("seconds", seconds), ("peak GB", peak)):
        settings.append(
            Setting(
                name=f"{size}, {what}",
                ours=values["ours faiss"],
                naive=values["sklearn"],
                peers={label: values[m] for m, label in names.items()} | {"ours without FAISS": values["ours minibatch"]},
                extra=extra,
                limit={"what": "allowed, GB", "figure": MEMORY_LIMIT} if what == "peak GB" else None,
            )
        )
    return settings


def clustering_alone(runs: int) -> tuple[Setting, dict[str, float]]:
    """100,000 rows of dimension 256, K = 512, 25 iterations each, all in memory."""
    import faiss
    from sklearn.cluster import KMeans

    from grainwise.select.clustering import assign, kmeans

    rows, dimension, k, iterations = 100_000, 256, 512, ITERATIONS
    vectors = mixture(rows, dimension, seed=1)
    centers: dict[str, np.ndarray] = {}

    def ours() -> None:
        centers["ours"] = kmeans(vectors, k, iterations=iterations).centers

    def with_faiss() -> None:
        trainer = faiss.Kmeans(dimension, k, niter=iterations, seed=1, max_points_per_centroid=rows)
        trainer.train(vectors)
        trainer.index.search(vectors, 1)
        centers["faiss"] = trainer.centroids

    def with_sklearn() -> None:
        model = KMeans(k, n_init=1, max_iter=iterations, random_state=0).fit(vectors)
        centers["sklearn"] = model.cluster_centers_.astype(np.float32)

    def products() -> None:
        for _ in range(iterations):
            vectors @ vectors[:k].T

    timed = alternate({"ours": ours, "faiss": with_faiss, "sklearn": with_sklearn, "limit": products}, runs=runs, warmup=0)
    inertia = {name: float(assign(vectors, c)[1].sum(dtype=np.float64)) for name, c in centers.items()}
    setting = Setting(
        name=f"k-means alone, {rows} x {dimension}, K = {k}, {iterations} iterations, seconds",
        ours=timed["ours"].median,
        naive=timed["sklearn"].median,
        peers={"faiss.Kmeans": timed["faiss"].median},
        limit={"what": f"{iterations} matrix products rows x centers alone", "figure": timed["limit"].median},
        extra={"inertia relative to ours": {name: round(v / inertia["ours"], 4) for name, v in inertia.items()}},
    )
    return setting, {name: timing.spread for name, timing in timed.items()}


def run(runs: int) -> Benchmark:
    """Both settings; the large one takes minutes and runs once, the small one at most twice."""
    few = min(runs, 2)
    alone, spread = clustering_alone(few)
    return Benchmark(
        system="kmq",
        unit="s (GB where the setting says so)",
        settings=[*large_pool(), alone],
        runs=few,
        spread=spread,
        note=f"the million rows: one run of each method, one initialisation, at most {ITERATIONS} iterations for all; ours and "
        "FAISS fit their centers on 256 rows for each, scikit-learn on all rows",
    )


if __name__ == "__main__":
    worker(*sys.argv[1:])
