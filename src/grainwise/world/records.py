"""One record type for pictures, drawn or real, and the sequences that hold them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch
    from datasets import Dataset

    from grainwise.world.splits import Table
    from grainwise.world.taxonomy import World


@dataclass(frozen=True)
class ImageRecord:
    """A picture and what is known of it; what is unknown is None or empty.

    image: uint8 (height, width, 3); label: class of the whole picture; boxes: float32 (things, 4), x0 y0 x1 y1 in pixels;
    classes: int64 (things,); masks: bool (things, height, width); regions: int64 (height, width), the class of every pixel;
    captions: texts;
    name: where it came from; extra: anything more.
    """

    image: np.ndarray
    label: int | None = None
    boxes: np.ndarray = field(default_factory=lambda: np.zeros((0, 4), np.float32))
    classes: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    masks: np.ndarray | None = None
    regions: np.ndarray | None = None
    captions: tuple[str, ...] = ()
    name: str = ""
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.image.dtype != np.uint8 or self.image.ndim != 3 or self.image.shape[2] != 3:
            raise ValueError(
                f"{self.name or 'a record'}: image is {self.image.dtype} {self.image.shape}; uint8 (height, width, 3) is needed"
            )
        if len(self.boxes) != len(self.classes):
            raise ValueError(f"{self.name or 'a record'}: {len(self.boxes)} boxes and {len(self.classes)} classes")
        for what, array in (("masks", self.masks), ("regions", self.regions)):
            if array is not None and array.shape[-2:] != self.image.shape[:2]:
                raise ValueError(f"{self.name or 'a record'}: {what} {array.shape} do not fit an image of {self.image.shape}")


class RecordSet(Sequence[ImageRecord]):
    """Records read when asked for.

    Args:
        read: index -> record; the same index always gives the same record.
        length: how many there are.
        class_names: names of labels and of things' classes.
        region_names: names of the classes of `regions`.
    """

    def __init__(
        self, read: Callable[[int], ImageRecord], length: int, class_names: Sequence[str], region_names: Sequence[str] = ()
    ) -> None:
        self.read, self.length = read, length
        self.class_names, self.region_names = tuple(class_names), tuple(region_names)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self.length))]
        if not -self.length <= index < self.length:
            raise IndexError(f"record {index} of {self.length}")
        return self.read(int(index) % self.length)

    def __iter__(self) -> Iterator[ImageRecord]:
        return (self.read(index) for index in range(self.length))

    def labels(self) -> np.ndarray:
        """int64 (length,): every record's label (reads every record); -1 where a record has none."""
        return np.array([-1 if record.label is None else record.label for record in self], np.int64)

    def to_torch(self, transform: Callable[[torch.Tensor], torch.Tensor] | None = None) -> torch.utils.data.Dataset:
        """A torch Dataset of {"pixel_values": float (3, height, width) in [0, 1], "labels": int}, after `transform`."""
        return _TorchRecords(self, transform)

    def to_datasets(self) -> Dataset:
        """A `datasets.Dataset` with image, label, name, captions, and objects (bbox as x y width height, category)."""
        from datasets import ClassLabel, Dataset, Features, Image, Value
        from datasets import Sequence as Many

        label = ClassLabel(names=list(self.class_names)) if self.class_names else Value("int64")
        features = Features(
            {
                "image": Image(),
                "label": label,
                "name": Value("string"),
                "captions": Many(Value("string")),
                "objects": {"bbox": Many(Many(Value("float32"), length=4)), "category": Many(Value("int64"))},
            }
        )

        def rows() -> Iterator[dict[str, Any]]:
            from PIL import Image as Picture

            for record in self:
                boxes = record.boxes.copy()
                boxes[:, 2:] -= boxes[:, :2]
                objects = {"bbox": boxes.tolist(), "category": record.classes.tolist()}
                yield {
                    "image": Picture.fromarray(record.image),
                    "label": record.label,
                    "name": record.name,
                    "captions": list(record.captions),
                    "objects": objects,
                }

        return Dataset.from_list(list(rows()), features=features)


def _TorchRecords(records: RecordSet, transform: Callable[[torch.Tensor], torch.Tensor] | None) -> torch.utils.data.Dataset:
    """The torch form; made in a function so that reading records does not import torch."""
    import torch

    class Records(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(records)

        def __getitem__(self, index: int) -> dict[str, Any]:
            record = records[index]
            pixels = torch.from_numpy(record.image.copy()).permute(2, 0, 1).float() / 255
            item: dict[str, Any] = {"pixel_values": pixels if transform is None else transform(pixels)}
            if record.label is not None:
                item["labels"] = record.label
            return item

    return Records()


def species_records(world: World, table: Table, *, size: int = 64, **options: Any) -> RecordSet:
    """The rows of a split as records: label, box, mask, parts (`extra["parts"]`) and three captions (coarse, medium, fine)."""

    def read(index: int) -> ImageRecord:
        drawn = world.draw(table.labels[index], table.individuals[index], size=size, style=table.style, **options)
        species = world.species[int(drawn.labels[0])]
        return ImageRecord(
            image=drawn.images[0],
            label=species.index,
            boxes=drawn.boxes,
            classes=drawn.labels,
            masks=drawn.masks,
            captions=tuple(species.describe(level) for level in ("coarse", "medium", "fine")),
            name=f"{species.name} {int(table.individuals[index])}",
            extra={"parts": drawn.parts[0], "variety": int(drawn.varieties[0])},
        )

    return RecordSet(read, len(table), [species.name for species in world.species])
