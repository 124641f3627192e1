"""GLSim's claim on a small machine: a second look pays where the tokens point, not just anywhere.

Sixteen species of four genera stand small, at a random place, on cluttered ground; sisters differ in the colour of one part
that fills less than a twentieth of the picture. One tiny ViT, with a small convolutional stem, is warmed up once on the genera
of another world; then three arms go on from it with equal compute: a plain ViT with twice the epochs, a second look at a random
box of the same sizes, and GLSim. On the trained GLSim encoder the boxes of rollout and of the image centre are measured too.
What selection costs is timed on random tensors of the size of ViT-B at 448 px.
"""

from __future__ import annotations

import copy
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, cross_entropy, relu
from transformers import ViTConfig, ViTForImageClassification, ViTModel
from transformers.utils import ModelOutput

from grainwise import images as im
from grainwise.proofs.frame import Proof
from grainwise.recognize.glsim import GLSimForImageClassification, attention_rollout, global_local_similarity, topk_box
from grainwise.recognize.training import ArrayImages, accuracy, train_recogniser
from grainwise.world import Nuisance, Species, World
from grainwise.world.shapes import SIZES

SIZE, PATCH, WIDTH, LAYERS, HEADS = 48, 8, 64, 3, 2
GENERA, SISTERS = 4, 4
CANDIDATES = 32  # genera of a world from which the four are taken
NUISANCE = Nuisance(scale=(0.21, 0.28), place=0.24, clutter=4, occlusion=0.05)
WARM_WORLD, WARM_GENERA = 5000, 48  # no seed of a proof comes near it
PREPARE = im.Pipeline(partial(im.normalise, mean=(0.5,) * 3, std=(0.25,) * 3))
AUGMENT = im.Pipeline(im.random_flip)
TOP_K = 5


@dataclass(frozen=True)
class Scale:
    """Sizes of the experiment."""

    each: int = 30  # training images of a species
    test_each: int = 40
    epochs: int = 15
    warm_images: int = 7680
    warm_epochs: int = 4
    batch: int = 32


FULL = Scale()
SMOKE = Scale(each=2, test_each=2, epochs=1, warm_images=48, warm_epochs=1)
WARM_RATE, RATE = 2e-3, 1e-3


