"""`TextClassifier`: class names and prompt templates as the weight matrix of a zero-shot classifier.

Each class is described by several sentences; their normalised text features are averaged and normalised again (Radford et
al., arXiv 2103.00020). Every training-free method of the room starts from these weights and its logits, 100 x W.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from grainwise.tensor_file import read_tensors, write_tensors

if TYPE_CHECKING:
    from transformers import CLIPModel, PreTrainedTokenizerBase

SCALE = 100.0  # CLIP's learned temperature ends at its upper limit, 1/0.01
UNIT_TOLERANCE = 1e-2


@dataclass(frozen=True)
class TextClassifier:
    """Zero-shot weights float32 (dimension, classes), unit columns, and the names of the classes."""

    weights: Tensor
    class_names: tuple[str, ...] = ()
    scale: float = SCALE

    def __post_init__(self) -> None:
        if self.weights.ndim != 2 or not self.weights.numel():
            raise ValueError(f"text weights must be (dimension, classes), got {tuple(self.weights.shape)}")
        if self.class_names and len(self.class_names) != self.weights.shape[1]:
            raise ValueError(f"{len(self.class_names)} class names for {self.weights.shape[1]} columns of text weights")
        norms = self.weights.float().norm(dim=0)
        if not torch.isfinite(norms).all() or ((norms - 1).abs() > UNIT_TOLERANCE).any():
            raise ValueError(f"text weights must have unit columns, got norms from {norms.min():.3g} to {norms.max():.3g}")

    @property
    def classes(self) -> int:
        """The number of classes."""
        return self.weights.shape[1]

    @property
    def dimension(self) -> int:
        """The length of the features."""
        return self.weights.shape[0]

    @classmethod
    def from_prompts(
        cls,
        clip: CLIPModel,
        tokenizer: PreTrainedTokenizerBase,
        class_names: Sequence[str],
        templates: Sequence[str] = ("a photo of a {}.",),
        *,
        descriptions: Mapping[str, Sequence[str]] | None = None,
        batch_size: int = 256,
    ) -> TextClassifier:
        """Prompts of each class: every template with the name in place of `{}`, and its own `descriptions`.

        Raises ValueError for missing or repeated names, templates without `{}`, or a class without any prompt. Warns when
        prompts are cut at the length of the text tower.
        """
        prompts = [prompts_of(name, templates, descriptions) for name in checked_names(class_names)]
        features = encode_texts(clip, tokenizer, [p for group in prompts for p in group], batch_size=batch_size)
        owner = torch.repeat_interleave(torch.arange(len(prompts)), torch.tensor([len(g) for g in prompts]))
        summed = torch.zeros(len(prompts), features.shape[1]).index_add_(0, owner, features)
        return cls(torch.nn.functional.normalize(summed, dim=1).T.contiguous(), tuple(class_names))

    def logits(self, features: Tensor) -> Tensor:
        """float (rows, classes): scale · x W for unit features (rows, dimension)."""
        self.check(features)
        return self.scale * (features @ self.weights.to(features))

    def check(self, features: Tensor) -> None:
        """Raises ValueError when the features (rows, dimension) don't fit the weights."""
        if features.ndim != 2 or features.shape[1] != self.dimension:
            raise ValueError(f"features are {tuple(features.shape)}, the text weights need (rows, {self.dimension})")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write weights and names as safetensors."""
        about = {"class_names": list(self.class_names), "scale": self.scale}
        write_tensors(path, {"weights": self.weights}, "text classifier", about)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> TextClassifier:
        """Read what `save` wrote. Raises ValueError for another kind of file."""
        tensors, about = read_tensors(path, "text classifier")
        return cls(tensors["weights"], tuple(about["class_names"]), about["scale"])


def checked_names(class_names: Sequence[str]) -> list[str]:
    """The names as a list. Raises ValueError for none, empty or repeated ones."""
    if isinstance(class_names, str) or not len(class_names):
        raise ValueError(f"class names must be a list of at least one name, got {class_names!r}")
    names = list(class_names)
    repeated = sorted({n for n in names if names.count(n) > 1})
    if repeated or not all(n.strip() for n in names):
        raise ValueError(f"class names must be distinct and not empty; repeated: {repeated}")
    return names


def prompts_of(name: str, templates: Sequence[str], descriptions: Mapping[str, Sequence[str]] | None) -> list[str]:
    """All sentences for one class."""
    templates = [templates] if isinstance(templates, str) else list(templates)
    wrong = [t for t in templates if "{}" not in t]
    if wrong:
        raise ValueError(f"the template {wrong[0]!r} has no {{}} where the class name goes")
    prompts = [t.replace("{}", name) for t in templates] + list((descriptions or {}).get(name, ()))
    if not prompts:
        raise ValueError(f"class {name!r} has neither template nor description")
    return prompts


@torch.no_grad()
def encode_texts(clip: CLIPModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, batch_size: int = 256) -> Tensor:
    """Unit text features float32 (texts, dimension). Warns with the number of texts that had to be cut."""
    limit = clip.config.text_config.max_position_embeddings
    lengths = [len(ids) for ids in tokenizer(list(texts), verbose=False)["input_ids"]]
    cut = sum(length > limit for length in lengths)
    if cut:
        warnings.warn(f"{cut} of {len(texts)} texts are longer than {limit} tokens and were cut", stacklevel=3)
    device = next(clip.parameters()).device
    was_training = clip.training
    clip.eval()
    parts = []
    for start in range(0, len(texts), batch_size):
        batch = tokenizer(
            list(texts[start : start + batch_size]), padding=True, truncation=True, max_length=limit, return_tensors="pt"
        )
        inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}
        parts.append(pooled(clip.get_text_features(**inputs)).float().cpu())
    clip.train(was_training)
    return torch.nn.functional.normalize(torch.cat(parts), dim=1)


def pooled(output: Any) -> Tensor:
    """The projected feature of a tower: a tensor as it is, or the `pooler_output` of a model output."""
    return output if isinstance(output, Tensor) else output.pooler_output
