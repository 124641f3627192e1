"""`clip-mini`: images and descriptions in one space, trained by contrast (Radford et al., 2021).

Half of every batch are pairs of siblings, so that the one part in which they differ has to be seen and read.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from grainwise.training import Progress
from grainwise.world import Species, World
from grainwise.world.counter_random import Draws
from grainwise.world.taxonomy import with_article
from grainwise.zoo.vision.classifier import features, species_probe
from grainwise.zoo.vision.fitting import fit
from grainwise.zoo.vision.pictures import augment, draw_pool, held_out, normalise
from grainwise.zoo.vision.saving import image_processor, save_folder
from grainwise.zoo.vision.specs import IMAGE, PATCH, TRAIN_GENERA, ZOO_WORLD, VisionSpec, species_of

TEXT_LENGTH = 77
TOKENS = 1024
SPECIAL = (
    "<|pad|>",
    "<|unk|>",
    "<|startoftext|>",
    "<|endoftext|>",
)  # the end must not be number 2: CLIPTextModel reads that as an old config
DATA = "the microworld, seed 2027; held-out species of seed 2026"
CAPTION_WORLD = World(
    seed=2027, genera=2400, species_per_genus=2
)  # many genera, so that attributes are learnt apart from each other


def captions(species: list[Species], words: Draws) -> list[str]:
    """A description of each species with some of its parts in random order; the key part is always among them."""
    longest = max(len(one.parts) for one in species)
    order, keep, fine = words.order("parts", longest), words.uniform("keep"), words.chance("fine", 0.8)
    return [_caption(one, order[i], float(keep[i]), bool(fine[i])) for i, one in enumerate(species)]


def _caption(species: Species, order: np.ndarray, keep: float, fine: bool) -> str:
    count = len(species.parts)
    chosen = [int(i) for i in order if i < count][: 2 + int(keep * (count - 1))]
    if species.key[0] not in chosen:
        chosen[-1] = species.key[0]
    phrases = [with_article(species.parts[i].phrase(fine=fine or i == species.key[0]), species.parts[i]) for i in chosen]
    text = species.describe("coarse") + " with " + ", ".join(phrases[:-1])
    return text + (" and " if len(phrases) > 1 else "") + phrases[-1]


def caption_tokenizer(world: World = ZOO_WORLD) -> object:
    """A word-level BPE tokenizer over the world's descriptions, with CLIP's start and end tokens."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE(unk_token="<|unk|>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.ByteLevel(add_prefix_space=True)])
    core.decoder = decoders.ByteLevel()
    texts = [species.describe(level) for species in world.species for level in ("coarse", "medium", "fine")]
    texts += [species.name for species in world.species] + [
        "a photo of a small",
        "a picture of the",
        "an ink drawing of a",
        "not unlike its is are has have",
    ] * 4
    core.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=TOKENS,
            special_tokens=list(SPECIAL),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    pad, unknown, start, end = SPECIAL
    core.post_processor = processors.TemplateProcessing(single=f"{start} $A {end}", special_tokens=[(start, 2), (end, 3)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=start, eos_token=end, pad_token=pad, unk_token=unknown, model_max_length=TEXT_LENGTH
    )


def build(spec: VisionSpec, vocabulary: int) -> nn.Module:
    """The untrained `CLIPModel`."""
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

    torch.manual_seed(spec.seed)
    width = spec.hidden_size
    text = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=3,
        num_attention_heads=width // 64,
        max_position_embeddings=TEXT_LENGTH,
        hidden_act="gelu",
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
    )
    vision = CLIPVisionConfig(
        image_size=IMAGE,
        patch_size=PATCH,
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=spec.layers,
        num_attention_heads=width // 64,
        hidden_act="gelu",
    )
    return CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=width))


