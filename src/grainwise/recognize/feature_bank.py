"""`FeatureBank`: features of labelled images under several views each, computed once and kept.

Training-free methods never touch the encoder again: they work on this bank. Statistics of classes read every view as a
sample (`x`, `y`); caches compare with one key an image, the normalised mean over its views (`keys`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import normalize

from grainwise.images import random_flip, random_resized_crop
from grainwise.recognize.text_classifier import encode_texts, pooled
from grainwise.tensor_file import read_tensors, write_tensors

if TYPE_CHECKING:
    from transformers import CLIPModel, PreTrainedTokenizerBase

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
Transform = Callable[[Tensor, torch.Generator], Tensor]  # (images (n, 3, H, W) in [0, 1], generator) -> the same shape
UNIT_TOLERANCE = 1e-3


@dataclass(frozen=True)
class FeatureBank:
    """Features of images.

    views: unit features float32 (images, views, dimension). labels: int64 (images,), or None. texts: unit features of a
    caption per image float32 (images, dimension), or None.
    """

    views: Tensor
    labels: Tensor | None = None
    texts: Tensor | None = None

    def __post_init__(self) -> None:
        if self.views.ndim != 3 or not self.views.numel():
            raise ValueError(f"views must be (images, views, dimension), got {tuple(self.views.shape)}")
        _check_unit(self.views, "image features")
        if self.labels is not None and self.labels.shape != (len(self),):
            raise ValueError(f"{len(self)} images need {len(self)} labels, got shape {tuple(self.labels.shape)}")
        if self.texts is not None:
            if self.texts.shape != (len(self), self.dimension):
                expected = (len(self), self.dimension)
                raise ValueError(f"caption features must be {expected}, one for each image, got {tuple(self.texts.shape)}")
            _check_unit(self.texts, "caption features")

    def __len__(self) -> int:
        return len(self.views)

    @property
    def dimension(self) -> int:
        """The length of a feature."""
        return self.views.shape[2]

    @property
    def x(self) -> Tensor:
        """float32 (images · views, dimension): every view as a sample."""
        return self.views.flatten(0, 1)

    @property
    def y(self) -> Tensor:
        """int64 (images · views,): the label of each row of `x`. Raises ValueError for a bank without labels."""
        if self.labels is None:
            raise ValueError("this bank has no labels: give them to FeatureBank.encode")
        return self.labels.repeat_interleave(self.views.shape[1])

    @property
    def groups(self) -> Tensor:
        """int64 (images · views,): which image each row of `x` shows."""
        return torch.arange(len(self)).repeat_interleave(self.views.shape[1])

    @property
    def keys(self) -> Tensor:
        """Unit features float32 (images, dimension): the mean over the views, normalised again."""
        return normalize(self.views.mean(1), dim=1)

    @classmethod
    def from_features(cls, features: Tensor, labels: Tensor | None = None, texts: Tensor | None = None) -> FeatureBank:
        """A bank of features (images, dimension) that are already there, one view each; they are normalised here."""
        captions = None if texts is None else normalize(texts.float(), dim=1)
        return cls(normalize(features.float(), dim=1)[:, None], labels, captions)

    @classmethod
    def encode(
        cls,
        clip: CLIPModel,
        images: Tensor,
        labels: Sequence[int] | Tensor | None = None,
        *,
        texts: Sequence[str] | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        views: int = 1,
        transform: Transform | None = None,
        mean: Sequence[float] = CLIP_MEAN,
        std: Sequence[float] = CLIP_STD,
        batch_size: int = 256,
        seed: int = 0,
    ) -> FeatureBank:
        """Encode images float (images, 3, H, W) in [0, 1] with a CLIP image tower.

        views: 1 encodes the images as they are; more encode that many views by `transform` (default: a random crop of 50
        to 100% of the area, resized, and a flip), drawn by `seed`. texts: a caption per image, which needs `tokenizer`.
        mean, std: how the tower wants its channels normalised. Raises ValueError for other shapes or ranges.
        """
        check_images(images)
        if labels is not None and len(labels) != len(images):
            raise ValueError(f"{len(images)} images and {len(labels)} labels: they must be as many")
        if texts is not None and len(texts) != len(images):
            raise ValueError(f"{len(images)} images and {len(texts)} captions: they must be as many")
        if texts is not None and tokenizer is None:
            raise ValueError("captions need the tokenizer of the text tower: give tokenizer=")
        if views < 1:
            raise ValueError(f"views must be at least 1, got {views}")
        generator = torch.Generator().manual_seed(seed)
        change = transform or random_view
        rounds = []
        for _ in range(views):
            seen = images if views == 1 and transform is None else change(images, generator)
            rounds.append(encode_images(clip, seen, mean=mean, std=std, batch_size=batch_size))
        captions = None if texts is None or tokenizer is None else encode_texts(clip, tokenizer, texts, batch_size=batch_size)
        return cls(torch.stack(rounds, 1), None if labels is None else torch.as_tensor(labels, dtype=torch.long), captions)

    def self_accuracy(self, beta: float = 5.5) -> float:
        """How often an image's class wins by its similarity to the other images: tells beforehand whether a bank is any good.

        Similarities a to the other images' keys count exp(-beta (1 - a)), averaged over each class.
        """
        if self.labels is None:
            raise ValueError("this bank has no labels: give them to FeatureBank.encode")
        weight = torch.exp(-beta * (1 - self.keys @ self.keys.T)).fill_diagonal_(0)
        member = torch.nn.functional.one_hot(self.labels).to(weight)
        others = member.sum(0) - member
        return float(((weight @ member / others.clamp(min=1)).argmax(1) == self.labels).float().mean())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the bank as safetensors."""
        parts = {"views": self.views, "labels": self.labels, "texts": self.texts}
        write_tensors(path, {name: t for name, t in parts.items() if t is not None}, "feature bank", {})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> FeatureBank:
        """Read what `save` wrote. Raises ValueError for another kind of file."""
        tensors, _ = read_tensors(path, "feature bank")
        return cls(tensors["views"], tensors.get("labels"), tensors.get("texts"))


