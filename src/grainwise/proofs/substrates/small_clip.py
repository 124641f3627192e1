"""A small CLIP, trained in under a minute on microworld pictures and sentences about their parts.

It learns from species of worlds that no proof tests on, so that its zero-shot classifier for new species rests on what it
knows of colours, shapes and kinds.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig, PreTrainedTokenizerFast
from transformers.models.clip.modeling_clip import CLIPOutput

from grainwise.images import random_flip
from grainwise.proofs.substrates.world_pictures import pictures
from grainwise.training import train_lm
from grainwise.world import Species, World
from grainwise.world.taxonomy import with_article

SIZE, PATCH, LENGTH = 32, 8, 40
MEAN = STD = (0.5, 0.5, 0.5)
BATCH, POOL = 128, 8_192  # pictures in a step, and pictures drawn once for all steps


def tokenizer(worlds: tuple[World, ...]) -> PreTrainedTokenizerFast:
    """One token per word of the worlds' sentences."""
    found = sorted({w for world in worlds for s in world.species for w in re.findall(r"[\w-]+", s.describe("fine"))})
    words = ["<s>", "</s>", "<unk>", *found]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, **special)


def untrained(words: PreTrainedTokenizerFast) -> CLIPModel:
    """The architecture with random weights."""
    layers = {"hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 4}
    text = CLIPTextConfig(
        vocab_size=len(words),
        max_position_embeddings=LENGTH,
        num_hidden_layers=2,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        **layers,
    )
    vision = CLIPVisionConfig(image_size=SIZE, patch_size=PATCH, num_hidden_layers=3, **layers)
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=64, logit_scale_init_value=2.6592))


def sentence(species: Species, rng: np.random.Generator, parts: int = 2) -> str:
    """A kind and the colours of a few parts: "a bird with a yellow head and grey legs"."""
    chosen = rng.permutation(len(species.parts))[:parts]
    return f"{species.describe('coarse')} with {colours_of(species, sorted(chosen))}"


def colours_of(species: Species, parts: Iterable[int]) -> str:
    """ "a yellow head and grey legs"."""
    return " and ".join(with_article(species.parts[i].phrase(fine=False), species.parts[i]) for i in parts)


def sentences_about(species: Species) -> list[str]:
    """Every sentence about two parts: the prompts of a class."""
    phrases = [with_article(p.phrase(fine=False), p) for p in species.parts]
    return [f"{species.describe('coarse')} with {a} and {b}" for i, a in enumerate(phrases) for b in phrases[i + 1 :]]


class SpeciesContrast(nn.Module):
    """CLIP's loss where pictures of one species share their sentences: each of them is as good an answer."""

    def __init__(self, model: CLIPModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, species: Tensor, **inputs: Tensor) -> CLIPOutput:
        """species: int64 (batch,); inputs: of the model."""
        with torch.no_grad():
            self.model.logit_scale.clamp_(max=float(np.log(100)))
        output = self.model(**inputs)
        same = (species[:, None] == species[None]).float()
        target = same / same.sum(1, keepdim=True)
        logits = output.logits_per_image.float()
        output.loss = (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2
        return output


@functools.lru_cache(maxsize=1)
def small_clip(steps: int, seed: int = 0) -> tuple[CLIPModel, PreTrainedTokenizerFast]:
    """(CLIP in evaluation mode, tokenizer), trained for `steps` contrastive steps; the same for all seeds of a proof."""
    worlds = tuple(World(seed=1_000 + i, genera=64, species_per_genus=1) for i in range(4))
    species = [s for world in worlds for s in world.species]
    words = tokenizer(worlds)
    torch.manual_seed(seed)
    model = untrained(words).train()
    rng = np.random.default_rng(seed)
    count = min(POOL, steps * BATCH)
    kinds = rng.integers(len(worlds[0]), size=(len(worlds), count // len(worlds)))
    pool = torch.cat([pictures(world, kinds[i], 100_000, SIZE) for i, world in enumerate(worlds)])
    label = (kinds + len(worlds[0]) * np.arange(len(worlds))[:, None]).ravel()

    def batches() -> Iterator[dict[str, Tensor]]:
        for step in range(steps):
            rows = rng.integers(len(pool), size=min(BATCH, len(pool)))
            parts = 4 if step % 4 == 3 else 2  # sometimes long sentences, so that late positions are learnt
            said = words([sentence(species[k], rng, parts) for k in label[rows]], padding=True, return_tensors="pt")
            seen = random_flip(pool[rows], torch.Generator().manual_seed(int(rng.integers(2**31))))
            yield {**said, "pixel_values": (seen - 0.5) / 0.5, "species": torch.from_numpy(label[rows])}

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05, betas=(0.9, 0.98))
    train_lm(
        SpeciesContrast(model),
        batches(),
        steps=steps,
        optimizers=[optimizer],
        warmup=0.1,
        schedule="cosine",
        clip=None,
        autocast=torch.bfloat16,
    )
    return model.eval(), words
