"""The number formats: levels, nearest codes, double quantisation, bytes on disk."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from grainwise.compress import nf4
from grainwise.kernels.nf4_matmul import dequantize_reference

PUBLISHED = [
    -1, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0,
    0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1,
]  # fmt: skip


def codes(matrix: nf4.BlockMatrix) -> torch.Tensor:
    packed = matrix.packed.flatten()
    return torch.stack([packed >> 4, packed & 15], dim=1).flatten()[: matrix.numel].long()


def test_nf4_levels_are_the_published_ones():
    torch.testing.assert_close(nf4.levels("nf4"), torch.tensor(PUBLISHED), atol=1e-6, rtol=0)


def test_nf4_levels_follow_the_offset_construction():
    offset = 1 - (1 / 30 + 1 / 32) / 2
    positive = norm.ppf(torch.linspace(offset, 0.5, 9, dtype=torch.float64)[:-1])
    negative = -norm.ppf(torch.linspace(offset, 0.5, 8, dtype=torch.float64)[:-1])
    built = torch.tensor(sorted([*negative, 0.0, *positive]))
    torch.testing.assert_close(nf4.levels("nf4").double(), built / built.max(), atol=1e-6, rtol=0)


def test_dynamic_map_has_seven_doubling_decades():
    table = nf4.dynamic_map()
    assert table.shape == (256,)
    assert torch.equal(table, table.sort().values)
    assert table[-1] == 1
    assert (table == 0).sum() == 1
    assert table[0].item() == pytest.approx(-0.99296875)
    for decade in range(7):
        low, high = 10.0 ** (decade - 7), 10.0 ** (decade - 6)
        assert ((table > low) & (table < high)).sum() == 2**decade
        assert ((table < -low) & (table > -high)).sum() == 2**decade


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(1, 90), st.sampled_from(nf4.FORMATS), st.integers(0, 10_000))
def test_codes_are_the_nearest_levels(rows, columns, kind, seed):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    matrix = nf4.quantize(weight, kind, double=False)
    table = nf4.levels(kind)
    scales = matrix.absmax.repeat_interleave(64)[: weight.numel()]
    scaled = weight.flatten() / scales
    distance = (scaled[:, None] - table).abs()
    chosen = distance.gather(1, codes(matrix)[:, None])[:, 0]
    assert (chosen - distance.min(dim=1).values).abs().max() < 1e-6  # equal but for rounding at a tie
    widest = table.sort().values.diff().max()
    assert ((dequantize_reference(matrix).flatten() - weight.flatten()).abs() <= widest / 2 * scales + 1e-6).all()


def test_largest_gap_of_nf4():
    assert nf4.levels("nf4").diff().max().item() / 2 == pytest.approx(0.1519, abs=1e-4)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 7), st.integers(1, 150), st.sampled_from((32, 64, 128)), st.integers(0, 10_000))
def test_quantising_again_changes_no_byte_and_scale_passes_through(rows, columns, block, seed):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    once = nf4.quantize(weight, block=block, double=False)
    twice = nf4.quantize(dequantize_reference(once), block=block, double=False)
    assert torch.equal(once.packed, twice.packed)
    assert torch.equal(once.absmax, twice.absmax)
    scaled = nf4.quantize(4.0 * weight, block=block, double=False)
    assert torch.equal(once.packed, scaled.packed)
    assert torch.equal(4.0 * once.absmax, scaled.absmax)


def test_zero_and_the_largest_element_are_exact():
    weight = torch.randn(4, 64)
    weight[0, 3] = 0.0
    weight[1, 5], weight[2, 7] = 9.0, -7.5
    back = dequantize_reference(nf4.quantize(weight, double=False))
    assert back[0, 3] == 0
    assert back[1, 5] == 9.0
    assert back[2, 7] == -7.5


def test_all_zero_blocks_stay_zero():
    weight = torch.zeros(2, 96)
    weight[1, 40:] = torch.randn(56)
    for double in (False, True):
        back = dequantize_reference(nf4.quantize(weight, double=double))
        assert torch.isfinite(back).all()
        assert back[0].abs().max() < 1e-2 * (not double) + 0.1 * double


def test_blocks_run_along_rows_and_cross_them():
    weight = torch.arange(1.0, 97.0).view(3, 32)
    assert nf4.quantize(weight, double=False).absmax.tolist() == [64.0, 96.0]


def test_scales_are_quantised_around_their_mean():
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    plain, double = nf4.quantize(weight, double=False), nf4.quantize(weight)
    assert double.offset.item() == pytest.approx(plain.absmax.mean().item())
    error = (double.scales() - plain.absmax).abs().max() / plain.absmax.std()
    assert error < 0.06  # half a step of the map at the largest deviation; without the mean it would be several times that


def test_measured_bits():
    weight = torch.randn(64, 256)
    assert nf4.bits_per_weight(nf4.quantize(weight)) == 4 + 8 / 64 + 32 / 16384 + 32 / weight.numel()
    assert nf4.bits_per_weight(nf4.quantize(weight, double=False)) == 4.5


def test_gaussian_error_orders_the_formats():
    weight = torch.randn(512, 512, generator=torch.Generator().manual_seed(1))
    error = {
        k: (dequantize_reference(nf4.quantize(weight, k, double=False)) - weight).square().mean().item() for k in nf4.FORMATS
    }
    assert error["nf4"] == pytest.approx(0.0086, abs=2e-4)
    assert error["int4"] == pytest.approx(0.0116, abs=3e-4)
    assert error["fp4"] == pytest.approx(0.0151, abs=4e-4)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (5, 77), (33, 65), (8, 128)])
def test_stored_tensors_come_back(shape, double):
    matrix = nf4.quantize(torch.randn(shape), "fp4", block=32, double=double)
    back, kind, dtype = nf4.from_state(matrix.packed, nf4.state_tensors(matrix, "fp4", torch.bfloat16))
    assert (kind, dtype, back.shape, back.block) == ("fp4", torch.bfloat16, shape, 32)
    assert torch.equal(dequantize_reference(back), dequantize_reference(matrix))


@pytest.mark.needs_bitsandbytes
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(1, 1), (5, 77), (128, 704), (300, 260)])
def test_bytes_equal_those_of_bitsandbytes(shape, kind):
    functional = pytest.importorskip("bitsandbytes.functional")
    for seed, dtype in enumerate((torch.float32, torch.bfloat16)):
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
        for double in (False, True):
            theirs, state = functional.quantize_4bit(weight, blocksize=64, compress_statistics=double, quant_type=kind)
            ours = nf4.quantize(weight, kind, double=double)
            assert torch.equal(ours.packed, theirs)
            stored, expected = nf4.state_tensors(ours, kind, dtype), state.as_dict(packed=True)
            assert stored.keys() == expected.keys()
            for key, tensor in stored.items():
                assert tensor.dtype == expected[key].dtype
                assert torch.equal(tensor, expected[key]), key


@pytest.mark.needs_bitsandbytes
def test_either_side_reads_the_others_tensors():
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(32, 128)
    packed, state = functional.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    read, _, _ = nf4.from_state(packed, state.as_dict(packed=True))
    assert torch.equal(dequantize_reference(read), functional.dequantize_4bit(packed, state))
    ours = nf4.quantize(weight)
    stored = {f"weight.{k}": v for k, v in nf4.state_tensors(ours, "nf4", torch.float32).items()}
    theirs = functional.QuantState.from_dict(stored, device="cpu")
    assert torch.equal(functional.dequantize_4bit(ours.packed, theirs), dequantize_reference(ours))


def test_bad_weights_are_refused_by_name():
    with pytest.raises(TypeError, match=r"q_proj\.weight is torch\.int8"):
        nf4.quantize(torch.zeros(2, 2, dtype=torch.int8), name="q_proj.weight")
    with pytest.raises(TypeError, match="float64"):
        nf4.quantize(torch.zeros(2, 2, dtype=torch.float64))
    weight = torch.ones(2, 2)
    weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"up_proj\.weight holds NaN or infinity"):
        nf4.quantize(weight, name="up_proj.weight")
    with pytest.raises(ValueError, match="NaN or infinity"):
        nf4.quantize(torch.full((2, 2), torch.inf))
    for block in (16, 48, 8192):
        with pytest.raises(ValueError, match="power of two from 32 to 4096"):
            nf4.quantize(torch.ones(2, 2), block=block)
    with pytest.raises(ValueError, match="Did you mean 'nf4'"):
        nf4.quantize(torch.ones(2, 2), "nf5")
    with pytest.raises(ValueError, match=r"matrix \(out, in\)"):
        nf4.quantize(torch.ones(4))


def test_damaged_files_are_refused():
    matrix = nf4.quantize(torch.randn(8, 64))
    stored = nf4.state_tensors(matrix, "nf4", torch.float32)
    with pytest.raises(ValueError, match="no 4-bit matrix"):
        nf4.from_state(matrix.packed, {k: v for k, v in stored.items() if k != "absmax"})
    with pytest.raises(ValueError, match="absmax has 4 entries"):
        nf4.from_state(matrix.packed, {**stored, "absmax": stored["absmax"][:4]})
    with pytest.raises(ValueError, match="weight has 255 entries"):
        nf4.from_state(matrix.packed[:-1].contiguous()[:255], stored)
    key = "quant_state.bitsandbytes__nf4"
    with pytest.raises(ValueError, match="does not describe"):
        nf4.from_state(matrix.packed, {**stored, key: stored[key][:10]})
