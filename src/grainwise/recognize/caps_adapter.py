"""CapS-Adapter: a frozen CLIP compared with a support set from both sides, images and captions, without training.

Wang, Yang, Wang, Li, Chen, Yang, Wang: "CapS-Adapter: Caption-based MultiModal Adapter in Zero-Shot Classification", arXiv
2405.16591. A few target images of each class are captioned and the captions turned into more images; the test feature f is
compared with every support image and its caption, a = (1-δ) f·image + δ f·caption, and classes collect
A = Σ exp(-β (1 - a)). A second term B compares class-probability profiles (SuS-X). Logits are 100 f W + α A + γ B; the four
numbers are searched on validation data. `TipAdapter` is δ = γ = 0, `TipX` is δ = 0.

The labels of the few captioned images are used, so results are name-only in the paper's sense, not free of target images.

Departures from the released code: signatures are softmax(f W / T) as in the text (the code overwrites them by a softmax of
the raw feature; `signature="feature"` reproduces that). The rescaling φ uses a fixed range, from the validation data of the
search, so that logits of one image do not depend on its batch. The search intersects lines along γ and refines a coarse grid.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn

from grainwise.naming import did_you_mean
from grainwise.recognize.feature_bank import FeatureBank
from grainwise.recognize.logit_ensemble import LogitEnsemble, correct_along
from grainwise.recognize.text_classifier import TextClassifier
from grainwise.tensor_file import read_tensors, write_tensors

if TYPE_CHECKING:
    from grainwise.vision_state import VisionState

SIGNATURES = ("class", "feature")
CHUNK = 2**24  # affinities in memory at a time
GRIDS: dict[str, tuple[float, ...]] = {
    "delta": tuple(i / 10 for i in range(11)),
    "beta": tuple((1 + 49 * torch.arange(200).double() / 199).tolist()),
    "alpha": tuple((0.1 + 49.9 * torch.arange(20).double() / 19).tolist()),
    "gamma": tuple((0.1 + 29.9 * torch.arange(50).double() / 49).tolist()),
}
COARSE = 10  # every tenth beta first
KEPT = 8  # cells of the coarse grid that are refined


@dataclass(frozen=True)
class Range:
    """What φ maps: divergences low..high onto affinities floor..ceiling."""

    low: float
    high: float
    floor: float
    ceiling: float

    @property
    def slope(self) -> float:
        """Affinity per unit of divergence; 0 when either side is constant."""
        wide = self.high > self.low and self.ceiling > self.floor
        return (self.ceiling - self.floor) / (self.high - self.low) if wide else 0.0


class CapSAdapter:
    """Zero-shot logits with a multimodal cache and a profile term.

    text: zero-shot weights. bank: the support, with labels and (unless delta is 0) caption features. alpha, beta, gamma,
    delta: as in the module's formula; `search` sets them. temperature: of the signatures. signature: `class` or `feature`.
    """

    searched: ClassVar[tuple[str, ...]] = ("delta", "beta", "alpha", "gamma")

    def __init__(
        self,
        text: TextClassifier,
        bank: FeatureBank,
        *,
        alpha: float = 1.0,
        beta: float = 5.5,
        gamma: float = 0.1,
        delta: float = 0.5,
        temperature: float = 0.5,
        signature: str = "class",
    ) -> None:
        if signature not in SIGNATURES:
            raise ValueError(f"unknown signature {signature!r}. {did_you_mean(signature, SIGNATURES)}")
        if not 0 <= delta <= 1 or min(alpha, beta, gamma) < 0 or not temperature > 0:
            raise ValueError(
                "delta must lie in [0, 1], alpha, beta and gamma be at least 0 and temperature positive, got "
                f"delta={delta}, alpha={alpha}, beta={beta}, gamma={gamma}, temperature={temperature}"
            )
        self.text, self.bank, self.labels = text, bank, _checked_labels(text, bank)
        if bank.texts is None and "delta" in self.searched:
            raise ValueError("the bank has no caption features: encode it with texts=, or use TipX or TipAdapter")
        self.alpha, self.beta, self.gamma, self.delta = alpha, beta, gamma, delta
        self.temperature, self.signature = temperature, signature
        self.keys, self.captions = bank.keys, bank.texts
        self.counts = torch.bincount(self.labels, minlength=text.classes).float()
        self.log_signatures = self._log_signature(self.keys)
        self.range = self._measured(self.keys, delta, own=True)

    def __call__(self, features: Tensor) -> Tensor:
        """float32 (rows, classes): logits of unit features (rows, dimension)."""
        self._check(features)
        weights = {"affinity": self.alpha, "profile": self.gamma}
        return torch.cat([LogitEnsemble(weights)(self.text.logits(part), self._terms(part)) for part in self._chunks(features)])

    def predict(self, features: Tensor) -> Tensor:
        """int64 (rows,): the class of the highest logit."""
        return self(features).argmax(1)

    def search(
        self, x: Tensor, y: Tensor, *, grids: Mapping[str, Sequence[float]] | None = None, exhaustive: bool = False
    ) -> Self:
        """Choose the weights by accuracy on validation data x (rows, dimension), y (rows,).

        grids: values for some of delta, beta, alpha, gamma, the paper's otherwise. Unless `exhaustive`, every tenth beta is
        tried first and the best cells are refined. Of equals the first in the order delta, beta, alpha, gamma wins. Empty
        validation data keep the present weights, with a warning.
        """
        if not len(x):
            warnings.warn("there are no validation rows: the present weights are kept", stacklevel=2)
            return self
        self._check(x)
        if y.shape != (len(x),) or int(y.min()) < 0 or int(y.max()) >= self.text.classes:
            raise ValueError(f"labels must be {len(x)} classes in 0..{self.text.classes - 1}, got shape {tuple(y.shape)}")
        wanted = {name: tuple((grids or {}).get(name, GRIDS[name])) for name in self.searched}
        unknown = set(grids or {}) - set(self.searched)
        if unknown or not all(wanted.values()):
            raise ValueError(f"grids may name {', '.join(self.searched)}, each with at least one value; got {sorted(unknown)}")
        deltas, betas = wanted.get("delta", (0.0,)), wanted["beta"]
        self._prepared = {d: self._prepare(x, d) for d in deltas}
        base = self.text.logits(x)

        def tried(cells: list[tuple[float, float]]) -> list[tuple[int, dict[str, float]]]:
            return [self._best_of_cell(base, y, d, b, wanted) for d, b in cells]

        first = betas if exhaustive else betas[::COARSE]
        cells = [(d, b) for d in deltas for b in first]
        found = dict(zip(cells, tried(cells)))
        if not exhaustive:
            top = sorted(cells, key=lambda c: -found[c][0])[:KEPT]
            fine = [(d, c) for d, b in top for c in _neighbours(betas, b) if (d, c) not in found]
            found |= dict(zip(fine, tried(fine)))
        best = max(sorted(found), key=lambda c: found[c][0])
        for name, value in found[best][1].items():
            setattr(self, name, value)
        self.range = self._prepared[best[0]].range
        del self._prepared
        return self

    def explain(self, features: Tensor, *, top: int = 5) -> list[dict[str, Any]]:
        """For each row: the class, what each term adds to its logit, and the support items that speak for it most.

        The items are (number in the bank, its class, its share of the affinity term of the predicted class).
        """
        self._check(features)
        base, terms = self.text.logits(features), self._terms(features)
        total = LogitEnsemble({"affinity": self.alpha, "profile": self.gamma})(base, terms)
        weight = torch.exp(-self.beta * (1 - self._affinity(features, self.delta)))
        found = []
        for row, k in enumerate(total.argmax(1).tolist()):
            mine = torch.where(self.labels == k, weight[row], 0.0)
            best = mine.topk(min(top, int(self.counts[k]))).indices.tolist()
            parts = {"zero_shot": float(base[row, k]), "affinity": self.alpha * float(terms["affinity"][row, k])}
            parts["profile"] = self.gamma * float(terms["profile"][row, k])
            nearest = [(i, int(self.labels[i]), float(mine[i] / mine.sum())) for i in best]
            found.append({"class": k, "logit": float(total[row, k]), "terms": parts, "nearest": nearest})
        return found

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write text weights, bank and settings as one safetensors file."""
        tensors = {"text": self.text.weights, "views": self.bank.views, "labels": self.labels}
        if self.bank.texts is not None:
            tensors["texts"] = self.bank.texts
        about = {name: getattr(self, name) for name in ("alpha", "beta", "gamma", "delta", "temperature", "signature")}
        about |= {"range": vars(self.range), "class_names": list(self.text.class_names), "scale": self.text.scale}
        write_tensors(path, tensors, type(self).__name__, about)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read what `save` of the same class wrote. Raises ValueError for another kind of file."""
        tensors, about = read_tensors(path, cls.__name__)
        text = TextClassifier(tensors["text"], tuple(about.pop("class_names")), about.pop("scale"))
        known = Range(**about.pop("range"))
        bank = FeatureBank(tensors["views"], tensors["labels"], tensors.get("texts"))
        model = cls(text, bank, **{name: about[name] for name in ("temperature", "signature")})
        for name, value in about.items():
            setattr(model, name, value)
        model.range = known
        return model

    def _terms(self, features: Tensor) -> dict[str, Tensor]:
        """The cache term A and the profile term B, both (rows, classes)."""
        affinity = self._class_sums(torch.exp(-self.beta * (1 - self._affinity(features, self.delta))))
        return {"affinity": affinity, "profile": self._profile(self._divergence_sums(features), self.range)}

    def _affinity(self, features: Tensor, delta: float) -> Tensor:
        """a = (1-δ) f·image + δ f·caption, (rows, items)."""
        if self.captions is None or delta == 0:
            return features @ self.keys.T
        return features @ ((1 - delta) * self.keys + delta * self.captions).T

    def _class_sums(self, values: Tensor) -> Tensor:
        """(rows, items) summed over the items of each class: (rows, classes)."""
        return values.new_zeros(len(values), self.text.classes).index_add_(1, self.labels, values)

    def _log_signature(self, features: Tensor) -> Tensor:
        """log softmax of class similarities (rows, classes), or of the raw feature as in the released code."""
        profile = features @ self.text.weights.to(features) if self.signature == "class" else features
        return (profile / self.temperature).log_softmax(1)

    def _divergences(self, features: Tensor) -> Tensor:
        """KL(s(f) || s_n) for every item, (rows, items), by two products."""
        own = self._log_signature(features)
        return ((own.exp() * own).sum(1, keepdim=True) - own.exp() @ self.log_signatures.T).clamp(min=0)

    def _divergence_sums(self, features: Tensor) -> Tensor:
        """Divergences summed over each class, (rows, classes), without the (rows, items) matrix."""
        own = self._log_signature(features)
        by_class = own.new_zeros(self.text.classes, own.shape[1]).index_add_(0, self.labels, self.log_signatures)
        return (own.exp() * own).sum(1, keepdim=True) * self.counts - own.exp() @ by_class.T

    def _profile(self, sums: Tensor, known: Range) -> Tensor:
        """B = -φ(M) L, from the class sums of M; 0 when φ has no range."""
        if known.slope == 0:
            return torch.zeros_like(sums)
        return -(known.slope * (sums - known.low * self.counts) + known.floor * self.counts)

    def _measured(self, features: Tensor, delta: float, *, own: bool = False) -> Range:
        """The range of divergences and affinities of these features; `own`: they are the bank, without the diagonal."""
        low, high, floor, ceiling = torch.inf, -torch.inf, torch.inf, -torch.inf
        at = 0
        for part in self._chunks(features):
            divergence, affinity = self._divergences(part), self._affinity(part, delta)
            if own:
                rows = torch.arange(len(part))
                divergence[rows, at + rows] = divergence[rows, (at + rows + 1) % len(features)]
                affinity[rows, at + rows] = affinity[rows, (at + rows + 1) % len(features)]
            at += len(part)
            low, high = min(low, float(divergence.min())), max(high, float(divergence.max()))
            floor, ceiling = min(floor, float(affinity.min())), max(ceiling, float(affinity.max()))
        found = Range(low, high, floor, ceiling)
        if found.slope == 0 and "gamma" in self.searched:
            warnings.warn("affinities or class profiles are all equal: the profile term is dropped", stacklevel=4)
        return found

    def _prepare(self, x: Tensor, delta: float) -> _Prepared:
        known = self._measured(x, delta)
        return _Prepared(known, self._affinity(x, delta), self._profile(self._divergence_sums(x), known))

    def _best_of_cell(
        self, base: Tensor, y: Tensor, delta: float, beta: float, grids: Mapping[str, Sequence[float]]
    ) -> tuple[int, dict[str, float]]:
        """(rows right, weights) of the best alpha and gamma for one delta and beta."""
        ready = self._prepared[delta]
        term = self._class_sums(torch.exp(-beta * (1 - ready.affinity)))
        alphas, gammas = grids["alpha"], grids.get("gamma", (0.0,))
        settings = {"delta": delta, "beta": beta}
        if len(gammas) == 1 and gammas[0] == 0:
            counts = correct_along(base, term, alphas, y)[:, None]
        else:
            start = base + torch.tensor(alphas).to(base)[:, None, None] * term
            counts = correct_along(start, ready.profile, gammas, y)
        best = int(counts.argmax())
        chosen = {"alpha": alphas[best // len(gammas)], "gamma": gammas[best % len(gammas)]}
        return int(counts.flatten()[best]), settings | chosen

    def _chunks(self, features: Tensor) -> tuple[Tensor, ...]:
        return features.split(max(1, CHUNK // len(self.keys)))

    def _check(self, features: Tensor) -> None:
        self.text.check(features)
        norms = features.norm(dim=1)
        if not torch.isfinite(norms).all() or ((norms - 1).abs() > 1e-3).any():
            span = f"{norms.min():.4g} to {norms.max():.4g}"
            raise ValueError(f"features must have unit length, got norms from {span}: normalise them")


class TipX(CapSAdapter):
    """SuS-X's Tip-X: the image side of the support and the profile term (δ = 0)."""

    searched: ClassVar[tuple[str, ...]] = ("beta", "alpha", "gamma")

    def __init__(self, text: TextClassifier, bank: FeatureBank, **settings: Any) -> None:
        _fixed(settings, ("delta",), "TipX")
        super().__init__(text, bank, delta=0.0, **settings)


