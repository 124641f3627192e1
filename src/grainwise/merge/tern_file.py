"""What lies inside a `.tern` file: its layout record, and its signs, read in place tensor by tensor."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from grainwise.merge import bit_masks, golomb
from grainwise.merge.bit_masks import Masks
from grainwise.merge.tensor_store import TensorInfo


def pack_layout(layout: Mapping[str, TensorInfo], config: dict[str, Any] | None) -> bytes:
    """Names, shapes and types of the fine-tuned tensors and the adapter's configuration, as compressed JSON."""
    tensors = [[key, list(info.shape), str(info.dtype).removeprefix("torch.")] for key, info in layout.items()]
    return zlib.compress(json.dumps({"tensors": tensors, "adapter": config}, separators=(",", ":")).encode(), 9)


def unpack_layout(packed: bytes) -> tuple[dict[str, TensorInfo], dict[str, Any] | None]:
    """The inverse of `pack_layout`."""
    content = json.loads(zlib.decompress(packed))
    layout = {key: TensorInfo(tuple(shape), getattr(torch, dtype)) for key, shape, dtype in content["tensors"]}
    return layout, content["adapter"]


class StoredMasks(Mapping[str, Masks]):
    """Masks in the bytes of a file, which the operating system keeps on disk until they are read."""

    def __init__(self, signs: np.ndarray, layout: Mapping[str, TensorInfo]) -> None:
        if signs.size % 8:
            raise ValueError(f"the coded signs are {signs.size} bytes, no whole number of 64-bit words: the file is damaged")
        self._words, self._layout = np.frombuffer(signs, dtype="<u8"), layout

    def __iter__(self) -> Iterator[str]:
        return iter(self._layout)

    def __len__(self) -> int:
        return len(self._layout)


class PlainMasks(StoredMasks):
    """For each tensor its positive words, then its negative words."""

    def __init__(self, signs: np.ndarray, layout: Mapping[str, TensorInfo]) -> None:
        super().__init__(signs, layout)
        self._starts, at = {}, 0
        for key, info in layout.items():
            self._starts[key] = at
            at += 2 * bit_masks.words_for(info.numel)
        if at != len(self._words):
            raise ValueError(f"the file has {len(self._words)} words of signs, its layout asks for {at}: it is damaged")

    def __getitem__(self, key: str) -> Masks:
        start, count = self._starts[key], bit_masks.words_for(self._layout[key].numel)
        return self._words[start : start + count], self._words[start + count : start + 2 * count]


class CodedMasks(StoredMasks):
    """Golomb-coded signs. One pass when opened checks them and notes where each tensor begins."""

    def __init__(self, signs: np.ndarray, layout: Mapping[str, TensorInfo], nonzeros: int) -> None:
        super().__init__(signs, layout)
        self._b = golomb.rice_parameter(nonzeros / max(1, sum(info.numel for info in layout.values())))
        self._places, place = {}, golomb.Place(0, -1, nonzeros)
        for key in layout:
            self._places[key] = place
            _, place = self._read(key)
        if place.left:
            raise ValueError(f"the file has {place.left} signs beyond the end of its layout: it is damaged")

    def _read(self, key: str) -> tuple[Masks, golomb.Place]:
        entries = self._layout[key].numel
        positive, negative = (np.zeros(bit_masks.words_for(entries), dtype=np.uint64) for _ in range(2))
        return (positive, negative), golomb.read_masks(self._words, self._places[key], self._b, entries, (positive, negative))

    def __getitem__(self, key: str) -> Masks:
        return self._read(key)[0]
