"""Generated records as a `torch` data set and as a `datasets.Dataset`.

A source is anything with `records(indices) -> list of dictionaries`: `Clips` and `Documents` are. The torch form draws a
whole batch at once when a DataLoader asks for one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from torch.utils.data import Dataset as TorchDataset

BATCH = 32


class Source(Protocol):
    """What generates records by index."""

    def records(self, indices: Sequence[int] | np.ndarray) -> list[dict[str, Any]]: ...


class RecordDataset(TorchDataset[dict[str, Any]]):
    """Records first to first + count - 1 of a source as a map-style `torch` data set.

    Arrays become tensors of the same type; a uint8 array whose last axis is colour, (..., height, width, 3), becomes
    (..., 3, height, width), still uint8. Text and lists stay as they are.
    """

    def __init__(self, source: Source, count: int, first: int = 0) -> None:
        if count < 1 or first < 0:
            raise ValueError(f"a data set needs at least one record from index 0 on, got count {count} and first {first}")
        self.source, self.count, self.first = source, count, first

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        wrong = [index for index in indices if not -self.count <= index < self.count]
        if wrong:
            raise IndexError(f"index {wrong[0]} of a data set of {self.count} records")
        records = self.source.records([self.first + index % self.count for index in indices])
        return [{name: _tensor(value) for name, value in record.items()} for record in records]


def _tensor(value: Any) -> Any:
    if not isinstance(value, np.ndarray):
        return value
    if value.dtype == np.uint8 and value.ndim >= 3 and value.shape[-1] == 3:
        value = np.ascontiguousarray(np.moveaxis(value, -1, -3))
    return torch.from_numpy(value)


def to_dataset(source: Source, count: int, first: int = 0) -> Dataset:
    """Records first to first + count - 1 as a `datasets.Dataset`; pictures and frames become columns of PNG images."""
    rows: list[dict[str, Any]] = []
    if count < 1 or first < 0:
        raise ValueError(f"a data set needs at least one record from index 0 on, got count {count} and first {first}")
    for start in range(first, first + count, BATCH):
        for record in source.records(np.arange(start, min(start + BATCH, first + count))):
            rows.append({name: _plain(value) for name, value in record.items()})
    return Dataset.from_dict({name: [row[name] for row in rows] for name in rows[0]})


def _plain(value: Any) -> Any:
    """What Arrow can hold: one picture, a list of pictures (frames, label maps), or nested lists."""
    if not isinstance(value, np.ndarray):
        return value
    if value.dtype == np.uint8 and value.ndim >= 3:
        colour = value.shape[-1] == 3
        if value.ndim == 3 and colour:
            return Image.fromarray(value)
        return [Image.fromarray(one) for one in value]
    return value.tolist()
