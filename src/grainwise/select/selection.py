"""`Selection`, the `DataSelector` protocol, and what selectors share: dividing a budget and drawing without replacement."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self, runtime_checkable

import numpy as np

from grainwise.select.embedded_pool import EmbeddedPool
from grainwise.training import Progress

if TYPE_CHECKING:
    from datasets import Dataset
    from numpy.typing import ArrayLike

    from grainwise.select.quality import QualityScorer
    from grainwise.select.text_encoder import Encoder


@dataclass(frozen=True)
class Selection:
    """Chosen rows of a pool.

    indices: int64 (budget,), distinct, in the order of choice. weights: float64 (budget,), not negative; what they mean
    is the selector's (kMQ: the share of the budget that the row's cluster was given). details: more per-row values by
    name, for example `cluster` and `round`. provenance: how the rows were chosen, as JSON values.
    """

    indices: np.ndarray
    weights: np.ndarray
    details: dict[str, np.ndarray] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, values in {"weights": self.weights, **self.details}.items():
            if len(values) != len(self.indices):
                raise ValueError(f"{name} has {len(values)} entries for {len(self.indices)} indices")
        if len(np.unique(self.indices)) != len(self.indices):
            raise ValueError("a selection must not name a row twice")
        if len(self.weights) and not (np.isfinite(self.weights).all() and (self.weights >= 0).all()):
            raise ValueError("weights must be finite and not negative")

    def __len__(self) -> int:
        return len(self.indices)

    def apply(self, dataset: Dataset) -> Dataset:
        """The chosen rows of the data set that the pool was made from."""
        if len(self) and self.indices.max() >= len(dataset):
            raise ValueError(
                f"row {self.indices.max()} was chosen, but the data set has {len(dataset)} rows: is it the pool's?"
            )
        return dataset.select(self.indices.tolist())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the selection as JSON, whole or not at all."""
        record = {
            "indices": self.indices.tolist(),
            "weights": self.weights.tolist(),
            "details": {name: values.tolist() for name, values in self.details.items()},
            "provenance": self.provenance,
        }
        temporary = Path(f"{os.fspath(path)}.partial")
        temporary.write_text(json.dumps(record) + "\n")
        temporary.replace(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Selection:
        """Read what `save` wrote. Raises ValueError for a file that is no selection."""
        try:
            record = json.loads(Path(path).read_text())
            return cls(
                np.array(record["indices"], dtype=np.int64),
                np.array(record["weights"], dtype=np.float64),
                {name: np.array(values) for name, values in record["details"].items()},
                record["provenance"],
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path} is no saved selection: {error!r}") from error


@runtime_checkable
class DataSelector(Protocol):
    """A scikit-learn estimator that picks rows: parameters in the constructor, data in `fit`, `select` as often as wanted."""

    def fit(self, pool: EmbeddedPool | ArrayLike, quality: ArrayLike | None = None) -> Self:
        """Learn from the pool (rows, dimension) and, where the selector uses it, a quality value per row."""

    def select(self, budget: int, *, seed: int = 0) -> Selection:
        """Exactly `budget` distinct rows; the same for the same seed."""


def select_rows(
    dataset: Dataset,
    selector: DataSelector,
    *,
    encoder: Encoder,
    budget: int | None = None,
    fraction: float | None = None,
    quality: QualityScorer | ArrayLike | None = None,
    text: Sequence[str] | None = None,
    folder: str | os.PathLike[str] | None = None,
    seed: int = 0,
    progress: Progress | bool = True,
) -> tuple[Dataset, Selection]:
    """Embed a data set, fit the selector, select: the chosen rows and the selection.

    Give either `budget` (rows) or `fraction` (0 to 1). quality: a scorer of rows, or a value per row. text, folder,
    progress: see `EmbeddedPool.from_dataset`.
    """
    count = budget_of(len(dataset), budget, fraction)
    pool = EmbeddedPool.from_dataset(dataset, encoder=encoder, text=text, folder=folder, progress=progress)
    values = quality(dataset) if callable(quality) else quality
    chosen = selector.fit(pool, values).select(count, seed=seed)
    return chosen.apply(dataset), chosen


def budget_of(rows: int, budget: int | None, fraction: float | None) -> int:
    """How many rows to choose, from a count or a fraction (rounded, at least 1)."""
    if (budget is None) == (fraction is None):
        raise ValueError(f"give either a budget or a fraction, got budget={budget}, fraction={fraction}")
    if budget is not None:
        return budget
    assert fraction is not None
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must lie in (0, 1], got {fraction}")
    return max(1, round(fraction * rows))


def checked_budget(budget: int, rows: int, groups: int = 1) -> int:
    """`budget` as int. Raises ValueError unless groups <= budget <= rows."""
    if budget != int(budget) or budget < 1:
        raise ValueError(f"the budget must be a whole number of rows, at least 1, got {budget}")
    if budget > rows:
        raise ValueError(f"the budget is {budget} rows, but the pool has only {rows}: lower the budget or give a larger pool")
    if budget < groups:
        raise ValueError(
            f"the budget is {budget} rows for {groups} clusters, so some could give none: raise the budget or lower k"
        )
    return int(budget)


def apportion(weights: ArrayLike, capacities: ArrayLike, budget: int) -> np.ndarray:
    """Divide `budget` over groups in proportion to their weights, by largest remainder: int64 (groups,).

    weights: not negative. capacities: rows each group has; a group that is full passes its rest on to the others. Groups
    of weight zero get rows only when all others are full. Raises ValueError when the capacities are too small together.
    """
    share = np.asarray(weights, dtype=np.float64)
    room = np.asarray(capacities, dtype=np.int64).copy()
    if share.shape != room.shape or share.ndim != 1:
        raise ValueError(f"weights and capacities must be two lists of one length, got {share.shape} and {room.shape}")
    if not np.isfinite(share).all() or (share < 0).any() or (room < 0).any():
        raise ValueError("weights and capacities must be finite and not negative")
    if budget < 0 or budget > room.sum():
        raise ValueError(f"cannot divide a budget of {budget} over groups that hold {room.sum()} rows together")
    counts = np.zeros_like(room)
    while (left := budget - int(counts.sum())) > 0:
        open_groups = room > counts
        active = open_groups & (share > 0)
        active_share = np.where(active, share, 0.0) if active.any() else np.where(open_groups, room - counts, 0.0)
        quota = left * (active_share / active_share.sum())
        full = (quota >= room - counts) & (active_share > 0)
        if full.any():
            counts[full] = room[full]
            continue
        whole = np.floor(quota).astype(np.int64)
        rest = left - int(whole.sum())
        whole[np.argsort(-(quota - whole), kind="stable")[:rest]] += 1
        counts += whole
    return counts


def drawing_keys(values: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Random keys float64 (rows,): taking the lowest keys draws without replacement with probabilities ∝ `values`.

    The key is an exponential arrival time of rate `values` (Efraimidis and Spirakis, 2006). Rows of value zero come last.
    """
    arrival = generator.standard_exponential(len(values))
    return np.divide(arrival, values, out=np.full(len(values), np.inf), where=values > 0)


def take_lowest(keys: np.ndarray, groups: np.ndarray, counts: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """The `counts[j]` rows of lowest key in each group j, ties broken at random: int64 row numbers, by group, then by key."""
    order = np.lexsort((generator.random(len(keys)), keys, groups))
    sizes = np.bincount(groups, minlength=len(counts))
    starts = np.cumsum(sizes) - sizes
    rank = np.arange(len(keys)) - np.repeat(starts, sizes)
    return order[rank < np.repeat(counts, sizes)]
