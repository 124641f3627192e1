"""The 4-bit number formats of QLoRA (arXiv 2305.14314): code books, blocks, double quantisation, and the bytes on disk.

`quantize` flattens a matrix row by row, scales every `block` consecutive weights by their largest magnitude, stores the index
of the nearest of 16 levels, and may quantise the scales again to 8 bits. `state_tensors` and `from_state` are the layout that
bitsandbytes writes, byte for byte, for nf4 and fp4.

The nf4 levels follow the authors' code, which checkpoints use, not the midpoint formula of the paper; they differ by up to
0.02. int4 is the evenly spaced control of the paper's comparison and has no counterpart in bitsandbytes.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from grainwise.kernels.nf4_matmul import OUTER, BlockMatrix
from grainwise.naming import did_you_mean

FORMATS = ("nf4", "fp4", "int4")
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
# Quantiles of the normal distribution: with offset o = 0.9677083 (the mean of the outermost half-quantiles of 15 and 16 bins),
# the first 8 of 9 even steps from o to 0.5 give the positive levels, the first 7 of 8 the negative ones; over the largest.
# Kept as numbers, because files carry these very floats and a recomputation may differ in the last bit.
NORMAL_FLOAT = (
    -1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.091050036, 0.0,
    0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0,
)  # fmt: skip
SMALLEST = 1e-38  # stands in for the scale of an all-zero block


@functools.cache
def levels(kind: str) -> Tensor:
    """The 16 levels of a format, float32, in the order of their codes; largest magnitude 1."""
    if kind not in FORMATS:
        raise ValueError(f"unknown 4-bit format {kind!r}. {did_you_mean(kind, FORMATS)}")
    if kind == "nf4":
        return torch.tensor(NORMAL_FLOAT)
    if kind == "fp4":  # sign, two exponent bits, one mantissa bit; code 8 is a second zero
        positive = [0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0]
        return torch.tensor([*positive, *(-v for v in positive)]) / 12.0
    return torch.tensor([*range(-7, 8), 0]) / 7.0


@functools.cache
def dynamic_map() -> Tensor:
    """The signed 8-bit map with a dynamic exponent, float32 (256,), ascending.

    Seven decades, 10^-6 to 1; each holds twice as many evenly spaced values as the one below. Plus 0 and 1.
    """
    values = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float32)
        middles = (edges[:-1] + edges[1:]) / 2
        values += (10 ** (decade - 6) * middles).tolist()
        values += (-(10 ** (decade - 6)) * middles).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32)


def nearest(values: Tensor, table: Tensor) -> Tensor:
    """Index into `table` (1-D, any order) of the entry nearest to each value, long; ties go to the smaller entry."""
    ordered, order = table.sort(stable=True)
    middles = (ordered[:-1] + ordered[1:]) / 2
    return order[torch.bucketize(values, middles)]


def check(weight: Tensor, block: int, name: str = "the weight") -> None:
    """Refuse what cannot be quantised: wrong type, block or shape, NaN or infinity (naming the tensor)."""
    if not weight.is_floating_point() or weight.dtype not in FLOATS:
        raise TypeError(f"{name} is {weight.dtype}; 4-bit blocks hold float32, bfloat16 or float16: convert it first")
    if weight.ndim != 2:
        raise ValueError(f"{name} must be a matrix (out, in), got shape {tuple(weight.shape)}")
    if block not in BLOCKS:
        raise ValueError(f"block must be a power of two from 32 to 4096, got {block}")
    if not torch.isfinite(weight).all():
        raise ValueError(f"{name} holds NaN or infinity: repair the checkpoint before quantising it")


def quantize(
    weight: Tensor, kind: str = "nf4", *, block: int = 64, double: bool = True, name: str = "the weight"
) -> BlockMatrix:
    """A matrix (out, in) in 4-bit blocks. double: quantise the scales to 8 bits too. name: for error messages.

    Raises TypeError or ValueError as `check` says, and ValueError for an unknown format.
    """
    table = levels(kind)
    check(weight, block, name)
    flat = weight.detach().reshape(-1).float()
    scaled, absmax = _scaled(flat, block)
    codes = nearest(functional.pad(scaled, (0, scaled.numel() % 2)), table.to(flat.device)).to(torch.uint8)
    packed = ((codes[::2] << 4) | codes[1::2])[:, None]
    matrix = BlockMatrix(packed, table.to(flat.device), absmax, (weight.shape[0], weight.shape[1]), block)
    return _quantize_scales(matrix) if double else matrix


def _scaled(flat: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """(values divided by the largest magnitude of their block, those magnitudes)."""
    whole = flat.numel() // block * block
    blocks = flat[:whole].view(-1, block)
    absmax = blocks.abs().amax(dim=1)
    scaled = (blocks * (1.0 / absmax.clamp(min=SMALLEST))[:, None]).clamp(-1, 1).reshape(-1)
    if whole < flat.numel():  # a shorter last block
        tail = flat[whole:]
        largest = tail.abs().max().clamp(min=SMALLEST)
        absmax = torch.cat([absmax, largest[None]])
        scaled = torch.cat([scaled, (tail / largest).clamp(-1, 1)])
    return scaled, absmax


def _quantize_scales(matrix: BlockMatrix) -> BlockMatrix:
    """Double quantisation: subtract the mean of the scales, then 8-bit blocks of 256 in the dynamic map."""
    table = dynamic_map().to(matrix.absmax.device)
    offset = matrix.absmax.mean()
    codes, outer = _codes_8bit(matrix.absmax - offset, table)
    return BlockMatrix(
        matrix.packed, matrix.levels, codes, matrix.shape, matrix.block, nested_absmax=outer, nested_map=table, offset=offset
    )


def _codes_8bit(values: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """(codes uint8, float32 scale of each 256 values).

    Each scaled value is first rounded to one of 65,536 even steps, as bitsandbytes does on the CPU: without it about one code
    in 600 would be the neighbour of theirs.
    """
    blocks = functional.pad(values, (0, -len(values) % OUTER)).view(-1, OUTER)
    outer = blocks.abs().amax(dim=1)
    inverse = torch.where(outer > 0, 1.0 / outer.clamp(min=SMALLEST), 0.0)
    scaled = (blocks * inverse[:, None]).clamp(-1, 1)
    steps = ((scaled + 1.0) * 0.5 * 65535 + 0.5).floor()
    codes = nearest(-1.0 + (2.0 * steps) / 65535, table)
    return torch.where(outer[:, None] > 0, codes, 0).flatten()[: len(values)].to(torch.uint8), outer


def bits_per_weight(matrix: BlockMatrix) -> float:
    """Measured from the tensors: codes, scales, outer scales and offset (the shared tables are not counted)."""
    parts = [matrix.packed, matrix.absmax, matrix.nested_absmax, matrix.offset]
    return 8 * sum(t.numel() * t.element_size() for t in parts if t is not None) / matrix.numel


def state_tensors(matrix: BlockMatrix, kind: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """What stands behind `weight.` in a safetensors file of bitsandbytes. dtype: what the matrix was before."""
    about = {
        "quant_type": kind,
        "blocksize": matrix.block,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": list(matrix.shape),
    }
    tensors = {"absmax": matrix.absmax, "quant_map": matrix.levels}
    if matrix.nested_absmax is not None:
        assert matrix.nested_map is not None
        assert matrix.offset is not None
        tensors |= {"nested_absmax": matrix.nested_absmax, "nested_quant_map": matrix.nested_map.clone()}
        about |= {"nested_blocksize": OUTER, "nested_dtype": "float32", "nested_offset": matrix.offset.item()}
    raw = json.dumps(about).encode()
    return tensors | {f"quant_state.bitsandbytes__{kind}": torch.tensor(list(raw), dtype=torch.uint8)}


def from_state(packed: Tensor, tensors: Mapping[str, Tensor]) -> tuple[BlockMatrix, str, torch.dtype]:
    """Undo `state_tensors`: (matrix, format, type of the original weight).

    Raises ValueError for a missing part, an unknown format, or sizes that do not fit each other (a damaged file).
    """
    states = [k for k in tensors if k.startswith("quant_state.bitsandbytes__")]
    if len(states) != 1 or not {"absmax", "quant_map"} <= tensors.keys():
        raise ValueError(f"no 4-bit matrix: expected absmax, quant_map and one quant_state entry, found {sorted(tensors)}")
    try:
        about = json.loads(bytes(tensors[states[0]].cpu().tolist()))
        kind, shape = about["quant_type"], tuple(about["shape"])
        block, dtype = about["blocksize"], getattr(torch, about["dtype"])
    except (ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"the entry {states[0]!r} does not describe a 4-bit matrix: {error}") from error
    if kind not in FORMATS:
        raise ValueError(f"unknown 4-bit format {kind!r}. {did_you_mean(kind, FORMATS)}")
    matrix = BlockMatrix(packed, tensors["quant_map"], tensors["absmax"], shape, block)
    if "nested_absmax" in tensors:
        if about.get("nested_blocksize") != OUTER:
            raise ValueError(f"the scales are in blocks of {about.get('nested_blocksize')}; only {OUTER} is supported")
        matrix = BlockMatrix(
            packed, tensors["quant_map"], tensors["absmax"], shape, block, nested_absmax=tensors["nested_absmax"],
            nested_map=tensors["nested_quant_map"], offset=torch.tensor(about["nested_offset"], device=packed.device),
        )  # fmt: skip
    _check_sizes(matrix)
    return matrix, kind, dtype


def _check_sizes(matrix: BlockMatrix) -> None:
    blocks = -(-matrix.numel // matrix.block)
    expected = {"weight": (-(-matrix.numel // 2), matrix.packed.numel()), "absmax": (blocks, matrix.absmax.numel())}
    if matrix.nested_absmax is not None:
        expected["nested_absmax"] = (-(-blocks // OUTER), matrix.nested_absmax.numel())
    for name, (wanted, found) in expected.items():
        if wanted != found:
            raise ValueError(f"{name} has {found} entries, a matrix {matrix.shape} in blocks of {matrix.block} needs {wanted}")
