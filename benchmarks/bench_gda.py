"""GDA: fitting 1,000 classes to 160,000 features of dimension 512, against scikit-learn's LDA and a trained linear probe.

Features are Gaussian with a covariance of decaying spectrum, 16 images of 10 views a class. Accuracy on held-out rows is
reported for every candidate, so that speed is not bought with it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from grainwise.bench import Benchmark, Setting, alternate
from grainwise.recognize.gda import GDAClassifier
from grainwise.recognize.shared_covariance import new_class_precision

CLASSES, DIMENSION, PER_CLASS, HELD_OUT = 1000, 512, 160, 4
PROBE_EPOCHS, PROBE_BATCH, PROBE_LR = 5, 1024, 0.1
NEW_CLASSES, NEAREST = 100, 64


def features() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(train x, train y, test x, test y): unit rows float32, correlated within classes."""
    g = torch.Generator().manual_seed(0)
    spectrum = torch.arange(1, DIMENSION + 1).float() ** -0.5
    turn = torch.linalg.qr(torch.randn(DIMENSION, DIMENSION, generator=g))[0]
    means = 0.15 * torch.randn(CLASSES, DIMENSION, generator=g) * spectrum

    def rows(count: int) -> tuple[Tensor, Tensor]:
        y = torch.arange(CLASSES).repeat_interleave(count)
        noise = torch.randn(len(y), DIMENSION, generator=g) * spectrum
        return normalize((means[y] + noise) @ turn, dim=1), y

    return *rows(PER_CLASS), *rows(HELD_OUT)


def linear_probe(x: Tensor, y: Tensor) -> nn.Linear:
    """One linear layer on standardised rows, trained by AdamW for a few epochs with a one-cycle schedule."""
    torch.manual_seed(0)
    layer = nn.Linear(DIMENSION, CLASSES)
    centre, spread = x.mean(0), x.std(0)
    steps = PROBE_EPOCHS * (len(x) // PROBE_BATCH)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=PROBE_LR)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PROBE_LR, total_steps=steps)
    for step in range(steps):
        if step % (len(x) // PROBE_BATCH) == 0:
            order = torch.randperm(len(x))
        at = order[(step * PROBE_BATCH) % (len(x) // PROBE_BATCH * PROBE_BATCH) :][:PROBE_BATCH]
        optimizer.zero_grad()
        cross_entropy(layer((x[at] - centre) / spread), y[at]).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():  # fold the standardisation into the layer
        layer.weight /= spread
        layer.bias -= layer.weight @ centre
    return layer


def large_fit(runs: int) -> tuple[Setting, dict[str, float]]:
    """Seconds to a fitted classifier."""
    x, y, test_x, test_y = features()
    arrays = x.numpy(), y.numpy()
    accuracy: dict[str, float] = {}

    def keep(name: str, predict: Callable[[], Any]) -> None:
        accuracy[name] = round(float((np.asarray(predict()) == test_y.numpy()).mean()), 4)

    def ours() -> None:
        model = GDAClassifier().fit(x, y)
        keep("ours", lambda: model.predict(test_x))

    def lda(name: str, shrinkage: str | None) -> None:
        model = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage).fit(*arrays)
        keep(name, lambda: model.predict(test_x.numpy()))

    def probe() -> None:
        layer = linear_probe(x, y)
        keep("probe", lambda: layer(test_x).argmax(1).numpy())

    timed = alternate(
        {
            "ours": ours,
            "lda": lambda: lda("lda", None),
            "lda auto": lambda: lda("lda auto", "auto"),
            "probe": probe,
            "limit": lambda: x.T @ x,
        },
        runs=runs,
        warmup=0,
    )
    setting = Setting(
        name=f"fit, {CLASSES} classes, {len(x)} x {DIMENSION}",
        ours=timed["ours"].median,
        naive=timed["probe"].median,
        peers={"sklearn LDA(lsqr)": timed["lda"].median, 'sklearn LDA(lsqr, shrinkage="auto")': timed["lda auto"].median},
        limit={"what": "one product Xᵀ X in float32 alone", "figure": timed["limit"].median},
        extra={"accuracy on held-out rows": accuracy, "naive": f"linear probe, {PROBE_EPOCHS} epochs"},
    )
    return setting, {name: t.spread for name, t in timed.items()}


def new_classes(runs: int) -> tuple[Setting, dict[str, float]]:
    """Seconds to the mean precision of new classes: small systems against one pseudo-inverse for each class."""
    g = torch.Generator().manual_seed(1)
    spread = torch.randn(NEW_CLASSES, NEAREST, DIMENSION, generator=g, dtype=torch.float64) / DIMENSION**0.5

    def naive() -> Tensor:
        total = torch.zeros(DIMENSION, DIMENSION, dtype=torch.float64)
        for v in spread:
            c = v.T @ v / (NEAREST - 1)
            total += DIMENSION * torch.linalg.pinv((NEAREST - 1) * c + c.trace() * torch.eye(DIMENSION), hermitian=True)
        return total / NEW_CLASSES

    gap = float((new_class_precision(spread) - naive()).abs().max())
    timed = alternate({"ours": lambda: new_class_precision(spread), "naive": naive}, runs=min(runs, 3), warmup=0)
    setting = Setting(
        name=f"precision of {NEW_CLASSES} new classes, k = {NEAREST}, dimension {DIMENSION}",
        ours=timed["ours"].median,
        naive=timed["naive"].median,
        extra={"largest difference": gap},
    )
    return setting, {f"new classes, {name}": t.spread for name, t in timed.items()}


def run(runs: int) -> Benchmark:
    """Both settings; a round of the first takes about half a minute, so at most three are made."""
    few = min(runs, 3)
    fit, spread = large_fit(few)
    new, more = new_classes(few)
    return Benchmark(system="gda", unit="s", settings=[fit, new], runs=few, spread=spread | more)
