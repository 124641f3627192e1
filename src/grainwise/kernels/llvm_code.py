"""Machine code at run time from LLVM IR: a small builder, compilation, and running on every thread of torch's pool.

llvmlite (it comes with Numba) turns the IR into machine code in a tenth of a second or so, so no compiler has to be installed.
Kernels run inside the OpenMP pool of torch: a second pool would fight with it for the same cores.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import torch
from llvmlite import ir


class BFloat(ir.Type):  # type: ignore[misc]
    """LLVM's bfloat, which llvmlite has no name for."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BFloat)

    def __hash__(self) -> int:
        return hash(BFloat)


I1, I8, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
F32, PTR = ir.FloatType(), ir.PointerType()
V16I, V16F, V32H, V32B = ir.VectorType(I32, 16), ir.VectorType(F32, 16), ir.VectorType(I16, 32), ir.VectorType(BFloat(), 32)
V16B, V64I = ir.VectorType(BFloat(), 16), ir.VectorType(I8, 64)


@functools.cache
def missing(needed: tuple[str, ...]) -> str:
    """Why code with these processor features cannot run here; empty when it can."""
    if sys.platform != "linux":
        return f"the kernels need Linux, this is {sys.platform}"
    features = llvm.get_host_cpu_features()
    lacking = [name for name in needed if not features.get(name)]
    if lacking:
        return "the processor lacks " + ", ".join(lacking)
    if openmp() is None:
        return "torch was built without GNU OpenMP"
    return ""


@functools.cache
def openmp() -> Any:
    """The GNU OpenMP library that torch itself uses, or None."""
    found = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    return ctypes.CDLL(str(found[0])) if found else None


