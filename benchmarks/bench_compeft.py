"""ComPEFT's file: how fast it is written and read, how small it is at equal perplexity, and merging from it.

Times are for one update of 16.8 million entries (a LoRA of rank 16 on all linear layers of a 7-billion model is 2.4 times
as large). Sizes at equal perplexity are of one of the proof's experts, every file real.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from grainwise.bench import Benchmark, Setting, Timing, alternate
from grainwise.extras import require
from grainwise.merge import compeft_baselines as baselines
from grainwise.merge import golomb
from grainwise.merge.compeft import TernaryDelta
from grainwise.merge.merging import ties_merge
from grainwise.merge.task_delta import TaskDelta

SHAPES = {f"layer.{i}.weight": (1024, 2048) for i in range(8)}
ENTRIES = sum(a * b for a, b in SHAPES.values())
DENSITY = 0.05
SEED = 0


def update(seed: int) -> dict[str, Tensor]:
    """Gaussian tensors, float32."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) * 0.01 for name, shape in SHAPES.items()}


def milliseconds(timing: Timing) -> float:
    return round(1e3 * timing.median, 2)


def megabytes_per_second(timing: Timing) -> float:
    """Dense 16-bit output over time."""
    return round(2 * ENTRIES / timing.median / 1e6)


def copy_bandwidth() -> float:
    """Bytes per second of a plain copy on this machine, read and write counted."""
    source = np.ones(ENTRIES, dtype=np.uint64)
    target = np.empty_like(source)
    best = min(alternate({"copy": lambda: np.copyto(target, source)}, runs=5)["copy"].low, 1e9)
    return 2 * source.nbytes / best


class Files:
    """The same update in every form on disk."""

    def __init__(self, folder: Path) -> None:
        self.zstd = require("zstandard", extra="bench")
        self.folder = folder
        dense = update(SEED)
        self.packed = TernaryDelta.compress(dense, reference="zero", density=DENSITY, alpha=2.0)
        self.packed.save(folder / "golomb.tern", "golomb")
        self.packed.save(folder / "masks.tern", "masks")
        half = {k: t.half() for k, t in dense.items()}
        save_file(half, folder / "half.safetensors")
        self._compress(folder / "half.safetensors", folder / "half.zst")
        sparse = {}
        for key, tensor in self.packed.items():
            at = tensor.flatten().nonzero().flatten()
            sparse |= {f"{key}.at": at.int(), f"{key}.values": tensor.flatten()[at].half()}
        save_file(sparse, folder / "sparse.safetensors")

    def _compress(self, source: Path, target: Path) -> None:
        target.write_bytes(self.zstd.ZstdCompressor(level=19).compress(source.read_bytes()))

    def read_ternary(self, name: str) -> None:
        """A `.tern` file to dense 16-bit tensors."""
        delta = TernaryDelta.load(self.folder / name)
        for key in delta.layout:
            delta.decode(key, torch.float16)

    def read_zstd(self) -> None:
        """The zstd-compressed 16-bit file to dense tensors."""
        from safetensors.torch import load

        load(self.zstd.ZstdDecompressor().decompress((self.folder / "half.zst").read_bytes()))

    def read_plain(self) -> None:
        """The 16-bit file, copied into memory."""
        for tensor in load_file(self.folder / "half.safetensors").values():
            tensor.clone()

    def read_sparse(self) -> None:
        """Stored indices and values, scattered into zeros: what one writes by hand."""
        parts = load_file(self.folder / "sparse.safetensors")
        for key, shape in SHAPES.items():
            dense = torch.zeros(shape[0] * shape[1], dtype=torch.float16)
            dense[parts[f"{key}.at"].long()] = parts[f"{key}.values"]

    def bits(self, name: str) -> float:
        return round(8 * (self.folder / name).stat().st_size / ENTRIES, 3)


def bitsandbytes_reader() -> Callable[[], None]:
    """4-bit (NF4) tensors back to 16 bits by bitsandbytes."""
    functional = require("bitsandbytes", extra="bench").functional
    stored = [functional.quantize_4bit(t.half(), quant_type="nf4") for t in update(SEED).values()]
    return lambda: [functional.dequantize_4bit(codes, state) for codes, state in stored] and None


