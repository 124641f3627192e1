"""SMDL's claim on a small machine: at equal numbers of model calls its order of regions is the most faithful.

A small ResNet learns ten microworld species, pairs of which differ in one small part; half of its training images have random
patches painted black, so that it can read what explainers show it. Images it gets right are explained
for its answer, images it gets wrong for the true species. Every black-box explainer may show the model about 650 images; all
rankings are judged by the same curves. SMDL optimises nearly the curves it is judged by, so a second network, trained from
another start on other individuals, judges too, and the part that decides between the siblings is looked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import ResNetConfig, ResNetForImageClassification

from grainwise.explain.faithfulness import judged, stages_of_map
from grainwise.explain.regions import split_by_saliency
from grainwise.explain.set_scorer import ClassifierScorer
from grainwise.explain.simple_explainers import gradcam, hsic, kernel_shap, occlusion, rise
from grainwise.explain.smdl import SMDL
from grainwise.proofs.frame import Proof
from grainwise.training import train_lm
from grainwise.world import World

SIZE, SPECIES, POOL, BATCH, STEPS = 48, 10, 4_096, 64, 300
IMAGES = 8  # right ones, and as many wrong ones
GRID, PER_REGION = 7, 2  # 25 regions: 24 pairs of patches and the one left over
PEERS: dict[str, Callable[..., Tensor]] = {"rise": rise, "occlusion": occlusion, "kernel_shap": kernel_shap, "hsic": hsic}
SMDL_WEIGHTS: dict[str, tuple[float, ...]] = {  # the first are those of the released results
    "smdl": (0, 0.05, 1, 1),
    "smdl_all_one": (1, 1, 1, 1),
    "smdl_no_effectiveness": (0, 0, 1, 1),
    "smdl_no_collaboration": (0, 0.05, 1, 0),
}
MEASURES = ("insertion", "deletion", "highest_25", "judge_insertion", "judge_deletion", "part_found")


def pictures(world: World, labels: np.ndarray, first: int) -> tuple[Tensor, Tensor]:
    """(images float32 (n, 3, size, size) in [0, 1], the deciding part, bool (n, size, size))."""
    drawn = world.draw(labels, first + np.arange(len(labels)), size=SIZE)
    return torch.from_numpy(drawn.images).permute(0, 3, 1, 2).float() / 255, torch.from_numpy(drawn.key_parts)


def trained(world: World, seed: int, steps: int) -> ResNetForImageClassification:
    """A small ResNet in evaluation mode."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    labels = rng.integers(SPECIES, size=min(POOL, steps * BATCH))
    images, _ = pictures(world, labels, 1_000_000 * (1 + seed % 1000))
    config = ResNetConfig(
        embedding_size=16, hidden_sizes=[24, 48, 96], depths=[1, 1, 1], layer_type="basic", num_labels=SPECIES
    )
    model = ResNetForImageClassification(config)

    def batches() -> Iterator[dict[str, Tensor]]:
        for _ in range(steps):
            rows = rng.integers(len(images), size=BATCH)
            yield {"pixel_values": (erased(images[rows], rng) - 0.5) / 0.5, "labels": torch.from_numpy(labels[rows])}

    train_lm(model, batches(), steps=steps, lr=3e-3)
    return model.eval()


