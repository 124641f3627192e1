"""The CPU code of `grainwise.kernels.nf4_matmul`: 4-bit decode and multiply in AVX-512, generated as LLVM IR.

Words used below. A *block* is a run of weights with one scale. Two 4-bit codes share a byte, the even one in the high half.
`vpermw` and `vpermps` look up 32 or 16 table entries at once; `vdpbf16ps` adds 32 bf16 products to 16 float sums.

* `gemv`: 1 to 4 rows of x. 128 codes are one 512-bit load; read as 16-bit words, their four nibbles are reached by shifting by
  0, 4, 8 and 12, and `vpermw` turns each straight into a bf16 level. x is reordered once to match, so nothing is unpacked.
  Levels are multiplied first and the block's scale once per block and row, in float32. In float32, words of 32 bits.
* `gemm`: many rows. A tile of weights is decoded to bf16 in the second-level cache and multiplied from there by a
  6 x 64 register tile; the decoded matrix never reaches memory.
* `dequantize`: the whole matrix, for the backward pass and for float32 products with many rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from llvmlite import ir
from torch import Tensor

from grainwise.kernels import llvm_code
from grainwise.kernels.llvm_code import F32, I1, I8, I16, I32, I64, PTR, V16B, V16F, V16I, V32B, V32H, V64I, Code, Machine

if TYPE_CHECKING:
    from grainwise.kernels.nf4_matmul import BlockMatrix

NEEDED = ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vbmi", "avx512bf16")
ROWS, PANEL = 6, 4  # the register tile of `gemm`: 6 weight rows by 4 vectors of 16 rows of x: 24 of the 32 registers
TILE_ROWS, TILE_K = 192, 512  # decoded weights held at a time: 192 KiB of bf16, inside a 1 MiB second-level cache
GEMV_ROWS = 4  # rows of x that share one decode in `gemv`
SHARED = 8  # partial sums of `gemv`: weight rows that share the loads of x, times rows of x
AHEAD = 16384  # bytes of codes that `gemv` asks for in advance


def missing() -> str:
    """Why these kernels cannot run here; empty when they can."""
    return llvm_code.missing(NEEDED)


class Weights:
    """The packed matrix inside a kernel: codes and scales by weight index. Arguments 0 to 6 of every kernel."""

    ARGUMENTS = 7

    def __init__(self, code: Code, argument: Callable[[int], ir.Value], block: int, nested: bool) -> None:
        self.code, self.block, self.nested = code, block, nested
        self.packed, self.levels, self.constants, self.nested_scales, self.nested_map, self.offset_at = (
            code.b.inttoptr(argument(i), PTR) for i in range(6)
        )
        self.k = argument(6)
        self.offset = code.load(F32, self.offset_at, code.i(0)) if nested else None

    def scale(self, block: ir.Value) -> ir.Value:
        """The float32 scale of block number `block`; with double quantisation, decoded from its 8-bit code."""
        c = self.code
        if not self.nested:
            return c.load(F32, self.constants, c.b.shl(block, c.i(2)))
        index = c.b.zext(c.load(I8, self.constants, block), I64)
        value = c.load(F32, self.nested_map, c.b.shl(index, c.i(2)))
        outer = c.load(F32, self.nested_scales, c.b.shl(c.b.lshr(block, c.i(8)), c.i(2)))
        return c.b.fadd(c.b.fmul(value, outer), self.offset)

    def scales_of(self, first: ir.Value, count: ir.Value, room: ir.Value) -> ir.Value:
        """Address of the float32 scales of blocks first to first + count - 1, decoded into `room` where they are 8-bit codes.

        Decoding looks up the four bytes of 64 floats at a time, from aligned groups of codes, so that one outer scale serves.
        """
        c = self.code
        if not self.nested:
            return c.at(self.constants, c.b.shl(first, c.i(2)))
        start = c.b.and_(first, c.i(-64))
        with c.loop(start, c.b.add(first, count), 64) as at:
            codes = self._codes64(at, c.b.add(first, count))
            outer = c.splat(c.load(F32, self.nested_scales, c.b.shl(c.b.lshr(at, c.i(8)), c.i(2))))
            for i, value in enumerate(self._floats64(codes)):
                place = c.b.add(c.b.shl(c.b.sub(at, start), c.i(2)), c.i(64 * i))
                c.store(c.b.fadd(c.b.fmul(value, outer), c.splat(self.offset)), room, place)
        return c.at(room, c.b.shl(c.b.sub(first, start), c.i(2)))

    def _codes64(self, at: ir.Value, end: ir.Value) -> ir.Value:
        c = self.code
        lanes = ir.Constant(ir.VectorType(I64, 64), list(range(64)))
        mask = c.b.icmp_signed("<", lanes, c.splat(c.b.sub(end, at), 64))
        zero = ir.Constant(V64I, [0] * 64)
        return c.intrinsic("llvm.masked.load.v64i8.p0", V64I, c.at(self.constants, at), ir.Constant(I32, 1), mask, zero)

    def _floats64(self, codes: ir.Value) -> list[ir.Value]:
        """map[code] for 64 codes: byte p of every float comes from plane p of the map (256 bytes, behind the map itself)."""
        c = self.code
        planes = []
        for p in range(4):
            table = [c.load(V64I, self.nested_map, c.i(1024 + 256 * p + 64 * q)) for q in range(4)]
            look_up = "llvm.x86.avx512.vpermi2var.qi.512"  # two registers, 128 entries, by the low seven bits
            low, high = (c.intrinsic(look_up, V64I, table[q], codes, table[q + 1]) for q in (0, 2))
            planes.append(c.b.select(c.b.icmp_signed("<", codes, ir.Constant(V64I, [0] * 64)), high, low))
        riffle = [lane for i in range(64) for lane in (i, 64 + i)]
        pairs = [c.b.bitcast(c.pick(planes[p], planes[p + 1], riffle), ir.VectorType(I16, 64)) for p in (0, 2)]
        whole = c.b.bitcast(c.pick(pairs[0], pairs[1], riffle), ir.VectorType(F32, 64))
        return [c.pick(whole, whole, list(range(16 * i, 16 * i + 16))) for i in range(4)]

    def decode32(self, weight: ir.Value, table: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Levels of the even and of the odd weights among the 32 from index `weight` on, 16 floats each."""
        c = self.code
        codes = c.b.zext(c.load(ir.VectorType(I8, 16), self.packed, c.b.lshr(weight, c.i(1))), V16I)
        high = c.b.lshr(codes, ir.Constant(V16I, [4] * 16))
        look_up = "llvm.x86.avx512.permvar.sf.512"  # uses the low four bits of each index
        return c.intrinsic(look_up, V16F, table, high), c.intrinsic(look_up, V16F, table, codes)


