"""Multiplying by a matrix held in 4-bit blocks (QLoRA, arXiv 2305.14314): decode and multiply in one pass.

`matmul` gives x W^T, `matmul_transposed` gives dy W, `dequantize` gives W. Each has three implementations that agree up to
rounding: generated AVX-512 code (`nf4_avx512`), a Triton kernel (`nf4_triton`) and plain torch, the reference.
`kernel_in_use` says which one a matrix gets and why; every function also takes `kernel=` to insist on one.

The fused bf16 product of a few rows rounds each level (not level times scale) to bf16 and keeps the scales in float32, which
costs no more accuracy than rounding the product does, but the results differ from the reference in the last bf16 digits.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from grainwise.naming import did_you_mean

KERNELS = ("avx512", "triton", "torch")
OUTER = 256  # scales under one outer scale
FEW_ROWS = 12  # rows of x up to which decoding again for each four of them beats decoding to a tile
ROWS_AT_ONCE = 512  # rows of x for which the sums of a tile still fit the second-level cache
TILE_BYTES = 2**24  # of W decoded at a time where the product is left to torch; larger pieces cost page faults each time


@dataclass(slots=True, eq=False)
class BlockMatrix:
    """A matrix (out, in) in 4-bit blocks. Weights are numbered row by row; a block is `block` consecutive ones.

    packed: uint8 (ceil(out * in / 2), 1), the even weight in the high half. levels: float32 (16,).
    absmax: float32 (blocks,) scales, or their uint8 codes under double quantisation, where the scale of block b is
    nested_map[absmax[b]] * nested_absmax[b // 256] + offset.
    nested_absmax: float32 (ceil(blocks / 256),). nested_map: float32 (256,). offset: float32 scalar tensor.
    """

    packed: Tensor
    levels: Tensor
    absmax: Tensor
    shape: tuple[int, int]
    block: int = 64
    nested_absmax: Tensor | None = None
    nested_map: Tensor | None = None
    offset: Tensor | None = None

    @property
    def nested(self) -> bool:
        """Whether the scales are themselves quantised."""
        return self.nested_absmax is not None

    @property
    def numel(self) -> int:
        """Number of weights."""
        return self.shape[0] * self.shape[1]

    def scales(self) -> Tensor:
        """The scale of every block, float32 (blocks,)."""
        if self.nested_absmax is None:
            return self.absmax
        assert self.nested_map is not None
        assert self.offset is not None
        outer = self.nested_absmax.repeat_interleave(OUTER)[: len(self.absmax)]
        return self.nested_map[self.absmax.long()] * outer + self.offset


def kernel_in_use(weight: BlockMatrix | None = None, device: str | torch.device = "cpu") -> str:
    """The kernel that multiplies by `weight` (or by any ordinary matrix on `device`), with the reason in brackets
    where a faster one exists but cannot be used, for example `torch (the processor lacks avx512bf16)`.
    """
    kind = torch.device(weight.packed.device if weight is not None else device).type
    why = _why_not("triton" if kind == "cuda" else "avx512", weight, kind)
    if not why:
        return "triton" if kind == "cuda" else "avx512"
    return f"torch ({why})"


def _why_not(kernel: str, weight: BlockMatrix | None, device: str) -> str:
    """Why `kernel` cannot run; empty when it can."""
    if kernel == "triton":
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        return "" if weight is None else _unfit(weight, 64)
    if kernel == "avx512":
        if device != "cpu":
            return f"the tensors are on {device}"
        from grainwise.kernels import nf4_avx512

        return nf4_avx512.missing() or ("" if weight is None else _unfit(weight, 64))
    return ""


def _unfit(weight: BlockMatrix, multiple: int) -> str:
    if weight.shape[1] % multiple or weight.shape[1] % weight.block:
        return f"rows of {weight.shape[1]} weights are not whole blocks of {max(multiple, weight.block)}"
    return ""


def _choose(weight: BlockMatrix, kernel: str | None) -> str:
    if kernel is None:
        return kernel_in_use(weight).split(" ")[0]
    if kernel not in KERNELS:
        raise ValueError(f"no kernel {kernel!r}. {did_you_mean(kernel, KERNELS)}")
    why = _why_not(kernel, weight, weight.packed.device.type)
    if why:
        raise ValueError(f"the kernel {kernel!r} cannot be used here: {why}")
    return kernel


def matmul(x: Tensor, weight: BlockMatrix, *, kernel: str | None = None) -> Tensor:
    """x W^T. x: float32 or bfloat16 (float16 too on CUDA and in torch) (..., in); returns the same type, (..., out).

    Raises ValueError for a wrong last dimension or a kernel that cannot run here.
    """
    if x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x has {x.shape[-1]} features, the matrix (out, in) = {weight.shape} needs {weight.shape[1]}")
    chosen = _choose(weight, kernel)
    if x.numel() == 0:
        return x.new_empty(*x.shape[:-1], weight.shape[0])
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    if chosen == "avx512" and x.dtype in (torch.float32, torch.bfloat16):
        y = _matmul_avx512(rows, weight)
    elif chosen == "triton":
        from grainwise.kernels import nf4_triton

        y = nf4_triton.matmul(rows, weight)
    else:
        y = functional.linear(rows, dequantize(weight, x.dtype, kernel=chosen))
    return y.view(*x.shape[:-1], weight.shape[0])


def _matmul_avx512(x: Tensor, weight: BlockMatrix) -> Tensor:
    from grainwise.kernels import nf4_avx512

    if len(x) <= nf4_avx512.GEMV_ROWS:
        return nf4_avx512.few_rows(x, weight).to(x.dtype)
    y = x.new_empty(len(x), weight.shape[0])
    if len(x) <= FEW_ROWS:
        for few, out in zip(x.split(nf4_avx512.GEMV_ROWS), y.split(nf4_avx512.GEMV_ROWS)):
            out.copy_(nf4_avx512.few_rows(few, weight))
    elif x.dtype == torch.bfloat16:
        for some, out in zip(x.split(ROWS_AT_ONCE), y.split(ROWS_AT_ONCE)):
            nf4_avx512.many_rows(some, weight, out)
    else:
        for top, tile in tiles(weight, x.dtype, "avx512"):
            y[:, top : top + len(tile)] = x @ tile.T
    return y


def matmul_transposed(dy: Tensor, weight: BlockMatrix, *, kernel: str | None = None) -> Tensor:
    """dy W, the gradient of x W^T for x. dy: (..., out); returns (..., in) of the same type."""
    rows = dy.reshape(-1, dy.shape[-1])
    dx: Tensor | None = None
    for top, tile in tiles(weight, dy.dtype, _choose(weight, kernel)):
        part = rows[:, top : top + len(tile)]
        dx = part @ tile if dx is None else torch.addmm(dx, part, tile)
    assert dx is not None
    return dx.view(*dy.shape[:-1], weight.shape[1])


def tiles(weight: BlockMatrix, dtype: torch.dtype, kernel: str) -> Iterator[tuple[int, Tensor]]:
    """(first row, rows of W) pieces, decoded one at a time; a single one where rows are not whole blocks."""
    height = weight.shape[0]
    if not weight.shape[1] % weight.block and not weight.shape[1] % 2:
        height = max(1, TILE_BYTES // (dtype.itemsize * weight.shape[1] * OUTER)) * OUTER
    for top in range(0, weight.shape[0], height):
        yield top, dequantize(rows_of(weight, top, min(top + height, weight.shape[0])), dtype, kernel=kernel)


def rows_of(weight: BlockMatrix, top: int, bottom: int) -> BlockMatrix:
    """Rows top to bottom - 1 as a view. `top` must be a multiple of 256 (or 0), so that outer scales stay aligned."""
    if (top, bottom) == (0, weight.shape[0]):
        return weight
    per_row = weight.shape[1] // weight.block
    first, last = top * per_row, bottom * per_row
    outer = None if weight.nested_absmax is None else weight.nested_absmax[first // OUTER : -(-last // OUTER)]
    return replace(
        weight,
        packed=weight.packed[top * weight.shape[1] // 2 : bottom * weight.shape[1] // 2],
        absmax=weight.absmax[first:last],
        nested_absmax=outer,
        shape=(bottom - top, weight.shape[1]),
    )


def dequantize(weight: BlockMatrix, dtype: torch.dtype = torch.float32, *, kernel: str | None = None) -> Tensor:
    """W, (out, in): level times scale in float32, rounded to `dtype`; every kernel gives the same bits."""
    chosen = _choose(weight, kernel)
    if chosen == "avx512" and dtype in (torch.float32, torch.bfloat16):
        from grainwise.kernels import nf4_avx512

        return nf4_avx512.dequantize(weight, dtype)
    return dequantize_reference(weight, dtype)


def dequantize_reference(weight: BlockMatrix, dtype: torch.dtype = torch.float32) -> Tensor:
    """`dequantize` in plain torch, for any size."""
    pairs = _pairs(weight.levels)
    values = pairs[weight.packed.flatten().long()].flatten()[: weight.numel]
    missing = -weight.numel % weight.block
    padded = functional.pad(values, (0, missing)).view(-1, weight.block) * weight.scales()[:, None]
    return padded.flatten()[: weight.numel].view(weight.shape).to(dtype)


def _pairs(levels: Tensor) -> Tensor:
    """The two levels of each byte, (256, 2)."""
    return torch.stack([levels.repeat_interleave(16), levels.repeat(16)], dim=1)
