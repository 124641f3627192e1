"""SMDL in a recipe: which test pictures are explained, how they are shown, and whether the deciding part was found."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from grainwise.explain.regions import split_by_saliency
from grainwise.explain.simple_explainers import occlusion
from grainwise.images import from_uint8
from grainwise.vision_state import VIEW, Picture

if TYPE_CHECKING:
    from grainwise.explain.smdl import SMDL, Attribution
    from grainwise.vision_state import VisionState

PRIOR_IMAGES = 65  # looks that the coarse map of a picture costs
COLD, HOT = np.array([20.0, 30.0, 90.0]), np.array([255.0, 214.0, 10.0])


def explained(
    state: VisionState, explainer: SMDL, *, pictures: int, grid: int, per_region: int
) -> dict[str, float | int | str]:
    """Explain test pictures, add them to `state.pictures`, and return the mean figures."""
    said = state.logits(state.test.images).softmax(1)
    chosen = choice(said, state.test.labels, pictures)
    shown = state.test.show(chosen)
    found, regions = [], 0
    for row, index in enumerate(chosen):
        state.progress(row, len(chosen), "explaining pictures")
        image, target = from_uint8(state.test.images[index][None])[0], int(state.test.labels[index])
        prior = occlusion(explainer.scorer, image, target, images=PRIOR_IMAGES)
        masks = split_by_saliency(prior, grid=grid, per_region=per_region)
        result = explainer.explain(image, masks, target)
        result.save(state.folder / "attributions" / f"{index:05d}")
        state.pictures.append(_picture(state, result, shown[row], said[index], state.test.names[index]))
        found.append((index, result))
        regions = len(masks)
    figures: dict[str, float | int | str] = {"pictures": len(found), "regions": regions}
    figures |= {
        "insertion_auc": round(float(np.mean([r.insertion_auc for _, r in found])), 4),
        "deletion_auc": round(float(np.mean([r.deletion_auc for _, r in found])), 4),
    }
    if state.test.deciding is not None:
        figures |= pointing(found, state.test.deciding)
    return figures


def choice(said: Tensor, labels: Tensor, count: int) -> list[int]:
    """Right and wrong answers in turn, each kind by falling confidence and, while that is possible, of different classes."""
    confidence, answer = said.max(1)
    order = confidence.argsort(descending=True, stable=True).tolist()
    queues = [[i for i in order if bool(answer[i] == labels[i]) is right] for right in (True, False)]
    chosen: list[int] = []
    while len(chosen) < count and any(queues):
        queue = queues[len(chosen) % 2] or queues[(len(chosen) + 1) % 2]
        taken = {int(labels[i]) for i in chosen}
        chosen.append(queue.pop(next((n for n, i in enumerate(queue) if int(labels[i]) not in taken), 0)))
    return chosen


def pointing(found: list[tuple[int, Attribution]], deciding: np.ndarray) -> dict[str, float]:
    """How much of the deciding part the first quarter of the pixels, in the order of the explanation, covers."""
    shares = []
    for index, result in found:
        part = torch.from_numpy(deciding[index])
        area = result.stages.flatten(1).float().mean(1).cumsum(0)
        first = result.stages[: int((area <= 0.25).sum()) or 1].any(0)
        if bool(part.any()):
            shares.append(float((part & first).sum() / part.sum()))
    return {"deciding_part_in_first_quarter": round(float(np.mean(shares)), 4)} if shares else {}


def _picture(state: VisionState, result: Attribution, image: np.ndarray, said: Tensor, name: str) -> Picture:
    heat = interpolate(result.map[None, None], (VIEW, VIEW), mode="bilinear", align_corners=False)[0, 0].numpy()[..., None]
    best = result.masks[result.explanation].any(0)[None, None].float()
    best = interpolate(best, (VIEW, VIEW), mode="nearest")[0, 0].numpy()[..., None]
    overlay = 0.5 * image + 0.5 * (COLD + heat * (HOT - COLD))
    answer = int(said.argmax())
    verdict = "says so" if answer == result.target else f"says {state.classes.names[answer]}"
    size = f"{len(result.explanation)} of {len(result.masks)} regions explain it"
    caption = f"{name}: the recogniser {verdict} ({float(said[answer]):.0%}); {size}"
    panels = (
        ("the picture", image),
        ("regions chosen first are bright", overlay.round().astype(np.uint8)),
        ("the explaining regions alone", np.where(best > 0, image, 24).astype(np.uint8)),
    )
    curves = {
        name: (curve.share.tolist(), curve.score.tolist())
        for name, curve in (("insertion", result.insertion), ("deletion", result.deletion))
    }
    return Picture(caption, panels, curves)
