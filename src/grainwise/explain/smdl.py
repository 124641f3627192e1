"""SMDL: the few regions that make a model say a class, found by greedy subset selection.

Chen, Zhang, Liang, Li, Cao: "Less is More: Fewer Interpretable Region via Submodular Subset Selection", arXiv 2402.09164.
An image is divided into disjoint regions; a set of them is scored by how certain the model is when it sees only them
(confidence), how different they are from each other (effectiveness), how much they alone speak for the target
(consistency), and how little is left for it without them (collaboration). Regions are added greedily; their order is the
explanation. For a wrong prediction the target is the true class, and the order shows what the model should have used.

Departures: the paper proves submodularity under assumptions that deep networks don't meet (a near-duplicate region lowers
the effectiveness), so its bound is treated as a heuristic. Confidence uses the entropy of the classifier unless an
evidential one is given. Left-over patches form a region instead of being dropped. Distances between regions come from the
first greedy step, whose images are the single regions, at no extra pass.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from grainwise.explain.faithfulness import Curve
from grainwise.explain.greedy_sets import GreedyResult, greedy, lazy_greedy, stochastic_greedy
from grainwise.explain.regions import check_partition, from_numbers
from grainwise.explain.set_scorer import ClassifierScorer, SetScorer
from grainwise.naming import did_you_mean
from grainwise.tensor_file import read_tensors, write_tensors

if TYPE_CHECKING:
    from grainwise.vision_state import VisionState

SCORES = ("confidence", "effectiveness", "consistency", "collaboration")
SEARCHES = ("greedy", "lazy", "stochastic")
MANY_REGIONS = 100


@dataclass(frozen=True)
class Attribution:
    """What SMDL found for one image.

    order: region numbers in the order of choice. masks: bool (regions, height, width). scores: the four scores and `total`
    after each choice, float (k,) each. target: the class. black, full: its probability for a black and the full image.
    images_seen: how many images the model looked at.
    """

    order: list[int]
    masks: Tensor
    scores: dict[str, Tensor]
    target: int
    black: float
    full: float
    images_seen: int

    @property
    def map(self) -> Tensor:
        """float (height, width): 1 for the region chosen first, falling in equal steps; 0 for regions that were not chosen."""
        worth = torch.zeros(len(self.masks))
        worth[self.order] = torch.arange(len(self.order), 0, -1, dtype=torch.float32) / len(self.order)
        return (self.masks * worth[:, None, None]).sum(0)

    @property
    def stages(self) -> Tensor:
        """bool (regions, height, width): the regions in the order of choice, those not chosen after them."""
        rest = [i for i in range(len(self.masks)) if i not in self.order]
        return self.masks[self.order + rest]

    @property
    def insertion(self) -> Curve:
        """The target's probability while regions are added on black, read off the recorded consistency."""
        return self._curve(self.black, self.scores["consistency"], self.full)

    @property
    def deletion(self) -> Curve:
        """The target's probability while regions are removed, read off the recorded collaboration."""
        return self._curve(self.full, 1 - self.scores["collaboration"], self.black)

    @property
    def insertion_auc(self) -> float:
        """The area under the insertion curve: higher is better."""
        return self.insertion.area

    @property
    def deletion_auc(self) -> float:
        """The area under the deletion curve: lower is better."""
        return self.deletion.area

    @property
    def explanation(self) -> list[int]:
        """The regions up to the largest total score: the set that explains the target best."""
        return self.order[: int(self.scores["total"].argmax()) + 1]

    def _curve(self, first: float, scores: Tensor, last: float) -> Curve:
        share = self.masks[self.order].flatten(1).float().mean(1).cumsum(0)
        x = torch.cat([torch.zeros(1), share])
        y = torch.cat([torch.tensor([first]), scores.float()])
        if len(self.order) < len(self.masks):
            x, y = torch.cat([x, torch.ones(1)]), torch.cat([y, torch.tensor([last])])
        return Curve(x, y)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `attribution.safetensors` (masks, order, scores) and a readable `scores.json` into the folder."""
        home = Path(folder)
        home.mkdir(parents=True, exist_ok=True)
        about = {"target": self.target, "black": self.black, "full": self.full, "images_seen": self.images_seen}
        tensors = {"masks": self.masks, "order": torch.tensor(self.order), **self.scores}
        write_tensors(home / "attribution.safetensors", tensors, "SMDL attribution", about)
        record: dict[str, Any] = about | {"order": self.order, "insertion": self.insertion_auc, "deletion": self.deletion_auc}
        record["scores"] = {name: values.tolist() for name, values in self.scores.items()}
        temporary = home / "scores.json.partial"
        temporary.write_text(json.dumps(record, indent=1) + "\n")
        temporary.replace(home / "scores.json")

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Attribution:
        """Read what `save` wrote. Raises ValueError for another kind of file."""
        tensors, about = read_tensors(Path(folder) / "attribution.safetensors", "SMDL attribution")
        masks, order = tensors.pop("masks"), tensors.pop("order").tolist()
        return cls(order, masks, {name: tensors[name] for name in (*SCORES, "total")}, **about)


class SubmodularObjective:
    """F(S) = λ₁ confidence + λ₂ effectiveness + λ₃ consistency + λ₄ collaboration, for sets of regions of one image.

    It is a `greedy_sets.SetFunction`; `details` keeps the scores of every set it was asked for, by (chosen, candidate).
    """

    def __init__(self, scorer: SetScorer, image: Tensor, masks: Tensor, target: int, weights: Sequence[float]) -> None:
        self.scorer, self.image, self.masks, self.target = scorer, image, masks, target
        self.weights = torch.tensor(list(weights), dtype=torch.float64)
        self.size = len(masks)
        ends = scorer(torch.stack([torch.zeros_like(image), image]))
        if not 0 <= target < ends.probabilities.shape[1]:
            raise ValueError(f"target must lie in 0..{ends.probabilities.shape[1] - 1}, got {target}")
        self.black, self.full = ends.probabilities[:, target].tolist()
        self._empty_confidence = float(ends.confidence[0])
        self._checked(ends.probabilities)
        self.distances: Tensor | None = None  # (regions, regions), known after the first step
        self.details: dict[tuple[int, int], Tensor] = {}

    def empty(self) -> float:
        """F of no region: a black image, and the full one as its complement."""
        scores = torch.tensor([self._empty_confidence, 0.0, self.black, 1 - self.full], dtype=torch.float64)
        return float(scores @ self.weights)

    def values(self, chosen: Sequence[int], candidates: Sequence[int]) -> Tensor:
        """float64 (candidates,): F of the chosen regions with each candidate; two images a candidate, in batches."""
        offered = torch.as_tensor(list(candidates))
        visible = self.masks[list(chosen)].any(0) | self.masks[offered]
        shown = visible[:, None].to(self.image)
        scores = self.scorer(torch.cat([self.image * shown, self.image * (1 - shown)]))
        self._checked(scores.probabilities)
        with_set, without = scores.probabilities[:, self.target].double().cpu().chunk(2)
        count = len(offered)
        if not len(chosen):
            self._remember(scores.features[:count], offered)
        effective = self._effectiveness(list(chosen), offered)
        parts = torch.stack([scores.confidence[:count].double().cpu(), effective, with_set, 1 - without], 1)
        totals = parts @ self.weights
        for i, row, total in zip(candidates, parts, totals):
            self.details[len(chosen), i] = torch.cat([row, total[None]])
        return totals

    def _remember(self, features: Tensor, offered: Tensor) -> None:
        """Distances between single regions, arccos(cosine) / π, from the features of the first step."""
        if self.distances is None:
            self.distances = torch.full((self.size, self.size), torch.nan, dtype=torch.float64)
        unit = nn.functional.normalize(features.double().cpu(), dim=1)
        self.distances[offered[:, None], offered[None]] = (unit @ unit.T).clamp(-1, 1).arccos() / torch.pi

    def _effectiveness(self, chosen: list[int], offered: Tensor) -> Tensor:
        """float64 (offered,): Σ over the set of the distance to the nearest other member; 0 for a single region."""
        if not chosen:
            return torch.zeros(len(offered), dtype=torch.float64)
        assert self.distances is not None
        to_new = self.distances[chosen][:, offered]  # (chosen, offered)
        among = self.distances[chosen][:, chosen].clone().fill_diagonal_(torch.inf)
        return torch.minimum(among.amin(1)[:, None], to_new).sum(0) + to_new.amin(0)

    def _checked(self, probabilities: Tensor) -> None:
        if not torch.isfinite(probabilities).all():
            raise FloatingPointError("the model's answers hold NaN or infinite values: check its weights and the image's range")


class SMDL:
    """The explainer: `attribute` in Captum's shape, or `explain` for the full record.

    model: an image classifier in evaluation mode, or a `SetScorer`. weights: of confidence, effectiveness, consistency and
    collaboration. search: `greedy`, `lazy` (re-evaluates only candidates that can still win, `block` at a time) or
    `stochastic` (a random part of the candidates, by `epsilon` and `seed`). options: those of `ClassifierScorer`.
    """

    def __init__(
        self,
        model: nn.Module | SetScorer,
        *,
        weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
        search: str = "greedy",
        block: int = 8,
        epsilon: float = 0.1,
        seed: int = 0,
        **options: Any,
    ) -> None:
        if search not in SEARCHES:
            raise ValueError(f"unknown search {search!r}. {did_you_mean(search, SEARCHES)}")
        if len(weights) != len(SCORES) or min(weights) < 0 or max(weights) <= 0:
            raise ValueError(f"weights must be four values from 0 up, for {', '.join(SCORES)}, got {tuple(weights)}")
        if options and not isinstance(model, nn.Module):
            raise ValueError(f"{sorted(options)} are for plain models: give them to your scorer")
        self.scorer: SetScorer = ClassifierScorer(model, **options) if isinstance(model, nn.Module) else model
        self.weights, self.search = tuple(weights), search
        self.block, self.epsilon, self.seed = block, epsilon, seed

    def explain(self, image: Tensor, masks: Tensor, target: int, *, k: int | None = None) -> Attribution:
        """Order the regions of one image.

        image: float (3, height, width) in [0, 1]. masks: bool (regions, height, width), a partition. target: the class to
        explain; the true one, to see what a wrong prediction missed. k: how many regions to choose, all by default. Raises
        ValueError for other shapes and ranges, overlapping or empty regions, unknown targets.
        """
        check_image(image)
        masks = check_partition(masks, *image.shape[1:])
        k = len(masks) if k is None else k
        if not 1 <= k <= len(masks):
            raise ValueError(f"k must lie between 1 and the {len(masks)} regions, got {k}")
        if len(masks) > MANY_REGIONS and self.search == "greedy":
            passes = 2 * sum(len(masks) - t for t in range(k))
            warnings.warn(f"{len(masks)} regions need about {passes} images: use fewer or search='lazy'", stacklevel=2)
        seen = self.scorer.images_seen
        objective = SubmodularObjective(self.scorer, image, masks.to(image.device), int(target), self.weights)
        found = self._search(objective, k)
        table = torch.stack([objective.details[t, i] for t, i in enumerate(found.order)]).float()
        scores = dict(zip((*SCORES, "total"), table.T))
        images = self.scorer.images_seen - seen
        return Attribution(found.order, masks.cpu(), scores, int(target), objective.black, objective.full, images)

    def attribute(self, inputs: Tensor, target: int | Sequence[int] | Tensor, feature_mask: Tensor) -> Tensor:
        """Maps like the inputs, float (images, 3, height, width), 1 where the first region is and 0 at the last.

        inputs: float (images, 3, height, width) in [0, 1]. target: a class, or one for each image. feature_mask: region
        numbers as in Captum, integers (height, width) or (1 or images, 1, height, width), or a bool partition (regions,
        height, width) for all images.
        """
        if inputs.ndim != 4:
            raise ValueError(f"inputs must be (images, 3, height, width), got {tuple(inputs.shape)}")
        targets = torch.as_tensor(target).flatten().tolist()
        targets = targets * len(inputs) if len(targets) == 1 else targets
        if len(targets) != len(inputs):
            raise ValueError(f"{len(inputs)} images and {len(targets)} targets: give one, or one for each image")
        maps = []
        for number, (image, one) in enumerate(zip(inputs, targets)):
            maps.append(self.explain(image, masks_for(feature_mask, number, len(inputs)), one).map)
        return torch.stack(maps)[:, None].expand(-1, inputs.shape[1], -1, -1).to(inputs)

    def _search(self, objective: SubmodularObjective, k: int) -> GreedyResult:
        if self.search == "greedy":
            return greedy(objective, k)
        if self.search == "lazy":
            return lazy_greedy(objective, k, block=self.block)
        objective.values((), range(objective.size))  # distances between all regions
        return stochastic_greedy(objective, k, epsilon=self.epsilon, seed=self.seed)


def masks_for(feature_mask: Tensor, number: int, images: int) -> Tensor:
    """The partition of image `number`, from any of the forms that `attribute` takes."""
    if feature_mask.dtype == torch.bool:
        return feature_mask
    numbers = feature_mask.reshape(-1, *feature_mask.shape[-2:])
    if len(numbers) not in (1, images):
        raise ValueError(f"feature_mask {tuple(feature_mask.shape)} fits neither one nor {images} images")
    return from_numbers(numbers[0 if len(numbers) == 1 else number])


def check_image(image: Tensor) -> None:
    """Raises ValueError or TypeError unless the image is float (3, height, width) in [0, 1]."""
    if not isinstance(image, Tensor) or not image.is_floating_point():
        kind = image.dtype if isinstance(image, Tensor) else type(image).__name__
        raise TypeError(f"an image must be a float tensor in [0, 1], got {kind}: divide 8-bit images by 255")
    if image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(f"an image must be (3, height, width), got {tuple(image.shape)}")
    low, high = float(image.min()), float(image.max())
    if not (low >= 0 and high <= 1):
        raise ValueError(f"an image must lie in [0, 1] before normalisation (0 is black), got {low:.3g} to {high:.3g}")


def recipe_step(
    state: VisionState, *, pictures: int = 6, grid: int = 8, per_region: int = 3, search: str = "greedy"
) -> dict[str, float | int | str]:
    """Explain some test pictures, right and wrong ones in turn; for a wrong one the true class, which shows what was missed.

    grid, per_region: regions are groups of patches of a grid, by a coarse map of what covering each place costs.
    """
    from grainwise.explain.recipe_pictures import explained

    scorer = ClassifierScorer(state.recogniser, mean=state.mean, std=state.std)
    explainer = SMDL(scorer, search=search, seed=state.seed)
    return explained(state, explainer, pictures=pictures, grid=grid, per_region=per_region)
