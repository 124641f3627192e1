"""GLSim as a step of a recipe."""

from __future__ import annotations

import copy
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from grainwise.images import Pipeline, crop_resize, from_uint8, random_flip, random_resized_crop
from grainwise.recognize.clip_recogniser import ShowProgress, keep_classifier, saved_classifier
from grainwise.recognize.glsim.modeling import GLSimForImageClassification
from grainwise.recognize.training import ArrayImages, train_recogniser
from grainwise.vision_state import VIEW, Picture

if TYPE_CHECKING:
    from grainwise.vision_state import VisionState

SHOWN = 8
FRAME = (255, 214, 10)


def recipe_step(
    state: VisionState,
    *,
    top_k: int = 8,
    box: str = "inclusive",
    epochs: int = 20,
    lr: float = 1e-3,
    batch_size: int = 32,
) -> dict[str, float | int | str]:
    """Fine-tune a copy of the recipe's image tower with a second look at its own crops; it becomes the recogniser.

    epochs: passes over the training pictures. lr: of AdamW, cosine schedule. The figures say how much of the picture, and
    (where it is known) how much of the part that tells siblings apart, lies in the crops of the test pictures.
    """
    torch.manual_seed(state.seed)
    tower = copy.deepcopy(state.clip.vision_model)
    model = GLSimForImageClassification.from_encoder(tower, num_labels=len(state.classes), top_k=top_k, box=box)
    side = state.train.images.shape[1]
    record = train_recogniser(
        model,
        ArrayImages(state.train.images, state.train.labels),
        epochs=epochs,
        lr=lr,
        batch_size=batch_size,
        seed=state.seed,
        augment=Pipeline(random_flip, partial(random_resized_crop, size=side, scale=(0.7, 1.0))),
        prepare=state.prepare,
        trainer_options={"callbacks": [ShowProgress(state, "training with crops")]},
        lr_scheduler_type="cosine",
        weight_decay=0.05,
    )
    keep_classifier(state, model)
    boxes = boxes_of(state, model)
    state.pictures += crop_pictures(state, boxes)
    figures: dict[str, float | int | str] = {"steps": len(record.losses), "final_loss": round(record.losses[-1], 4)}
    return figures | coverage(boxes, state.test.deciding, side)


def recipe_restore(state: VisionState, **options: Any) -> None:
    """Set `state.recogniser` from the model that `recipe_step` left in `state.folder`."""
    state.recogniser = saved_classifier(state.folder)


@torch.no_grad()
def boxes_of(state: VisionState, model: GLSimForImageClassification) -> Tensor:
    """float (n, 4): where the model looks again in each test picture."""
    images = state.prepare(from_uint8(state.test.images))
    return torch.cat([model(batch).boxes for batch in images.split(128)])


def coverage(boxes: Tensor, deciding: np.ndarray | None, side: int) -> dict[str, float]:
    """The mean shares of the picture, and of the deciding part's pixels, that lie in the boxes."""
    area = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).float().mean() / side**2
    found = {"crop_share_of_picture": round(float(area), 4)}
    if deciding is None:
        return found
    place = torch.arange(side) + 0.5
    x0, y0, x1, y1 = boxes[:, :, None].unbind(1)
    inside = ((place >= y0) & (place < y1))[:, :, None] & ((place >= x0) & (place < x1))[:, None]
    part = torch.from_numpy(deciding)
    size = part.flatten(1).sum(1)
    share = (part & inside).flatten(1).sum(1)[size > 0] / size[size > 0]
    return found | {"deciding_part_in_crop": round(float(share.mean()), 4)}


def crop_pictures(state: VisionState, boxes: Tensor) -> list[Picture]:
    """Some test pictures of different classes, each with its box and with the crop as the model sees it."""
    chosen = torch.linspace(0, len(boxes) - 1, min(SHOWN, len(boxes))).round().long()
    side = state.test.images.shape[1]
    crops = crop_resize(from_uint8(state.test.images[chosen]), boxes[chosen], side)
    crops = interpolate(crops, (VIEW, VIEW), mode="bilinear", align_corners=False)
    shown = state.test.show(chosen.tolist())
    pictures = []
    for row, index in enumerate(chosen.tolist()):
        panels = (
            ("the picture", framed(shown[row], boxes[index] * VIEW / side)),
            ("the second look", (crops[row].permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()),
        )
        pictures.append(Picture(state.test.names[index], panels))
    return pictures


def framed(image: np.ndarray, box: Tensor, width: int = 3) -> np.ndarray:
    """The image (side, side, 3) with the outline of a box, x0 y0 x1 y1 in pixels."""
    framed = image.copy()
    x0, y0, x1, y1 = (int(v) for v in box.round())
    framed[y0:y1, x0:x1] = FRAME
    inner = (slice(y0 + width, y1 - width), slice(x0 + width, x1 - width))
    framed[inner] = image[inner]
    return framed
