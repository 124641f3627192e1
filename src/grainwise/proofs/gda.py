"""GDA's claim on a small machine: on the same few features it beats a Tip-Adapter cache, at a fraction of a probe's cost.

The zoo's CLIP meets 20 new species, pairs of which are siblings. The text of a class names its kind and the colours of its
two main parts, which siblings often share: only the images tell them apart. All arms get the same images, the same ten views of
each, the same validation rows and the same values of alpha; Tip-Adapter also searches its beta, and the linear probe its
regularisation.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from grainwise.proofs.frame import Proof
from grainwise.proofs.substrates.clip_mini import NORMALISED, clip_mini
from grainwise.proofs.substrates.world_pictures import pictures
from grainwise.recognize.caps_adapter import TipAdapter
from grainwise.recognize.feature_bank import FeatureBank
from grainwise.recognize.gda import ALPHAS, GDAClassifier
from grainwise.recognize.logit_ensemble import search
from grainwise.recognize.text_classifier import TextClassifier
from grainwise.world import World
from grainwise.zoo.vision.specs import IMAGE

GENERA, SIBLINGS, VIEWS = 10, 2, 10
CLASSES = GENERA * SIBLINGS
VALIDATION, TEST, MOST = 4, 40, 50  # images a class for validation, for the test, and at most for training
SHOTS = (1, 2, 4, 8, 16)
BETAS = (1.0, 2.0, 5.5, 10.0, 20.0, 50.0, 100.0)
PENALTIES = (0.1, 1.0, 10.0)


class Task:
    """One world: text, validation and test features, and the bank that shots are taken from."""

    def __init__(self, seed: int, smoke: bool) -> None:
        self.clip, words = clip_mini()
        self.world, self.seed = World(seed=20_000 + seed, genera=GENERA, species_per_genus=SIBLINGS), seed
        species = self.world.species
        prompts = {s.name: [s.describe("medium")] for s in species}
        self.text = TextClassifier.from_prompts(self.clip, words, list(prompts), (), descriptions=prompts)
        self.validation = self.features(VALIDATION, 10_000)
        self.size = 4 if smoke else TEST
        self.test = self.features(self.size, 20_000)
        y = np.arange((6 if smoke else MOST) * CLASSES) % CLASSES
        views = 3 if smoke else VIEWS
        self.pool = FeatureBank.encode(self.clip, pictures(self.world, y, 0, IMAGE), y, views=views, **NORMALISED, seed=seed)

    def features(self, count: int, first: int, style: str = "plain") -> tuple[Tensor, Tensor]:
        """(features, labels) of `count` images of every class."""
        y = np.arange(count * CLASSES) % CLASSES
        bank = FeatureBank.encode(self.clip, pictures(self.world, y, first, IMAGE, style=style), y, **NORMALISED)
        return bank.x, bank.y

    def bank(self, counts: list[int]) -> FeatureBank:
        """The first so many pool images of each class, in ten views each."""
        assert self.pool.labels is not None
        place = torch.arange(len(self.pool)) // CLASSES
        rows = place < torch.tensor(counts)[self.pool.labels]
        return FeatureBank(self.pool.views[rows], self.pool.labels[rows])


def accuracy(logits: Tensor, labels: Tensor) -> float:
    return 100 * float((logits.argmax(1) == labels).float().mean())


def gaussian(task: Task, bank: FeatureBank, shrinkage: str) -> GDAClassifier:
    return GDAClassifier(task.text, shrinkage=shrinkage).fit(bank.x, bank.y, validation=task.validation)


def linear_probe(task: Task, bank: FeatureBank) -> Tensor:
    """Test logits of zero-shot plus alpha times logistic regression, penalty and alpha by validation."""
    x, y = task.validation
    best: tuple[int, Tensor] | None = None
    for penalty in PENALTIES:
        model = LogisticRegression(C=penalty, max_iter=300).fit(bank.x.numpy(), bank.y.numpy())
        weight = torch.tensor(model.coef_.T, dtype=torch.float32)
        bias = torch.tensor(model.intercept_, dtype=torch.float32)
        found = search(task.text.logits(x), {"a": x @ weight + bias}, {"a": ALPHAS}, y)
        if best is None or found.correct > best[0]:
            logits = task.text.logits(task.test[0]) + found.weights["a"] * (task.test[0] @ weight + bias)
            best = found.correct, logits
    assert best is not None
    return best[1]


def arms(task: Task, counts: list[int]) -> dict[str, float]:
    """Test accuracy of every arm, and the seconds of GDA and of the probe, for so many images of each class."""
    bank, (x, y) = task.bank(counts), task.test
    tip = TipAdapter(task.text, bank).search(*task.validation, grids={"beta": BETAS, "alpha": ALPHAS}, exhaustive=True)
    started = time.perf_counter()
    ours = gaussian(task, bank, "ks").predict_logits(x)
    middle = time.perf_counter()
    probe = linear_probe(task, bank)
    ended = time.perf_counter()
    return {
        "zero_shot": accuracy(task.text.logits(x), y),
        "nearest_mean": accuracy(gaussian(task, bank, "identity").predict_logits(x), y),
        "tip": accuracy(tip(x), y),
        "probe": accuracy(probe, y),
        "gda": accuracy(ours, y),
        "seconds_gda": middle - started,
        "seconds_probe": ended - middle,
    }


def robustness(task: Task) -> dict[str, float]:
    """A long tail (50 down to 1 images a class) and, for 16 shots, test images drawn in another style."""
    tail = [max(1, round(MOST * MOST ** (-k / (CLASSES - 1)))) for k in range(CLASSES)]
    found = {f"long_tail_{name}": value for name, value in arms(task, tail).items() if not name.startswith("seconds")}
    x, y = task.features(task.size, 30_000, style="ink")
    found["shifted_zero_shot"] = accuracy(task.text.logits(x), y)
    bank = task.bank([16] * CLASSES)
    tip = TipAdapter(task.text, bank).search(*task.validation, grids={"beta": BETAS, "alpha": ALPHAS}, exhaustive=True)
    found["shifted_tip"] = accuracy(tip(x), y)
    found["shifted_gda"] = accuracy(gaussian(task, bank, "ks").predict_logits(x), y)
    return found


def base_to_new(task: Task) -> dict[str, float]:
    """Ten base classes with 16 shots and ten new ones by text: zero-shot, GDA with text-only new classes, and `extend`."""
    bank, (x, y), half = task.bank([16] * CLASSES), task.test, CLASSES // 2
    kept, held = bank.y < half, task.validation[1] < half
    base, new = TextClassifier(task.text.weights[:, :half]), TextClassifier(task.text.weights[:, half:])
    validation = task.validation[0][held], task.validation[1][held]
    model = GDAClassifier(base).fit(bank.x[kept], bank.y[kept], validation=validation)
    old = y < half
    zero = accuracy(base.logits(x[old]), y[old]), accuracy(new.logits(x[~old]), y[~old] - half)
    ours = (
        accuracy(model.predict_logits(x[old]), y[old]),
        accuracy(model.extend(new).predict_logits(x[~old]), y[~old] - half),
    )
    found = {"base_zero_shot": zero[0], "base_gda": ours[0], "new_zero_shot": zero[1], "new_extend": ours[1]}
    found |= {"harmonic_zero_shot": harmonic(*zero), "harmonic_text_only_new": harmonic(ours[0], zero[1])}
    return found | {"harmonic_extend": harmonic(*ours)}


def harmonic(a: float, b: float) -> float:
    return 2 * a * b / (a + b)


def unsupervised(task: Task) -> dict[str, float]:
    """Expectation maximisation on 500 unlabelled images, scored on the test images."""
    x, y = task.test
    model = GDAClassifier(task.text).fit_unsupervised(task.pool.views[:500, 0], iters=10)
    return {
        "unlabelled_zero_shot": accuracy(task.text.logits(x), y),
        "unlabelled_gda": accuracy(model.predict_logits(x), y),
    }


def isotropic(seed: int) -> dict[str, float]:
    """The control: with uncorrelated noise there is nothing to whiten, and GDA should do no better than nearest mean."""
    g = torch.Generator().manual_seed(seed)
    means = torch.randn(CLASSES, 64, generator=g)
    y, test_y = torch.arange(CLASSES).repeat_interleave(8), torch.arange(CLASSES).repeat(100)
    x = means[y] + 3 * torch.randn(len(y), 64, generator=g)
    test = means[test_y] + 3 * torch.randn(len(test_y), 64, generator=g)
    return {
        "isotropic_nearest_mean": accuracy(GDAClassifier(shrinkage="identity").fit(x, y).predict_logits(test), test_y),
        "isotropic_gda": accuracy(GDAClassifier().fit(x, y).predict_logits(test), test_y),
    }


def experiment(seed: int, smoke: bool) -> dict[str, float]:
    """Every figure of one world."""
    task = Task(seed, smoke)
    shots = (1, 4) if smoke else SHOTS
    figures = {f"{name}_{n}": value for n in shots for name, value in arms(task, [n] * CLASSES).items()}
    figures |= robustness(task) | base_to_new(task) | unsupervised(task) | isotropic(seed)

    def mean(arm: str) -> float:
        """Over the tasks of at least four shots."""
        return float(np.mean([figures[f"{arm}_{n}"] for n in shots if n >= 4]))

    ours = {"baseline": mean("tip"), "ours": mean("gda"), "nearest_mean": mean("nearest_mean"), "probe": mean("probe")}
    return {name: round(value, 4) for name, value in (ours | figures).items()}


def conditions(rows: list[dict[str, Any]]) -> dict[str, bool]:
    """What else the sheet of experiments expects."""

    def mean(name: str) -> float:
        return sum(r[name] for r in rows) / len(rows)

    return {
        "2 points above Tip-Adapter, mean over 4 to 16 shots": mean("ours") >= mean("baseline") + 2,
        "above nearest mean": mean("ours") > mean("nearest_mean"),
        "one shot loses at most a point on zero-shot": mean("gda_1") >= mean("zero_shot_1") - 1,
        "harmonic mean of base and new 2 points above zero-shot": mean("harmonic_extend") >= mean("harmonic_zero_shot") + 2,
        "`extend` loses nothing on new classes": mean("new_extend") >= mean("new_zero_shot"),
        "unlabelled images gain 2 points on zero-shot": mean("unlabelled_gda") >= mean("unlabelled_zero_shot") + 2,
        "no gain on uncorrelated noise": mean("isotropic_gda") <= mean("isotropic_nearest_mean") + 1,
    }


PROOF = Proof(
    system="gda",
    claim="with 4 to 16 images a class, one closed-form step beats a tuned Tip-Adapter cache on the same features",
    substrate="20 microworld species at 64x64 of worlds that zoo/clip-mini has not seen; its features",
    baseline="Tip-Adapter cache, alpha and beta chosen on the same validation rows",
    metric="test accuracy, mean over 4, 8 and 16 shots",
    higher_is_better=True,
    margin=0.02,
    modules=tuple(
        f"grainwise.recognize.{name}"
        for name in ("gda", "class_statistics", "shared_covariance", "logit_ensemble", "text_classifier", "feature_bank")
    ),
    run=experiment,
    conditions=conditions,
    note="`extend` loses on new classes here, with 10 or 60 base classes, with short or full texts (seeds 10, 11): the "
    "nearest base features differ from the new class in several parts. With full texts zero-shot starts at 70% and all gains "
    "are smaller.",
)
