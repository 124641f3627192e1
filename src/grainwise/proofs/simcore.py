"""SimCore's claim on a small machine: with its coreset, self-supervised features beat those with a random part of the pool.

The target is 100 unlabelled pictures of 20 species of birds. The pool holds 12,000: 8% other birds, 20% of three kinds near
them, and scenes of other things, patches of colour, handwritten digits and noise. Every arm trains a fresh network by SimCLR
for as many steps; the encoder that selects is the arm that saw the target alone. Labels are used by the probes, and by one
arm more, the oracle, which adds the pool's birds themselves.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from grainwise.evaluate.probes import knn_probe, linear_probe
from grainwise.images import from_uint8
from grainwise.proofs.frame import Proof
from grainwise.select.self_supervised import SSLPretrainer, features
from grainwise.select.simcore import SimCore
from grainwise.world import Scenes, World

SIZE, SPECIES, TARGET, POOL = 32, 20, 100, 12_000
FAMILY, RELATED = 0.08, 0.20
STEPS, BATCH = 180, 64
PROBE, TEST = 600, 1_000  # labelled pictures for the probes, and to test on
KIND, NEAR = "bird", ("fish", "beetle", "snail")
OTHERS = tuple(kind for kind in World().kinds if kind not in (KIND, *NEAR))


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
    return from_uint8(world.draw(labels, first + np.arange(count), size=SIZE).images), labels


def open_pool(seed: int, count: int) -> tuple[Tensor, np.ndarray]:
    """(images (count, 3, 32, 32), group: 2 the family, 1 near kinds, 0 the rest), shuffled."""
    rng = np.random.default_rng(seed)
    family, near = round(FAMILY * count), round(RELATED * count)
    scenes = flat = written = noise = (count - family - near) // 4
    near = count - family - 4 * noise
    others = World(seed=9_000 + seed, genera=60, species_per_genus=1, kinds=OTHERS)
    parts = [
        pictures(World(seed=7_000 + seed, genera=40, species_per_genus=1, kinds=(KIND,)), family, 0)[0],
        pictures(World(seed=8_000 + seed, genera=60, species_per_genus=1, kinds=NEAR), near, 0)[0],
        from_uint8(Scenes(others, seed=seed, size=SIZE).draw(range(scenes)).images),
        coloured_ground(flat, seed),
        digits(written, seed),
        torch.rand(noise, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed)),
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
    world = World(seed=6_000 + seed, genera=SPECIES, species_per_genus=1, kinds=(KIND,))
    target, _ = pictures(world, 100 if smoke else TARGET, 0)
    probe, probe_y = pictures(world, 100 if smoke else PROBE, 100_000)
    test, test_y = pictures(world, shown, 200_000)
    pool, group = open_pool(seed, pool_size)

    def train(added: np.ndarray) -> nn.Module:
        learner = SSLPretrainer("simclr", fresh(seed), steps=steps, batch_size=BATCH, autocast=torch.bfloat16, seed=seed)
        return learner.fit(torch.cat([target, pool[added]])).backbone

    def scores(encoder: nn.Module) -> dict[str, float]:
        one, two = features(encoder, probe), features(encoder, test)
        return {"linear": 100 * linear_probe(one, probe_y, two, test_y), "knn": 100 * knn_probe(one, probe_y, two, test_y)}

    encoder = train(np.arange(0))
    selector = SimCore(random_state=seed).fit(features(encoder, pool), features(encoder, target))
    chosen = selector.select().indices
    random = np.random.default_rng(seed).choice(pool_size, len(chosen), replace=False)
    added = {"random": random, "simcore": chosen, "oracle": np.flatnonzero(group == 2)}
    arms = {"target": encoder} | {arm: train(rows) for arm, rows in added.items()}
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
    substrate="100 32x32 microworld birds of 20 species; an open pool of 12,000 pictures, 8% other birds; four-block CNN",
    baseline="target and a random part of the pool of the coreset's size, as many steps",
    metric="linear-probe accuracy on the target's species",
    higher_is_better=True,
    margin=0.03,
    modules=(
        "grainwise.select.simcore",
        "grainwise.select.self_supervised",
        "grainwise.select.clustering",
        "grainwise.evaluate.probes",
    ),
    run=experiment,
    conditions=conditions,
    note=(
        "Against random rows it shows on every seed (56.8 against 47.8); two other effects of the paper do not, here as on the "
        "development seeds, which gave the figures that follow. In so few steps the target alone is not used up: "
        "100 of its pictures train as good features as 600 (77.5 and 76.1 points after 240 steps), and all that is added, even "
        "the pool's own birds (arm `oracle`), takes steps away from it. And the encoder, which has seen birds alone, finds the "
        "near kinds as close as birds: 94% of a coreset is one or the other, a quarter birds. Strong colours (0.8, hue 0.2) "
        "remove what tells the species apart (32 points, target alone); crops without any colours give 62 where the weak ones "
        "used here give 68. The size of the target was chosen on development seeds, ten to one as in the paper: with 600 "
        "pictures the coreset gained 0.7 points on random rows and the oracle 2.5."
    ),
)