class Stem(nn.Module):
    """Pixels to patch tokens by three convolutions instead of one: tiny ViTs learn from few images with it."""

    def __init__(self) -> None:
        super().__init__()
        self.fine = nn.Conv2d(3, 24, 3, stride=2, padding=1)
        self.middle = nn.Conv2d(24, 48, 3, stride=2, padding=1)
        self.coarse = nn.Conv2d(48, WIDTH, PATCH // 4, stride=PATCH // 4)

    @property
    def weight(self) -> Tensor:
        """What the encoder reads its type from."""
        return self.coarse.weight

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.coarse(relu(self.middle(relu(self.fine(pixel_values)))))


def shape(**options: Any) -> ViTConfig:
    """The config of the tiny ViT."""
    return ViTConfig(
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=2 * WIDTH,
        hidden_act="relu",
        image_size=SIZE,
        patch_size=PATCH,
        **options,
    )


def classifier(
    encoder: ViTModel, labels: int, kind: type[ViTForImageClassification] = ViTForImageClassification
) -> ViTForImageClassification:
    """A plain ViT classifier around an encoder."""
    model = kind(shape(id2label={i: str(i) for i in range(labels)}))
    model.vit = encoder
    return model


def drawn(world: World, species: Sequence[int], first: int, each: int) -> Any:
    """`each` individuals of every species, from number `first` on."""
    labels, numbers = np.repeat(species, each), np.tile(np.arange(first, first + each), len(species))
    return world.draw(labels, numbers, size=SIZE, nuisance=NUISANCE)


def key_size(species: Species) -> float:
    """How much of the body's plane the key part of a species takes, all its copies together."""
    part = species.key_part
    return part.count * part.slot.half[0] * part.slot.half[1] * SIZES[part.size] ** 2


def chosen(world: World) -> list[int]:
    """The species of the four genera with key parts of middling size among those whose sisters differ in a colour."""
    genera = [species for species in world.species[::SISTERS] if species.key[1] == "colour"]
    first = len(genera) // 2 - GENERA // 2
    middle = sorted(genera, key=key_size, reverse=True)[first : first + GENERA]
    return [species.index + sister for species in middle for sister in range(SISTERS)]


def trained(model: Any, data: ArrayImages, *, epochs: float, lr: float, batch: int, **options: Any) -> Any:
    """The model after AdamW with a cosine schedule."""
    options |= {"lr_scheduler_type": "cosine", "weight_decay": 0.05, "warmup_steps": 30, "prepare": PREPARE}
    train_recogniser(model, data, epochs=epochs, lr=lr, batch_size=batch, **options)
    return model


class WarmUp(ViTForImageClassification):
    """Names, with one head, the genus in the picture from the class token and the genus or the ground in a patch from it.

    That draws the patches of the object, and no others, towards the class token, as training on millions of images does in
    the encoders that the paper starts from. The last label is the ground; patches labelled -1 show some of both.
    """

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> ModelOutput:
        """labels: (batch, 1 + patches)."""
        logits = self.classifier(self.vit(pixel_values).last_hidden_state)
        if labels is None:
            return ModelOutput(logits=logits[:, 0])
        patches, shown = logits[:, 1:].flatten(0, 1), labels[:, 1:].flatten()
        ground = shown == self.config.num_labels - 1
        genus = (shown >= 0) & ~ground
        dense = (cross_entropy(patches[genus], shown[genus]) + cross_entropy(patches[ground], shown[ground])) / 2
        return ModelOutput(loss=cross_entropy(logits[:, 0], labels[:, 0]) + dense, logits=logits[:, 0])


def boxes_around(objects: Tensor) -> Tensor:
    """Random boxes between each object's own (n, 4) and the whole picture, x0 y0 x1 y1 in whole pixels."""
    share = torch.rand(objects.shape, generator=torch.Generator().manual_seed(0))
    low = (objects[:, :2] * share[:, :2]).floor().clamp(max=SIZE - PATCH)
    high = (objects[:, 2:] + (SIZE - objects[:, 2:]) * share[:, 2:]).ceil()
    return torch.cat([low, torch.maximum(high, low + PATCH)], 1)


def warm_data(scale: Scale) -> ArrayImages:
    """Random crops that keep the object, with the labels that `WarmUp` reads."""
    world = World(seed=WARM_WORLD, genera=WARM_GENERA, species_per_genus=1)
    pictures = drawn(world, range(WARM_GENERA), 0, scale.warm_images // WARM_GENERA)
    boxes, masks = boxes_around(torch.from_numpy(pictures.boxes)), torch.from_numpy(pictures.masks)[:, None].float()
    covered = avg_pool2d(im.crop_resize(masks, boxes, SIZE), PATCH).flatten(1)
    genus = torch.from_numpy(pictures.labels)[:, None]
    patches = torch.where(covered > 0.4, genus, torch.where(covered < 0.1, WARM_GENERA, -1))
    return ArrayImages(im.crop_resize(im.from_uint8(pictures.images), boxes, SIZE), torch.cat([genus, patches], 1))


@functools.cache
def warm_encoder(scale: Scale) -> ViTModel:
    """The encoder that every arm of every seed starts from, trained on the genera of a world of its own."""
    torch.manual_seed(0)
    encoder = ViTModel(shape(), add_pooling_layer=False)
    encoder.embeddings.patch_embeddings.projection = Stem()
    model = classifier(encoder, WARM_GENERA + 1, WarmUp)
    trained(model, warm_data(scale), epochs=scale.warm_epochs, lr=WARM_RATE, batch=64)
    return encoder


def two_looks(selector: str, scale: Scale, seed: int) -> GLSimForImageClassification:
    torch.manual_seed(seed)
    encoder = copy.deepcopy(warm_encoder(scale))
    return GLSimForImageClassification.from_encoder(
        encoder, num_labels=GENERA * SISTERS, top_k=TOP_K, box="inclusive", selector=selector
    )


@torch.no_grad()
def coverage(model: GLSimForImageClassification, selector: str, pictures: Any) -> float:
    """Mean share of the object's pixels inside the box that `selector` draws on the model's encoder."""
    model.config.selector = selector
    model.encoder.set_attn_implementation("eager" if selector == "rollout" else "sdpa")
    generator = torch.Generator().manual_seed(0)
    pixels, shares = PREPARE(im.from_uint8(pictures.images)), []
    for start in range(0, len(pixels), 128):
        batch, masks = pixels[start : start + 128], torch.from_numpy(pictures.masks[start : start + 128])
        _, scores, _ = model.first_look(batch)
        seen = im.inside(model.select(scores, batch, generator).float(), SIZE, SIZE) & masks
        shares.append(seen.sum((1, 2)) / masks.sum((1, 2)).clamp(min=1))
    return float(torch.cat(shares).mean())


@functools.cache
def selection_ratio() -> float:
    """Median time of rollout over median time of the similarity, boxes included: 784 patches of width 768, 12 layers."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 785, 768, generator=generator)
    attentions = [torch.randn(1, 12, 785, 785, generator=generator).softmax(-1) for _ in range(12)]

    def rollout() -> Tensor:
        product = torch.eye(785)
        for attention in attentions:
            product = (attention.mean(1) + torch.eye(785)) / 2 @ product
        return product[:, 0, 1:]

    def seconds(scores: Callable[[], Tensor]) -> float:
        found = []
        for _ in range(7):
            started = time.perf_counter()
            topk_box(scores(), TOP_K, (28, 28), 16, 448, inclusive=False)
            found.append(time.perf_counter() - started)
        return statistics.median(found)

    torch.testing.assert_close(rollout(), attention_rollout(attentions), rtol=1e-3, atol=1e-6)
    return seconds(rollout) / seconds(lambda: global_local_similarity(hidden))


def run(seed: int, smoke: bool) -> dict[str, Any]:
    """Accuracy of the three arms, coverage of the selectors, and the cost of selecting."""
    scale = SMOKE if smoke else FULL
    world = World(seed=seed, genera=CANDIDATES, species_per_genus=SISTERS)
    species = chosen(world)
    train, test = (drawn(world, species, first, each) for first, each in ((0, scale.each), (200_000, scale.test_each)))
    data, held = (
        ArrayImages(pictures.images, np.repeat(np.arange(len(species)), each))
        for pictures, each in ((train, scale.each), (test, scale.test_each))
    )

    torch.manual_seed(seed)
    plain = classifier(copy.deepcopy(warm_encoder(scale)), GENERA * SISTERS)
    arms = {"plain": (plain, 2 * scale.epochs), "random": (two_looks("random", scale, seed), scale.epochs)}
    arms["gls"] = (two_looks("similarity", scale, seed), scale.epochs)
    found = {}
    for name, (model, epochs) in arms.items():
        trained(model, data, epochs=epochs, lr=RATE, batch=scale.batch, seed=seed, augment=AUGMENT)
        torch.manual_seed(seed)  # of the random boxes at test time
        found[name] = accuracy(model, held, prepare=PREPARE)
    covered = {f"coverage_{s}": coverage(arms["gls"][0], s, test) for s in ("similarity", "random", "centre", "rollout")}
    return {
        "baseline": found["random"],
        "ours": found["gls"],
        "plain": found["plain"],
        **covered,
        "selection_ratio": selection_ratio(),
    }


def conditions(rows: list[dict[str, Any]]) -> dict[str, bool]:
    """What the paper says beside accuracy against a random crop."""

    def mean(name: str) -> float:
        return float(np.mean([r[name] for r in rows]))

    return {
        "top-1 two points above a random crop": mean("ours") >= mean("baseline") + 0.02,
        "top-1 at least the plain ViT's with twice the epochs": mean("ours") >= mean("plain"),
        "boxes cover 20 points more of the object than random ones": all(
            r["coverage_similarity"] >= r["coverage_random"] + 0.2 for r in rows
        ),
        "selection 20 times cheaper than rollout": all(r["selection_ratio"] >= 20 for r in rows),
    }


PROOF = Proof(
    system="glsim",
    claim="a second look at the most similar patches beats a random crop by 2 points, and a plain ViT of equal compute",
    substrate="microworld: 16 species in 4 genera, sisters of unlike colour in one part, small on cluttered ground of 48 px; "
    "a ViT of 36 tokens, width 64",
    baseline="the same model with a random box of the same sizes",
    metric="top-1 accuracy on unseen individuals",
    higher_is_better=True,
    margin=0.02,
    modules=("grainwise.recognize.glsim", "grainwise.recognize.training", "grainwise.recognize.vit_layout", "grainwise.images"),
    run=run,
    conditions=conditions,
    note="Against a random box it shows on every seed: 2.7 points more on average, 0.92 of the object covered, not 0.45. "
    "The plain ViT, with twice the steps at equal compute, is ahead of both (0.58 against 0.44): training is short, and a crop "
    "of 48 px adds no pixels. Key parts of middling size were taken after the largest had given the same order on seed 10. The "
    "warm start needs labels of patches: with image labels alone the patches stayed alike (cosine with the class token 0.98, "
    "on the object and off it).",
)
