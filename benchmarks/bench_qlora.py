"""NF4 decode-and-multiply: this library, bitsandbytes' CPU paths and bf16, on a 4096 x 4096 layer.

bitsandbytes is measured at its best public setting, `Linear4bit` in evaluation mode with bf16 input, which repacks the
weight for a fused AVX512-bf16 kernel, and in training mode, where it decodes to memory and then multiplies. (A further
kernel that it can download from a model hub is not used.) Each call is a loop of products, so that the weight comes from
the cache as far as it fits; "from memory" walks through more matrices than any cache holds, as decoding a real model does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from grainwise.bench import Benchmark, Setting, Timing, alternate
from grainwise.compress.nf4 import bits_per_weight
from grainwise.compress.qlora import NF4Config, NF4Linear
from grainwise.extras import require
from grainwise.kernels.nf4_matmul import dequantize_reference, kernel_in_use

SIZE = 4096
MATRICES = 12  # for "from memory": 100 MB of codes


def layers(seed: int) -> tuple[nn.Linear, NF4Linear, nn.Module]:
    """The same weight in bf16, in this library and in bitsandbytes (evaluation mode, repacked at its first call)."""
    bnb = require("bitsandbytes", extra="bench")
    generator = torch.Generator().manual_seed(seed)
    plain = nn.Linear(SIZE, SIZE, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    plain.weight.copy_(torch.randn(SIZE, SIZE, generator=generator) * SIZE**-0.5)
    peer = bnb.nn.Linear4bit(SIZE, SIZE, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", compress_statistics=True)
    peer.load_state_dict(plain.state_dict())
    return plain, NF4Linear.from_linear(plain, NF4Config()), peer.to("cpu").eval()


def times(call: Callable[[], Any], count: int) -> Callable[[], None]:
    """A call that repeats `call`."""

    def repeated() -> None:
        for _ in range(count):
            call()

    return repeated


def read_bandwidth() -> float:
    """Bytes per second of reading memory with all threads: the best of five sums over 256 MB."""
    block = torch.ones(32 * 2**20, dtype=torch.int64)
    found = alternate({"read": block.sum}, runs=5)["read"]
    return block.nbytes / found.low


def product_flops() -> float:
    """bf16 operations per second of a large matrix product, the best of three."""
    a, b = (torch.randn(2048, 2048, dtype=torch.bfloat16) for _ in range(2))
    return 2 * 2048**3 / alternate({"product": lambda: a @ b}, runs=3)["product"].low


class Desk:
    """The layers of one run and what has been measured."""

    def __init__(self, runs: int) -> None:
        self.runs = runs
        self.settings: list[Setting] = []
        self.spread: dict[str, float] = {}
        self.plain, self.ours, self.peer = layers(0)
        self.training_peer = layers(0)[2].train()

    def add(self, name: str, timings: dict[str, Timing], count: int, limit: dict[str, Any], extra: dict[str, Any]) -> None:
        """Enter medians in ms for one product."""
        ms = {key: 1000 * t.median / count for key, t in timings.items()}
        self.spread |= {f"{name}: {key}": round(t.spread, 3) for key, t in timings.items()}
        ours, naive = ms.pop("ours"), ms.pop("naive", None)
        self.settings.append(Setting(name=name, ours=ours, naive=naive, peers=ms, limit=limit, extra=extra))

    @torch.no_grad()
    def forward(self, batch: int, count: int, limit: dict[str, Any]) -> None:
        """Inference at one batch size, the weight in the cache where it fits."""
        x = torch.randn(batch, SIZE, dtype=torch.bfloat16)
        matrix = self.ours.matrix
        timings = alternate(
            {
                "ours": times(lambda: self.ours(x), count),
                "bitsandbytes": times(lambda: self.peer(x), count),
                "bitsandbytes, training mode": lambda: self.training_peer(x),
                "bf16": times(lambda: self.plain(x), count),
                "naive": lambda: functional.linear(x, dequantize_reference(matrix, torch.bfloat16)),
            },
            runs=self.runs,
        )
        for once in ("bitsandbytes, training mode", "naive"):
            t = timings[once]
            timings[once] = Timing(t.median * count, t.low * count, t.high * count)
        bytes_per_weight = {"ours": bits_per_weight(matrix) / 8, "bitsandbytes": 0.5 + 2 / 64, "bf16": 2.0}
        exact = x.float() @ dequantize_reference(matrix).T
        error = {
            name: ((layer(x).float() - exact).norm() / exact.norm()).item()
            for name, layer in (("ours", self.ours), ("bitsandbytes", self.peer))
        }
        self.add(f"batch {batch}", timings, count, limit, {"bytes_per_weight": bytes_per_weight, "relative_error": error})

    @torch.no_grad()
    def from_memory(self, limit: dict[str, Any]) -> None:
        """Batch 1 over many matrices in turn."""
        stacks = list(zip(*(layers(seed) for seed in range(MATRICES))))
        x = torch.randn(1, SIZE, dtype=torch.bfloat16)

        def walk(stack: tuple[nn.Module, ...]) -> Callable[[], None]:
            def call() -> None:
                for layer in stack:
                    layer(x)

            return call

        names = ("bf16", "ours", "bitsandbytes")
        timings = alternate({name: walk(stack) for name, stack in zip(names, stacks)}, runs=self.runs, warmup=2)
        self.add("batch 1, from memory", timings, MATRICES, limit, {})

    def training(self, limit: dict[str, Any]) -> None:
        """Forward and gradient for the input at 256 rows, what a QLoRA step does with each base layer."""
        x = torch.randn(256, SIZE, dtype=torch.bfloat16, requires_grad=True)

        def step(layer: nn.Module) -> Callable[[], Tensor]:
            return lambda: torch.autograd.grad(layer(x).sum(), x)[0]

        candidates = {"ours": step(self.ours), "bitsandbytes": step(self.training_peer), "bf16": step(self.plain)}
        self.add("256 rows, forward and input gradient", alternate(candidates, runs=self.runs), 1, limit, {})


def run(runs: int) -> Benchmark:
    """Measure all settings; milliseconds for one product of a 4096 x 4096 layer."""
    desk = Desk(runs)
    bandwidth, flops = read_bandwidth(), product_flops()
    weights = SIZE * SIZE
    read = {"what": "reading the codes at the measured memory bandwidth, ms", "figure": 1000 * weights * 0.516 / bandwidth}
    compute = {"what": "bf16 products at the speed of a large bf16 product, ms", "figure": 1000 * 2 * 256 * weights / flops}
    desk.forward(1, 20, read)
    desk.forward(256, 1, compute)
    desk.from_memory(read)
    desk.training({**compute, "figure": 2 * compute["figure"]})
    return Benchmark(
        system="qlora",
        unit="ms",
        settings=desk.settings,
        runs=runs,
        spread=desk.spread,
        note=f"kernel: {kernel_in_use(desk.ours.matrix)}; threads: {torch.get_num_threads()}; "
        f"memory {bandwidth / 1e9:.1f} GB/s; bf16 products {flops / 1e9:.0f} GFLOPS",
    )