def _kernel(module: ir.Module, name: str, block: int, nested: bool) -> tuple[Code, Weights, Any, ir.Value, ir.Value, ir.Value]:
    """Open `void name(int64* arguments, first, last, thread)` and the packed matrix in it."""
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [PTR, I64, I64, I64]), name)
    code = Code(ir.IRBuilder(function.append_basic_block("entry")))

    def argument(i: int) -> ir.Value:
        return code.load(I64, function.args[0], code.i(8 * i))

    body = function.append_basic_block("start")
    code.b.branch(body)
    code.b.position_at_end(body)
    weights = Weights(code, argument, block, nested)
    extra = lambda i: argument(Weights.ARGUMENTS + i)  # noqa: E731
    return code, weights, extra, function.args[1], function.args[2], function.args[3]


def build_gemv(module: ir.Module, rows: int, block: int, nested: bool, bf16: bool) -> None:
    """y[i, n] = sum over k of x[i, k] w[n, k] for `rows` rows i; x (rows, k) bf16 or float32, y float32 (rows, out)."""
    c, w, extra, first, last, thread = _kernel(module, "kernel", block, nested)
    x, y, out = c.b.inttoptr(extra(0), PTR), c.b.inttoptr(extra(1), PTR), extra(2)
    size, together = (2 if bf16 else 4), SHARED // rows  # bytes of a number; weight rows that share the loads of x
    whole, padded = c.b.and_(w.k, c.i(-128)), c.b.and_(c.b.add(w.k, c.i(127)), c.i(-128))
    room = c.at(c.b.inttoptr(extra(3), PTR), c.b.mul(thread, extra(4)))
    _reorder(c, x, room, rows, w.k, whole, padded, size)
    behind_x = c.at(room, c.b.mul(padded, c.i(size * rows)))
    blocks = c.b.udiv(w.k, c.i(block))
    look_up = _level_reader(c, w, bf16)
    zero = ir.Constant(V16F, [0.0] * 16)

    def chunk(words: list[ir.Value], at: ir.Value, scales: list[ir.Value], totals: list[list[ir.Value]], length: int) -> None:
        levels = [look_up(word) for word in words]
        parts = [[zero] * rows for _ in words]
        for s in range(len(levels[0])):
            for i in range(rows):
                offset = c.b.add(c.b.mul(c.b.add(at, c.b.mul(padded, c.i(i))), c.i(size)), c.i(64 * s))
                numbers = c.load(V32B if bf16 else V16F, room, offset)
                for j, part in enumerate(parts):
                    part[i] = (c.dot if bf16 else c.add_product)(part[i], levels[j][s], numbers)
        for j, part in enumerate(parts):
            lanes = _scale_lanes(c, block, scales[j], at, length)
            for i in range(rows):
                c.b.store(c.fma(part[i], lanes, c.get(totals[j][i], V16F)), totals[j][i])

    with c.loop(first, last, together) as top:
        row = [c.smaller(c.b.add(top, c.i(j)), c.b.sub(last, c.i(1))) for j in range(together)]
        start = c.b.mul(top, blocks)
        run = w.scales_of(start, c.b.sub(c.b.mul(c.b.add(row[-1], c.i(1)), blocks), start), behind_x)
        scales = [c.at(run, c.b.shl(c.b.sub(c.b.mul(r, blocks), start), c.i(2))) for r in row]
        codes = [c.at(w.packed, c.b.lshr(c.b.mul(r, w.k), c.i(1))) for r in row]
        totals = [[c.variable(zero) for _ in range(rows)] for _ in row]
        with c.loop(c.i(0), whole, 128) as at:
            for code in codes:
                c.prefetch(code, c.b.add(c.b.lshr(at, c.i(1)), c.i(AHEAD)))
            chunk([c.load(V32H, code, c.b.lshr(at, c.i(1))) for code in codes], at, scales, totals, 128)
        with c.b.if_then(c.b.icmp_signed("<", whole, w.k)):  # 64 weights remain; x is zero beyond them
            half = [c.load(ir.VectorType(I16, 16), code, c.b.lshr(whole, c.i(1))) for code in codes]
            words = [c.pick(h, ir.Constant(h.type, [0] * 16), list(range(32))) for h in half]
            chunk(words, whole, scales, totals, 64)
        for j, r in enumerate(row):
            for i in range(rows):
                c.store(c.sum(c.get(totals[j][i], V16F)), y, c.b.shl(c.b.add(c.b.mul(out, c.i(i)), r), c.i(2)))
    c.b.ret_void()


