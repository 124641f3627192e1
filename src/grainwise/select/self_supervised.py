"""Self-supervised pretraining for selection: SimCLR on tensors of images, features before the head, and two probes.

Chen, Kornblith, Norouzi, Hinton: "A Simple Framework for Contrastive Learning of Visual Representations", arXiv 2002.05709.
SimCore needs an encoder of the target, and a fair comparison trains every union for the same number of steps.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from grainwise.images import adjust_saturation, colour_jitter, random_flip, random_resized_crop
from grainwise.naming import did_you_mean

OBJECTIVES = ("simclr",)
Augment = Callable[[Tensor, torch.Generator], Tensor]


class SSLPretrainer:
    """Train a backbone on unlabelled images.

    objective: `simclr`. backbone: a module from images (n, 3, H, W), normalised to mean 0.5 and spread 0.5, to features
    (n, width) or feature maps (n, width, h, w), or a transformers vision model; it is copied, and the copy is trained from
    where it stands, so give a fresh one. steps, batch_size: of training; temperature, head_width: of the loss and its two-layer
    head. autocast: compute type.

    After `fit`: `backbone` (in evaluation mode), `losses`.
    """

    def __init__(
        self,
        objective: str,
        backbone: nn.Module,
        *,
        steps: int,
        batch_size: int = 128,
        lr: float = 2e-3,
        weight_decay: float = 1e-4,
        temperature: float = 0.2,
        head_width: int = 128,
        augment: Augment | None = None,
        autocast: torch.dtype | None = None,
        seed: int = 0,
    ) -> None:
        if objective not in OBJECTIVES:
            raise ValueError(f"unknown objective {objective!r}. {did_you_mean(objective, OBJECTIVES)}")
        if steps < 1 or batch_size < 2 or not temperature > 0:
            raise ValueError(
                f"steps must be at least 1, batch_size 2 and temperature positive, got {steps}, {batch_size}, {temperature}"
            )
        self.backbone = copy.deepcopy(backbone)
        self.steps, self.batch_size, self.lr, self.weight_decay = steps, batch_size, lr, weight_decay
        self.temperature, self.head_width, self.autocast, self.seed = temperature, head_width, autocast, seed
        self.augment = augment or two_view_augmentation
        self.losses: list[float] = []

    def fit(self, images: Tensor) -> Self:
        """Train on images float (n, 3, H, W) in [0, 1]. Raises FloatingPointError at a loss that is not finite."""
        if images.ndim != 4 or images.shape[1] != 3 or len(images) < 2:
            raise ValueError(f"images must be (at least 2, 3, height, width), got {tuple(images.shape)}")
        torch.manual_seed(self.seed)
        generator = torch.Generator().manual_seed(self.seed)
        width = pooled_features(self.backbone.eval(), images[:2]).shape[1]
        head = nn.Sequential(nn.Linear(width, self.head_width), nn.ReLU(), nn.Linear(self.head_width, self.head_width))
        parameters = [*self.backbone.parameters(), *head.parameters()]
        optimizer = torch.optim.AdamW(parameters, lr=self.lr, weight_decay=self.weight_decay)
        total = max(2, self.steps)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, total_steps=total, pct_start=0.1)
        self.backbone.train()
        for step, rows in enumerate(shuffled(len(images), self.batch_size, self.steps, generator)):
            views = torch.cat([self.augment(images[rows], generator) for _ in range(2)])
            with torch.autocast("cpu", self.autocast or torch.bfloat16, enabled=self.autocast is not None):
                found = head(pooled_features(self.backbone, views))
            loss = nt_xent(found.float(), self.temperature)
            if not torch.isfinite(loss):
                raise FloatingPointError(f"the loss is {float(loss.detach())} at step {step}: lower lr or check the images")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            self.losses.append(float(loss.detach()))
        self.backbone.eval()
        return self


def nt_xent(projections: Tensor, temperature: float) -> Tensor:
    """SimCLR's loss of projections (2n, width) whose rows i and n + i show one image: a scalar."""
    unit = normalize(projections, dim=1)
    logits = (unit @ unit.T / temperature).fill_diagonal_(-torch.inf)
    half = len(unit) // 2
    return cross_entropy(logits, torch.arange(2 * half).roll(half))


def two_view_augmentation(images: Tensor, generator: torch.Generator) -> Tensor:
    """A random crop, flip and colours for each image, as SimCLR does on small pictures."""
    size = (images.shape[2], images.shape[3])
    seen = random_flip(random_resized_crop(images, generator, size=size, scale=(0.3, 1.0)), generator)
    seen = colour_jitter(seen, generator, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.05)
    grey = (torch.rand(len(images), generator=generator) < 0.1).to(images)
    return adjust_saturation(seen, 1 - grey)


@torch.no_grad()
def features(encoder: nn.Module, images: Tensor, *, batch_size: int = 512) -> np.ndarray:
    """float32 (images, width): the backbone's output for images (n, 3, H, W) in [0, 1], before any projection head."""
    was_training = encoder.training
    encoder.eval()
    found = torch.cat([pooled_features(encoder, batch).float() for batch in images.split(batch_size)])
    encoder.train(was_training)
    return found.numpy()


def pooled_features(encoder: nn.Module, images: Tensor) -> Tensor:
    """(n, width): a tensor, `pooler_output`, or the mean over positions, of normalised images."""
    output: Any = encoder((images - 0.5) / 0.5)
    if not isinstance(output, Tensor):
        output = output.pooler_output if output.get("pooler_output") is not None else output.last_hidden_state.mean(1)
    return output.mean((2, 3)) if output.ndim == 4 else output


def linear_probe(train: np.ndarray, train_y: np.ndarray, test: np.ndarray, test_y: np.ndarray) -> float:
    """Test accuracy of logistic regression on standardised features."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=200))
    return float(model.fit(train, train_y).score(test, test_y))


def knn_probe(train: np.ndarray, train_y: np.ndarray, test: np.ndarray, test_y: np.ndarray, *, k: int = 20) -> float:
    """Test accuracy of the k nearest neighbours by cosine."""
    from sklearn.neighbors import KNeighborsClassifier

    model = KNeighborsClassifier(min(k, len(train)), metric="cosine", weights="distance").fit(train, train_y)
    return float(model.score(test, test_y))


def shuffled(count: int, batch_size: int, steps: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Row numbers of `steps` batches, reshuffled every epoch; small sets are repeated inside a batch."""
    left = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        while len(left) < batch_size:
            left = torch.cat([left, torch.randperm(count, generator=generator)])
        yield left[:batch_size]
        left = left[batch_size:]
