"""SimCore: 30,000 of a million rows for 100 centroids, against one full sort for each centroid and against FAISS.

Every method runs in a process of its own from the same shards on disk (float16), so that its peak memory (VmHWM) is its own.
All must choose the same rows.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from grainwise.bench import Benchmark, Setting

ROWS, DIMENSION, TARGET, CENTROIDS, BUDGET = 1_000_000, 128, 600, 100, 30_000
SHARD = 62_500
METHODS = ("ours", "sorts", "faiss")


def mixture(rows: int, seed: int, groups: int = 500) -> np.ndarray:
    """float32 (rows, dimension): unit vectors around directions that are the same for every seed."""
    centers = np.random.default_rng(0).standard_normal((500, DIMENSION)).astype(np.float32)
    rng = np.random.default_rng(seed)
    vectors = centers[rng.integers(groups, size=rows)] + 1.5 * rng.standard_normal((rows, DIMENSION), dtype=np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def selected_by(method: str, folder: Path) -> tuple[np.ndarray, float]:
    """(chosen rows, seconds) of one method; centroids and, for peers, loading the pool count for all."""
    from grainwise.select.embedded_pool import EmbeddedPool
    from grainwise.select.simcore import SimCore

    target = np.load(folder.parent / "target.npy")
    pool = EmbeddedPool.open(folder)
    model = SimCore(k=CENTROIDS, tau=0.0, cap=BUDGET / TARGET)
    started = time.perf_counter()
    if method == "ours":
        return model.fit(pool, target).select().indices, time.perf_counter() - started
    centroids = model._centroids(EmbeddedPool.from_array(target))
    vectors = pool.embeddings
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    if method == "sorts":
        chosen = rounds([deque(np.argsort(-(vectors @ c), kind="stable")) for c in centroids])
    else:
        import faiss

        index = faiss.IndexFlatIP(DIMENSION)
        index.add(vectors)
        depth, chosen = 2 * BUDGET // CENTROIDS, None
        while chosen is None:  # other centroids took too many of the rows found: search deeper
            chosen = rounds([deque(found) for found in index.search(centroids, depth)[1]])
            depth *= 2
    assert chosen is not None
    return chosen, time.perf_counter() - started


def rounds(queues: list[deque[int]]) -> np.ndarray | None:
    """The rounds as one writes them by hand: every centroid's next row that no earlier round took; None if a queue runs out."""
    taken = np.zeros(ROWS, bool)
    chosen: list[int] = []
    while True:
        this: dict[int, None] = {}
        for queue in queues:
            while queue and taken[queue[0]]:
                queue.popleft()
            if not queue:
                return None
            this[int(queue[0])] = None
        new = list(this)
        if len(chosen) + len(new) > BUDGET:
            picked = np.sort(np.random.default_rng(0).choice(len(new), BUDGET - len(chosen), replace=False))
            return np.array(chosen + [new[i] for i in picked])
        chosen += new
        taken[new] = True
        if len(chosen) == BUDGET:
            return np.array(chosen)


def worker(method: str, folder: str, out: str) -> None:
    """In a process of its own: one method; prints seconds and peak memory."""
    chosen, seconds = selected_by(method, Path(folder))
    status = Path("/proc/self/status").read_text()
    peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    np.save(out, chosen)
    print(json.dumps({"seconds": seconds, "peak_gb": peak * 1024 / 1e9}))


def reading(folder: Path) -> float:
    """Seconds to read every shard once and multiply it with the centroids: the bound."""
    from grainwise.select.embedded_pool import EmbeddedPool

    centroids = mixture(CENTROIDS, 3)
    started = time.perf_counter()
    for _, vectors in EmbeddedPool.open(folder).batches():
        vectors @ centroids.T
    return time.perf_counter() - started


def run(runs: int) -> Benchmark:
    """Time and peak memory; at most three rounds of the methods in turn."""
    from grainwise.select.embedded_pool import EmbeddedPool

    few = min(runs, 3)

    def batches() -> Iterator[np.ndarray]:
        for i in range(ROWS // SHARD):
            yield mixture(SHARD, i + 1)

    found: dict[str, list[dict[str, float]]] = {m: [] for m in METHODS}
    chosen: dict[str, np.ndarray] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "pool"
        EmbeddedPool.from_batches(batches(), folder)
        np.save(folder.parent / "target.npy", mixture(TARGET, 1_000, groups=40))
        limit = statistics.median(reading(folder) for _ in range(few))
        for _ in range(few):
            for method in METHODS:
                out = folder.parent / "chosen.npy"
                command = [sys.executable, __file__, method, str(folder), str(out)]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                found[method].append(json.loads(done.stdout.splitlines()[-1]))
                chosen[method] = np.load(out)
    same = {m: float(np.isin(chosen[m], chosen["ours"]).mean()) for m in METHODS[1:]}
    size = f"{BUDGET} of {ROWS} x {DIMENSION}, {CENTROIDS} centroids"
    settings = []
    for what, name in (("seconds", "seconds"), ("peak_gb", "peak GB")):
        middle = {m: statistics.median(r[what] for r in rows) for m, rows in found.items()}
        settings.append(
            Setting(
                name=f"{size}, {name}",
                ours=middle["ours"],
                naive=middle["sorts"],
                peers={"faiss IndexFlatIP": middle["faiss"]},
                limit={"what": "reading the shards and one product, s", "figure": limit} if what == "seconds" else None,
                extra={"share of rows in common with ours": same},
            )
        )
    spread = {}
    for method, rows in found.items():
        seconds = [r["seconds"] for r in rows]
        spread[method] = (max(seconds) - min(seconds)) / statistics.median(seconds)
    return Benchmark(system="simcore", unit="s (GB where the setting says so)", settings=settings, runs=few, spread=spread)


if __name__ == "__main__":
    worker(*sys.argv[1:])
