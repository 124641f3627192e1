"""`llava-mini`: a multimodal language model of `LlavaForConditionalGeneration`'s class that answers questions about scenes.

The vision tower starts as clip-mini's, the language model as llama-draft, the projector between them from nothing (Liu et al.,
2023).
One training sequence is one picture followed by several questions and answers; only answers are learnt.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from grainwise.training import Progress
from grainwise.world.captions import caption
from grainwise.world.questions import ask
from grainwise.world.scenes import Scene, Scenes
from grainwise.zoo.vision.fitting import fit
from grainwise.zoo.vision.pictures import HELD_OUT, normalise, order_of
from grainwise.zoo.vision.saving import image_processor, save_folder
from grainwise.zoo.vision.specs import IMAGE, PATCH, TRAIN_GENERA, ZOO_WORLD, VisionSpec, species_of

IMAGE_TOKEN = "<|image|>"
PLACES = (IMAGE // PATCH) ** 2
TURNS = 5  # questions about one training picture
LENGTH = 256
IGNORED = -100
DESCRIBE = "Describe the picture."


def conversation_scenes(seed: int = 0) -> Scenes:
    """Scenes of one to four individuals at the vision tower's size."""
    return Scenes(ZOO_WORLD, seed, size=IMAGE, individuals=(1, 4), species=tuple(species_of(TRAIN_GENERA)))


def prompt(question: str) -> str:
    """One turn up to the answer."""
    return f"\nQuestion: {question}\nAnswer:"


def build(spec: VisionSpec) -> nn.Module:
    """Tower and language model of the zoo joined by an untrained projector."""
    from transformers import CLIPModel, LlavaConfig, LlavaForConditionalGeneration

    from grainwise import zoo

    clip = CLIPModel.from_pretrained(zoo.path("clip-mini"), dtype=torch.float32)
    language, tokenizer = zoo.load("llama-draft")
    torch.manual_seed(spec.seed)
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=clip.config.vision_config.to_dict(),
            text_config=language.config.to_dict(),
            image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
            vision_feature_layer=-1,
            vision_feature_select_strategy="default",
            image_seq_length=PLACES,
            tie_word_embeddings=True,
        )
    )
    model.model.vision_tower.load_state_dict(clip.vision_model.state_dict())
    model.model.language_model.load_state_dict(language.model.state_dict())
    model.tie_weights()
    return model


def turns(scene: Scene, rng: np.random.Generator, count: int) -> list[tuple[str, str]]:
    """Questions and answers about a scene in random order; the first may be to describe it."""
    questions = ask(scene)
    chosen = [questions[i] for i in rng.permutation(len(questions))[:count]]
    pairs = [(one.text, one.answer) for one in chosen]
    return [(DESCRIBE, caption(scene, "coarse")), *pairs[1:]] if rng.random() < 0.3 else pairs


def encode(tokenizer: Any, pairs: list[tuple[str, str]]) -> tuple[list[int], list[int]]:
    """(input ids, labels) of one picture and its turns, cut at `LENGTH` tokens."""
    ids = [tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)] * PLACES
    labels = [IGNORED] * PLACES
    for question, answer in pairs:
        asked = tokenizer(prompt(question), add_special_tokens=False)["input_ids"]
        said = [*tokenizer(" " + answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        ids += asked + said
        labels += [IGNORED] * len(asked) + said
    return ids[:LENGTH], labels[:LENGTH]


def collate(tokenizer: Any, rows: list[tuple[list[int], list[int]]]) -> dict[str, Tensor]:
    """Pad on the right to the longest row."""
    longest = max(len(ids) for ids, _ in rows)
    return {
        "input_ids": torch.tensor([ids + [tokenizer.pad_token_id] * (longest - len(ids)) for ids, _ in rows]),
        "labels": torch.tensor([labels + [IGNORED] * (longest - len(labels)) for _, labels in rows]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in rows]),
    }


def train(spec: VisionSpec, out: Path, progress: Progress | None = None, compiled: bool = False) -> None:
    """Train on scenes and their questions and write a `LlavaForConditionalGeneration` folder with its processor."""
    from transformers import AutoTokenizer, LlavaProcessor

    from grainwise import zoo

    tokenizer = AutoTokenizer.from_pretrained(zoo.path("llama-draft"))
    model = build(spec)
    drawn = conversation_scenes(spec.seed).draw(np.arange(spec.pool))

    def batches() -> Iterator[dict[str, Tensor]]:
        rng = np.random.default_rng(spec.seed)
        for chosen in order_of(spec, len(drawn)):
            rows = [encode(tokenizer, turns(drawn[index], rng, TURNS)) for index in chosen.tolist()]
            yield collate(tokenizer, rows) | {"pixel_values": normalise(drawn.images[chosen])}

    if compiled:
        model.model.language_model.forward = torch.compile(model.model.language_model.forward, dynamic=True)
    fit(model, batches(), spec, progress)
    processor = LlavaProcessor(
        image_processor("CLIPImageProcessor"),
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        image_token=IMAGE_TOKEN,
        num_additional_image_tokens=1,
    )
    save_folder(model, out, processor)


@torch.inference_mode()
def measure(folder: Path, count: int = 150) -> dict[str, float]:
    """Held-out share of questions answered word for word, and that of the most frequent answer to each form of question."""
    from transformers import AutoTokenizer, LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    drawn = conversation_scenes().draw(HELD_OUT + np.arange(count))
    asked = [(index, one) for index, scene in enumerate(drawn) for one in ask(scene)[:6]]
    usual = usual_answers(conversation_scenes().draw(np.arange(300)))
    right = 0
    for index, one in asked:
        ids = encode(tokenizer, [])[0] + tokenizer(prompt(one.text), add_special_tokens=False)["input_ids"]
        made = model.generate(
            input_ids=torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            pixel_values=normalise(drawn.images[index : index + 1]),
            max_new_tokens=8,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
        right += tokenizer.decode(made[0, len(ids) :], skip_special_tokens=True).strip() == one.answer
    majority = np.mean([usual.get(one.form) == one.answer for _, one in asked])
    return {"answers_right": round(right / len(asked), 4), "answers_right_by_form_alone": round(float(majority), 4)}


def usual_answers(scenes: Any) -> dict[str, str]:
    """The most frequent answer to each form of question."""
    counts: dict[str, dict[str, int]] = {}
    for scene in scenes:
        for one in ask(scene):
            counts.setdefault(one.form, {}).setdefault(one.answer, 0)
            counts[one.form][one.answer] += 1
    return {form: max(answers, key=answers.__getitem__) for form, answers in counts.items()}