class Code:
    """An IR builder with the few operations these kernels use; every address is a byte address."""

    def __init__(self, builder: ir.IRBuilder) -> None:
        self.b = builder
        self.module = builder.module

    def i(self, value: int) -> ir.Constant:
        return ir.Constant(I64, value)

    def at(self, base: ir.Value, offset: ir.Value) -> ir.Value:
        return self.b.gep(base, [offset], source_etype=I8)

    def load(self, kind: ir.Type, base: ir.Value, offset: ir.Value) -> ir.Value:
        return self.b.load(self.at(base, offset), typ=kind, align=1)

    def store(self, value: ir.Value, base: ir.Value, offset: ir.Value) -> None:
        self.b.store(value, self.at(base, offset), align=1)

    def prefetch(self, base: ir.Value, offset: ir.Value) -> None:
        """A hint to fetch this cache line for reading, to the second-level cache; any address is allowed."""
        flags = [ir.Constant(I32, value) for value in (0, 2, 1)]
        self.intrinsic("llvm.prefetch.p0", ir.VoidType(), self.at(base, offset), *flags)

    def variable(self, value: ir.Value) -> ir.Value:
        """A mutable slot in the function's entry block (LLVM turns it into a register)."""
        with self.b.goto_entry_block():
            slot = self.b.alloca(value.type)
        self.b.store(value, slot)
        return slot

    def get(self, slot: ir.Value, kind: ir.Type) -> ir.Value:
        return self.b.load(slot, typ=kind)

    @contextmanager
    def loop(self, start: ir.Value, stop: ir.Value, step: int = 1) -> Iterator[ir.Value]:
        """`for index in range(start, stop, step)`."""
        function = self.b.function
        head, body, end = (function.append_basic_block(name) for name in ("head", "body", "end"))
        slot = self.variable(start)
        self.b.branch(head)
        self.b.position_at_end(head)
        index = self.get(slot, I64)
        self.b.cbranch(self.b.icmp_signed("<", index, stop), body, end)
        self.b.position_at_end(body)
        yield index
        self.b.store(self.b.add(index, self.i(step)), slot)
        self.b.branch(head)
        self.b.position_at_end(end)

    def smaller(self, a: ir.Value, b: ir.Value) -> ir.Value:
        return self.b.select(self.b.icmp_signed("<", a, b), a, b)

    def intrinsic(self, name: str, result: ir.Type, *arguments: ir.Value) -> ir.Value:
        known = self.module.globals.get(name)
        function = known or ir.Function(self.module, ir.FunctionType(result, [a.type for a in arguments]), name)
        return self.b.call(function, arguments)

    def splat(self, value: ir.Value, lanes: int = 16) -> ir.Value:
        kind = ir.VectorType(value.type, lanes)
        first = self.b.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(I32, 0))
        return self.pick(first, first, [0] * lanes)

    def pick(self, a: ir.Value, b: ir.Value, lanes: list[int]) -> ir.Value:
        """The lanes of `a` followed by `b` that `lanes` names."""
        return self.b.shuffle_vector(a, b, ir.Constant(ir.VectorType(I32, len(lanes)), lanes))

    def fma(self, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
        return self.intrinsic("llvm.fma.v16f32", V16F, a, b, c)

    def add_product(self, total: ir.Value, a: ir.Value, b: ir.Value) -> ir.Value:
        """total + a b, lane by lane."""
        return self.fma(a, b, total)

    def dot(self, total: ir.Value, a: ir.Value, b: ir.Value) -> ir.Value:
        """total (16 floats) + the pairwise products of 32 bf16 numbers."""
        return self.intrinsic("llvm.x86.avx512bf16.dpbf16ps.512", V16F, total, a, b)

    def sum(self, vector: ir.Value) -> ir.Value:
        name = "llvm.vector.reduce.fadd.v16f32"
        known = self.module.globals.get(name)
        function = known or ir.Function(self.module, ir.FunctionType(F32, [F32, V16F]), name)
        return self.b.call(function, [ir.Constant(F32, 0.0), vector], fastmath=("reassoc",))

    def transpose(self, rows: list[ir.Value]) -> list[ir.Value]:
        """A 16 x 16 matrix: four riffle shuffles of the halves."""
        low = [lane for i in range(8) for lane in (i, 16 + i)]
        high = [lane for i in range(8, 16) for lane in (i, 16 + i)]
        for _ in range(4):
            rows = [self.pick(rows[i], rows[i + 8], lanes) for i in range(8) for lanes in (low, high)]
        return rows


def add_worker(module: ir.Module, name: str) -> None:
    """`void name_worker(int64* job)`: this thread's share of [0, items), in multiples of a grain.

    job = threads, items, grain, then the kernel's own arguments.
    """
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [PTR]), f"{name}_worker")
    c = Code(ir.IRBuilder(function.append_basic_block("entry")))
    thread_number = ir.Function(module, ir.FunctionType(I32, []), "omp_get_thread_num")
    threads, items, grain = (c.load(I64, function.args[0], c.i(8 * i)) for i in range(3))
    grains = c.b.udiv(c.b.add(items, c.b.sub(grain, c.i(1))), grain)
    thread = c.b.zext(c.b.call(thread_number, []), I64)

    def edge(number: ir.Value) -> ir.Value:
        return c.smaller(c.b.mul(c.b.udiv(c.b.mul(grains, number), threads), grain), items)

    bounds = [edge(thread), edge(c.b.add(thread, c.i(1)))]
    c.b.call(module.get_global(name), [c.at(function.args[0], c.i(24)), *bounds, thread])
    c.b.ret_void()


class Machine:
    """One compiled kernel: call it with a job to run it on every thread of torch's pool."""

    def __init__(self, build: Callable[[ir.Module], None]) -> None:
        module = ir.Module("nf4")
        build(module)
        add_worker(module, "kernel")
        self._engine, address = compile_ir(str(module), "kernel_worker")
        self._address = ctypes.c_void_p(address)

    def __call__(self, items: int, grain: int, *arguments: int) -> None:
        threads = max(1, min(torch.get_num_threads(), -(-items // grain)))
        job = (ctypes.c_int64 * (3 + len(arguments)))(threads, items, grain, *arguments)
        openmp().GOMP_parallel(self._address, ctypes.byref(job), ctypes.c_uint(threads), ctypes.c_uint(0))


def compile_ir(text: str, name: str) -> tuple[Any, int]:
    """(the engine that owns the code, the address of function `name`)."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    llvm.add_symbol("omp_get_thread_num", ctypes.cast(openmp().omp_get_thread_num, ctypes.c_void_p).value)
    target = llvm.Target.from_default_triple()
    machine = target.create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=3, jit=True
    )
    parsed = llvm.parse_assembly(text)
    parsed.verify()
    passes = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=3))
    passes.getModulePassManager().run(parsed, passes)
    engine = llvm.create_mcjit_compiler(parsed, machine)
    engine.finalize_object()
    return engine, engine.get_function_address(name)
