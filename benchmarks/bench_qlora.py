"""NF4 decode-and-multiply: this library, both CPU paths of bitsandbytes and bf16, on 4096 x 4096 layers.

Every arm walks through several matrices in turn, as a model does, so that none of them finds its weight in the cache; one
setting, "in the cache", repeats a single matrix instead. bitsandbytes has two public CPU paths: `Linear4bit` in evaluation
mode repacks the weight at its first call for a fused AVX512-bf16 kernel ("fused"); in training mode it decodes to memory and
then multiplies ("decode, then multiply"). (A further kernel, which it can download from a model hub, is not used.)
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from llvmlite import ir
from torch import Tensor, nn
from torch.nn import functional

from grainwise.bench import Benchmark, Setting, alternate
from grainwise.compress.nf4 import bits_per_weight
from grainwise.compress.qlora import NF4Config, NF4Linear
from grainwise.extras import require
from grainwise.kernels import llvm_code
from grainwise.kernels.nf4_matmul import dequantize_reference, kernel_in_use

SIZE = 4096
MATRICES = 12  # 104 MB of codes
ROUNDS = 4  # walks over all of them in one timing
FUSED, DECODED = "bitsandbytes, fused", "bitsandbytes, decode, then multiply"
Arms = Mapping[str, Sequence[nn.Module]]
Limit = str | tuple[str, float]  # what, and its milliseconds where no call "limit" measures them


def all_arms() -> Arms:
    """`MATRICES` layers of each kind, copies of one weight in memory of their own.

    bitsandbytes' fused arm is in evaluation mode, where a layer repacks its weight at the first call; the other trains.
    """
    bnb = require("bitsandbytes", extra="bench")
    plain = nn.Linear(SIZE, SIZE, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    plain.weight.copy_(torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(0)) * SIZE**-0.5)
    peer = bnb.nn.Linear4bit(SIZE, SIZE, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", compress_statistics=True)
    peer.load_state_dict(plain.state_dict())
    peer.to("cpu")
    first = {"ours": NF4Linear.from_linear(plain, NF4Config()), FUSED: peer.eval(), DECODED: peer, "bf16": plain}
    arms = {name: [copy.deepcopy(layer) for _ in range(MATRICES)] for name, layer in first.items()}
    for layer in arms[DECODED]:
        layer.train()
    return arms


def walk(stack: Sequence[nn.Module], x: Tensor, rounds: int = 1) -> Callable[[], None]:
    """A call that multiplies x by every matrix in turn, `rounds` times."""

    def call() -> None:
        for _ in range(rounds):
            for layer in stack:
                layer(x)

    return call


def read_all(stack: Sequence[nn.Module]) -> Callable[[], None]:
    """A call that reads the codes and scales of our layers and does nothing else: the limit of a product with one row."""
    codes = [layer.weight.view(-1).view(torch.int64) for layer in stack]
    scales = [layer.absmax.view(torch.int64) for layer in stack]
    return lambda: [tensor.sum() for _ in range(ROUNDS) for tensor in (*codes, *scales)] and None


def third_level_cache() -> str:
    """Its size as Linux tells it, for example 32768K."""
    file = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
    return file.read_text().strip() if file.exists() else "an unknown size"


def bf16_rate() -> float:
    """bf16 operations per second of all threads on numbers that stay in registers: no product can be faster."""
    sums, rounds = 12, 2_000_000

    def build(module: ir.Module) -> None:
        kind = ir.FunctionType(ir.VoidType(), [llvm_code.PTR, *[llvm_code.I64] * 3])
        function = ir.Function(module, kind, "kernel")
        c = llvm_code.Code(ir.IRBuilder(function.append_basic_block("entry")))
        start = function.append_basic_block("start")
        c.b.branch(start)
        c.b.position_at_end(start)
        memory = c.b.inttoptr(c.load(llvm_code.I64, function.args[0], c.i(0)), llvm_code.PTR)
        factor = c.load(llvm_code.V32B, memory, c.i(0))
        slots = [c.variable(ir.Constant(llvm_code.V16F, [float(i)] * 16)) for i in range(sums)]
        with c.loop(c.i(0), c.i(rounds)):
            for slot in slots:
                c.b.store(c.dot(c.get(slot, llvm_code.V16F), factor, factor), slot)
        for i, slot in enumerate(slots):  # each thread to its own place, so that nothing is left out as unused
            place = c.b.add(c.b.mul(function.args[3], c.i(64 * sums)), c.i(64 * i))
            c.store(c.get(slot, llvm_code.V16F), memory, place)
        c.b.ret_void()

    kernel, threads = llvm_code.Machine(build), torch.get_num_threads()
    memory = torch.zeros(threads * sums * 16)
    timing = alternate({"registers": lambda: kernel(threads, 1, memory.data_ptr())}, runs=5)["registers"]
    return threads * rounds * sums * 64 / timing.low


class Desk:
    """The layers of one run and what has been measured."""

    def __init__(self, runs: int) -> None:
        self.runs = runs
        self.settings: list[Setting] = []
        self.spread: dict[str, float] = {}
        self.arms = all_arms()
        self.rate = bf16_rate()

    def add(self, name: str, calls: Mapping[str, Callable[[], Any]], products: int, limit: Limit, runs: int) -> None:
        """Time all calls in turn and enter milliseconds for one product (one call of "naive" is a single product)."""
        timings = alternate(calls, runs=runs, warmup=2)
        ms = {key: 1000 * t.median / (1 if key == "naive" else products) for key, t in timings.items()}
        self.spread |= {f"{name}: {key}": round(t.spread, 3) for key, t in timings.items()}
        what, figure = limit if isinstance(limit, tuple) else (limit, ms.pop("limit"))
        ours, naive = ms.pop("ours"), ms.pop("naive", None)
        bound = {"what": what, "figure": figure, "best possible ratio": {key: round(t / figure, 2) for key, t in ms.items()}}
        self.settings.append(Setting(name=name, ours=ours, naive=naive, peers=ms, limit=bound))

    def compute(self, rows: int, products: int = 1) -> tuple[str, float]:
        figure = 1000 * products * 2 * rows * SIZE**2 / self.rate
        return f"bf16 dot products at the rate of the registers, {self.rate / 1e9:.0f} GFLOPS, ms", figure

    @torch.no_grad()
    def one_row(self) -> None:
        """Batch 1 from memory, and from the cache."""
        x = torch.randn(1, SIZE, dtype=torch.bfloat16)
        calls: dict[str, Callable[[], Any]] = {name: walk(stack, x, ROUNDS) for name, stack in self.arms.items()}
        calls["limit"] = read_all(self.arms["ours"])
        self.add("batch 1", calls, ROUNDS * MATRICES, "only reading the codes and scales, ms", 2 * self.runs)
        same = {name: walk([stack[0]] * MATRICES, x, ROUNDS) for name, stack in self.arms.items() if name != DECODED}
        same["limit"] = read_all([self.arms["ours"][0]] * MATRICES)
        self.add(
            "batch 1, one matrix, in the cache", same, ROUNDS * MATRICES, "only reading the codes and scales, ms", 2 * self.runs
        )

    @torch.no_grad()
    def batch(self, rows: int) -> None:
        """Inference with many rows, over four matrices."""
        x = torch.randn(rows, SIZE, dtype=torch.bfloat16)
        calls: dict[str, Callable[[], Any]] = {name: walk(stack[:4], x) for name, stack in self.arms.items()}
        matrix = self.arms["ours"][0].matrix
        calls["naive"] = lambda: functional.linear(x, dequantize_reference(matrix, torch.bfloat16))
        self.add(f"batch {rows}", calls, 4, self.compute(rows), self.runs)

    def training(self, rows: int) -> None:
        """Forward and gradient for the input, what a QLoRA step does with each base layer."""
        x = torch.randn(rows, SIZE, dtype=torch.bfloat16, requires_grad=True)

        def step(stack: Sequence[nn.Module]) -> Callable[[], None]:
            return lambda: [torch.autograd.grad(layer(x).sum(), x) for layer in stack] and None

        calls = {name: step(stack[:2]) for name, stack in self.arms.items() if name != FUSED}  # it has no gradient
        self.add(f"{rows} rows, forward and input gradient", calls, 2, self.compute(rows, 2), self.runs)

    @torch.no_grad()
    def about(self) -> dict[str, Any]:
        """Bytes for each weight, and the error of the products against float32 ones with the decoded weight."""
        matrix = self.arms["ours"][0].matrix
        x = torch.randn(256, SIZE, dtype=torch.bfloat16)
        exact = x.float() @ dequantize_reference(matrix).T
        found = {name: self.arms[name][0](x).float() for name in ("ours", FUSED, DECODED)}
        return {
            "bytes_per_weight": {"ours": bits_per_weight(matrix) / 8, FUSED: 0.5 + 2 / 64, DECODED: 0.516, "bf16": 2.0},
            "relative_error": {name: round(((y - exact).norm() / exact.norm()).item(), 5) for name, y in found.items()},
        }


def run(runs: int) -> Benchmark:
    """Measure all settings; milliseconds for one product of a 4096 x 4096 layer."""
    desk = Desk(runs)
    desk.one_row()
    desk.batch(256)
    desk.training(256)
    desk.settings[0].extra = desk.about()
    codes = MATRICES * SIZE**2 * 0.516 / 1e6
    return Benchmark(
        system="qlora",
        unit="ms",
        settings=desk.settings,
        runs=runs,
        spread=desk.spread,
        note=f"kernel: {kernel_in_use(desk.arms['ours'][0].matrix)}; threads: {torch.get_num_threads()}; batch 1 walks over "
        f"{MATRICES} matrices, {codes:.0f} MB of codes, the outer cache holds {third_level_cache()}; batch 1 has twice as "
        "many runs; best possible ratio: of an arm at the limit",
    )
