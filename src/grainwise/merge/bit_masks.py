"""Signs as two bit masks (which entries are positive, which negative) in 64-bit words, and the loops over them.

Bit `i % 64` of word `i // 64` belongs to entry i of one flattened tensor; each tensor starts a new word and the bits
beyond its end are zero. The loops are compiled by Numba on first use and cached.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor

WORD = 64
BLOCK = 1 << 17  # words handled at once where a temporary array is needed (1 MiB)
Words = np.ndarray  # of uint64
Masks = tuple[Words, Words]  # (positive, negative) of one tensor


def words_for(entries: int) -> int:
    """Words that hold one bit for each entry."""
    return -(-entries // WORD)


def bits_and_values(tensor: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Views (n,) of a contiguous float32 tensor: its bit patterns as uint32, and its values.

    Without the sign bit the patterns are ordered as the magnitudes are.
    """
    values = tensor.detach().reshape(-1).numpy()
    return values.view(np.uint32), values


@njit(cache=True, nogil=True)
def survey(bits: np.ndarray, values: np.ndarray, counts: np.ndarray) -> tuple[float, float]:
    """Add to counts (2^15,) how many magnitudes have each upper half; return the sum and the sum of squares of the values."""
    total = 0.0
    squares = 0.0
    for i in range(bits.size):
        counts[(bits[i] & np.uint32(0x7FFFFFFF)) >> np.uint32(16)] += 1
        value = np.float64(values[i])
        total += value
        squares += value * value
    return total, squares


@njit(cache=True, nogil=True)
def refine(bits: np.ndarray, values: np.ndarray, high: int, counts: np.ndarray) -> float:
    """Add to counts (2^16,) the lower halves of magnitudes with the upper half `high`; return the sum of those above it."""
    wanted = np.uint32(high)
    above = 0.0
    for i in range(bits.size):
        magnitude = bits[i] & np.uint32(0x7FFFFFFF)
        upper = magnitude >> np.uint32(16)
        if upper == wanted:
            counts[magnitude & np.uint32(0xFFFF)] += 1
        elif upper > wanted:
            above += abs(np.float64(values[i]))
    return above


@njit(cache=True, nogil=True)
def count_equal(bits: np.ndarray, threshold: int) -> int:
    """How many magnitudes equal `threshold`."""
    limit = np.uint32(threshold)
    found = 0
    for i in range(bits.size):
        found += (bits[i] & np.uint32(0x7FFFFFFF)) == limit
    return found


@njit(cache=True, nogil=True)
def mark(bits: np.ndarray, threshold: int, ties: int, positive: np.ndarray, negative: np.ndarray) -> int:
    """Set the bits of the magnitudes above `threshold` and of the first `ties` equal to it; return the ties left over.

    Zeros are never marked: they have no sign. positive, negative: zeroed words.
    """
    limit = np.uint32(threshold)
    one = np.uint64(1)
    for word in range(positive.size):
        start = word * 64
        plus = np.uint64(0)
        minus = np.uint64(0)
        for bit in range(min(64, bits.size - start)):
            value = bits[start + bit]
            magnitude = value & np.uint32(0x7FFFFFFF)
            taken = magnitude > limit
            if magnitude == limit and ties > 0:
                ties -= 1
                taken = magnitude != np.uint32(0)
            if taken:
                if value >> np.uint32(31):
                    minus |= one << np.uint64(bit)
                else:
                    plus |= one << np.uint64(bit)
        positive[word] = plus
        negative[word] = minus
    return ties


@njit(cache=True, nogil=True)
def spread(positive: np.ndarray, negative: np.ndarray, table: np.ndarray, out: np.ndarray) -> None:
    """Write four entries at a time: table (256, width) has their bytes as uint64, out is (16 * words, width)."""
    for word in range(positive.size):
        plus = positive[word]
        minus = negative[word]
        for part in range(16):
            shift = np.uint64(4 * part)
            index = (((plus >> shift) & np.uint64(15)) << np.uint64(4)) | ((minus >> shift) & np.uint64(15))
            for i in range(out.shape[1]):
                out[16 * word + part, i] = table[index, i]


def decode(positive: Words, negative: Words, entries: int, scale: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """The dense vector (entries,) of values in {-scale, 0, scale}, of a 16- or 32-bit floating-point type."""
    if dtype.itemsize not in (2, 4):
        raise ValueError(f"decode writes 16- and 32-bit types, got {dtype}")
    width = dtype.itemsize // 2
    level = torch.tensor([0.0, scale, -scale], dtype=torch.float64).to(dtype)
    code = torch.arange(256)[:, None]
    places = torch.arange(4)
    plus, minus = (code >> (4 + places)) & 1, (code >> places) & 1
    table = level[(plus + 2 * minus).clamp(max=2)].contiguous().view(torch.int64).numpy().view(np.uint64)
    out = torch.empty(len(positive) * WORD, dtype=dtype)
    spread(positive, negative, table.reshape(256, width), out.view(torch.int64).numpy().view(np.uint64).reshape(-1, width))
    return out[:entries]


def popcount(words: Words) -> int:
    """Number of set bits."""
    return int(sum(np.bitwise_count(words[at : at + BLOCK]).sum(dtype=np.int64) for at in range(0, len(words), BLOCK)))


def agreements(first: Masks, second: Masks) -> tuple[int, int]:
    """(entries with equal signs, entries with opposite signs) of two pairs of masks (positive, negative)."""
    same = opposite = 0
    (p1, n1), (p2, n2) = first, second
    for at in range(0, len(p1), BLOCK):
        part = slice(at, at + BLOCK)
        same += int(np.bitwise_count((p1[part] & p2[part]) | (n1[part] & n2[part])).sum(dtype=np.int64))
        opposite += int(np.bitwise_count((p1[part] & n2[part]) | (n1[part] & p2[part])).sum(dtype=np.int64))
    return same, opposite
