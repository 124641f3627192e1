"""Small foundation models trained by this project, loadable offline.

`path(name)` is an ordinary Hugging Face folder; `load(name)` gives the model and its tokenizer or processor; `resolve` turns
`zoo/<name>` into such a folder and leaves every other id alone. Each folder carries the metrics of the model and the command
that made it. `inflate` widens a model without changing its function, for honest speed measurements.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grainwise.naming import did_you_mean
from grainwise.zoo.inflate import inflate  # at once (it is light): the function takes the place of the submodule's name

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

WEIGHTS = Path(__file__).parent / "weights"
PREFIX = "zoo/"

__all__ = ["inflate", "load", "metrics", "names", "path", "resolve"]


def names() -> list[str]:
    """The models that are there, sorted."""
    return sorted(p.name for p in WEIGHTS.iterdir() if (p / "config.json").is_file()) if WEIGHTS.is_dir() else []


def path(name: str) -> str:
    """Folder of a zoo model, with or without the `zoo/` prefix. Raises ValueError naming the nearest models."""
    short = name.removeprefix(PREFIX)
    if short not in names():
        raise ValueError(f"no zoo model {name!r}. {did_you_mean(short, names())}")
    return str(WEIGHTS / short)


def resolve(model: str) -> str:
    """What `from_pretrained` understands: the folder of `zoo/<name>`; any other id or path unchanged."""
    return path(model) if model.startswith(PREFIX) else model


def metrics(name: str) -> dict[str, Any]:
    """The recorded held-out figures of a zoo model."""
    return json.loads((Path(path(name)) / "metrics.json").read_text())


def load(name: str, dtype: torch.dtype | None = None) -> tuple[PreTrainedModel, Any]:
    """(model in evaluation mode, its tokenizer; or its processor, if it sees) of a zoo model; dtype: float32 by default."""
    import torch
    import transformers

    folder = path(name)
    kind = json.loads((Path(folder) / "config.json").read_text())["architectures"][0]
    model = getattr(transformers, kind).from_pretrained(folder, dtype=dtype or torch.float32)
    sees = any((Path(folder) / file).is_file() for file in ("processor_config.json", "preprocessor_config.json"))
    reader = transformers.AutoProcessor if sees else transformers.AutoTokenizer
    return model.eval(), reader.from_pretrained(folder)
