"""The coder: lossless, close to the entropy, and safe on damaged streams."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grainwise.merge import bit_masks, golomb


def masks_of(signs: np.ndarray) -> bit_masks.Masks:
    """(positive, negative) words of a vector of signs."""
    padded = np.zeros(bit_masks.words_for(len(signs)) * 64, dtype=np.int8)
    padded[: len(signs)] = signs
    words = [np.packbits(padded == sign, bitorder="little").view(np.uint64) for sign in (1, -1)]
    return words[0], words[1]


def encode(parts: list[np.ndarray], density: float) -> tuple[np.ndarray, golomb.GolombWriter]:
    writer = golomb.GolombWriter(density)
    stream = b"".join(writer.write(*masks_of(part), len(part)) for part in parts) + writer.finish()
    return np.frombuffer(stream, dtype=np.uint64), writer


def decode(words: np.ndarray, lengths: list[int], b: int, nonzeros: int) -> list[np.ndarray]:
    place, found = golomb.Place(0, -1, nonzeros), []
    for length in lengths:
        masks = tuple(np.zeros(bit_masks.words_for(length), dtype=np.uint64) for _ in range(2))
        place = golomb.read_masks(words, place, b, length, masks)
        found.append(bit_masks.decode(*masks, length, 1.0).numpy().astype(np.int8))
    assert place.left == 0
    return found


def random_signs(length: int, density: float, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return (generator.choice([-1, 1], length) * (generator.random(length) < density)).astype(np.int8)


@pytest.mark.parametrize("length", [0, 1, 63, 64, 65, 10**6])
@pytest.mark.parametrize("density", [0, 1e-4, 0.05, 0.5, 1])
def test_coding_is_lossless_within_and_across_tensors(length: int, density: float) -> None:
    signs = random_signs(length, density)
    cuts = [0, length // 3, length // 3, length - length // 7, length]
    parts = [signs[a:b] for a, b in pairwise(cuts)]
    words, writer = encode(parts, density)
    decoded = decode(words, [len(p) for p in parts], writer.b, int(np.count_nonzero(signs)))
    assert np.array_equal(np.concatenate(decoded), signs)


@given(
    st.lists(st.lists(st.sampled_from([-1, 0, 0, 0, 1]), max_size=200), min_size=1, max_size=5),
    st.floats(1e-6, 1.0),
)
@settings(max_examples=60, deadline=None)
def test_coding_is_lossless_for_any_parameter(parts: list[list[int]], density: float) -> None:
    arrays = [np.array(p, dtype=np.int8) for p in parts]
    words, writer = encode(arrays, density)
    decoded = decode(words, [len(a) for a in arrays], writer.b, sum(int(np.count_nonzero(a)) for a in arrays))
    for got, expected in zip(decoded, arrays):
        assert np.array_equal(got, expected)


@pytest.mark.parametrize("density", [0.01, 0.05, 0.1, 0.2, 0.3, 0.5])
def test_length_is_as_the_formula_says_and_not_below_the_entropy(density: float) -> None:
    measured = [encode([random_signs(200_000, density, seed)], density)[1].bits / 200_000 for seed in range(5)]
    assert np.mean(measured) == pytest.approx(golomb.expected_bits(density), rel=0.03)
    assert np.mean(measured) >= golomb.entropy_bits(density) * 0.999


def test_figures_of_the_paper() -> None:
    assert golomb.rice_parameter(0.05) == 4
    assert golomb.expected_bits(0.05) == pytest.approx(0.339, abs=5e-4)
    entropies = [golomb.entropy_bits(k) for k in (0.05, 0.1, 0.2, 0.5)]
    assert entropies == pytest.approx([0.336, 0.569, 0.922, 1.5], abs=5e-4)
    assert 16 / entropies[0] == pytest.approx(47.6, abs=0.1)
    assert golomb.entropy_bits(1.0) == 1.0
    assert golomb.entropy_bits(0.0) == golomb.expected_bits(0.0) == 0.0


def test_the_parameter_is_the_best_one() -> None:
    for density in (0.003, 0.02, 0.05, 0.1, 0.3, 0.6):

        def cost(b: int, k: float = density) -> float:
            return b + 1 / (1 - (1 - k) ** (2**b))

        assert golomb.rice_parameter(density) == min(range(20), key=cost)


def test_a_cut_stream_is_an_error() -> None:
    signs = random_signs(5000, 0.05)
    words, writer = encode([signs], 0.05)
    for cut in (0, len(words) // 2, len(words) - 1):
        with pytest.raises(ValueError, match="damaged or cut short"):
            decode(words[:cut], [len(signs)], writer.b, int(np.count_nonzero(signs)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("length", [0, 1, 64, 130])
def test_decoding_to_any_type(dtype: torch.dtype, length: int) -> None:
    signs = random_signs(length, 0.5)
    dense = bit_masks.decode(*masks_of(signs), length, 0.3, dtype)
    assert dense.dtype == dtype
    assert torch.equal(dense, (torch.from_numpy(signs).double() * 0.3).to(dtype))
    with pytest.raises(ValueError, match="16- and 32-bit"):
        bit_masks.decode(*masks_of(signs), length, 0.3, torch.float64)


def test_popcount_and_agreements() -> None:
    a, b = random_signs(1000, 0.5, 1), random_signs(1000, 0.5, 2)
    assert bit_masks.popcount(masks_of(a)[0]) == int((a == 1).sum())
    same, opposite = bit_masks.agreements(masks_of(a), masks_of(b))
    assert (same, opposite) == (int((a * b == 1).sum()), int((a * b == -1).sum()))
    assert same - opposite == int(a.astype(int) @ b)
