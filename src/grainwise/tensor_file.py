"""One safetensors file for tensors and a JSON record, written whole or not at all, that says what kind it is."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor


def write_tensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], kind: str, about: Mapping[str, Any]) -> None:
    """Write tensors with `about` (JSON values) as metadata."""
    from safetensors.torch import save_file

    temporary = Path(f"{os.fspath(path)}.partial")
    plain = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    save_file(plain, temporary, metadata={"kind": kind, "about": json.dumps(dict(about))})
    temporary.replace(path)


def read_tensors(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, record). Raises ValueError when the file is damaged or holds something else."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is no readable safetensors file: {error}") from error
    if about.get("kind") != kind:
        raise ValueError(f"{path} holds {about.get('kind', 'something else')!r}, expected a saved {kind}")
    return tensors, json.loads(about["about"])
