"""`vit-mini`: a vision transformer trained with the names of genera, and the probes that judge frozen features."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from grainwise.evaluate.probes import linear_probe
from grainwise.training import Progress
from grainwise.zoo.vision.fitting import fit
from grainwise.zoo.vision.pictures import augment, draw_pool, held_out, normalise, order_of
from grainwise.zoo.vision.saving import image_processor, save_folder
from grainwise.zoo.vision.specs import IMAGE, PATCH, TRAIN_GENERA, ZOO_WORLD, VisionSpec, species_of

Encoder = Callable[[Tensor], Tensor]  # normalised images (batch, 3, size, size) -> features (batch, dimension)


def train(spec: VisionSpec, out: Path, progress: Progress | None = None, compiled: bool = False) -> None:
    """Train on the genera and write a `ViTForImageClassification` folder."""
    from transformers import ViTConfig, ViTForImageClassification

    names = {g: ZOO_WORLD.species[g * ZOO_WORLD.species_per_genus].name.split()[0] for g in TRAIN_GENERA}
    torch.manual_seed(spec.seed)
    model = ViTForImageClassification(
        ViTConfig(
            image_size=IMAGE,
            patch_size=PATCH,
            hidden_size=spec.hidden_size,
            num_hidden_layers=spec.layers,
            num_attention_heads=spec.hidden_size // 64,
            intermediate_size=4 * spec.hidden_size,
            num_labels=len(names),
            id2label=names,
            label2id={name: index for index, name in names.items()},
        )
    )
    pool = draw_pool(ZOO_WORLD, species_of(TRAIN_GENERA), spec.pool)
    genus = torch.as_tensor(pool.labels // ZOO_WORLD.species_per_genus)

    def batches() -> Iterator[dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(spec.seed)
        for chosen in order_of(spec, len(pool)):
            yield {"pixel_values": augment(normalise(pool.images[chosen]), generator), "labels": genus[chosen]}

    fit(torch.compile(model) if compiled else model, batches(), spec, progress)
    save_folder(model, out, image_processor())


@torch.inference_mode()
def features(encoder: Encoder, images: np.ndarray, batch: int = 256) -> Tensor:
    """float32 (n, dimension): an encoder over uint8 images (n, size, size, 3)."""
    pieces = []
    for start in range(0, len(images), batch):
        with torch.autocast("cpu", torch.bfloat16):
            pieces.append(encoder(normalise(images[start : start + batch])).float())
    return torch.cat(pieces)


def species_probe(encoder: Encoder, shots: int = 10, each: int = 5, species: int = 120) -> float:
    """Accuracy of a linear probe on species: trained on `shots` pictures of each, tested on `each` unseen ones.

    Uses the first `species` training species; both sets are individuals that no zoo training has drawn.
    """
    drawn = held_out(ZOO_WORLD, species_of(TRAIN_GENERA)[:species], shots + each)
    learn = np.arange(len(drawn)) % (shots + each) < shots
    x = features(encoder, drawn.images).numpy()
    return linear_probe(x[learn], drawn.labels[learn], x[~learn], drawn.labels[~learn])


def measure(folder: Path) -> dict[str, float]:
    """Held-out figures: accuracy on genera, and a linear probe of the class token on species."""
    from transformers import ViTForImageClassification

    model = ViTForImageClassification.from_pretrained(folder, dtype=torch.float32).eval()
    drawn = held_out(ZOO_WORLD, species_of(TRAIN_GENERA), 3)
    logits = features(lambda x: model(pixel_values=x).logits, drawn.images)
    genus = torch.as_tensor(drawn.labels // ZOO_WORLD.species_per_genus)
    return {
        "genus_accuracy": round((logits.argmax(1) == genus).float().mean().item(), 4),
        "species_probe": round(species_probe(lambda x: model.vit(x).last_hidden_state[:, 0]), 4),
    }
