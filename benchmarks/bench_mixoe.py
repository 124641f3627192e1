"""What mixing costs: alone against its plain formula, and as a part of a training step of a residual network."""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import ResNetConfig, ResNetForImageClassification

from grainwise.bench import Benchmark, Setting, alternate
from grainwise.recognize.mixoe import MixOutlierExposure, soft_cross_entropy

BATCH, SIZE, LABELS = 16, 112, 200


def images(seed: int) -> Tensor:
    return torch.randn(BATCH, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


def mixing(runs: int) -> tuple[list[Setting], dict[str, float], dict[str, float]]:
    """Both operations on a batch, against the formula in elementary steps and a loop over images with rectangles."""
    known, outliers, generator = images(0), images(1), torch.Generator().manual_seed(2)
    labels = torch.arange(BATCH)

    def formula() -> Tensor:
        return 0.3 * known + (1 - 0.3) * outliers

    def rectangles() -> Tensor:
        mixed = known.clone()
        for i in range(BATCH):
            mixed[i, :, 20:90, 30:100] = outliers[i, :, 20:90, 30:100]
        return mixed

    mixes = {op: MixOutlierExposure(op) for op in ("mixup", "cutmix")}
    calls = {
        op: lambda mix=mix: mix(known, labels, outliers, num_labels=LABELS, generator=generator) for op, mix in mixes.items()
    }
    times = alternate(
        {**calls, "formula": formula, "rectangles": rectangles, "copy": known.clone}, runs=max(runs, 10), warmup=3
    )
    ms = {name: t.median * 1e3 for name, t in times.items()}
    limit = {"what": "ms to copy the batch (one read, one write; mixing reads two)", "figure": ms["copy"]}
    shape = f"{BATCH} x 3 x {SIZE} x {SIZE}"
    settings = [
        Setting(name=f"mixup with targets, {shape}", ours=ms["mixup"], naive=ms["formula"], limit=limit),
        Setting(name=f"cutmix with targets, {shape}", ours=ms["cutmix"], naive=ms["rectangles"], limit=limit),
    ]
    return settings, ms, {name: round(t.spread, 3) for name, t in times.items()}


def steps(runs: int, mixing_ms: float) -> tuple[Setting, dict[str, float]]:
    """A training step of ResNet-18: standard, with the mixed loss in a pass of its own, and in one concatenated pass."""
    config = ResNetConfig(
        embedding_size=64, hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], layer_type="basic", num_labels=LABELS
    )
    torch.manual_seed(0)
    start = ResNetForImageClassification(config).train()
    known, outliers, labels = images(0), images(1), torch.arange(BATCH)
    mix, generator = MixOutlierExposure("mixup"), torch.Generator().manual_seed(2)

    def step(kind: str) -> None:
        model, optimizer = models[kind]
        if kind == "standard":
            loss = cross_entropy(model(known).logits, labels)
        else:
            mixed, targets = mix(known, labels, outliers, num_labels=LABELS, generator=generator)
            if kind == "concatenated":
                first, second = model(torch.cat([known, mixed])).logits.split(BATCH)
            else:
                first, second = model(known).logits, model(mixed).logits
            loss = cross_entropy(first, labels) + mix.beta * soft_cross_entropy(second, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    kinds = ("ours", "concatenated", "standard")
    copies = {kind: copy.deepcopy(start) for kind in kinds}
    models = {kind: (m, torch.optim.SGD(m.parameters(), 1e-3, momentum=0.9, nesterov=True)) for kind, m in copies.items()}
    times = alternate({kind: lambda kind=kind: step(kind) for kind in kinds}, runs=runs)
    ms = {kind: t.median * 1e3 for kind, t in times.items()}
    setting = Setting(
        name=f"training step, ResNet-18, {BATCH} images of {SIZE} px",
        ours=ms["ours"],
        peers={"one concatenated pass": ms["concatenated"], "standard step": ms["standard"]},
        limit={"what": "ms of two standard steps", "figure": 2 * ms["standard"]},
        extra={"mixing_share_of_step": round(mixing_ms / ms["ours"], 5)},
    )
    return setting, {f"step {kind}": round(t.spread, 3) for kind, t in times.items()}


def run(runs: int) -> Benchmark:
    """Mixing alone, then whole steps."""
    settings, ms, spread = mixing(runs)
    step, more = steps(runs, ms["mixup"])
    return Benchmark(
        system="mixoe",
        unit="ms",
        settings=[*settings, step],
        runs=runs,
        spread=spread | more,
        note=f"float32, {torch.get_num_threads()} threads; timm's Mixup needs torchvision and is not measured",
    )
