"""`sam-mini`: a promptable segmenter of `SamModel`'s class, trained on scenes (Kirillov et al., 2023).

One point or one box asks for the individual it lies on. With several masks allowed, one of the three has to fit the individual
and one the part under the point.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn

from grainwise.training import Progress
from grainwise.world.scenes import FIRST_INSTANCE, SceneBatch
from grainwise.zoo.vision.fitting import fit
from grainwise.zoo.vision.pictures import HELD_OUT, normalise, order_of, scenes
from grainwise.zoo.vision.saving import sam_processor, save_folder
from grainwise.zoo.vision.specs import PATCH, SCENE, VisionSpec

PROMPTS = 4  # a scene
MASK = SCENE // PATCH * 4  # pixels a side of the decoder's masks


def build(spec: VisionSpec) -> nn.Module:
    """The untrained `SamModel`."""
    from transformers import SamConfig, SamMaskDecoderConfig, SamModel, SamPromptEncoderConfig, SamVisionConfig

    torch.manual_seed(spec.seed)
    width = spec.hidden_size // 2
    vision = SamVisionConfig(
        hidden_size=spec.hidden_size,
        output_channels=width,
        num_hidden_layers=spec.layers,
        num_attention_heads=spec.hidden_size // 64,
        image_size=SCENE,
        patch_size=PATCH,
        window_size=8,
        global_attn_indexes=[spec.layers // 2, spec.layers - 1],
        num_pos_feats=width // 2,
        mlp_dim=4 * spec.hidden_size,
        initializer_range=0.02,
    )
    prompt = SamPromptEncoderConfig(hidden_size=width, image_size=SCENE, patch_size=PATCH)
    decoder = SamMaskDecoderConfig(hidden_size=width, mlp_dim=4 * width, num_attention_heads=4, iou_head_hidden_dim=width)
    vision.scale = 1  # of the random frequencies that encode places; the class's own default, 64, makes neighbours unlike
    model = SamModel(SamConfig(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder))
    model.shared_image_embedding.requires_grad_(False)
    return model


def overlap_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Focal plus Dice loss of each mask; logits and target (..., side, side) -> (...)."""
    chance = torch.sigmoid(logits)
    wrong = torch.where(target > 0.5, 1 - chance, chance)
    focal = (nn.functional.binary_cross_entropy_with_logits(logits, target, reduction="none") * wrong**2).mean((-2, -1))
    both = (chance * target).sum((-2, -1))
    dice = 1 - (2 * both + 1) / (chance.sum((-2, -1)) + target.sum((-2, -1)) + 1)
    return 20 * focal + dice


def intersection_over_union(masks: Tensor, target: Tensor) -> Tensor:
    """IoU of bool masks (..., side, side) -> (...); 0 where both are empty."""
    both, either = (masks & target).sum((-2, -1)), (masks | target).sum((-2, -1))
    return both / either.clamp_min(1)


