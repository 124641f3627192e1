"""Causal attention of one layer, 2 heads of dimension 64, at 4k to 131k tokens: time against SDPA, with the error.

The error is measured on sampled rows of two kinds of input: clustered queries and keys, the kind the method is for, and
Gaussian noise, where nothing is worth finding and the values average to almost nothing.
"""

from __future__ import annotations

import math
import os

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from grainwise.bench import Benchmark, Setting, alternate
from grainwise.context.hyperattention import hyper_attention
from grainwise.proofs.hyperattention import clustered

HEADS, DIM, CLUSTERS, LOGIT = 2, 64, 512, 7.0
LENGTHS = {"4k": 4096, "8k": 8192, "16k": 16384, "32k": 32768, "131k": 131072}
LONGEST_REPEATED = 32768  # at longer inputs SDPA takes half a minute a run, so each is timed twice at most, without a warm-up
DTYPES = (torch.float32, torch.bfloat16)
MEASURED_ROWS = 512


@torch.no_grad()
def naive_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention with all logits written out."""
    later = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(1)
    return (q @ k.transpose(-1, -2) / math.sqrt(DIM)).masked_fill_(later, -math.inf).softmax(-1) @ v


def errors(q: Tensor, k: Tensor, v: Tensor, found: Tensor) -> dict[str, float]:
    """Of sampled rows in the later half: error relative to the variation of exact rows, and to the size of a value."""
    n = q.shape[2]
    rows = torch.randperm(n // 2, generator=torch.Generator().manual_seed(1))[:MEASURED_ROWS] + n // 2
    visible = torch.arange(n) <= rows[:, None]
    exact = scaled_dot_product_attention(q[:, :, rows].float(), k.float(), v.float(), attn_mask=visible)
    wrong = (found[:, :, rows].float() - exact).norm()
    return {
        "relative_to_variation": round((wrong / (exact - exact.mean(2, keepdim=True)).norm()).item(), 4),
        "relative_to_values": round((wrong / v[:, :, rows].float().norm()).item(), 4),
    }


def products_per_second(dtype: torch.dtype) -> float:
    """Operations per second of this machine in a large matrix product of this type."""
    a = torch.randn(2048, 2048).to(dtype)
    return 2 * 2048**3 / alternate({"product": lambda: a @ a}, runs=4)["product"].low


def operations(n: int, square: int = 2048, read: int = 512) -> float:
    """Floating-point operations of ours: exact squares, and on each level above half of the queries reading `read` keys."""
    levels = max(0, math.ceil(math.log2(n / square)))
    return 4 * HEADS * DIM * n * (n / 2**levels / 2 + levels * read / 2)


@torch.no_grad()
def run(runs: int) -> Benchmark:
    """Every length in float32 and bfloat16; `GRAINWISE_BENCH_LENGTHS=8k,32k` chooses fewer."""
    wanted = os.environ.get("GRAINWISE_BENCH_LENGTHS", ",".join(LENGTHS)).split(",")
    settings, spread, speed = [], {}, {dtype: products_per_second(dtype) for dtype in DTYPES}
    for label in wanted:
        n = LENGTHS[label]
        inputs = clustered(CLUSTERS, LOGIT, n, seed=0, heads=HEADS)
        noise = [torch.randn(1, HEADS, n, DIM, generator=torch.Generator().manual_seed(i)) for i in range(3)]
        for dtype in DTYPES:
            q, k, v = (x.to(dtype) for x in inputs)
            calls = {
                "ours": lambda q=q, k=k, v=v: hyper_attention(q, k, v, causal=True, return_lse=False),
                "sdpa": lambda q=q, k=k, v=v: scaled_dot_product_attention(q, k, v, is_causal=True),
            }
            if n == 8192 and dtype == torch.float32:
                calls["naive"] = lambda q=q, k=k, v=v: naive_attention(q, k, v)
            short = n <= LONGEST_REPEATED
            times = alternate(calls, runs=runs if short else min(runs, 2), warmup=1 if short else 0)
            name = f"{label} tokens {str(dtype).removeprefix('torch.')}"
            noisy = [x.to(dtype) for x in noise]
            naive = times.get("naive")
            settings.append(
                Setting(
                    name=name,
                    ours=times["ours"].median * 1e3,
                    naive=naive.median * 1e3 if naive else None,
                    peers={"sdpa": times["sdpa"].median * 1e3},
                    limit={
                        "what": "ms for our products alone, at the measured rate of a large matrix product of this type",
                        "figure": operations(n) / speed[dtype] * 1e3,
                    },
                    extra={
                        "error_clustered": errors(q, k, v, calls["ours"]()),
                        "error_gaussian": errors(*noisy, hyper_attention(*noisy, causal=True, return_lse=False)),
                    },
                )
            )
            spread |= {f"{name} {who}": round(t.spread, 3) for who, t in times.items()}
    lost = [s.name for s in settings if s.ours > s.peers["sdpa"]]
    return Benchmark(
        system="hyperattention",
        unit="ms",
        settings=settings,
        runs=runs,
        spread=spread,
        note=f"clustered inputs: {CLUSTERS} clusters, own-cluster logit {LOGIT}; {torch.get_num_threads()} threads; "
        f"slower than sdpa at: {', '.join(lost) or 'none of these lengths'}",
    )
