"""How faithful a map is: insertion and deletion curves, the highest confidence on the way, and mu-fidelity.

All explainers are judged by the same code on the same axis, the share of pixels that are visible (or removed). A ranking
enters as stages: disjoint masks in the order in which pixels are added, the regions of an explanation or equal slices of a
pixel map (Petsiuk, Das, Saenko, arXiv 1806.07421).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from grainwise.explain.regions import check_partition
from grainwise.explain.set_scorer import SetScorer

SHARES = (0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Curve:
    """A score along a share of pixels from 0 to 1, both float (points,)."""

    share: Tensor
    score: Tensor

    @property
    def area(self) -> float:
        """The area under the curve, by trapezoids."""
        return float(torch.trapezoid(self.score.double(), self.share.double()))

    def highest(self, share: float = 1.0) -> float:
        """The highest score at a point of at most this share of pixels (the start counts)."""
        return float(self.score[self.share <= share + 1e-9].max())


@dataclass(frozen=True)
class Faithfulness:
    """Both curves of one ranking."""

    insertion: Curve
    deletion: Curve

    def as_dict(self) -> dict[str, float]:
        """insertion, deletion: areas; highest_25 ...: the highest score while inserting that percentage of pixels."""
        found = {"insertion": self.insertion.area, "deletion": self.deletion.area}
        return found | {f"highest_{round(100 * s)}": self.insertion.highest(s) for s in SHARES}


def insertion_curve(scorer: SetScorer, image: Tensor, stages: Tensor, target: int) -> Curve:
    """The target's probability as stages are added on black. image (3, height, width), stages bool (stages, height, width)."""
    visible = _cumulative(image, stages)
    return _curve(scorer, image, visible, target, visible.flatten(1).float().mean(1))


def deletion_curve(scorer: SetScorer, image: Tensor, stages: Tensor, target: int) -> Curve:
    """The target's probability as stages are taken from the full image and painted black."""
    removed = _cumulative(image, stages)
    return _curve(scorer, image, ~removed, target, removed.flatten(1).float().mean(1))


def judged(scorer: SetScorer, image: Tensor, stages: Tensor, target: int) -> Faithfulness:
    """Both curves."""
    return Faithfulness(insertion_curve(scorer, image, stages, target), deletion_curve(scorer, image, stages, target))


def compare(scorer: SetScorer, image: Tensor, rankings: Mapping[str, Tensor], target: int) -> dict[str, dict[str, float]]:
    """The figures of several rankings: stages bool (stages, height, width) as they are, maps float (height, width) sliced."""
    found = {}
    for name, ranking in rankings.items():
        stages = ranking if ranking.dtype == torch.bool else stages_of_map(ranking)
        found[name] = judged(scorer, image, stages, target).as_dict()
    return found


def stages_of_map(heat: Tensor, steps: int = 25) -> Tensor:
    """A map float (height, width) cut into `steps` equally large sets of pixels, the hottest first; ties by position."""
    if heat.ndim != 2 or not torch.isfinite(heat).all():
        raise ValueError(f"a map must be finite and (height, width), got {tuple(heat.shape)}")
    if not 1 <= steps <= heat.numel():
        raise ValueError(f"steps must lie in 1..{heat.numel()}, got {steps}")
    rank = torch.empty(heat.numel(), dtype=torch.long)
    rank[torch.argsort(heat.flatten(), descending=True, stable=True)] = torch.arange(heat.numel())
    stage = (rank * steps // heat.numel()).reshape(heat.shape)
    return stage[None] == torch.arange(steps)[:, None, None]


def mu_fidelity(
    scorer: SetScorer, image: Tensor, heat: Tensor, regions: Tensor, target: int, *, subsets: int = 128, seed: int = 0
) -> float:
    """Correlation between the heat of random halves of the regions and how much the target loses when they turn black.

    (Bhatt, Weller, Moura, arXiv 2005.00631.) heat (height, width); regions bool (regions, height, width). 0 for constant
    heat or scores.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(subsets, len(regions), generator=generator) < 0.5
    removed = (drawn.float() @ regions.flatten(1).float()).bool().reshape(subsets, *regions.shape[1:])
    weight = (removed * heat).flatten(1).sum(1).double()
    full = scorer(image[None]).probabilities[0, target]
    loss = (full - scorer(image * ~removed[:, None]).probabilities[:, target]).double().cpu()
    if float(weight.std()) == 0 or float(loss.std()) == 0:
        return 0.0
    return float(torch.corrcoef(torch.stack([weight, loss]))[0, 1])


def _cumulative(image: Tensor, stages: Tensor) -> Tensor:
    """bool (stages + 1, height, width): what has been reached before the first stage and after each."""
    check_partition(stages, *image.shape[1:])
    nothing = torch.zeros_like(stages[:1], dtype=torch.long)
    return torch.cat([nothing, stages.long()]).cumsum(0).bool()


def _curve(scorer: SetScorer, image: Tensor, visible: Tensor, target: int, share: Tensor) -> Curve:
    scores = scorer(image * visible[:, None].to(image)).probabilities[:, target].cpu()
    return Curve(share, scores)