def _level_reader(c: Code, w: Weights, bf16: bool) -> Callable[[ir.Value], list[ir.Value]]:
    """A function from 128 codes (32 words of 16 bits) to the levels of weights 0, 4, 8.. then 1, 5.. 2, 6.. 3, 7.. as bf16,
    or of weights 0, 8, 16.. then 1, 9.. and so on as float32.

    The look-ups use the low bits of each word only, so a shift is all the unpacking there is. (On Zen 4 shifts, look-ups and
    products run on different execution units.)
    """
    table = c.load(V32H, w.levels, c.i(64)) if bf16 else c.load(V16F, w.levels, c.i(0))

    def right(words: ir.Value, bits: int) -> ir.Value:
        return c.b.lshr(words, ir.Constant(V32H, [bits] * 32))

    def bf16_levels(words: ir.Value) -> list[ir.Value]:
        name = "llvm.x86.avx512.permvar.hi.512"
        return [c.b.bitcast(c.intrinsic(name, V32H, table, right(words, bits)), V32B) for bits in (4, 0, 12, 8)]

    def float_levels(words: ir.Value) -> list[ir.Value]:
        wide = c.b.bitcast(words, V16I)
        name = "llvm.x86.avx512.permvar.sf.512"
        shifted = [c.b.lshr(wide, ir.Constant(V16I, [bits] * 16)) for bits in (4, 0, 12, 8, 20, 16, 28, 24)]
        return [c.intrinsic(name, V16F, table, index) for index in shifted]

    return bf16_levels if bf16 else float_levels


