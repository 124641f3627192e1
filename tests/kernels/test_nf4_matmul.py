"""The 4-bit products: every kernel against the plain reference, and the choice among them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grainwise.compress import nf4
from grainwise.kernels import nf4_avx512, nf4_matmul
from grainwise.kernels.nf4_matmul import dequantize, dequantize_reference, kernel_in_use, matmul, matmul_transposed

here = pytest.mark.skipif(bool(nf4_avx512.missing()), reason=f"no AVX-512 kernels: {nf4_avx512.missing()}")
KERNELS = [pytest.param("avx512", marks=here), "torch"]


def matrix(rows: int, columns: int, block: int = 64, double: bool = True, kind: str = "nf4") -> nf4.BlockMatrix:
    return nf4.quantize(
        torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)), kind, block=block, double=double
    )


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize(("block", "kind"), [(32, "nf4"), (64, "fp4"), (256, "nf4")])
def test_dequantize_gives_the_reference_bits(kernel, double, block, kind):
    weight = matrix(37, 768, block, double, kind)
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(dequantize(weight, dtype, kernel=kernel), dequantize_reference(weight, dtype))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("rows", "double"), [(1, False), (1, True), (2, True), (4, False), (7, True), (13, False), (33, True)])
def test_products_match_the_reference(kernel, rows, double):
    weight = matrix(75, 704, double=double)  # rows of five and a half 128-weight steps, 75 outputs: every remainder occurs
    x = torch.randn(rows, 704)
    expected = x @ dequantize_reference(weight).T
    torch.testing.assert_close(matmul(x, weight, kernel=kernel), expected, atol=2e-4, rtol=1e-5)
    half = x.bfloat16()
    precise = half.float() @ dequantize_reference(weight).T
    error = (matmul(half, weight, kernel=kernel).float() - precise).abs().max()
    assert error <= 0.01 * precise.abs().max()


@here
@pytest.mark.parametrize(("block", "rows"), [(32, 1), (128, 4), (32, 40)])
def test_other_block_sizes(block, rows):
    weight = matrix(20, 256, block)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        x = torch.randn(rows, 256).to(dtype)
        expected = x.float() @ dequantize_reference(weight).T
        assert (matmul(x, weight, kernel="avx512").float() - expected).abs().max() <= tolerance * expected.abs().max()


@here
@settings(max_examples=10, deadline=None)
@given(st.integers(1, 70), st.integers(1, 10), st.sampled_from((1, 4, 13, 16, 31, 65, 80)), st.booleans())
def test_fused_bf16_product_over_many_shapes(out, steps, rows, double):
    weight = matrix(out, 64 * steps, double=double)
    x = torch.randn(rows, 64 * steps, generator=torch.Generator().manual_seed(out)).bfloat16()
    exact = dequantize_reference(weight).T
    expected = x.float() @ exact
    # each level is rounded to bf16 (2^-9), and so is the sum (2^-8 with the sum's own error); terms may cancel
    bound = 0.003 * (x.float().abs() @ exact.abs()) + 0.005 * expected.abs()
    assert ((matmul(x, weight, kernel="avx512").float() - expected).abs() <= bound).all()


@here
def test_tiles_in_depth_and_outputs_and_rows(monkeypatch):
    monkeypatch.setattr(nf4_matmul, "TILE_BYTES", 2**20)  # 256 or 512 rows
    weight = matrix(1100, 640)  # more than one tile of 192 and of 512 rows, more than one of 512 weights
    x = torch.randn(600, 640).bfloat16()  # more rows than are multiplied at once
    expected = (x.float() @ dequantize_reference(weight, torch.bfloat16).float().T).bfloat16()
    torch.testing.assert_close(matmul(x, weight, kernel="avx512"), expected, atol=0.05, rtol=0.01)
    many = torch.randn(20, 640)
    expected = many @ dequantize_reference(weight).T
    torch.testing.assert_close(matmul(many, weight, kernel="avx512"), expected, atol=2e-4, rtol=1e-5)
    dy = torch.randn(3, 1100)
    expected = dy @ dequantize_reference(weight)
    torch.testing.assert_close(matmul_transposed(dy, weight, kernel="avx512"), expected, atol=3e-4, rtol=1e-5)


@pytest.mark.parametrize("kernel", KERNELS)
def test_leading_dimensions_pass_through(kernel):
    weight = matrix(6, 128)
    x = torch.randn(2, 3, 128)
    assert matmul(x, weight, kernel=kernel).shape == (2, 3, 6)
    assert matmul_transposed(torch.randn(2, 3, 6), weight, kernel=kernel).shape == (2, 3, 128)
    assert matmul(x[:0], weight, kernel=kernel).shape == (0, 3, 6)


@here
def test_results_do_not_depend_on_the_number_of_threads():
    weight, x = matrix(200, 320), torch.randn(1, 320).bfloat16()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = matmul(x, weight), matmul(x.expand(20, -1), weight), dequantize(weight)
        torch.set_num_threads(3)
        three = matmul(x, weight), matmul(x.expand(20, -1), weight), dequantize(weight)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(one, three))


def test_kernel_in_use_says_which_and_why():
    answer = kernel_in_use()
    assert answer == "avx512" or (answer.startswith("torch (") and nf4_avx512.missing() in answer)
    odd = matrix(5, 77)
    assert kernel_in_use(odd).startswith("torch (")
    x = torch.randn(2, 77)
    torch.testing.assert_close(matmul(x, odd), x @ dequantize_reference(odd).T)


def test_wrong_requests_are_refused():
    weight = matrix(6, 128)
    with pytest.raises(ValueError, match="Did you mean 'avx512'"):
        matmul(torch.randn(1, 128), weight, kernel="avx51")
    with pytest.raises(ValueError, match="cannot be used here"):
        matmul(torch.randn(1, 77), matrix(5, 77), kernel="avx512")
    with pytest.raises(ValueError, match="x has 64 features"):
        matmul(torch.randn(1, 64), weight)


TRITON = """
import torch
from grainwise.compress import nf4
from grainwise.kernels import nf4_triton
from grainwise.kernels.nf4_matmul import dequantize_reference
for rows, out, k, block, double in ((1, 70, 64, 64, True), (17, 33, 64, 32, False)):
    weight = nf4.quantize(torch.randn(out, k), block=block, double=double)
    x = torch.randn(rows, k)
    torch.testing.assert_close(nf4_triton.matmul(x, weight), x @ dequantize_reference(weight).T, atol=1e-4, rtol=1e-4)
print("agrees")
"""


def test_triton_kernel_agrees_in_the_interpreter():
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", TRITON], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip().endswith("agrees"), done.stderr[-2000:]


def test_rows_of_keeps_outer_scales_aligned():
    weight = matrix(600, 64)
    part = nf4_matmul.rows_of(weight, 256, 600)
    assert torch.equal(dequantize_reference(part), dequantize_reference(weight)[256:])
