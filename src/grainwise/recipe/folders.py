"""The output folder of a run: where a step keeps its files, and writing a file whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from grainwise.recipe.schema import PlannedStep


def step_folder(out: Path, index: int, step: PlannedStep) -> Path:
    """Where step `index` (from 0) keeps what it made."""
    return out / "steps" / f"{index + 1:02d}-{step.name}"


def last(folders: list[Path], name: str) -> Path | None:
    """The file or folder `name` of the last step that has one."""
    return next((f / name for f in reversed(folders) if (f / name).exists()), None)


def write_text(file: Path, text: str) -> None:
    """Write to a temporary name and rename."""
    temporary = file.with_name(file.name + ".partial")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, file)