class TipAdapter(CapSAdapter):
    """Tip-Adapter: the image side of the support alone (δ = γ = 0)."""

    searched: ClassVar[tuple[str, ...]] = ("beta", "alpha")

    def __init__(self, text: TextClassifier, bank: FeatureBank, **settings: Any) -> None:
        _fixed(settings, ("delta", "gamma"), "TipAdapter")
        super().__init__(text, bank, delta=0.0, gamma=0.0, **settings)


@dataclass(frozen=True)
class _Prepared:
    """What one delta shares among all betas: φ's range, affinities (rows, items), the profile term (rows, classes)."""

    range: Range
    affinity: Tensor
    profile: Tensor


def _neighbours(betas: Sequence[float], beta: float) -> Sequence[float]:
    """The values of the fine grid around a coarse one."""
    at = list(betas).index(beta)
    return betas[max(0, at - COARSE + 1) : at + COARSE]


def _fixed(settings: Mapping[str, Any], names: Sequence[str], owner: str) -> None:
    given = [name for name in names if name in settings]
    if given:
        raise ValueError(f"{owner} fixes {', '.join(names)} to 0: use CapSAdapter to set {given[0]}")


def _checked_labels(text: TextClassifier, bank: FeatureBank) -> Tensor:
    if bank.labels is None:
        raise ValueError("the support needs labels: give them to FeatureBank.encode")
    if bank.dimension != text.dimension:
        raise ValueError(f"the bank's features have dimension {bank.dimension}, the text weights {text.dimension}")
    low, high = int(bank.labels.min()), int(bank.labels.max())
    if low < 0 or high >= text.classes:
        raise ValueError(f"the bank's labels go from {low} to {high}, but there are {text.classes} classes")
    missing = sorted(set(range(text.classes)) - set(bank.labels.tolist()))
    if missing:
        names = [text.class_names[k] if text.class_names else k for k in missing[:10]]
        raise ValueError(f"the support has no item of classes {names}: every class needs some")
    return bank.labels


