"""Scorers: a model as a black box that turns images into class probabilities, features and a confidence, in one pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from grainwise.naming import did_you_mean

if TYPE_CHECKING:
    from transformers import CLIPModel

CONFIDENCES = ("entropy", "evidential")
Confidence = Callable[[Tensor], Tensor]  # logits (images, classes) -> (images,) in [0, 1]


@dataclass(frozen=True)
class Scores:
    """probabilities float (images, classes), features float (images, width), confidence float (images,)."""

    probabilities: Tensor
    features: Tensor
    confidence: Tensor


class SetScorer(Protocol):
    """What an explainer asks of a model. `images_seen` counts the images of all passes."""

    images_seen: int

    def __call__(self, images: Tensor) -> Scores:
        """Scores of images float (images, 3, height, width) in [0, 1]."""


class ClassifierScorer:
    """An image classifier, from transformers or any module that returns logits.

    mean, std: how the model wants its channels normalised; black is 0 *before* that. confidence: `entropy`, or `evidential`
    for logits trained with `evidential_loss`; evidential_model: a second classifier that is asked for it instead. Features
    are what the last linear layer reads, caught in the same pass.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        mean: Sequence[float] = (0.5, 0.5, 0.5),
        std: Sequence[float] = (0.5, 0.5, 0.5),
        confidence: str = "entropy",
        evidential_model: nn.Module | None = None,
        batch_size: int = 128,
    ) -> None:
        if confidence not in CONFIDENCES:
            raise ValueError(f"unknown confidence {confidence!r}. {did_you_mean(confidence, CONFIDENCES)}")
        if evidential_model is not None and confidence != "evidential":
            raise ValueError('an evidential model is asked for its evidence: use confidence="evidential" with it')
        for part in (model, evidential_model):
            if part is not None and part.training:
                raise ValueError("the model is in training mode, so its answers would be random: call model.eval() first")
        self.model, self.evidential_model = model, evidential_model
        self.head = last_linear(model)
        self.mean = torch.tensor(mean, dtype=torch.float32)[:, None, None]
        self.std = torch.tensor(std, dtype=torch.float32)[:, None, None]
        self.confidence: Confidence = entropy_confidence if confidence == "entropy" else evidential_confidence
        self.batch_size = batch_size
        self.images_seen = 0

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Scores:
        """Scores of images float (images, 3, height, width) in [0, 1]."""
        probabilities, features, confidence = [], [], []
        for batch in images.split(self.batch_size):
            pixels = (batch - self.mean.to(batch)) / self.std.to(batch)
            with caught_input(self.head) as caught:
                logits = logits_of(self.model(pixels)).float()
            evidence = logits if self.evidential_model is None else logits_of(self.evidential_model(pixels)).float()
            probabilities.append(logits.softmax(1))
            features.append(caught[0].float())
            confidence.append(self.confidence(evidence))
            self.images_seen += len(batch)
        return Scores(torch.cat(probabilities), torch.cat(features), torch.cat(confidence))


class ClipScorer:
    """A CLIP image tower with text prototypes (`TextClassifier.weights`, (dimension, classes)) as the classes."""

    def __init__(
        self,
        clip: CLIPModel,
        text_weights: Tensor,
        *,
        scale: float = 100.0,
        mean: Sequence[float] = (0.48145466, 0.4578275, 0.40821073),
        std: Sequence[float] = (0.26862954, 0.26130258, 0.27577711),
        batch_size: int = 128,
    ) -> None:
        if clip.training:
            raise ValueError("the model is in training mode, so its answers would be random: call model.eval() first")
        self.clip, self.text_weights, self.scale = clip, text_weights, scale
        self.mean = torch.tensor(mean, dtype=torch.float32)[:, None, None]
        self.std = torch.tensor(std, dtype=torch.float32)[:, None, None]
        self.batch_size = batch_size
        self.images_seen = 0

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Scores:
        """Scores of images float (images, 3, height, width) in [0, 1]."""
        parts = []
        for batch in images.split(self.batch_size):
            output = self.clip.get_image_features(pixel_values=(batch - self.mean.to(batch)) / self.std.to(batch))
            parts.append((output if isinstance(output, Tensor) else output.pooler_output).float())
            self.images_seen += len(batch)
        features = nn.functional.normalize(torch.cat(parts), dim=1)
        logits = self.scale * features @ self.text_weights.to(features)
        return Scores(logits.softmax(1), features, entropy_confidence(logits))


def entropy_confidence(logits: Tensor) -> Tensor:
    """1 - entropy / log K: 0 for a uniform answer, 1 for a certain one."""
    log_p = logits.log_softmax(1)
    return (1 + (log_p.exp() * log_p).sum(1) / math.log(logits.shape[1])).clamp(0, 1)


def evidential_confidence(logits: Tensor) -> Tensor:
    """1 - u, with the uncertainty u = K / Σ (e + 1) of evidence e = exp(logits), logits clipped to ±10."""
    evidence = logits.clamp(-10, 10).exp()
    return 1 - logits.shape[1] / (evidence + 1).sum(1)


def evidential_loss(logits: Tensor, labels: Tensor, epoch: int) -> Tensor:
    """Mean-square evidential loss (Sensoy, Kaplan, Kandemir, arXiv 1806.01768) of logits (rows, classes), a scalar.

    Expected squared error under the Dirichlet of the evidence, plus its divergence from the uniform one once the evidence
    for the label is removed, weighted by min(1, epoch / 10).
    """
    classes = logits.shape[1]
    target = one_hot(labels, classes).to(logits)
    alpha = logits.clamp(-10, 10).exp() + 1
    total = alpha.sum(1, keepdim=True)
    error = (target - alpha / total) ** 2 + alpha * (total - alpha) / (total**2 * (total + 1))
    misleading = torch.distributions.Dirichlet(target + (1 - target) * alpha)
    divergence = torch.distributions.kl_divergence(misleading, torch.distributions.Dirichlet(torch.ones_like(alpha)))
    return (error.sum(1) + min(1.0, epoch / 10) * divergence).mean()


def logits_of(output: Any) -> Tensor:
    """Logits of a model's output: the tensor itself, or its `logits`."""
    return output if isinstance(output, Tensor) else output.logits


def last_linear(model: nn.Module) -> nn.Linear:
    """The last linear layer, which reads the penultimate features. Raises ValueError when there is none."""
    layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no linear layer to read features from: give a scorer of your own")
    return layers[-1]


@contextmanager
def caught_input(layer: nn.Module) -> Iterator[list[Tensor]]:
    """While active, the list holds the last input of the layer, flattened to (images, width)."""
    caught: list[Tensor] = []

    def keep(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        caught[:] = [arguments[0].flatten(1)]

    handle = layer.register_forward_pre_hook(keep)
    try:
        yield caught
    finally:
        handle.remove()
