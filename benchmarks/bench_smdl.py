"""SMDL: batched greedy against one image at a time, and lazy and stochastic greedy against the full search.

The model is the small ResNet of the proof, briefly trained; images are its 48x48 pictures. `value` is the objective of the
whole order relative to full greedy (mean over steps), so that a faster search shows what it loses. Captum's Kernel SHAP looks
at as many images.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from grainwise.bench import Benchmark, Setting, alternate
from grainwise.explain import SMDL, Attribution, ClassifierScorer, gradcam, split_by_saliency
from grainwise.proofs.smdl import pictures, trained
from grainwise.world import World

IMAGES, STEPS = 3, 120


def searches(model: torch.nn.Module) -> dict[str, SMDL]:
    """Explainers by name."""
    return {
        "batched": SMDL(model),
        "one by one": SMDL(model, batch_size=1),
        "lazy": SMDL(model, search="lazy", block=4),
        "stochastic": SMDL(model, search="stochastic", epsilon=0.3),
    }


def run(runs: int) -> Benchmark:
    """25 and 49 regions."""
    world = World(seed=500, genera=5, species_per_genus=2)
    model = trained(world, 0, STEPS)
    labels = np.arange(IMAGES)
    images, _ = pictures(world, labels, 0)
    settings, spread = [], {}
    for grid, per_region in ((7, 2), (7, 1)):
        masks = [split_by_saliency(gradcam(model, x, int(y)), grid, per_region) for x, y in zip(images, labels)]
        found: dict[str, list[Attribution]] = {}

        def explain(name: str, explainer: SMDL, masks: Any = masks, found: Any = found) -> Callable[[], None]:
            def call() -> None:
                found[name] = [explainer.explain(x, m, int(y)) for x, m, y in zip(images, masks, labels)]

            return call

        calls = {name: explain(name, explainer) for name, explainer in searches(model).items()}
        seen = 2 + len(masks[0]) * (len(masks[0]) + 1)
        many = torch.rand(seen * IMAGES, 3, 48, 48)
        calls["limit"] = lambda many=many: ClassifierScorer(model)(many)
        if importlib.util.find_spec("captum") is not None:
            calls["captum KernelShap"] = lambda masks=masks, seen=seen: kernel_shap(model, images, masks, labels, seen)
        timed = alternate(calls, runs=min(runs, 3), warmup=0)
        seconds = {name: t.median for name, t in timed.items()}
        count = len(masks[0])
        limit = {"what": f"{seen * IMAGES} images through the model", "figure": seconds["limit"]}
        peer = {n: s for n, s in seconds.items() if n.startswith("captum")}
        name = f"full greedy, {count} regions"
        settings.append(Setting(name=name, ours=seconds["batched"], naive=seconds["one by one"], peers=peer, limit=limit))
        full = found["batched"]
        for fast in ("lazy", "stochastic"):
            value = [float((a.scores["total"] / b.scores["total"]).mean()) for a, b in zip(found[fast], full)]
            area = [a.insertion_auc - a.deletion_auc - b.insertion_auc + b.deletion_auc for a, b in zip(found[fast], full)]
            extra = {"value": round(float(np.mean(value)), 4), "insertion less deletion": round(float(np.mean(area)), 4)}
            extra["images seen"] = sum(a.images_seen for a in found[fast]) / sum(b.images_seen for b in full)
            name = f"{fast} against full greedy, {count} regions"
            settings.append(Setting(name=name, ours=seconds[fast], naive=seconds["batched"], extra=extra))
        spread |= {f"{count} regions, {name}": t.spread for name, t in timed.items()}
    return Benchmark(system="smdl", unit=f"s for {IMAGES} images", settings=settings, runs=min(runs, 3), spread=spread)


def kernel_shap(model: torch.nn.Module, images: torch.Tensor, masks: list[torch.Tensor], labels: np.ndarray, seen: int) -> None:
    """Captum's Kernel SHAP over the same regions, with its own batching."""
    from captum.attr import KernelShap

    peer = KernelShap(lambda x: model((x - 0.5) / 0.5).logits.softmax(1))
    for image, regions, label in zip(images, masks, labels):
        numbers = (regions * torch.arange(len(regions))[:, None, None]).sum(0)[None, None]
        options = {"feature_mask": numbers, "n_samples": seen, "perturbations_per_eval": 128}
        peer.attribute(image[None], baselines=0.0, target=int(label), **options)
