"""Golomb coding of sparse signs: the gaps between non-zeros in Rice codes, each followed by its sign.

If each of d entries is non-zero with probability k, the gaps are geometric and a Golomb code is within one per cent of
their entropy. With a power of two as its parameter (a Rice code) a gap g is written as g >> b zeros, a one, and the low b
bits of g; a sign bit follows (1: negative). Bits fill 64-bit words from the lowest bit up. The best b for k is
b* = 1 + floor(log2(log(phi - 1) / log(1 - k))) with phi the golden ratio, as in sparse ternary compression (Sattler et
al., arXiv 1903.02891), which ComPEFT (arXiv 2311.13171) takes its storage formula from.

The coder works tensor by tensor, while gaps run on across tensors: a reader or writer remembers where it stands.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numba import njit

from grainwise.merge.bit_masks import Masks, Words, popcount

GOLDEN = (math.sqrt(5) + 1) / 2
DEBRUIJN = 0x03F79D71B4CB0A89  # each of its 64 windows of six bits is different: it finds the lowest set bit of a word
LOWEST = np.zeros(64, dtype=np.int64)
for _bit in range(64):
    LOWEST[((DEBRUIJN << _bit) & (2**64 - 1)) >> 58] = _bit
LARGEST_PARAMETER = 56  # a remainder and its sign are written in one piece of less than 64 bits


def rice_parameter(density: float) -> int:
    """b*, the number of low bits written as they are, for a share `density` of non-zeros in [0, 1]."""
    if density <= 0:
        return 0
    if density >= 1:
        return 0
    ratio = math.log(GOLDEN - 1) / math.log1p(-density)
    return min(LARGEST_PARAMETER, max(0, 1 + math.floor(math.log2(ratio))))


def expected_bits(density: float) -> float:
    """Mean bits per entry of the code for independent positions: k (b* + 1 / (1 - (1 - k)^(2^b*))) + k for the signs."""
    if density <= 0:
        return 0.0
    b = rice_parameter(density)
    position = b + 1 / (1 - (1 - density) ** (2**b))
    return density * (position + 1)


def entropy_bits(density: float) -> float:
    """H(k), the least mean bits per entry for independent signs: -((1 - k) log2(1 - k) + k log2(k / 2))."""
    k = density
    absent = (1 - k) * math.log2(1 - k) if k < 1 else 0.0
    present = k * math.log2(k / 2) if k > 0 else 0.0
    return -(absent + present)


@njit(cache=True, nogil=True)
def _lowest_bit(word: np.uint64, lowest: np.ndarray) -> int:
    isolated = word & (~word + np.uint64(1))
    return lowest[(isolated * np.uint64(DEBRUIJN)) >> np.uint64(58)]


@njit(cache=True, nogil=True)
def _encode(
    positive: np.ndarray, negative: np.ndarray, gap: int, b: int, out: np.ndarray, at: int, lowest: np.ndarray
) -> tuple[int, int]:
    """Append the codes of one tensor to `out` from bit `at`, zeros from there on; (new bit, index of the last non-zero).

    gap: entries since the last non-zero before this tensor. The index is negative, -1 - gap, if the tensor has no non-zero.
    """
    last = -1 - gap
    for word in range(positive.size):
        left = positive[word] | negative[word]
        while left:
            bit = _lowest_bit(left, lowest)
            left &= left - np.uint64(1)
            run = word * 64 + bit - last - 1
            last = word * 64 + bit
            at += run >> b
            sign = (negative[word] >> np.uint64(bit)) & np.uint64(1)
            remainder = np.uint64(run) & ((np.uint64(1) << np.uint64(b)) - np.uint64(1))
            piece = np.uint64(1) | (remainder << np.uint64(1)) | (sign << np.uint64(b + 1))
            offset = at & 63
            out[at >> 6] |= piece << np.uint64(offset)
            if offset + b + 2 > 64:
                out[(at >> 6) + 1] |= piece >> np.uint64(64 - offset)
            at += b + 2
    return at, last


@njit(cache=True, nogil=True)
def _decode(
    words: np.ndarray, at: int, gap: int, left: int, b: int, entries: int,
    positive: np.ndarray, negative: np.ndarray, lowest: np.ndarray,
) -> tuple[int, int, int]:  # fmt: skip
    """Set the masks of the next `entries` entries; (bit, pending gap, non-zeros left), bit -1 for a broken stream.

    gap: twice the entries before the next non-zero, plus its sign, if that has been read already; else -1.
    """
    position = -1
    total = words.size * 64
    while left > 0:
        if gap < 0:
            quotient = 0
            while True:
                if at >= total:
                    return -1, 0, 0
                rest = words[at >> 6] >> np.uint64(at & 63)
                if rest:
                    step = _lowest_bit(rest, lowest)
                    quotient += step
                    at += step
                    break
                quotient += 64 - (at & 63)
                at += 64 - (at & 63)
            if at + b + 2 > total:
                return -1, 0, 0
            offset = at & 63
            piece = words[at >> 6] >> np.uint64(offset)
            if offset + b + 2 > 64:
                piece |= words[(at >> 6) + 1] << np.uint64(64 - offset)
            remainder = (piece >> np.uint64(1)) & ((np.uint64(1) << np.uint64(b)) - np.uint64(1))
            gap = (((quotient << b) | np.int64(remainder)) << 1) | np.int64((piece >> np.uint64(b + 1)) & np.uint64(1))
            at += b + 2
        target = position + 1 + (gap >> 1)
        if target >= entries:
            return at, ((target - entries) << 1) | (gap & 1), left
        if gap & 1:
            negative[target >> 6] |= np.uint64(1) << np.uint64(target & 63)
        else:
            positive[target >> 6] |= np.uint64(1) << np.uint64(target & 63)
        position = target
        gap = -1
        left -= 1
    return at, -1, left


class GolombWriter:
    """Codes the masks of one tensor after another. density: the share of non-zeros that the code is made for."""

    def __init__(self, density: float) -> None:
        self.b = rice_parameter(density)
        self.bits = 0
        self._gap = 0  # entries since the last non-zero
        self._partial = np.uint64(0)  # the last word, not full yet

    def write(self, positive: Words, negative: Words, entries: int) -> bytes:
        """The full words that the next tensor's masks complete."""
        start = self.bits & 63
        nonzeros = popcount(positive) + popcount(negative)
        most = start + ((self._gap + entries) >> self.b) + nonzeros * (self.b + 2)
        out = np.zeros(most // 64 + 2, dtype=np.uint64)
        out[0] = self._partial
        end, last = _encode(positive, negative, self._gap, self.b, out, start, LOWEST)
        self._gap = entries - 1 - last
        self.bits += int(end) - start
        full = int(end) >> 6
        self._partial = out[full]
        return out[:full].astype("<u8", copy=False).tobytes()

    def finish(self) -> bytes:
        """The last word, padded with zeros (empty if the stream ends with a full word)."""
        return self._partial.astype("<u8").tobytes() if self.bits & 63 else b""


@dataclass(frozen=True)
class Place:
    """Where a reader stands between two tensors: bit of the stream, a code read but not used (or -1), non-zeros to come."""

    bit: int
    gap: int
    left: int


def read_masks(words: Words, place: Place, b: int, entries: int, masks: Masks) -> Place:
    """Set the zeroed masks (positive, negative) of the next `entries` entries and return the place after them.

    Raises ValueError if the stream ends before its non-zeros.
    """
    bit, gap, left = _decode(words, place.bit, place.gap, place.left, b, entries, *masks, LOWEST)
    if bit < 0:
        raise ValueError(f"the coded signs end {place.left} non-zeros too early: the file is damaged or cut short")
    return Place(int(bit), int(gap), int(left))