def reading(runs: int, files: Files, spread: dict[str, float]) -> list[Setting]:
    """Time from file to dense 16-bit tensors, masks and Golomb."""
    timings = alternate(
        {
            "masks": lambda: files.read_ternary("masks.tern"),
            "golomb": lambda: files.read_ternary("golomb.tern"),
            "indices and values": files.read_sparse,
            "fp16 + zstd -19": files.read_zstd,
            "fp16 safetensors": files.read_plain,
            "bitsandbytes nf4 (in memory)": bitsandbytes_reader(),
        },
        runs=runs,
    )
    spread |= {f"reading, {name}": round(t.spread, 3) for name, t in timings.items()}
    peers = {n: milliseconds(timings[n]) for n in ("fp16 + zstd -19", "fp16 safetensors", "bitsandbytes nf4 (in memory)")}
    bandwidth = copy_bandwidth()
    found = []
    for coding, bits in (("masks", 2.0), ("golomb", files.bits("golomb.tern"))):
        least = 1e3 * ENTRIES * (bits + 16) / 8 / bandwidth
        bound = f"{bits:g} bits read and 16 written per entry at {bandwidth / 1e9:.1f} GB/s"
        found.append(
            Setting(
                name=f"read to fp16, {coding} (ms)",
                ours=milliseconds(timings[coding]),
                naive=milliseconds(timings["indices and values"]),
                peers=peers,
                limit={"what": bound, "figure": round(least, 2)},
                extra={"MB/s of dense fp16": megabytes_per_second(timings[coding])},
            )
        )
    return found


def writing(runs: int, files: Files, spread: dict[str, float]) -> Setting:
    """Time from dense float32 tensors in memory to the file; the peers compress the 16-bit file in memory."""
    dense = update(SEED)
    target = files.folder / "written.tern"
    half = (files.folder / "half.safetensors").read_bytes()

    def by_sorting() -> None:
        flat = torch.cat([t.flatten() for t in dense.values()])
        order = flat.abs().argsort(descending=True)[: int(DENSITY * ENTRIES)]
        torch.save((order.sort().values.int(), flat[order].sign().char(), flat.std()), io.BytesIO())

    timings = alternate(
        {
            "ours": lambda: TernaryDelta.compress(dense, reference="zero", density=DENSITY).save(target),
            "sort, indices and signs": by_sorting,
            "zstd -3": lambda: files.zstd.ZstdCompressor(level=3).compress(half),
        },
        runs=runs,
    )
    started = time.perf_counter()
    files.zstd.ZstdCompressor(level=19).compress(half)
    slow = time.perf_counter() - started
    spread |= {f"writing, {name}": round(t.spread, 3) for name, t in timings.items()}
    return Setting(
        name="compress and write, golomb (ms)",
        ours=milliseconds(timings["ours"]),
        naive=milliseconds(timings["sort, indices and signs"]),
        peers={"fp16 + zstd -3": milliseconds(timings["zstd -3"]), "fp16 + zstd -19 (one run)": round(1e3 * slow, 1)},
    )


def sizes(files: Files) -> Setting:
    """Bits for each entry of the files above."""
    return Setting(
        name=f"file size at density {DENSITY:g} (bits per entry)",
        ours=files.bits("golomb.tern"),
        naive=files.bits("sparse.safetensors"),
        peers={
            "fp16": files.bits("half.safetensors"), "fp16 + zstd -19": files.bits("half.zst"),
            "masks": files.bits("masks.tern"), "4-bit (nf4, its scales left out)": 4.0,
        },
        limit={"what": "entropy of the signs", "figure": round(golomb.entropy_bits(DENSITY), 3)},
    )  # fmt: skip


def similarity(runs: int, spread: dict[str, float]) -> Setting:
    """The inner product of two updates, from masks and from dense tensors."""
    a, b = (TernaryDelta.compress(update(s), reference="zero", density=DENSITY) for s in (1, 2))
    dense_a, dense_b = (torch.cat([t.flatten() for t in d.to_dense().values()]) for d in (a, b))
    timings = alternate({"ours": lambda: a.dot(b), "dense": lambda: float(dense_a @ dense_b)}, runs=runs)
    spread |= {f"dot, {name}": round(t.spread, 3) for name, t in timings.items()}
    return Setting(
        name="inner product of two experts (ms)", ours=milliseconds(timings["ours"]), naive=milliseconds(timings["dense"])
    )


