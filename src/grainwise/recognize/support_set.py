"""Support sets from captions: a few target images of each class are captioned, and the captions become new images.

Captioner and generator are arguments: any callables of the protocols' shape. `TransformersCaptioner` and
`DiffusersGenerator` wrap a transformers image-to-text model and a diffusers pipeline; offline, a renderer can be the generator.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from grainwise.recognize.feature_bank import check_images

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, ProcessorMixin

TRIES = 5  # draws of an image before a generator is given up
BLACK = 0.02  # images nowhere brighter than this are failures (safety filters paint black)
RECORDS = "support.json"
PROMPT = "A photo of {c}. {caption}"


class Captioner(Protocol):
    """Describes images."""

    def __call__(self, images: Tensor) -> Sequence[str]:
        """A sentence for each image of float (n, 3, H, W) in [0, 1]."""


class Generator(Protocol):
    """Makes images from prompts."""

    def __call__(self, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """float (n, 3, H, W) in [0, 1]; the same for the same prompt and seed."""


@dataclass(frozen=True)
class SupportItem:
    """Where one support image comes from. source: number of the captioned image in its class; seed: of the generator."""

    class_name: str
    source: int
    caption: str
    prompt: str
    seed: int
    file: str


@dataclass(frozen=True)
class Support:
    """images float (n, 3, H, W), labels int64 (n,), captions (the full prompts, which name the class), items; made: how many
    images were generated in this run, the others were there already."""

    images: Tensor
    labels: Tensor
    captions: list[str]
    items: list[SupportItem]
    made: int

    def to_dataset(self) -> Dataset:
        """Rows of `image` (pixels), `label`, `class`, `caption`, `prompt`, as a `datasets.Dataset`."""
        from datasets import Dataset, Features, Value
        from datasets import Image as ImageColumn

        rows = {
            "image": [_as_picture(i) for i in self.images],
            "label": self.labels.tolist(),
            "class": [i.class_name for i in self.items],
            "caption": [i.caption for i in self.items],
            "prompt": self.captions,
        }
        text = {name: Value("string") for name in ("class", "caption", "prompt")}
        return Dataset.from_dict(rows, features=Features({"image": ImageColumn(), "label": Value("int64"), **text}))


def build_support(
    images_by_class: Mapping[str, Tensor],
    captioner: Captioner,
    generator: Generator,
    *,
    prompt: str = PROMPT,
    per_class: int = 10,
    folder: str | os.PathLike[str] | None = None,
    words: int | None = None,
    keep: Callable[[Tensor, Tensor], Tensor] | None = None,
    seed: int = 0,
) -> Support:
    """`per_class` images of each class, generated from captions of a few target images.

    images_by_class: class name -> images float (k, 3, H, W) in [0, 1]; their order gives the labels. prompt: holds `{c}`, the
    class name (or the caption's feature loses the label), and `{caption}`. words: cut captions to so many. folder: where
    images and their records are kept; an item whose record is unchanged is not made again. keep: (images, labels) -> bool
    (n,), which items to keep, for example those whose zero-shot answer is their class. Raises ValueError for classes without
    images, a prompt without both fields, or a generator that only makes black images.
    """
    if "{c}" not in prompt or "{caption}" not in prompt:
        raise ValueError(f"the prompt must hold {{c}} and {{caption}}, got {prompt!r}")
    if not images_by_class or per_class < 1:
        raise ValueError(f"there must be at least one class and one image a class, got {len(images_by_class)} and {per_class}")
    home = None if folder is None else Path(folder)
    known = {} if home is None else _read_records(home)
    rng = np.random.default_rng(seed)
    items: list[SupportItem] = []
    for name, images in images_by_class.items():
        if not len(images):
            raise ValueError(f"class {name!r} has no image to caption")
        check_images(images)
        captions = _captions(captioner, images, name, words)
        order = rng.permutation(len(captions))
        for i in range(per_class):
            source = int(order[i % len(order)])  # captions take turns
            text = prompt.replace("{c}", name).replace("{caption}", captions[source])
            items.append(_item(name, source, captions[source], text, int(rng.integers(2**31))))
    pictures, made = _pictures(items, generator, home, known)
    labels = torch.arange(len(images_by_class)).repeat_interleave(per_class)
    if home is not None:
        _write_records(home, items)
    if keep is not None:
        kept = keep(pictures, labels)
        pictures, labels = pictures[kept], labels[kept]
        items = [item for item, good in zip(items, kept.tolist()) if good]
    return Support(pictures, labels, [i.prompt for i in items], items, made)


class TransformersCaptioner:
    """An image-to-text model of transformers with its processor; options go to `generate` (the paper: three beams)."""

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin, **options: Any) -> None:
        self.model, self.processor = model.eval(), processor
        self.options = {"num_beams": 3, "repetition_penalty": 1.5, "max_new_tokens": 77} | options

    @torch.no_grad()
    def __call__(self, images: Tensor) -> list[str]:
        """A sentence for each image of float (n, 3, H, W) in [0, 1]."""
        inputs = self.processor(images=[_as_picture(i) for i in images], return_tensors="pt")
        ids = self.model.generate(**inputs.to(self.model.device), **self.options)
        return [text.strip() for text in self.processor.batch_decode(ids, skip_special_tokens=True)]


class DiffusersGenerator:
    """A text-to-image pipeline of diffusers; options go to the call (the paper: guidance 9.5, 85 steps)."""

    def __init__(self, pipeline: Callable[..., Any], **options: Any) -> None:
        self.pipeline = pipeline
        self.options = {"guidance_scale": 9.5, "num_inference_steps": 85} | options

    def __call__(self, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """float (n, 3, H, W) in [0, 1]."""
        draws = [torch.Generator().manual_seed(s) for s in seeds]
        made = self.pipeline(list(prompts), generator=draws, output_type="pt", **self.options).images
        return made.float().cpu().clamp(0, 1)


def _captions(captioner: Captioner, images: Tensor, name: str, words: int | None) -> list[str]:
    found = [str(c).strip() for c in captioner(images)]
    if len(found) != len(images):
        raise ValueError(f"the captioner gave {len(found)} captions for {len(images)} images of {name!r}")
    return found if words is None else [" ".join(c.split()[:words]) for c in found]


def _item(name: str, source: int, caption: str, text: str, seed: int) -> SupportItem:
    digest = hashlib.blake2b(json.dumps([name, source, caption, text, seed]).encode(), digest_size=8).hexdigest()
    return SupportItem(name, source, caption, text, seed, f"{digest}.png")


def _pictures(
    items: Sequence[SupportItem], generator: Generator, home: Path | None, known: Mapping[str, Any]
) -> tuple[Tensor, int]:
    """(images of all items, how many had to be made)."""
    missing = [i for i in items if home is None or i.file not in known or not (home / i.file).exists()]
    made = dict(zip((i.file for i in missing), _generated(missing, generator))) if missing else {}
    if home is not None:
        home.mkdir(parents=True, exist_ok=True)
        for file, image in made.items():
            temporary = home / f"{file}.partial"
            _as_picture(image).save(temporary, format="PNG")
            temporary.replace(home / file)
    # what was just made is read back too, so that a first and a second run give the same pixels
    return torch.stack([made[i.file] if home is None else _read_picture(home / i.file) for i in items]), len(missing)


def _generated(items: Sequence[SupportItem], generator: Generator) -> Tensor:
    """Images of the items; black ones are drawn again with another seed, a few times."""
    images = generator([i.prompt for i in items], [i.seed for i in items]).float()
    check_images(images)
    for attempt in range(1, TRIES):
        black = torch.nonzero(images.flatten(1).amax(1) <= BLACK)[:, 0].tolist()
        if not black:
            return images
        images[black] = generator([items[b].prompt for b in black], [items[b].seed + attempt for b in black]).float()
    black = torch.nonzero(images.flatten(1).amax(1) <= BLACK)[:, 0].tolist()
    if black:
        raise ValueError(f"the generator made only black images in {TRIES} tries, for example for {items[black[0]].prompt!r}")
    return images


def _as_picture(image: Tensor) -> Image.Image:
    return Image.fromarray((255 * image.permute(1, 2, 0)).round().to(torch.uint8).cpu().numpy())


def _read_picture(path: Path) -> Tensor:
    with Image.open(path) as picture:
        return torch.from_numpy(np.asarray(picture.convert("RGB")).copy()).permute(2, 0, 1).float() / 255


def _read_records(home: Path) -> dict[str, Any]:
    path = home / RECORDS
    if not path.exists():
        return {}
    try:
        return {r["file"]: r for r in json.loads(path.read_text())}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} holds no records of a support set ({error!r}): delete the folder, build again") from error


def _write_records(home: Path, items: Sequence[SupportItem]) -> None:
    temporary = home / f"{RECORDS}.partial"
    temporary.write_text(json.dumps([asdict(i) for i in items], indent=1) + "\n")
    temporary.replace(home / RECORDS)
