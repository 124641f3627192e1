"""`detr-mini`: a detector of `RTDetrForObjectDetection`'s class (Zhao et al., 2024) that finds the kinds of things."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from grainwise.training import Progress, learning_rate_factor
from grainwise.world.scenes import SceneBatch
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


def targets_of(batch: SceneBatch) -> list[dict[str, Tensor]]:
    """For each scene: class_labels (things,), the kinds, and boxes (things, 4), centre and size as shares of the side."""
    found = []
    for scene in batch:
        boxes = torch.from_numpy(scene.boxes) / scene.size
        centred = torch.cat([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], 1)
        found.append({"class_labels": torch.tensor([KINDS.index(one.kind) for one in scene.species]), "boxes": centred})
    return found


def mirrored(target: dict[str, Tensor]) -> dict[str, Tensor]:
    """The target of the picture seen in a mirror."""
    boxes = target["boxes"].clone()
    boxes[:, 0] = 1 - boxes[:, 0]
    return {"class_labels": target["class_labels"], "boxes": boxes}


def train(spec: VisionSpec, out: Path, progress: Progress | None = None, compiled: bool = False) -> None:
    """Train on scenes and write an `RTDetrForObjectDetection` folder with its processor."""
    model = build(spec).train()
    drawn = scenes(spec.seed).draw(np.arange(spec.pool))
    targets = targets_of(drawn)
    optimizer = torch.optim.AdamW(model.parameters(), lr=spec.other_lr, weight_decay=1e-4)
    generator = torch.Generator().manual_seed(spec.seed)
    if compiled:
        model.model.backbone.forward = torch.compile(model.model.backbone.forward)
    for step, (images, labels) in enumerate(_batches(spec, drawn, targets, generator)):
        for group in optimizer.param_groups:
            group["lr"] = spec.other_lr * learning_rate_factor(step, spec.steps, 0.05, "cosine")
        loss = model(pixel_values=images, labels=labels).loss
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the loss became {loss.item()} at step {step}")
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if progress is not None:
            progress(step + 1, spec.steps, f"loss {loss.item():.3f}")
    save_folder(model.eval(), out, image_processor("RTDetrImageProcessor", SCENE))


def _batches(
    spec: VisionSpec, drawn: SceneBatch, targets: list[dict[str, Tensor]], generator: torch.Generator
) -> Iterator[tuple[Tensor, list[dict[str, Tensor]]]]:
    for chosen in order_of(spec, len(drawn)):
        images = normalise(drawn.images[chosen])
        labels = [targets[index] for index in chosen.tolist()]
        if torch.rand((), generator=generator) < 0.5:
            images, labels = images.flip(-1), [mirrored(label) for label in labels]
        gain = 1 + 0.3 * (torch.rand(len(images), 1, 1, 1, generator=generator) - 0.5)
        yield images * gain, labels


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