@torch.no_grad()
def encode_images(
    clip: CLIPModel,
    images: Tensor,
    *,
    mean: Sequence[float] = CLIP_MEAN,
    std: Sequence[float] = CLIP_STD,
    batch_size: int = 256,
) -> Tensor:
    """Unit image features float32 (images, dimension) of images in [0, 1]."""
    weight = next(clip.parameters())
    centre = torch.tensor(mean, dtype=torch.float32)[:, None, None]
    spread = torch.tensor(std, dtype=torch.float32)[:, None, None]
    was_training = clip.training
    clip.eval()
    parts = []
    for batch in images.split(batch_size):
        pixels = ((batch.float() - centre) / spread).to(weight)
        parts.append(pooled(clip.get_image_features(pixel_values=pixels)).float().cpu())
    clip.train(was_training)
    return normalize(torch.cat(parts), dim=1)


def random_view(images: Tensor, generator: torch.Generator) -> Tensor:
    """A random crop of each image (n, 3, H, W), of 50 to 100% of its area, resized back; half of them are flipped."""
    size = (images.shape[2], images.shape[3])
    return random_flip(random_resized_crop(images, generator, size=size, scale=(0.5, 1.0)), generator)


def check_images(images: Tensor) -> None:
    """Raises ValueError or TypeError unless images are float (images, 3, H, W) in [0, 1]."""
    if not isinstance(images, Tensor) or not images.is_floating_point():
        kind = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"images must be a float tensor in [0, 1], got {kind}: divide 8-bit images by 255")
    if images.ndim != 4 or images.shape[1] != 3 or not len(images):
        raise ValueError(f"images must be (images, 3, height, width), got {tuple(images.shape)}")
    low, high = float(images.min()), float(images.max())
    if not (low >= 0 and high <= 1):
        raise ValueError(f"images must lie in [0, 1] before normalisation, got {low:.3g} to {high:.3g}")


def _check_unit(features: Tensor, what: str) -> None:
    norms = features.float().norm(dim=-1)
    if not torch.isfinite(norms).all() or ((norms - 1).abs() > UNIT_TOLERANCE).any():
        raise ValueError(f"{what} must have unit length, got norms from {norms.min():.4g} to {norms.max():.4g}: normalise them")
