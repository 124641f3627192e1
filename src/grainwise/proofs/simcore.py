"""SimCore's claim on a small machine: with its coreset, self-supervised features beat those with a random part of the pool.

The target is 200 unlabelled pictures of 20 species of birds in five genera. The pool holds 12,000: 8% other birds, 20% of
three kinds near them, and other things, bare ground, handwritten digits and noise. Every arm trains a fresh network by SimCLR
for as many steps; the encoder that selects is the arm that saw the target alone. Labels are used by the probes only.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from grainwise.proofs.frame import Proof
from grainwise.select.self_supervised import SSLPretrainer, features, knn_probe, linear_probe
from grainwise.select.simcore import SimCore
from grainwise.world import Nuisance, World

SIZE, SPECIES, SIBLINGS, TARGET, POOL = 32, 20, 4, 200, 12_000
FAMILY, RELATED = 0.08, 0.20
STEPS, BATCH = 160, 128
PROBE, TEST = 600, 1_000  # labelled pictures for the probes, and to test on
QUIET = Nuisance(clutter=0, occlusion=0.0, backgrounds=("snow", "sand"))
KIND, NEAR = "bird", ("fish", "beetle", "snail")


class SmallNet(nn.Sequential):
    """Four blocks of convolution, normalisation and ReLU, pooled and standardised: features (n, 192)."""

    def __init__(self) -> None:
        layers: list[nn.Module] = []
        for before, after, stride in ((3, 32, 2), (32, 64, 2), (64, 128, 2), (128, 192, 1)):
            layers += [nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(192, affine=False))


def fresh(seed: int) -> SmallNet:
    torch.manual_seed(seed)
    return SmallNet()


def pictures(world: World, count: int, first: int) -> tuple[Tensor, np.ndarray]:
    """(images float32 (count, 3, 32, 32) in [0, 1], species), evenly over the species."""
    labels = np.arange(count) % len(world)
    drawn = world.draw(labels, first + np.arange(count), size=SIZE, nuisance=QUIET)
    return torch.from_numpy(drawn.images).permute(0, 3, 1, 2).float() / 255, labels


def open_pool(seed: int, count: int) -> tuple[Tensor, np.ndarray]:
    """(images (count, 3, 32, 32), group: 2 the family, 1 near kinds, 0 the rest), shuffled."""
    rng = np.random.default_rng(seed)
    family, near = round(FAMILY * count), round(RELATED * count)
    noise = flat = written = count // 8
    rest = count - family - near - noise - flat - written
    other_kinds = tuple(k for k in World().kinds if k not in (KIND, *NEAR))
    parts = [
        pictures(World(seed=7_000 + seed, genera=40, species_per_genus=1, kinds=(KIND,)), family, 0)[0],
        pictures(World(seed=8_000 + seed, genera=60, species_per_genus=1, kinds=NEAR), near, 0)[0],
        pictures(World(seed=9_000 + seed, genera=100, species_per_genus=1, kinds=other_kinds), rest, 0)[0],
        torch.rand(noise, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed)),
        coloured_ground(flat, seed),
        digits(written, seed),
    ]
    group = np.repeat([2, 1, 0], [family, near, count - family - near])
    order = rng.permutation(count)
    return torch.cat(parts)[order], group[order]


def digits(count: int, seed: int) -> Tensor:
    """Handwritten digits, enlarged, in a colour each."""
    rng = np.random.default_rng(seed)
    images = torch.tensor(load_digits().images[rng.integers(1797, size=count)], dtype=torch.float32)[:, None] / 16
    colour = torch.from_numpy(rng.random((count, 3, 1, 1))).float()
    return nn.functional.interpolate(images, size=(SIZE, SIZE), mode="bilinear", align_corners=False) * colour


def coloured_ground(count: int, seed: int) -> Tensor:
    """Smooth patches of colour without anybody on them."""
    coarse = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed + 1))
    return nn.functional.interpolate(coarse, size=(SIZE, SIZE), mode="bilinear", align_corners=False)


def experiment(seed: int, smoke: bool) -> dict[str, float]:
    """Probe accuracies of every arm, and what the coreset holds."""
    steps, pool_size, shown = (2, 400, 100) if smoke else (STEPS, POOL, TEST)
    world = World(seed=6_000 + seed, genera=SPECIES // SIBLINGS, species_per_genus=SIBLINGS, kinds=(KIND,))
    target, _ = pictures(world, 100 if smoke else TARGET, 0)
    probe, probe_y = pictures(world, 100 if smoke else PROBE, 100_000)
    test, test_y = pictures(world, shown, 200_000)
    pool, group = open_pool(seed, pool_size)

    def train(images: Tensor) -> nn.Module:
        return SSLPretrainer("simclr", fresh(seed), steps=steps, batch_size=BATCH, seed=seed).fit(images).backbone

    def scores(encoder: nn.Module) -> dict[str, float]:
        one, two = features(encoder, probe), features(encoder, test)
        return {"linear": 100 * linear_probe(one, probe_y, two, test_y), "knn": 100 * knn_probe(one, probe_y, two, test_y)}

    encoder = train(target)
    selector = SimCore(random_state=seed).fit(features(encoder, pool), features(encoder, target))
    chosen = selector.select().indices
    random = np.random.default_rng(seed).choice(pool_size, len(chosen), replace=False)
    arms = {"target": encoder, "random": train(torch.cat([target, pool[random]]))}
    arms["simcore"] = train(torch.cat([target, pool[chosen]]))
    figures = {f"{arm}_{probe_name}": round(v, 3) for arm, net in arms.items() for probe_name, v in scores(net).items()}
    figures |= {"size": len(chosen), "rounds": len(selector.similarity_), "family_in_pool": int((group == 2).sum())}
    figures |= {"purity": float((group[chosen] == 2).mean()), "purity_with_near": float((group[chosen] > 0).mean())}
    figures["base_rate"] = float((group == 2).mean())
    return {"baseline": figures["random_linear"], "ours": figures["simcore_linear"], **figures}


def conditions(rows: list[dict[str, Any]]) -> dict[str, bool]:
    """What else is expected."""

    def mean(name: str) -> float:
        return sum(r[name] for r in rows) / len(rows)

    family, size = mean("family_in_pool"), mean("size")
    return {
        "3 points above random": mean("ours") >= mean("baseline") + 3,
        "3 points above the target alone": mean("ours") >= mean("target_linear") + 3,
        "purity at least 5 times the base rate": mean("purity") >= 5 * mean("base_rate"),
        "the stopping size is within twice the family": family / 2 <= size <= 2 * family,
    }


PROOF = Proof(
    system="simcore",
    claim="SimCLR on target and SimCore's coreset gives better features than on target and as many random rows of the pool",
    substrate="200 32x32 microworld birds of 20 species; an open pool of 12,000 pictures, 8% other birds; four-block CNN",
    baseline="target and a random part of the pool of the coreset's size, as many steps",
    metric="linear-probe accuracy on the target's species",
    higher_is_better=True,
    margin=0.03,
    modules=("grainwise.select.simcore", "grainwise.select.self_supervised", "grainwise.select.clustering"),
    run=experiment,
    conditions=conditions,
)
