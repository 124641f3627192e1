"""The CUDA code of `grainwise.kernels.nf4_matmul`: one Triton kernel that decodes 4-bit blocks and multiplies by them.

A program computes a tile of y = x W^T. It never interleaves the two codes of a byte: the even weights meet the even columns
of x and the odd weights the odd ones, in two products. Under TRITON_INTERPRET=1 it runs on the CPU, for tests.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from grainwise.kernels.nf4_matmul import BlockMatrix

TILE_OUT = 64


@triton.jit
def _product(
    x_ptr: Any, packed_ptr: Any, levels_ptr: Any, absmax_ptr: Any, outer_ptr: Any, map_ptr: Any, offset_ptr: Any, y_ptr: Any,
    rows: Any, out: Any, k: Any, BLOCK: tl.constexpr, NESTED: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr,
    TILE_K: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    column = (tl.program_id(1) * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)).to(tl.int64)
    pair = tl.arange(0, TILE_K // 2)
    inside = column < out
    total = tl.zeros((TILE_ROWS, TILE_COLUMNS), dtype=tl.float32)
    for start in range(0, k, TILE_K):
        here = column * k + start
        codes = tl.load(packed_ptr + here[None, :] // 2 + pair[:, None], mask=inside[None, :], other=0)
        scale = tl.load(absmax_ptr + here // BLOCK, mask=inside, other=0)
        if NESTED:
            outer = tl.load(outer_ptr + here // BLOCK // 256, mask=inside, other=0.0)
            scale = tl.load(map_ptr + scale.to(tl.int32)) * outer + tl.load(offset_ptr)
        even = tl.load(levels_ptr + (codes >> 4).to(tl.int32)) * scale[None, :]
        odd = tl.load(levels_ptr + (codes & 15).to(tl.int32)) * scale[None, :]
        place = x_ptr + row[:, None].to(tl.int64) * k + start + 2 * pair[None, :]
        x_even = tl.load(place, mask=row[:, None] < rows, other=0.0)
        x_odd = tl.load(place + 1, mask=row[:, None] < rows, other=0.0)
        total = tl.dot(x_even, even.to(x_even.dtype), total, input_precision="ieee")
        total = tl.dot(x_odd, odd.to(x_odd.dtype), total, input_precision="ieee")
    target = y_ptr + row[:, None].to(tl.int64) * out + column[None, :]
    tl.store(target, total.to(y_ptr.dtype.element_ty), mask=(row[:, None] < rows) & inside[None, :])


def matmul(x: Tensor, weight: BlockMatrix) -> Tensor:
    """x W^T for x (rows, in), contiguous, float32, float16 or bfloat16; sums in float32."""
    rows, out = len(x), weight.shape[0]
    y = torch.empty(rows, out, dtype=x.dtype, device=x.device)
    if rows == 0:
        return y
    tile_rows = 16 if rows <= 16 else 64
    nothing = weight.levels  # stands in for the pointers that are not read without double quantisation
    _product[(triton.cdiv(rows, tile_rows), triton.cdiv(out, TILE_OUT))](
        x, weight.packed, weight.levels, weight.absmax,
        nothing if weight.nested_absmax is None else weight.nested_absmax,
        nothing if weight.nested_map is None else weight.nested_map,
        nothing if weight.offset is None else weight.offset,
        y, rows, out, weight.shape[1], BLOCK=weight.block, NESTED=weight.nested,
        TILE_ROWS=tile_rows, TILE_COLUMNS=TILE_OUT, TILE_K=min(64, weight.block),
    )  # fmt: skip
    return y
