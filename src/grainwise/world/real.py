"""Real pictures through the same record type: folders by class, COCO JSON, Omniglot, CamVid, scikit-learn's digits,
scikit-image's samples.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from grainwise.data.sources import shared_folder
from grainwise.extras import require
from grainwise.world.records import ImageRecord, RecordSet

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
CAMVID_CLASSES = (
    "sky",
    "building",
    "pole",
    "road",
    "pavement",
    "tree",
    "sign",
    "fence",
    "car",
    "pedestrian",
    "bicyclist",
    "void",
)
SAMPLES = ("astronaut", "chelsea", "coffee", "rocket", "camera", "coins", "page", "horse")


def read_image(source: Path | bytes, name: str = "") -> np.ndarray:
    """uint8 (height, width, 3) from a file or its bytes. Raises ValueError naming a file that is no picture."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as picture:
            return np.array(picture.convert("RGB"))
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{name or str(source)} is not a readable picture: {error}") from error


def image_folder(folder: str | Path) -> RecordSet:
    """`folder/<class>/<picture>`: one record a picture, its class the sub-folder's name. Raises ValueError where there is
    none.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ValueError(f"{root} is no folder; give one whose sub-folders are classes")
    files = sorted(path for path in root.glob("*/*") if path.suffix.lower() in SUFFIXES)
    if not files:
        raise ValueError(f"{root} has no pictures in sub-folders; expected {root}/<class>/<name>.png")
    names = sorted({path.parent.name for path in files})

    def read(index: int) -> ImageRecord:
        return ImageRecord(
            read_image(files[index]), label=names.index(files[index].parent.name), name=str(files[index].relative_to(root))
        )

    return RecordSet(read, len(files), names)


def coco(annotations: str | Path, images: str | Path) -> RecordSet:
    """A COCO instance (or caption) JSON with its folder of pictures.

    Boxes become x0 y0 x1 y1; category ids become 0..K-1 in the order of the file; polygons and uncompressed or compressed
    run lengths become masks (compressed ones need the extra `vision`). Raises ValueError for a file that is no COCO JSON.
    """
    path, root = Path(annotations), Path(images)
    try:
        content = json.loads(path.read_text())
        pictures, things, categories = content["images"], content.get("annotations", []), content.get("categories", [])
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no COCO JSON (a dict with images, annotations, categories): {error!r}") from error
    number = {category["id"]: index for index, category in enumerate(categories)}
    of_image: dict[int, list[dict[str, Any]]] = {}
    for thing in things:
        of_image.setdefault(thing["image_id"], []).append(thing)

    def read(index: int) -> ImageRecord:
        picture = pictures[index]
        image = read_image(root / picture["file_name"])
        own = of_image.get(picture["id"], [])
        objects = [thing for thing in own if "bbox" in thing]
        boxes = np.array([thing["bbox"] for thing in objects], np.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        masks = [decode_mask(thing["segmentation"], image.shape[:2]) for thing in objects if thing.get("segmentation")]
        return ImageRecord(
            image,
            boxes=boxes,
            classes=np.array([number[thing["category_id"]] for thing in objects], np.int64),
            masks=np.stack(masks) if masks and len(masks) == len(objects) else None,
            captions=tuple(thing["caption"] for thing in own if "caption" in thing),
            name=picture["file_name"],
        )

    return RecordSet(read, len(pictures), [category["name"] for category in categories])


def decode_mask(segmentation: Any, shape: tuple[int, int]) -> np.ndarray:
    """bool `shape` = (height, width): a COCO segmentation as a mask.

    Polygons are lists of x y x y ...; run lengths are {"size", "counts"}, columns first, zeros first.
    """
    if isinstance(segmentation, list):
        from PIL import Image, ImageDraw

        canvas = Image.new("1", (shape[1], shape[0]))
        for polygon in segmentation:
            ImageDraw.Draw(canvas).polygon([float(value) for value in polygon], fill=1, outline=1)
        return np.array(canvas)
    counts = segmentation["counts"]
    if isinstance(counts, list):
        flat = np.repeat(np.arange(len(counts)) % 2 == 1, counts)
        return flat.reshape(shape[1], shape[0]).T
    codec = require("faster_coco_eval.core.mask", extra="vision")
    return codec.decode(segmentation).astype(bool)


def omniglot(part: str = "background", folder: str | Path | None = None) -> RecordSet:
    """Handwritten characters; the label is the character, `extra["alphabet"]` its alphabet, both by the archive's order.

    part: "background" (the small training set). folder: where `omniglot/` is; the shared data folder by default.
    Raises ValueError when the archive is not there.
    """
    names = {"background": "images_background_small1.zip"}
    if part not in names:
        raise ValueError(f"part {part!r} is unknown; choose from {', '.join(names)}")
    archive = _shared(folder, "omniglot") / names[part]
    try:
        files = zipfile.ZipFile(archive)
    except (OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{archive} is not a readable archive: {error}") from error
    pictures = sorted(name for name in files.namelist() if name.endswith(".png"))
    characters = sorted({name.rsplit("/", 1)[0] for name in pictures})
    number = {name: index for index, name in enumerate(characters)}
    alphabets = sorted({name.split("/")[1] for name in characters})

    def read(index: int) -> ImageRecord:
        name = pictures[index]
        alphabet = name.split("/")[1]
        extra = {"alphabet": alphabet, "alphabet_label": alphabets.index(alphabet)}
        return ImageRecord(read_image(files.read(name), name), label=number[name.rsplit("/", 1)[0]], name=name, extra=extra)

    return RecordSet(read, len(pictures), ["/".join(name.split("/")[1:]) for name in characters])


def camvid(split: str = "train", folder: str | Path | None = None) -> RecordSet:
    """Street scenes with a class for every pixel (`regions`; 11 is void). split: "train" or "val"."""
    root = _shared(folder, "camvid") / split
    files = sorted(root.glob("*.jpg"))
    if not files:
        raise ValueError(f"{root} holds no pictures; choose the split train or val")

    def read(index: int) -> ImageRecord:
        from PIL import Image

        regions = np.array(Image.open(files[index].with_suffix(".png"))).astype(np.int64)
        return ImageRecord(read_image(files[index]), regions=regions, name=files[index].stem)

    return RecordSet(read, len(files), (), CAMVID_CLASSES)


def digits() -> RecordSet:
    """scikit-learn's 1,797 handwritten digits, 8 x 8, grey as colour."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = np.repeat((data.images[..., None] * 255 / 16).round().astype(np.uint8), 3, axis=3)
    return RecordSet(
        lambda index: ImageRecord(images[index], label=int(data.target[index]), name=f"digit {index}"),
        len(images),
        [str(k) for k in range(10)],
    )


def samples(names: Sequence[str] = SAMPLES) -> RecordSet:
    """scikit-image's sample pictures that come inside the package (extra `vision`)."""
    data = require("skimage.data", extra="vision")
    unknown = [name for name in names if name not in SAMPLES]
    if unknown:
        raise ValueError(f"samples {unknown} are unknown; choose from {', '.join(SAMPLES)}")

    def read(index: int) -> ImageRecord:
        image = np.asarray(getattr(data, names[index])())
        if image.dtype == bool:
            image = image.astype(np.uint8) * 255
        return ImageRecord(
            np.ascontiguousarray(np.repeat(image[..., None], 3, 2) if image.ndim == 2 else image[..., :3]),
            label=index,
            name=names[index],
        )

    return RecordSet(read, len(names), names)


def _shared(folder: str | Path | None, name: str) -> Path:
    root = Path(folder) if folder is not None else shared_folder()
    if root is None:
        raise ValueError(f"{name} is read from the shared data folder: set GRAINWISE_DATA to it or give folder=")
    return root if root.name == name else root / name
