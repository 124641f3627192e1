"""`detr-mini`: a detector of `RTDetrForObjectDetection`'s class (Zhao et al., 2024) that finds the kinds of things."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from grainwise.training import Progress
from grainwise.world.scenes import SceneBatch
from grainwise.zoo.vision.fitting import fit
from grainwise.zoo.vision.pictures import HELD_OUT, normalise, order_of, scenes
from grainwise.zoo.vision.saving import image_processor, save_folder
from grainwise.zoo.vision.specs import SCENE, ZOO_WORLD, VisionSpec

QUERIES = 30
KINDS = ZOO_WORLD.kinds


def build(spec: VisionSpec) -> nn.Module:
    """The untrained detector."""
    from transformers import RTDetrConfig, RTDetrForObjectDetection, RTDetrResNetConfig

    torch.manual_seed(spec.seed)
    backbone = RTDetrResNetConfig(
        embedding_size=32,
        hidden_sizes=[32, 64, 96, 128],
        depths=[1, 1, 2, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    width = spec.hidden_size
    return RTDetrForObjectDetection(
        RTDetrConfig(
            backbone_config=backbone,
            encoder_hidden_dim=width,
            encoder_in_channels=[64, 96, 128],
            encoder_ffn_dim=4 * width,
            encoder_attention_heads=3,
            d_model=width,
            decoder_in_channels=[width, width, width],
            decoder_ffn_dim=4 * width,
            decoder_layers=spec.layers,
            decoder_attention_heads=3,
            num_queries=QUERIES,
            num_denoising=20,
            freeze_backbone_batch_norms=False,
            hidden_expansion=0.5,
            id2label=dict(enumerate(KINDS)),
            label2id={kind: index for index, kind in enumerate(KINDS)},
        )
    )


def targets_of(batch: SceneBatch) -> list[Tensor]:
    """For each scene float (things, 5): the kind's number, and the box as centre and size, shares of the side."""
    found = []
    for scene in batch:
        boxes = torch.from_numpy(scene.boxes) / scene.size
        kinds = torch.tensor([[float(KINDS.index(one.kind))] for one in scene.species])
        found.append(torch.cat([kinds, (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], 1))
    return found


class DetectionLoss(nn.Module):
    """The detector's loss for targets in one tensor: rows (picture in the batch, class, centre x, centre y, width, height)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor, targets: Tensor) -> object:
        """pixel_values: (batch, 3, side, side); targets: float (things of all pictures, 6)."""
        rows = [targets[targets[:, 0] == index] for index in range(len(pixel_values))]
        labels = [{"class_labels": row[:, 1].long(), "boxes": row[:, 2:]} for row in rows]
        return self.model(pixel_values=pixel_values, labels=labels)


def train(spec: VisionSpec, out: Path, progress: Progress | None = None, compiled: bool = False) -> None:
    """Train on scenes and write an `RTDetrForObjectDetection` folder with its processor."""
    model = build(spec)
    drawn = scenes(spec.seed).draw(np.arange(spec.pool))
    if compiled:
        model.model.backbone.forward = torch.compile(model.model.backbone.forward)
    optimizer = torch.optim.AdamW(model.parameters(), lr=spec.other_lr, weight_decay=1e-4)
    fit(DetectionLoss(model), batches(spec, drawn), spec, progress, autocast=None, optimizers=[optimizer])
    save_folder(model.eval(), out, image_processor("RTDetrImageProcessor", SCENE))


def batches(spec: VisionSpec, drawn: SceneBatch) -> Iterator[dict[str, Tensor]]:
    """`spec.steps` batches, half of them seen in a mirror, with changed brightness."""
    targets, generator = targets_of(drawn), torch.Generator().manual_seed(spec.seed)
    for chosen in order_of(spec, len(drawn)):
        images = normalise(drawn.images[chosen])
        rows = [nn.functional.pad(targets[index], (1, 0), value=place) for place, index in enumerate(chosen.tolist())]
        things = torch.cat(rows)
        if torch.rand((), generator=generator) < 0.5:
            images = images.flip(-1)
            things[:, 2] = 1 - things[:, 2]
        gain = 1 + 0.3 * (torch.rand(len(images), 1, 1, 1, generator=generator) - 0.5)
        yield {"pixel_values": images * gain, "targets": things}


@torch.inference_mode()
def measure(folder: Path, count: int = 200) -> dict[str, float]:
    """Held-out figures: COCO's AP and AP50 over the kinds."""
    from transformers import RTDetrForObjectDetection

    from grainwise.evaluate.detection import average_precision

    model = RTDetrForObjectDetection.from_pretrained(folder, dtype=torch.float32).eval()
    drawn = scenes().draw(HELD_OUT + np.arange(count))
    found: list[dict[str, np.ndarray]] = []
    for start in range(0, count, 50):
        output = model(pixel_values=normalise(drawn.images[start : start + 50]))
        scores = output.logits.sigmoid()
        best, labels = scores.max(-1)
        x, y, w, h = (output.pred_boxes * SCENE).unbind(-1)
        boxes = torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], -1)
        found += [
            {"scores": s.numpy(), "labels": k.numpy(), "boxes": b.numpy()} for s, k, b in zip(best, labels, boxes, strict=True)
        ]
    truth = [{"labels": np.array([KINDS.index(one.kind) for one in scene.species]), "boxes": scene.boxes} for scene in drawn]
    figures = average_precision(found, truth)
    return {"ap": round(figures["ap"], 4), "ap50": round(figures["ap50"], 4)}