def _scale_lanes(c: Code, block: int, room: ir.Value, weight: ir.Value, length: int) -> ir.Value:
    """16 floats: the scales of the `length` weights from `weight` on, spread over the sums that each of them belongs to.

    In `gemv`, sum number i (of 16) collects weights 8 i to 8 i + 7 of 128; of 64, the later sums are zero.
    """
    at = c.b.shl(c.b.udiv(weight, c.i(block)), c.i(2))
    lanes = c.splat(c.load(F32, room, at))
    for i in range(1, length // block):
        later = ir.Constant(ir.VectorType(I1, 16), [int(8 * lane >= block * i) for lane in range(16)])
        lanes = c.b.select(later, c.splat(c.load(F32, room, c.b.add(at, c.i(4 * i)))), lanes)
    return lanes


def _reorder(
    c: Code, x: ir.Value, room: ir.Value, rows: int, k: ir.Value, whole: ir.Value, padded: ir.Value, size: int
) -> None:
    """Write x so that each 128 numbers come in the order in which `_level_reader` gives the levels; zeros behind the end."""
    kind = ir.VectorType(I16 if size == 2 else I32, 64 // size)
    streams = 2 * size  # 4 or 8

    def scatter(vectors: list[ir.Value], i: int, at: ir.Value) -> None:
        while len(vectors) > 1:  # join to one vector of 128 numbers; LLVM splits it again
            wide = range(2 * vectors[0].type.count)
            vectors = [c.pick(vectors[j], vectors[j + 1], list(wide)) for j in range(0, len(vectors), 2)]
        for s in range(streams):
            stream = c.pick(vectors[0], vectors[0], [streams * j + s for j in range(128 // streams)])
            c.store(stream, room, c.b.add(c.b.mul(c.b.add(at, c.b.mul(padded, c.i(i))), c.i(size)), c.i(64 * s)))

    for i in range(rows):
        source = c.at(x, c.b.mul(k, c.i(size * i)))

        def read(at: ir.Value, j: int, source: ir.Value = source) -> ir.Value:
            return c.load(kind, source, c.b.add(c.b.mul(at, c.i(size)), c.i(64 * j)))

        with c.loop(c.i(0), whole, 128) as at:
            scatter([read(at, j) for j in range(streams)], i, at)
        with c.b.if_then(c.b.icmp_signed("<", whole, k)):
            zeros = [ir.Constant(kind, [0] * kind.count)] * (streams // 2)
            scatter([read(whole, j) for j in range(streams // 2)] + zeros, i, whole)


def _decoded_bf16(c: Code, w: Weights, weight: ir.Value, table: ir.Value) -> ir.Value:
    """The 32 weights from index `weight` on, level times scale in float32, rounded to bf16, in order."""
    scale = c.splat(w.scale(c.b.udiv(weight, c.i(w.block))))
    even, odd = (c.b.fmul(level, scale) for level in w.decode32(weight, table))
    both = c.intrinsic("llvm.x86.avx512bf16.cvtne2ps2bf16.512", V32B, odd, even)
    both = c.b.bitcast(both, V32H)
    return c.pick(both, both, [lane for i in range(16) for lane in (i, 16 + i)])


def build_dequantize(module: ir.Module, block: int, nested: bool, bf16: bool) -> None:
    """Decode groups of 32 weights [first, last) into a flat array of bf16 or float32."""
    c, w, extra, first, last, _ = _kernel(module, "kernel", block, nested)
    out = c.b.inttoptr(extra(0), PTR)
    table = c.load(V16F, w.levels, c.i(0))
    with c.loop(first, last) as group:
        weight = c.b.shl(group, c.i(5))
        if bf16:
            c.store(_decoded_bf16(c, w, weight, table), out, c.b.shl(weight, c.i(1)))
        else:
            scale = c.splat(w.scale(c.b.udiv(weight, c.i(block))))
            even, odd = (c.b.fmul(level, scale) for level in w.decode32(weight, table))
            for half in range(2):
                lanes = [lane for i in range(8 * half, 8 * half + 8) for lane in (i, 16 + i)]
                c.store(c.pick(even, odd, lanes), out, c.b.add(c.b.shl(weight, c.i(2)), c.i(64 * half)))
    c.b.ret_void()


def build_pack(module: ir.Module) -> None:
    """Transpose x, bf16 (16 padded rows.., k), to panels for `gemm`: (panel, k / 2, 16 x vectors of the panel) pairs.

    Items are groups of 16 rows; rows behind the last one are read as the last one (their products are dropped).
    """
    c, w, extra, first, last, _ = _kernel(module, "kernel", 64, False)
    x, panels, count = c.b.inttoptr(extra(0), PTR), c.b.inttoptr(extra(1), PTR), extra(2)
    groups = extra(3)
    pairs = c.b.lshr(w.k, c.i(1))
    with c.loop(first, last) as group:
        panel = c.b.udiv(group, c.i(PANEL))
        width = c.smaller(c.i(PANEL), c.b.sub(groups, c.b.mul(panel, c.i(PANEL))))  # vectors in this panel
        base = c.at(panels, c.b.mul(c.b.mul(panel, pairs), c.i(4 * 16 * PANEL)))
        base = c.at(base, c.b.mul(c.b.sub(group, c.b.mul(panel, c.i(PANEL))), c.i(64)))
        sources = []
        for i in range(16):
            row = c.smaller(c.b.add(c.b.shl(group, c.i(4)), c.i(i)), c.b.sub(count, c.i(1)))
            sources.append(c.at(x, c.b.mul(row, c.b.shl(w.k, c.i(1)))))
        with c.loop(c.i(0), pairs, 16) as pair:
            columns = c.transpose([c.load(V16I, source, c.b.shl(pair, c.i(2))) for source in sources])
            for j, column in enumerate(columns):
                c.store(column, base, c.b.mul(c.b.add(pair, c.i(j)), c.b.mul(width, c.i(64))))
    c.b.ret_void()


def _micro(module: ir.Module, width: int) -> ir.Function:
    """Add a 6-row tile of weights times 16 `width` rows of x to the sums. (x, tile, sums, pairs, bytes per row of sums)"""
    kind = ir.FunctionType(ir.VoidType(), [PTR, PTR, PTR, I64, I64])
    function = ir.Function(module, kind, f"micro{width}")
    function.attributes.add("noinline")
    c = Code(ir.IRBuilder(function.append_basic_block("entry")))
    x, tile, sums, pairs, stride = function.args
    start = function.append_basic_block("start")
    c.b.branch(start)
    c.b.position_at_end(start)

    def place(r: int, v: int) -> ir.Value:
        return c.b.add(c.b.mul(stride, c.i(r)), c.i(64 * v))

    slots = {(r, v): c.variable(c.load(V16F, sums, place(r, v))) for r in range(ROWS) for v in range(width)}
    with c.loop(c.i(0), pairs) as pair:
        at = c.b.mul(pair, c.i(64 * width))
        columns = [c.load(V32B, x, c.b.add(at, c.i(64 * v))) for v in range(width)]
        for r in range(ROWS):
            weight = c.load(I32, tile, c.b.add(c.b.shl(pair, c.i(2)), c.i(2 * TILE_K * r)))
            both = c.b.bitcast(c.splat(weight), V32B)
            for v in range(width):
                c.b.store(c.dot(c.get(slots[r, v], V16F), columns[v], both), slots[r, v])
    for (r, v), slot in slots.items():
        c.store(c.get(slot, V16F), sums, place(r, v))
    c.b.ret_void()
    return function


def build_gemm(module: ir.Module, block: int, nested: bool) -> None:
    """y (rows padded to 16, out) bf16 = panels of x times the decoded weights; items are rows of the weight."""
    micro = {width: _micro(module, width) for width in range(1, PANEL + 1)}
    c, w, extra, first, last, thread = _kernel(module, "kernel", block, nested)
    panels, y, out, groups = c.b.inttoptr(extra(0), PTR), c.b.inttoptr(extra(1), PTR), extra(2), extra(3)
    tile = c.at(c.b.inttoptr(extra(4), PTR), c.b.mul(thread, extra(5)))
    sums = c.at(tile, c.i(2 * TILE_ROWS * TILE_K))
    stride = c.b.shl(groups, c.i(6))
    pairs = c.b.lshr(w.k, c.i(1))
    table = c.load(V16F, w.levels, c.i(0))
    with c.loop(first, last, TILE_ROWS) as top:
        rows = c.smaller(c.i(TILE_ROWS), c.b.sub(last, top))
        with c.loop(c.i(0), c.b.mul(c.i(TILE_ROWS), stride), 64) as at:
            c.store(ir.Constant(V16F, [0.0] * 16), sums, at)
        with c.loop(c.i(0), w.k, TILE_K) as left:
            depth = c.smaller(c.i(TILE_K), c.b.sub(w.k, left))
            with c.loop(c.i(0), rows) as row, c.loop(c.i(0), depth, 32) as at:
                weight = c.b.add(c.b.mul(c.b.add(top, row), w.k), c.b.add(left, at))
                place = c.b.shl(c.b.add(c.b.mul(row, c.i(TILE_K)), at), c.i(1))
                c.store(_decoded_bf16(c, w, weight, table), tile, place)
            with c.loop(c.i(0), groups, PANEL) as group:
                width = c.smaller(c.i(PANEL), c.b.sub(groups, group))
                panel = c.at(panels, c.b.mul(c.b.mul(group, pairs), c.i(64)))
                panel = c.at(panel, c.b.mul(c.b.mul(c.b.lshr(left, c.i(1)), width), c.i(64)))
                with c.loop(c.i(0), rows, ROWS) as row:
                    here = c.at(sums, c.b.add(c.b.mul(row, stride), c.b.shl(group, c.i(6))))
                    weights = c.at(tile, c.b.mul(row, c.i(2 * TILE_K)))
                    for count, function in micro.items():
                        with c.b.if_then(c.b.icmp_signed("==", width, c.i(count))):
                            c.b.call(function, [panel, weights, here, c.b.lshr(depth, c.i(1)), stride])
        _write_out(c, sums, y, stride, groups, out, top, rows)
    c.b.ret_void()


def _write_out(
    c: Code, sums: ir.Value, y: ir.Value, stride: ir.Value, groups: ir.Value, out: ir.Value, top: ir.Value, rows: ir.Value
) -> None:
    """Transpose the sums (weight rows, rows of x) into y (rows of x, out), rounded to bf16."""
    lanes = ir.Constant(ir.VectorType(I64, 16), list(range(16)))
    with c.loop(c.i(0), rows, 16) as row:
        left = c.splat(c.b.sub(rows, row))
        mask = c.b.icmp_signed("<", lanes, left)
        with c.loop(c.i(0), groups) as group:
            start = c.at(sums, c.b.add(c.b.mul(row, stride), c.b.shl(group, c.i(6))))
            block = [c.load(V16F, start, c.b.mul(stride, c.i(i))) for i in range(16)]
            for i, line in enumerate(c.transpose(block)):
                rounded = c.intrinsic("llvm.x86.avx512bf16.cvtneps2bf16.512", V16B, line)
                half = c.b.bitcast(rounded, ir.VectorType(I16, 16))
                index = c.b.add(c.b.mul(c.b.add(c.b.shl(group, c.i(4)), c.i(i)), out), c.b.add(top, row))
                place = c.at(y, c.b.shl(index, c.i(1)))
                c.intrinsic("llvm.masked.store.v16i16.p0", ir.VoidType(), half, place, ir.Constant(I32, 2), mask)


@functools.cache
def machine(kind: str, block: int = 64, nested: bool = False, rows: int = 1) -> Machine:
    """The compiled kernel of this kind: gemv, gemv32, gemm, pack, dequantize_bf16 or dequantize_f32."""
    builders: dict[str, Callable[[ir.Module], None]] = {
        "gemv": lambda m: build_gemv(m, rows, block, nested, True),
        "gemv32": lambda m: build_gemv(m, rows, block, nested, False),
        "gemm": lambda m: build_gemm(m, block, nested),
        "pack": build_pack,
        "dequantize_bf16": lambda m: build_dequantize(m, block, nested, True),
        "dequantize_f32": lambda m: build_dequantize(m, block, nested, False),
    }
    return Machine(builders[kind])


@functools.lru_cache(maxsize=8)
def _level_tables(levels: bytes) -> Tensor:
    """The levels as 16 floats, then twice as 16 bf16 (128 bytes)."""
    floats = torch.frombuffer(bytearray(levels), dtype=torch.float32)
    halves = floats.to(torch.bfloat16).repeat(2).view(torch.uint8)
    return torch.cat([floats.view(torch.uint8), halves])


@functools.lru_cache(maxsize=8)
def _map_tables(nested_map: bytes) -> Tensor:
    """The 256 floats, then their first bytes, second bytes, third bytes and fourth bytes (2048 bytes)."""
    raw = torch.frombuffer(bytearray(nested_map), dtype=torch.uint8)
    return torch.cat([raw, raw.view(256, 4).T.reshape(-1)])


def _packed(weight: BlockMatrix) -> tuple[tuple[int, ...], list[Tensor]]:
    """The first seven arguments of every kernel, and the tensors that must live as long as they are used."""
    levels = _level_tables(weight.levels.numpy().tobytes())
    alive, nested = [levels], (0, 0, 0)
    if weight.nested_absmax is not None:
        assert weight.nested_map is not None
        assert weight.offset is not None
        tables = _map_tables(weight.nested_map.numpy().tobytes())
        alive.append(tables)
        nested = (weight.nested_absmax.data_ptr(), tables.data_ptr(), weight.offset.data_ptr())
    return (weight.packed.data_ptr(), levels.data_ptr(), weight.absmax.data_ptr(), *nested, weight.shape[1]), alive


def _room(size: int) -> tuple[Tensor, int]:
    """Scratch memory for every thread and its size for one, in bytes."""
    size = -(-size // 64) * 64
    return torch.empty(size * torch.get_num_threads(), dtype=torch.uint8), size


def few_rows(x: Tensor, weight: BlockMatrix) -> Tensor:
    """x W^T in float32 for 1 to 4 rows of bf16 or float32."""
    (rows, k), out = x.shape, weight.shape[0]
    arguments, _alive = _packed(weight)
    y = torch.empty(rows, out)
    padded = -(-k // 128) * 128
    room, size = _room(padded * x.element_size() * rows + (k // weight.block * SHARED + 128) * 4)
    kind = "gemv" if x.dtype == torch.bfloat16 else "gemv32"
    kernel = machine(kind, weight.block, weight.nested, rows)
    kernel(out, 16, *arguments, x.data_ptr(), y.data_ptr(), out, room.data_ptr(), size)
    return y


def many_rows(x: Tensor, weight: BlockMatrix, y: Tensor) -> None:
    """Write x W^T into y; both bf16, contiguous. The room for y is padded to 16 rows, so a copy is made when it is not."""
    (rows, k), out = x.shape, weight.shape[0]
    arguments, _alive = _packed(weight)
    groups = -(-rows // 16)
    panels = torch.empty(groups * 16 * k, dtype=torch.bfloat16)
    whole = y if rows == groups * 16 else y.new_empty(groups * 16, out)
    room, size = _room(2 * TILE_ROWS * TILE_K + 64 * TILE_ROWS * groups)
    machine("pack")(groups, 1, *arguments, x.data_ptr(), panels.data_ptr(), rows, groups)
    kernel = machine("gemm", weight.block, weight.nested)
    kernel(out, 48, *arguments, panels.data_ptr(), whole.data_ptr(), out, groups, room.data_ptr(), size)
    if whole is not y:
        y.copy_(whole[:rows])


def dequantize(weight: BlockMatrix, dtype: torch.dtype) -> Tensor:
    """W in float32 or bf16, (out, in)."""
    arguments, _alive = _packed(weight)
    w = torch.empty(weight.shape, dtype=dtype)
    kind = "dequantize_bf16" if dtype == torch.bfloat16 else "dequantize_f32"
    machine(kind, weight.block, weight.nested)(weight.numel // 32, 512, *arguments, w.data_ptr())
    return w