def merging(runs: int, spread: dict[str, float]) -> Setting:
    """TIES of four experts of one base: from compressed deltas, from dense checkpoints by our code, and by mergekit."""
    base = update(9)
    tuned = [{k: base[k] + t for k, t in update(s).items()} for s in range(4)]
    experts = [TernaryDelta.compress(t, reference=base, density=DENSITY) for t in tuned]
    dense = [TaskDelta.between(t, base) for t in tuned]
    candidates = {
        "ours": lambda: ties_merge(experts).apply(base, force=True),  # the fingerprint of the base is checked elsewhere
        "dense": lambda: ties_merge(dense, density=DENSITY).apply(base, force=True),
    }
    extra = {}
    if importlib.util.find_spec("mergekit"):
        candidates["mergekit"] = lambda: mergekit_ties(base, tuned, DENSITY)
        ours = ties_merge(experts).apply(base, force=True)
        theirs = mergekit_ties(base, [e.apply(base, force=True) for e in experts], 1.0)
        extra["largest difference from mergekit on the compressed experts"] = max(
            float((ours[k] - theirs[k]).abs().max()) for k in base
        )
    timings = alternate(candidates, runs=runs)
    spread |= {f"ties, {name}": round(t.spread, 3) for name, t in timings.items()}
    return Setting(
        name="TIES of four experts into the base (ms)",
        ours=milliseconds(timings["ours"]),
        naive=milliseconds(timings["dense"]),
        peers={f"{n}, dense": milliseconds(t) for n, t in timings.items() if n == "mergekit"},
        extra=extra,
    )


def mergekit_ties(base: dict[str, Tensor], tuned: list[dict[str, Tensor]], density: float) -> dict[str, Tensor]:
    """mergekit's TIES of tensors in memory (it trims each tensor on its own)."""
    from mergekit.merge_methods import generalized_task_arithmetic as method
    from mergekit.merge_methods.base import TensorGroup

    ties = method.GeneralizedTaskArithmeticMerge(
        consensus_method=method.ConsensusMethod.sum,
        sparsification_method=method.SparsificationMethod.magnitude,
        default_normalize=True,
        default_rescale=False,
        method_name="ties",
        method_pretty_name="TIES",
        method_reference_url=None,
    )
    each = range(1, len(tuned) + 1)
    options = {"density": dict.fromkeys(each, density), "weight": dict.fromkeys(each, 1.0), "lambda": 1.0}
    options |= {"int8_mask": False, "normalize": True, "rescale": False}
    return {
        key: ties.merge_group(TensorGroup.from_tensors([base[key], *(t[key] for t in tuned)], base_index=0), **options)
        for key in base
    }


def equal_perplexity() -> Setting:
    """The smallest file whose perplexity is no higher than the 16-bit adapter's, for one of the proof's experts."""
    from grainwise.proofs import compeft as proof

    (study,) = proof.train_experts(dataclasses.replace(proof.FULL, domains=("code",)), SEED)
    full = baselines.original(study.delta)
    limit = study.test(full.delta)
    points = {k: study.compressed(k) for k in (0.05, 0.1, 0.2, 0.3, 0.5)}
    loss = {k: study.test(p) for k, p in points.items()}
    good = [k for k, value in loss.items() if value <= limit]
    peers = {f"{b}-bit uniform + LZMA": baselines.uniform(study.delta, b) for b in (2, 4, 8)}
    per_entry = 8 / study.delta.numel
    chosen = min(good) if good else min(loss, key=loss.__getitem__)
    return Setting(
        name="size at no higher perplexity than 16 bits (bits per entry)",
        ours=round(points[chosen].size() * per_entry, 3),
        naive=round(full.size * per_entry, 3),
        peers={name: round(p.size * per_entry, 3) for name, p in peers.items()},
        extra={
            "perplexity, 16 bits": round(np.exp(limit), 3),
            "reached": bool(good),  # if not, ours is the file of lowest perplexity
            "times smaller than 16 bits": round(points[chosen].ratio(), 1),
            **{f"perplexity, density {k:g} ({p.ratio():.1f}x)": round(np.exp(loss[k]), 3) for k, p in points.items()},
            **{f"perplexity, {name}": round(np.exp(study.test(p.delta)), 3) for name, p in peers.items()},
        },
    )


def run(runs: int) -> Benchmark:
    """All settings."""
    spread: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        files = Files(Path(folder))
        settings = [*reading(runs, files, spread), writing(runs, files, spread), sizes(files)]
    settings += [similarity(runs, spread), merging(runs, spread), equal_perplexity()]
    note = f"{torch.get_num_threads()} threads; our coder uses one"
    return Benchmark(
        system="compeft",
        unit="ms, or bits per entry where the name says so",
        settings=settings,
        runs=runs,
        spread=spread,
        note=note + ("" if importlib.util.find_spec("mergekit") else "; mergekit is not installed here and was left out"),
    )