class CapsHead(nn.Module):
    """A fitted adapter as a head on unit features, so that it can be one part of a classifier."""

    def __init__(self, adapter: CapSAdapter) -> None:
        super().__init__()
        self.adapter = adapter
        for name in ("keys", "captions", "log_signatures"):
            self.register_buffer(name, getattr(adapter, name))

    def forward(self, features: Tensor) -> Tensor:
        """float32 (rows, classes): logits of unit features (rows, dimension)."""
        return self.adapter(features)


def recipe_step(state: VisionState, *, validation: int = 2) -> dict[str, float | int | str]:
    """Build the support from the training pictures, captioned by the texts of their classes.

    validation: pictures of each class that are kept aside while the four weights are searched; the support then has all.
    Raises ValueError when a class has no more pictures than that.
    """
    from grainwise.images import from_uint8
    from grainwise.recognize.text_classifier import encode_texts

    images, labels = from_uint8(state.train.images), state.train.labels
    fewest = int(labels.bincount().min())
    if fewest <= validation:
        raise ValueError(f"validation={validation} leaves a class without support: it has {fewest} training pictures")
    seen = FeatureBank.encode(state.clip, images, labels, mean=state.mean, std=state.std)
    said = encode_texts(state.clip, state.tokenizer, [group[0] for group in state.classes.prompts])[labels]
    aside = torch.zeros(len(labels), dtype=torch.bool)
    for k in range(len(state.classes)):
        aside[torch.nonzero(labels == k)[:validation, 0]] = True
    state.progress(1, 2, "searching the weights")
    part = CapSAdapter(state.text, FeatureBank(seen.views[~aside], labels[~aside], said[~aside]))
    part.search(seen.keys[aside], labels[aside])
    weights = {name: getattr(part, name) for name in part.searched}
    model = CapSAdapter(state.text, FeatureBank(seen.views, labels, said), **weights)
    model.save(state.folder / "caps.safetensors")
    recipe_restore(state)
    return {"support": len(labels)} | {name: round(value, 4) for name, value in weights.items()}


def recipe_restore(state: VisionState, **options: Any) -> None:
    """Set `state.recogniser` from the adapter that `recipe_step` left in `state.folder`."""
    from grainwise.recognize.clip_recogniser import ClipRecogniser

    state.recogniser = ClipRecogniser(state.clip, CapsHead(CapSAdapter.load(state.folder / "caps.safetensors")))