class PromptLoss(nn.Module):
    """The losses of one batch of prompts: masks, and the model's own estimate of their IoU."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, pixel_values: Tensor, points: Tensor, boxes: Tensor, whole: Tensor, part: Tensor, turn: Tensor
    ) -> SimpleNamespace:
        """points: (batch, prompts, 1, 2); boxes: (batch, prompts, 4); whole, part: float (batch, prompts, side, side).

        turn: the number of the step, which decides what is asked: one mask by a point, several by a point, one by a box.
        """
        # `get_image_embeddings` would cut the gradient.
        embeddings = self.model.vision_encoder(pixel_values).last_hidden_state
        several, by_box = int(turn) % 4 == 1, int(turn) % 4 == 3
        if by_box:
            prompt: dict[str, Tensor] = {"input_boxes": boxes}
        else:
            prompt = {"input_points": points, "input_labels": torch.ones(points.shape[:3], dtype=torch.long)}
        output = self.model(image_embeddings=embeddings, multimask_output=several, **prompt)
        return SimpleNamespace(loss=self._loss(output, [whole, part] if several else [whole]))

    def _loss(self, output: object, targets: list[Tensor]) -> Tensor:
        masks = output.pred_masks.float()  # type: ignore[attr-defined]
        total = masks.new_zeros(())
        for target in targets:
            each = overlap_loss(masks, target[:, :, None].expand_as(masks))
            total = total + each.amin(-1).mean()
        with torch.no_grad():
            reached = torch.stack([intersection_over_union(masks > 0, (target > 0.5)[:, :, None]) for target in targets]).amax(
                0
            )
        return total + nn.functional.mse_loss(output.iou_scores.float(), reached)  # type: ignore[attr-defined]


class ScenePool:
    """Scenes kept as arrays: images, panoptic and part maps; prompts are drawn from them."""

    def __init__(self, batch: SceneBatch) -> None:
        self.images, self.panoptic = batch.images, batch.panoptic
        self.parts = np.stack([scene.parts for scene in batch])
        self.counts = np.array([len(scene) for scene in batch])

    def prompts(self, chosen: np.ndarray, count: int, rng: np.random.Generator) -> dict[str, Tensor]:
        """`count` prompts on each of the chosen scenes; points in pixels, masks at the decoder's size."""
        points = np.zeros((len(chosen), count, 1, 2), np.float32)
        boxes = np.zeros((len(chosen), count, 4), np.float32)
        whole = np.zeros((len(chosen), count, SCENE, SCENE), np.float32)
        part = np.zeros_like(whole)
        for row, scene in enumerate(chosen):
            for prompt in range(count):
                mask = self.panoptic[scene] == FIRST_INSTANCE + rng.integers(self.counts[scene])
                ys, xs = np.nonzero(mask)
                pick = rng.integers(len(ys))
                points[row, prompt, 0] = xs[pick] + 0.5, ys[pick] + 0.5
                boxes[row, prompt] = xs.min(), ys.min(), xs.max() + 1, ys.max() + 1
                whole[row, prompt] = mask
                part[row, prompt] = mask & (self.parts[scene] == self.parts[scene, ys[pick], xs[pick]])
        small = (MASK, MASK)
        return {
            "points": torch.from_numpy(points),
            "boxes": torch.from_numpy(boxes),
            "whole": nn.functional.interpolate(torch.from_numpy(whole), small, mode="area"),
            "part": nn.functional.interpolate(torch.from_numpy(part), small, mode="area"),
        }


def train(spec: VisionSpec, out: Path, progress: Progress | None = None, compiled: bool = False) -> None:
    """Train on scenes and write a `SamModel` folder with its processor."""
    model = build(spec)
    pool = ScenePool(scenes(spec.seed).draw(np.arange(spec.pool)))

    def batches() -> Iterator[dict[str, Tensor]]:
        rng = np.random.default_rng(spec.seed)
        for step, chosen in enumerate(order_of(spec, len(pool.images))):
            prompts = pool.prompts(chosen.numpy(), PROMPTS, rng)
            yield {"pixel_values": normalise(pool.images[chosen]), "turn": torch.tensor(step)} | prompts

    if compiled:
        model.vision_encoder.forward = torch.compile(model.vision_encoder.forward)
    fit(PromptLoss(model), batches(), spec, progress)
    save_folder(model, out, sam_processor())


@torch.inference_mode()
def measure(folder: Path, count: int = 100) -> dict[str, float]:
    """Held-out mean IoU at full size: the single mask for a point, for a box, and the best of three for the part."""
    from transformers import SamModel

    model = SamModel.from_pretrained(folder, dtype=torch.float32).eval()
    batch = scenes().draw(HELD_OUT + np.arange(count))
    pool, rng = ScenePool(batch), np.random.default_rng(0)
    found: dict[str, list[float]] = {"point_iou": [], "box_iou": [], "part_iou": []}
    for index in range(count):
        prompts = pool.prompts(np.array([index]), PROMPTS, rng)
        embeddings = model.get_image_embeddings(normalise(batch.images[index : index + 1]))
        ys, xs = prompts["points"][0, :, 0, 1].long().numpy(), prompts["points"][0, :, 0, 0].long().numpy()
        whole = torch.from_numpy(batch.panoptic[index][None] == batch.panoptic[index][ys, xs][:, None, None])
        part = whole & torch.from_numpy(pool.parts[index][None] == pool.parts[index][ys, xs][:, None, None])
        point = {"input_points": prompts["points"], "input_labels": torch.ones(1, PROMPTS, 1, dtype=torch.long)}
        for name, prompt, target, several in (
            ("point_iou", point, whole, False),
            ("box_iou", {"input_boxes": prompts["boxes"]}, whole, False),
            ("part_iou", point, part, True),
        ):
            masks = model(image_embeddings=embeddings, multimask_output=several, **prompt).pred_masks[0]
            large = nn.functional.interpolate(masks, (SCENE, SCENE), mode="bilinear", align_corners=False) > 0
            found[name] += intersection_over_union(large, target[:, None]).amax(-1).tolist()
    return {name: round(float(np.mean(values)), 4) for name, values in found.items()}
