"""`dino-mini`: a vision transformer trained without labels, whose patch tokens correspond between individuals.

A student and its moving average, the teacher, see two crops of a picture; the student, some of whose patches are masked, has
to give the teacher's cluster assignment of the other crop (DINO, Caron et al., 2021) and of its own masked patches (iBOT,
Zhou et al., 2022). The teacher's assignments are balanced over the batch by Sinkhorn's iteration (SwAV, Caron et al., 2020)
in place of a running centre.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn

from grainwise.training import Progress
from grainwise.world import Individuals
from grainwise.zoo.vision.classifier import species_probe
from grainwise.zoo.vision.fitting import fit
from grainwise.zoo.vision.pictures import draw_pool, held_out, normalise, order_of
from grainwise.zoo.vision.saving import image_processor, save_folder
from grainwise.zoo.vision.specs import IMAGE, PATCH, TRAIN_GENERA, ZOO_WORLD, VisionSpec, species_of

PROTOTYPES = 1024
STUDENT_TEMPERATURE, TEACHER_TEMPERATURE = 0.1, 0.06
MOMENTUM = (0.98, 0.999)  # of the teacher, at the start and at the end
MASKED = 0.3  # share of the student's patches


def build(spec: VisionSpec) -> nn.Module:
    """The untrained `Dinov2Model`."""
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(spec.seed)
    return Dinov2Model(
        Dinov2Config(
            image_size=IMAGE,
            patch_size=PATCH,
            hidden_size=spec.hidden_size,
            num_hidden_layers=spec.layers,
            num_attention_heads=spec.hidden_size // 64,
            mlp_ratio=4,
        )
    )


class Head(nn.Module):
    """Tokens to scores over prototypes: an MLP, unit length, and a layer of unit-length prototypes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(width, 512), nn.GELU(), nn.Linear(512, 96))
        self.prototypes = nn.Parameter(torch.randn(PROTOTYPES, 96))

    def forward(self, tokens: Tensor) -> Tensor:
        """(..., width) -> (..., prototypes), cosines."""
        return nn.functional.normalize(self.mlp(tokens), dim=-1) @ nn.functional.normalize(self.prototypes, dim=-1).T


@torch.no_grad()
def balanced_assignment(scores: Tensor, temperature: float, rounds: int = 3) -> Tensor:
    """Soft clusters (rows, prototypes) of float scores: every row sums to 1 and all prototypes are used about equally."""
    q = torch.exp((scores.float() - scores.max()) / temperature)
    for _ in range(rounds):
        q = q / q.sum(0, keepdim=True).clamp_min(1e-12)
        q = q / q.sum(1, keepdim=True).clamp_min(1e-12)
    return q


class SelfDistillation(nn.Module):
    """Student, teacher and their loss. The teacher moves towards the student at the start of every step."""

    def __init__(self, student: nn.Module, steps: int) -> None:
        super().__init__()
        width = student.config.hidden_size
        self.student, self.head, self.patch_head = student, Head(width), Head(width)
        self.steps, self.step = steps, 0
        teacher = copy.deepcopy(nn.ModuleList([student, self.head, self.patch_head])).requires_grad_(False)
        self.__dict__["teacher"] = teacher  # hidden from parameters(): it is never trained

    @torch.no_grad()
    def follow(self) -> None:
        """Move the teacher; the momentum rises along a cosine."""
        low, high = MOMENTUM
        rate = high - (high - low) * (np.cos(np.pi * self.step / self.steps) + 1) / 2
        self.step += 1
        for old, new in zip(
            self.teacher.parameters(), nn.ModuleList([self.student, self.head, self.patch_head]).parameters(), strict=True
        ):
            old.lerp_(new, 1 - rate)

    def forward(self, views: Tensor, masks: Tensor) -> SimpleNamespace:
        """views: (2, batch, 3, size, size), two crops of each picture; masks: bool (2, batch, patches), hidden from the
        student.
        """
        self.follow()
        batch, images = views.shape[1], views.flatten(0, 1)
        backbone, head, patch_head = self.teacher
        with torch.no_grad():
            seen = backbone(images).last_hidden_state
            hidden = masks.flatten(0, 1)
            target = balanced_assignment(head(seen[:, 0]), TEACHER_TEMPERATURE)
            patch_target = balanced_assignment(patch_head(seen[:, 1:][hidden]), TEACHER_TEMPERATURE)
        tokens = self.student(images, bool_masked_pos=hidden).last_hidden_state
        scores = torch.log_softmax(self.head(tokens[:, 0]).float() / STUDENT_TEMPERATURE, -1)
        patch_scores = torch.log_softmax(self.patch_head(tokens[:, 1:][hidden]).float() / STUDENT_TEMPERATURE, -1)
        other = torch.cat([target[batch:], target[:batch]])
        loss = -(other * scores).sum(-1).mean() - (patch_target * patch_scores).sum(-1).mean()
        return SimpleNamespace(loss=loss)


