"""`grainwise zoo train` and `grainwise zoo check`."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from grainwise import zoo
from grainwise.naming import did_you_mean
from grainwise.zoo.specs import SPECS

TOLERANCE = 0.02  # relative: other processors round bf16 products differently
SMALL = 0.01  # absolute, for shares of a few hundred pictures
VISION = {  # which module trains and measures a vision model
    "vit-mini": "grainwise.zoo.vision.classifier",
    "dino-mini": "grainwise.zoo.vision.self_supervised",
    "clip-mini": "grainwise.zoo.vision.contrastive",
    "sam-mini": "grainwise.zoo.vision.segmenter",
    "detr-mini": "grainwise.zoo.vision.detector",
    "llava-mini": "grainwise.zoo.vision.converser",
}


def train(name: str, out: Path | None, *, compiled: bool, console: Console) -> dict[str, Any]:
    """Train a zoo model with a progress bar; the shared tokenizer is reused when another model has it already."""
    short = name.removeprefix(zoo.PREFIX)
    if short not in SPECS and short not in VISION:
        raise ValueError(f"no zoo model {name!r}. {did_you_mean(short, [*SPECS, *VISION])}")
    out = out or zoo.WEIGHTS / short
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bars:
        task = bars.add_task("preparing", total=None)

        def progress(done: int, total: int, what: str) -> None:
            bars.update(task, completed=done, total=total, description=what)

        if short in VISION:
            from grainwise.zoo.vision.saving import train_and_measure

            return train_and_measure(short, VISION[short], out, compiled=compiled, progress=progress)
        return _train_language(short, out, compiled, progress)


def _train_language(short: str, out: Path, compiled: bool, progress: Callable[[int, int, str], None]) -> dict[str, Any]:
    from transformers import AutoTokenizer

    from grainwise.zoo import language

    trained = [n for n in zoo.names() if n in SPECS]
    tokenizer = AutoTokenizer.from_pretrained(zoo.path(trained[0])) if trained else None
    return language.train(SPECS[short], out, tokenizer=tokenizer, compiled=compiled, progress=progress)


def check(names: list[str], console: Console) -> None:
    """Measure shipped models again; raises ValueError naming each figure that is off by more than `TOLERANCE`."""
    wrong = []
    for name in (one.removeprefix(zoo.PREFIX) for one in names or zoo.names()):
        recorded = zoo.metrics(name)
        measure = importlib.import_module(VISION.get(name, "grainwise.zoo.language")).measure
        for key, value in measure(Path(zoo.path(name))).items():
            if not isinstance(value, float):
                continue
            allowed = SMALL if name in VISION else TOLERANCE * abs(recorded[key])
            close = abs(value - recorded[key]) <= allowed
            verdict = "ok" if close else "DIFFERS"
            console.print(f"{name} {key}: recorded {recorded[key]}, now {value} {verdict}", highlight=False)
            if not close:
                wrong.append(f"{name} {key}")
    if wrong:
        raise ValueError("measured figures differ from the recorded ones: " + ", ".join(wrong))