def erased(images: Tensor, rng: np.random.Generator) -> Tensor:
    """Half of the images with patches of an 8x8 grid painted black, 0 to 80% of them."""
    share = np.where(rng.random(len(images)) < 0.5, rng.uniform(0.2, 1.0, len(images)), 1.0)
    seen = torch.from_numpy(rng.random((len(images), 8, 8)) < share[:, None, None])
    return images * seen.repeat_interleave(SIZE // 8, 1).repeat_interleave(SIZE // 8, 2)[:, None]


def examples(model: ResNetForImageClassification, world: World, count: int) -> dict[str, list[tuple[Tensor, int, Tensor]]]:
    """Test images that the model gets right and wrong: (image, true species, deciding part), and their number each."""
    labels = np.arange(60 * count) % SPECIES
    images, parts = pictures(world, labels, 0)
    answers = ClassifierScorer(model)(images).probabilities.argmax(1).numpy()
    found = {}
    for name, rows in (("right", answers == labels), ("wrong", answers != labels)):
        usable = np.flatnonzero(rows & (parts.flatten(1).sum(1) > 0).numpy())[:count]
        found[name] = [(images[i], int(labels[i]), parts[i]) for i in usable]
    found["accuracy"] = [(torch.tensor(float((answers == labels).mean())), 0, torch.empty(0))]
    return found


def rankings(model: ResNetForImageClassification, image: Tensor, target: int, seed: int, grid: int) -> dict[str, Tensor]:
    """Stages of every explainer, bool (stages, size, size); peers see as many images as greedy SMDL, 652 for 25 regions."""
    prior = gradcam(model, image, target, layer=model.resnet.encoder.stages[-2])
    found = {"gradcam": stages_of_map(prior)}
    regions = split_by_saliency(prior, grid, PER_REGION)
    calls = 2 + len(regions) * (len(regions) + 1)
    for name, explainer in PEERS.items():
        options = {} if name == "occlusion" else {"seed": seed}
        found[name] = stages_of_map(explainer(ClassifierScorer(model), image, target, images=calls, **options))
    for name, weights in SMDL_WEIGHTS.items():
        found[name] = SMDL(model, weights=weights).explain(image, regions, target).stages
    return found


def part_found(stages: Tensor, part: Tensor) -> float:
    """How much of the deciding part lies in the first fifth of the ranked area; chance is 0.2."""
    share = stages.flatten(1).float().mean(1).cumsum(0)
    last = int((share < 0.2).sum())
    before = float(share[last - 1]) if last else 0.0
    sure = float((stages[:last].any(0) & part).sum()) if last else 0.0
    fraction = (0.2 - before) / max(float(share[last]) - before, 1e-9)
    return (sure + fraction * float((stages[last] & part).sum())) / float(part.sum())


def measured(
    networks: tuple[ResNetForImageClassification, ResNetForImageClassification],
    image: Tensor,
    target: int,
    part: Tensor,
    seed: int,
    grid: int,
) -> dict[str, dict[str, float]]:
    """Every measure of every explainer on one image; networks: the explained one and the judge."""
    model, judge = networks
    found = {}
    for name, stages in rankings(model, image, target, seed, grid).items():
        own = judged(ClassifierScorer(model), image, stages, target).as_dict()
        other = judged(ClassifierScorer(judge), image, stages, target).as_dict()
        found[name] = {m: own[m] for m in ("insertion", "deletion", "highest_25")}
        found[name] |= {"judge_insertion": other["insertion"], "judge_deletion": other["deletion"]}
        found[name]["part_found"] = part_found(stages, part)
    return found


def experiment(seed: int, smoke: bool) -> dict[str, float]:
    """Means over images; ours and baseline are insertion less deletion on right images, the baseline its best peer."""
    steps, count = (3, 1) if smoke else (STEPS, IMAGES)
    world = World(seed=500 + seed, genera=SPECIES // 2, species_per_genus=2)
    model, judge = trained(world, seed, steps), trained(world, 10_000 + seed + 1, steps)
    figures: dict[str, float] = {}
    cases = examples(model, world, count)
    figures["accuracy"] = float(cases.pop("accuracy")[0][0])
    for kind, rows in cases.items():
        if not rows:
            raise ValueError(f"the model has no {kind} test images at seed {seed}")
        each = [measured((model, judge), *row, seed=i, grid=4 if smoke else GRID) for i, row in enumerate(rows)]
        for name in each[0]:
            for measure in MEASURES:
                figures[f"{kind}_{name}_{measure}"] = round(sum(e[name][measure] for e in each) / len(each), 4)

    def gap(name: str) -> float:
        return figures[f"right_{name}_insertion"] - figures[f"right_{name}_deletion"]

    return {"baseline": max(gap(name) for name in PEERS), "ours": gap("smdl"), **figures}


def conditions(rows: list[dict[str, Any]]) -> dict[str, bool]:
    """The rest of what is expected, each against the best equal-budget peer on the mean over seeds."""

    def mean(name: str) -> float:
        return sum(r[name] for r in rows) / len(rows)

    def best(kind: str, measure: str, lower: bool = False) -> float:
        return (min if lower else max)(mean(f"{kind}_{p}_{measure}") for p in PEERS)

    return {
        "insertion better by 0.03": mean("right_smdl_insertion") >= best("right", "insertion") + 0.03,
        "deletion better by 0.03": mean("right_smdl_deletion") <= best("right", "deletion", lower=True) - 0.03,
        "wrong images: 25% more confidence in the true class at 25% of the area": mean("wrong_smdl_highest_25")
        >= 1.25 * best("wrong", "highest_25"),
        "a second network agrees (insertion)": mean("right_smdl_judge_insertion") > best("right", "judge_insertion"),
    }


PROOF = Proof(
    system="smdl",
    claim="at about 650 model calls, SMDL's order of regions has a larger gap between insertion and deletion than any peer's",
    substrate="48x48 microworld images of 10 species in 5 genera; small ResNet; 25 regions from a Grad-CAM prior",
    baseline="the best of RISE, occlusion, Kernel SHAP and HSIC on each seed, at as many model calls",
    metric="insertion AUC less deletion AUC on correctly classified images",
    higher_is_better=True,
    margin=0.1,
    modules=tuple(
        f"grainwise.explain.{name}"
        for name in ("smdl", "greedy_sets", "regions", "set_scorer", "faithfulness", "simple_explainers")
    ),
    run=experiment,
    conditions=conditions,
    note="Not shown: at equal model calls RISE and Kernel SHAP order the pixels of so small an image as well (652 random masks "
    "cover 49 patches many times), and the Grad-CAM prior pairs patches that do not belong together. Weights are those of the "
    "released results (0, 0.05, 1, 1): with all at 1, the paper's default, effectiveness grows with the set and drowns the "
    "others (smdl_all_one). SMDL optimises nearly the curves that judge it; the second network and the share of the deciding "
    "part found in the first fifth of the area (part_found, chance 0.2) are the independent figures. Grad-CAM costs one pass "
    "and is listed only.",
)