class Contrast(nn.Module):
    """CLIP's loss when several pictures of a batch share a caption: every matching pair is a positive."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor) -> object:
        output = self.model(pixel_values=pixel_values, input_ids=input_ids, attention_mask=attention_mask)
        logits = output.logits_per_image.float()
        target = torch.arange(len(logits))
        output.loss = (nn.functional.cross_entropy(logits, target) + nn.functional.cross_entropy(logits.T, target)) / 2
        return output


def batches(spec: VisionSpec, tokenizer: object) -> Iterator[dict[str, Tensor]]:
    """`spec.steps` batches of pictures and captions: two siblings of each of `batch / 2` genera."""
    world, genera = CAPTION_WORLD, CAPTION_WORLD.genera
    pool = draw_pool(world, list(range(len(world))), spec.pool)
    of_species = np.argsort(pool.labels, kind="stable").reshape(len(world), -1)
    rng = torch.Generator().manual_seed(spec.seed)
    order = torch.empty(0, dtype=torch.long)
    for step in range(spec.steps):
        if len(order) < spec.batch // 2:
            order = torch.randperm(genera, generator=rng)
        chosen, order = order[: spec.batch // 2], order[spec.batch // 2 :]
        labels = (chosen[:, None] * 2 + torch.arange(2)).flatten().numpy()
        pick = torch.randint(of_species.shape[1], (len(labels),), generator=rng).numpy()
        words = Draws(spec.seed, step, np.arange(len(labels)))
        texts = captions([world.species[label] for label in labels], words)
        encoded = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")  # type: ignore[operator]
        images = normalise(pool.images[of_species[labels, pick]])
        yield {
            "pixel_values": augment(images, rng),
            "input_ids": encoded["input_ids"],
            "attention_mask": encoded["attention_mask"],
        }


def train(spec: VisionSpec, out: Path, progress: Progress | None = None, compiled: bool = False) -> None:
    """Train on pictures and descriptions and write a `CLIPModel` folder with its processor."""
    from transformers import CLIPProcessor

    tokenizer = caption_tokenizer()
    model = build(spec, len(tokenizer))  # type: ignore[arg-type]
    contrast = Contrast(model)
    fit(torch.compile(contrast, dynamic=True) if compiled else contrast, batches(spec, tokenizer), spec, progress)
    save_folder(model, out, CLIPProcessor(image_processor("CLIPImageProcessor"), tokenizer))


@torch.inference_mode()
def zero_shot(folder: Path, each: int = 10) -> dict[str, float]:
    """Top-1 accuracy on species of genera that no training has seen, from their fine descriptions alone; and chance."""
    from transformers import AutoTokenizer, CLIPModel

    model = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    unseen = species_of(range(TRAIN_GENERA.stop, ZOO_WORLD.genera))
    texts = tokenizer(
        [ZOO_WORLD.species[index].describe("fine") for index in unseen], padding=True, truncation=True, return_tensors="pt"
    )
    names = model.get_text_features(**texts).pooler_output
    drawn = held_out(ZOO_WORLD, unseen, each)
    seen = features(lambda x: model.get_image_features(pixel_values=x).pooler_output, drawn.images)
    scores = nn.functional.normalize(seen, dim=1) @ nn.functional.normalize(names, dim=1).T
    found = torch.as_tensor(unseen)[scores.argmax(1)]
    right = torch.as_tensor(drawn.labels)
    return {
        "zero_shot_unseen_species": round((found == right).float().mean().item(), 4),
        "zero_shot_unseen_genera": round(
            (found // ZOO_WORLD.species_per_genus == right // ZOO_WORLD.species_per_genus).float().mean().item(), 4
        ),
        "zero_shot_chance": round(1 / len(unseen), 4),
    }


def measure(folder: Path) -> dict[str, float]:
    """Held-out figures: zero-shot accuracy on unseen species, and a linear probe of the image features on species."""
    from transformers import CLIPModel

    model = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
    return zero_shot(folder) | {"species_probe": round(species_probe(lambda x: model.vision_model(x).pooler_output), 4)}