def crops(images: Tensor, generator: torch.Generator, scale: tuple[float, float] = (0.4, 1.0)) -> Tensor:
    """A random resized crop of every picture (normalised, (batch, 3, size, size)), mirrored half of the time, colours
    changed.
    """
    n, size = len(images), images.shape[-1]

    def draw(*shape: int) -> Tensor:
        return torch.rand(n, *shape, generator=generator)

    side = (scale[0] + (scale[1] - scale[0]) * draw()).sqrt()
    centre = (draw(2) * 2 - 1) * (1 - side)[:, None]
    mirror = torch.where(draw() < 0.5, -1.0, 1.0)
    move = torch.zeros(n, 2, 3)
    move[:, 0, 0], move[:, 1, 1], move[:, :, 2] = side * mirror, side, centre
    grid = nn.functional.affine_grid(move, [n, 3, size, size], align_corners=False)
    cropped = nn.functional.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
    grey = cropped.mean(1, keepdim=True)
    cropped = grey + (cropped - grey) * (0.6 + 0.8 * draw(1, 1, 1))
    return cropped * (0.7 + 0.6 * draw(1, 1, 1)) + 0.8 * (draw(3, 1, 1) - 0.5)


def train(spec: VisionSpec, out: Path, progress: Progress | None = None, compiled: bool = False) -> None:
    """Train without labels and write the teacher's `Dinov2Model` folder."""
    model = build(spec)
    pool = draw_pool(ZOO_WORLD, species_of(TRAIN_GENERA), spec.pool)
    distillation = SelfDistillation(model, spec.steps)
    if compiled:
        distillation.student.forward = torch.compile(model.forward)

    def batches() -> Iterator[dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(spec.seed)
        patches = (IMAGE // PATCH) ** 2
        for chosen in order_of(spec, len(pool)):
            images = normalise(pool.images[chosen])
            views = torch.stack([crops(images, generator), crops(images, generator)])
            yield {"views": views, "masks": torch.rand(2, len(chosen), patches, generator=generator) < MASKED}

    fit(distillation, batches(), spec, progress)
    save_folder(distillation.teacher[0], out, image_processor("BitImageProcessor"))


@torch.inference_mode()
def part_correspondence(model: nn.Module, drawn: Individuals, pairs: int = 200) -> float:
    """How often a patch's nearest patch in another individual of the species lies on the same part.

    Counts patches whose pixels are mostly of one part (which the other picture shows as well); `drawn` holds two individuals of
    each species in a row.
    """
    with torch.autocast("cpu", torch.bfloat16):
        tokens = model(normalise(drawn.images[: 2 * pairs])).last_hidden_state[:, 1:].float()
    tokens = nn.functional.normalize(tokens, dim=-1)
    part = patch_parts(drawn.parts[: 2 * pairs])
    right = total = 0
    for first in range(0, 2 * pairs, 2):
        here, there = part[first], part[first + 1]
        nearest = (tokens[first] @ tokens[first + 1].T).argmax(1).numpy()
        counted = (here > 0) & np.isin(here, there)
        right += int((there[nearest] == here)[counted].sum())
        total += int(counted.sum())
    return right / total


def patch_parts(parts: np.ndarray) -> np.ndarray:
    """int64 (n, patches): the part that covers most of a patch (0: the background, or no part over half)."""
    n, size = parts.shape[:2]
    side = size // PATCH
    cells = parts.reshape(n, side, PATCH, side, PATCH).transpose(0, 1, 3, 2, 4).reshape(n, side * side, -1)
    counts = np.stack([(cells == part).sum(-1) for part in range(int(parts.max()) + 1)], -1)
    best = counts.argmax(-1)
    return np.where(counts.max(-1) * 2 > PATCH * PATCH, best, 0)


def measure(folder: Path) -> dict[str, float]:
    """Held-out figures: part correspondence (and that of raw pixels' patches), and a linear probe on species."""
    from transformers import Dinov2Model

    model = Dinov2Model.from_pretrained(folder, dtype=torch.float32).eval()
    drawn = held_out(ZOO_WORLD, species_of(TRAIN_GENERA)[:200], 2)
    return {
        "part_correspondence": round(part_correspondence(model, drawn), 4),
        "part_correspondence_pixels": round(part_correspondence(PixelPatches(), drawn), 4),
        "species_probe": round(species_probe(lambda x: model(x).last_hidden_state[:, 0]), 4),
    }


class PixelPatches(nn.Module):
    """The baseline of `part_correspondence`: a patch's own pixels as its token."""

    def forward(self, images: Tensor) -> SimpleNamespace:
        """(batch, 3, size, size) -> last_hidden_state (batch, 1 + patches, pixels), the first token empty."""
        patches = nn.functional.unfold(images, PATCH, stride=PATCH).transpose(1, 2)
        return SimpleNamespace(last_hidden_state=nn.functional.pad(patches, (0, 0, 1, 0)))
